"""What Inductor's own `numerics="strict"` writes for an H100, read on a machine without a GPU: `tests/codegen` pretends one.

    python benchmarks/strict_written.py calls --json written.json

Each kernel that the package has for a GPU is compiled by torch.compile with no options of bnbref's door, once by default and once
with numerics="strict": its definition, or its formulation where the definition makes a table, which a pretended GPU cannot hold.
Whether products and sums may be contracted to one rounding, and how floats are divided, stands in what Triton makes of it. Needs
torch 2.14 with its triton, and g++. Prints a table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "codegen")]

import calls  # noqa: E402
import pretend  # noqa: E402
import torch  # noqa: E402
import written  # noqa: E402
from strict_numerics import MODES  # noqa: E402

from bnbref.kernels import Kernel, variants  # noqa: E402


def made(kernel: Kernel[..., Any], tensors: list[Any], constants: Any, options: dict[str, Any], plain: bool) -> str:
    """In words what is inexact in the code; plain: of the definition."""
    torch._dynamo.reset()
    kernel.variants.clear()
    form = kernel._plain if plain else kernel.formulation
    with (
        mock.patch.object(variants, "options_for", return_value=options),
        mock.patch.object(Kernel, "formulation", form),
    ):
        kernels = written.compiled(written.source_of(kernel, tensors, constants))
    kernel.variants.clear()
    floats = {name for one in kernels for name in one["floats"]}
    found = ["contracts"] if any(name.startswith("fma") for name in floats) else []
    found += ["divides within 2 ulp"] if any("div.full" in name for name in floats) else []
    return " and ".join(found) or "neither"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calls", help="the module of calls: calls")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    sys.argv[1:] = [args.calls]
    pretend.install()
    table: dict[str, dict[str, str]] = {}
    print(
        f"torch {torch.__version__}, written for an H100\n| kernel | of its | {' | '.join(MODES)} |\n|---|---|---|---|"
    )

    def run(kernel: Kernel[..., Any], tensors: list[Any], constants: Any) -> Any:
        name = calls.variant(kernel.name, tensors, constants)
        if name not in table:
            try:
                form, plain = "definition", True
                row = {mode: made(kernel, tensors, constants, options, plain) for mode, options in MODES.items()}
            except Exception:  # Dynamo's word for a tensor that cannot be made: RuntimeError, or one of its own
                form, plain = "formulation", False
                row = {mode: made(kernel, tensors, constants, options, plain) for mode, options in MODES.items()}
            table[name] = {"form": form, **row}
            print(f"| {name} | {' | '.join(table[name].values())} |", flush=True)
        return kernel.definition(*tensors, **constants)

    calls.run_asked(run)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
