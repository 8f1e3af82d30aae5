"""Proofs by exhaustion: functions of one float32 on all 2^32 of them, and tensors of more than 2^31 elements.

Each prints one line when it is proven. `make proofs` runs them: minutes each, and the large tensors need 12 GiB.
"""

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import difference, same_bits
from torch import Tensor
from tqdm import tqdm

from bnbref import blockwise, fourbit, int8
from bnbref.blockwise import carry_table, count_below, count_by_carry
from bnbref.codebooks import AF4, DYNAMIC, DYNAMIC_UNSIGNED, FP4, INT4, NF4, Codebook, threshold_table, value_table
from bnbref.fused import Kernel

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ALL = 2**32
CHUNK = 2**24


def every_float32(name: str) -> Iterator[Tensor]:
    """All 2^32 of them, NaN with every payload too, in chunks."""
    for start in tqdm(range(-(2**31), 2**31, CHUNK), desc=name, unit_scale=CHUNK, unit=" floats", mininterval=5):
        yield torch.arange(start, start + CHUNK).to(torch.int32).view(torch.float32)


def prove(capsys: pytest.CaptureFixture[str], theorem: str, check: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """`check` gives two results that must have the same bits for every float32."""
    started, seen = time.perf_counter(), 0
    with capsys.disabled():
        for x in every_float32(theorem):
            got, want = check(x)
            assert same_bits(got, want), difference(got, want)
            seen += x.numel()
        assert seen == ALL
        print(f"\nproven for all {seen} float32 in {time.perf_counter() - started:.0f} s: {theorem}")


Function = Callable[[Tensor], Tensor]


def kernel(definition: Function, formulation: Function, cpu=None) -> Function:
    """A kernel of one argument, compiled by the one door; it is not registered."""
    made = Kernel(definition, {"x": (0,)}, cpu or (lambda *dtypes, **constants: {}), True)
    made.body = formulation
    return made


def plain_count(thresholds: tuple[float, ...], x: Tensor) -> Tensor:
    """One comparison a threshold."""
    count = torch.zeros_like(x, dtype=torch.int32)
    for threshold in thresholds:
        count += x > threshold
    return count


@pytest.mark.parametrize("book", [NF4, FP4, AF4, INT4], ids=lambda book: book.name)
def test_four_bit_encoder(book: Codebook, capsys):
    def definition(x: Tensor) -> Tensor:
        return fourbit.encode(x, book)

    def formulation(x: Tensor) -> Tensor:
        return fourbit._code_by_tree(x, book).to(torch.uint8)

    encode = kernel(definition, formulation, fourbit._encode_options)
    prove(capsys, f"the {book.name} decision tree, compiled, is its definition", lambda x: (encode(x), definition(x)))


@pytest.mark.parametrize("book", [DYNAMIC, DYNAMIC_UNSIGNED], ids=lambda book: book.name)
def test_eight_bit_encoder(book: Codebook, capsys):
    thresholds, carry = threshold_table(book, CPU), carry_table(book, CPU)
    assert carry.first_cell is not None

    def definition(x: Tensor) -> Tensor:
        return count_below(x, thresholds)

    def formulation(x: Tensor) -> Tensor:
        return count_by_carry(x, carry.entries, carry.first_cell)

    encode = kernel(definition, formulation, blockwise._encode_options)
    prove(capsys, f"the {book.name} carry table, compiled, is its definition", lambda x: (encode(x), definition(x)))


@pytest.mark.parametrize("book", [NF4, DYNAMIC, DYNAMIC_UNSIGNED], ids=lambda book: book.name)
def test_definition_is_a_count(book: Codebook, capsys):
    """torch.bucketize, which the definitions stand on, against one comparison a threshold, compiled as a loop."""
    table = threshold_table(book, CPU)
    count = kernel(lambda x: plain_count(book.thresholds, x), lambda x: plain_count(book.thresholds, x))
    prove(
        capsys,
        f"{book.name} codes are counts of thresholds strictly below",
        lambda x: (count_below(x, table), count(x)),
    )


def test_reciprocal(capsys):
    """1 / absmax, against the quotient in float64 rounded to float32 (innocuous: 53 >= 2 * 24 + 2 bits), 0 below 2^-126."""

    def definition(x: Tensor) -> Tensor:
        return blockwise.reciprocal(blockwise.magnitude(x))

    def in_float64(x: Tensor) -> Tensor:
        size = torch.where(x.isnan(), 0.0, x.abs())
        return torch.where(size >= 2.0**-126, (1 / size.double()).float(), 0.0)

    compiled = kernel(definition, definition)
    prove(capsys, "the reciprocal of absmax, compiled, is correctly rounded", lambda x: (compiled(x), in_float64(x)))
    prove(capsys, "the reciprocal of absmax, eager, is correctly rounded", lambda x: (definition(x), in_float64(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_rounding_when_decoding(dtype: torch.dtype, capsys):
    """Codes of the values 1 and -1 times every float32 as the scale of a block: NF4, blocks of two."""
    packed = torch.full((CHUNK // 8, 8), 0xF0, dtype=torch.uint8)

    def check(x: Tensor) -> tuple[Tensor, Tensor]:
        got = fourbit.dequantize_rows(packed, x.view(-1, 8), blocksize=2, codebook=NF4, dtype=dtype)
        return got, torch.stack((x, -x), dim=1).view(-1, 16).to(dtype)

    prove(capsys, f"decoding to {str(dtype)[6:]}, compiled, rounds once to nearest even", check)


@pytest.mark.parametrize("x", [DYNAMIC], ids=lambda book: book.name)
def test_eight_bit_decoder(x: Codebook, capsys):
    """Every float32 as the scale of a block of one, for the code of 1: the scale itself."""
    values = value_table(x, CPU)
    codes = torch.full((CHUNK, 1), 255, dtype=torch.uint8)

    def check(scales: Tensor) -> tuple[Tensor, Tensor]:
        return blockwise.dequantize_blocks(codes, scales, values, dtype=torch.bfloat16).view(-1), scales.bfloat16()

    prove(capsys, "decoding 8 bits to bfloat16, compiled, rounds once to nearest even", check)


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


def test_more_than_2_31_elements(capsys):
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
    with capsys.disabled():
        print(f"\n2^31 + {x.numel() - 2**31} elements in {time.perf_counter() - started:.0f} s")
