"""Wrong backends of what trains: backward passes, and optimizers with state in 32 and in 8 bits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kit_mutants import Mutant, following, mutant, right
from torch import Tensor

from bnbref import int8
from bnbref.conformance.dialects import REFERENCE
from bnbref.conformance.oracles.steps import BLOCKSIZE

MUTANTS: list[Mutant] = []
"""All of them."""

BOTH = ("optimizer_32bit", "optimizer_8bit")

# ---- conventions of real backends -----------------------------------------------------------------------------------

MUTANTS += [
    following("decay-after", replace(REFERENCE, decay_after=True), *BOTH),
    following("decay-in-adam's-gradient", replace(REFERENCE, coupled=True), *BOTH),
    following("raw-gradient", replace(REFERENCE, raw_gradient=True), "optimizer_8bit"),
    following("biased-norm", replace(REFERENCE, norm="biased"), "optimizer_32bit"),
    following("undecayed-norm", replace(REFERENCE, norm="undecayed"), "optimizer_32bit"),
    following("norm-and-eps", replace(REFERENCE, norm_eps=True), "optimizer_32bit"),
    following("clipped-in-32-bits-alone", replace(REFERENCE, clip_8bit=False), "optimizer_8bit"),
    following("infinite-scale", replace(REFERENCE, bad_gradient="infinite"), "optimizer_8bit"),
    following("binned-states", replace(REFERENCE, ties="bins"), "optimizer_8bit"),
]


# ---- one changed line: optimizers -----------------------------------------------------------------------------------


def _steps(name: str, wrong: str, change: Callable[..., Any], *operations: str) -> None:
    """A mutant whose step is made by `change(step, keyword arguments)`, of the reference's step."""

    def function(op: str) -> Callable[..., Any]:
        return lambda **arguments: change(right(op), arguments)

    MUTANTS.append(mutant(name, wrong, **{op: function(op) for op in operations or BOTH}))


def _with(**changed: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """The step with other arguments."""
    return lambda step, k: step(**{**k, **{name: make(k) for name, make in changed.items()}})


_steps("no-bias-correction", "averages are not corrected for their start", _with(step=lambda k: 10**6))
_steps("step-before", "bias corrections are those of the step before", _with(step=lambda k: max(k["step"] - 1, 1)))
_steps("step-after", "bias corrections are those of the next step", _with(step=lambda k: k["step"] + 1))
_steps(
    "betas-exchanged", "beta1 and beta2 are exchanged", _with(beta1=lambda k: k["beta2"], beta2=lambda k: k["beta1"])
)
_steps("eps-lost", "eps is dropped", _with(eps=lambda k: 0.0))
_steps("decay-lost", "weight decay is dropped", _with(weight_decay=lambda k: 0.0))
_steps("scale-lost", "gnorm_scale is dropped", _with(gnorm_scale=lambda k: 1.0))
_steps("alpha-lost", "AdEMAMix' alpha is 1", _with(alpha=lambda k: 1.0))
_steps("beta3-lost", "AdEMAMix' slow average is as fast as the other", _with(beta3=lambda k: k["beta1"]))
_steps("never-clipped", "max_unorm is dropped", _with(max_unorm=lambda k: 0.0), "optimizer_32bit")


def _ascent(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    return {**made, "p": (2 * k["p"].float() - made["p"].float()).to(k["p"].dtype)}


_steps("ascent", "the step goes up", _ascent)


def _eps_inside(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    if k["optimizer"] != "adam":
        return made
    b1, b2, t = k["beta1"], k["beta2"], k["step"]
    root = (made["state2"] / (1 - b2**t) + k["eps"]).sqrt()
    p = k["p"].float() * (1 - k["lr"] * k["weight_decay"]) - k["lr"] / (1 - b1**t) * made["state1"] / root
    return {**made, "p": p.to(k["p"].dtype)}


def _eps_uncorrected(step: Any, k: dict[str, Any]) -> Any:
    return step(**{**k, "eps": k["eps"] / (1 - k["beta2"] ** k["step"]) ** 0.5})


def _dampened(step: Any, k: dict[str, Any]) -> Any:
    scaled = k["g"] * (1 - k["beta1"]) if k["optimizer"] == "momentum" else k["g"]
    return step(**{**k, "g": scaled.to(k["g"].dtype)})


def _first_forgets(step: Any, k: dict[str, Any]) -> Any:
    """Takes every step of momentum for the first."""
    old = torch.zeros_like(k["state1"]) if k["optimizer"] == "momentum" else k["state1"]
    return step(**{**k, "state1": old})


def _zeros_skipped(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    old = {name: k[name] for name in made if not name.startswith("absmax")}
    return {name: torch.where(k["g"] == 0, old[name], x) if name in old else x for name, x in made.items()}


def _new_momentum(step: Any, k: dict[str, Any]) -> Any:
    """Lion by the sign of the momentum that it stores."""
    return step(**{**k, "beta1": k["beta2"]}) if k["optimizer"] == "lion" else step(**k)


def _nan_everywhere(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    return made if bool(k["g"].isfinite().all()) else {**made, "p": made["p"] * torch.nan}


def _half_parameter(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    return {**made, "p": made["p"].to(torch.bfloat16).to(made["p"].dtype)}


def _half_state(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    return {**made, "state1": made["state1"].half().float()}


def _in_place(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    k["g"].mul_(0.5)
    return made


def _tail_left(step: Any, k: dict[str, Any]) -> Any:
    """Whole blocks alone."""
    made = step(**k)
    whole = k["p"].numel() // BLOCKSIZE * BLOCKSIZE
    for name, x in made.items():
        if not name.startswith("absmax") and whole:
            x.view(-1)[whole:] = k[name].reshape(-1)[whole:]
    return made


_steps("eps-inside", "Adam's eps is added under the root", _eps_inside, "optimizer_32bit")
_steps("eps-uncorrected", "eps is added before the root's bias correction", _eps_uncorrected)
_steps("dampened", "momentum averages gradients where it should sum them", _dampened)
_steps("always-first", "every step of momentum is taken for the first", _first_forgets, "optimizer_32bit")
_steps("zeros-skipped", "elements whose gradient is zero are skipped", _zeros_skipped)
_steps("new-momentum", "Lion steps by the momentum that it stores", _new_momentum)
_steps("nan-everywhere", "one NaN in the gradient spoils the parameter", _nan_everywhere)
_steps("parameter-in-16-bits", "the parameter is rounded to bfloat16 on the way", _half_parameter)
_steps("state-in-16-bits", "the first state is kept in float16", _half_state, "optimizer_32bit")
_steps("gradient-modified", "the gradient is scaled in place", _in_place)
_steps("tail-left", "the last, partial block is not stepped", _tail_left, "optimizer_8bit")


# ---- one changed line: 8-bit states ---------------------------------------------------------------------------------


def _stale_scale(step: Any, k: dict[str, Any]) -> Any:
    return {**step(**k), "absmax1": k["absmax1"]}


def _sign_dropped(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    negative = k["values1"][made["state1"].long()] < 0
    return {**made, "state1": torch.where(negative, 254 - made["state1"], made["state1"])}


def _scales_exchanged(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    if "absmax2" not in made:
        return made
    return {**made, "absmax1": made["absmax2"], "absmax2": made["absmax1"]}


def _scale_overwritten(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    if "absmax3" in made and k["p"].numel() % BLOCKSIZE:
        made["absmax1"][-1] = made["absmax3"][0]
    return made


def _signed_map(step: Any, k: dict[str, Any]) -> Any:
    """Decodes second moments with the map of the first."""
    if k["values2"] is None:
        return step(**k)
    scale = k["absmax2"].repeat_interleave(BLOCKSIZE)[: k["p"].numel()].view(k["p"].shape)
    values = k["values1"][k["state2"].long()].abs() * scale
    again = right("quantize_blockwise")(values, k["values2"], BLOCKSIZE)
    return step(**{**k, "state2": again[0], "absmax2": again[1]})


def _block_512(step: Any, k: dict[str, Any]) -> Any:
    made = step(**k)
    absmax = made["absmax1"]
    return {**made, "absmax1": absmax[torch.arange(absmax.numel()) // 2 * 2]}


def _code_0(step: Any, k: dict[str, Any]) -> Any:
    """Zero has code 0, which the signed map decodes as -0.99."""
    made = step(**k)
    zero = k["values1"][made["state1"].long()] == 0
    return {**made, "state1": torch.where(zero, 0, made["state1"])}


_steps("stale-scale", "absmax is that of before the step", _stale_scale, "optimizer_8bit")
_steps("sign-dropped", "the first state is coded without its sign", _sign_dropped, "optimizer_8bit")
_steps("scales-exchanged", "the two states' scales are exchanged", _scales_exchanged, "optimizer_8bit")
_steps(
    "scale-overwritten",
    "the slow average's first scale is written over the other's last",
    _scale_overwritten,
    "optimizer_8bit",
)
_steps("one-map", "the second state is decoded with the map of the first", _signed_map, "optimizer_8bit")
_steps("scale-of-two-blocks", "two blocks have one scale", _block_512, "optimizer_8bit")
_steps("zero-is-code-0", "a zero state has code 0", _code_0, "optimizer_8bit")


# ---- one changed line: backward passes ------------------------------------------------------------------------------


def _forward_weight(grad: Tensor, shape: Any, **rest: Any) -> Any:
    """As many columns as the gradient has, of a weight that should be transposed: here its rows in reverse."""
    return right("gemm_4bit_backward")(grad=grad.flip(-1), shape=shape, **rest)


def _first_row_of_grad(grad: Tensor, **rest: Any) -> Any:
    y = right("gemm_4bit_backward")(grad=grad, **rest)
    y.view(-1, y.shape[-1])[1:] = 0
    return y


def _half_weight(grad: Tensor, absmax: Tensor, **rest: Any) -> Any:
    return right("gemm_4bit_backward")(grad=grad, absmax=absmax.bfloat16().float(), **rest)


def _wrong_statistics(a: Tensor, weight: Tensor, grad: Tensor) -> Any:
    """grad_weight of a gradient that is quantized by rows and scaled back by columns, as on CUDA."""
    rows = int8.as_matrix(grad)
    codes, _, _ = int8.quantize(rows)
    grad_a, _ = right("int8_backward")(a, weight, grad)
    scaled = codes.float() * rows.float().abs().amax(0) / 127
    return grad_a, (scaled.t() @ int8.as_matrix(a).float()).to(a.dtype)


def _unscaled(a: Tensor, weight: Tensor, grad: Tensor) -> Any:
    grad_a, grad_weight = right("int8_backward")(a, weight, grad)
    return grad_a * 127, grad_weight


def _transposed_gradient(a: Tensor, weight: Tensor, grad: Tensor) -> Any:
    grad_a, grad_weight = right("int8_backward")(a, weight, grad)
    return grad_a, grad_weight.flip(0)


def _in_bfloat16(x: Tensor, **rest: Any) -> Any:
    made = right("evaluate_then_train")(x=x, **rest)
    return {**made, "y": made["y"].to(torch.bfloat16).to(x.dtype)}


def _gradient_lost(**arguments: Any) -> Any:
    return {**right("evaluate_then_train")(**arguments), "grad_x": None}


def _scales_repacked(**arguments: Any) -> Any:
    made = right("evaluate_then_train")(**arguments)
    return {**made, "absmax": made["absmax"].bfloat16().float()}


MUTANTS += [
    mutant(
        "gradient-reversed",
        "the weight's rows are taken in another order backwards",
        gemm_4bit_backward=_forward_weight,
    ),
    mutant("first-row-of-gradient", "the gradient of the first row alone", gemm_4bit_backward=_first_row_of_grad),
    mutant("scales-in-16-bits", "backwards the scales are in bfloat16", gemm_4bit_backward=_half_weight),
    mutant(
        "statistics-of-the-other-axis",
        "the gradient is quantized by rows, scaled back by columns",
        int8_backward=_wrong_statistics,
    ),
    mutant("scale-of-127", "the input's gradient is 127 times too large", int8_backward=_unscaled),
    mutant(
        "gradient-of-other-rows",
        "the weight's gradient has its rows in another order",
        int8_backward=_transposed_gradient,
    ),
    mutant("evaluated-in-bfloat16", "evaluation computes in bfloat16", evaluate_then_train=_in_bfloat16),
    mutant("gradient-lost", "after an evaluation there is no gradient", evaluate_then_train=_gradient_lost),
    mutant("scales-repacked", "an evaluation leaves scales in bfloat16", evaluate_then_train=_scales_repacked),
]
