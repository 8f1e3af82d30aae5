"""The cases: inputs chosen where wrong implementations show, each with the rules it tests and the bugs it was made from.

Everything is integers, powers of two and neighbours of thresholds; noise is a hash of the index. So the cases are the same bytes
on every machine, and where absmax is a power of two, scaling is exact in any formulation and the expected codes are unique.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, NF4, Codebook, linear, value_table
from bnbref.conformance.judging import Expected
from bnbref.conformance.operations import OPERATIONS
from bnbref.conformance.rules import FLAGS, RULES

CPU = torch.device("cpu")
DTYPES = ("float32", "float16", "bfloat16")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an operation, and what may come out of it.

    id: `operation/name`. params: JSON values. layout: inputs that are to be given as transposes of contiguous tensors.
    may_refuse: an exception is as good as the result. quick: part of the short run. derived: the expectation is what the
    operation's oracle says of these inputs, nothing more or less, so that the inputs may be varied.
    """

    id: str
    operation: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Expected]
    rules: tuple[str, ...]
    flags: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    may_refuse: bool = False
    quick: bool = True
    derived: bool = True

    def __post_init__(self) -> None:
        unknown = [r for r in self.rules if r not in RULES] + [f for f in self.flags if f not in FLAGS]
        if unknown:
            raise ValueError(f"case {self.id} refers to rules or flags that do not exist: {unknown}")

    @property
    def dtype(self) -> str:
        """The dtype that the case is about: of what is quantized or multiplied, else of the result."""
        given = next((self.inputs[name] for name in ("x", "a", "p", "grad") if name in self.inputs), None)
        about = given if given is not None else self.expected["y"].value
        return str(about.dtype).removeprefix("torch.")


def make(
    name: str,
    operation: str,
    inputs: Mapping[str, Tensor],
    rules: str,
    flags: str = "",
    expected: Mapping[str, Expected] | None = None,
    layout: tuple[str, ...] = (),
    may_refuse: bool = False,
    quick: bool = True,
    **params: Any,
) -> Case:
    """A case; expected: by the oracle of the operation, if not given."""
    wanted = OPERATIONS[operation].expect(inputs, params) if expected is None else expected
    return Case(
        f"{operation}/{name}", operation, params, dict(inputs), wanted, tuple(rules.split()), tuple(flags.split()),
        layout, may_refuse, quick, expected is None,
    )  # fmt: skip


# ---- numbers --------------------------------------------------------------------------------------------------------


def integers(count: int, seed: int, bits: int) -> Tensor:
    """Pseudo-random int64 in [0, 2^bits), bits <= 31: a multiplicative hash of the index, the same everywhere.

    >>> integers(3, seed=1, bits=8).tolist()
    [62, 254, 230]
    """
    x: Tensor = torch.arange(count, dtype=torch.int64) + seed * 1_000_003
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * multiplier) & 0x7FFFFFFF
    mixed: Tensor = (x ^ (x >> 15)) & (2**bits - 1)
    return mixed


def noise(count: int, seed: int) -> Tensor:
    """float32, roughly normal with a standard deviation of 0.29: a sum of four uniform integers of 20 bits, scaled by 2^-21.

    >>> noise(10000, seed=0).abs().max() < 1
    tensor(True)
    """
    total = sum(integers(count, 4 * seed + i, 20) - 2**19 for i in range(4))
    return torch.as_tensor(total).float() * 2.0**-21


def spread(count: int, seed: int, low: int, high: int) -> Tensor:
    """float32 whose exponents are uniform in [low, high), with 8 random bits of mantissa and a random sign."""
    exponent = integers(count, seed, 16) % (high - low) + low
    mantissa = 1 + integers(count, seed + 1, 8).float() / 256
    sign = 1 - 2 * integers(count, seed + 2, 1).float()
    return sign * mantissa * torch.exp2(exponent.double()).float()


def beside(points: Sequence[float], ulps: Sequence[int]) -> Tensor:
    """float32: each point, moved by each number of representable steps away from (negative: towards) zero."""
    bits = torch.tensor(points, dtype=torch.float32).view(torch.int32)
    moved = [torch.where(bits & 0x7FFFFFFF == 0, bits, bits + step) for step in ulps]
    return torch.stack(moved, 1).view(-1).view(torch.float32)


def in_blocks(points: Tensor, blocksize: int, scale: float = 1.0) -> Tensor:
    """The points, times a power of two, in blocks whose first element is the scale itself: the absmax of each."""
    rows = torch.nn.functional.pad(points, (0, -points.numel() % (blocksize - 1)), value=0.4).view(-1, blocksize - 1)
    return (torch.cat((torch.ones(rows.shape[0], 1), rows), 1) * scale).view(-1)


def clear(x: Tensor, book: Codebook, blocksize: int = 64) -> Tensor:
    """`x` with what lies near a threshold, or near zero, replaced by 0.4 of the absmax of its block.

    What is left has one code by any rule of rounding, so that a case on sizes or strides fails for its own reason alone.
    """
    blocks = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(-1, keepdim=True)
    scaled = torch.where(absmax > 0, blocks / absmax, 0.0)
    bounds = torch.tensor(book.thresholds)
    size = scaled.abs() if book.sign_bit else scaled
    above = torch.bucketize(size, bounds).clamp(max=len(bounds) - 1)
    distance = torch.minimum((bounds[above] - size).abs(), (size - bounds[(above - 1).clamp(min=0)]).abs())
    sign = torch.where(scaled < 0, -1.0, 1.0)
    kept = torch.where((distance < 2e-4) | (scaled.abs() < 0.02), 0.4 * absmax * sign, blocks)
    return kept.view(-1)[: x.numel()].view(x.shape)


def cast(x: Tensor, dtype: str) -> Tensor:
    """To a dtype by its name."""
    return x.to(getattr(torch, dtype))


def _neighbours(points: Sequence[float], dtype: str) -> Tensor:
    """Of each point the nearest number of a 16-bit dtype, and the two beside it."""
    near = cast(torch.tensor(points), dtype)
    bits = near.view(torch.int16)
    moved = [torch.where(near == 0, bits, bits + step) for step in (-1, 0, 1)]
    return torch.stack(moved, 1).view(-1).view(near.dtype).float()


# ---- quantization ---------------------------------------------------------------------------------------------------


def _shared_blocks(
    op: str, letter: str, book: Codebook, label: str, extra: dict[str, Any], inputs: Mapping[str, Tensor]
) -> Iterator[Case]:
    """What 8-bit and 4-bit quantization have in common: scales, tails, zeros, sizes."""
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
    yield _one_formula(f"{label}-tail-formula", op, f"{letter}-{tail_rule}", book, inputs, extra)


def _one_formula(
    name: str, op: str, rule: str, book: Codebook, inputs: Mapping[str, Tensor], extra: dict[str, Any]
) -> Case:
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
    expected = OPERATIONS[op].expect({"x": x, **inputs}, {"blocksize": 64, **extra})
    first = next(iter(expected))
    codes = expected[first].value
    start = codes.numel() * 64 // 80
    i = torch.arange(codes.numel() - start)
    consistent = Expected(codes, free=torch.arange(codes.numel()), pairs=torch.stack((i, start + i)))
    results = {**expected, first: consistent}
    return make(name, op, {"x": x, **inputs}, rule, "tail-block", results, blocksize=64, **extra)


def _quantize_4bit(book: Codebook) -> Iterator[Case]:
    label, op = book.name, "quantize_4bit"
    extra: dict[str, Any] = {"quant_type": label}
    yield from _shared_blocks(op, "Q4", book, label, extra, {})

    def case(name: str, x: Tensor, rules: str, flags: str = "") -> Case:
        return make(f"{label}-{name}", op, {"x": x}, rules, flags, blocksize=64, **extra)

    rule, flag = ("Q4-4", "fp4-threshold") if book.sign_bit else ("Q4-3", "")
    for power in (-60, 0, 60):
        points = in_blocks(beside(book.thresholds, (-8, -2, -1, 0, 1, 2, 8)), 64, 2.0**power)
        yield case(f"thresholds-2^{power}", points, rule, flag)
    for dtype in DTYPES[1:]:
        yield case(f"thresholds-{dtype}", cast(in_blocks(_neighbours(book.thresholds, dtype), 64), dtype), rule, flag)
    # Of FP4's thresholds those that are midpoints too: the literals have cases of their own.
    points = beside(
        [book.thresholds[1], book.thresholds[4]] if book.sign_bit else book.thresholds[:12], (-2, -1, 0, 1, 2)
    )
    scaled = [
        torch.nn.functional.pad(torch.cat((torch.ones(1), points)) * a, (0, 63 - len(points)))
        for a in (1.1, 1.3, 1.7, 1.9)
    ]
    yield case("thresholds-any-scale", torch.cat(scaled), "Q4-2")
    minus = in_blocks(torch.tensor([-0.0, 0.5] * 31), 64)
    yield case(
        "minus-zero",
        torch.cat((minus[:1], minus[2:], minus[1:2])),
        "Q4-5" if book.sign_bit else "Q4-3",
        "negative-zero",
    )
    if book.sign_bit:
        lowest = book.thresholds[0]
        small = beside([lowest / 3, lowest / 100, 2.0**-40], (0, 1, 2))
        yield case("positive-rounds-to-zero", in_blocks(small, 64), "Q4-5", "fp4-zero-sign")
        yield case("negative-rounds-to-zero", in_blocks(-small, 64), "Q4-5", "fp4-zero-sign")
        ties = torch.tensor([book.thresholds[1], book.thresholds[4]])
        yield case("negative-ties", in_blocks(-ties, 64), "Q4-5", "fp4-negative-tie")
        yield case("negative-beside-thresholds", in_blocks(-beside(book.thresholds[1:], (-32, 32)), 64), "Q4-3")
    values = torch.tensor(book.values)
    yield case("values", in_blocks(torch.cat((values[values != 0], torch.zeros(3))), 64), "Q4-6")


def _quantize_blockwise(book: Codebook, label: str) -> Iterator[Case]:
    op, values = "quantize_blockwise", value_table(book, CPU)
    yield from _shared_blocks(op, "Q8", book, label, {}, {"values": values})

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
        points = in_blocks(untied(_neighbours(middle.tolist(), dtype)), 256)
        yield case(f"midpoints-{dtype}", points, "Q8-3", "binned-codes", dtype=dtype)
    for dtype in DTYPES:
        zeros = in_blocks(torch.tensor([0.0, 0.5, 0.0, sign * 0.25] * 20), 64)
        yield case(f"zeros-{dtype}", zeros, "Q8-5", "zero-in-nonzero-block", 64, dtype)
    yield case("minus-zero", in_blocks(torch.tensor([-0.0, 0.5] * 31), 64), "Q8-5", "zero-in-nonzero-block", 64)
    yield case("tiny", in_blocks(untied(spread(2040, 21, -22, -14)), 256), "Q8-3", "binned-codes")
    yield case("log-uniform", in_blocks(untied(spread(1020, 22, -14, 0)), 256), "Q8-3", "binned-codes")
    anywhere = [torch.cat((torch.ones(1), untied(noise(255, 24)) * 0.99)) * a for a in (1.1, 1.3, 1.7, 1.9)]
    yield case("noise-any-scale", torch.cat(anywhere), "Q8-2", "binned-codes")
    yield case("values", in_blocks(values[values.abs() > 0.02], 256), "Q8-3")


# ---- dequantization -------------------------------------------------------------------------------------------------

# Scales over two decades, none of which is a float16: a wrong index or one more rounding shows in every element.
SCALES = (1.0001, 100.003, 0.050001, 7.00007, 31.0003, 0.30001, 55.0007, 2.00003)


def scales(count: int) -> Tensor:
    """float32 `[count]` taken from SCALES in turn, and slightly larger each time."""
    i = torch.arange(count)
    return torch.tensor(SCALES)[i % len(SCALES)] * (1 + (i // len(SCALES)).float() / 64)


def random_bytes(count: int, seed: int) -> Tensor:
    """uint8 `[count]`."""
    return integers(count, seed, 8).to(torch.uint8)


def _dequantize_4bit(book: Codebook) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], rules: str, flags: str = "", blocksize: int = 64, dtype: str = "float32",
             packed: Tensor | None = None, absmax: Tensor | None = None, quick: bool = True) -> Case:  # fmt: skip
        n = math.prod(shape)
        given = {
            "packed": random_bytes(-(-n // 2), n) if packed is None else packed,
            "absmax": scales(-(-n // blocksize)) if absmax is None else absmax,
        }
        return make(f"{book.name}-{name}", "dequantize_4bit", given, rules, flags, quick=quick,
                     blocksize=blocksize, quant_type=book.name, shape=list(shape), dtype=dtype)  # fmt: skip

    for dtype in DTYPES:
        every = torch.arange(256).to(torch.uint8).repeat(2)
        yield case(f"every-byte-{dtype}", (8, 128), "D4-1", "rounding", 64, dtype, every)
    for shape in ((4, 32), (2, 96), (3, 80), (5, 16), (6, 160)):
        for dtype in DTYPES:
            name = f"columns-{shape[1]}-{dtype}"
            yield case(name, shape, "D4-2", "scale-index-tail-columns", 64, dtype, quick=dtype == "float32")
    others: tuple[tuple[int, ...], ...] = ((4, 64), (2, 192), (3, 33), (5, 7), (1, 96), (2, 3, 64))
    for other in others:
        flags = "odd-size" if math.prod(other) % 2 else ""
        yield case("shape-" + "x".join(map(str, other)), other, "D4-2 G-1", flags)
    for n in (1, 2, 63, 64, 96, 128):
        yield case(f"vector-{n}", (n,), "D4-3", "one-dimensional-shape")
    yield case("shape-1x2", (1, 2), "D4-3", "packed-length-one")
    for blocksize in BLOCKSIZES:
        flags = "blocksize" if blocksize >= 1024 else ""
        yield case(f"blocksize-{blocksize}", (4, blocksize), "D4-2", flags, blocksize, quick=blocksize in (32, 4096))
    yield case("blocksize-1024-rows", (64, 64), "D4-2", "scale-index-tail-columns", 1024)
    yield case("blocksize-2048-rows", (64, 64), "D4-2", "scale-index-tail-columns", 2048)
    extreme = torch.tensor([2.0**-126, 2.0**-149, 2.0**127, 65504.0, 131008.0, 2.0**-24, 0.0, 1e-40])
    for dtype in DTYPES:
        yield case(f"extreme-scales-{dtype}", (8, 64), "D4-1", "rounding", 64, dtype, absmax=extreme)


def _dequantize_blockwise() -> Iterator[Case]:
    def case(name: str, values: Tensor, codes: Tensor, absmax: Tensor, rules: str, flags: str = "", blocksize: int = 64,
             dtype: str = "float32", **options: Any) -> Case:  # fmt: skip
        given = {"codes": codes, "absmax": absmax, "values": values}
        return make(name, "dequantize_blockwise", given, rules, flags, blocksize=blocksize, dtype=dtype, **options)

    every = torch.arange(256).to(torch.uint8)
    for label, book in (("signed", DYNAMIC), ("unsigned", DYNAMIC_UNSIGNED), ("linear", linear())):
        values = value_table(book, CPU)
        for dtype in DTYPES:
            yield case(f"{label}-every-code-{dtype}", values, every, scales(4), "D8-1", "rounding", 64, dtype)
    values = value_table(DYNAMIC, CPU)
    for blocksize in BLOCKSIZES:
        n = 2 * blocksize + 5
        flags = "blocksize" if blocksize >= 1024 else ""
        yield case(
            f"blocksize-{blocksize}",
            values,
            random_bytes(n, n),
            scales(3),
            "D8-2",
            flags,
            blocksize,
            quick=blocksize in (32, 4096),
        )
    yield case("blocksize-100", values, random_bytes(250, 1), scales(3), "D8-2 G-4", "blocksize", 100, may_refuse=True)
    for n in (1, 7, 63, 65):
        yield case(f"size-{n}", values, random_bytes(n, n), scales(-(-n // 64)), "D8-2", "tail-block")
    yield case("matrix", values, random_bytes(480, 2).view(5, 96), scales(8), "D8-2 G-1")
    extreme = torch.tensor([2.0**-126, 2.0**-149, 2.0**127, 65504.0, 131008.0, 2.0**-24, 0.0, 1e-40])
    # Three NaN: the usual one, one whose lower half is all ones, one that is negative.
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        yield case(f"extreme-scales-{dtype}", values, every.repeat(2), extreme, "D8-1 D8-3", "rounding", 64, dtype)
        yield case(
            f"nan-scale-{dtype}",
            values,
            every[100:292].repeat(2)[:192],
            torch.cat((nan, scales(1)))[:3],
            "D8-3",
            "nan-scale",
            64,
            dtype,
        )


# ---- double quantization --------------------------------------------------------------------------------------------


def _nested_weight(book: Codebook, blocks: int, zero_block: bool) -> Tensor:
    """Blocks of 64 whose absmax are 2 - s and 2 + s, s a multiple of 1/64 up to 1: their mean is exact, and so is scaling."""
    step = torch.where(torch.arange(blocks // 2) % 128 == 0, 1.0, (1 + integers(blocks // 2, 31, 6).float()) / 64)
    step = clear(step, DYNAMIC, 128)
    if zero_block:
        step = torch.where(torch.arange(blocks // 2) == 1, 2.0, 0.75)
    absmax = torch.stack((2 - step, 2 + step), 1).view(-1)
    x = in_blocks(clear(noise(63 * blocks, 33), book, 63) * 0.99, 64).view(blocks, 64)
    return x * absmax[:, None]


def _nested() -> Iterator[Case]:
    for book in (NF4, FP4):
        for name, blocks, zero, flags in (
            ("one", 2, False, "nested-absmax"), ("many", 512, False, "nested-absmax"), ("tail", 300, False, "nested-absmax"),
            ("zero-block", 64, True, "nested-zero-block"),
        ):  # fmt: skip
            x = _nested_weight(book, blocks, zero)
            rules = "QN-2" if zero else "QN-1"
            yield make(
                f"{book.name}-{name}",
                "quantize_4bit_nested",
                {"x": x},
                rules,
                flags,
                blocksize=64,
                quant_type=book.name,
            )
        mean = torch.cat(
            [in_blocks(clear(noise(63, i), book, 63) * 0.99, 64, s) for i, s in enumerate((2.0, 1.0, 3.0, 2.0, 2.0))]
        )
        yield make(
            f"{book.name}-mean",
            "quantize_4bit_nested",
            {"x": mean},
            "QN-3",
            "zero-in-nonzero-block",
            blocksize=64,
            quant_type=book.name,
        )
        for dtype in DTYPES:
            for name, shape in (("matrix", (40, 64)), ("columns-96", (20, 96)), ("many", (320, 64))):
                n = math.prod(shape)
                blocks = -(-n // 64)
                given = {
                    "packed": random_bytes(n // 2, 41), "codes": random_bytes(blocks, 42),
                    "absmax2": scales(-(-blocks // 256)) / 90, "offset": torch.tensor(2.54351806640625),
                    "values": value_table(DYNAMIC, CPU),
                }  # fmt: skip
                rules, flags = ("DN-2", "scale-index-tail-columns") if shape[1] % 64 else ("DN-1", "nested-absmax")
                made = make(f"{book.name}-{name}-{dtype}", "dequantize_4bit_nested", given, rules, flags,
                             blocksize=64, quant_type=book.name, shape=list(shape), dtype=dtype)  # fmt: skip
                yield replace(made, quick=dtype == "float32")
        given = {
            "packed": random_bytes(1, 5), "codes": random_bytes(1, 6), "absmax2": scales(1), "offset": torch.tensor(2.0),
            "values": value_table(DYNAMIC, CPU),
        }  # fmt: skip
        yield make(f"{book.name}-shape-1x2", "dequantize_4bit_nested", given, "DN-2", "packed-length-one", blocksize=64,
                    quant_type=book.name, shape=[1, 2], dtype="float32")  # fmt: skip


# ---- products -------------------------------------------------------------------------------------------------------


def _gemm_4bit() -> Iterator[Case]:
    sizes: tuple[tuple[tuple[int, ...], int, int, bool], ...] = (
        ((1,), 32, 128, False), ((5,), 32, 128, True), ((2, 3), 17, 64, True), ((5,), 32, 96, False), ((3,), 16, 32, False),
        ((8,), 64, 1024, False), ((70,), 8, 128, False),
    )  # fmt: skip
    for book in (NF4, FP4):
        for dtype in DTYPES:
            for lead, n, k, biased in sizes:
                a = cast(noise(math.prod(lead) * k, 51).view(*lead, k), dtype)
                given = {"a": a, "packed": random_bytes(n * k // 2, 52), "absmax": scales(-(-n * k // 64))}
                if biased:
                    given["bias"] = cast(noise(n, 53) * 8, dtype)
                flags = "scale-index-tail-columns" if k % 64 else "gemm-rows" if lead != (1,) else ""
                name = f"{book.name}-{'x'.join(map(str, lead))}-{n}x{k}{'-bias' if biased else ''}-{dtype}"
                rule = "G4-2" if flags == "gemm-rows" else "G4-1"
                made = make(name, "gemm_4bit", given, rule, flags, blocksize=64, quant_type=book.name, shape=[n, k])
                yield replace(made, quick=k == 96 or lead == (5,))


# ---- int8 -----------------------------------------------------------------------------------------------------------


def _int8_quantize() -> Iterator[Case]:
    def case(
        name: str,
        x: Tensor,
        rules: str,
        flags: str = "",
        threshold: float = 0.0,
        dtype: str = "float16",
        **options: Any,
    ) -> Case:
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
    yield case(
        "row-of-outliers",
        torch.cat((torch.full((1, 16), 8.0), noise(16, 64).view(1, 16))),
        "I8-1 I8-3",
        "outlier-columns",
        6.0,
    )
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


def _int8(count: tuple[int, ...], seed: int) -> Tensor:
    return (integers(math.prod(count), seed, 8) - 128).to(torch.int8).view(count)


def _int8_matmul() -> Iterator[Case]:
    for m, n, k in ((1, 8, 16), (3, 5, 64), (16, 16, 128), (2, 4, 1), (2, 4, 2), (5, 3, 33), (1, 1, 1040)):
        yield make(
            f"{m}x{n}x{k}",
            "int8_matmul",
            {"a": _int8((m, k), 71), "b": _int8((n, k), 72)},
            "IM-1",
            "int8-one-column" if k == 1 else "",
        )
    for k in (1024, 1040, 1041, 1042, 2048, 4099):
        for left, right in ((127, 127), (-128, -128), (127, -128)):
            a = torch.full((2, k), left, dtype=torch.int8)
            b = torch.full((2, k), right, dtype=torch.int8)
            # Odd sums, of which float32 has only every other one above 2^24.
            a[1, 1::2], b[1, -1] = 126, 1
            flags = "int8-k-over-1040" if k > 1024 else ""
            yield make(f"k-{k}-{left}x{right}", "int8_matmul", {"a": a, "b": b}, "IM-1", flags, quick=k == 2048)
    yield make("3d", "int8_matmul", {"a": _int8((2, 3, 32), 73), "b": _int8((5, 32), 74)}, "IM-2", "int8-3d")


def _int8_mm_dequant() -> Iterator[Case]:
    def case(name: str, product: Tensor, rules: str, flags: str = "", dtype: str = "float32", bias: Tensor | None = None,
             row: Tensor | None = None, column: Tensor | None = None) -> Case:  # fmt: skip
        rows, columns = math.prod(product.shape[:-1]), product.shape[-1]
        given = {
            "product": product.to(torch.int32),
            "row": noise(rows, 81).abs() + 0.5 if row is None else row,
            "column": noise(columns, 82).abs() + 0.25 if column is None else column,
        }
        if bias is not None:
            given["bias"] = bias
        return make(name, "int8_mm_dequant", given, rules, flags, dtype=dtype)

    random = integers(6 * 9, 83, 22).view(6, 9) - 2**21
    one = torch.ones(1)
    yield case("one", torch.tensor([[16129]]), "ID-1", "int8-constant", row=one, column=one)
    for dtype in DTYPES:
        flags = "int8-constant" if dtype == "float32" else ""
        yield case(f"noise-{dtype}", random, "ID-1", flags, dtype)
        yield case(f"bias-{dtype}", random, "ID-1", flags, dtype, cast(noise(9, 84) * 4, dtype))
    wide = torch.tensor([[2**24 - 1, -(2**24), 2**30, 1, 0]])
    yield case("large-product", wide, "ID-1", "int8-constant")
    for dtype in ("float32", "bfloat16"):
        made = case(
            f"beyond-float16-{dtype}",
            random * 16,
            "ID-2",
            "float16-detour",
            dtype,
            row=torch.full((6,), 100.0),
            column=torch.full((9,), 50.0),
        )
        yield _loosened(made)
    for dtype in DTYPES:
        yield _loosened(
            case(f"3d-{dtype}", (integers(2 * 3 * 4, 85, 12) - 2048).view(2, 3, 4), "ID-3", "int8-3d", dtype)
        )


def _loosened(case: Case) -> Case:
    """The case with a relative error of 1e-4 allowed: it is about shapes or ranges, others are about the last digits."""
    y = case.expected["y"]
    if y.low is None or y.high is None:
        raise ValueError(f"case {case.id} has no interval to widen")
    low, high = y.low - 1e-4 * y.low.abs(), y.high + 1e-4 * y.high.abs()
    return replace(case, expected={"y": replace(y, low=low, high=high)}, derived=False)


def _int8_dequantize() -> Iterator[Case]:
    every = torch.arange(-128, 128).to(torch.int8).view(4, 64)
    yield make(
        "every-code", "int8_dequantize", {"codes": every, "absmax": torch.tensor([1.0, 3.3, 65504.0, 1e-5])}, "IV-1"
    )
    yield make("noise", "int8_dequantize", {"codes": _int8((7, 33), 91), "absmax": scales(7)}, "IV-1")


# ---- files ----------------------------------------------------------------------------------------------------------


def _files() -> Iterator[Case]:
    for book in (NF4, FP4):
        for dtype in DTYPES:
            # bfloat16 rounds the elements, never the absmax.
            halves = [
                in_blocks(clear(noise(63 * 4, seed), book, 63) * 0.99, 64, scale)
                for seed, scale in ((95, 1.0), (96, 4.0))
            ]
            plain = cast(clear(cast(torch.cat(halves), dtype).float(), book).view(8, 64), dtype)
            nested = cast(clear(cast(_nested_weight(book, 128, False), dtype).float(), book), dtype)
            vector = plain.view(-1)[:66].clone()
            for label, x, is_nested in (("plain", plain, False), ("nested", nested, True), ("vector", vector, False)):
                name = f"{book.name}-{label}-{dtype}"
                written = make(
                    name,
                    "save_4bit",
                    {"x": x},
                    "CW-1 CW-2",
                    "checkpoint-bytes",
                    blocksize=64,
                    quant_type=book.name,
                    nested=is_nested,
                )
                yield written
                file = {key: value.value for key, value in written.expected.items()}
                yield make(
                    name,
                    "load_4bit",
                    file,
                    "CR-1",
                    "one-dimensional-shape" if x is vector else "nested-absmax" if is_nested else "checkpoint-bytes",
                    quant_type=book.name,
                )


def forward_cases() -> Iterator[Case]:
    """Every case of this file."""
    for book, label in ((DYNAMIC, "signed"), (DYNAMIC_UNSIGNED, "unsigned")):
        yield from _quantize_blockwise(book, label)
    yield from _dequantize_blockwise()
    for book in (NF4, FP4):
        yield from _quantize_4bit(book)
    for book in (NF4, FP4):
        yield from _dequantize_4bit(book)
    for made in (_nested, _gemm_4bit, _int8_quantize, _int8_matmul, _int8_mm_dequant, _int8_dequantize, _files):
        yield from made()
