"""Steps of SOAP: between two refreshes of its bases, and two steps with a refresh between them.

What a refresh makes of a basis is unique but for the signs and the order of its columns, and what is stepped in it is the same
whatever both are. So a refresh is judged by the step after it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.expected import Expected
from bnbref.conformance.oracles.formula import number, off_by
from bnbref.conformance.oracles.intervals import UNIT, Interval
from kit_cases.oracles.adafactor import average, within
from kit_cases.oracles.matrices import product, total

Inputs = Mapping[str, Tensor | Interval]
MOVED = ("p", "momentum", "left", "right")
"""The results of a step that do not depend on the order and the signs of the bases' columns."""


def _numbers(
    step: int, lr: float, beta1: float, beta2: float, beta3: float, eps: float, weight_decay: float
) -> dict[str, tuple[float, float]]:
    first, second = 1 - beta1**step, 1 - beta2**step
    numbers = average("b1", beta1) | average("b2", beta2) | average("b3", beta3) | {"eps": number(eps)}
    numbers |= {"rate": number(lr / first, lr / first * off_by(first, step)), "decay": number(1 - lr * weight_decay)}
    return numbers | {"root": number(math.sqrt(second), math.sqrt(second) * off_by(second, step))}


def _means(h: Any) -> dict[str, Any]:
    means = {"left": product(h.g, h.g.mT), "right": product(h.g.mT, h.g)}
    return {name: h.b3 * getattr(h, name) + h.not_b3 * x for name, x in means.items()}


def _formula(h: Any) -> dict[str, Any]:
    m = h.b1 * h.momentum + h.not_b1 * h.g
    x, y = (product(product(h.of_left.mT, side), h.of_right) for side in (h.g, m))
    v = h.b2 * h.squares + h.not_b2 * (x * x)
    u = product(product(h.of_left, y / (v.sqrt() / h.root + h.eps)), h.of_right.mT)
    return {"p": h.decay * h.p - h.rate * u, "momentum": m, "squares": v, **_means(h)}


def one_step(tensors: Inputs, **numbers: Any) -> dict[str, Expected]:
    """A step between two refreshes. The tensors are those of the rules SO, by name."""
    return within(_formula, tensors, _numbers(**numbers))


def soap(
    p: Tensor, g: Tensor, momentum: Tensor, squares: Tensor, left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor,
    **numbers: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules SO."""
    tensors = {"p": p, "g": g, "momentum": momentum, "squares": squares}
    return one_step({**tensors, "left": left, "right": right, "of_left": of_left, "of_right": of_right}, **numbers)


def soap_refresh(
    p: Tensor, g: Tensor, then: Tensor, momentum: Tensor, squares: Tensor, left: Tensor, right: Tensor, of_left: Tensor,
    of_right: Tensor, step: int, **numbers: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules SR."""
    tensors: dict[str, Tensor | Interval] = {
        "p": p, "g": g, "momentum": momentum, "squares": squares, "left": left, "right": right, "of_left": of_left,
        "of_right": of_right,
    }  # fmt: skip
    if step:
        first = one_step(tensors, step=step, **numbers)
    else:
        first = within(_means, tensors, _numbers(1, **numbers))
    tensors |= {name: Interval.within(x) for name, x in first.items()}
    for side, basis in (("left", of_left), ("right", of_right)):
        mean = Interval.within(first[side])
        tensors[f"of_{side}"] = _refreshed(mean, basis.double()) if bool(basis.any()) else _eigenvectors(mean)
    second = one_step({**tensors, "g": then}, step=step + 1, **numbers)
    return {name: second[name] for name in MOVED}


# ---- bases ----------------------------------------------------------------------------------------------------------


def _norm(x: Tensor) -> float:
    return math.sqrt(total((x * x).reshape(-1).unbind()))


def _orthonormal(x: Tensor) -> tuple[Tensor, float]:
    """The factor Q of x = Q R by Gram and Schmidt, and a bound of the inverse of R.

    Each column is made orthogonal twice, by sums of one order, so that the bits are the same everywhere.
    """
    columns: list[Tensor] = []
    sizes = []
    for column in x.mT:
        for _ in range(2):
            for q in columns:
                column = column - q * total((q * column).unbind())
        sizes.append(_norm(column))
        columns.append(column / sizes[-1])
    q = torch.stack(columns, -1)
    r, inverse = product(q.mT, x), torch.zeros_like(x)
    for i in reversed(range(len(sizes))):
        rest = product(r[i : i + 1, i + 1 :], inverse[i + 1 :]) if i + 1 < len(sizes) else torch.zeros(1, len(sizes))
        inverse[i] = (torch.eye(len(sizes), dtype=x.dtype)[i] - rest[0]) / r[i, i]
    return q, _norm(inverse)


def _refreshed(mean: Interval, basis: Tensor) -> Interval:
    """Q of qr(mean basis), columns from the largest quotient of Rayleigh to the smallest, each put back in its place.

    The product and the decomposition are those of a matrix that is `error` off: by Householder twice n^2 unit roundoffs of its
    length. Q is then (1 + sqrt 2) |R^-1| error off (Sun, 1991), and itself rounded. Raises ValueError where that is too much, or
    the order is not certain.
    """
    n, middle = len(basis), mean.middle
    power = product(middle, basis)
    quotients = total((basis * power).unbind())
    order = quotients.argsort(descending=True, stable=True)
    q, inverse = _orthonormal(power[:, order])
    error = _norm(product((mean.high - mean.low) / 2, basis.abs()))
    error += 2 * (n + 1) * UNIT * _norm(product(middle.abs(), basis.abs())) + 2 * n**2 * UNIT * _norm(power)
    if error * inverse > 0.01 or float(-quotients[order].diff().amax()) < 4 * error:
        raise ValueError("the means must be far from singular, and their quotients of Rayleigh from each other")
    off = (1 + math.sqrt(2)) * inverse * error / (1 - inverse * error) + 2 * n * n * math.sqrt(n) * UNIT
    return Interval(q - off, q + off)[:, order.argsort()]


def _eigenvectors(mean: Interval) -> Interval:
    """The eigenvectors of a mean that is `error` off: they are turned by that over the least distance of two eigenvalues.

    Raises ValueError where that is too much.
    """
    n, middle = len(mean.low), mean.middle
    q = torch.eye(n, dtype=torch.float64)
    for _ in range(200):
        q, _ = _orthonormal(product(middle, q))
    values = total((q * product(middle, q)).unbind())
    left = _norm(product(middle, q) - q * values)
    error = _norm((mean.high - mean.low) / 2) + 2 * n**2 * UNIT * _norm(middle) + left
    gap = float(-values.diff().amax())
    if gap < 100 * error:
        raise ValueError("the eigenvalues of the means must be far from each other")
    off = math.sqrt(2) * error / (gap - error) + 2 * n * n * math.sqrt(n) * UNIT
    return Interval(q - off, q + off)
