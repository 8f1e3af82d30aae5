"""The LLM.int8() product with a linear layer's weight, forwards and backwards.

    y = T( int8 part + bias + outlier part )

    int8 part      rows of A times rows of the weight as an exact int32 product, scaled back in float32
    outlier part   the columns of A that hold a magnitude >= threshold, times the weight's columns, in the dtype of A

Source: LLM.int8() (2208.07339), section 3. The outlier split is written with static shapes: A with all but its outlier
columns masked to zero. Outside of a graph the columns are gathered, which adds up the same products.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref import int8
from bnbref.blockwise import check_device
from bnbref.context import differentiated, own, plain, transforming, without_autocast
from bnbref.kernels import tracing


@dataclass
class MatmulLtState:
    """What an int8 layer keeps: the weight's codes CB `[n, k]` and row absmax SCB `[n]`, and how to multiply."""

    CB: Tensor | None = None
    SCB: Tensor | None = None
    CxB: Tensor | None = None
    threshold: float = 0.0
    has_fp16_weights: bool = True
    is_training: bool = True
    use_pool: bool = False
    idx: Tensor | None = None

    def reset_grads(self) -> None:
        """Forget the quantized weight."""
        self.CB = self.SCB = None


def _outlier_product(a: Tensor, columns: Tensor, codes: Tensor, absmax: Tensor) -> Tensor | None:
    if tracing() or a.device.type == "meta":
        return torch.where(columns, a, 0) @ int8.dequantize(codes, absmax, a.dtype).t()
    index = columns.nonzero().view(-1)
    if index.numel() == 0:
        return None
    return a[:, index] @ int8.dequantize(codes[:, index].contiguous(), absmax, a.dtype).t()


def product(a: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """`A @ W^T + bias` for `A [..., k]` and an int8 weight `[n, k]` with absmax `[n]`: see the head of this file."""
    rows = int8.as_matrix(a)
    q, row_absmax, columns = int8.quantize(rows, threshold)
    with without_autocast(a):
        outliers = None if columns is None else _outlier_product(rows, columns, codes, absmax)
    y = int8.dequantize_int8_product(int8.multiply(q, codes), row_absmax, absmax, bias, outliers, dtype=a.dtype)
    return own(y.view(*a.shape[:-1], codes.shape[0]))


class _MatMul8bit(torch.autograd.Function):
    """A float weight may be given beside its codes: it then receives the gradient that the float product would give it.

    The codes are attributes and not saved tensors: they have no gradient, and so may be tensors of inference mode.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor | None, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        _keep(ctx, a, weight, codes, absmax, bias)
        return product(a, codes, absmax, bias, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (a,) = ctx.saved_tensors
        grad_a = grad_weight = grad_bias = None
        rows = int8.as_matrix(grad)
        with without_autocast(grad):
            if ctx.needs_input_grad[0]:
                grad_a = grad @ int8.dequantize(ctx.codes, ctx.absmax, grad.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = rows.t() @ int8.as_matrix(a)
            if ctx.needs_input_grad[4]:
                grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_a, grad_weight, None, None, grad_bias, None


def _keep(ctx: Any, a: Tensor, weight: Tensor | None, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
    ctx.codes, ctx.absmax = codes, absmax
    ctx.save_for_backward(a if weight is not None and weight.requires_grad else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


class _TransformedMatMul8bit(torch.autograd.Function):
    """The same for `torch.func` and forward mode. Calling it costs more, and torch.compile would not trace it."""

    generate_vmap_rule = True
    backward = _MatMul8bit.backward

    @staticmethod
    def forward(
        a: Tensor, weight: Tensor | None, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        return product(a, codes, absmax, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs[:5])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        a, weight, _, _, bias, _ = tangents
        y = None if a is None else a @ int8.dequantize(ctx.codes, ctx.absmax, a.dtype).t()
        if weight is not None:
            by_weight = ctx.saved_tensors[0] @ weight.t()
            y = by_weight if y is None else y + by_weight
        return y if bias is None else bias if y is None else y + bias


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`A @ B^T + bias` by LLM.int8(), differentiable in A, bias, and B where it is a float weight.

    A `[..., k]`; B `[n, k]` float, quantized on the way, or int8, whose codes and absmax are state.CB and state.SCB.
    threshold overrides the state's if positive. Returns `[..., n]` in A's dtype.
    Without outliers exact (the int32 product and its scaling have one defined result); the outlier part and the gradients are
    bounded as a float product is. grad_A = grad @ W with W rounded to grad's dtype; grad_B = grad^T @ A.

    >>> matmul(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 1.0], [0.0, 4.0]]))
    tensor([[-0.9921, -8.0000]])
    """
    state = state or MatmulLtState()
    threshold = threshold if threshold > 0 else state.threshold
    memory = plain(B)
    check_device("A", A, B=memory, bias=bias)
    weight: Tensor | None = None
    if memory.dtype != torch.int8:
        weight = B
        codes, absmax, _ = int8.quantize(memory)
    elif state.CB is not None and state.SCB is not None:
        codes, absmax = plain(state.CB), state.SCB
    else:
        raise ValueError("B is int8, but state.CB or state.SCB is None: its scales are unknown")
    if A.dim() < 1 or A.shape[-1] != codes.shape[1]:
        raise ValueError(f"B must be [n, k] with k the last size of A, got {tuple(codes.shape)} and {tuple(A.shape)}")
    if differentiated(A, weight, bias):
        function = _TransformedMatMul8bit if transforming() else _MatMul8bit
        result: Tensor = function.apply(A, weight, codes, absmax, bias, threshold)  # type: ignore[no-untyped-call]
    else:
        result = product(A, codes, absmax, bias, threshold)
    return result if out is None else out.copy_(result)
