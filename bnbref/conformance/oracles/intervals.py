"""Intervals that contain the result of a float32 formula in every order of its operations, fused or not.

The bounds are float64. After every operation they are widened by four unit roundoffs of float32, twice what this operation and
one more of a backend's own may lose; and by the smallest normal number, because a backend may flush subnormal numbers to zero.
A product by 0 or 1 and a sum with 0 are exact in any formulation, so their bounds are not widened: zero stays zero.
"""

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
        return exact_where(self.is_zero() | other.is_zero(), total, total.widened(0.0))

    def __sub__(self, other: "Interval") -> "Interval":
        return self + Interval(-other.high, -other.low)

    def __mul__(self, other: "Interval") -> "Interval":
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        product = Interval(least(ends), most(ends))
        exact = self.is_zero() | other.is_zero() | self.is_one() | other.is_one()
        return exact_where(exact, product, product.widened(SMALLEST))

    def __truediv__(self, other: "Interval") -> "Interval":
        ends = [a / b for a in (self.low, self.high) for b in (other.low, other.high)]
        quotient = Interval(least(ends), most(ends))
        return exact_where(self.is_zero() | other.is_one(), quotient, quotient.widened(SMALLEST))

    def sqrt(self) -> "Interval":
        """The square root; negative bounds count as 0."""
        root = Interval(self.low.clamp(min=0).sqrt(), self.high.clamp(min=0).sqrt())
        return exact_where(self.is_zero(), root, root.widened(0.0))

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


def least(ends: list[Tensor]) -> Tensor:
    """The least of several tensors, element by element."""
    return torch.stack(torch.broadcast_tensors(*ends)).amin(0)


def most(ends: list[Tensor]) -> Tensor:
    """The largest of several tensors, element by element."""
    return torch.stack(torch.broadcast_tensors(*ends)).amax(0)


def exact_where(exact: Tensor, narrow: Interval, wide: Interval) -> Interval:
    """Narrow bounds for the elements that are exact, wide ones for the others."""
    return Interval(torch.where(exact, narrow.low, wide.low), torch.where(exact, narrow.high, wide.high))
