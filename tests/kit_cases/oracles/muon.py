"""One step of Muon, where its result is known within bounds: gradients whose rows, or columns, have numbers of one magnitude and
are orthogonal to each other.

Of such a matrix X, each row a number s times a unit vector, the iteration makes f(s) times that vector, whatever the order of
its sums: X X^T is diagonal, and what rounding takes from a row it takes from each of its elements. So bfloat16 is followed
number by number. Of any other matrix the five steps make of a rounding, 2^-8 of the largest number, up to 3.4445^5 = 485 times
that, and no bound would tell a right result from a wrong one.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.expected import UNIT, Expected
from bnbref.conformance.oracles.formula import number
from bnbref.conformance.oracles.intervals import SLACK, Interval
from kit_cases.oracles.adafactor import average
from kit_cases.oracles.matrices import total
from kit_cases.oracles.squares import decoded, recoded

A, B, C = 3.4445, -4.775, 2.0315
"""f(s) = A s + B s^3 + C s^5: one step of the iteration."""

TURNS = tuple(math.sqrt((-3 * B + sign * math.sqrt(9 * B * B - 20 * A * C)) / (10 * C)) for sign in (-1, 1))
"""Where f has its largest and its smallest value: f' = A + 3 B s^2 + 5 C s^4 is 0."""

PIECES = 64
"""An interval is followed in pieces: what rounding may take depends on where in it a number is."""


def _f(s: Tensor) -> Tensor:
    q = s * s
    return s * (A + q * (B + q * C))


def _turn(s: Interval) -> Interval:
    """f of every number of the intervals, above 0. Each product, multiple and sum is rounded to bfloat16 on its own."""
    unit = UNIT[torch.bfloat16]
    ends = torch.arange(PIECES + 1, dtype=torch.float64) / PIECES * (s.high - s.low)[:, None] + s.low[:, None]
    low, high = ends[:, :-1], ends[:, 1:]
    candidates = [_f(x) for x in (low, high, *(torch.full_like(low, turn).clamp(low, high) for turn in TURNS))]
    least, most = torch.stack(candidates).amin(0), torch.stack(candidates).amax(0)
    q = high * high
    polynomial = abs(B) * q + C * q * q
    # X X^T; of the polynomial B times it, its square, C times that, their sum; its product with X, A X, and the sum.
    roundings = q * (abs(B) + 2 * C * q) + (abs(B) * q + 2 * C * q * q + polynomial) + (polynomial + A)
    off = (unit * (high * roundings + most.abs())) * (1 + unit) ** 8  # products of them: not more than eight in a row
    return Interval((least - off).amin(1).clamp(min=0), (most + off).amax(1))


def _orthogonal(x: Tensor, off: float, steps: int, eps: float) -> tuple[Tensor, Interval]:
    """The iteration's result, in float64 and within bounds, where numbers of x are off by `off` times their size.

    Raises ValueError where no bound is known.
    """
    if x.shape[0] > x.shape[1]:
        value, bounds = _orthogonal(x.mT, off, steps, eps)
        return value.mT, bounds.mT
    size, sign = x.abs().amax(1), x.sign()
    count = (sign * sign).sum(1)
    if not torch.equal(x, sign * size[:, None]) or not torch.equal(sign @ sign.mT, count.diag()):
        raise ValueError(
            "rows must be orthogonal, each of numbers of one magnitude: else no bound of the iteration is known"
        )
    each_row = size * count.sqrt()
    s = each_row / total((each_row * each_row).unbind()).sqrt().clamp(min=eps)
    # The matrix, its norm and their quotient are rounded; the norm is off as its numbers are.
    relative = (1 + UNIT[torch.bfloat16]) ** 4 - 1 + 2 * off
    bounds = Interval(s - relative * s, s + relative * s)
    for _ in range(steps):
        s, bounds = _f(s), _turn(bounds)
    unit_rows = sign / count.clamp(min=1).sqrt()[:, None]
    ends = [unit_rows * end[:, None] for end in (bounds.low, bounds.high)]
    return unit_rows * s[:, None], Interval(torch.minimum(*ends), torch.maximum(*ends))


def _step(
    p: Tensor, g: Tensor, momentum: Interval, lr: float, beta: float, weight_decay: float, nesterov: bool, adjust: str,
    ns_steps: int, eps: float,
) -> tuple[Expected, Tensor, Interval]:  # fmt: skip
    """(the new p, the new momentum in float64 and within bounds)."""
    old, g = momentum.middle, g.double()
    m = beta * old + (1 - beta) * g
    x = beta * m + (1 - beta) * g if nesterov else m
    numbers = {**average("b", beta), "decay": number(1 - lr * weight_decay)}
    h = SimpleNamespace(**{name: Interval.near(n, off) for name, (n, off) in numbers.items()})
    m_within = h.b * momentum + h.not_b * Interval.point(g)
    x_within = h.b * m_within + h.not_b * Interval.point(g) if nesterov else m_within
    off = torch.where(x == 0, 0.0, (x_within.high - x_within.low) / x.abs()).amax()
    value, u = _orthogonal(x, float(off), ns_steps, eps)
    rows, columns = p.shape
    scale = lr * (math.sqrt(max(1, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(rows, columns)))
    new = h.decay * Interval.point(p) - Interval.near(scale, SLACK * scale) * u
    exact = (1 - lr * weight_decay) * p.double() - scale * value
    return Expected(exact.float(), low=new.low, high=new.high), m, m_within


def muon(p: Tensor, g: Tensor, momentum: Tensor, **k: Any) -> dict[str, Expected]:
    """Rules MU."""
    new, m, bounds = _step(p, g, Interval.point(momentum), **k)
    return {"p": new, "momentum": Expected(m.float(), low=bounds.low, high=bounds.high)}


def muon_8bit(p: Tensor, g: Tensor, momentum: Tensor, absmax: Tensor, values: Tensor, **k: Any) -> dict[str, Expected]:
    """Rules MB."""
    new, m, bounds = _step(p, g, decoded(momentum, absmax, values), **k)
    codes, scales = recoded(Expected(m.float(), low=bounds.low, high=bounds.high), absmax, values)
    return {"p": new, "momentum": codes, "absmax": scales}
