"""Gives `pytest --pyargs bnbref.conformance` its options, which a package's conftest.py is read too late for.

A module of its own, because pytest loads it in every session, and importing bnbref would import torch.
"""

from typing import Any


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    """Registers the kit's conftest.py where the kit is asked for. Elsewhere `--backend` and `--device` may be others' options."""
    if "--pyargs" in args and any(arg.startswith("bnbref.conformance") for arg in args):
        from bnbref.conformance import conftest

        # Under the name that pytest itself will give it, so that it is not loaded twice.
        early_config.pluginmanager.register(conftest, conftest.__file__)
