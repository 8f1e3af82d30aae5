"""The import system's part of the alias: `import bitsandbytes`, `find_spec`, and `importlib.metadata` are answered here.

Standard library alone, and nothing of bnbref until bitsandbytes is imported: with the start-up hook on, every process of
this Python reads this file before it does anything else.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "bitsandbytes"
VERSION = "0.50.2"
"""The version of bitsandbytes whose names are served, and that is reported by default."""

SWITCH = "BNBREF_AS_BITSANDBYTES"
"""Environment variable of the start-up hook: "1" serves, "force" serves even where bitsandbytes is installed."""

PACKAGES = ("", "autograd", "nn", "optim")
MODULES = (
    *PACKAGES, "_ops", "autograd._functions", "cextension", "functional", "nn.modules", "nn.parametrize", "optim.adagrad",
    "optim.adam", "optim.adamw", "optim.ademamix", "optim.lamb", "optim.lars", "optim.lion", "optim.optimizer", "optim.rmsprop",
    "optim.sgd", "utils",
)  # fmt: skip
"""The modules of bitsandbytes that are served, by their names without `bitsandbytes.`."""

MENDED = ("transformers.integrations.bitsandbytes", "peft")
"""Modules of other libraries that are changed after their import: see `alias.mend`."""


class Finder(importlib.metadata.DistributionFinder):
    """Finds the modules of bitsandbytes and its distribution; nothing is written to disk.

    version: what is reported. guarded: ImportError if bitsandbytes turns out to be installed.
    """

    serves_bnbref = True  # a finder of the start-up hook is of another class of this name

    def __init__(self, version: str, guarded: bool) -> None:
        self.version = version
        self.guarded = guarded

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for each of `MODULES`, and one for each of the modules that are mended once they are imported."""
        if fullname in MENDED:
            return _then_mend(importlib.machinery.PathFinder.find_spec(fullname, path, target))
        top, _, rest = fullname.partition(".")
        if top != NAME or rest not in MODULES:
            return None
        if self.guarded and not rest and is_installed():
            raise ImportError(
                f"{SWITCH} is set, but bitsandbytes is installed: uninstall it, or set {SWITCH}=force to leave it aside"
            )
        loader = Loader(self.version)
        return importlib.machinery.ModuleSpec(fullname, loader, origin="bnbref", is_package=rest in PACKAGES)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        """The distribution, if it is asked for by its name or by none."""
        name = None if context is None else context.name
        if name is None or name.lower() == NAME:
            yield Distribution(self.version)


def _then_mend(spec: importlib.machinery.ModuleSpec | None) -> importlib.machinery.ModuleSpec | None:
    """The same spec, whose loader calls `alias.mend` when it has loaded the module."""
    loader: Any = None if spec is None else spec.loader
    if loader is not None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("bnbref.integrations.bitsandbytes.alias").mend(module)

        loader.exec_module = exec_module
    return spec


class Loader(importlib.abc.Loader):
    """Makes a module and lets `bnbref.integrations.bitsandbytes.alias` fill it."""

    def __init__(self, version: str) -> None:
        self.version = version

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """An empty module, as Python makes it."""

    def exec_module(self, module: ModuleType) -> None:
        """Gives a module its names."""
        importlib.import_module("bnbref.integrations.bitsandbytes.alias").fill(module, self.version)


class Distribution(importlib.metadata.Distribution):
    """The metadata of bitsandbytes, as `importlib.metadata` finds them."""

    def __init__(self, version: str) -> None:
        self._version = version

    def read_text(self, filename: str) -> str | None:
        """The two files that are looked for."""
        if filename == "top_level.txt":
            return NAME
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {self._version}\nSummary: bnbref under this name\n"
        return None

    def locate_file(self, path: Any) -> Path:
        """Next to this file: there is none to locate."""
        return Path(__file__).with_name(str(path))


def current() -> Any:
    """The finder that is at work, None if none is."""
    return next((finder for finder in sys.meta_path if getattr(finder, "serves_bnbref", False)), None)


def is_installed() -> bool:
    """Whether bitsandbytes itself could be imported, were it not for the alias."""
    return importlib.machinery.PathFinder.find_spec(NAME) is not None


def at_startup() -> None:
    """Called by the `.pth` file where `SWITCH` is set. Whether bitsandbytes is installed is asked when it is imported."""
    if current() is None:
        sys.meta_path.insert(0, Finder(VERSION, guarded=os.environ.get(SWITCH) != "force"))
