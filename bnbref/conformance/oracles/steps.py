"""What one step of an optimizer may give, with states in 32 and in 8 bits: the formula in float32, and the same in intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref.conformance.expected import UNIT, Also, Expected, where_true
from bnbref.conformance.oracles.codes import encode_8bit
from bnbref.conformance.oracles.formula import COUPLED, REFERENCE, Conventions, Formula
from bnbref.conformance.oracles.intervals import Interval
from bnbref.conformance.oracles.values import each

BLOCKSIZE = 256
"""The blocksize of 8-bit states."""

Encode = Callable[[Tensor, Tensor], Tensor]
"""A function of scaled elements and the values of a codebook that returns codes."""


@dataclass(frozen=True)
class Step:
    """A step in float32 and in intervals, flat, and which gradients are not finite."""

    p: Tensor
    states: tuple[Tensor, ...]
    p_within: Interval
    states_within: tuple[Interval, ...]
    bad: Tensor


def both(
    p: Tensor, g: Tensor, s: Sequence[Tensor], within: Sequence[Interval], k: Mapping[str, Any], c: Conventions, eight: bool
) -> Step:  # fmt: skip
    """A step in float32 and in intervals.

    s: the old states in float32. within: the intervals in which a backend may have decoded them. k: the hyper-parameters.
    """
    formula = Formula(k, c, eight)
    numbers = formula.coefficients()
    single = SimpleNamespace(**{name: torch.tensor(x, dtype=torch.float32) for name, (x, _) in numbers.items()})
    wide = SimpleNamespace(**{name: Interval.near(x, off) for name, (x, off) in numbers.items()})
    dtype = p.dtype
    p, scale = p.reshape(-1).float(), torch.tensor(k["gnorm_scale"], dtype=torch.float32)
    bad = ~g.reshape(-1).isfinite()
    kind, came = g.dtype, torch.where(bad, 0.0, g.reshape(-1).float())
    g = (came * scale).to(kind).float() if c.scaled_in_16 else came * scale
    g_within = Interval.point(g)
    if dtype != torch.float32 and k["weight_decay"] > 0 and k["optimizer"] in COUPLED and not eight:
        # The decayed gradient may be rounded to the dtype before it is used.
        size = UNIT[dtype] * (g.double().abs() + k["weight_decay"] * p.double().abs())
        g_within = Interval(g_within.low - size, g_within.high + size)
    new_p, new = formula.step(single, p, g, s, came)
    p_within, new_within = formula.step(wide, Interval.point(p), g_within, within, Interval.point(came))
    if c.decay_after and dtype != torch.float32:
        p_within = p_within.widened(0.0, UNIT[dtype])  # rounded before the decay, and after
    after = tuple(torch.where(bad, old, now) for old, now in zip(s, new, strict=True))
    return Step(torch.where(bad, p, new_p), after, p_within, new_within, bad)


def bounded(value: Tensor, within: Interval, bad: Tensor) -> Expected:
    """A value between bounds that are rounded to its dtype; what is bad may be anything."""
    low, high = within.low, within.high
    if value.dtype != torch.float32:
        low, high = low.float().to(value.dtype).double(), high.float().to(value.dtype).double()
    return Expected(value, low=low.view(value.shape), high=high.view(value.shape), free=where_true(bad))


def optimizer_32bit(
    p: Tensor, g: Tensor, state1: Tensor, state2: Tensor | None = None, state3: Tensor | None = None,
    c: Conventions = REFERENCE, **k: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules OS."""
    states = [s.reshape(-1) for s in (state1, state2, state3) if s is not None]
    made = both(p, g, states, [Interval.point(s) for s in states], k, c, eight=False)
    found = {"p": bounded(made.p.to(p.dtype).view(p.shape), made.p_within, made.bad)}
    for i, (now, within) in enumerate(zip(made.states, made.states_within, strict=True), 1):
        found[f"state{i}"] = bounded(now.view(p.shape), within, made.bad)
    return found


def optimizer_8bit(
    p: Tensor, g: Tensor, state1: Tensor, absmax1: Tensor, values1: Tensor, state2: Tensor | None = None,
    absmax2: Tensor | None = None, values2: Tensor | None = None, state3: Tensor | None = None, absmax3: Tensor | None = None,
    c: Conventions = REFERENCE, encode: Encode = encode_8bit, floor: float = 0.0, **k: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules OB. encode, floor: how a backend codes a state, and the least scale that it stores."""
    given = [(state1, absmax1, values1), (state2, absmax2, values2), (state3, absmax3, values1)]
    coded = [(q, a, v) for q, a, v in given if q is not None and a is not None and v is not None]
    decoded, within = [], []
    for codes, absmax, values in coded:
        scale, value = each(absmax, BLOCKSIZE, p.numel()), values[codes.reshape(-1).long()]
        decoded.append(value * scale)
        within.append(Interval.point(value) * Interval.point(scale))
    made = both(p, g, decoded, within, k, c, eight=True)
    found = {"p": bounded(made.p.to(p.dtype).view(p.shape), made.p_within, made.bad)}
    # By some conventions an infinite gradient, or NaN too, becomes the scale of its block.
    flat = g.reshape(-1).float()
    counted = flat.isinf() if c.bad_gradient == "infinite" else made.bad & (c.bad_gradient == "any")
    spread = torch.where(counted, torch.where(flat.isinf(), torch.inf, flat), 0.0)
    for i, (now, bounds, (_, before, values)) in enumerate(zip(made.states, made.states_within, coded, strict=True), 1):
        new, scales = encoded(now, bounds, made.bad, spread, before, values, encode, floor)
        shaped = Expected(new.value.view(p.shape), also=new.also, free=new.free)
        found |= {f"state{i}": shaped, f"absmax{i}": scales}
    return found


def _blocks(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)


def encoded(
    x: Tensor, within: Interval, bad: Tensor, spread: Tensor, before: Tensor, values: Tensor, encode: Encode, floor: float
) -> tuple[Expected, Expected]:  # fmt: skip
    """The codes and scales of a new state.

    x, within: its numbers in float32 and as intervals. bad: the elements whose gradient is not finite. spread: for each element,
    0, or an infinity or NaN that becomes the scale of its block. before: the old scales.
    """
    held = _blocks(bad).any(-1)
    size = within.abs()
    largest = _blocks(torch.where(bad, 0.0, x).abs()).amax(-1)
    low, high = (_blocks(torch.where(bad, 0.0, end)).amax(-1) for end in (size.low, size.high))
    absmax = torch.where(held, torch.maximum(largest, before), largest)
    high = torch.where(held, torch.maximum(high, before.double()), high)
    worst = _blocks(spread).amax(-1)  # 0, infinity or NaN
    absmax, low, high = (torch.where(worst == 0, a, worst).clamp(min=floor) for a in (absmax, low, high))
    scale, least, most = (each(a, BLOCKSIZE, x.numel()) for a in (absmax, low, high))
    codes = encode(x * torch.where(scale > 0, 1 / scale, 0.0), values)
    ends = [torch.where(bad, codes, encode(end, values)) for end in _scaled(within, least, most)]
    zero = encode(torch.zeros(1), values)
    if bool((values < 0).any()):
        # A negative number whose nearest value is 0 may have the code below it, that it may keep its sign.
        ends += [torch.where((end == zero) & (within.high < 0) & ~bad, end - 1, end) for end in (codes, *ends)]
    different = [(end != codes).nonzero().view(-1) for end in ends]
    pairs = sorted({(int(i), int(end[i])) for end, where in zip(ends, different, strict=True) for i in where})
    also = Also(torch.tensor([i for i, _ in pairs]), torch.tensor([q for _, q in pairs], dtype=torch.uint8))
    return (
        Expected(codes, also=also if pairs else None, free=where_true(bad | (most == 0) | scale.isnan())),
        Expected(absmax, low=low, high=high, free=where_true(absmax.isnan())),
    )


def _scaled(within: Interval, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest that each element may be once it is scaled, float32. low, high: the bounds of the absmax of its
    block, which is never below the magnitude of the element."""
    least = torch.where(within.low < 0, within.low / low, within.low / high)
    most = torch.where(within.high > 0, within.high / low, within.high / high)
    bounds = Interval(least.nan_to_num(0.0), most.nan_to_num(0.0)).widened(0.0)
    return bounds.low.clamp(-1, 1).float(), bounds.high.clamp(-1, 1).float()
