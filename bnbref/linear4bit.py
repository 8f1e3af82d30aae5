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

from bnbref import fourbit
from bnbref.blockwise import check_device
from bnbref.codebooks import Codebook
from bnbref.context import as_autocast, as_bytes, differentiated, own, plain, transforming, without_autocast
from bnbref.int8 import as_matrix
from bnbref.kernels import compile_enabled, fused, ordered, tracing
from bnbref.quant_state import QuantState, present

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
        a.numel() == a.shape[-1] == k
        and a.device.type in ("cpu", "cuda")
        and (k % blocksize, blocksize % 32, n % 2) == (0, 0, 0)
        and min(n, k) >= 4
        and compile_enabled()
        and not tracing()
    )


def _product_of_row(a: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    n, k = present(state.shape, "shape")
    blocksize = present(state.blocksize, "blocksize")
    codes = as_bytes(packed).view(n, k // 2)
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


def _weight(packed: Tensor, state: QuantState, dtype: torch.dtype, k: int) -> Tensor:
    """The weight as `[n, k]`, also where `[k, n]` was quantized."""
    weight = state.dequantize(packed, dtype)
    return weight if weight.shape[1] == k else weight.t()


def _product(a: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState, in_order: bool) -> Tensor:
    weight = _weight(packed, state, a.dtype, a.shape[-1])
    return own(_in_order(a, weight.t(), bias) if in_order else F.linear(a, weight, bias))


class _MatMul4Bit(torch.autograd.Function):
    """The codes are an attribute and not saved tensors: they have no gradient, and so may be tensors of inference mode."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState, in_order: bool) -> Tensor:
        ctx.packed, ctx.state, ctx.in_order, ctx.k = packed, state, in_order, a.shape[-1]
        return _product(a, packed, bias, state, in_order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        multiply = _in_order if ctx.in_order else torch.matmul
        grad_a = grad_bias = None
        with without_autocast(grad):
            if ctx.needs_input_grad[0]:
                grad_a = multiply(grad, _weight(ctx.packed, ctx.state, grad.dtype, ctx.k))
            if ctx.needs_input_grad[2]:
                rows = as_matrix(grad)
                grad_bias = multiply(rows.new_ones(1, len(rows)), rows)[0] if ctx.in_order else rows.sum(0)
        return grad_a, None, grad_bias, None, None


class _TransformedMatMul4Bit(torch.autograd.Function):
    """The same for `torch.func` and forward mode. Calling it costs more, and torch.compile would not trace it."""

    generate_vmap_rule = True
    forward = staticmethod(_product)
    backward = _MatMul4Bit.backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, ctx.packed, _, ctx.state, ctx.in_order = inputs
        ctx.k = a.shape[-1]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        a, _, bias, *_ = tangents
        if a is None:
            return bias
        y = _product(a, ctx.packed, None, ctx.state, ctx.in_order)
        return y if bias is None else y + bias


def _in_order(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., k] @ [k, n] + bias` in the fixed order, one rounding to the dtype of a."""
    return ordered.product(as_matrix(a), b, bias).view(*a.shape[:-1], b.shape[1])


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
    codes = plain(B)
    check_device("A", A, B=codes, bias=bias)
    A = as_autocast(A)
    if bias is not None:
        bias = bias.to(A.dtype)
    in_order = ordered.batch_invariant_enabled()
    with without_autocast(A):
        if differentiated(A, bias):
            function = _TransformedMatMul4Bit if transforming() else _MatMul4Bit
            result: Tensor = function.apply(A, codes, bias, quant_state, in_order)  # type: ignore[no-untyped-call]
        elif not in_order and _is_row_for_kernel(A, quant_state):
            result = _product_of_row(A.detach(), codes, quant_state, bias)
        else:
            result = _product(A, codes, bias, quant_state, in_order)
    return result if out is None else out.copy_(result)
