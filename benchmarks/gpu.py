"""bnbref on an NVIDIA GPU: bits, bandwidth and products, beside bitsandbytes where it can be imported.

    python benchmarks/gpu.py [--elements 268435456] [--only memory] [--seconds 600] [--out benchmarks/results]

memory    quantize and dequantize, milliseconds and share of the measured copy bandwidth (bytes read + written)
products  Linear4bit and Linear8bitLt. "kernels": replayed from a CUDA graph, without Python; "call": as called
facts     where bitsandbytes' CUDA kernels differ from the reference dialect
bits      GPU == CPU and compiled == eager, byte for byte, over the registry

Medians of interleaved rounds, timed with CUDA events; ratio = bitsandbytes / bnbref, above 1 is faster.
"""

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor

import bnbref
import bnbref.functional as F
import bnbref.nn
from bnbref import blockwise, fourbit, int8, nested
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, INT4, NF4, linear, value_table
from bnbref.kernels import REGISTRY

try:
    import bitsandbytes as bnb
    import bitsandbytes.functional as BF
except ImportError:
    bnb = BF = None

GPU = torch.device("cuda")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Run = Callable[[], Any]


# ---- timing ---------------------------------------------------------------------------------------------------------


def medians(contenders: Mapping[str, Run | None], rounds: int = 15, calls: int = 1) -> dict[str, float | None]:
    """Milliseconds a call by CUDA events: the median of interleaved rounds of `calls` calls each.

    Several calls, so that Python prepares one while the GPU runs another: what takes longer is what is measured.
    """
    runs = {name: run for name, run in contenders.items() if run is not None}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    return {name: statistics.median(times[name]) if name in times else None for name in contenders}


def graphed(run: Run, calls: int = 20) -> Run:
    """The kernels of `calls` calls as one replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def copy_bandwidth(elements: int) -> float:
    """GB/s of a device-to-device copy of float32, read + written."""
    source = torch.randn(elements, device=GPU)
    target = torch.empty_like(source)
    ms = medians({"copy": lambda: target.copy_(source)}, calls=10)["copy"]
    return 8 * elements / ms / 1e6


def matmul_peak() -> float:
    """TFLOP/s of a bfloat16 product of 8192^3, on random data."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    ms = medians({"mm": lambda: a @ b}, calls=10)["mm"]
    return 2 * 8192**3 / ms / 1e9


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(elements: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(elements, device=GPU, dtype=dtype)
        four = elements * x.itemsize + elements // 2 + elements // 64 * 4
        eight = elements * x.itemsize + elements + elements // 256 * 4
        packed, state = F.quantize_4bit(x, quant_type="nf4")
        check(f"4-bit {NAMES[dtype]}", x, F.quantize_4bit, F.dequantize_4bit, packed, state, quant_type="nf4")
        theirs = BF.quantize_4bit(x, quant_type="nf4") if BF else None
        yield measure(
            f"quantize_4bit nf4 {NAMES[dtype]}",
            four,
            bandwidth,
            lambda x=x: F.quantize_4bit(x, quant_type="nf4"),
            BF and (lambda x=x: BF.quantize_4bit(x, quant_type="nf4")),
            differ=theirs and int((theirs[0].view(-1) != packed.view(-1)).sum()),
        )
        yield measure(
            f"dequantize_4bit nf4 {NAMES[dtype]}",
            four,
            bandwidth,
            lambda p=packed, s=state: F.dequantize_4bit(p, s),
            theirs and (lambda t=theirs: BF.dequantize_4bit(*t)),
        )
        del packed, state, theirs
        codes, state = F.quantize_blockwise(x, blocksize=256)
        check(f"8-bit {NAMES[dtype]}", x, F.quantize_blockwise, F.dequantize_blockwise, codes, state, blocksize=256)
        theirs = BF.quantize_blockwise(x, blocksize=256) if BF else None
        yield measure(
            f"quantize_blockwise dynamic {NAMES[dtype]}",
            eight,
            bandwidth,
            lambda x=x: F.quantize_blockwise(x, blocksize=256),
            BF and (lambda x=x: BF.quantize_blockwise(x, blocksize=256)),
            differ=theirs and int((theirs[0] != codes).sum()),
        )
        yield measure(
            f"dequantize_blockwise dynamic {NAMES[dtype]}",
            eight,
            bandwidth,
            lambda c=codes, s=state: F.dequantize_blockwise(c, s),
            theirs and (lambda t=theirs: BF.dequantize_blockwise(*t)),
        )
        del x, codes, state, theirs


def check(what: str, x: Tensor, quantize: Any, dequantize: Any, codes: Tensor, state: Any, **options: Any) -> None:
    """The kernels that are timed give the bits of the uncompiled definition, on the first 4 Mi elements."""
    part = x[: 2**22]
    with bnbref.eager():
        want, want_state = quantize(part, **options)
        decoded = dequantize(want, want_state)
    got = codes.view(-1)[: want.numel()], state.absmax[: want_state.absmax.numel()], dequantize(codes, state)[: 2**22]
    if not same((want.view(-1), want_state.absmax, decoded), got):
        raise SystemExit(f"{what}: compiled and uncompiled bits differ")


def measure(
    what: str, size: int, bandwidth: float, ours: Run, theirs: Run | None, differ: int | None = None
) -> dict[str, Any]:
    ms = medians({"ours": ours, "theirs": theirs}, rounds=9, calls=10)
    share = {f"{name}_share": value and size / value / 1e6 / bandwidth for name, value in ms.items()}
    return {"what": what, **ms, **share, "ratio": ratio(ms), "bar": 1.0, "share_bar": 0.85, "codes_that_differ": differ}


def ratio(ms: Mapping[str, float | None]) -> float | None:
    return ms["theirs"] / ms["ours"] if ms["theirs"] and ms["ours"] else None


# ---- products -------------------------------------------------------------------------------------------------------


def products(bandwidth: float, peak: float) -> Iterator[dict[str, Any]]:
    for n, k in ((4096, 4096), (4096, 14336)):
        weight = torch.randn(n, k, dtype=torch.bfloat16)
        for nested_ in (False, True):

            def four(module: Any, nested_: bool = nested_, n: int = n, k: int = k, w: Tensor = weight) -> Any:
                made = module(k, n, bias=False, compute_dtype=w.dtype, quant_type="nf4", compress_statistics=nested_)
                made.to(w.dtype)  # the dtype to which bitsandbytes dequantizes
                made.load_state_dict({"weight": w})
                return made.to(GPU).eval()

            size = n * k / 2 + n * k / 64 * (1 if nested_ else 4)
            yield from rows_of(f"Linear4bit nf4{'+dq' if nested_ else ''} {n}x{k}", four, n, k, size, bandwidth, peak)
        for threshold in (0.0, 6.0):

            def eight(module: Any, t: float = threshold, n: int = n, k: int = k, w: Tensor = weight) -> Any:
                made = module(k, n, bias=False, has_fp16_weights=False, threshold=t)
                made.load_state_dict({"weight": w})
                return made.to(GPU).eval()

            name = f"Linear8bitLt threshold {threshold:g} {n}x{k}"
            yield from rows_of(name, eight, n, k, n * k, bandwidth, peak, threshold)


def rows_of(
    name: str,
    make: Callable[[Any], Any],
    n: int,
    k: int,
    size: float,
    bandwidth: float,
    peak: float,
    threshold: float = 0,
) -> Iterator[dict[str, Any]]:
    kind = name.split()[0]
    ours, theirs = make(getattr(bnbref.nn, kind)), make(getattr(bnb.nn, kind)) if bnb else None
    for rows in (1, 4, 16, 64, 512, 4096):
        x = torch.randn(rows, k, device=GPU, dtype=torch.float16 if kind == "Linear8bitLt" else torch.bfloat16).clamp(
            -5, 5
        )
        if threshold:
            x[:, 7] = 8.0

        def run(layer: Any, x: Tensor = x) -> Run | None:
            if layer is None:
                return None

            def forward() -> Any:
                with torch.no_grad():
                    return layer(x)

            return forward

        pair = {"ours": run(ours), "theirs": run(theirs)}
        calls = 20 if rows < 512 else 5
        call = medians(pair, rounds=9, calls=calls)
        kernels: dict[str, float | None] = {"ours": None, "theirs": None}
        if not threshold:  # the columns with outliers are counted on the host
            kernels = medians({key: run and graphed(run, calls) for key, run in pair.items()}, rounds=9)
            kernels = {key: ms and ms / calls for key, ms in kernels.items()}
        floor = max((size + 2 * rows * (n + k)) / bandwidth / 1e6, 2 * rows * n * k / peak / 1e9)
        times = kernels if kernels["ours"] else call
        yield {
            "what": f"{name}, {rows} rows",
            **times,
            "ratio": ratio(times),
            "ours_share": floor / times["ours"],
            "theirs_share": times["theirs"] and floor / times["theirs"],
            "ours_call": call["ours"],
            "theirs_call": call["theirs"],
            "call_ratio": ratio(call),
            "timed": "kernels" if kernels["ours"] else "call",
            "bar": 1.0,
            "share_bar": 2 / 3 if rows == 1 else None,
        }


# ---- bitsandbytes against the reference -----------------------------------------------------------------------------


def neighbours(points: tuple[float, ...], steps: int = 3) -> Tensor:
    """Each point and the floats up to `steps` ulp beside it, of both signs."""
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    high = low = torch.tensor(points)
    found = [high]
    for _ in range(steps):
        high, low = high.nextafter(up), low.nextafter(down)
        found += [high, low]
    return torch.cat(found + [-part for part in found])


def distance(x: Tensor, points: tuple[float, ...], sign_bit: bool = False) -> Tensor:
    """How many floats x is away from the nearest point."""

    def order(t: Tensor) -> Tensor:
        bits = t.view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    x = x.abs() if sign_bit else x
    return (order(x)[:, None] - order(torch.tensor(points))[None]).abs().amin(1)


def facts() -> Iterator[dict[str, Any]]:
    """Each of bitsandbytes' quantizers on blocks of absmax 1: zeros, thresholds and their neighbours, random numbers."""
    books = {"nf4": NF4, "fp4": FP4, "dynamic": DYNAMIC}
    for name, book in books.items():
        blocksize = 256 if name == "dynamic" else 64

        def both(x: Tensor, name: str = name, blocksize: int = blocksize) -> tuple[Tensor, Tensor]:
            if name == "dynamic":
                return F.quantize_blockwise(x, blocksize=blocksize)[0], BF.quantize_blockwise(x, blocksize=blocksize)[0]
            ours, theirs = F.quantize_4bit(x, quant_type=name)[0], BF.quantize_4bit(x, quant_type=name)[0]
            nibbles = [
                torch.stack((p.view(-1) >> 4, p.view(-1) & 15), -1).view(-1)[: x.numel()] for p in (ours, theirs)
            ]
            return nibbles[0], nibbles[1]

        zero = both(torch.zeros(blocksize, device=GPU))
        yield {"fact": f"{name}: code of an all-zero block", "ours": int(zero[0][0]), "theirs": int(zero[1][0])}
        minus = both(torch.cat([torch.ones(1), torch.full((blocksize - 1,), -0.0)]).to(GPU))
        yield {"fact": f"{name}: code of -0.0", "ours": int(minus[0][1]), "theirs": int(minus[1][1])}
        nan = both(torch.cat([torch.ones(1), torch.full((blocksize - 1,), math.nan)]).to(GPU))
        yield {"fact": f"{name}: code of NaN", "ours": int(nan[0][1]), "theirs": int(nan[1][1])}
        points = neighbours(book.thresholds)
        points = points[points.abs() <= 1]
        generator = torch.Generator().manual_seed(0)
        for what, flat in (
            ("thresholds and their neighbours to 3 ulp, absmax 1", points),
            ("16 Mi uniform numbers, absmax 1", torch.rand(2**24, generator=generator) * 2 - 1),
        ):
            rest = -flat.numel() % (blocksize - 1)
            blocks = torch.cat([flat, flat.new_zeros(rest)]).view(-1, blocksize - 1)
            x = torch.cat([torch.ones(blocks.shape[0], 1), blocks], 1)
            ours, theirs = (codes.view(x.shape).cpu() for codes in both(x.view(-1).to(GPU)))
            wrong = ours != theirs
            far = distance(x[wrong], book.thresholds, book.sign_bit) if wrong.any() else torch.zeros(1)
            yield {
                "fact": f"{name}: codes that differ, {what}",
                "of": x.numel(),
                "differ": int(wrong.sum()),
                "furthest_from_a_threshold_in_ulp": int(far.max()),
                "examples": [
                    [float.hex(float(v)), int(o), int(t)]
                    for v, o, t in zip(x[wrong], ours[wrong], theirs[wrong], strict=True)
                ][:4],
            }


# ---- bits -----------------------------------------------------------------------------------------------------------


def nasty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Thresholds with their neighbours, zeros, subnormals, NaN, infinities, and random numbers."""
    x = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(0))
    points = neighbours(NF4.thresholds + FP4.thresholds, 1)
    x[: points.numel()] = points
    x[64], x[1000:1200] = 1, 0
    x[1300:1400] *= 1e-38
    x[1500], x[1600], x[1700] = math.nan, math.inf, -0.0
    x[2000:2300] *= 1e38
    return x.to(dtype).view(shape)


def bit_cases() -> Iterator[tuple[str, Callable[..., Any], tuple[Tensor | None, ...]]]:
    """(name, function of tensors of one device, tensors)"""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for book, dtype, blocksize in (
        (NF4, torch.float32, 64),
        (NF4, torch.bfloat16, 64),
        (NF4, torch.float16, 64),
        (NF4, torch.float32, 24),
        (FP4, torch.float32, 64),
        (INT4, torch.bfloat16, 64),
    ):
        x = nasty((10007,), dtype)
        args = f"{book.name} {NAMES[dtype]} {blocksize}"
        yield f"quantize {args}", lambda x, b=book, s=blocksize: fourbit.quantize(x, b, s), (x,)
        with bnbref.eager():
            coded = fourbit.quantize(x, book, blocksize)
        yield (
            f"dequantize {args}",
            lambda p, a, b=book, s=blocksize, t=dtype: (fourbit.dequantize(p, a, b, s, (10007,), t),),
            coded,
        )
    for book, dtype in (
        (DYNAMIC, torch.float32),
        (DYNAMIC, torch.bfloat16),
        (DYNAMIC_UNSIGNED, torch.float32),
        (linear(), torch.float16),
    ):
        x = nasty((10007,), dtype)
        x = x.abs() if book is DYNAMIC_UNSIGNED else x
        args = f"{book.name} {NAMES[dtype]} 256"
        yield f"quantize {args}", lambda x, b=book: blockwise.quantize(x, b, 256), (x,)
        with bnbref.eager():
            coded = blockwise.quantize(x, book, 256)
        yield (
            f"dequantize {args}",
            lambda c, a, v, t=dtype: (blockwise.dequantize(c, a, v, 256, t),),
            (*coded, value_table(book, torch.device("cpu"))),
        )
    with bnbref.eager():
        codes, absmax2, offset = nested.quantize(torch.rand(5000) + 0.01)
    values = value_table(DYNAMIC, torch.device("cpu"))
    yield "dequantize nested", lambda *t: (nested.dequantize(*t),), (codes, absmax2, values, offset)
    for dtype in dtypes:
        for threshold in (0.0, 6.0) if dtype == torch.float16 else (0.0,):
            x = nasty((37, 80), dtype)
            x[3, 5] = 7
            yield (
                f"int8 quantize {NAMES[dtype]} threshold {threshold:g}",
                lambda x, t=threshold: int8.quantize(x, t),
                (x,),
            )
        with bnbref.eager():
            q, row, _ = int8.quantize(x)
        b, column, bias = torch.randint(-128, 128, (24, 80), dtype=torch.int8), torch.rand(24), torch.randn(24)
        yield (
            f"int8 product {NAMES[dtype]}",
            lambda q, b, r, c, bias, t=dtype: (
                int8.dequantize_int8_product(int8.multiply(q, b), r, c, bias, None, dtype=t),
                int8.dequantize(q, r, t),
            ),
            (q, b, row, column, bias),
        )


def same(one: Any, other: Any) -> bool:
    """The same bytes; any NaN is as good as any other."""
    pairs = [(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True) if a is not None]
    for a, b in pairs:
        if a.is_floating_point():
            if not torch.equal(a.isnan(), b.isnan()):
                return False
            a, b = (t.masked_fill(t.isnan(), 0).contiguous().view(torch.uint8) for t in (a, b))
        if not torch.equal(a, b):
            return False
    return True


def bits() -> Iterator[dict[str, Any]]:
    for name, function, args in bit_cases():
        on_gpu = tuple(t if t is None else t.to(GPU) for t in args)
        with bnbref.eager():
            cpu, eager = function(*args), function(*on_gpu)
        compiled = function(*on_gpu)
        yield {"case": name, "gpu_is_cpu": same(cpu, eager), "compiled_is_eager": same(eager, compiled)}


def never_compiled() -> list[str]:
    """Registered kernels that no case above compiled for a GPU."""
    return [name for name, kernel in REGISTRY.items() if not any(key[0] == "cuda" for key in kernel.variants)]


# ---- the program ----------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    if "what" not in row:
        return "  ".join(f"{key} {value}" for key, value in row.items())
    missed = [
        text
        for text, value, bar in (("ratio", row["ratio"], row["bar"]), ("share", row["ours_share"], row["share_bar"]))
        if value is not None and bar is not None and value < bar
    ]
    shares = f"{number('ours_share', '6.0%')} {number('theirs_share', '6.0%')}"
    calls = f"   call {number('ours_call', '.3f')} {number('theirs_call', '.3f')}" if "ours_call" in row else ""
    times = f"{number('ours', '9.4f')} {number('theirs', '9.4f')} {number('ratio', '6.2f')}  {shares}"
    return f"{row['what']:48s} {times}{calls}{'  missed: ' + ', '.join(missed) if missed else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**28, help="size of the tensors of the memory table")
    parser.add_argument("--only", choices=("memory", "products", "facts", "bits"), help="one part; nothing is saved")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further row after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    args = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(0)
    bandwidth, peak = copy_bandwidth(args.elements), matmul_peak()
    device = torch.cuda.get_device_name(0)
    print(f"{device}: copy {bandwidth:.0f} GB/s, bfloat16 product {peak:.0f} TFLOP/s")
    print(f"{'':48s} {'bnbref':>9s} {'bnb':>9s} {'ratio':>6s}  {'share of the limit':>13s}")
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "memory": lambda: memory(args.elements, bandwidth),
        "facts": lambda: facts() if BF else iter(()),
        "products": lambda: products(bandwidth, peak),
        "bits": bits,
    }
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu.py",
        "machine": {**timing.machine(), "gpu": device, "cuda": torch.version.cuda},
        "copy_GB/s": round(bandwidth),
        "matmul_TFLOP/s": round(peak),
        "units": "milliseconds",
    }
    for name, make in parts.items():
        if args.only in (None, name):
            rows = result[name] = []
            print(f"-- {name}")
            for row in make():
                rows.append(row)
                print(line(row), flush=True)
                if time.monotonic() - start > args.seconds:
                    result.setdefault("cut_short", []).append(name)
                    break
            if args.only is None:
                result["never_compiled"] = never_compiled()
                args.out.mkdir(exist_ok=True, parents=True)
                path = args.out / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
                path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.monotonic() - start:.0f} s; kernels never compiled here: {never_compiled()}")
    wrong = [row["case"] for row in result.get("bits", []) if not (row["gpu_is_cpu"] and row["compiled_is_eager"])]
    if wrong:
        raise SystemExit(f"bits differ: {wrong}")


if __name__ == "__main__":
    main()
