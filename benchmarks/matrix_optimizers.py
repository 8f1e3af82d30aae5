"""Steps of optimizers that see whole matrices, on the CPU: milliseconds and ratios (theirs / ours; above 1 is faster).

    python benchmarks/matrix_optimizers.py [--size 1024] [--matrices 8] [--threads 2] [--rounds 9] [--processor-time]

Against torch.optim and, where it is installed, pytorch_optimizer. Rounds are interleaved, and the load of the machine is saved
beside them. SOAP is timed over `frequency` steps, of which one has the decomposition. On a machine that others use too, compare
the processor time of one thread.
"""

import argparse
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import timing

timing.with_steady_malloc()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from bnbref import optim  # noqa: E402


def made(kind: Any, args: Any, **options: Any) -> Any:
    params = [nn.Parameter(torch.randn(args.size, args.size)) for _ in range(args.matrices)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return kind(params, lr=1e-3, **options)


def several(optimizer: Any, steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            optimizer.step()

    return run


def state_bytes(optimizer: Any) -> float:
    found = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    return float(found / sum(p.numel() for group in optimizer.param_groups for p in group["params"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of a matrix")
    parser.add_argument("--matrices", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--frequency", type=int, default=10, help="steps of SOAP to a decomposition")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of the time that passes")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.processor_time else args.threads)
    torch.manual_seed(0)
    optimizers = {
        "Muon8bit": made(optim.Muon8bit, args),
        "Muon32bit": made(optim.Muon32bit, args),
        "Muon, torch": made(torch.optim.Muon, args),
        "Adafactor": made(optim.Adafactor, args),
        "Adafactor, torch": made(torch.optim.Adafactor, args),
        "Adafactor8bit, beta1 0.9": made(optim.Adafactor8bit, args, beta1=0.9),
        "SOAP8bit": made(optim.SOAP8bit, args, frequency=args.frequency),
    }
    rows = [
        ("Muon8bit", "Muon, torch"),
        ("Muon32bit", "Muon, torch"),
        ("Adafactor", "Adafactor, torch"),
        ("Adafactor8bit, beta1 0.9", "Adafactor, torch"),
    ]
    try:
        others = importlib.import_module("pytorch_optimizer")
    except ImportError:
        print("pytorch_optimizer is not installed: no comparison with it")
        rows.append(("SOAP8bit", "SOAP8bit"))
    else:
        optimizers["SOAP, pytorch_optimizer"] = made(others.SOAP, args, precondition_frequency=args.frequency)
        rows.append(("SOAP8bit", "SOAP, pytorch_optimizer"))
    runs = {name: several(x, args.frequency if "SOAP" in name else 1) for name, x in optimizers.items()}
    before = os.getloadavg()[0]
    clock = time.process_time if args.processor_time else time.perf_counter
    ms = timing.medians(runs, args.rounds, clock)
    load = {"before": before, "after": os.getloadavg()[0]}
    results: list[dict[str, Any]] = [
        {
            "what": f"{ours} / {theirs}",
            "ours": ms[ours],
            "theirs": ms[theirs],
            "ratio": ms[theirs] / ms[ours],
            "bar": None,
        }
        for ours, theirs in rows
    ]
    for ours, theirs in rows:
        mine, other = state_bytes(optimizers[ours]), state_bytes(optimizers[theirs])
        what = f"{ours} / {theirs}, bytes of state"
        results.append({"what": what, "ours": mine, "theirs": other, "ratio": other / mine, "bar": None})
    print(f"milliseconds, medians of {args.rounds} interleaved rounds; load {load}\n" + timing.table(results))
    print("saved", timing.save("matrix_optimizers", [*results, {"what": "load of the machine", **load}]))


if __name__ == "__main__":
    main()
