"""The results that the rules allow, and which elements of a given result they do not allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Unit roundoff: half the distance of 1 to the next number."""


class Also(NamedTuple):
    """Further values that are allowed: flat indices int64 `[m]` and, of the dtype of the result, values `[m]`."""

    where: Tensor
    value: Tensor


def also(want: Tensor, others: Sequence[Tensor]) -> Also | None:
    """The elements in which the others differ from `want`; None where they do not.

    >>> also(torch.tensor([1, 2]), [torch.tensor([1, 3])])
    Also(where=tensor([1]), value=tensor([3]))
    """
    want = want.reshape(-1)
    flat = [other.reshape(-1) for other in others]
    pairs = sorted({(i, other[i].item()) for other in flat for i in (other != want).nonzero().view(-1).tolist()})
    if not pairs:
        return None
    return Also(torch.tensor([i for i, _ in pairs]), torch.tensor([v for _, v in pairs], dtype=want.dtype))


def where_true(mask: Tensor) -> Tensor | None:
    """The flat indices of what is true; None where nothing is."""
    return mask.nonzero().view(-1) if bool(mask.any()) else None


@dataclass(frozen=True)
class Expected:
    """The values that the rules allow one result to have.

    value: what it is, bit for bit but for the sign of zero and the bits of NaN. ulp: by how many representable numbers it may be
    off. also: further values of some elements. free: flat indices of elements that may be anything. pairs: flat indices `[2, m]`
    of elements that must be equal to each other. low, high: float64 bounds, where an interval is allowed instead of a value.
    """

    value: Tensor
    ulp: int = 0
    also: Also | None = None
    free: Tensor | None = None
    pairs: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def grade(self) -> str:
        """How strict this is: exact, one-of, ulp(n), interval or structural."""
        if self.low is not None:
            return "interval"
        if self.free is not None and self.free.numel() == self.value.numel() > 0:
            return "structural"
        if self.ulp:
            return f"ulp({self.ulp})"
        return "one-of" if self.also is not None or self.free is not None else "exact"


_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""The dtypes whose subnormal numbers a process may flush to zero, each with the integers of its bits."""


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype are equal: NaN is NaN, and zero is zero whatever its sign.

    >>> same(torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([-0.0, float("nan"), 2.0]))
    tensor([ True,  True, False])
    """
    nan = (a != a) & (b != b)
    if a.dtype not in _BITS or a.dtype != b.dtype:
        return (a == b) | nan
    # By bits: in a process that flushes subnormal floats to zero, they equal zero.
    first, second = (x.contiguous().view(_BITS[a.dtype]) for x in (a, b))
    zeros = ((first | second) & torch.iinfo(_BITS[a.dtype]).max) == 0
    return (first == second) | zeros | nan


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers apart two floating-point tensors of one dtype are, int64; 0 for NaN and NaN.

    >>> ulps_apart(torch.tensor([1.0, -0.0]), torch.tensor([1.0000001, 1e-45])).tolist()
    [1, 1]
    """
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    sign = torch.iinfo(kind).min

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(kind).long()
        return torch.where(bits < 0, sign - bits, bits)

    distance = (ordered(a) - ordered(b)).abs()
    nan = (a != a) | (b != b)
    return torch.where(nan, torch.where((a != a) & (b != b), 0, 2**31), distance)


def wrong_elements(got: Tensor, expected: Expected) -> Tensor:
    """Flat indices of the elements that the rules do not allow. The shapes and dtypes are equal."""
    flat, want = got.reshape(-1), expected.value.reshape(-1)
    if expected.low is not None and expected.high is not None:
        ok = (flat.double() >= expected.low.reshape(-1)) & (flat.double() <= expected.high.reshape(-1))
    else:
        ok = ulps_apart(flat, want) <= expected.ulp if expected.ulp else same(flat, want)
    if expected.also is not None:
        where, value = expected.also
        ok[where[same(flat[where], value)]] = True
    if expected.free is not None:
        ok[expected.free] = True
    if expected.pairs is not None:
        first, second = expected.pairs
        ok[second[~same(flat[first], flat[second])]] = False
    return (~ok).nonzero().view(-1)
