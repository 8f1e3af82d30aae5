"""One step of any rule, on states in float32 or in 8 bits: blockwise codes and scales (Dettmers et al., 2110.02861).

    elements, state in float32             blocks, state in 8 bits
    -----------------------------------    -----------------------------------------------------
                                           state  = values[code] * absmax
    direction, new = rule(p, g, state)     direction, new = rule(p, g, state)
    p = decay * p - rate * direction       p      = decay * p - rate * direction
                                           absmax = max |new| of the block
                                           code   = number of thresholds below new * (1 / absmax)

Each is one kernel per (equation, dtype), which writes into the parameter and its state. An element whose gradient is
NaN, infinite or beyond 2^63 stays as it was, parameter and state; so does its code, unless its block's absmax grows.

After the states a parameter of 16 bits may have one more tensor, its correction: then p is the float32 that both stand for,
before the step and after it (`bnbref.optim.master_weights`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from bnbref.blockwise import encode, magnitude, reciprocal
from bnbref.codebooks import value_table
from bnbref.kernels import fused
from bnbref.optim.equation import Equation
from bnbref.optim.master_weights import split, value_of
from bnbref.optim.rule import Coefficients, Rule

# The square of a larger gradient is no float32. It is the gradient that is compared and not the new state, because Inductor would
# then write the new state to memory (docs: How to read the code, table "formulations").
LARGEST_GRADIENT = 2.0**63

ByState = Callable[[int, Tensor], Tensor]
"""A function of two arguments: the number of a state, and either its codes or its scaled elements."""

Largest = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function with the arguments and the result of `largest`."""


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def advance(
    rule: Equation, p: Tensor, g: Tensor, states: Sequence[Tensor], hyper: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """One step in float32. Returns which elements have a finite gradient, the new p, the direction and the new states.

    Where the gradient is not finite, p and the states are what they were, and the direction is 0.
    """
    p, g = p.float(), g.float()
    c = Coefficients(rule.names, hyper)
    direction, *new = rule.direction(p, g, *states, c)
    finite = g.abs() <= LARGEST_GRADIENT
    after = [torch.where(finite, now, before) for now, before in zip(new, states, strict=True)]
    return finite, torch.where(finite, c.decay * p - c.rate * direction, p), torch.where(finite, direction, 0.0), after


def rounded(x: Tensor, dtype: torch.dtype, noise: Tensor | None) -> Tensor:
    """x rounded to the nearest number of a dtype.

    noise: 16 random bits for each element, as int16. With them x is rounded to bfloat16 up or down, so that the mean is x.
    """
    if noise is None:
        return x.to(dtype)
    bits = (x.view(torch.int32) + (noise.to(torch.int32) & 0xFFFF)) & -0x10000
    return torch.where(x.abs() < torch.inf, bits.view(torch.float32), x).to(dtype)


def as_parameter(
    x: Tensor, dtype: torch.dtype, noise: Tensor | None, correction: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The new parameter in that dtype, for the float32 value x; and its new correction, if it had one.

    With a correction there is no noise.
    """
    return split(x, dtype, correction[0].dtype) if correction else (rounded(x, dtype, noise),)


# ---- float32 --------------------------------------------------------------------------------------------------------


@fused(dynamic={"p": (0,), "g": (0,), "noise": (0,), "states": (0,)}, writes=("p", "states"))
def step_elements(
    p: Tensor, g: Tensor, hyper: Tensor, noise: Tensor | None, *states: Tensor, rule: Equation
) -> tuple[Tensor, ...]:
    """The new p and the new states, float32, and the new correction.  Exact.

    p, g, states: `[n]`. hyper: the rule's coefficients in float32. noise: int16 `[n]` for stochastic rounding, or None.
    """
    states, correction = states[: len(rule.states)], states[len(rule.states) :]
    _, p_new, _, new = advance(rule, value_of(p, correction), g, states, hyper)
    rounded_p, *rest = as_parameter(p_new, p.dtype, noise, correction)
    return (rounded_p, *new, *rest)


@fused(dynamic={"p": (0,), "g": (0,), "states": (0,)})
def direction_elements(p: Tensor, g: Tensor, hyper: Tensor, *states: Tensor, rule: Equation) -> Tensor:
    """The direction that `step_elements` would take, float32 `[n]`.  Exact."""
    return advance(rule, p, g, states, hyper)[2]


# ---- eight bits -----------------------------------------------------------------------------------------------------
# states: of each one its uint8 codes `[blocks, blocksize]`, then its float32 scales `[blocks]`; at last the correction.


def decoded(states: Sequence[Tensor], values: ByState) -> list[Tensor]:
    """The states in float32: the value of each code, which `values` looks up, times the scale of its block."""
    pairs = enumerate(zip(states[::2], states[1::2], strict=True))
    return [values(i, codes) * rearrange(absmax, "b -> b 1") for i, (codes, absmax) in pairs]


def largest(finite: Tensor, size: Tensor, before: Tensor) -> Tensor:
    """The new absmax of each block, of the magnitudes of its elements `[blocks, blocksize]` and its absmax before the step.

    A block with an element that is not updated keeps at least its old absmax: with a smaller one, the element's code would stand
    for another number than before.
    """
    return torch.where(finite, size, rearrange(before, "b -> b 1")).amax(-1)


def advance_blocks(
    rule: Equation, p: Tensor, g: Tensor, hyper: Tensor, noise: Tensor | None, states: Sequence[Tensor], values: ByState,
    codes: ByState, largest: Largest = largest,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `step_blocks` returns, with states decoded by `values`, scaled by `largest` and encoded by `codes`."""
    states, correction = states[: 2 * len(rule.states)], states[2 * len(rule.states) :]
    finite, p_new, _, new = advance(rule, value_of(p, correction), g, decoded(states, values), hyper)
    rounded_p, *rest = as_parameter(p_new, p.dtype, noise, correction)
    results = [rounded_p]
    for i, (x, before) in enumerate(zip(new, states[1::2], strict=True)):
        absmax = largest(finite, magnitude(x), before)
        results += [codes(i, x * rearrange(reciprocal(absmax), "b -> b 1")).to(torch.uint8), absmax]
    return (*results, *rest)


def _value(rule: Rule, i: int, codes: Tensor) -> Tensor:
    return value_table(rule.codebook(rule.states[i]), codes.device)[codes.to(torch.int32)]


def _code(rule: Rule, i: int, scaled: Tensor) -> Tensor:
    return encode(scaled, rule.codebook(rule.states[i]))


@fused(dynamic={"p": (0,), "g": (0,), "noise": (0,), "states": (0,)}, writes=("p", "states"))
def step_blocks(
    p: Tensor, g: Tensor, hyper: Tensor, noise: Tensor | None, *states: Tensor, rule: Equation
) -> tuple[Tensor, ...]:
    """The new p, then the codes and the scales of each new state, and the new correction.  Exact.

    p, g: `[blocks, blocksize]`. hyper: the rule's coefficients in float32. noise: int16, shaped like p, or None.
    """
    return advance_blocks(rule, p, g, hyper, noise, states, partial(_value, rule), partial(_code, rule))


@fused(dynamic={"p": (0,), "g": (0,), "states": (0,)})
def direction_blocks(p: Tensor, g: Tensor, hyper: Tensor, *states: Tensor, rule: Equation) -> Tensor:
    """The direction that `step_blocks` would take, float32 `[blocks, blocksize]`.  Exact."""
    return advance(rule, p, g, decoded(states, partial(_value, rule)), hyper)[2]
