"""Weights of 16 bits with a correction beside them, and steps inside a backward pass.

The float32s of one sign are numbered by their bits. float16 is brought to the exponents of float32 by a factor of 2^-112.
"""

from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.expected import Expected, where_true
from bnbref.conformance.oracles.formula import REFERENCE
from bnbref.conformance.oracles.intervals import Interval
from bnbref.conformance.oracles.steps import both, bounded

LINES = {torch.bfloat16: (16, 1.0), torch.float16: (13, 2.0**-112)}
"""For each dtype how many bits of a float32 it lacks, as a power of two, and the factor."""


def split(x: Tensor, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor]:
    """The weight and its correction: rules WS."""
    shift, factor = LINES[dtype]
    coarse = shift - 8 if bits == 24 else 0
    place = (x.abs() * factor).view(torch.int32).double()
    place = (place / 2**coarse).round() * 2**coarse  # a tie to even
    whole = (place / 2**shift + 0.5).floor() * 2**shift  # a tie away from zero
    p = whole.int().view(torch.float32) / factor * torch.where(x.signbit(), -1.0, 1.0)
    return p.to(dtype), ((place - whole) / 2**coarse).to(torch.int8 if bits == 24 else torch.int16)


def joined(p: Tensor, correction: Tensor) -> Tensor:
    """The float32 that both stand for: rule WJ-1."""
    shift, factor = LINES[p.dtype]
    coarse = shift - 8 if correction.dtype == torch.int8 else 0
    place = (p.float().abs() * factor).view(torch.int32) + correction.int() * 2**coarse
    size: Tensor = place.clamp(min=0).view(torch.float32) / factor
    return size * torch.where(p.signbit(), -1.0, 1.0)


def split_weight(x: Tensor, dtype: torch.dtype, bits: int) -> dict[str, Expected]:
    """Rules WS."""
    p, correction = split(x, dtype, bits)
    return {"p": Expected(p), "correction": Expected(correction)}


def join_weight(p: Tensor, correction: Tensor) -> dict[str, Expected]:
    """Rules WJ."""
    return {"x": Expected(joined(p, correction))}


def corrected_step(
    p: Tensor, correction: Tensor, g: Tensor, state1: Tensor, state2: Tensor, **k: Any
) -> dict[str, Expected]:
    """Rules WC."""
    made_of = (p.dtype, 24 if correction.dtype == torch.int8 else 32)
    states = [state1.reshape(-1), state2.reshape(-1)]
    made = both(joined(p, correction), g, states, [Interval.point(s) for s in states], k, REFERENCE, eight=False)
    found = {
        f"state{i}": bounded(now.view(p.shape), within, made.bad)
        for i, (now, within) in enumerate(zip(made.states, made.states_within, strict=True), 1)
    }
    ends = [split(end.float().view(p.shape), *made_of) for end in (made.p_within.low, made.p_within.high)]
    for name, value, low, high in zip(("p", "correction"), split(made.p.view(p.shape), *made_of), *ends, strict=True):
        both_ends = torch.stack(
            (low, high)
        ).double()  # of a negative weight the larger number has the lesser correction
        beside_a_tie = where_true((ends[0][0] != ends[1][0]).view(-1)) if name == "correction" else None
        found[name] = Expected(value, low=both_ends.amin(0), high=both_ends.amax(0), free=beside_a_tie)
    return found


def released_step(
    x: Tensor, weight1: Tensor, grad: Tensor, lr: float, weight2: Tensor | None = None
) -> dict[str, Expected]:
    """Rules GR, of whole numbers: the sums are exact."""
    second = weight1 if weight2 is None else weight2
    hidden = x @ weight1.t()
    grad1, grad2 = (grad @ second).t() @ x, grad.t() @ hidden
    if weight2 is None:
        return {"weight1": Expected(weight1 - lr * (grad1 + grad2))}
    return {"weight1": Expected(weight1 - lr * grad1), "weight2": Expected(weight2 - lr * grad2)}
