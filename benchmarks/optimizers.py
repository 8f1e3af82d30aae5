"""Optimizer steps on the CPU, in one process: milliseconds and ratios (theirs / ours; above 1 is faster).

    python benchmarks/optimizers.py [--size 4096] [--threads 2] [--rounds 9] [--processor-time]

Against bitsandbytes, torch's fused AdamW and, where it is installed, torchao; the step of 200 tensors against that of one
of the same total size; bytes of state per parameter. Rounds are interleaved, and the load of the machine is saved beside
them. On a machine that others use too, compare the processor time of one thread.
"""

import argparse
import importlib
import os
import time
from typing import Any

import timing

timing.with_steady_malloc()

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from bnbref import optim  # noqa: E402


def made(kind: Any, sizes: list[int], **options: Any) -> Any:
    params = [nn.Parameter(torch.randn(size)) for size in sizes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return kind(params, lr=1e-3, **options)


def state_bytes(optimizer: Any) -> float:
    tensors = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    own = {x.data_ptr(): x.nbytes for x in tensors if x.numel() > 256}  # not the shared codebooks
    return sum(own.values()) / sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the parameter")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of the time that passes")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.processor_time else args.threads)
    torch.manual_seed(0)
    one = [args.size**2]
    many = [one[0] // 200] * 200
    aligned = [one[0] // 200 // 256 * 256] * 200
    contenders = {
        "AdamW8bit": made(optim.AdamW8bit, one),
        "AdamW8bit, bitsandbytes": made(bnb.optim.AdamW8bit, one),
        "Lion8bit": made(optim.Lion8bit, one),
        "Lion8bit, bitsandbytes": made(bnb.optim.Lion8bit, one),
        "AdamW32bit": made(optim.AdamW32bit, one),
        "AdamW32bit, bitsandbytes": made(bnb.optim.AdamW32bit, one),
        "AdamW, torch fused": made(torch.optim.AdamW, one, fused=True),
        "AdamW8bit, 200 tensors": made(optim.AdamW8bit, many),
        "AdamW8bit, 200 tensors of whole blocks": made(optim.AdamW8bit, aligned),
        "AdamW32bit, 200 tensors": made(optim.AdamW32bit, many),
    }
    rows = [
        ("AdamW8bit", "AdamW8bit, bitsandbytes", 2.5),
        ("Lion8bit", "Lion8bit, bitsandbytes", 3.0),
        ("AdamW32bit", "AdamW32bit, bitsandbytes", None),
        ("AdamW32bit", "AdamW, torch fused", 1 / 1.3),
        ("AdamW8bit, 200 tensors", "AdamW8bit", 1 / 1.5),
        ("AdamW8bit, 200 tensors of whole blocks", "AdamW8bit", 1 / 1.5),
        ("AdamW32bit, 200 tensors", "AdamW32bit", 1 / 1.5),
    ]
    try:
        torchao = importlib.import_module("torchao.optim")
    except ImportError:
        print("torchao is not installed: no comparison with it")
    else:
        contenders["AdamW8bit, torchao"] = made(torchao.AdamW8bit, one)
        rows.append(("AdamW8bit", "AdamW8bit, torchao", 1.0))
    before = os.getloadavg()[0]
    clock = time.process_time if args.processor_time else time.perf_counter
    ms = timing.medians({name: optimizer.step for name, optimizer in contenders.items()}, args.rounds, clock)
    load = {"before": before, "after": os.getloadavg()[0]}
    results = [timing.beside(ours, theirs, ms, bar) for ours, theirs, bar in rows]
    for name in ("AdamW8bit", "AdamW32bit"):
        ours, theirs = (state_bytes(contenders[n]) for n in (name, f"{name}, bitsandbytes"))
        what = f"{name} state, bytes per parameter"
        results.append({"what": what, "ours": ours, "theirs": theirs, "ratio": theirs / ours, "bar": None})
    print(f"milliseconds, medians of {args.rounds} interleaved rounds; load {load}\n" + timing.table(results))
    print("saved", timing.save("optimizers", [*results, {"what": "load of the machine", **load}]))


if __name__ == "__main__":
    main()
