"""Steps of optimizers that see whole matrices, on the CPU: milliseconds and ratios (theirs / ours; above 1 is faster).

    python benchmarks/matrix_optimizers.py [--size 512] [--matrices 8] [--threads 2] [--rounds 9] [--processor-time]

Against torch.optim and, where they are installed, transformers, schedulefree and pytorch_optimizer. Rounds are interleaved, and
the load of the machine is saved beside them. SOAP is timed over ten steps, of which one has the decompositions. On a machine that
others use too, compare the processor time of one thread.
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

FREQUENCY = 10
"""Steps of SOAP to a decomposition."""

TRANSFORMERS = {"scale_parameter": True, "relative_step": False}
CONTENDERS: list[tuple[str, dict[str, Any], str, str, str, dict[str, Any]]] = [
    ("AdamW8bit", {}, "AdamW, torch", "torch.optim", "AdamW", {}),
    ("AdamW32bit", {}, "AdamW, torch", "torch.optim", "AdamW", {}),
    ("Muon8bit", {}, "Muon, torch", "torch.optim", "Muon", {}),
    ("Muon32bit", {}, "Muon, torch", "torch.optim", "Muon", {}),
    ("Adafactor", {}, "Adafactor, torch", "torch.optim", "Adafactor", {}),
    ("Adafactor", {}, "Adafactor, transformers", "transformers.optimization", "Adafactor", TRANSFORMERS),
    ("Adafactor8bit, beta1 0.9", {"beta1": 0.9}, "Adafactor, transformers, beta1 0.9", "transformers.optimization", "Adafactor",
     {**TRANSFORMERS, "beta1": 0.9}),
    ("AdamWScheduleFree8bit", {}, "AdamWScheduleFree, schedulefree", "schedulefree", "AdamWScheduleFree", {}),
    ("AdamWScheduleFree32bit", {}, "AdamWScheduleFree, schedulefree", "schedulefree", "AdamWScheduleFree", {}),
    ("SOAP8bit", {"frequency": FREQUENCY}, "SOAP, pytorch_optimizer", "pytorch_optimizer", "SOAP",
     {"precondition_frequency": FREQUENCY}),
    ("SOAP32bit", {"frequency": FREQUENCY}, "SOAP, pytorch_optimizer", "pytorch_optimizer", "SOAP",
     {"precondition_frequency": FREQUENCY}),
]  # fmt: skip
"""Of each row: ours, its options; theirs, its package, its class there, its options."""


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
    values = [x for s in optimizer.state.values() for x in s.values()]
    tensors = [x for value in values for x in (value if isinstance(value, list) else [value])]
    found = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
    return float(found / sum(p.numel() for group in optimizer.param_groups for p in group["params"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="rows and columns of a matrix")
    parser.add_argument("--matrices", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of the time that passes")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.processor_time else args.threads)
    torch.manual_seed(0)
    optimizers: dict[str, Any] = {}
    rows = []
    for ours, options, theirs, package, kind, other_options in CONTENDERS:
        try:
            module = importlib.import_module(package)
        except ImportError:
            print(f"{package} is not installed: {ours} is not compared with it")
            continue
        optimizers.setdefault(ours, made(getattr(optim, ours.partition(",")[0]), args, **options))
        if theirs not in optimizers:
            optimizers[theirs] = made(getattr(module, kind), args, **other_options)
        rows.append((ours, theirs))
    for optimizer in optimizers.values():
        getattr(optimizer, "train", lambda: None)()
    runs = {name: several(x, FREQUENCY if "SOAP" in name else 1) for name, x in optimizers.items()}
    before = os.getloadavg()[0]
    clock = time.process_time if args.processor_time else time.perf_counter
    ms = timing.medians(runs, args.rounds, clock)
    load = {"before": before, "after": os.getloadavg()[0]}
    results: list[dict[str, Any]] = [timing.beside(ours, theirs, ms) for ours, theirs in rows]
    for ours, theirs in rows:
        mine, other = state_bytes(optimizers[ours]), state_bytes(optimizers[theirs])
        what = f"{ours} / {theirs}, bytes of state"
        results.append({"what": what, "ours": mine, "theirs": other, "ratio": other / mine, "bar": None})
    print(f"milliseconds, medians of {args.rounds} interleaved rounds; load {load}\n" + timing.table(results))
    print("saved", timing.save("matrix_optimizers", [*results, {"what": "load of the machine", **load}]))


if __name__ == "__main__":
    main()
