"""The table of docs/content/dropin.md: every public name of bitsandbytes, whether bnbref serves it, and what differs.

python docs/surface.py            the table, from tests/data/bitsandbytes_names.txt
python docs/surface.py --walk     the names, from the bitsandbytes that is installed
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from bnbref.integrations.bitsandbytes.surface import DIFFERS, MISSING, MISSING_MODULES, SURFACE

NAMES = Path(__file__).resolve().parent.parent / "tests" / "data" / "bitsandbytes_names.txt"
HEAD = ("| name | | |", "|---|---|---|")


def walk() -> Iterator[str]:
    """`module.name` of all that the modules of bitsandbytes define and do not call private; modules of kernels left out."""
    import bitsandbytes

    found = [module.name for module in pkgutil.walk_packages(bitsandbytes.__path__, "bitsandbytes.")]
    for path in ["bitsandbytes", *found]:
        short = path.removeprefix("bitsandbytes").removeprefix(".")
        if short.split(".")[0] in (*MISSING_MODULES, "__main__") or short.startswith("libbitsandbytes"):
            continue
        module = importlib.import_module(path)
        for name, value in sorted(vars(module).items()):
            own = getattr(value, "__module__", path)
            home = own == path or (short in ("", "nn", "optim") and own.startswith("bitsandbytes"))
            if home and not name.startswith("_") and not isinstance(value, ModuleType):
                yield f"{short}.{name}".removeprefix(".")


def split(name: str) -> tuple[str, str]:
    """Module and name."""
    module, _, attribute = name.rpartition(".")
    return module, attribute


def row(name: str) -> str:
    """A line of the table."""
    module, attribute = split(name)
    if attribute in SURFACE.get(module, {}):
        return f"| `{name}` | yes | {DIFFERS.get(name, '')} |".replace("|  |", "| |")
    return f"| `{name}` | no | {MISSING[name]} |"


def table() -> str:
    """All names, then the operators and the modules that are not there."""
    names = NAMES.read_text(encoding="utf-8").split()
    modules = [f"| `{module}` | no | {reason} |" for module, reason in MISSING_MODULES.items()]
    return "\n".join([*HEAD, *map(row, names), *modules])


if __name__ == "__main__":
    print("\n".join(walk()) if "--walk" in sys.argv else table())
