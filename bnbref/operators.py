"""What somebody's graph holds of bnbref: a product is one operator, which runs what an eager call runs.

So a graph compiles as fast as that of the float model. Each product has a fake kernel, by which it is traced, and a gradient.
The weights, which the gradients multiply by, are operators for the same reason. A graph gives an operator a layer's parameter
itself, which watches what is done to it; the operator computes with its memory.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from bnbref import int8
from bnbref.blockwise import block_count, check_device
from bnbref.codebooks import FOUR_BIT, Codebook, four_bit
from bnbref.context import plain, undisturbed, without_autocast
from bnbref.fourbit_product import gradients_4bit, product_4bit
from bnbref.int8_product import gradients_8bit, product_8bit
from bnbref.joined_scales import split
from bnbref.kernels import compile_enabled
from bnbref.packed_weight import PackedWeight, captured, kept_weight, operator_arguments
from bnbref.quant_state import QuantState

_STATE = (
    "Tensor packed, Tensor absmax, Tensor[] second, int[] shape, int blocksize, int blocksize2, str values, bool own"
)
_operators = library.Library("bnbref", "FRAGMENT")
for _schema in (
    f"linear_4bit(Tensor a, Tensor? bias, bool in_order, {_STATE}) -> Tensor",
    f"weight_4bit({_STATE}, ScalarType dtype) -> Tensor",
    "linear_8bit(Tensor a, Tensor? weight, Tensor codes, Tensor absmax, Tensor? bias, float threshold, bool own) -> Tensor",
    "weight_8bit(Tensor codes, Tensor absmax, bool own, ScalarType dtype) -> Tensor",
):
    _operators.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# The overloads themselves, for which Dynamo would look in each layer of a model.
linear_4bit, linear_8bit = torch.ops.bnbref.linear_4bit.default, torch.ops.bnbref.linear_8bit.default


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _of_numbers(values: str) -> Codebook:
    """The codebook with these numbers. Its thresholds do not matter: it only decodes."""
    try:
        numbers = tuple(map(float, values.split()))
    except ValueError:
        return four_bit(values)  # which says what there is
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return Codebook("values of an operator", numbers, tuple(numbers[code] for code in order[:-1]), tuple(order))


def _state(
    absmax: Tensor,
    second: Sequence[Tensor],
    shape: Sequence[int],
    blocksize: int,
    blocksize2: int,
    values: str,
) -> QuantState:
    """The quant state of these arguments. second: absmax2, the values of the codes and the offset, or the memory of all three."""
    book = four_bit(values) if values in FOUR_BIT else _of_numbers(values)
    state = QuantState(absmax, torch.Size(shape), blocksize=blocksize, quant_type=book)
    if second:
        blocks2 = block_count(absmax.numel(), blocksize2)
        absmax2, code, state.offset = second if len(second) == 3 else split(second[0], blocks2)
        state.state2, state.nested = QuantState(absmax2, code=code, blocksize=blocksize2), True
    return state


def _weight(packed: Tensor, *arguments: Any) -> PackedWeight:
    """The weight of these arguments. A parameter whose quant state they are keeps what is prepared from it, as in eager calls.

    The last argument, own: whether they are a layer's, which may be of the parameter that was its weight before.
    """
    *given, own = arguments
    state: QuantState | None = getattr(packed, "quant_state", None)
    if state is None or not hasattr(packed, "products"):
        return PackedWeight(plain(packed), _state(*given))
    if own:
        absmax, second, shape, *_ = given
        # `second` begins with absmax2, whether it is three tensors or their memory.
        absmax2 = None if state.state2 is None else state.state2.absmax
        same2 = not second or (absmax2 is not None and absmax2.data_ptr() == second[0].data_ptr())
        if state.absmax is not absmax or not same2:
            _check_replaced(packed, state.shape == tuple(shape))
        return kept_weight(packed, state)
    return kept_weight(packed, state) if _are_of(state, *given) else PackedWeight(plain(packed), _state(*given))


def _check_replaced(weight: Tensor, fits: bool) -> None:
    """Raises RuntimeError if a graph cannot take a weight that came into its layer unseen. A CUDA graph would hold scales that no
    argument of it is, and not notice when they change."""
    if not fits or captured(weight):
        raise RuntimeError(
            "the weight of a compiled layer was replaced through `_parameters`, which a graph does not see, while the one "
            "before is still in use: assign it, `layer.weight = ...`"
        )


def _are_of(
    state: QuantState, absmax: Tensor, second: Sequence[Tensor], shape: Sequence[int], *constants: int | str
) -> bool:
    own_absmax, own_second, own_shape, *own = operator_arguments(state)
    same = own_absmax is absmax and own_shape == tuple(shape) and own == list(constants)
    return same and len(own_second) == len(second) and all(map(operator.is_, own_second, second))


@library.impl(_operators, "linear_4bit", "CompositeExplicitAutograd")
def _(a: Tensor, bias: Tensor | None, in_order: bool, packed: Tensor, *state: Any) -> Tensor:
    weight = _weight(packed, *state)
    product = None if in_order or not undisturbed(a) or not compile_enabled() else weight.find_or_prepare(a, bias)
    if product is not None:
        return product(a, bias)
    with without_autocast(a):  # which a graph has applied
        return product_4bit(a, weight, bias, in_order)


@library.register_fake("bnbref::linear_4bit", lib=_operators)  # type: ignore[untyped-decorator]
def _(
    a: Tensor, bias: Tensor | None, in_order: bool, packed: Tensor, absmax: Tensor, second: Any, shape: Any, *rest: Any
) -> Tensor:
    check_device("A", a, B=packed, bias=bias)
    return a.new_empty(*a.shape[:-1], shape[0] if a.shape[-1] == shape[1] else shape[1])


@library.impl(_operators, "weight_4bit", "CompositeExplicitAutograd")
def _(packed: Tensor, *state: Any) -> Tensor:
    return _weight(packed, *state[:-1]).decoded(state[-1])


@library.register_fake("bnbref::weight_4bit", lib=_operators)  # type: ignore[untyped-decorator]
def _(packed: Tensor, absmax: Tensor, second: list[Tensor], shape: list[int], *rest: Any) -> Tensor:
    return packed.new_empty(shape, dtype=rest[-1])


def _save_4bit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, ctx.in_order, packed, absmax, second, *ctx.constants = inputs
    ctx.k = a.shape[-1]
    ctx.save_for_backward(packed, absmax, *second)


def _gradient_4bit(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed, absmax, *second = ctx.saved_tensors
    needs_a, needs_bias, *_ = ctx.needs_input_grad
    weight = torch.ops.bnbref.weight_4bit(packed, absmax, second, *ctx.constants, grad.dtype) if needs_a else None
    grad_a, grad_bias = gradients_4bit(grad, weight, ctx.k, ctx.in_order, needs_bias)
    return grad_a, grad_bias, *(None,) * 3, [None] * len(second), *(None,) * 5


library.register_autograd("bnbref::linear_4bit", _gradient_4bit, setup_context=_save_4bit, lib=_operators)


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


def _absmax(codes: Tensor, absmax: Tensor, own: bool) -> Tensor:
    """The absmax of the weight: what is given or, if that was to be the parameter's own and is another's, what it has."""
    found: Tensor | None = getattr(codes, "SCB", None) if own else None
    if found is None or found is absmax:
        return absmax
    _check_replaced(codes, found.shape == absmax.shape)
    return found


@library.impl(_operators, "linear_8bit", "CompositeExplicitAutograd")
def _(
    a: Tensor,
    weight: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    own: bool,
) -> Tensor:
    return product_8bit(a, plain(codes), _absmax(codes, absmax, own), bias, threshold, gather=False)


@library.register_fake("bnbref::linear_8bit", lib=_operators)  # type: ignore[untyped-decorator]
def _(a: Tensor, weight: Tensor | None, codes: Tensor, absmax: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    check_device("A", a, B=codes, bias=bias)
    return a.new_empty(*a.shape[:-1], codes.shape[0])


@library.impl(_operators, "weight_8bit", "CompositeExplicitAutograd")
def _(codes: Tensor, absmax: Tensor, own: bool, dtype: torch.dtype) -> Tensor:
    return int8.dequantize(plain(codes), _absmax(codes, absmax, own), dtype)


@library.register_fake("bnbref::weight_8bit", lib=_operators)  # type: ignore[untyped-decorator]
def _(codes: Tensor, absmax: Tensor, own: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _save_8bit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, weight, codes, absmax, bias, _, ctx.own = inputs
    ctx.save_for_backward(codes, absmax, a if weight is not None and weight.requires_grad else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient_8bit(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, absmax, a = ctx.saved_tensors
    decoded = torch.ops.bnbref.weight_8bit(codes, absmax, ctx.own, grad.dtype) if ctx.needs_input_grad[0] else None
    return *gradients_8bit(ctx, grad, a, decoded), None


library.register_autograd("bnbref::linear_8bit", _gradient_8bit, setup_context=_save_8bit, lib=_operators)
