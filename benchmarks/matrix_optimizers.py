"""Steps of optimizers that see whole matrices, and of averages: milliseconds and ratios (theirs / ours; above 1 is faster).

    python benchmarks/matrix_optimizers.py [--size 512] [--matrices 8] [--threads 2] [--rounds 9] [--processor-time] [--only SOAP]
    python benchmarks/matrix_optimizers.py --device cuda --size 2048 --rounds 5 --seconds 110

Against torch.optim and, where they are installed, transformers, schedulefree, pytorch_optimizer, heavyball and optimi. Rounds of
a family are interleaved, and the load of the machine is saved beside them. SOAP is timed over ten steps, of which one has the
decompositions. heavyball tries kernels at its first steps, which takes a while: `--without heavyball` leaves it out. On a machine
that others use too, compare the processor time of one thread. On CUDA every round ends when the GPU has done its work, and the
memory that a step needs beside parameters, gradients and states is measured, too.
"""

import argparse
import gc
import importlib
import math
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
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "AdamW": {"AdamW8bit": {}, "AdamW32bit": {}},
    "Muon": {"Muon8bit": {}, "Muon32bit": {}},
    "Adafactor": {"Adafactor": {}},
    "Adafactor, beta1 0.9": {"Adafactor8bit, beta1 0.9": {"beta1": 0.9}},
    "AdamWScheduleFree": {"AdamWScheduleFree8bit": {}, "AdamWScheduleFree32bit": {}},
    "SOAP": {"SOAP8bit": {"frequency": FREQUENCY}, "SOAP32bit": {"frequency": FREQUENCY}},
}
"""Of each family our classes, with their options."""

THEIRS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "AdamW": [("torch.optim", "AdamW", {}), ("optimi", "AdamW", {})],
    "Muon": [("torch.optim", "Muon", {}), ("pytorch_optimizer", "Muon", {"group": {"use_muon": True}}),
             ("heavyball", "Muon", {})],
    "Adafactor": [("torch.optim", "Adafactor", {}), ("transformers.optimization", "Adafactor", TRANSFORMERS)],
    "Adafactor, beta1 0.9": [("transformers.optimization", "Adafactor", {**TRANSFORMERS, "beta1": 0.9})],
    "AdamWScheduleFree": [("schedulefree", "AdamWScheduleFree", {}), ("pytorch_optimizer", "ScheduleFreeAdamW", {})],
    "SOAP": [("pytorch_optimizer", "SOAP", {"precondition_frequency": FREQUENCY}),
             ("heavyball", "SOAP", {"precondition_frequency": FREQUENCY, "use_precond_schedule": False})],
}  # fmt: skip
"""Of each family those of others: the package, its class there, its options, those of its group of parameters under "group"."""


class Contender:
    """An optimizer with parameters of its own, and their gradients, which some of others' take away in a step."""

    def __init__(self, kind: Any, args: argparse.Namespace, group: Any = (), **options: Any) -> None:
        size = args.size, args.size
        self.params = [nn.Parameter(torch.randn(size, device=args.device)) for _ in range(args.matrices)]
        self.gradients = [torch.randn_like(p) * 1e-3 for p in self.params]
        self.optimizer = kind([{"params": self.params, **dict(group)}], lr=1e-3, **options)
        getattr(self.optimizer, "train", lambda: None)()
        self.elements = sum(p.numel() for p in self.params)

    def step(self) -> None:
        for p, g in zip(self.params, self.gradients, strict=True):
            p.grad = g
        self.optimizer.step()

    def state_bytes(self) -> float:
        """Of each element, in whatever its state is kept."""
        tensors: dict[int, torch.Tensor] = {}
        left: list[Any] = list(self.optimizer.state.values())
        while left:
            x = left.pop()
            if isinstance(x, torch.Tensor):
                tensors[x.data_ptr()] = x
            else:
                left += x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else []
        own = {x.data_ptr() for x in (*self.params, *self.gradients)}
        return sum(x.nbytes for address, x in tensors.items() if address not in own) / self.elements

    def peak_bytes(self) -> float:
        """Of each element, what a step has on the GPU at most beside what is there before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / self.elements


def contenders(family: str, args: argparse.Namespace) -> dict[str, Contender]:
    """Ours and those of others that are here, by the names that they have in a table."""
    found = {}
    for name, options in OURS[family].items():
        found[name] = Contender(getattr(optim, name.partition(",")[0]), args, **options)
    for package, kind, options in [each for each in THEIRS[family] if each[0] not in args.without]:
        try:
            made = Contender(getattr(importlib.import_module(package), kind), args, **options)
        except (ImportError, AttributeError) as error:
            print(f"{family} is not compared with {package}: {error}", flush=True)
            continue
        what = ", beta1 0.9" if "beta1" in options else ""
        found[f"{kind}, {package.partition('.')[0]}{what}"] = made
    return found


def several(step: Callable[[], None], steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            step()

    return run


def rows_of(family: str, args: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """The rows of a family: times, bytes of state, and on a GPU the bytes that a step needs."""
    found = contenders(family, args)
    runs = {name: several(each.step, FREQUENCY if family == "SOAP" else 1) for name, each in found.items()}
    measured = {"": timing.medians(runs, args.rounds, clock)}
    measured[", bytes of state"] = {name: each.state_bytes() for name, each in found.items()}
    if args.device == "cuda":
        measured[", peak bytes of a step"] = {name: each.peak_bytes() for name, each in found.items()}
    rows = []
    for what, values in measured.items():
        for ours in OURS[family]:
            for theirs in [name for name in found if name not in OURS[family]]:
                ratio = values[theirs] / values[ours] if values[ours] else math.inf
                numbers = {"ours": values[ours], "theirs": values[theirs], "ratio": ratio, "bar": None}
                rows.append({"what": f"{ours} / {theirs}{what}", **numbers})
    return rows


def synchronized(device: str) -> Callable[[], float]:
    """A clock that is read when the device has nothing left to do."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=int, default=512, help="rows and columns of a matrix")
    parser.add_argument("--matrices", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of the time that passes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further family after so long")
    parser.add_argument("--only", nargs="+", choices=[*OURS], default=[*OURS], help="families")
    parser.add_argument("--without", nargs="+", default=(), metavar="PACKAGE", help="packages to leave out")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.processor_time else args.threads)
    torch.manual_seed(0)
    start, gpu = time.monotonic(), torch.cuda.get_device_name() if args.device == "cuda" else None
    name = "matrix_optimizers" + (f"-{gpu.lower().replace(' ', '-')}" if gpu else "")
    clock = time.process_time if args.processor_time else synchronized(args.device)
    about = {"what": "device and load", "gpu": gpu, "cuda": torch.version.cuda, "before": os.getloadavg()[0]}
    print(f"milliseconds and bytes of an element, medians of {args.rounds} interleaved rounds on {gpu or 'the CPU'}")
    results: list[dict[str, Any]] = []
    for family in args.only:
        if time.monotonic() - start > args.seconds:
            print(f"out of time: {family} was not run")
            continue
        began = time.monotonic()
        rows = rows_of(family, args, clock)
        results += rows
        print(timing.table(rows), f"\n{family}: {time.monotonic() - began:.0f} seconds", flush=True)
        timing.save(name, [*results, {**about, "after": os.getloadavg()[0]}])
        gc.collect()
    print("saved", timing.save(name, [*results, {**about, "after": os.getloadavg()[0]}]))


if __name__ == "__main__":
    main()
