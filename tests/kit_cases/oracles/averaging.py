"""Steps of Schedule-Free AdamW, with states in 32 and in 8 bits."""

import math
from typing import Any

from torch import Tensor

from bnbref.conformance.expected import Expected
from bnbref.conformance.oracles.formula import number, off_by, rest
from bnbref.conformance.oracles.intervals import SLACK, Interval
from kit_cases.oracles.adafactor import average, within
from kit_cases.oracles.squares import decoded, recoded


def _averaging(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, warmup_steps: int
) -> dict[str, tuple[float, float]]:
    """The numbers of a step of Schedule-Free: r is its rate, c its weight in the average."""
    rates = [lr * min(1.0, t / max(1, warmup_steps)) for t in range(1, step + 1)]
    r, c = rates[-1], rates[-1] ** 2 / math.fsum(x * x for x in rates)
    unbias = 1 - beta2**step
    numbers = average("b2", beta2) | {"unbias": number(unbias, unbias * off_by(unbias, step)), "eps": number(eps)}
    numbers |= {"wd": number(weight_decay), "r": number(r), "c": number(c), "not_c": rest(c)}
    return numbers | {"own": number(r * (1 - beta1 * (1 - c))), "pull": number(beta1 * c)}


def _direction(h: Any) -> tuple[Any, Any]:
    v = h.b2 * h.squares + h.not_b2 * (h.g * h.g)
    return h.g / ((v / h.unbias).sqrt() + h.eps) + h.wd * h.p, v


def schedule_free(p: Tensor, z: Tensor, g: Tensor, squares: Tensor, **numbers: Any) -> dict[str, Expected]:
    """Rules SF."""

    def formula(h: Any) -> dict[str, Any]:
        u, v = _direction(h)
        z = h.z - h.r * u
        # Kept as a distance, and added again: four roundings of numbers that are not larger than both.
        if isinstance(z, Interval):
            z = z.widened(SLACK * (h.p.abs() + h.z.abs()).high)
        return {"p": (h.not_c * h.p + h.c * h.z) - h.own * u, "z": z, "squares": v}

    return within(formula, {"p": p, "z": z, "g": g, "squares": squares}, _averaging(**numbers))


def schedule_free_8bit(
    p: Tensor, difference: Tensor, absmax1: Tensor, values1: Tensor, g: Tensor, squares: Tensor, absmax2: Tensor,
    values2: Tensor, **numbers: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules SD."""

    def formula(h: Any) -> dict[str, Any]:
        u, v = _direction(h)
        moved = h.p - h.own * u + h.pull * h.difference
        return {"p": moved, "difference": h.not_c * (h.difference - h.r * u), "squares": v}

    states = {"difference": decoded(difference, absmax1, values1), "squares": decoded(squares, absmax2, values2)}
    made = within(formula, {"p": p, "g": g, **states}, _averaging(**numbers))
    made["difference"], made["absmax1"] = recoded(made["difference"], absmax1, values1)
    made["squares"], made["absmax2"] = recoded(made["squares"], absmax2, values2)
    return made
