"""bnbref's steps that see whole matrices, average, correct 16-bit weights, or are made in the backward pass."""

from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.oracles.steps import BLOCKSIZE
from bnbref.optim import SGD, GradientRelease, master_weights, matrices, rules, schedule_free, update
from bnbref.optim.equation import at_step
from bnbref.optim.matrix_steps import Job, step_together

Tensors = dict[str, Tensor]


def _whole(rule: rules.Rule, step: int, group: dict[str, Any], p: Tensor, g: Tensor, **states: Tensor) -> Tensors:
    """A step of a matrix, of copies."""
    made = {name: x.clone() for name, x in {"p": p, **states}.items()}
    job = Job(made["p"], made["p"], g.contiguous(), made, BLOCKSIZE, None, None)
    step_together(*at_step(rule, step, group, p.device), [job], lambda each: [state for _, state in each])
    return made


class Training:
    """The operations that came with version 2."""

    def schedule_free(self, p: Tensor, z: Tensor, g: Tensor, squares: Tensor, step: int, beta1: float, beta2: float,
                      **group: Any) -> Tensors:  # fmt: skip
        state = {"difference": (z - p) / beta1, "squares": squares.clone()}
        group |= {"betas": (beta1, beta2), "train_mode": True}
        p = p.clone()
        update.step(*at_step(schedule_free.ScheduleFree(), step, group, p.device), p, g, state, blocksize=BLOCKSIZE)
        return {"p": p, "z": p + beta1 * state["difference"], "squares": state["squares"]}

    def muon(self, p: Tensor, g: Tensor, momentum: Tensor, nesterov: bool, adjust: str, ns_steps: int, eps: float, beta: float,
             absmax: Tensor | None = None, values: Tensor | None = None, **group: Any) -> Tensors:  # fmt: skip
        rule = matrices.Muon(nesterov, steps=ns_steps, adjust=adjust)
        scales = {} if absmax is None else {"momentum_absmax": absmax}
        made = _whole(rule, 1, {**group, "momentum": beta, "eps": eps}, p, g, momentum=momentum, **scales)
        return {name.removeprefix("momentum_"): x for name, x in made.items()}

    muon_8bit = muon

    def adafactor(self, p: Tensor, g: Tensor, row: Tensor, column: Tensor, step: int, eps1: float, eps2: float, d: float,
                  **group: Any) -> Tensors:  # fmt: skip
        rule = matrices.Adafactor(eps=(eps1, eps2), d=d)
        return _whole(rule, step, {**group, "beta1": 0.0}, p, g, row=row, column=column)

    def soap(self, p: Tensor, g: Tensor, step: int, beta1: float, beta2: float, beta3: float, lr: float, eps: float,
             weight_decay: float, **states: Tensor) -> Tensors:  # fmt: skip
        # Our first step makes the bases alone; at a multiple of the frequency they would be refreshed.
        group = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "betas": (beta1, beta2), "shampoo_beta": beta3}
        made = _whole(matrices.SOAP(), step + 1, {**group, "frequency": step + 1}, p, g, **states)
        return {name: x for name, x in made.items() if not name.startswith("of_")}

    def split_weight(self, x: Tensor, dtype: torch.dtype, bits: int) -> tuple[Tensor, ...]:
        return master_weights.split(x, dtype, {24: torch.int8, 32: torch.int16}[bits])

    def join_weight(self, p: Tensor, correction: Tensor) -> Tensor:
        return master_weights.joined(p, correction)

    def released_step(
        self, x: Tensor, weight1: Tensor, weight2: Tensor | None, grad: Tensor, lr: float
    ) -> tuple[Tensor, ...]:
        parameters = [torch.nn.Parameter(w.clone()) for w in (weight1, weight2) if w is not None]
        GradientRelease(SGD(parameters, lr=lr, momentum=0.5))
        (x @ parameters[0].t() @ parameters[-1].t()).backward(grad)
        return tuple(p.detach() for p in parameters)
