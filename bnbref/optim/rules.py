"""The rules that come with bnbref, each with its paper. What a rule is, and what it may do, is in `bnbref.optim.rule`.

Symbols: g gradient, t the step from 1, b1, b2, b3 the betas, wd weight_decay.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bnbref.arguments import written
from bnbref.codebooks import DYNAMIC
from bnbref.optim.kinds import SettingError, count, flag, number, one_of, weight, weights
from bnbref.optim.rule import (
    Coefficients,
    Rule,
    State,
    absmax_key,
    averages,
    coupled,
    decoupled,
    learning_rate,
    matrix_shape,
    qmap_key,
)

__all__ = [
    "LAMB", "LARS", "RULES", "SGD", "SIGNED_RULES", "AdEMAMix", "Adagrad", "Adam", "Coefficients", "Lion", "RMSprop", "Rule",
    "SettingError", "State", "absmax_key", "averages", "count", "coupled", "decoupled", "flag", "matrix_shape", "number",
    "one_of", "qmap_key", "weight", "weights",
]  # fmt: skip


class SGD(Rule):
    """Heavy-ball momentum, as in torch.optim.SGD (Sutskever et al., On the importance of initialization, 2013).  Coupled decay.

    m = b1 m + (g + wd p)            p = p - lr m
    """

    states = (State("state1"),)

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        return coupled(group) | {"b1": weights(group, many=1)[0]}

    def direction(self, p: Tensor, g: Tensor, m: Tensor, c: Any) -> tuple[Tensor, ...]:
        m = c.b1 * m + (g + c.wd * p)
        return m, m


class LARS(SGD):
    """SGD with a step no longer than a part of the parameter (You et al., 1708.03888; the clipping is bitsandbytes').  Coupled.

    p = p - lr min(1, max_unorm |p| / |m|) m         for |p| > 0
    """

    clipped = True


class Adam(Rule):
    """Kingma & Ba, 1412.6980, algorithm 1.  Decoupled decay (1711.05101, algorithm 2).

    m = b1 m + (1 - b1) g            m^ = m / (1 - b1^t)
    v = b2 v + (1 - b2) g^2          v^ = v / (1 - b2^t)
    p = (1 - lr wd) p - lr m^ / (sqrt(v^) + eps)
    """

    states = (State("state1"), State("state2", signed=False))

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = weights(group, many=2)
        numbers = decoupled(group) | averages(b1=b1, b2=b2)
        own = {"rate": numbers["rate"] / (1 - b1**t), "root": math.sqrt(1 - b2**t), "eps": number(group, "eps")}
        return numbers | own

    def direction(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Any) -> tuple[Tensor, ...]:
        m = c.b1 * m + c.not_b1 * g
        v = c.b2 * v + c.not_b2 * (g * g)
        return m / (self.sqrt(v) / c.root + c.eps), m, v


class LAMB(Adam):
    """Adam with a step no longer than the parameter (You et al., 1904.00962; the clipping is bitsandbytes').  Decoupled.

    p = (1 - lr wd) p - lr min(1, max_unorm |p| / |u|) u,       u = m^ / (sqrt(v^) + eps),        for |p| > 0
    """

    clipped = True

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        # The length of the direction counts, so 1 - b1^t belongs to it and not to the rate.
        unbias = 1 / (1 - weights(group, many=2)[0] ** t)
        return super().coefficients(t, group) | {"rate": learning_rate(group), "unbias": unbias}

    def direction(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Any) -> tuple[Tensor, ...]:
        u, m, v = super().direction(p, g, m, v, c)
        return c.unbias * u, m, v


class Lion(Rule):
    """Chen et al., 2302.06675, algorithm 2.  Decoupled decay.

    p = (1 - lr wd) p - lr sign(b1 m + (1 - b1) g)           m = b2 m + (1 - b2) g
    """

    states = (State("state1"),)

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = weights(group, many=2)
        return decoupled(group) | averages(b1=b1, b2=b2)

    def direction(self, p: Tensor, g: Tensor, m: Tensor, c: Any) -> tuple[Tensor, ...]:
        return (c.b1 * m + c.not_b1 * g).sign(), c.b2 * m + c.not_b2 * g


class RMSprop(Rule):
    """Tieleman & Hinton, Coursera lecture 6.5 (2012), as in torch.optim.RMSprop.  Coupled decay: g = g + wd p.

    v = a v + (1 - a) g^2            p = p - lr g / (sqrt(v) + eps)
    """

    states = (State("state1", signed=False),)

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        return coupled(group) | averages(a=weights(group, many=1)[0]) | {"eps": number(group, "eps")}

    def direction(self, p: Tensor, g: Tensor, v: Tensor, c: Any) -> tuple[Tensor, ...]:
        g = g + c.wd * p
        v = c.a * v + c.not_a * (g * g)
        return g / (self.sqrt(v) + c.eps), v


class Adagrad(Rule):
    """Duchi, Hazan & Singer, Adaptive Subgradient Methods (2011), as in torch.optim.Adagrad.  Coupled decay: g = g + wd p.

    v = v + g^2                      p = p - lr g / (sqrt(v) + eps)
    """

    states = (State("state1", signed=False),)

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        return coupled(group) | {"eps": number(group, "eps")}

    def direction(self, p: Tensor, g: Tensor, v: Tensor, c: Any) -> tuple[Tensor, ...]:
        g = g + c.wd * p
        v = v + g * g
        return g / (self.sqrt(v) + c.eps), v


class AdEMAMix(Rule):
    """Pagliardini et al., 2409.03137, algorithm 1: Adam with a second, slow momentum.  Decoupled decay.

    m1 = b1 m1 + (1 - b1) g          m2 = b3(t) m2 + (1 - b3(t)) g            v = b2 v + (1 - b2) g^2
    p  = (1 - lr wd) p - lr (m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(v^) + eps)

    alpha(t) = alpha min(1, t / t_alpha)
    b3(t)    = min(b3, exp(ln b1 ln b3 / ((1 - r) ln b3 + r ln b1))),     r = t / t_beta3
    """

    states = (State("state1"), State("state3"), State("state2", signed=False))
    stacked = ("state1", "state3")

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        (b1, b2, b3), alpha = weights(group, many=3), number(group, "alpha")
        t_alpha, t_beta3 = (0.0 if group[name] is None else number(group, name) for name in ("t_alpha", "t_beta3"))
        if t_alpha > 0:
            alpha = min(t * alpha / t_alpha, alpha)
        if t_beta3 > 0:
            if not b1 * b3 > 0:
                raise SettingError(
                    f"with t_beta3 the first and the last of betas must be above 0, got {written(group['betas'])}"
                )
            fast, slow, r = math.log(b1), math.log(b3), min(t / t_beta3, 1e300)  # by 5e-324 it would be infinite
            b3 = min(math.exp(fast * slow / ((1 - r) * slow + r * fast)), b3)
        own = {"unbias": 1 - b1**t, "root": math.sqrt(1 - b2**t), "alpha": alpha, "eps": number(group, "eps")}
        return decoupled(group) | averages(b1=b1, b2=b2, b3=b3) | own

    def direction(self, p: Tensor, g: Tensor, m1: Tensor, m2: Tensor, v: Tensor, c: Any) -> tuple[Tensor, ...]:
        m1 = c.b1 * m1 + c.not_b1 * g
        m2 = c.b3 * m2 + c.not_b3 * g
        v = c.b2 * v + c.not_b2 * (g * g)
        return (m1 / c.unbias + c.alpha * m2) / (self.sqrt(v) / c.root + c.eps), m1, m2, v


RULES: dict[str, Rule] = {
    "momentum": SGD(),
    "lars": LARS(),
    "adam": Adam(),
    "lamb": LAMB(),
    "lion": Lion(),
    "rmsprop": RMSprop(),
    "adagrad": Adagrad(),
    "ademamix": AdEMAMix(),
}
"""The rules that bitsandbytes has an operator for, by the operator's name for them: what proofs, kit and alias walk."""


SIGNED_RULES = {name: RULES[name].with_codebooks(DYNAMIC, DYNAMIC) for name in ("rmsprop", "adagrad")}
"""The rules whose only state is an average of squares, with the signed codebook that bitsandbytes has for it."""
