"""Sums, means and products of matrices: of tensors in one order, so that a case has the same bytes on every machine; of intervals
in any order.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.oracles.intervals import SMALLEST, UNIT, Interval, exact_where, least, most


def product(a: Any, b: Any) -> Any:
    """`a @ b` of two matrices, tensors or intervals.

    In any order a sum of k products is off by at most k + 1 unit roundoffs of the sum of their magnitudes. Allowed is twice that.
    """
    columns = (a.low if isinstance(a, Interval) else a).shape[-1]
    if isinstance(a, Tensor):
        return total([a[:, i, None] * b[None, i, :] for i in range(columns)])
    ends = [[x[:, i, None] * y[None, i, :] for x in (a.low, a.high) for y in (b.low, b.high)] for i in range(columns)]
    low, high = total([least(four) for four in ends]), total([most(four) for four in ends])
    size = total([most([x.abs() for x in four]) for four in ends])
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
    return exact_where(made.is_zero(), made, made.widened(SMALLEST, 2 * (n + 1) * UNIT))


def at_least(x: Any, least: float) -> Any:
    """The larger one of each number and that; exact."""
    return x.clamp(min=least) if isinstance(x, Tensor) else Interval(x.low.clamp(min=least), x.high.clamp(min=least))


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, one after the other."""
    return functools.reduce(operator.add, parts)
