"""The product with a 4-bit weight: dequantize to the activation's dtype, multiply, and the same again backwards.

    y = A @ W^T + bias,     W = T(fl(values[code] * absmax)),     T the dtype of A

The product is ATen's: float32 accumulation, the bias added before the one rounding to T. The dequantized weight lives for
the length of one product; the backward pass dequantizes anew.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref import fourbit
from bnbref.quant_state import QuantState, present


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype: one rounding from the float32 product of value and scale.  Exact."""
    blocksize, shape = present(state.blocksize, "blocksize"), present(state.shape, "shape")
    return fourbit.dequantize(packed, state.scales(), state.codebook, blocksize, shape, dtype)


class _MatMul4Bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return F.linear(a, dequantize(packed, state, a.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        grad_a = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = grad @ dequantize(packed, ctx.state, grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        return grad_a, None, grad_bias, None


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A @ W^T + bias` for a packed 4-bit weight, differentiable in A and bias.

    A `[..., k]`, B the packed weight, quant_state of shape `[n, k]`, bias `[n]`; returns `[..., n]` in A's dtype.
    Bounded: the weight is exact in A's dtype; the product is the device's, accumulated in float32, so that with u the unit
    roundoff of float32 and v that of the output dtype |y - exact| <= k u / (1 - k u) * sum |a w| + v |exact|.

    >>> from bnbref.functional import quantize_4bit
    >>> packed, state = quantize_4bit(torch.eye(2), quant_type="nf4")
    >>> matmul_4bit(torch.tensor([[2.0, 3.0]]), packed, state)
    tensor([[2., 3.]])
    """
    if quant_state is None:
        raise ValueError("quant_state is required: it holds the scales and the shape of B")
    shape = present(quant_state.shape, "shape")
    if len(shape) != 2 or A.dim() < 1 or A.shape[-1] != shape[1]:
        raise ValueError(
            f"B must be a weight [n, k] with k the last size of A, got {tuple(shape)} and {tuple(A.shape)}"
        )
    if bias is not None:
        bias = bias.to(A.dtype)
    result: Tensor = _MatMul4Bit.apply(A, B.detach(), bias, quant_state)  # type: ignore[no-untyped-call]
    return result if out is None else out.copy_(result)
