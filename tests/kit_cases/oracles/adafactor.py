"""Steps of Adafactor. The formula is written once, for float64 tensors and for intervals; in the latter it is whatever another
order of its operations makes of it in float32.

In the formulas h has, by their names, tensors and numbers: both of one kind.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.expected import Expected
from bnbref.conformance.oracles.formula import number, rest
from bnbref.conformance.oracles.intervals import Interval
from kit_cases.oracles.matrices import at_least, mean

Numbers = Mapping[str, tuple[float, float]]
"""Numbers of a step, and by how much each may be off."""


def within(
    formula: Callable[[Any], dict[str, Any]], tensors: Mapping[str, Tensor | Interval], numbers: Numbers
) -> dict[str, Expected]:
    """The results of a formula by name: float32, between the bounds of any order of its operations."""
    single = {name: torch.tensor(x, dtype=torch.float64) for name, (x, _) in numbers.items()}
    wide: dict[str, Any] = {name: Interval.near(x, off) for name, (x, off) in numbers.items()}
    intervals = {name: x if isinstance(x, Interval) else Interval.point(x) for name, x in tensors.items()}
    exact = formula(SimpleNamespace(**single, **{name: x.middle for name, x in intervals.items()}))
    bounds = formula(SimpleNamespace(**wide, **intervals))
    return {name: Expected(x.float(), low=bounds[name].low, high=bounds[name].high) for name, x in exact.items()}


def average(name: str, beta: float) -> dict[str, tuple[float, float]]:
    """The two numbers of a running average, by names that `Formula` has too."""
    return {name: number(beta), f"not_{name}": rest(beta)}


def adafactor(
    p: Tensor, g: Tensor, row: Tensor, column: Tensor, step: int, lr: float, beta2_decay: float, eps1: float, eps2: float,
    d: float, weight_decay: float,
) -> dict[str, Expected]:  # fmt: skip
    """Rules AF."""
    numbers = {"not_b": number(step**beta2_decay), "rate": number(min(lr, 1 / math.sqrt(step))), "d": number(d)}
    numbers |= {"decay": number(1 - lr * weight_decay)}

    def formula(h: Any) -> dict[str, Any]:
        squares = h.g * h.g
        new_row = h.row + h.not_b * (mean(squares, 1) - h.row)
        new_column = h.column + h.not_b * (mean(squares, 0) - h.column)
        v = new_row[:, None] * new_column[None, :] / at_least(mean(new_row), eps1)
        u = h.g / at_least(v.sqrt(), eps1)
        size, length = at_least(mean(h.p * h.p).sqrt(), eps2), mean(u * u).sqrt()
        rate = h.rate * size
        return {"p": h.decay * h.p - rate / at_least(length / h.d, 1.0) * u, "row": new_row, "column": new_column}

    return within(formula, {"p": p, "g": g, "row": row, "column": column}, numbers)
