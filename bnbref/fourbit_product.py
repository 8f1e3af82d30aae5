"""The product of activations and a 4-bit weight, and its derivative, for `bnbref.products`.

y = a @ W~^T + b                W~ decoded from its codes for the length of one product            QLoRA (2305.14314)
grad_a = grad @ W~              grad_b = the sum of the rows of grad
"""

from typing import Any

import torch
from torch import Tensor

from bnbref.context import not_a_view, without_autocast
from bnbref.int8 import as_matrix
from bnbref.kernels import ordered
from bnbref.packed_weight import PackedWeight, Product
from bnbref.quant_state import QuantState


def product_4bit(a: Tensor, weight: PackedWeight, bias: Tensor | None, in_order: bool) -> Tensor:
    """`a @ W^T + bias` without a gradient. in_order: whether the sum is in the fixed order."""
    if not in_order:
        return weight.multiply(a, bias)
    return not_a_view(multiply_in_order(a, _as_n_k(weight.decoded(a.dtype), a.shape[-1]).t(), bias))


def _as_n_k(weight: Tensor, k: int) -> Tensor:
    """The weight as `[n, k]`, also where `[k, n]` was quantized."""
    return weight if weight.shape[1] == k else weight.t()


def multiply_in_order(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., k] @ [k, n] + bias` in the fixed order, one rounding to the dtype of a."""
    return ordered.product(as_matrix(a), b, bias).view(*a.shape[:-1], b.shape[1])


def gradients_4bit(
    grad: Tensor, weight: Tensor | None, k: int, in_order: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a and of the bias. weight: in the dtype of grad, None if that of a is not asked for."""
    multiply = multiply_in_order if in_order else torch.matmul
    grad_a = grad_bias = None
    with without_autocast(grad):
        if weight is not None:
            grad_a = multiply(grad, _as_n_k(weight, k))
        if needs_bias:
            rows = as_matrix(grad)
            grad_bias = multiply(rows.new_ones(1, rows.shape[0]), rows)[0] if in_order else rows.sum(0)
    return grad_a, grad_bias


class MatMul4Bit(torch.autograd.Function):
    """The codes are an attribute and not saved tensors: they have no gradient, and so may be tensors of inference mode."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: PackedWeight, bias: Tensor | None, in_order: bool, product: Product | None = None
    ) -> Tensor:
        ctx.weight, ctx.in_order, ctx.k = weight, in_order, a.shape[-1]
        return product_4bit(a, weight, bias, in_order) if product is None else product(a, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needs_a, _, needs_bias, *_ = ctx.needs_input_grad
        weight = ctx.weight.decoded(grad.dtype) if needs_a else None
        grad_a, grad_bias = gradients_4bit(grad, weight, ctx.k, ctx.in_order, needs_bias)
        return grad_a, None, grad_bias, None, None


class TransformedMatMul4Bit(torch.autograd.Function):
    """The same for `torch.func` and forward mode. Calling it costs more, and torch.compile would not trace it.

    The codes are an argument of their own, because torch.func unwraps the tensors among the arguments.
    """

    generate_vmap_rule = True
    backward = MatMul4Bit.backward

    @staticmethod
    def forward(a: Tensor, codes: Tensor, bias: Tensor | None, state: QuantState, in_order: bool) -> Tensor:
        return product_4bit(a, PackedWeight(codes, state), bias, in_order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, codes, _, state, ctx.in_order = inputs
        ctx.weight, ctx.k = PackedWeight(codes, state), a.shape[-1]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        a, _, bias, *_ = tangents
        if a is None:
            return bias
        y = product_4bit(a, ctx.weight, None, ctx.in_order)
        return y if bias is None else y + bias
