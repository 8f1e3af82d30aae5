"""What Inductor's own `numerics="strict"` keeps: every definition of the registry, compiled by torch.compile and nothing else.

    python benchmarks/strict_numerics.py --device cpu --json strict.json

Each definition is compiled by `torch.compile` with no options of bnbref's door, once by default and once with numerics="strict".
Its results are compared bit for bit with the uncompiled ones, on the inputs of tests/strategies.py.
Needs torch 2.14 and hypothesis. Prints a table: of how many cases the bits differ, and the first of them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from conftest import difference, same_bits
from test_proof import KERNELS, REGISTRY, fresh

MODES: dict[str, dict[str, Any]] = {"default": {}, "strict": {"numerics": "strict"}}


def cases(variant: Callable[..., Any], count: int) -> list[Any]:
    """So many inputs of one size, the same in every run."""
    found: list[Any] = []

    @settings(
        max_examples=count, database=None, derandomize=True, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(variant(st.just(3)))
    def collect(case: Any) -> None:
        found.append(case)

    collect()
    return found


def moved(args: Any, device: str) -> list[Any]:
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in fresh(args)]


def compare(name: str, variant: str, device: str, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each mode: how many cases have other bits, of how many, the first difference, or why there is none."""
    definition = REGISTRY[name].definition
    drawn = cases(KERNELS[name][variant], count)
    for mode, options in MODES.items():
        torch._dynamo.reset()
        compiled = torch.compile(definition, fullgraph=True, options=options)
        wrong, first, failed = 0, "", ""
        with torch.no_grad():
            for case in drawn:
                want = definition(*moved(case.args, device), **case.kwargs)
                try:
                    got = compiled(*moved(case.args, device), **case.kwargs)
                except Exception as error:  # what the compiler raises is a row of the table
                    failed = f"{type(error).__name__}: {error}".splitlines()[0]
                    break
                if not same_bits(got, want):
                    wrong += 1
                    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
                    unequal = next((g, w) for g, w in pairs if not same_bits(g, w))
                    first = first or difference(*(x.cpu() for x in unequal)).splitlines()[0]
        yield mode, {"cases": len(drawn), "differ": wrong, "first": first, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 1000
    table: dict[str, Any] = {}
    print(f"torch {torch.__version__}, {args.device}; cases with other bits than uncompiled")
    for name in sorted(REGISTRY):
        if args.only not in name:
            continue
        for variant in KERNELS[name]:
            row = dict(compare(name, variant, args.device, args.cases))
            table[f"{name} {variant}"] = {"exact": REGISTRY[name].exact, **row}
            cells = [r["failed"] or f"{r['differ']} of {r['cases']}" for r in row.values()]
            print(f"| `{name}` {variant} | {' | '.join(cells)} | {row['strict']['first']} |", flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "device": args.device, "rows": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
