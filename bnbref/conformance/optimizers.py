"""What one step of an optimizer may give: its formula twice, in float32 and in intervals.

The formula is written once, for anything that can be added, multiplied, divided and rooted. In float32 tensors, in the order
written here, it is the reference's result bit for bit; in `Interval`s it is whatever another order, a fused operation or the
approximate exponential of a GPU makes of it. Nothing here is taken from `bnbref.optim`, which is one of the backends.

Names are those of bitsandbytes' operators: momentum, lars, adam (AdamW too), lamb, lion, rmsprop, adagrad, ademamix.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref.blockwise import count_below
from bnbref.codebooks import Codebook
from bnbref.conformance.intervals import SLACK, Interval
from bnbref.conformance.judging import UNIT, Also, Expected

BLOCKSIZE = 256
"""Of 8-bit states."""

STATES = {
    "momentum": 1, "lars": 1, "adam": 2, "lamb": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3,
}  # fmt: skip
"""How many states an optimizer has: state1 the (first) average of gradients or, of rmsprop and adagrad, of squares; state2 the
average of squares; state3 the slow average of ademamix."""

COUPLED = ("momentum", "lars", "rmsprop", "adagrad")
CLIPPED = ("lars", "lamb")


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """How a backend steps, by default as the reference does.

    decay_after: decoupled decay multiplies the new parameter, not the old one. coupled: adam adds decay to the gradient.
    raw_gradient: what rmsprop and adagrad divide in 8 bits is neither scaled nor decayed. norm: whose length lars and lamb
    bound, the "direction", "biased" (before lamb's bias correction) or "undecayed" (without lars' decay). norm_eps: lars
    lets it be longer by eps. clip_8bit: whether they bound it in 8 bits. bad_gradient: what is not finite changes its own
    element ("kept"), or, if it is "infinite" or "any", becomes the scale of its block.
    """

    decay_after: bool = False
    coupled: bool = False
    raw_gradient: bool = False
    norm: str = "direction"
    norm_eps: bool = False
    clip_8bit: bool = True
    bad_gradient: str = "kept"


REFERENCE = Conventions()

Encode = Callable[[Tensor, Tensor], Tensor]
"""(scaled, values) -> codes."""


@functools.lru_cache(maxsize=8)
def _thresholds(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(Codebook.nearest("values", values, ties="even").thresholds)


def nearest(scaled: Tensor, values: Tensor) -> Tensor:
    """The code of the nearest value by float32 midpoints, an exact tie to the even code."""
    return count_below(scaled, _thresholds(tuple(values.tolist()))).to(torch.uint8)


# ---- the formula ----------------------------------------------------------------------------------------------------


def coefficients(k: Mapping[str, Any], c: Conventions) -> dict[str, tuple[float, float]]:
    """Each number of a step, in float64, and by how much it may be off in a backend.

    A float32 beta is taken from 1 after its rounding, or before. beta^step may be exp2(step log2(beta)) of a GPU, where each
    function is off by 2^-22: (step + 2) 2^-22 in all.
    """
    t, b1, b2 = k["step"], k["beta1"], k["beta2"]
    name, lr, wd = k["optimizer"], k["lr"], k["weight_decay"]

    def number(x: float, error: float = 0.0) -> tuple[float, float]:
        exact = x == float(torch.tensor(x, dtype=torch.float32))
        return x, error + (0.0 if exact else SLACK * abs(x))

    def rest(beta: float) -> tuple[float, float]:
        return number(1 - beta, abs(beta - float(torch.tensor(beta, dtype=torch.float32))))

    found = {name: number(k[name]) for name in ("beta1", "beta2", "beta3", "alpha", "eps", "weight_decay")}
    found |= {f"not_{b}": rest(k[b]) for b in ("beta1", "beta2", "beta3")}
    found |= {"rate": number(lr), "decay": number(1.0 if name in COUPLED or c.coupled or wd == 0 else 1 - lr * wd)}
    if name in ("adam", "lamb", "ademamix"):
        first, second = 1 - b1**t, 1 - b2**t
        off1, off2 = ((t + 2) * SLACK * (1 - x) / x for x in (first, second))
        found["root"] = number(math.sqrt(second), math.sqrt(second) * off2)
        found["unbias"] = number(first, first * off1)
        if name == "lamb":
            found["unbias"] = number(1 / first, off1 / first)
        if name == "adam":
            found["rate"] = number(lr / first, lr / first * off1)
    return found


def _sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Interval) else x.double().sqrt().float()


def _direction(
    name: str, h: Any, p: Any, g: Any, s: Sequence[Any], c: Conventions, raw: Any
) -> tuple[Any, tuple[Any, ...]]:
    """(direction, new states); raw: the gradient as it came, if that is to be divided."""
    if name in COUPLED or c.coupled:
        decayed = g + h.weight_decay * p
    match name:
        case "momentum" | "lars":
            m = h.beta1 * s[0] + decayed
            return m, (m,)
        case "rmsprop":
            v = h.beta1 * s[0] + h.not_beta1 * (decayed * decayed)
            return (decayed if raw is None else raw) / (_sqrt(v) + h.eps), (v,)
        case "adagrad":
            v = s[0] + decayed * decayed
            return (decayed if raw is None else raw) / (_sqrt(v) + h.eps), (v,)
        case "lion":
            return (h.beta1 * s[0] + h.not_beta1 * g).sign(), (h.beta2 * s[0] + h.not_beta2 * g,)
    g = decayed if c.coupled else g
    m = h.beta1 * s[0] + h.not_beta1 * g
    v = h.beta2 * s[1] + h.not_beta2 * (g * g)
    root = _sqrt(v) / h.root + h.eps
    if name == "adam":
        return m / root, (m, v)
    if name == "lamb":
        return h.unbias * (m / root), (m, v)
    slow = h.beta3 * s[2] + h.not_beta3 * g
    return (m / h.unbias + h.alpha * slow) / root, (m, v, slow)


def _ratio(k: Mapping[str, Any], c: Conventions, h: Any, p: Any, g: Any, s: Sequence[Any], u: Any) -> Any:
    """How much of the step is made: min(1, max_unorm |p| / |u|), in float64, where |p| > 0."""
    name = k["optimizer"]
    extra = k["eps"] if c.norm_eps and name == "lars" else 0.0
    if c.norm == "undecayed" and name == "lars":
        u = h.beta1 * s[0] + g
    if c.norm == "biased" and name == "lamb":
        u = u / h.unbias / h.root  # m / (sqrt(v) + eps c2)
    if not isinstance(u, Interval):
        norm, most = u.double().norm(), k["max_unorm"] * p.double().norm() + extra
        return (most / norm).float() if norm > most > 0 else torch.tensor(1.0)
    # A sum of n squares in any order: n roundings, and the same of p.
    off = 2 * u.low.numel() * 2.0**-24
    norms = [Interval(x.abs().low.norm(), x.abs().high.norm()).widened(0.0, off) for x in (p, u)]
    most = Interval.point(k["max_unorm"]) * norms[0] + Interval.point(extra)
    ratio = most / norms[1]
    return (
        Interval(ratio.low.clamp(max=1.0), ratio.high.clamp(max=1.0)) if float(most.high) > 0 else Interval.point(1.0)
    )


def _clips(k: Mapping[str, Any], c: Conventions, eight: bool) -> bool:
    return k["optimizer"] in CLIPPED and k["max_unorm"] > 0 and (c.clip_8bit or not eight)


def _step(
    k: Mapping[str, Any], c: Conventions, h: Any, p: Any, g: Any, s: Sequence[Any], eight: bool, came: Any
) -> tuple[Any, tuple[Any, ...]]:
    """(new p, new states); came: the gradient before it was scaled."""
    u, new = _direction(k["optimizer"], h, p, g, s, c, came if eight and c.raw_gradient else None)
    rate = h.rate * _ratio(k, c, h, p, g, s, u) if _clips(k, c, eight) else h.rate
    if c.decay_after:
        return (p - rate * u) * h.decay, new
    return h.decay * p - rate * u, new


# ---- both ways ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step in float32 and in intervals, flat, and which gradients are not finite."""

    p: Tensor
    states: tuple[Tensor, ...]
    p_within: Interval
    states_within: tuple[Interval, ...]
    bad: Tensor


def both(
    p: Tensor,
    g: Tensor,
    s: Sequence[Tensor],
    within: Sequence[Interval],
    k: Mapping[str, Any],
    c: Conventions,
    eight: bool,
) -> Step:
    """s: old states in float32, within: as what a backend may have decoded them."""
    numbers = coefficients(k, c)
    single = SimpleNamespace(**{name: torch.tensor(x, dtype=torch.float32) for name, (x, _) in numbers.items()})
    wide = SimpleNamespace(
        **{name: Interval.near(x, off) if off else Interval.point(x) for name, (x, off) in numbers.items()}
    )
    dtype = p.dtype
    p, scale = p.reshape(-1).float(), torch.tensor(k["gnorm_scale"], dtype=torch.float32)
    bad = ~g.reshape(-1).isfinite()
    came = torch.where(bad, 0.0, g.reshape(-1).float())
    g = came * scale
    g_within = Interval.point(g)
    if dtype != torch.float32 and k["weight_decay"] > 0 and k["optimizer"] in COUPLED and not eight:
        # The decayed gradient may be rounded to the dtype before it is used.
        size = UNIT[dtype] * (g.double().abs() + k["weight_decay"] * p.double().abs())
        g_within = Interval(g_within.low - size, g_within.high + size)
    new_p, new = _step(k, c, single, p, g, s, eight, came)
    p_within, new_within = _step(k, c, wide, Interval.point(p), g_within, within, eight, Interval.point(came))
    if c.decay_after and dtype != torch.float32:
        p_within = p_within.widened(0.0, UNIT[dtype])  # rounded before the decay, and after
    kept = tuple(torch.where(bad, old, now) for old, now in zip(s, new, strict=True))
    return Step(torch.where(bad, p, new_p), kept, p_within, new_within, bad)


def _expected(value: Tensor, within: Interval, bad: Tensor) -> Expected:
    low, high = within.low, within.high
    if value.dtype != torch.float32:
        low, high = low.float().to(value.dtype).double(), high.float().to(value.dtype).double()
    shape = value.shape
    return Expected(
        value, low=low.view(shape), high=high.view(shape), free=bad.nonzero().view(-1) if bad.any() else None
    )


def step_32bit(
    p: Tensor, g: Tensor, state1: Tensor, state2: Tensor | None = None, state3: Tensor | None = None,
    c: Conventions = REFERENCE, **k: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules OS."""
    states = [s.reshape(-1) for s in (state1, state2, state3) if s is not None]
    made = both(p, g, states, [Interval.point(s) for s in states], k, c, eight=False)
    found = {"p": _expected(made.p.to(p.dtype).view(p.shape), made.p_within, made.bad)}
    for i, (now, within) in enumerate(zip(made.states, made.states_within, strict=True), 1):
        found[f"state{i}"] = _expected(now.view(p.shape), within, made.bad)
    return found


def step_8bit(
    p: Tensor, g: Tensor, state1: Tensor, absmax1: Tensor, values1: Tensor, state2: Tensor | None = None,
    absmax2: Tensor | None = None, values2: Tensor | None = None, state3: Tensor | None = None, absmax3: Tensor | None = None,
    c: Conventions = REFERENCE, encode: Encode = nearest, floor: float = 0.0, **k: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules OB."""
    given = [(state1, absmax1, values1), (state2, absmax2, values2), (state3, absmax3, values1)]
    coded = [(q, a, v) for q, a, v in given if q is not None and a is not None and v is not None]
    decoded, within = [], []
    for codes, absmax, values in coded:
        scale = absmax.repeat_interleave(BLOCKSIZE)[: p.numel()]
        value = values[codes.reshape(-1).long()]
        decoded.append(value * scale)
        within.append(Interval.point(value) * Interval.point(scale))
    made = both(p, g, decoded, within, k, c, eight=True)
    found = {"p": _expected(made.p.to(p.dtype).view(p.shape), made.p_within, made.bad)}
    flat = g.reshape(-1).float()
    spread = (
        torch.where(flat.isinf(), torch.inf, flat) if c.bad_gradient in ("infinite", "any") else torch.zeros_like(flat)
    )
    spread = torch.where(made.bad & ((c.bad_gradient == "any") | flat.isinf()), spread, 0.0)
    for i, (now, bounds, (_, before, values)) in enumerate(zip(made.states, made.states_within, coded, strict=True), 1):
        new, scales = _encoded(now, bounds, made.bad, spread, before, values, encode, floor)
        found |= {f"state{i}": _in_shape(new, p.shape), f"absmax{i}": scales}
    return found


def _in_shape(codes: Expected, shape: torch.Size) -> Expected:
    return Expected(codes.value.view(shape), also=codes.also, free=codes.free)


def _blocks(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)


def _encoded(
    x: Tensor,
    within: Interval,
    bad: Tensor,
    spread: Tensor,
    before: Tensor,
    values: Tensor,
    encode: Encode,
    floor: float,
) -> tuple[Expected, Expected]:
    """The codes and scales of a new state. spread: what takes part in its block's scale beside it, if not 0."""
    held = _blocks(bad).any(-1)
    size = within.abs()
    largest = _blocks(torch.where(bad, 0.0, x).abs()).amax(-1)
    low, high = (_blocks(torch.where(bad, 0.0, end)).amax(-1) for end in (size.low, size.high))
    absmax = torch.where(held, torch.maximum(largest, before), largest)
    high = torch.where(held, torch.maximum(high, before.double()), high)
    worst = _blocks(spread).amax(-1)  # 0, infinity or NaN
    absmax, low, high = (torch.where(worst == 0, a, worst).clamp(min=floor) for a in (absmax, low, high))
    each = [a.repeat_interleave(BLOCKSIZE)[: x.numel()] for a in (absmax, low, high)]
    scaled = x * torch.where(each[0] > 0, 1 / each[0], 0.0)
    codes = encode(scaled, values)
    ends = [encode(end, values) for end in _scaled(within, each[1], each[2])]
    ends = [torch.where(bad, codes, end) for end in ends]
    zero = encode(torch.zeros(1), values)
    if bool((values < 0).any()):
        # A negative number whose nearest value is 0 may have the code below it, that it may keep its sign.
        ends += [torch.where((end == zero) & (within.high < 0) & ~bad, end - 1, end) for end in (codes, *ends)]
    different = [(end != codes).nonzero().view(-1) for end in ends]
    pairs = {(int(i), int(end[i])) for end, where in zip(ends, different, strict=True) for i in where}
    ordered = sorted(pairs)
    also = Also(torch.tensor([i for i, _ in ordered]), torch.tensor([q for _, q in ordered], dtype=torch.uint8))
    free = (bad | (each[2] == 0) | each[0].isnan()).nonzero().view(-1)
    lost = absmax.isnan().nonzero().view(-1)
    return (
        Expected(codes, also=also if ordered else None, free=free if free.numel() else None),
        Expected(absmax, low=low, high=high, free=lost if lost.numel() else None),
    )


def _scaled(within: Interval, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest scaled element, float32: its absmax, of low to high, is not below it."""
    least = torch.where(within.low < 0, within.low / low, within.low / high)
    most = torch.where(within.high > 0, within.high / low, within.high / high)
    bounds = Interval(least.nan_to_num(0.0), most.nan_to_num(0.0)).widened(0.0)
    return tuple(end.clamp(-1, 1).float() for end in (bounds.low, bounds.high))  # type: ignore[return-value]
