"""The product of LLM.int8() and its derivative, for `bnbref.products`.

y = T( int8 part + b + outlier part )                                                             LLM.int8() (2208.07339)

int8 part      rows of a times rows of the weight as an exact int32 product, scaled back in float32
outlier part   the columns of a that hold a magnitude >= threshold, times the weight's columns, in the dtype of a

grad_a = grad @ W~, W~ decoded in the dtype of grad        grad_w = grad^T @ a        grad_b = the sum of the rows of grad
"""

from typing import Any

import torch
from torch import Tensor

from bnbref import few_rows, int8
from bnbref.context import not_a_view, without_autocast
from bnbref.int8 import as_matrix
from bnbref.kernels import tracing


def _outlier_product(a: Tensor, columns: Tensor, codes: Tensor, absmax: Tensor, gather: bool) -> Tensor | None:
    if not gather or tracing() or a.device.type == "meta":
        return torch.where(columns, a, 0) @ int8.dequantize(codes, absmax, a.dtype).t()
    index = columns.nonzero().view(-1)
    if index.numel() == 0:
        return None
    return a[:, index] @ int8.dequantize(codes[:, index].contiguous(), absmax, a.dtype).t()


def product_8bit(
    a: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, gather: bool = True
) -> Tensor:
    """`A @ W^T + bias` for `A [..., k]` and an int8 weight `[n, k]` with absmax `[n]`: see the head of this file.

    gather: whether outlier columns are counted and gathered, which waits for a GPU; if not, the others are set to zero.
    """
    rows = as_matrix(a)
    q, row_absmax, columns = int8.quantize(rows, threshold, propagate_nan=True)
    if few_rows.is_row_of_int8(rows, codes):
        arguments = (q, row_absmax, codes, absmax, bias)
        if columns is None:
            y = few_rows.multiply_int8_row(*arguments, dtype=a.dtype)
        else:
            y = few_rows.multiply_int8_row_and_outliers(*arguments, rows.detach(), columns, dtype=a.dtype)
    else:
        with without_autocast(a):
            outliers = None if columns is None else _outlier_product(rows, columns, codes, absmax, gather)
        y = int8.dequantize_int8_product(int8.multiply(q, codes), row_absmax, absmax, bias, outliers, dtype=a.dtype)
    return not_a_view(y.view(*a.shape[:-1], codes.shape[0]))


def gradients_8bit(ctx: Any, grad: Tensor, a: Tensor | None, decoded: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments (a, weight, codes, absmax, bias, threshold), by what the context says of them.

    a: None if the weight has no gradient. decoded: the weight in the dtype of grad, None if that of a is not asked for.
    """
    _, needs_weight, _, _, needs_bias, *_ = ctx.needs_input_grad
    rows = as_matrix(grad)
    with without_autocast(grad):
        grad_a = None if decoded is None else grad @ decoded
        grad_weight = rows.t() @ as_matrix(a) if needs_weight and a is not None else None
        grad_bias = rows.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
    return grad_a, grad_weight, None, None, grad_bias, None


class MatMul8bit(torch.autograd.Function):
    """A float weight may be given beside its codes: it then receives the gradient that the float product would give it.

    The codes are attributes and not saved tensors: they have no gradient, and so may be tensors of inference mode.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor | None, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        _save_for_backward(ctx, a, weight, codes, absmax, bias)
        return product_8bit(a, codes, absmax, bias, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (a,) = ctx.saved_tensors
        decoded = int8.dequantize(ctx.codes, ctx.absmax, grad.dtype) if ctx.needs_input_grad[0] else None
        return gradients_8bit(ctx, grad, a, decoded)


def _save_for_backward(
    ctx: Any, a: Tensor, weight: Tensor | None, codes: Tensor, absmax: Tensor, bias: Tensor | None
) -> None:
    ctx.codes, ctx.absmax = codes, absmax
    ctx.save_for_backward(a if weight is not None and weight.requires_grad else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


class TransformedMatMul8bit(torch.autograd.Function):
    """The same for `torch.func` and forward mode. Calling it costs more, and torch.compile would not trace it."""

    generate_vmap_rule = True
    backward = MatMul8bit.backward

    @staticmethod
    def forward(
        a: Tensor, weight: Tensor | None, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        return product_8bit(a, codes, absmax, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_for_backward(ctx, *inputs[:5])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        a, weight, _, _, bias, _ = tangents
        y = None if a is None else a @ int8.dequantize(ctx.codes, ctx.absmax, a.dtype).t()
        if weight is not None:
            by_weight = ctx.saved_tensors[0] @ weight.t()
            y = by_weight if y is None else y + by_weight
        return y if bias is None else bias if y is None else y + bias
