"""Gradients of products, and a layer that evaluates before it trains."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from bnbref import int8
from bnbref.conformance.expected import Expected
from bnbref.conformance.oracles.sums import product_interval
from bnbref.conformance.oracles.values import weight


def int8_backward(a: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Expected]:
    """Rules IB; the bounds are derived there."""
    codes, absmax, _ = int8.quantize(weight)
    rows, inputs = int8.as_matrix(grad), int8.as_matrix(a)
    g, x = rows.double().abs(), inputs.double().abs()
    # For each column half a step of 127, and a little for its scale in float16.
    g_off, x_off = (t.amax(0) / 253 for t in (g, x))
    off = g_off[:, None] * x.sum(0) + g.sum(0)[:, None] * x_off + len(g) * g_off[:, None] * x_off
    exact = product_interval(rows.t(), inputs.t())
    return {
        "grad_a": product_interval(grad, int8.dequantize(codes, absmax, grad.dtype).t()),
        "grad_weight": replace(exact, low=exact.low - off, high=exact.high + off),
    }


def evaluate_then_train(
    x: Tensor, grad: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None = None, **rest: Any
) -> dict[str, Expected]:
    """Rules LE."""
    matrix = weight(packed, absmax, dtype=x.dtype, **rest)
    products = {"y": product_interval(x, matrix, bias), "grad_x": product_interval(grad, matrix.t())}
    return {**products, "packed": Expected(packed), "absmax": Expected(absmax)}
