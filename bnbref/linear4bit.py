"""The product with a 4-bit weight: dequantize to the activation's dtype, multiply, and the same again backwards.

    y = A @ W^T + bias,     W = T(fl(values[code] * absmax)),     T the dtype of A

The product is ATen's: float32 accumulation, the bias added before the one rounding to T. The dequantized weight lives
for the length of one product; the backward pass dequantizes anew. A single row on a CPU, what decoding a token needs,
is multiplied straight from the codes.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bnbref import fourbit, ordered
from bnbref.blockwise import check_device, reads_tables
from bnbref.codebooks import Codebook, value_table
from bnbref.fused import compile_enabled, fused, tracing
from bnbref.int8 import in_rows
from bnbref.lut16 import rounded, scaled16
from bnbref.quant_state import QuantState, present


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype: one rounding from the float32 product of value and scale.  Exact."""
    blocksize, shape = present(state.blocksize, "blocksize"), present(state.shape, "shape")
    return fourbit.dequantize(packed, state.scales(), state.codebook, blocksize, shape, dtype)


# ---- one row --------------------------------------------------------------------------------------------------------


def _fast_sum(*dtypes: torch.dtype | None, **constants: Any) -> dict[str, Any]:
    # The order of the sum is the compiler's anyway, so it may fuse: 0.52 ms instead of 0.76 for bfloat16.
    return {"cpp.enable_floating_point_contract_flag": "fast"}


def _wide_search(*dtypes: torch.dtype | None, **constants: Any) -> dict[str, Any]:
    return {
        "max_autotune_pointwise": True,
        "emulate_precision_casts": False,
    }  # more block sizes than Inductor would try


@fused(dynamic={"packed": (0,), "absmax": (0,), "bias": (0,)}, cpu=_fast_sum, gpu=_wide_search, exact=False)
def multiply_row(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    *,
    blocksize: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    """`[p, k/p]`; uint8 `[n, k/2]`; float32 `[n, blocks]`; `[n]` -> dtype `[n]`.  a[i, j] is column `p * j + i`.

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


def _multiply_by_words(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    table: Tensor | None,
    blocksize: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    """Eight codes a lane, for GPUs; p is 8."""
    words = rearrange(packed.view(torch.int32), "n (b w) -> n b w", w=blocksize // 8)
    scale = rearrange(absmax, "n b -> n b 1")
    columns = rearrange(a, "p (b w) -> p b w", w=blocksize // 8).float()

    def product(place: int) -> Tensor:
        codes = words >> (8 * (place // 2) + 4 * (1 - place % 2))
        weight = rounded(fourbit.decode_nibble(codes, table, codebook) * scale, dtype)
        return weight * columns[place]

    total = product(0)
    for place in range(1, 8):
        total = total + product(place)
    return total.sum((1, 2))


# A byte a lane, as in decoding; the rows of the weight in two halves, so that two sums are under way at a time: 0.50 ms
# for 4096 x 4096 in bfloat16 on an EPYC with two threads, where dequantizing and multiplying takes 3.
@multiply_row.formulation
def _(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    *,
    blocksize: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    if a.shape[0] == 8:
        y = _multiply_by_words(a, packed, absmax, table, blocksize, codebook, dtype)
    else:
        even, odd = rearrange(a.float(), "two (b s) -> two b s", s=blocksize // 2)
        n = packed.shape[0] // 2
        halves = []
        for rows, scales in ((packed[:n], absmax[:n]), (packed[n:], absmax[n:])):
            codes = rearrange(rows.to(torch.int32), "n (b s) -> n b s", s=blocksize // 2)
            scale = rearrange(scales, "n b -> n b 1")
            values = fourbit.sixteen(codebook)
            first, second = scaled16(codes >> 4, scale, values, dtype), scaled16(codes, scale, values, dtype)
            halves.append((first * even).sum((1, 2)) + (second * odd).sum((1, 2)))
        y = torch.cat(halves)
    return (y if bias is None else y + bias.float()).to(dtype)


def _is_row_for_kernel(a: Tensor, state: QuantState) -> bool:
    n, k = present(state.shape, "shape")
    blocksize = present(state.blocksize, "blocksize")
    return (
        a.numel() == a.shape[-1] == k
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
    table: Tensor | None = None
    if reads_tables(a.device):
        columns = a.reshape(k // 8, 8).t().contiguous()
        table = value_table(state.codebook, a.device)
        if codes.storage_offset() % 4 != 0:
            codes = codes.clone()  # the kernel reads words
    else:
        columns = a.float().view(k // 2, 2).t().contiguous()
    y = multiply_row(columns, codes, scales, bias, table, blocksize=blocksize, codebook=state.codebook, dtype=a.dtype)
    return y.view(*a.shape[:-1], n)


# ---- any rows -------------------------------------------------------------------------------------------------------


def _weight(packed: Tensor, state: QuantState, dtype: torch.dtype, k: int) -> Tensor:
    """The weight as `[n, k]`, also where `[k, n]` was quantized."""
    weight = dequantize(packed, state, dtype)
    return weight if weight.shape[1] == k else weight.t()


class _MatMul4Bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState, in_order: bool) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state, ctx.in_order, ctx.k = state, in_order, a.shape[-1]
        if in_order:
            if torch.is_autocast_enabled(a.device.type):
                a = a.to(torch.get_autocast_dtype(a.device.type))
            return _in_order(a, _weight(packed, state, a.dtype, ctx.k).t(), bias)
        return F.linear(a, _weight(packed, state, a.dtype, ctx.k), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        multiply = _in_order if ctx.in_order else torch.matmul
        grad_a = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = multiply(grad, _weight(packed, ctx.state, grad.dtype, ctx.k))
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
    under autocast in autocast's. A weight that was quantized as `[k, n]` is taken too, with a DeprecationWarning.
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
    if len(shape) != 2 or A.dim() < 1 or A.shape[-1] not in shape:
        raise ValueError(
            f"B must be a weight [n, k] with k the last size of A, got {tuple(shape)} and {tuple(A.shape)}"
        )
    if A.shape[-1] != shape[1] and not tracing():
        warnings.warn(
            f"the weight was quantized as [k, n], {list(shape)}, and is turned in every product: quantize it as [n, k]",
            DeprecationWarning,
            stacklevel=2,
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
