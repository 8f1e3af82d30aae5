"""Installations: each a fresh environment with the built wheel in it, in which the fast suite runs.

    make matrix                                       every row
    python tests/matrix.py NAME ...                   some rows; --list names them
    python tests/matrix.py --write                    and the lines of docs/content/matrix.md that have a result here

An environment is made under build/matrix and kept, its results beside it as JSON. A row needs `python3.X` on the PATH.
What `pip install torch` brings is the build of the package index in use: on Linux one for CUDA, of several gigabytes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "content" / "matrix.md"

# Formats compiled, every command, the layers, small models; a test whose extra is missing is skipped.
FAST = ("selfcheck", "package", "cli", "linear4bit", "linear8bit", "models")

TOOLS = ("pytest>=9", "hypothesis", "expecttest")
HF = ("transformers", "peft", "accelerate", "safetensors", "numpy")
OLD_CPU = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Row:
    """An environment: a Python, a torch, what else is installed, and what a process finds around it."""

    name: str
    what: str
    python: str = "3.11"
    torch: str = "torch==2.13.0"
    packages: tuple[str, ...] = HF
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Rows that differ in what is around a process share an environment."""
        words = (self.python, self.torch, *self.packages)
        return BUILD / "-".join(word.replace("==", "-") for word in words if word not in HF or word == "transformers")


ROWS = (
    Row("alone", "bnbref and what it requires, nothing else", packages=()),
    Row("cpu", "torch for CPUs, a CPU with AVX512"),
    Row("avx2", "a CPU without AVX512 and bfloat16", environment=OLD_CPU),
    Row("no compiler", "no C++ compiler", environment={"CXX": "no-such-compiler"}),
    Row("torch 2.14", "what pip brings: torch for CUDA, no GPU", torch="torch==2.14.1"),
    Row("torch 2.11", "the oldest torch", torch="torch==2.11.0"),
    Row("torch newest", "the newest torch", torch="torch"),
    Row("transformers 5.17", "the oldest transformers", packages=("transformers==5.17.0", *HF[1:])),
    Row("python 3.10", "the oldest Python", python="3.10", torch="torch==2.14.1"),
    Row("python 3.12", "", python="3.12", torch="torch==2.14.1"),
    Row("python 3.13", "", python="3.13", torch="torch==2.14.1"),
    Row("python 3.14", "the newest Python", python="3.14", torch="torch==2.14.1"),
)

VERSIONS = """
import importlib.metadata as m, json, platform, torch
names = ("numpy", "transformers", "peft", "accelerate")
found = {name: m.version(name) for name in names if any(m.packages_distributions().get(name, ()))}
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, **found}))
"""


class Failed(RuntimeError):
    """A command that ended with another status than 0."""


def run(log: Path, *command: str | Path, environment: dict[str, str] | None = None, check: bool = True) -> str:
    """What a command prints, also into the log; `Failed` with its last line. Its directory is not the checkout."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "BNBREF"))}
    words = [str(word) for word in command]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=file, text=True, cwd=log.parent, env=inherited | (environment or {})
        )
        file.write(done.stdout)
    if check and done.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        raise Failed(f"{Path(words[0]).name} {' '.join(words[1:4])}: {lines[-1]}")
    return done.stdout


def install(row: Row, wheel: Path, log: Path) -> Path:
    """The environment's interpreter; torch first, so that nothing else chooses its build."""
    interpreter = shutil.which(f"python{row.python}")
    if interpreter is None:
        raise Failed(f"there is no python{row.python} here")
    python = row.folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    if not python.exists():
        run(log, interpreter, "-m", "venv", row.folder / "venv")
        run(log, *pip, row.torch)
    run(log, *pip, *TOOLS, *row.packages)
    run(log, *pip, "--no-deps", "--force-reinstall", wheel)
    run(log, *pip, wheel)
    return python


def measure(row: Row, wheel: Path) -> dict[str, Any]:
    """A row's result: versions, `info`, and the tests that passed, were skipped, and failed."""
    row.folder.mkdir(parents=True, exist_ok=True)
    log = row.folder / f"{row.name.replace(' ', '-')}.log"
    log.unlink(missing_ok=True)
    result: dict[str, Any] = {}
    start = time.monotonic()
    try:
        python = install(row, wheel, log)
        result["versions"] = json.loads(run(log, python, "-c", VERSIONS).strip().splitlines()[-1])
        environment = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(row.folder / "cache"), **row.environment}
        result["info"] = (
            run(log, python, "-m", "bnbref", "info", "--seconds", "100", environment=environment)
            .strip()
            .splitlines()[-1]
        )
        where = run(log, python, "-c", "import bnbref; print(bnbref.__file__)", environment=environment).strip()
        if not Path(where).is_relative_to(row.folder):
            raise Failed(f"bnbref is imported from {where}, not from the wheel")
        report = row.folder / "tests.xml"
        report.unlink(missing_ok=True)
        tests = [ROOT / "tests" / f"test_{name}.py" for name in FAST]
        # pytest's script and not `python -m pytest`, which would put the checkout before the wheel.
        pytest = (python.parent / "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml")
        run(log, *pytest, f"--junitxml={report}", *tests, environment=environment, check=False)
        result |= outcomes(report)
    except Failed as error:
        result["error"] = str(error)
    result["seconds"] = round(time.monotonic() - start)
    return result


def outcomes(report: Path) -> dict[str, Any]:
    """Counts, the names of the tests that failed, and why tests were skipped, from pytest's report in XML."""
    if not report.exists():
        raise Failed("pytest did not run: see the log")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "why": (child.get("message") or "").splitlines()[0]}
        for case in cases
        for child in case
        if child.tag in ("failure", "error")
    ]
    skipped = [why_skipped(child) for case in cases for child in case if child.tag == "skipped"]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": {why: skipped.count(why) for why in sorted(set(skipped))},
    }


def why_skipped(element: ElementTree.Element) -> str:
    """The reason: of a file that is skipped as a whole it stands in the text alone."""
    whole = re.search(r"Skipped: (.*)'\)$", element.text or "")
    return whole[1] if whole else element.get("message") or ""


def label(row: Row) -> str:
    """What stands in the first column."""
    return f"{row.name}: {row.what}".removesuffix(": ")


def line(row: Row, result: dict[str, Any]) -> str:
    """A row of the page: the environment by what ran, passed, failed, and why."""
    versions = result.get("versions", {})
    cells = [label(row), *(versions.get(name, "") for name in ("python", "torch", "transformers"))]
    if "error" in result:
        cells += [f"not run: {result['error']}", "", "", ""]
    else:
        cells += [result["info"].partition(":")[0], f"{result['passed']}"]
        cells += ["; ".join(f"{n}: {why.removeprefix('Skipped: ')}" for why, n in result["skipped"].items()) or "0"]
        cells += ["; ".join(f"`{f['test'].rpartition('.')[2]}`: {f['why'][:100]}" for f in result["failed"]) or "0"]
    return f"| {' | '.join(cells)} |"


def write(results: dict[str, dict[str, Any]]) -> None:
    """Put the results between the page's two marks. A row that did not run here keeps the line that it has."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
    before, _, tail = rest.partition("<!-- end of the table -->\n")
    titles, rule, *old = before.splitlines()
    kept = {text.split(" | ")[0].removeprefix("| "): text for text in old}
    lines = [
        line(row, results[row.name]) if row.name in results else kept.get(label(row), line(row, {"error": "not yet"}))
        for row in ROWS
    ]
    table = "\n".join((titles, rule, *lines))
    PAGE.write_text(f"{head}<!-- table -->\n{table}\n<!-- end of the table -->\n{tail}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows (default: all)")
    parser.add_argument("--list", action="store_true", help="say which rows there are")
    parser.add_argument("--write", action="store_true", help="write the table into the documentation")
    args = parser.parse_args()
    rows = {row.name: row for row in ROWS}
    unknown = [name for name in args.names if name not in rows]
    if unknown or args.list:
        print("\n".join(f"{row.name:<20}{row.what}" for row in ROWS))
        return 2 if unknown else 0
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if args.names or not args.write:
        dist = BUILD / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        run(BUILD / "wheel.log", sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", dist, ROOT)
        wheel = next(dist.glob("*.whl"))
        for name in args.names or rows:
            results[name] = measure(rows[name], wheel)
            print(line(rows[name], results[name]), flush=True)
            file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if args.write:
        write(results)
    return int(any("error" in result or result["failed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
