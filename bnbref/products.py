"""The products of activations and a quantized weight, forwards and backwards.

    matmul_4bit    y = a @ W~^T + b,  W~ decoded from its codes for the length of one product             QLoRA (2305.14314)
    matmul         y = T( int8 part + b + outlier part )                                                 LLM.int8() (2208.07339)

What is multiplied, and its derivative, is in `fourbit_product` and `int8_product`. Here arguments are checked, and it is decided
which way a call takes.

A product in somebody's graph is one operator (`torch.ops.bnbref.linear_4bit`, `linear_8bit`), which runs what an eager call runs.
So a graph compiles as fast as that of the float model, and its bits are those of the eager call. An exported program holds plain
operations instead, because it must run where bnbref is not installed.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref import int8
from bnbref.arguments import checked
from bnbref.blockwise import FLOATS, check_device, check_float, into
from bnbref.context import (
    as_autocast,
    constant_of_graphs,
    differentiated,
    exporting,
    plain,
    transforming,
    under_functorch,
    undisturbed,
    without_autocast,
)
from bnbref.fourbit_product import MatMul4Bit, TransformedMatMul4Bit, product_4bit
from bnbref.int8_product import MatMul8bit, TransformedMatMul8bit, product_8bit
from bnbref.kernels import compile_enabled, ordered, tracing
from bnbref.operators import linear_4bit, linear_8bit
from bnbref.packed_weight import PackedWeight, Product, kept_weight, operator_arguments
from bnbref.quant_state import QuantState, present


def in_graph() -> bool:
    """Whether a product becomes an operator of a graph: Dynamo traces it, and neither for an export nor under `torch.func`, which
    differentiate or keep plain operations."""
    return torch.compiler.is_dynamo_compiling() and _keeps_operators()


@constant_of_graphs
def _keeps_operators() -> bool:
    return not exporting() and not under_functorch()


def _check_bias(bias: Tensor | None, n: int) -> None:
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}], a number for each row of the weight, got {tuple(bias.shape)}")


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


@checked
def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState | None, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A @ W^T + bias` for a packed 4-bit weight, differentiable in A and bias.

    A `[..., k]`, B the packed weight, quant_state of shape `[n, k]`, bias `[n]`; returns `[..., n]` in A's dtype, under
    autocast in autocast's; out receives it if given. A weight that was quantized as `[k, n]` is taken too, with a
    DeprecationWarning. Bounded: the weight is exact in A's dtype; the product is the device's, accumulated in float32, so that
    with u the unit roundoff of float32 and v that of the output dtype |y - exact| <= k u / (1 - k u) * sum |a w| + v |exact|.
    Compiled, few rows are computed from the codes, and the weight is not rounded to A's dtype: the bound is that of
    `few_rows.multiply_rows`. Inside `bnbref.batch_invariant()` exact: the order of the sum is written down.

    >>> from bnbref.functional import quantize_4bit
    >>> packed, state = quantize_4bit(torch.eye(2), quant_type="nf4")
    >>> matmul_4bit(torch.tensor([[2.0, 3.0]]), packed, state)
    tensor([[2., 3.]])
    """
    if quant_state is None:
        raise ValueError("quant_state is required: it holds the scales and the shape of B")
    A, bias = _checked_4bit(A, B, present(quant_state.shape, "shape"), bias)
    with without_autocast(A):
        if in_graph():
            result = _operator_4bit(A, bias, B, operator_arguments(quant_state), own=False)
        else:
            result = _multiply(A, B, bias, quant_state, ordered.batch_invariant_enabled())
    return result if out is None else into("out", out, result)


def fits(x: Tensor, scales: Tensor, bias: Tensor | None, n: int, k: int) -> bool:
    """Whether x and bias are plainly what a layer `[n, k]` with these scales takes, so that nothing has to be checked in a graph.

    Dynamo traces every line for each layer of a model: the checks that name what is wrong take it as long as all the rest.
    """
    plainly = isinstance(x, Tensor) and x.dtype in FLOATS and x.layout == torch.strided
    # As numbers: a comparison of tuples is a function that Dynamo traces.
    plainly = plainly and x.ndim > 0 and x.shape[-1] == k and x.device == scales.device
    return plainly and (bias is None or (bias.shape == (n,) and bias.device == scales.device))


def graph_product_4bit(
    x: Tensor, packed: Tensor, arguments: tuple[Any, ...], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`matmul_4bit` in somebody's graph, in a dtype, of a layer's weight that x `fits`. arguments: its `operator_arguments`."""
    given, kind = x.dtype, x.device.type
    # A cast that changes nothing would be a node of the graph all the same, through all passes of its compilation.
    a = x if given == dtype else x.to(dtype)
    if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.get_autocast_dtype(kind):
        dtype = torch.get_autocast_dtype(kind)
        a = a.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    y = _operator_4bit(a, bias, packed, arguments, own=True)
    return y if given == dtype else y.to(given)


def _checked_4bit(A: Tensor, B: Tensor, shape: Sequence[int], bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Activations and bias in the dtype of the product."""
    check_float("A", A)
    sizes = tuple(shape) if isinstance(shape, Sequence) else shape
    if not isinstance(sizes, tuple) or len(sizes) != 2 or A.dim() < 1 or A.shape[-1] not in sizes:
        raise ValueError(f"B must be a weight [n, k] with k the last size of A, got {sizes} and {tuple(A.shape)}")
    if A.shape[-1] != shape[1] and not tracing():
        warnings.warn(
            f"the weight was quantized as [k, n], {list(shape)}, and is transposed in every product. "
            "Re-quantize from the weight in [n, k] (out_features, in_features) orientation.",
            DeprecationWarning,
            stacklevel=4,  # beyond matmul_4bit and what judges its arguments
        )
    n = shape[0] if A.shape[-1] == shape[1] else shape[1]
    _check_bias(bias, n)
    with torch._C.DisableTorchFunctionSubclass():  # of a parameter, which watches what it is asked
        check_device("A", A, B=B, bias=bias)
    A = as_autocast(A)
    return A, None if bias is None else bias.to(A.dtype)


def _operator_4bit(a: Tensor, bias: Tensor | None, packed: Tensor, state: tuple[Any, ...], own: bool) -> Tensor:
    in_order = ordered.batch_invariant_enabled()
    with torch._C.DisableTorchFunctionSubclass():  # the operator takes the parameter for its memory
        return linear_4bit(a, bias, in_order, packed, *state, own)  # type: ignore[no-any-return]


def _multiply(a: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState, in_order: bool) -> Tensor:
    keeps = not tracing() and hasattr(packed, "products")  # codes that are no parameter of ours keep nothing
    weight = kept_weight(packed, state) if keeps else PackedWeight(plain(packed), state)
    # What torch.func does inside of torch.compile it does to plain operations.
    inlined = torch.compiler.is_dynamo_compiling() and under_functorch()
    if inlined or not differentiated(a, bias):
        return product_4bit(a, weight, bias, in_order)
    if transforming():
        arguments = a, weight.codes, bias, state, in_order
        return TransformedMatMul4Bit.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return MatMul4Bit.apply(a, weight, bias, in_order)  # type: ignore[no-any-return, no-untyped-call]


def prepared_product(a: Tensor, packed: Tensor, state: QuantState | None, bias: Tensor | None) -> Product | None:
    """A function of a and bias that is `matmul_4bit` of these, with everything done that the next such call would do again.

    None if the call needs more than a product and its gradient (a trace, a dtype of autocast, a fixed order, an error).
    """
    if not undisturbed(a) or state is None or not compile_enabled() or not hasattr(packed, "products"):
        return None
    if ordered.batch_invariant_enabled():
        return None
    weight = kept_weight(packed, state)
    product = weight.find_or_prepare(a, bias)
    if product is None or not differentiated(a, bias):
        return product
    return lambda a, bias: MatMul4Bit.apply(a, weight, bias, False, product)  # type: ignore[no-untyped-call]


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


@dataclass
class MatmulLtState:
    """What an int8 layer keeps: the weight's codes CB `[n, k]` and row absmax SCB `[n]`, and how to multiply.

    threshold: the magnitude from which on a column of the activation is an outlier. has_fp16_weights: whether the weight stays
    float. is_training, CxB, idx and use_pool are bitsandbytes', and change nothing.
    """

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


@checked
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
    threshold overrides the state's if positive. Returns `[..., n]` in A's dtype; out receives it if given. ValueError for dtypes,
    shapes and devices that do not fit, and for a negative threshold.
    Without outliers exact (the int32 product and its scaling have one defined result); the outlier part and the gradients are
    bounded as a float product is. A NaN in a row of A or of a float B makes NaN of all that is computed from this row.
    grad_A = grad @ W with W rounded to grad's dtype; grad_B = grad^T @ A.

    >>> matmul(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 1.0], [0.0, 4.0]]))
    tensor([[-0.9921, -8.0000]])
    """
    state = state or MatmulLtState()
    if threshold < 0:
        raise ValueError(f"threshold must be 0 (that of the state) or positive, got {threshold}")
    threshold = threshold if threshold > 0 else state.threshold
    memory = plain(B)
    check_float("A", A)
    with torch._C.DisableTorchFunctionSubclass():  # Dynamo takes what was detached from a parameter for one still
        check_device("A", A, B=memory, bias=bias)
    weight: Tensor | None = None
    if memory.dtype != torch.int8:
        weight = check_float("B", B)
        codes, absmax, _ = int8.quantize(memory, propagate_nan=True)
    elif state.CB is not None and state.SCB is not None:
        codes, absmax = plain(state.CB), state.SCB
        if not isinstance(absmax, Tensor) or absmax.dtype not in FLOATS or absmax.shape != codes.shape[:1]:
            got = f"{absmax.dtype} {tuple(absmax.shape)}" if isinstance(absmax, Tensor) else type(absmax).__name__
            raise ValueError(f"state.SCB must be float32 {list(codes.shape[:1])}, a scale for each row of B, got {got}")
        check_device("A", A, **{"state.CB": codes, "state.SCB": absmax})
    else:
        raise ValueError("B is int8, but state.CB or state.SCB is None: its scales are unknown")
    if codes.dim() != 2 or A.dim() < 1 or A.shape[-1] != codes.shape[1]:
        raise ValueError(f"B must be [n, k] with k the last size of A, got {tuple(codes.shape)} and {tuple(A.shape)}")
    _check_bias(bias, codes.shape[0])
    if torch.compiler.is_dynamo_compiling() and under_functorch(derivative=True):
        raise NotImplementedError(
            "torch.func inside torch.compile cannot differentiate an int8 product, whose rounding has the derivative 0: "
            "differentiate by autograd, or outside of torch.compile"
        )
    if in_graph():
        result: Tensor = linear_8bit(A, weight, codes, absmax, bias, threshold, False)
    elif not (torch.compiler.is_dynamo_compiling() and under_functorch()) and differentiated(A, weight, bias):
        function = TransformedMatMul8bit if transforming() else MatMul8bit
        result = function.apply(A, weight, codes, absmax, bias, threshold)  # type: ignore[no-untyped-call]
    else:
        result = product_8bit(A, codes, absmax, bias, threshold)
    return result if out is None else into("out", out, result)


def graph_product_8bit(A: Tensor, B: Tensor, absmax: Tensor, threshold: float, bias: Tensor | None) -> Tensor:
    """`matmul` in somebody's graph, of a layer's int8 weight that A `fits`."""
    with torch._C.DisableTorchFunctionSubclass():
        return linear_8bit(A, None, B, absmax, bias, threshold, True)  # type: ignore[no-any-return]
