"""Cases of the quantizations: 8 bits, 4 bits, nested scales, int8 rows."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref.checkpoint import BLOCKSIZES
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, NF4, Codebook, value_table
from bnbref.conformance.case import CPU, DTYPES, Case
from bnbref.conformance.expected import Expected
from kit_cases.inputs import beside, cast, clear, in_blocks, neighbours, nested_weight, noise, spread
from kit_cases.oracles import expect, make

Tensors = Mapping[str, Tensor]


def _in_both(
    op: str, letter: str, book: Codebook, label: str, extra: Mapping[str, Any], inputs: Tensors
) -> Iterator[Case]:
    """What 8-bit and 4-bit quantization have in common: scales, tails, zeros, sizes.

    letter: of the rules. label: of the cases. extra, inputs: parameters and tensors beside x and blocksize.
    """
    eight = letter == "Q8"
    zero_rule, tail_rule = ("6", "7") if eight else ("7", "8")

    def case(name: str, x: Tensor, rules: str, flags: str = "", blocksize: int = 64, **options: Any) -> Case:
        numbered = " ".join(r if "-" in r else f"{letter}-{r}" for r in rules.split())
        return make(f"{label}-{name}", op, {"x": x, **inputs}, numbered, flags, blocksize=blocksize, **extra, **options)

    def data(count: int, seed: int, blocksize: int = 64) -> Tensor:
        x = noise(count, seed)
        return clear(x.abs() if label == "unsigned" else x, book, blocksize)

    def whole(blocks: int, seed: int) -> Tensor:
        return clear(in_blocks(data(63 * blocks, seed, 63) * 0.99, 64), book)

    for dtype in DTYPES:
        # Twice: rounding to 16 bits may move an element beside a threshold.
        x = cast(data(1024, 3), dtype).float()
        yield case(f"noise-{dtype}", cast(clear(x, book), dtype), "1 2 3")
    for blocksize in BLOCKSIZES:
        x = data(2 * blocksize + blocksize // 2 + 2, blocksize, blocksize)
        flags = "blocksize" if blocksize >= 1024 else ""
        options: dict[str, Any] = {"quick": blocksize in (32, 4096), "may_refuse": eight and blocksize < 64}
        yield case(f"blocksize-{blocksize}", x, "1", flags, blocksize, **options)
    for blocksize in (8, 100):
        yield case(f"blocksize-{blocksize}", data(250, 9, blocksize), "1 G-4", "blocksize", blocksize, may_refuse=True)
    for n in (1, 2, 3, 63, 64, 65, 127, 129):
        flags = "odd-size" if n % 2 and not eight else "tail-block"
        yield case(f"size-{n}", whole(-(-n // 64), n)[:n], "6" if flags == "odd-size" else tail_rule, flags)
    for power in (-126, -100, 0, 100, 126):
        flags = {126: "large-absmax", -126: "small-absmax", -100: "absmax-floor"}.get(power, "")
        yield case(f"scale-2^{power}", whole(2, 5) * 2.0**power, "2", flags)
    one, zeros = whole(1, 8), torch.zeros(64)
    yield case("scale-3e38", one * 3e38, "2", "large-absmax")
    yield case("scale-1e-39", torch.cat((one * 1e-39, whole(1, 7))), "1", "small-absmax")
    yield case("zero-block", zeros, zero_rule, "zero-block")
    yield case("zero-block-among-others", torch.cat((one, zeros, one)), zero_rule, "zero-block")
    yield case("zero-tail", torch.cat((one, zeros[:10])), "1", "tail-absmax")
    yield case("empty", torch.empty(0), "G-1")
    for bad_label, bad in (("nan", math.nan), ("inf", math.inf), ("minus-inf", -math.inf)):
        middle = one.clone()
        middle[7] = bad
        yield case(bad_label, torch.cat((one, middle, one)), "1", "non-finite")
    yield case("transposed", whole(6, 11).view(6, 64), "G-3", "noncontiguous", layout=("x",))
    x, expected = _one_formula(op, book, inputs, extra)
    yield case("tail-formula", x, tail_rule, "tail-block", expected=expected)


def _one_formula(
    op: str, book: Codebook, inputs: Tensors, extra: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Expected]]:
    """One block twice, the second time cut short, of elements for which x * (1 / absmax) and x / absmax have two codes.

    Which one is right is the matter of other cases: here a full block and a partial one must agree.
    """
    points = []
    for absmax in torch.tensor([3.7727534770965576, 1.1, 1.3, 1.7, 1.9, 2.3]):
        near = beside([t for t in book.thresholds if t > 0], range(-3, 4)) * absmax
        sides = [torch.bucketize(v, torch.tensor(book.thresholds)) for v in (near * (1 / absmax), near / absmax)]
        differ = near[(sides[0] != sides[1]) & (near < absmax)][:15]
        points.append(torch.cat((absmax.view(1), differ, absmax.repeat(15 - differ.numel()))))
    part = max(points, key=lambda row: int((row < row[0]).sum()))
    x = torch.cat((part, torch.full((48,), 0.4 * float(part[0])), part))
    expected = expect(op, {"x": x, **inputs}, {"blocksize": 64, **extra})
    first = next(iter(expected))
    codes = expected[first].value
    start = codes.numel() * 64 // 80
    i = torch.arange(codes.numel() - start)
    consistent = Expected(codes, free=torch.arange(codes.numel()), pairs=torch.stack((i, start + i)))
    return x, {**expected, first: consistent}


def _at_any_scale(points: Tensor, blocksize: int) -> Tensor:
    """A 1 and the points, padded to a block, times each of four numbers whose reciprocals are rounded."""
    row = F.pad(torch.cat((torch.ones(1), points)), (0, blocksize - 1 - len(points)))
    return torch.cat([row * absmax for absmax in (1.1, 1.3, 1.7, 1.9)])


def _quantize_4bit(book: Codebook) -> Iterator[Case]:
    label, op = book.name, "quantize_4bit"
    extra: dict[str, Any] = {"quant_type": label}
    yield from _in_both(op, "Q4", book, label, extra, {})

    def case(name: str, x: Tensor, rules: str, flags: str = "") -> Case:
        return make(f"{label}-{name}", op, {"x": x}, rules, flags, blocksize=64, **extra)

    rule, flag = ("Q4-4", "fp4-threshold") if book.sign_bit else ("Q4-3", "")
    for power in (-60, 0, 60):
        points = in_blocks(beside(book.thresholds, (-8, -2, -1, 0, 1, 2, 8)), 64, 2.0**power)
        yield case(f"thresholds-2^{power}", points, rule, flag)
    for dtype in DTYPES[1:]:
        yield case(f"thresholds-{dtype}", cast(in_blocks(neighbours(book.thresholds, dtype), 64), dtype), rule, flag)
    # Those of FP4's thresholds that are midpoints too: the literals have cases of their own.
    midpoints = [book.thresholds[1], book.thresholds[4]] if book.sign_bit else book.thresholds[:12]
    yield case("thresholds-any-scale", _at_any_scale(beside(midpoints, (-2, -1, 0, 1, 2)), 64), "Q4-2")
    minus = in_blocks(torch.tensor([-0.0, 0.5] * 31), 64)
    minus = torch.cat((minus[:1], minus[2:], minus[1:2]))
    yield case("minus-zero", minus, "Q4-5" if book.sign_bit else "Q4-3", "negative-zero")
    if book.sign_bit:
        lowest = book.thresholds[0]
        small = beside([lowest / 3, lowest / 100, 2.0**-40], (0, 1, 2))
        yield case("positive-rounds-to-zero", in_blocks(small, 64), "Q4-5", "fp4-zero-sign")
        yield case("negative-rounds-to-zero", in_blocks(-small, 64), "Q4-5", "fp4-zero-sign")
        yield case("negative-ties", in_blocks(-torch.tensor(midpoints), 64), "Q4-5", "fp4-negative-tie")
        yield case("negative-beside-thresholds", in_blocks(-beside(book.thresholds[1:], (-32, 32)), 64), "Q4-3")
    values = torch.tensor(book.values)
    yield case("values", in_blocks(torch.cat((values[values != 0], torch.zeros(3))), 64), "Q4-6")


def _quantize_blockwise(book: Codebook, label: str) -> Iterator[Case]:
    op, values = "quantize_blockwise", value_table(book, CPU)
    yield from _in_both(op, "Q8", book, label, {}, {"values": values})

    def case(name: str, x: Tensor, rules: str, flags: str = "", blocksize: int = 256, dtype: str = "float32") -> Case:
        given = {"x": cast(x, dtype), "values": values}
        return make(f"{label}-{name}", op, given, rules, flags, blocksize=blocksize)

    middle = (values[:-1] + values[1:]) / 2
    sign = 1 if label == "unsigned" else -1

    def untied(x: Tensor) -> Tensor:
        x = x.abs() if sign > 0 else x
        return torch.where(torch.isin(x, middle), 0.4, x)

    yield case("ties", in_blocks(middle[middle.abs() > 1e-3], 256), "Q8-4", "tie-to-even")
    for power in (-60, 0, 60):
        points = in_blocks(beside(middle.tolist(), (-2, -1, 1, 2)), 256, 2.0**power)
        yield case(f"beside-midpoints-2^{power}", points, "Q8-3", "binned-codes")
    for dtype in DTYPES[1:]:
        points = in_blocks(untied(neighbours(middle.tolist(), dtype)), 256)
        yield case(f"midpoints-{dtype}", points, "Q8-3", "binned-codes", dtype=dtype)
    for dtype in DTYPES:
        zeros = in_blocks(torch.tensor([0.0, 0.5, 0.0, sign * 0.25] * 20), 64)
        yield case(f"zeros-{dtype}", zeros, "Q8-5", "zero-in-nonzero-block", 64, dtype)
    yield case("minus-zero", in_blocks(torch.tensor([-0.0, 0.5] * 31), 64), "Q8-5", "zero-in-nonzero-block", 64)
    yield case("tiny", in_blocks(untied(spread(2040, 21, -22, -14)), 256), "Q8-3", "binned-codes")
    yield case("log-uniform", in_blocks(untied(spread(1020, 22, -14, 0)), 256), "Q8-3", "binned-codes")
    yield case("noise-any-scale", _at_any_scale(untied(noise(255, 24)) * 0.99, 256), "Q8-2", "binned-codes")
    yield case("values", in_blocks(values[values.abs() > 0.02], 256), "Q8-3")


def _quantize_4bit_nested(book: Codebook) -> Iterator[Case]:
    def case(name: str, x: Tensor, rules: str, flags: str) -> Case:
        name = f"{book.name}-{name}"
        return make(name, "quantize_4bit_nested", {"x": x}, rules, flags, blocksize=64, quant_type=book.name)

    for name, blocks in (("one", 2), ("many", 512), ("tail", 300)):
        yield case(name, nested_weight(book, blocks, zero_block=False), "QN-1", "nested-absmax")
    yield case("zero-block", nested_weight(book, 64, zero_block=True), "QN-2", "nested-zero-block")
    scales = enumerate((2.0, 1.0, 3.0, 2.0, 2.0))
    mean = torch.cat([in_blocks(clear(noise(63, i), book, 63) * 0.99, 64, scale) for i, scale in scales])
    yield case("mean", mean, "QN-3", "zero-in-nonzero-block")


def _int8_quantize() -> Iterator[Case]:
    def case(name: str, x: Tensor, rules: str, flags: str = "", threshold: float = 0.0, dtype: str = "float16",
             **options: Any) -> Case:  # fmt: skip
        return make(name, "int8_quantize", {"x": cast(x, dtype)}, rules, flags, threshold=threshold, **options)

    halves = torch.arange(-126, 127).float() + 0.5
    # 127 / 127 is 1, and every other scale a power of two: the ties are ties in any formulation.
    ties = torch.stack([torch.cat((torch.tensor([127.0, 0.0]), halves)) * 2.0**e for e in (-8, 0, 1)])
    outliers = noise(8 * 64, 62).view(8, 64)
    outliers[1, 5], outliers[3, 5], outliers[6, 60], outliers[7, 0] = 6.0, -7.5, -6.0, 5.996
    for dtype in DTYPES:
        exact = torch.float32 if dtype == "float32" else torch.float16
        options: dict[str, Any] = {"dtype": dtype, "may_refuse": dtype != "float16"}
        yield case(f"noise-{dtype}", noise(16 * 65, 61).view(16, 65).to(exact), "I8-1 I8-2", **options)
        yield case(f"ties-{dtype}", ties if dtype != "bfloat16" else ties[:, :130], "I8-2", **options)
        yield case(f"outliers-{dtype}", outliers, "I8-1 I8-3", "outlier-columns", 6.0, **options)
    yield case("below-threshold", noise(4 * 32, 63).view(4, 32), "I8-1 I8-3", "outlier-columns", 6.0)
    row = torch.cat((torch.full((1, 16), 8.0), noise(16, 64).view(1, 16)))
    yield case("row-of-outliers", row, "I8-1 I8-3", "outlier-columns", 6.0)
    yield case("zero-row", torch.cat((torch.zeros(1, 32), noise(32, 65).view(1, 32))), "I8-4", "zero-block")
    yield case("one-column", torch.tensor([[3.0], [-4.0], [0.0]]), "I8-1 I8-2")
    yield case("one-row", noise(100, 66).view(1, 100), "I8-1 I8-2")
    yield case("3d", noise(2 * 3 * 40, 67).view(2, 3, 40), "I8-5", "int8-3d")
    yield case("3d-square", noise(2 * 8 * 8, 68).view(2, 8, 8), "I8-5", "int8-3d")
    yield case("transposed", noise(24 * 40, 69).view(24, 40), "G-3", "noncontiguous", layout=("x",))
    bad = noise(4 * 32, 70).view(4, 32)
    for label, value in (("nan", math.nan), ("inf", math.inf)):
        row = bad.clone()
        row[2, 3] = value
        yield case(label, row, "I8-1", "non-finite")


def quantization_cases() -> Iterator[Case]:
    """Every case of this file."""
    for book, label in ((DYNAMIC, "signed"), (DYNAMIC_UNSIGNED, "unsigned")):
        yield from _quantize_blockwise(book, label)
    of_a_codebook: tuple[Callable[[Codebook], Iterator[Case]], ...] = (_quantize_4bit, _quantize_4bit_nested)
    for cases in of_a_codebook:
        for book in (NF4, FP4):
            yield from cases(book)
    yield from _int8_quantize()
