"""Cases of the optimizers' steps, with state in 32 bits; steps_8bit.py has those with state in 8 bits.

Hyper-parameters are numbers that float32 has, away from their defaults, so that little is left to the order of operations; one
case has the usual ones. Each case leaves all but one of decay, scaling of the gradient, clipping, zeros at nothing, so that
it fails for its own reason.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.case import Case
from bnbref.conformance.oracles.formula import CLIPPED, COUPLED, STATES
from kit_cases.inputs import cast, noise
from kit_cases.oracles import make

HYPER: dict[str, Any] = {
    "step": 17, "lr": 0.015625, "beta1": 0.875, "beta2": 0.96875, "beta3": 0.9921875, "alpha": 3.0, "eps": 0.0009765625,
    "weight_decay": 0.0, "max_unorm": 0.0, "gnorm_scale": 1.0,
}  # fmt: skip
USUAL: dict[str, Any] = {
    "step": 1000, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8, "weight_decay": 0.01,
}  # fmt: skip
SQUARES = ("rmsprop", "adagrad")


def hyper(name: str, **changed: Any) -> dict[str, Any]:
    """All hyper-parameters of a case, in one order."""
    return {"optimizer": name, **HYPER, **changed}


def average(count: int, seed: int, square: bool) -> Tensor:
    """A state as steps leave it: an average of gradients, or of their squares."""
    x = noise(count, seed) / 2
    return x * x + 0.015625 if square else x


def results(case: Case) -> dict[str, Tensor]:
    """The results of the step of a case, as the inputs of the next step."""
    return {key: expected.value for key, expected in case.expected.items()}


def squares(name: str) -> list[bool]:
    """Which states are averages of squares."""
    return [name in SQUARES, True, False][: STATES[name]]


def _states(name: str, count: int, seed: int) -> dict[str, Tensor]:
    return {f"state{i}": average(count, seed + i, square) for i, square in enumerate(squares(name), 1)}


def decay_flag(name: str) -> str:
    """The flag of the cases of weight decay of an optimizer."""
    return "coupled-decay" if name in COUPLED else "lion-decay" if name == "lion" else "adam-decay-order"


def optimizer_32bit(name: str) -> Iterator[Case]:
    """Cases of one optimizer with float32 state."""
    of_decay = decay_flag(name)

    def case(
        label: str, rules: str, flags: str = "", count: int = 100, seed: int = 0, dtype: str = "float32",
        inputs: dict[str, Tensor] | None = None, **changed: Any,
    ) -> Case:  # fmt: skip
        options = {key: changed.pop(key) for key in ("may_refuse", "quick", "layout") if key in changed}
        given = {"p": noise(count, 201 + seed), "g": noise(count, 202 + seed), **_states(name, count, 203 + seed)}
        given |= inputs or {}
        given |= {key: cast(given[key], dtype) for key in ("p", "g")}
        return make(f"{name}-{label}", "optimizer_32bit", given, rules, flags, **options, **hyper(name, **changed))

    zeros = {key: torch.zeros(100) for key in _states(name, 100, 0)}
    before = zeros
    for t, seed in ((1, 0), (2, 2), (3, 3)):
        made = case(f"step-{t}", "OS-1", "bias-correction", seed=seed, inputs=before, step=t)
        yield made
        before = results(made)
    # Some gradients are zero where the state is not: it decays all the same.
    g = noise(100, 229)
    g[::7] = 0
    yield case("resumed", "OS-1", "resume", inputs={"g": g})
    yield case("step-5000", "OS-1", "resume", step=5000, quick=False)
    yield case("usual", "OS-1", "", quick=False, **{**USUAL, "weight_decay": 0.0})
    yield case("small", "OS-1", "", inputs={"g": noise(100, 230) * 2.0**-20}, eps=2.0**-30, quick=False)
    yield case("decay", "OS-2", of_decay, weight_decay=0.25)
    yield case("decay-usual", "OS-2", of_decay, quick=False, **USUAL)
    yield case("scaled", "OS-3", "raw-gradient", gnorm_scale=0.5)
    half = (torch.arange(100) % 2).float()
    idle = {"g": noise(100, 231) * half, **{key: x * half for key, x in _states(name, 100, 232).items()}}
    yield case("zeros", "OS-4", "zero-state-drift", inputs=idle)
    bad = noise(100, 233)
    bad[7], bad[50], bad[99] = math.nan, math.inf, -math.inf
    yield case("not-finite", "OS-6", "bad-gradient", inputs={"g": bad})
    for count in (1, 31, 257):
        yield case(f"size-{count}", "OS-7", "tail-block", count=count, quick=count == 31)
    shaped = {key: x.view(20, 5) for key, x in {"p": noise(100, 234), "g": noise(100, 235)}.items()}
    shaped |= {key: x.view(20, 5) for key, x in _states(name, 100, 236).items()}
    yield case("matrix", "OS-7 G-1", inputs=shaped)
    if name in ("adam", "momentum"):
        for dtype in ("float16", "bfloat16"):
            # bitsandbytes' CUDA kernels have momentum in bfloat16 with 8-bit state alone.
            refused = name == "momentum" and dtype == "bfloat16"
            yield case(dtype, "OS-7", "rounding", dtype=dtype, may_refuse=refused)
            yield case(f"{dtype}-decay", "OS-2", of_decay, dtype=dtype, weight_decay=0.25, may_refuse=refused)
    if name in CLIPPED:
        yield case("clipped", "OS-5", "update-norm", max_unorm=0.0625, eps=0.0)
        yield case("clipped-step-1", "OS-5", "update-norm", max_unorm=0.0625, eps=0.0, inputs=zeros, step=1)
        yield case("clipped-eps", "OS-5", "update-norm", max_unorm=0.0625, eps=0.03125)
        yield case("clipped-decay", "OS-5", "update-norm", max_unorm=0.0625, eps=0.0, weight_decay=0.25)
        yield case("not-clipped", "OS-5", "update-norm", max_unorm=1000.0)
