"""Proofs by exhaustion: every input of a function of one float, eager and compiled, against a second implementation.

Encoding and rounding are steps: as a function of the float's bits they are constant between a few hundred (encoding) or
65,536 (rounding) patterns. The expectation is made of these patterns and of the values at them, which `second.py` computes
element by element, or integers alone; nothing under test takes part in it. So it costs no more than filling memory.

`make proofs` runs all with a progress bar and prints a table at the end. The large tensors need 12 GiB. Where there is a CUDA
device, what it runs in its own way is proven there too.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import second
import torch
from conftest import difference, same_bits
from torch import Tensor

import bnbref
from bnbref import blockwise, fourbit, int8
from bnbref.blockwise import encode
from bnbref.codebooks import AF4, DYNAMIC, DYNAMIC_UNSIGNED, FP4, INT4, NF4, Codebook, value_table
from bnbref.kernels import REGISTRY, Kernel
from bnbref.kernels.counting import code_by_table, code_by_wide_table, code_table, wide_table
from bnbref.kernels.encoding import code_by_tree
from bnbref.kernels.formulations import Formulation

CPU = torch.device("cpu")
CHUNK = 2**23  # all floats of one sign and exponent
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

Function = Callable[[Tensor], Tensor]


# ---- expectations ---------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """A function of 32 bits that is constant from each start to the next one: `starts[0]` is 0."""

    starts: np.ndarray
    values: Tensor

    def part(self, start: int, stop: int) -> Tensor:
        """The function of the patterns from start to stop."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        edges = np.clip(np.append(self.starts[first:last], stop), start, stop) - start
        out = self.values.new_empty(stop - start)
        for value, begin, end in zip(
            self.values[first:last].unbind(), edges[:-1].tolist(), edges[1:].tolist(), strict=True
        ):
            out[begin:end] = value  # repeat_interleave takes ten times as long
        return out


INFINITY, SIGN = 0x7F800000, 0x80000000


def steps_of(thresholds: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> Steps:
    """A function that does nothing but compare with thresholds, or with their negatives: it changes beside them, at zero,
    and where NaN begins."""
    bits = thresholds.astype(np.float32).view(np.uint32).astype(np.int64) & ~SIGN
    beside = np.concatenate([bits - 1, bits, bits + 1, [0, 1, INFINITY, INFINITY + 1]])
    beside = beside[beside >= 0]
    starts = np.unique(np.concatenate([beside, beside | SIGN]))
    return Steps(starts, torch.from_numpy(function(starts.astype(np.uint32).view(np.float32)).astype(np.uint8)))


def codes_of(name: str) -> Steps:
    """The code of each float32 by the rule of a format, as `second.encode` has it."""
    thresholds = second.THRESHOLDS.get(name)
    if thresholds is None:
        thresholds = second.midpoints(np.sort(second.VALUES[name]))
    return steps_of(thresholds, lambda x: second.encode(name, x))


def rounding_to(dtype: torch.dtype) -> Steps:
    """Rounding to nearest even by its definition: the middle of two neighbours goes to the one whose last bit is 0.

    Both, and so their middle, are exact in float32; the neighbour of the largest number is what would follow it.
    """
    infinity = {BF16: 0x7F80, F16: 0x7C00}[dtype]
    word = np.arange(infinity + 1, dtype=np.int64)
    if dtype == BF16:
        middle = (word[:-1] << 16) + 0x8000
    else:
        exponent, mantissa = word >> 10, word & 0x3FF
        value = np.where(exponent == 0, mantissa * 2.0**-24, (1024 + mantissa) * 2.0 ** (exponent - 25.0))
        middle = ((value[:-1] + value[1:]) / 2).astype(np.float32).view(np.uint32).astype(np.int64)
    starts = np.concatenate([[0], middle + (word[:-1] % 2 == 0), [INFINITY + 1]])
    words = np.append(word, infinity | 0x40)  # NaN
    both = np.concatenate([words, words | 0x8000]).astype(np.uint16).view(np.int16)
    return Steps(np.concatenate([starts, starts | SIGN]), torch.from_numpy(both).view(dtype))


@functools.lru_cache(2)
def reciprocals(exponent: int) -> np.ndarray:
    """The bits of 1 / x, correctly rounded, for all 2^23 float32 x = m 2^(exponent - 150), m = 2^23 .. 2^24 - 1.

    1 / x = (2^47 / m) 2^(103 - exponent), and 2^47 / m is an integer of 24 bits when rounded; below 2^-126 units of 2^-149
    are left, as many as 2^(299 - exponent) / m. Only a power of two is ever halfway, and then an integer.
    """
    m = np.arange(2**23, 2**24, dtype=np.int64)
    if exponent > 252:
        return (2 ** (299 - exponent) + m // 2) // m
    return ((253 - exponent) << 23) + (2**47 + m // 2) // m - 2**23


# ---- proving --------------------------------------------------------------------------------------------------------


_COUNT = torch.arange(CHUNK, dtype=torch.int32)


def patterns(start: int, stop: int) -> Tensor:
    """The float32 with these bits, up to a chunk of them."""
    return (_COUNT[: stop - start] + (start - 2 * (start & SIGN))).view(F32)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run that are formulated in another way for GPUs, or compiled by other rules."""
    return torch.device(request.param)


def prove(
    theorems,
    theorem: str,
    functions: Sequence[Function],
    want: Callable[[int, int], Tensor],
    until: int = SIGN,
    device: torch.device = CPU,
) -> None:
    """Each function gives the expected bits for every float32: its patterns up to `until`, and the same with a sign.

    functions are given float32 and compared with `want(start, stop)` of their patterns.
    """
    theorem += "" if device == CPU else f" on {device}"
    begun, seen = time.perf_counter(), 0
    starts = [sign + start for sign in (0, SIGN) for start in range(0, until, CHUNK)]
    with theorems.progress(theorem, len(starts)) as bar:
        for start in starts:
            stop = min(start + CHUNK, (start & SIGN) + until)
            x = patterns(start, stop).to(device)
            expected = want(start, stop).to(device)
            for function in functions:
                got = function(x)
                # NaN has many bits: equal numbers first, as that is fast
                if not torch.equal(got, expected) and not same_bits(got, expected):
                    raise AssertionError(difference(got, expected))
            seen += stop - start
            bar.update()
    assert seen == 2 * until
    theorems.record(theorem, seen, time.perf_counter() - begun)


class Unregistered(Kernel):
    """A kernel of one argument, compiled by the one door, with a formulation of its own."""

    def __init__(self, definition: Function, formulation: Formulation) -> None:
        super().__init__(definition, {"x": (0,)})
        self.own = formulation

    @property
    def formulation(self) -> Formulation:
        return self.own


def kernel(definition: Function, body: Function, like: str | None = None) -> Function:
    """A kernel with this body, and with the options of a kernel that is registered."""
    cpu = None if like is None else REGISTRY[like].formulation.options("cpu", (torch.empty(0, 1),), {})
    return Unregistered(definition, Formulation(body, cpu=cpu))


def eagerly(function: Function) -> Function:
    """Uncompiled, a cache's worth of elements at a time."""

    def run(x: Tensor) -> Tensor:
        with bnbref.eager():
            return torch.cat([function(part) for part in x.split(2**17 if x.device == CPU else CHUNK)], -1)

    return run


# ---- every float32: encoding ----------------------------------------------------------------------------------------

EIGHT_BIT = {"dynamic_signed": DYNAMIC, "dynamic_unsigned": DYNAMIC_UNSIGNED}


@pytest.mark.slow
@pytest.mark.parametrize("book", [NF4, FP4, AF4, INT4], ids=lambda book: book.name)
def test_four_bit_codes(book: Codebook, theorems):
    def definition(x: Tensor) -> Tensor:
        return encode(x, book)

    tree = kernel(definition, lambda x: code_by_tree(x, book).to(torch.uint8), "quantize_rows")
    modes = [eagerly(definition), tree] if book in (NF4, FP4) else [tree]
    how = "eager and compiled" if len(modes) == 2 else "compiled"
    prove(theorems, f"{book.name} codes: {how}", modes, codes_of(book.name).part)


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_codes(name: str, theorems):
    book = EIGHT_BIT[name]

    def definition(x: Tensor) -> Tensor:
        return encode(x, book)

    prove(theorems, f"{book.name} codes: eager", [eagerly(definition)], codes_of(name).part)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "fp4", *EIGHT_BIT])
def test_codes_by_cell(name: str, device: torch.device, theorems):
    """The tables of codes."""
    bits, like = (8, "quantize_blocks") if name in EIGHT_BIT else (4, None)
    table = code_table({"nf4": NF4, "fp4": FP4, **EIGHT_BIT}[name], device, bits)
    assert table is not None
    compiled = kernel(forbidden, lambda x: code_by_table(x, table, bits).to(torch.uint8), like)
    prove(theorems, f"{name} codes by table", [compiled], codes_of(name).part, device=device)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", *EIGHT_BIT])
def test_codes_by_wide_table(name: str, device: torch.device, theorems):
    """The tables of thresholds, by address on an NVIDIA GPU, for products, as all scaled elements are: with 1, which the compiler
    does not know."""
    table, one = wide_table({"nf4": NF4, **EIGHT_BIT}[name], device), torch.ones(1, device=device)
    assert table is not None

    def code(x: Tensor) -> Tensor:
        return code_by_wide_table(x * one, table).to(torch.uint8)

    prove(theorems, f"{name} codes by wide table", [kernel(forbidden, code)], codes_of(name).part, device=device)


def forbidden(x: Tensor) -> Tensor:
    raise AssertionError("ran uncompiled")


@pytest.mark.slow
def test_int8_codes(device: torch.device, theorems):
    """Every float32 up to 127 in rows of absmax 127, whose factor is 1: rounded half to even."""
    halves = np.arange(127, dtype=np.float64) + 0.5  # exact
    steps = steps_of(halves, lambda x: np.rint(np.clip(np.nan_to_num(x.astype(np.float64)), -127, 127)).astype(np.int8))

    def in_rows(x: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(x, (0, -x.numel() % 1023)).view(-1, 1023)
        rows = torch.nn.functional.pad(rows, (1, 0), value=127.0)
        codes, absmax, _ = int8.quantize_int8_rows(rows, threshold=0.0)
        assert bool((absmax == 127).all())
        return codes[:, 1:].reshape(-1)[: x.numel()].view(torch.uint8)

    last = int(np.float32(127).view(np.uint32))
    modes = [eagerly(in_rows), in_rows]
    prove(theorems, "int8 codes: eager and compiled", modes, steps.part, until=last + 1, device=device)


# ---- every float32: scales and rounding -----------------------------------------------------------------------------


@pytest.mark.slow
def test_reciprocal(device: torch.device, theorems):
    """1 / absmax of absmax = |x|: a chunk is an exponent. 0 where x is below 2^-126, infinite or NaN."""

    def definition(x: Tensor) -> Tensor:
        return blockwise.reciprocal(blockwise.magnitude(x))

    def want(start: int, stop: int) -> Tensor:
        exponent = start >> 23 & 255
        bits = reciprocals(exponent) if 0 < exponent < 255 else np.zeros(stop - start)
        return torch.from_numpy(bits.astype(np.int32)).view(F32)

    modes = [eagerly(definition), kernel(forbidden, definition)]
    prove(theorems, "1 / absmax: eager and compiled, correctly rounded", modes, want, device=device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_one_rounding_when_decoding_four_bits(dtype: torch.dtype, device: torch.device, theorems):
    """Codes of the values 1 and -1 times every float32 as the scale of a block: NF4, blocks of four, as any multiple of it."""
    steps = rounding_to(dtype)

    def decode(x: Tensor) -> Tensor:
        packed = torch.full_like(x, 0xF0F0 - 2**16, dtype=torch.int16)
        return fourbit.dequantize(packed, x, NF4, 4, (4 * x.numel(),), dtype)

    def want(start: int, stop: int) -> Tensor:
        values = (steps.part(start, stop), steps.part(start ^ SIGN, ((stop - 1) ^ SIGN) + 1))
        return torch.stack(2 * values, 1).view(-1)

    modes = [eagerly(decode), decode]
    prove(theorems, f"4 bits to {str(dtype)[6:]}: eager and compiled, one rounding", modes, want, device=device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_one_rounding_when_decoding_eight_bits(dtype: torch.dtype, device: torch.device, theorems):
    """Every float32 as the scale of a block of one, for the code of 1: the scale itself."""
    values = value_table(DYNAMIC, device)

    def decode(x: Tensor) -> Tensor:
        codes = torch.full_like(x[:, None], 255, dtype=torch.uint8)
        return blockwise.dequantize_blocks(codes, x, values, dtype=dtype).view(-1)

    want = patterns if dtype == F32 else rounding_to(dtype).part
    modes = [eagerly(decode), decode]
    prove(theorems, f"8 bits to {str(dtype)[6:]}: eager and compiled, one rounding", modes, want, device=device)


# ---- every number of sixteen bits: two inputs -----------------------------------------------------------------------


def significand(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive finite float32 as integers: m and e with the value m 2^e."""
    field = bits >> 23
    return np.where(field == 0, bits, (bits & 0x7FFFFF) | 0x800000), np.maximum(field, 1) - 150


def rounded_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The bits of the float32 nearest to a product, the even one of two, of positive float32 given by their bits.

    In integers: the product is m 2^e exactly, m below 2^48; what has to go are its lowest digits, down to 24, or to the
    unit of the smallest exponent, 2^-149.
    """
    (mx, ex), (my, ey) = significand(x), significand(y)
    m, e = mx * my, ex + ey
    length = np.frexp(m.astype(np.float64))[1]  # digits: m is below 2^53
    drop = np.clip(np.maximum(length - 24, -149 - e), 0, 60)
    kept, rest, half = m >> drop, m & ((1 << drop) - 1), (1 << drop) >> 1
    kept = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1) & (drop > 0))).astype(np.int64) * (drop > 0)
    e = e + drop
    # An exact product of fewer than 24 digits is given all of them, as far as the smallest exponent allows.
    up = np.clip(np.minimum(24 - np.frexp(kept.astype(np.float64))[1], e + 149), 0, 60)
    kept, e = kept << up, e - up
    bits = np.where(kept < 2**23, kept, ((e + 149) << 23) + kept)
    return np.where(kept == 0, 0, np.minimum(bits, INFINITY))


MANTISSAS = [0, 1, 2, 0x7FFFFF, 0x7FFFFE, 0x3504F3, 0x3504F4, 0x717594, 0x400000]
"""Of absmax: powers of two and the floats beside them, where 1 / absmax lies between floats of half the distance and where
its error is largest; sqrt 2, where x / absmax and x (1 / absmax) are both far from powers of two; 3.7727535."""


def scaled_codes(names: Sequence[str], words: np.ndarray, dtype: torch.dtype) -> int:
    """Every x of a 16-bit dtype no larger than absmax, beside each absmax: scaled in integers, then looked up by its bits."""
    books = {"nf4": NF4, "fp4": FP4, **EIGHT_BIT}
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    blocks, products, scales = [], [], []
    for word in words.tolist():
        absmax = torch.tensor([word], dtype=torch.int32).view(F32)
        x = every[every.abs() <= absmax]
        x = torch.nn.functional.pad(x, (0, -x.numel() % 63)).view(-1, 63)
        blocks.append(torch.cat([absmax.expand(len(x), 1), x], 1))
        scales.append(absmax.expand(len(x)))
        bits = blocks[-1].view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
        reciprocal = reciprocals(word >> 23)[word & 0x7FFFFF]
        products.append(rounded_product(bits & ~SIGN, np.full(bits.shape, reciprocal)) | (bits & SIGN))
    rows, product, want_scales = torch.cat(blocks), np.concatenate(products), torch.cat(scales)
    for name in names:
        steps = codes_of(name)
        want = steps.values[torch.from_numpy(np.searchsorted(steps.starts, product, side="right") - 1)]
        for context in (bnbref.eager, contextlib.nullcontext):
            with context():
                if name in EIGHT_BIT:
                    codes, absmax = blockwise.quantize(rows, books[name], 64)
                else:
                    packed, absmax = fourbit.quantize(rows, books[name], 64)
                    codes = torch.stack((packed >> 4, packed & 15), -1).view(rows.shape)
            assert torch.equal(codes, want), (name, difference(codes, want))
            assert torch.equal(absmax, want_scales)
    return rows.numel() * len(names)


NAMES = ("nf4", "fp4", *EIGHT_BIT)


def test_scaled_codes(theorems):
    """x * (1 / absmax) and its codes where scales begin, at 1, and where they end; the slow one has every exponent."""
    begun = time.perf_counter()
    exponents = np.array([1, 2, 126, 127, 253, 254], dtype=np.int64)
    words = (exponents[:, None] << 23 | np.array(MANTISSAS)).reshape(-1)
    tried = scaled_codes(("nf4", "dynamic_signed"), words, BF16)
    theorems.record("x (1 / absmax), counted: bfloat16 x, 54 absmax", tried, time.perf_counter() - begun)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_scaled_codes_of_every_exponent(dtype, theorems):
    begun = time.perf_counter()
    words = (np.arange(1, 255, dtype=np.int64)[:, None] << 23 | np.array(MANTISSAS)).reshape(-1)
    tried = 0
    title = f"x (1 / absmax), counted: {str(dtype)[6:]} x, {len(words)} absmax"
    with theorems.progress(title, len(words)) as bar:
        for part in np.array_split(words, 64):
            tried += scaled_codes(NAMES, part, dtype)
            bar.update(len(part))
    theorems.record(title, tried, time.perf_counter() - begun)


def signed_product(x: Tensor, y: Tensor) -> Tensor:
    """fl(x * y) of finite float32, in integers."""
    x, y = torch.broadcast_tensors(x, y)
    one, other = (t.contiguous().view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF for t in (x, y))
    bits = rounded_product(one & ~SIGN, other & ~SIGN) | ((one ^ other) & SIGN)
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 to a dtype, by its steps."""
    if dtype == F32:
        return x
    steps = rounding_to(dtype)
    bits = x.contiguous().view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    return steps.values[torch.from_numpy(np.searchsorted(steps.starts, bits, side="right") - 1)]


def every_scale(dtype: torch.dtype) -> Tensor:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return every[every.isfinite()]


def in_both_modes(call: Callable[[], Tensor], want: Tensor) -> None:
    for context in (bnbref.eager, contextlib.nullcontext):
        with context():
            got = call()
        assert same_bits(got, want), difference(got, want)


@pytest.mark.parametrize(("name", "dtype"), [("nf4", BF16), ("nf4", F32), ("fp4", F16)], ids=str)
def test_every_decoded_value_of_four_bits(name, dtype, theorems):
    """All codes times all scales of sixteen bits."""
    begun = time.perf_counter()
    values, book = torch.from_numpy(second.VALUES[name]), {"nf4": NF4, "fp4": FP4}[name]
    packed = torch.arange(0x01, 0x100, 0x22, dtype=torch.uint8).repeat(4)  # 01 23 .. ef
    for kind in (BF16, F16):
        scales = every_scale(kind)
        want = rounded_to(signed_product(values, scales[:, None]), dtype).repeat(1, 4)
        rows = packed.expand(len(scales), -1).contiguous()

        def call(rows=rows, scales=scales):
            return fourbit.dequantize_rows(rows, scales[:, None], blocksize=64, codebook=book, dtype=dtype)

        in_both_modes(call, want)
    theorems.record(
        f"{name} to {str(dtype)[6:]}: all codes, 16-bit scales", 2 * 16 * 2**16, time.perf_counter() - begun
    )


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_decoded_value_of_eight_bits(dtype, theorems):
    begun = time.perf_counter()
    table = value_table(DYNAMIC, CPU)
    scales = every_scale(BF16)[:: 1 if dtype == BF16 else 17]
    codes = torch.arange(256, dtype=torch.uint8).expand(len(scales), -1).contiguous()
    want = torch.cat([
        rounded_to(signed_product(torch.from_numpy(second.VALUES["dynamic_signed"]), part[:, None]), dtype)
        for part in scales.split(4096)
    ])  # fmt: skip
    in_both_modes(lambda: blockwise.dequantize_blocks(codes, scales, table, dtype=dtype), want)
    theorems.record(
        f"8 bits to {str(dtype)[6:]}: all codes, bfloat16 scales", want.numel(), time.perf_counter() - begun
    )


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_decoded_value_of_int8(dtype, theorems):
    """fl(fl(code * absmax) * RN(1 / 127)) for all codes and scales of sixteen bits, as far as the first product is finite."""
    begun = time.perf_counter()
    scales = every_scale(BF16)[:: 1 if dtype == BF16 else 17]
    scales = scales[scales.abs() < 2.0**120]
    codes = torch.arange(-128, 128).to(torch.int8).expand(len(scales), -1).contiguous()
    constant = torch.tensor(second.nearest_float32(Fraction(1, 127)))
    want = torch.cat([
        rounded_to(signed_product(signed_product(codes[:1].float(), part[:, None]), constant), dtype)
        for part in scales.split(4096)
    ])  # fmt: skip
    in_both_modes(lambda: int8.dequantize_int8_rows(codes, scales, dtype=dtype), want)
    theorems.record(f"int8 to {str(dtype)[6:]}: all codes, bfloat16 scales", want.numel(), time.perf_counter() - begun)


# ---- the expectations themselves ------------------------------------------------------------------------------------


def test_steps_are_the_functions_that_they_stand_for():
    """At random patterns, against numpy and the functions of `second.py` called element by element."""
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, dtype=np.uint64)
    x = bits.astype(np.uint32).view(np.float32)
    for name in ("nf4", "fp4", "af4", "int4", *EIGHT_BIT):
        steps = codes_of(name)
        got = [int(steps.part(int(word), int(word) + 1)[0]) for word in bits[:400]]
        assert got == second.encode(name, x[:400]).tolist(), name
    for dtype in (BF16, F16):
        assert same_bits(rounded_to(torch.from_numpy(x), dtype), second.rounded(x, dtype))
    pairs = [(Fraction(float(a)), Fraction(float(b))) for a, b in zip(x[:2000], x[2000:], strict=True)
             if np.isfinite(a) and np.isfinite(b)]  # fmt: skip
    small = [(a, b) for a, b in pairs if abs(a * b) < Fraction(2) ** 127]
    assert len(small) > 1000
    for a, b in small:
        got = signed_product(torch.tensor([float(a)]), torch.tensor([float(b)]))
        assert Fraction(float(got)) == Fraction(float(second.nearest_float32(a * b))), (a, b)
    for word in bits[:400] & np.uint64(0x7FFFFFFF):
        exponent, mantissa = int(word) >> 23, int(word) & 0x7FFFFF
        if 0 < exponent < 255 and exponent % 50 == 3:
            exact = 1 / Fraction(float(np.uint32(word).view(np.float32)))
            assert reciprocals(exponent)[mantissa] == int(second.nearest_float32(exact).view(np.uint32))


# ---- more than 2^31 elements ----------------------------------------------------------------------------------------


def available_gib() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


PERIOD = 64 * 257
BEYOND = -(-(2**31 + 1) // PERIOD) * PERIOD  # whole periods, more than 2^31 elements


def periodic(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One period of random floats, and more than 2^31 elements made of it."""
    period = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).to(dtype)
    return period, period.repeat(BEYOND // PERIOD)


def is_periodic(x: Tensor, period: Tensor) -> bool:
    """Every part of x is one period, in slices that a comparison can hold."""
    rows = x.reshape(-1, period.numel())
    return all(bool((part == period.view(1, -1)).all()) for part in rows.split(4096))


@pytest.mark.slow
def test_more_than_2_31_elements(theorems):
    """4 bits, 8 bits and int8, by the kernels that a small tensor compiled: no index type was chosen for the small one.

    A wrapped index of 32 bits would repeat or skip elements of a period that divides no power of 2.
    """
    if available_gib() < 12:
        pytest.skip(f"needs 12 GiB of free memory, has {available_gib():.0f}")
    started = time.perf_counter()
    period, x = periodic(torch.bfloat16)
    assert x.numel() > 2**31

    one, one_absmax = fourbit.quantize(period, NF4, 64)
    packed, absmax = fourbit.quantize(x, NF4, 64)
    assert is_periodic(packed, one)
    assert is_periodic(absmax, one_absmax)
    decoded = fourbit.dequantize(packed, absmax, NF4, 64, x.shape, torch.bfloat16)
    assert is_periodic(decoded, fourbit.dequantize(one, one_absmax, NF4, 64, period.shape, torch.bfloat16))
    del packed, absmax, decoded

    values = value_table(DYNAMIC, CPU)
    one, one_absmax = blockwise.quantize(period, DYNAMIC, 64)
    codes, absmax = blockwise.quantize(x, DYNAMIC, 64)
    assert is_periodic(codes, one)
    assert is_periodic(absmax, one_absmax)
    decoded = blockwise.dequantize(codes, absmax, values, 64, torch.bfloat16)
    assert is_periodic(decoded, blockwise.dequantize(one, one_absmax, values, 64, torch.bfloat16))
    del codes, absmax, decoded

    one, one_stats, _ = int8.quantize(period.view(-1, 257))
    rows, stats, _ = int8.quantize(x.view(-1, 257))
    assert is_periodic(rows, one.view(-1))
    assert is_periodic(stats, one_stats)
    theorems.record("tensors of more than 2^31 elements", x.numel(), time.perf_counter() - started)
