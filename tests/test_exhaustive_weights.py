"""Proofs by exhaustion of 16-bit weights with a correction: every float32, and every pair of a bfloat16 and a correction.

The expectation is made of integers. A float32 without its sign has a place: the number of float32s between it and 0. On that
line every 2^16-th is a bfloat16, and every 2^13-th a float16, once numbers are multiplied by 2^-112. So a parameter and its
correction are a quotient and a remainder.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_exhaustive import BF16, F16, INFINITY, SIGN, Function, eagerly, forbidden, kernel, prove
from torch import Tensor

from bnbref.optim import master_weights

NAN = 0x7FC00000
PIECE = 2**16
SHIFT = {BF16: 16, F16: 13}
KINDS = [(BF16, torch.int16), (BF16, torch.int8), (F16, torch.int16), (F16, torch.int8)]


# ---- what is to come out --------------------------------------------------------------------------------------------


def multiplied(bits: np.ndarray, factor: float) -> np.ndarray:
    """The bits of float32s times a power of two, rounded once: the product in float64 is exact."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (bits.view(np.float32).astype(np.float64) * factor).astype(np.float32).view(np.int32)


def coarser(place: np.ndarray, digits: int) -> np.ndarray:
    """The nearest multiple of 2^digits, the even one of two."""
    count, rest, half = place >> digits, place & ((1 << digits) - 1), 1 << (digits - 1)
    return count + ((rest > half) | ((rest == half) & (count & 1 == 1))) << digits


def apart(place: np.ndarray, dtype: torch.dtype, digits: int, negative: bool) -> np.ndarray:
    """Parameter and correction as one integer, and the bits of what they stand for. digits: that a correction leaves out."""
    shift, infinity = SHIFT[dtype], {BF16: 0x7F80, F16: 0x7C00}[dtype]
    # The first place that is infinite: infinity's own, or that of 65,520, halfway from the largest float16 to what would follow.
    first = INFINITY if dtype == BF16 else (infinity << shift) - (1 << (shift - 1))
    kept = coarser(place, digits) if digits else place
    word = (kept + (1 << (shift - 1))) >> shift
    rest = (kept - (word << shift)) >> digits
    value = kept.copy() if dtype == BF16 else multiplied(kept, 2.0**112)
    if int(place.max()) >= first - 2**digits:
        for where, results in (kept >= first, (infinity, 0, INFINITY)), (place > INFINITY, (NAN >> 16, 0, NAN)):
            for x, result in zip((word, rest, value), results, strict=True):
                x[where] = result
    sign = (place <= INFINITY).astype(np.int32) * negative  # of NaN it is nothing
    return np.stack([(word | sign << 15) << 16 | rest & 0xFFFF, value | sign << 31])


def in_pieces(want: Callable[[np.ndarray, bool], np.ndarray]) -> Callable[[int, int], Tensor]:
    """What is wanted of patterns from start to stop, by what is wanted of some without their sign. A cache's worth at a time."""

    def every(start: int, stop: int) -> Tensor:
        bits = np.arange(start & ~SIGN, (start & ~SIGN) + stop - start, dtype=np.int32)
        pieces = [want(bits[first : first + PIECE], start >= SIGN) for first in range(0, len(bits), PIECE)]
        return torch.from_numpy(np.concatenate(pieces, 1))

    return every


# ---- what comes out -------------------------------------------------------------------------------------------------


def as_integer(p: Tensor, correction: Tensor) -> Tensor:
    """Parameter and correction; every NaN is one."""
    word = torch.where(p.isnan(), NAN >> 16, p.view(torch.int16).to(torch.int32))
    return word << 16 | correction.to(torch.int32) & 0xFFFF


def split_and_exact(dtype: torch.dtype, correction: torch.dtype) -> tuple[Function, Function]:
    """A float32 to the integer of its parameter and correction, and such integers to the bits of a float32."""

    def split(x: Tensor) -> Tensor:
        return as_integer(*master_weights.split(x, dtype, correction))

    def exact(x: Tensor) -> Tensor:
        value = master_weights.joined((x >> 16).to(torch.int16).view(dtype), x.to(torch.int16).to(correction))
        return torch.where(value.isnan(), NAN, value.view(torch.int32))

    return split, exact


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "correction"), KINDS, ids=str)
def test_every_float32_is_split(dtype, correction, theorems):
    digits = SHIFT[dtype] - 8 if correction == torch.int8 else 0

    def there_and_back(split: Function, exact: Function) -> Function:
        return lambda x: torch.stack([both := split(x), exact(both)])

    def want(bits: np.ndarray, negative: bool) -> np.ndarray:
        return apart(bits if dtype == BF16 else multiplied(bits, 2.0**-112), dtype, digits, negative)

    both = split_and_exact(dtype, correction)
    # Each is compiled alone: what lies between them is rounded, as it is in memory between two steps.
    modes = [there_and_back(*(kernel(forbidden, function) for function in both))]
    theorem = f"{str(dtype)[6:]} and {str(correction)[6:]} of a float32, and back: compiled"
    if (dtype, correction) == (BF16, torch.int16):
        modes.append(there_and_back(*map(eagerly, both)))
        theorem = theorem.replace("compiled", "eager and compiled")
    prove(theorems, theorem, modes, in_pieces(want))


@pytest.mark.slow
def test_every_bfloat16_with_every_correction_is_a_float32_of_its_own(theorems):
    """All 2^32 pairs: together they number the float32s, with no gap, and come back. Beside 0 none lies on its other side."""

    def back_and_there(split: Function, exact: Function) -> Function:
        return lambda x: torch.stack([split((bits := exact(x.view(torch.int32))).view(torch.float32)), bits])

    def want(bits: np.ndarray, negative: bool) -> np.ndarray:
        word, rest = bits >> 16, bits.astype(np.int16).astype(np.int32)
        place = np.where(word > 0x7F80, NAN, np.maximum((word << 16) + rest, 0)).astype(np.int32)
        found = apart(place, BF16, 0, negative)
        assert (((found[0] & ~-SIGN) == bits) | (word == 0) | (word >= 0x7F80)).all()
        return found

    compiled = back_and_there(*(kernel(forbidden, function) for function in split_and_exact(BF16, torch.int16)))
    prove(theorems, "a bfloat16 with any int16 is a float32 of its own", [compiled], in_pieces(want))
