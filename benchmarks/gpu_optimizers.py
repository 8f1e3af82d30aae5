"""Optimizers on an NVIDIA GPU: bandwidth, a model's worth of tensors, paging, and bits.

    python benchmarks/gpu_optimizers.py [--only PART ...] [--elements 1073741824] [--seconds 300] [--out benchmarks/results]

one tensor   AdamW and Lion with 8-bit state on float32: share of the measured copy bandwidth (bytes read + written)
many         the tensors of 8 of the 32 layers of a 7B Llama and its embeddings, float32: beside torch's fused AdamW
small        the 448 tensors of LoRA adapters of an 8B Llama, rank 16: beside bitsandbytes and torch's fused AdamW
paged        state in pinned host memory: beside the time that the link alone takes for it, both ways at once
bits         every rule, 8 and 32 bits: GPU compiled = GPU eager = CPU, and paged = resident

Medians of interleaved rounds, timed with CUDA events; ratio = the other's time / bnbref's, above 1 is faster.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu
import timing
import torch
from torch import Tensor

import bnbref
from bnbref import optim

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

CLASSES = ("AdamW", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS", "AdEMAMix")


def parameters(sizes: list[tuple[int, ...]], device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for size in sizes:
        p = torch.nn.Parameter(torch.randn(size, device=device, dtype=dtype, generator=generator))
        p.grad = torch.randn(size, device=device, dtype=dtype, generator=generator)
        made.append(p)
    return made


def row(what: str, ms: dict[str, float | None], other: str, **more: Any) -> dict[str, Any]:
    ours, theirs = ms["bnbref"], ms.get(other)
    return {"what": what, **ms, "ratio": theirs and ours and theirs / ours, **more}


def one_tensor(elements: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    for name, states in (("AdamW8bit", 2), ("Lion8bit", 1)):
        (p,) = parameters([(elements,)])
        ours = getattr(optim, name)([p], lr=1e-3)
        theirs = getattr(bnb.optim, name)([p], lr=1e-3) if bnb else None
        ms = gpu.medians({"bnbref": ours.step, "bitsandbytes": theirs and theirs.step}, rounds=7, calls=3)
        size = elements * (12 + states * (2 + 2 * 4 / 256))
        share = {f"{key} share": value and size / value / 1e6 / bandwidth for key, value in ms.items()}
        yield row(f"{name}, {elements:,} float32", ms, "bitsandbytes", **share, bar=1.1, share_bar=0.85)
        del ours, theirs, p


def llama(layers: int) -> list[tuple[int, ...]]:
    h, inner, vocabulary = 4096, 11008, 32000
    block: list[tuple[int, ...]] = [(h, h)] * 4 + [(inner, h)] * 2 + [(h, inner), (h,), (h,)]
    return block * layers + [(vocabulary, h), (h,)]


def many() -> Iterator[dict[str, Any]]:
    ps = parameters(llama(8))
    contenders = {
        "bnbref": optim.AdamW8bit(ps, lr=1e-3).step,
        "bnbref 32 bits": optim.AdamW32bit(ps, lr=1e-3).step,
        "torch fused": torch.optim.AdamW(ps, lr=1e-3, fused=True).step,
        "bitsandbytes": bnb and bnb.optim.AdamW8bit(ps, lr=1e-3).step,
    }
    ms = gpu.medians(contenders, rounds=5, calls=2)
    count = sum(p.numel() for p in ps)
    yield row(f"AdamW8bit, {len(ps)} tensors, {count:,} float32", ms, "torch fused", bar=1.0)


def adapters(layers: int, rank: int) -> list[tuple[int, ...]]:
    h, inner, kv = 4096, 14336, 1024
    projections = [(h, h), (kv, h), (kv, h), (h, h), (inner, h), (inner, h), (h, inner)]
    return [size for n, k in projections for size in ((rank, k), (n, rank))] * layers


def small() -> Iterator[dict[str, Any]]:
    """Host time counts: what is launched takes a fraction of the Python around it."""
    ps, qs = (parameters(adapters(32, 16)) for _ in range(2))
    fused = torch.optim.AdamW(ps, lr=1e-3, fused=True).step
    for name in ("AdamW8bit", "PagedAdamW8bit", "AdamW32bit"):
        theirs = getattr(bnb.optim, name)(qs, lr=1e-3).step if bnb else None
        contenders = {"bnbref": getattr(optim, name)(ps, lr=1e-3).step, "bitsandbytes": theirs, "torch fused": fused}
        ms = gpu.medians(contenders, rounds=9, calls=1)
        count = sum(p.numel() for p in ps)
        yield row(f"{name}, {len(ps)} tensors, {count:,} float32", ms, "bitsandbytes", bar=1.0)


def link(size: int) -> dict[str, float]:
    """GB/s of pinned copies: to the device, to the host, and each way when both run at once."""
    host, back = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    device, out = (
        torch.empty(size, dtype=torch.uint8, device="cuda"),
        torch.ones(size, dtype=torch.uint8, device="cuda"),
    )
    side = torch.cuda.Stream()

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            back.copy_(out, non_blocking=True)
        device.copy_(host, non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)

    runs: dict[str, Callable[[], Any]] = {
        "to device": lambda: device.copy_(host, non_blocking=True),
        "to host": lambda: back.copy_(out, non_blocking=True),
        "each way at once": both,
    }
    return {name: size / (ms or math.inf) / 1e6 for name, ms in gpu.medians(runs, rounds=5).items()}


def paged() -> Iterator[dict[str, Any]]:
    speeds = link(2**28)
    yield {"link GB/s": speeds}
    sizes: list[tuple[int, ...]] = [(4096, 4096)] * 48
    ps, qs = parameters(sizes), parameters(sizes)
    resident = optim.AdamW8bit(ps, lr=1e-3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    away = optim.PagedAdamW8bit(qs, lr=1e-3, page_bytes=2**28)
    torch.cuda.reset_peak_memory_stats()
    away.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    resident.step()
    same = all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
    theirs = bnb and bnb.optim.PagedAdamW8bit(ps, lr=1e-3)
    ms = gpu.medians({"bnbref": away.step, "resident": resident.step, "bitsandbytes": theirs and theirs.step}, rounds=5)
    count = sum(p.numel() for p in ps)
    limit = count * 2 * (1 + 4 / 256) / speeds["each way at once"] / 1e6
    yield row(
        f"PagedAdamW8bit, {len(ps)} tensors, {count:,} float32",
        ms,
        "bitsandbytes",
        **{"the link's limit": limit, "over the limit": (ms["bnbref"] or math.inf) / limit, "bar": 1.25},
        **{"bits of resident": same, "device memory for state": peak},
    )


def steps(make: Any, p: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Parameter and states after a step for each gradient, on the CPU."""
    q = torch.nn.Parameter(p.clone())
    optimizer = make([q])
    for g in gradients:
        q.grad = g
        optimizer.step()
    return [q.detach().cpu(), *(t.cpu() for t in optimizer.state[q].values() if isinstance(t, Tensor))]


def bits() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(10_007, generator=generator)
    gradients = [torch.randn(10_007, generator=generator) * 10.0**-i for i in range(3)]
    gradients[1][::4] = 0
    gradients[2][5:9] = torch.tensor([math.nan, math.inf, 1e-42, -0.0])
    for name in CLASSES:
        for suffix in ("8bit", "32bit"):
            maker = getattr(optim, name + suffix)

            def make(ps: Any, maker: Any = maker, name: str = name) -> Any:
                momentum = {"momentum": 0.9} if name in ("SGD", "LARS") else {}
                unclipped = {"max_unorm": 0.0} if name in ("LAMB", "LARS") else {}  # a norm is a float sum
                return maker(ps, lr=1e-2, weight_decay=1e-2, **momentum, **unclipped)

            there, gs = p.cuda(), [g.cuda() for g in gradients]
            compiled = steps(make, there, gs)
            with bnbref.eager():
                eager, cpu = steps(make, there, gs), steps(make, p, gradients)
            yield {
                "case": name + suffix,
                "gpu_is_cpu": gpu.same(cpu, eager),
                "compiled_is_eager": gpu.same(eager, compiled),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run, by name (default: all)")
    parser.add_argument("--elements", type=int, default=2**30)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further row after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    start = time.monotonic()
    bandwidth = gpu.copy_bandwidth(2**28)
    device = torch.cuda.get_device_name(0)
    print(f"{device}: copy {bandwidth:.0f} GB/s")
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu_optimizers.py",
        "machine": {**timing.machine(), "gpu": device, "cuda": torch.version.cuda},
        "copy_GB/s": round(bandwidth),
        "units": "milliseconds",
    }
    path = args.out / f"gpu-optimizers-{device.lower().replace(' ', '-')}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {
        "one tensor": lambda: one_tensor(args.elements, bandwidth), "paged": paged, "many": many, "small": small, "bits": bits,
    }  # fmt: skip
    for name in args.only or parts:
        make = parts[name]
        found = result[name] = []
        for one in make():
            found.append(one)
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in one.items()}
            print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
            if time.monotonic() - start > args.seconds:
                print("out of time: the rest was not run")
                return
        torch.cuda.empty_cache()
    print("saved", path)


if __name__ == "__main__":
    main()
