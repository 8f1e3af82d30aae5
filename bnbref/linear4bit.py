"""The product with a 4-bit weight: dequantize to the activation's dtype, multiply, and the same again backwards.

    y = A @ W^T + bias,     W = T(fl(values[code] * absmax)),     T the dtype of A

The product is ATen's: float32 accumulation, the bias added before the one rounding to T. The dequantized weight lives
for the length of one product; the backward pass dequantizes anew. A single row on a CPU, what decoding a token needs,
is multiplied straight from the codes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bnbref import fourbit
from bnbref.blockwise import check_device
from bnbref.codebooks import Codebook
from bnbref.int8 import in_rows
from bnbref.kernels import compile_enabled, fused, ordered, tracing
from bnbref.quant_state import QuantState, present


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype: one rounding from the float32 product of value and scale.  Exact."""
    blocksize, shape = present(state.blocksize, "blocksize"), present(state.shape, "shape")
    return fourbit.dequantize(packed, state.scales(), state.codebook, blocksize, shape, dtype)


# ---- one row --------------------------------------------------------------------------------------------------------


@fused(dynamic={"packed": (0,), "absmax": (0,), "bias": (0,)}, exact=False)
def multiply_row(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    *,
    blocksize: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    """A row of activations times a 4-bit weight, dtype `[n]`.

    a: the activations `[p, k/p]`, where `a[i, j]` is column `p * j + i`. packed: codes, uint8 `[n, k/2]`. absmax: scales,
    float32 `[n, blocks]`. bias: `[n]`.

    Bounded: the products with the weight in `dtype`, each exact or fused, summed in float32 in the compiler's order; with u
    = 2^-24 and v the unit roundoff of dtype, |y - exact| <= k u / (1 - k u) * sum |a w| + v |exact|.
    """
    weight = fourbit.dequantize_rows.definition(packed, absmax, blocksize=blocksize, codebook=codebook, dtype=dtype)
    first, *rest = rearrange(weight.float(), "n (k p) -> p n k", p=a.shape[0])
    columns = a.float()
    y = torch.mv(first, columns[0])
    for place, part in enumerate(rest, 1):
        y = y + torch.mv(part, columns[place])
    return (y if bias is None else y + bias.float()).to(dtype)


def _is_row_for_kernel(a: Tensor, state: QuantState) -> bool:
    n, k = present(state.shape, "shape")
    blocksize = present(state.blocksize, "blocksize")
    return (
        a.numel() == k
        and a.device.type in ("cpu", "cuda")
        and (k % blocksize, blocksize % 32, n % 2) == (0, 0, 0)
        and min(n, k) >= 4
        and compile_enabled()
        and not tracing()
        and not torch.is_autocast_enabled(a.device.type)
    )


def _product_of_row(a: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    n, k = present(state.shape, "shape")
    blocksize = present(state.blocksize, "blocksize")
    codes = packed.reshape(-1).view(torch.uint8).view(n, k // 2)
    scales = state.scales().view(n, k // blocksize)
    if a.device.type != "cpu":
        columns = a.reshape(k // 8, 8).t().contiguous()
        if codes.storage_offset() % 4 != 0:
            codes = codes.clone()  # the kernel reads words
    else:
        columns = a.float().view(k // 2, 2).t().contiguous()
    y = multiply_row(columns, codes, scales, bias, blocksize=blocksize, codebook=state.codebook, dtype=a.dtype)
    return y.view(*a.shape[:-1], n)


# ---- any rows -------------------------------------------------------------------------------------------------------


class _MatMul4Bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState, in_order: bool) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state, ctx.in_order = state, in_order
        if in_order:
            if torch.is_autocast_enabled(a.device.type):
                a = a.to(torch.get_autocast_dtype(a.device.type))
            return _in_order(a, dequantize(packed, state, a.dtype).t(), bias)
        return F.linear(a, dequantize(packed, state, a.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        multiply = _in_order if ctx.in_order else torch.matmul
        grad_a = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = multiply(grad, dequantize(packed, ctx.state, grad.dtype))
        if ctx.needs_input_grad[2]:
            rows = in_rows(grad)
            grad_bias = multiply(rows.new_ones(1, len(rows)), rows)[0] if ctx.in_order else rows.sum(0)
        return grad_a, None, grad_bias, None, None


def _in_order(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., k] @ [k, n] + bias` in the fixed order, one rounding to the dtype of a."""
    return ordered.product(in_rows(a), b, bias).view(*a.shape[:-1], b.shape[1])


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A @ W^T + bias` for a packed 4-bit weight, differentiable in A and bias.

    A `[..., k]`, B the packed weight, quant_state of shape `[n, k]`, bias `[n]`; returns `[..., n]` in A's dtype,
    under autocast in autocast's.
    Bounded: the weight is exact in A's dtype; the product is the device's, accumulated in float32, so that with u the unit
    roundoff of float32 and v that of the output dtype |y - exact| <= k u / (1 - k u) * sum |a w| + v |exact|.
    Inside `bnbref.batch_invariant()` exact: the order of the sum is written down.

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
    check_device("A", A, B=B, bias=bias)
    if bias is not None:
        bias = bias.to(A.dtype)
    needs_grad = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    result: Tensor
    in_order = ordered.batch_invariant_enabled()
    if not in_order and not needs_grad and _is_row_for_kernel(A, quant_state):
        result = _product_of_row(A.detach(), B.detach(), quant_state, bias)
    else:
        result = _MatMul4Bit.apply(A, B.detach(), bias, quant_state, in_order)  # type: ignore[no-untyped-call]
    return result if out is None else out.copy_(result)
