"""Wrong backends of what came with version 2, each in one way: optimizers, corrections of weights, released steps."""

from typing import Any

import torch
from kit_mutants import Mutant, mutant, right
from torch import Tensor

from bnbref.optim import matrices

MUTANTS: list[Mutant] = []
"""All of them."""


def _add(name: str, wrong: str, operation: str, function: Any) -> None:
    MUTANTS.append(mutant(name, wrong, **{operation: function}))


def _changed(name: str, wrong: str, operation: str, **change: Any) -> None:
    """The right step of other arguments: each is made of those of the case."""
    _add(
        name, wrong, operation, lambda **k: right(operation)(**{**k, **{key: make(k) for key, make in change.items()}})
    )


def _replaced(name: str, wrong: str, operation: str, **change: Any) -> None:
    """The right step with other results: each is made of the results and the arguments."""

    def function(**k: Any) -> Any:
        made = right(operation)(**k)
        return {**made, **{key: make(made, k) for key, make in change.items() if key in made}}

    _add(name, wrong, operation, function)


# ---- Muon -----------------------------------------------------------------------------------------------------------


def _directed(name: str, wrong: str, direction: Any) -> None:
    """A step of Muon whose direction is made by `direction(x, k, s)`, of what is orthogonalised and of the scale."""

    def function(p: Tensor, g: Tensor, momentum: Tensor, **k: Any) -> Any:
        m = k["beta"] * momentum + (1 - k["beta"]) * g
        x = k["beta"] * m + (1 - k["beta"]) * g if k["nesterov"] else m
        rows, columns = x.shape
        s = max(1, rows / columns) ** 0.5 if k["adjust"] == "original" else 0.2 * max(rows, columns) ** 0.5
        return {"p": (1 - k["lr"] * k["weight_decay"]) * p - k["lr"] * direction(x, k, s), "momentum": m}

    _add(name, wrong, "muon", function)


def _newton_schulz(x: Tensor, k: Any, more: int = 0, **own: Any) -> Tensor:
    return matrices.newton_schulz(x, steps=k["ns_steps"] + more, eps=k["eps"], **own).float()


def _by_largest(x: Tensor, k: Any, s: float) -> Tensor:
    y = x / torch.linalg.matrix_norm(x, 2).clamp(min=1e-7)
    for _ in range(k["ns_steps"]):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.775 * gram + 2.0315 * gram @ gram) @ y
    return s * y


def _columns_by_rows(x: Tensor, k: Any, s: float) -> Tensor:
    return max(1, x.shape[1] / x.shape[0]) ** 0.5 * _newton_schulz(x, k)


_directed("muon-cubic", "Newton and Schulz' own coefficients, 1.5 and -0.5",
          lambda x, k, s: s * _newton_schulz(x, k, coefficients=(1.5, -0.5, 0.0)))  # fmt: skip
_directed("muon-off-by-4-percent", "the first coefficient is 3.3",
          lambda x, k, s: s * _newton_schulz(x, k, coefficients=(3.3, -4.775, 2.0315)))  # fmt: skip
_directed("muon-one-turn-more", "one turn more", lambda x, k, s: s * _newton_schulz(x, k, more=1))
_directed("muon-by-largest", "divided by the largest singular value", _by_largest)
_directed("muon-columns-by-rows", "the step is scaled by columns over rows", _columns_by_rows)
_changed("muon-sums", "the momentum is a sum, not an average", "muon", g=lambda k: k["g"] / (1 - k["beta"]))
_changed("muon-nesterov-lost", "nesterov is dropped", "muon", nesterov=lambda k: False)
_changed("muon-decay-lost", "weight decay is dropped", "muon", weight_decay=lambda k: 0.0)
_replaced(
    "muon-8bit-stale-scale",
    "absmax of the momentum is that of before the step",
    "muon_8bit",
    absmax=lambda _, k: k["absmax"],
)
_replaced("muon-8bit-columns", "the blocks of the momentum run along columns", "muon_8bit",
          momentum=lambda made, k: made["momentum"].t().reshape(made["momentum"].shape))  # fmt: skip


# ---- Adafactor ------------------------------------------------------------------------------------------------------

_changed(
    "adafactor-by-norm", "the direction is clipped by its norm", "adafactor", d=lambda k: k["d"] / k["g"].numel() ** 0.5
)
_changed("adafactor-resumed-as-first", "every step is taken for the first", "adafactor", step=lambda k: 1)
_replaced("adafactor-sums", "means of squares are sums", "adafactor", row=lambda made, k: made["row"] * k["g"].shape[1])
_replaced("adafactor-absolute", "the rate is not times the size of p", "adafactor",
          p=lambda made, k: k["p"] + (made["p"] - k["p"]) / k["p"].square().mean().sqrt().clamp(min=k["eps2"]))  # fmt: skip


# ---- SOAP -----------------------------------------------------------------------------------------------------------

_changed(
    "soap-bases-transposed",
    "the bases are transposed",
    "soap",
    of_left=lambda k: k["of_left"].t(),
    of_right=lambda k: k["of_right"].t(),
)
_changed("soap-uncorrected", "averages are not corrected for their start", "soap", step=lambda k: 10**6)
_replaced("soap-own-axes", "squares are kept in the axes of p", "soap",
          squares=lambda made, k: k["beta2"] * k["squares"] + (1 - k["beta2"]) * k["g"] ** 2)  # fmt: skip
_replaced("soap-means-of-momentum", "the bases' means are of the momentum", "soap",
          left=lambda made, k: k["beta3"] * k["left"] + (1 - k["beta3"]) * made["momentum"] @ made["momentum"].t())  # fmt: skip


# ---- Schedule-Free --------------------------------------------------------------------------------------------------


def _z_by_gradient_alone(made: Any, k: Any) -> Tensor:
    """z without the decay that p has."""
    return right("schedule_free")(**{**k, "weight_decay": 0.0})["z"]


def _plain_average(**k: Any) -> Any:
    made, warm = right("schedule_free")(**k), max(1, k["warmup_steps"])
    rates = [min(1.0, t / warm) for t in range(1, k["step"] + 1)]
    r, wanted, c = k["lr"] * rates[-1], rates[-1] ** 2 / sum(x * x for x in rates), 1 / k["step"]
    u = (k["z"] - made["z"]) / r
    p = made["p"] + (c - wanted) * (k["z"] - k["p"]) - r * k["beta1"] * (c - wanted) * u
    return {**made, "p": p}


_add("schedule-free-plain-average", "every step has the same weight in the average", "schedule_free", _plain_average)
_changed("schedule-free-first", "every step is taken for the first", "schedule_free", step=lambda k: 1)
_replaced("schedule-free-decay-of-p", "z has no decay", "schedule_free", z=_z_by_gradient_alone)
_replaced("schedule-free-z-stays", "z is that of before the step", "schedule_free", z=lambda _, k: k["z"])


# ---- weights and released steps -------------------------------------------------------------------------------------


def _to_even(x: Tensor, dtype: torch.dtype, bits: int) -> Any:
    p, correction = right("split_weight")(x, dtype, bits)
    even = x.to(dtype)
    return even, torch.where(even == p, correction, -correction)


def _towards_infinity(p: Tensor, correction: Tensor) -> Any:
    """A correction that is added to the number, not to its magnitude."""
    return right("join_weight")(p, torch.where(p < 0, -correction, correction))


def _uncorrected(**k: Any) -> Any:
    made = right("corrected_step")(**{**k, "correction": torch.zeros_like(k["correction"])})
    return {**made, "correction": torch.zeros_like(k["correction"])}


def _last_first(x: Tensor, weight1: Tensor, grad: Tensor, lr: float, weight2: Tensor | None = None) -> Any:
    """The second weight is stepped before the first one's gradient is made of it."""
    if weight2 is None:
        return right("released_step")(x=x, weight1=weight1, weight2=None, grad=grad, lr=lr)
    new2 = weight2 - lr * grad.t() @ (x @ weight1.t())
    return weight1 - lr * (grad @ new2).t() @ x, new2


def _twice(x: Tensor, weight1: Tensor, grad: Tensor, lr: float, weight2: Tensor | None = None) -> Any:
    """A weight that is used twice is stepped twice: the second gradient is of what the first step left."""
    if weight2 is not None:
        return right("released_step")(x=x, weight1=weight1, weight2=weight2, grad=grad, lr=lr)
    new = weight1 - lr * grad.t() @ (x @ weight1.t())
    return new - lr * (grad @ new).t() @ x


_add("split-ties-to-even", "a weight is rounded to even", "split_weight", _to_even)
_add("join-towards-infinity", "a correction is added to a negative weight too", "join_weight", _towards_infinity)
_add("corrections-lost", "the correction is not read, and written as 0", "corrected_step", _uncorrected)
_add(
    "stepped-before-used", "a weight is stepped before an earlier gradient is made of it", "released_step", _last_first
)
_add("tied-stepped-twice", "a weight that is used twice is stepped twice", "released_step", _twice)
