"""Products of floats, forwards and backwards: what the rules allow them to be."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from bnbref import fourbit, int8
from bnbref.codebooks import four_bit
from bnbref.conformance.judging import UNIT, Expected


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T in float64, each element rounded once: a library's order of summation depends on CPU and threads."""
    rows, columns = a.double().reshape(-1, a.shape[-1]).tolist(), b.double().tolist()
    sums = [[math.fsum(map(operator.mul, row, column)) for column in columns] for row in rows]
    return torch.tensor(sums, dtype=torch.float64).view(*a.shape[:-1], b.shape[0])


def product_interval(a: Tensor, weight: Tensor, bias: Tensor | None) -> Expected:
    """a @ weight^T + bias within the bound of rule G4-1."""
    unit = UNIT[a.dtype]
    exact, size = exact_product(a, weight), exact_product(a.abs(), weight.abs())
    extra = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()
    y = exact + extra
    bound = (4.1 * unit + 2 * weight.shape[1] * 2.0**-24) * size + 2 * unit * (y.abs() + extra.abs())
    return Expected(y.to(a.dtype), low=y - bound, high=y + bound)


def _weight(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return fourbit.dequantize(packed, absmax, four_bit(quant_type), blocksize, shape, dtype)


def gemm_4bit(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> dict[str, Expected]:
    """Rules G4; the bound is derived there."""
    return {"y": product_interval(a, _weight(packed, absmax, blocksize, quant_type, shape, a.dtype), bias)}


def gemm_4bit_backward(
    grad: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int]
) -> dict[str, Expected]:
    """Rules GB."""
    weight = _weight(packed, absmax, blocksize, quant_type, shape, grad.dtype)
    return {"grad_a": product_interval(grad, weight.t(), None)}


def int8_backward(a: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Expected]:
    """Rules IB; the bounds are derived there."""
    codes, absmax, _ = int8.quantize(weight)
    found = {"grad_a": product_interval(grad, int8.dequantize(codes, absmax, grad.dtype).t(), None)}
    rows, inputs = int8.in_rows(grad), int8.in_rows(a)
    within = product_interval(rows.t(), inputs.t(), None)
    if within.low is None or within.high is None:
        raise ValueError("a product must have an interval")
    g, x = rows.double().abs(), inputs.double().abs()
    # Of each column half a step of 127, and a little for its scale in float16.
    g_off, x_off = (t.amax(0) / 253 for t in (g, x))
    off = g_off[:, None] * x.sum(0) + g.sum(0)[:, None] * x_off + len(g) * g_off[:, None] * x_off
    found["grad_weight"] = Expected(within.value, low=within.low - off, high=within.high + off)
    return found


def evaluate_then_train(
    x: Tensor, grad: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int, quant_type: str,
    shape: Sequence[int],
) -> dict[str, Expected]:  # fmt: skip
    """Rules LE."""
    weight = _weight(packed, absmax, blocksize, quant_type, shape, x.dtype)
    return {
        "y": product_interval(x, weight, bias),
        "grad_x": product_interval(grad, weight.t(), None),
        "packed": Expected(packed),
        "absmax": Expected(absmax),
    }
