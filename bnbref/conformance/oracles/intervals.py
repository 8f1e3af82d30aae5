"""Intervals that contain the result of a float32 formula in every order of its operations, fused or not.

The bounds are float64. After every operation they are widened by four unit roundoffs of float32, twice what this operation and
one more of a backend's own may lose; and by the smallest normal number, because a backend may flush subnormal numbers to zero.
A product by 0 or 1 and a sum with 0 are exact in any formulation, so their bounds are not widened: zero stays zero.

Sums in tensors have one order, that a case has the same bytes on every machine. In intervals they have any.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.expected import Expected

UNIT = 2.0**-24
"""Unit roundoff of float32."""

SLACK = 4 * UNIT
"""Relative: four unit roundoffs of float32."""

SMALLEST = 2.0**-126


@dataclass(frozen=True)
class Interval:
    """float64 bounds, low <= high, of every element."""

    low: Tensor
    high: Tensor

    @classmethod
    def point(cls, x: Tensor | float) -> "Interval":
        """Exactly x."""
        value = torch.as_tensor(x, dtype=torch.float64)
        return cls(value, value)

    @classmethod
    def near(cls, x: float, error: float) -> "Interval":
        """All numbers that are not farther from x than the error."""
        value = torch.tensor(x, dtype=torch.float64)
        return cls(value - error, value + error)

    @classmethod
    def within(cls, expected: Expected) -> "Interval":
        """All that is allowed of a result that has bounds."""
        if expected.low is None or expected.high is None:
            raise ValueError(f"a result must have bounds, got one that is {expected.grade}")
        return cls(expected.low, expected.high)

    @property
    def middle(self) -> Tensor:
        """The number between both ends."""
        return (self.low + self.high) / 2

    def __add__(self, other: "Interval") -> "Interval":
        total = Interval(self.low + other.low, self.high + other.high)
        return _exact_where(self.is_zero() | other.is_zero(), total, total.widened(0.0))

    def __sub__(self, other: "Interval") -> "Interval":
        return self + Interval(-other.high, -other.low)

    def __mul__(self, other: "Interval") -> "Interval":
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        product = Interval(_least(ends), _most(ends))
        exact = self.is_zero() | other.is_zero() | self.is_one() | other.is_one()
        return _exact_where(exact, product, product.widened(SMALLEST))

    def __truediv__(self, other: "Interval") -> "Interval":
        ends = [a / b for a in (self.low, self.high) for b in (other.low, other.high)]
        quotient = Interval(_least(ends), _most(ends))
        return _exact_where(self.is_zero() | other.is_one(), quotient, quotient.widened(SMALLEST))

    def sqrt(self) -> "Interval":
        """The square root; negative bounds count as 0."""
        root = Interval(self.low.clamp(min=0).sqrt(), self.high.clamp(min=0).sqrt())
        return _exact_where(self.is_zero(), root, root.widened(0.0))

    def sign(self) -> "Interval":
        """-1, 0 or 1; several of them where the interval contains zero."""
        return Interval(self.low.sign(), self.high.sign())

    def __getitem__(self, index: Any) -> "Interval":
        return Interval(self.low[index], self.high[index])

    @property
    def mT(self) -> "Interval":
        """The transpose."""
        return Interval(self.low.mT, self.high.mT)

    def abs(self) -> "Interval":
        """Magnitude."""
        largest = torch.maximum(self.low.abs(), self.high.abs())
        return Interval(torch.maximum(self.low, -self.high).clamp(min=0) + 0.0, largest)

    def is_zero(self) -> Tensor:
        """Where both bounds are 0."""
        return (self.low == 0) & (self.high == 0)

    def is_one(self) -> Tensor:
        """Where both bounds are 1."""
        return (self.low == 1) & (self.high == 1)

    def widened(self, absolute: float | Tensor, relative: float = SLACK) -> "Interval":
        """The interval with both of its ends moved outwards, by an absolute and a relative amount."""
        return Interval(
            self.low - relative * self.low.abs() - absolute, self.high + relative * self.high.abs() + absolute
        )


def product(a: Any, b: Any) -> Any:
    """`a @ b` of two matrices, tensors or intervals.

    In any order a sum of k products is off by at most k + 1 unit roundoffs of the sum of their magnitudes. Allowed is twice that.
    """
    columns = (a.low if isinstance(a, Interval) else a).shape[-1]
    if isinstance(a, Tensor):
        return total([a[:, i, None] * b[None, i, :] for i in range(columns)])
    ends = [[x[:, i, None] * y[None, i, :] for x in (a.low, a.high) for y in (b.low, b.high)] for i in range(columns)]
    low, high = total([_least(four) for four in ends]), total([_most(four) for four in ends])
    size = total([_most([x.abs() for x in four]) for four in ends])
    off = 2 * (columns + 1) * UNIT * size + torch.where(size > 0, SMALLEST, 0.0)
    return Interval(low - off, high + off)


def mean(x: Any, dim: int | None = None) -> Any:
    """The mean of numbers that are not negative, along a dimension or of all.

    Intervals are widened by twice what a sum of n numbers is off by, whatever its order.
    """
    if isinstance(x, Tensor):
        parts = x.reshape(-1).unbind() if dim is None else x.unbind(dim)
        return total(parts) / len(parts)
    n = x.low.numel() if dim is None else x.low.shape[dim]
    made = Interval(mean(x.low, dim), mean(x.high, dim))
    return _exact_where(made.is_zero(), made, made.widened(SMALLEST, 2 * (n + 1) * UNIT))


def at_least(x: Any, least: float) -> Any:
    """The larger one of each number and that; exact."""
    return x.clamp(min=least) if isinstance(x, Tensor) else Interval(x.low.clamp(min=least), x.high.clamp(min=least))


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, one after the other."""
    return functools.reduce(operator.add, parts)


def _least(ends: list[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*ends)).amin(0)


def _most(ends: list[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*ends)).amax(0)


def _exact_where(exact: Tensor, narrow: Interval, wide: Interval) -> Interval:
    return Interval(torch.where(exact, narrow.low, wide.low), torch.where(exact, narrow.high, wide.high))
