"""One step of an optimizer as a formula, written once for anything that can be added, multiplied, divided and rooted.

In float32 tensors, in the order written here, it is the reference's result bit for bit. In `Interval`s it is whatever another
order, a fused operation or the approximate exponential of a GPU makes of it. Nothing here is taken from `bnbref.optim`, which
is one of the backends. docs/content/spec/optimizer_32bit.md has the formulas in the notation of the papers.

Names are those of bitsandbytes' operators: momentum, lars, adam (AdamW too), lamb, lion, rmsprop, adagrad, ademamix.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bnbref.conformance.oracles.intervals import SLACK, Interval

STATES = {
    "momentum": 1, "lars": 1, "adam": 2, "lamb": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3,
}  # fmt: skip
"""How many states an optimizer has: state1 the (first) average of gradients or, of rmsprop and adagrad, of squares; state2 the
average of squares; state3 the slow average of ademamix."""

COUPLED = ("momentum", "lars", "rmsprop", "adagrad")
"""Optimizers that add weight decay to the gradient; the others multiply the parameter by 1 - lr * weight_decay."""

CLIPPED = ("lars", "lamb")
"""Optimizers whose step is bounded by the length of the parameter."""


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """How a backend steps, by default as the reference does.

    decay_after: decoupled decay multiplies the new parameter, not the old one. coupled: adam adds decay to the gradient.
    raw_gradient: what rmsprop and adagrad divide in 8 bits is neither scaled nor decayed. norm: whose length lars and lamb
    bound, the "direction", "biased" (before lamb's bias correction) or "undecayed" (without lars' decay). norm_eps: lars
    lets it be longer by eps. clip_8bit: whether they bound it in 8 bits. bad_gradient: what is not finite changes its own
    element ("kept"), or, if it is "infinite" or "any", becomes the scale of its block. scaled_decay: adafactor decays by
    the rate times the size of the parameter. scaled_in_16: a gradient of 16 bits is scaled in them.
    """

    decay_after: bool = False
    coupled: bool = False
    raw_gradient: bool = False
    norm: str = "direction"
    norm_eps: bool = False
    clip_8bit: bool = True
    bad_gradient: str = "kept"
    scaled_decay: bool = False
    scaled_in_16: bool = False


def number(x: float, error: float = 0.0) -> tuple[float, float]:
    """A number of a step, and by how much it may be off in a backend, if it is off by `error` before its rounding to float32."""
    exact = x == float(torch.tensor(x, dtype=torch.float32))
    return x, error + (0.0 if exact else SLACK * abs(x))


def rest(beta: float) -> tuple[float, float]:
    """1 - beta, taken of beta or of beta rounded to float32."""
    return number(1 - beta, abs(beta - float(torch.tensor(beta, dtype=torch.float32))))


def off_by(correction: float, t: int) -> float:
    """The relative error that a bias correction 1 - beta^t may have, if beta^t was computed by a GPU's exp2."""
    return (t + 2) * SLACK * (1 - correction) / correction


REFERENCE = Conventions()


def _sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Interval) else x.double().sqrt().float()


@dataclass(frozen=True)
class Formula:
    """The step of one case. k: its hyper-parameters. c: the conventions. eight: whether states have 8 bits.

    In the methods h holds the numbers of `coefficients` as attributes; p, g and s are parameter, gradient and states; all of
    them are float32 tensors, or all are intervals.
    """

    k: Mapping[str, Any]
    c: Conventions
    eight: bool

    @property
    def name(self) -> str:
        """The optimizer."""
        return str(self.k["optimizer"])

    def coefficients(self) -> dict[str, tuple[float, float]]:
        """Each number of a step, in float64, and by how much it may be off in a backend.

        A float32 beta is taken from 1 after its rounding, or before. beta^step may be exp2(step log2(beta)) of a GPU, where each
        function is off by 2^-22: (step + 2) 2^-22 in all.
        """
        k, c, name = self.k, self.c, self.name
        t, b1, b2, lr, wd = k["step"], k["beta1"], k["beta2"], k["lr"], k["weight_decay"]

        found = {key: number(k[key]) for key in ("beta1", "beta2", "beta3", "alpha", "eps", "weight_decay")}
        found |= {f"not_{b}": rest(k[b]) for b in ("beta1", "beta2", "beta3")}
        found |= {"rate": number(lr), "decay": number(1.0 if name in COUPLED or c.coupled or wd == 0 else 1 - lr * wd)}
        if name in ("adam", "lamb", "ademamix"):
            first, second = 1 - b1**t, 1 - b2**t
            off1, off2 = off_by(first, t), off_by(second, t)
            found["root"] = number(math.sqrt(second), math.sqrt(second) * off2)
            found["unbias"] = number(first, first * off1)
            if name == "lamb":
                found["unbias"] = number(1 / first, off1 / first)
            if name == "adam":
                found["rate"] = number(lr / first, lr / first * off1)
        return found

    def step(self, h: Any, p: Any, g: Any, s: Sequence[Any], came: Any) -> tuple[Any, tuple[Any, ...]]:
        """(new p, new states); came: the gradient before it was scaled."""
        u, new = self._direction(h, p, g, s, came if self.eight and self.c.raw_gradient else None)
        clips = self.name in CLIPPED and self.k["max_unorm"] > 0 and (self.c.clip_8bit or not self.eight)
        rate = h.rate * self._ratio(h, p, g, s, u) if clips else h.rate
        return (p - rate * u) * h.decay if self.c.decay_after else h.decay * p - rate * u, new

    def _direction(self, h: Any, p: Any, g: Any, s: Sequence[Any], raw: Any) -> tuple[Any, tuple[Any, ...]]:
        """(direction, new states); raw: the gradient as it came, if that is to be divided."""
        if self.name in COUPLED or self.c.coupled:
            decayed = g + h.weight_decay * p
        match self.name:
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
        g = decayed if self.c.coupled else g
        m = h.beta1 * s[0] + h.not_beta1 * g
        v = h.beta2 * s[1] + h.not_beta2 * (g * g)
        root = _sqrt(v) / h.root + h.eps
        if self.name == "adam":
            return m / root, (m, v)
        if self.name == "lamb":
            return h.unbias * (m / root), (m, v)
        slow = h.beta3 * s[2] + h.not_beta3 * g
        return (m / h.unbias + h.alpha * slow) / root, (m, v, slow)

    def _ratio(self, h: Any, p: Any, g: Any, s: Sequence[Any], u: Any) -> Any:
        """How much of the step is made: min(1, max_unorm |p| / |u|), in float64, where |p| > 0."""
        k, c = self.k, self.c
        extra = k["eps"] if c.norm_eps and self.name == "lars" else 0.0
        if c.norm == "undecayed" and self.name == "lars":
            u = h.beta1 * s[0] + g
        if c.norm == "biased" and self.name == "lamb":
            u = u / h.unbias / h.root  # m / (sqrt(v) + eps c2)
        if not isinstance(u, Interval):
            norm, most = u.double().norm(), k["max_unorm"] * p.double().norm() + extra
            return (most / norm).float() if norm > most > 0 else torch.tensor(1.0)
        # A sum of n squares in any order: n roundings, and the same of p.
        off = 2 * u.low.numel() * 2.0**-24
        of_p, of_u = (Interval(x.abs().low.norm(), x.abs().high.norm()).widened(0.0, off) for x in (p, u))
        bound = Interval.point(k["max_unorm"]) * of_p + Interval.point(extra)
        if float(bound.high) <= 0:
            return Interval.point(1.0)
        ratio = bound / of_u
        return Interval(ratio.low.clamp(max=1.0), ratio.high.clamp(max=1.0))
