"""bnbref against bitsandbytes on the CPU, in one process: milliseconds and ratios (theirs / ours; above 1 is faster).

    python benchmarks/cpu.py [--size 4096] [--threads 2] [--only quantize] [--rounds 21]

Every row first checks that both compute the same thing: the same bytes where both are exact, and close elsewhere.
"""

import argparse
from collections.abc import Callable
from typing import Any

import timing

timing.with_steady_malloc()

import bitsandbytes as bnb  # noqa: E402
import bitsandbytes.functional as BF  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import bnbref  # noqa: E402
import bnbref.functional as F  # noqa: E402
import bnbref.nn  # noqa: E402

Row = tuple[str, float | None, Callable[[], Any], Callable[[], Any]]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def four_bit(size: int) -> list[Row]:
    rows: list[Row] = []
    weight = torch.randn(size, size)
    for quant_type in ("nf4", "fp4"):
        for dtype, bar in ((torch.float32, 15.0), (torch.bfloat16, 15.0), (torch.float16, None)):
            x = weight.to(dtype)
            ours, theirs = F.quantize_4bit(x, quant_type=quant_type), BF.quantize_4bit(x, quant_type=quant_type)
            if quant_type == "nf4":  # fp4 follows CUDA's thresholds here, bitsandbytes on CPU follows the midpoints
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1].absmax, theirs[1].absmax)
            rows.append(
                (
                    f"quantize_4bit {quant_type} from {NAMES[dtype]}",
                    bar if quant_type == "nf4" else None,
                    lambda x=x, q=quant_type: F.quantize_4bit(x, quant_type=q),
                    lambda x=x, q=quant_type: BF.quantize_4bit(x, quant_type=q),
                )
            )
    for dtype, bar in ((torch.float32, 0.9), (torch.bfloat16, 0.9), (torch.float16, None)):
        packed, state = F.quantize_4bit(weight.to(dtype), quant_type="nf4")
        packed2, state2 = BF.quantize_4bit(weight.to(dtype), quant_type="nf4")
        assert torch.equal(F.dequantize_4bit(packed, state), BF.dequantize_4bit(packed2, state2))
        rows.append(
            (
                f"dequantize_4bit nf4 to {NAMES[dtype]}",
                bar,
                lambda p=packed, s=state: F.dequantize_4bit(p, s),
                lambda p=packed2, s=state2: BF.dequantize_4bit(p, s),
            )
        )
    return rows


def eight_bit(size: int) -> list[Row]:
    x = torch.randn(size, size)
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        y = x.to(dtype)
        rows.append(
            (
                f"quantize_blockwise dynamic from {NAMES[dtype]} (theirs inexact)",
                4.0,
                lambda y=y: F.quantize_blockwise(y, blocksize=256),
                lambda y=y: BF.quantize_blockwise(y, blocksize=256),
            )
        )
        codes, state = F.quantize_blockwise(y, blocksize=256)
        state2 = BF.QuantState(state.absmax, code=state.code, blocksize=256, dtype=dtype)
        assert torch.equal(F.dequantize_blockwise(codes, state), BF.dequantize_blockwise(codes, state2))
        rows.append(
            (
                f"dequantize_blockwise dynamic to {NAMES[dtype]}",
                None,
                lambda c=codes, s=state: F.dequantize_blockwise(c, s),
                lambda c=codes, s=state2: BF.dequantize_blockwise(c, s),
            )
        )
    return rows


def rows_of(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def forward_backward(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], Any]:
    leaf = x.clone().requires_grad_()

    def run() -> Any:
        leaf.grad = None
        layer(leaf).backward(grad)
        return leaf.grad

    return run


def forward(layer: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return layer(x)

    return run


def linear_4bit(size: int) -> list[Row]:
    rows: list[Row] = []
    dense = nn.Linear(size, size, bias=False)
    for dtype in (torch.bfloat16, torch.float32):

        def layer(module: Any, dtype: torch.dtype = dtype) -> nn.Module:
            made = module(size, size, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=False)
            made.load_state_dict({"weight": dense.weight.detach().to(dtype)})
            return made.to("cpu")

        ours, theirs, packed = (layer(m) for m in (bnbref.nn.Linear4bit, bnb.nn.Linear4bit, bnb.nn.Linear4bit))
        theirs.support_avx512bf16_for_cpu = False  # it would repack its weight in place on the first forward
        x = torch.randn(512, size, dtype=dtype)
        run = (
            forward_backward(ours, x, torch.randn(512, size, dtype=dtype)),
            forward_backward(theirs, x, torch.randn(512, size, dtype=dtype)),
        )
        rows.append((f"Linear4bit {NAMES[dtype]} forward + backward, 512 rows", 1.2, *run))
        packed.eval()
        for count in (1, 16, 512):
            x = torch.randn(count, size, dtype=dtype)
            rows.append(
                (f"Linear4bit {NAMES[dtype]} forward, {rows_of(count)}", None, forward(ours, x), forward(theirs, x))
            )
            rows.append(
                (
                    f"Linear4bit {NAMES[dtype]} forward, {rows_of(count)}, packed kernel",
                    None,
                    forward(ours, x),
                    forward(packed, x),
                )
            )
    return rows


def linear_8bit(size: int) -> list[Row]:
    rows: list[Row] = []
    dense = nn.Linear(size, size, bias=False)
    for threshold in (0.0, 6.0):

        def layer(module: Any, threshold: float = threshold) -> nn.Module:
            made = module(size, size, bias=False, has_fp16_weights=False, threshold=threshold)
            made.load_state_dict({"weight": dense.weight.detach()})
            return made.to("cpu").eval()

        ours, theirs = layer(bnbref.nn.Linear8bitLt), layer(bnb.nn.Linear8bitLt)
        for count in (1, 16, 512):
            x = torch.randn(count, size, dtype=torch.bfloat16)
            if threshold > 0:
                x[:, 7] = 8.0
            rows.append(
                (
                    f"Linear8bitLt bf16, threshold {threshold:g}, {rows_of(count)}",
                    1.0,
                    forward(ours, x),
                    forward(theirs, x),
                )
            )
    return rows


def fixed_order(size: int) -> list[Row]:
    """The cost of `batch_invariant()`: with it, and as theirs the same layer without."""
    layer = bnbref.nn.Linear4bit(size, size, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
    rows: list[Row] = []
    for count in (1, 16, 512):
        run = forward(layer, torch.randn(count, size, dtype=torch.bfloat16))

        def invariant(run: Callable[[], Any] = run) -> Any:
            with bnbref.batch_invariant():
                return run()

        rows.append((f"Linear4bit bf16 in batch_invariant(), {rows_of(count)} / without", None, invariant, run))
    return rows


GROUPS = {
    "4bit": four_bit,
    "8bit": eight_bit,
    "linear4bit": linear_4bit,
    "linear8bit": linear_8bit,
    "fixed_order": fixed_order,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", choices=GROUPS, help="one group of rows; nothing is saved")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = []
    for name, make in GROUPS.items():
        if args.only in (None, name):
            for what, bar, ours, theirs in make(args.size):
                ms = timing.medians({"ours": ours, "theirs": theirs}, args.rounds)
                results.append({"what": what, **ms, "ratio": ms["theirs"] / ms["ours"], "bar": bar})
                print(timing.table(results[-1:]).splitlines()[-1], flush=True)
    print(
        "\nmilliseconds, medians of", args.rounds, "interleaved rounds; ratio = bnb / bnbref\n" + timing.table(results)
    )
    if args.only is None:
        print("saved", timing.save("cpu", results))


if __name__ == "__main__":
    main()
