"""A step of PagedAdamW8bit on a GPU: which copies and which kernels run at the same time, by torch's profiler.

    python benchmarks/overlap.py [--side 8192] [--matrices 6] [--out benchmarks/results/overlap.json]

The states of the matrices are in pinned memory of the host. What is recorded of the third step: when each kernel and each copy
began and how long it took, those of one kind that follow each other as one; and how much of the time copies ran beside kernels.
`python docs/pictures.py` draws it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timing
import torch

KINDS = {"kernel": "kernels", "HtoD": "to the GPU", "DtoH": "to the host"}
PAUSE = 20.0
"""Microseconds: spans of a kind that are closer to each other are one."""

Span = tuple[float, float]


def kind_of(event: Mapping[str, Any]) -> str | None:
    """Of an event of a trace: a kernel, a copy each way, or something else."""
    if event.get("cat") == "kernel":
        return KINDS["kernel"]
    copy = [KINDS[way] for way in ("HtoD", "DtoH") if way in event.get("name", "")]
    return copy[0] if event.get("cat") == "gpu_memcpy" and copy else None


def union(spans: Iterable[Span], pause: float = 0.0) -> list[Span]:
    """The spans without overlaps, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1] + pause:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


def shared(a: list[Span], b: list[Span]) -> float:
    """How long both were at work."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in union(a) for y in union(b))


def recorded(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds since the first one began: the spans of each kind, its bytes and busy time, and what ran at the same time."""
    found: dict[str, list[Span]] = {name: [] for name in KINDS.values()}
    moved = dict.fromkeys(KINDS.values(), 0)
    for event in trace["traceEvents"]:
        kind = kind_of(event)
        if kind is not None:
            found[kind].append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
            moved[kind] += int(event.get("args", {}).get("bytes", 0))
    if not all(found.values()):
        raise ValueError(f"a trace must have kernels and copies both ways, got {[k for k, v in found.items() if v]}")
    begin = min(start for spans in found.values() for start, _ in spans)
    end = max(end for spans in found.values() for _, end in spans)
    kernels, inwards, outwards = found.values()
    busy = {name: sum(b - a for a, b in union(spans)) / 1e3 for name, spans in found.items()}
    return {
        "ms": (end - begin) / 1e3,
        "busy_ms": busy,
        "bytes": {name: moved[name] for name in list(KINDS.values())[1:]},
        "GB/s": {name: moved[name] / busy[name] / 1e6 for name in list(KINDS.values())[1:]},
        "kernels beside copies_ms": shared(kernels, inwards + outwards) / 1e3,
        "copies both ways_ms": shared(inwards, outwards) / 1e3,
        "spans": {
            name: [[round((a - begin) / 1e3, 4), round((b - begin) / 1e3, 4)] for a, b in union(spans, PAUSE)]
            for name, spans in found.items()
        },
    }


def profiled(side: int, matrices: int) -> dict[str, Any]:
    """The trace of a step, after two."""
    from torch.profiler import ProfilerActivity, profile

    from bnbref.optim import PagedAdamW8bit

    params = [torch.nn.Parameter(torch.randn(side, side, device="cuda", dtype=torch.bfloat16)) for _ in range(matrices)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = PagedAdamW8bit(params, lr=1e-4)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        optimizer.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        run.export_chrome_trace(f"{folder}/trace.json")
        trace: dict[str, Any] = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192, help="rows and columns of each matrix")
    parser.add_argument("--matrices", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/overlap.json")
    args = parser.parse_args()
    found = recorded(profiled(args.side, args.matrices))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {**timing.machine(), "gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda},
        "what": f"PagedAdamW8bit, {args.matrices} matrices of {args.side} x {args.side} in bfloat16",
        **found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "spans"}, indent=1), f"\nsaved {args.out}")


if __name__ == "__main__":
    main()
