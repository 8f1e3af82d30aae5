"""Options of `pytest --pyargs bnbref.conformance`, and the last lines of its output."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from bnbref.conformance import backends, made, vectors
from bnbref.conformance.backends import Backend
from bnbref.conformance.command import Refused, usable_device
from bnbref.conformance.findings import broken_by
from bnbref.conformance.judge import Result
from bnbref.conformance.report import Report, report


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("bnbref.conformance")
    group.addoption("--backend", default="bnbref-eager", help="one of the kit's, or package.module[:attribute]")
    group.addoption("--device", default="cpu", help="where the backend runs")
    group.addoption("--xfails", help="file of case ids, patterns too, that are known to fail; # begins a comment")
    group.addoption("--max-examples", type=int, default=20, help="random inputs for each property (default: 20)")


class Run:
    """The backend under test, and what it returned."""

    def __init__(self, config: pytest.Config) -> None:
        # As a part of a larger run, where conftest.py came too late to add options, the reference is tested uncompiled.
        self.backend: Backend = backends.load(config.getoption("--backend", "bnbref-eager"))
        self.device = usable_device(config.getoption("--device", "cpu"))
        self.examples = int(config.getoption("--max-examples", 20))
        if self.examples < 1:
            raise ValueError(f"--max-examples must be at least 1, got {self.examples}")
        file = config.getoption("--xfails", None)
        lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
        self.xfails = [word for line in lines if (word := line.partition("#")[0].strip())]
        self.results: list[Result] = []

    def report(self) -> Report:
        """The report of the cases that have run."""
        return report(self.backend, self.device, self.results, small=False)


_RUN = pytest.StashKey[Run]()


def the_run(config: pytest.Config) -> Run:
    """The run of this session. pytest.UsageError where its options name no backend, no device that can be used, or no file."""
    if _RUN not in config.stash:
        try:
            config.stash[_RUN] = Run(config)
        except (AttributeError, ImportError, OSError, Refused, RuntimeError, ValueError) as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[_RUN]


@pytest.fixture
def tested(request: pytest.FixtureRequest) -> Run:
    """The backend under test."""
    return the_run(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case; those in the xfails file are marked."""
    if "case" not in metafunc.fixturenames:
        return
    patterns = the_run(metafunc.config).xfails

    def marks(name: str) -> Any:
        known = any(fnmatch(name, pattern) for pattern in patterns)
        return pytest.mark.xfail(reason="in the xfails file", strict=False) if known else ()

    cases = [*vectors.read_all(), *made.cases(the_run(metafunc.config).backend)]
    metafunc.parametrize("case", [pytest.param(case, id=case.id, marks=marks(case.id)) for case in cases])


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Each broken rule and its flag, after everything else that pytest prints."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _RUN in config.stash:
        for line in broken_by(config.stash[_RUN].report().findings):
            reporter.write_line(f"broken: {line}")
