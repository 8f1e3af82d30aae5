"""Proofs by exhaustion of 16-bit weights with a correction: every float32, and every pair of a bfloat16 and a correction.

The expectation is made of integers. A float32 without its sign has a place: the number of float32s between it and 0. On that
line every 2^16-th is a bfloat16, and every 2^13-th a float16, once numbers are multiplied by 2^-112. So a parameter and its
correction are a quotient and a remainder.
"""

import numpy as np
import pytest
import torch
from test_exhaustive import BF16, F16, INFINITY, SIGN, eagerly, forbidden, kernel, prove
from torch import Tensor

from bnbref.optim import weights

NAN = 0x7FC00000
SHIFT = {BF16: 16, F16: 13}
KINDS = [(BF16, torch.int16), (BF16, torch.int8), (F16, torch.int16), (F16, torch.int8)]


# ---- what is to come out --------------------------------------------------------------------------------------------


def patterns_of(start: int, stop: int) -> np.ndarray:
    """Without the sign."""
    return np.arange(start & ~SIGN, (start & ~SIGN) + stop - start, dtype=np.int32)


def multiplied(bits: np.ndarray, factor: float) -> np.ndarray:
    """The bits of float32s times a number, rounded once: a product in float64 is exact where a factor is a power of two."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (bits.view(np.float32).astype(np.float64) * factor).astype(np.float32).view(np.int32)


def coarser(place: np.ndarray, digits: int) -> np.ndarray:
    """The nearest multiple of 2^digits, the even one of two."""
    count, rest, half = place >> digits, place & ((1 << digits) - 1), (1 << digits) >> 1
    return count + ((rest > half) | ((rest == half) & (count & 1 == 1) & (digits > 0))) << digits


def apart(place: np.ndarray, dtype: torch.dtype, digits: int, negative: bool) -> np.ndarray:
    """Parameter and correction as one integer, and the bits of what they stand for. digits: that a correction leaves out."""
    shift, infinity = SHIFT[dtype], {BF16: 0x7F80, F16: 0x7C00}[dtype]
    # The first place that is infinite: infinity's own, or that of 65,520, halfway from the largest float16 to what would follow.
    first = INFINITY if dtype == BF16 else (infinity << shift) - (1 << (shift - 1))
    kept = coarser(place, digits)
    word = (kept + (1 << (shift - 1))) >> shift
    rest = (kept - (word << shift)) >> digits
    value = kept.copy() if dtype == BF16 else multiplied(kept, 2.0**112)
    for where, results in (kept >= first, (infinity, 0, INFINITY)), (place > INFINITY, (NAN >> 16, 0, NAN)):
        for x, result in zip((word, rest, value), results, strict=True):
            x[where] = result
    sign = (place <= INFINITY) * negative  # of NaN it is nothing
    return np.stack([(word | sign << 15) << 16 | rest & 0xFFFF, value | sign * -SIGN])


# ---- what comes out -------------------------------------------------------------------------------------------------


def together(p: Tensor, correction: Tensor) -> Tensor:
    """Parameter and correction as one integer; every NaN is one."""
    word = torch.where(p.isnan(), NAN >> 16, p.view(torch.int16).to(torch.int32))
    return word << 16 | correction.to(torch.int32) & 0xFFFF


def bits_of(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), NAN, x.view(torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "correction"), KINDS, ids=str)
def test_every_float32_is_split(dtype, correction, theorems):
    digits = SHIFT[dtype] - 8 if correction == torch.int8 else 0

    def both(x: Tensor) -> Tensor:
        p, rest = weights.split(x, dtype, correction)
        return torch.stack([together(p, rest), bits_of(weights.exact(p, rest))])

    def want(start: int, stop: int) -> Tensor:
        bits = patterns_of(start, stop)
        place = bits if dtype == BF16 else multiplied(bits, 2.0**-112)
        return torch.from_numpy(apart(place, dtype, digits, start >= SIGN))

    names = f"{str(dtype)[6:]} and {str(correction)[6:]}"
    modes = [eagerly(both), kernel(forbidden, both)]
    prove(theorems, f"{names} of a float32, and back: eager and compiled", modes, want)


@pytest.mark.slow
def test_every_bfloat16_with_every_correction_is_a_float32_of_its_own(theorems):
    """All 2^32 pairs: together they number the float32s, with no gap, and come back. Beside 0 none lies on its other side."""

    def both(x: Tensor) -> Tensor:
        bits = x.view(torch.int32)
        p, rest = (bits >> 16).to(torch.int16).view(BF16), bits.to(torch.int16)
        value = weights.exact(p, rest)
        return torch.stack([together(*weights.split(value, BF16, torch.int16)), bits_of(value)])

    def want(start: int, stop: int) -> Tensor:
        bits = patterns_of(start, stop)
        word, rest = bits >> 16, bits.astype(np.int16).astype(np.int32)
        place = np.where(word > 0x7F80, NAN, np.maximum((word << 16) + rest, 0)).astype(np.int32)
        found = apart(place, BF16, 0, start >= SIGN)
        finite = (0 < word) & (word < 0x7F80)
        assert ((found[0] & 0x7FFFFFFF) == bits)[finite].all()
        return torch.from_numpy(found)

    modes = [eagerly(both), kernel(forbidden, both)]
    prove(theorems, "a bfloat16 with any int16 is a float32 of its own", modes, want)
