"""Products of floats: the exact sum, and the bound that a rule gives for any order of summation."""

import math
import operator
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.expected import UNIT, Expected
from bnbref.conformance.oracles.values import weight


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T in float64, each element rounded once: a library's order of summation depends on CPU and threads."""
    rows, columns = a.double().reshape(-1, a.shape[-1]).tolist(), b.double().tolist()
    sums = [[math.fsum(map(operator.mul, row, column)) for column in columns] for row in rows]
    return torch.tensor(sums, dtype=torch.float64).view(*a.shape[:-1], b.shape[0])


def product_interval(a: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Expected:
    """a @ matrix^T + bias within the bound of rule G4-1."""
    unit = UNIT[a.dtype]
    exact, size = exact_product(a, matrix), exact_product(a.abs(), matrix.abs())
    extra = torch.zeros(matrix.shape[0], dtype=torch.float64) if bias is None else bias.double()
    y = exact + extra
    bound = (4.1 * unit + 2 * matrix.shape[1] * 2.0**-24) * size + 2 * unit * (y.abs() + extra.abs())
    return Expected(y.to(a.dtype), low=y - bound, high=y + bound)


def gemm_4bit(
    a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None = None, **rest: Any
) -> dict[str, Expected]:
    """Rules G4; the bound is derived there."""
    return {"y": product_interval(a, weight(packed, absmax, dtype=a.dtype, **rest), bias)}


def gemm_4bit_backward(grad: Tensor, packed: Tensor, absmax: Tensor, **rest: Any) -> dict[str, Expected]:
    """Rules GB."""
    return {"grad_a": product_interval(grad, weight(packed, absmax, dtype=grad.dtype, **rest).t())}
