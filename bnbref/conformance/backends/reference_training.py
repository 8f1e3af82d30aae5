"""bnbref's steps that see whole matrices, average, correct 16-bit weights, or are made in the backward pass."""

from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.oracles.steps import BLOCKSIZE
from bnbref.optim import SGD, GradientRelease, master_weights, matrices, rules, schedule_free, update
from bnbref.optim.equation import at_step
from bnbref.optim.matrix_steps import step_together
from bnbref.optim.planned_steps import PlannedStep

Tensors = dict[str, Tensor]


def _whole(rule: rules.Rule, step: int, group: dict[str, Any], p: Tensor, g: Tensor, **states: Tensor) -> Tensors:
    """One step of a rule that sees whole matrices, on copies of the parameter and its states."""
    made = {name: x.clone() for name, x in {"p": p, **states}.items()}
    config = {"blocksize": BLOCKSIZE, "maximize": False, "stochastic_rounding": False}
    planned = PlannedStep(made["p"], g, config, *at_step(rule, step, group, p.device))
    step_together([planned], {made["p"]: made}, lambda each: [state for _, state in each])
    return made


def nonzero(rule: rules.Rule) -> rules.Rule:
    """The rule with squares in 8 bits that are never 0 where they were not, as `nonzero_squares=True` makes it."""
    signed, unsigned = rule.codebooks
    return rule.with_codebooks(signed, unsigned.nonzero())


def _numbered(made: Tensors) -> Tensors:
    """The results with the kit's names of scales."""
    names = {name: f"absmax{i}" for i, name in enumerate((n for n in made if n.endswith("_absmax")), 1)}
    return {names.get(name, name): x for name, x in made.items()}


class Training:
    """The operations that came with versions 2 and 4 of the vectors."""

    def schedule_free(self, p: Tensor, z: Tensor, g: Tensor, squares: Tensor, beta1: float, **group: Any) -> Tensors:
        states = {"difference": (z - p) / beta1, "squares": squares}
        made = self._averaged(schedule_free.ScheduleFree(), p, g, states, beta1=beta1, **group)
        return {"p": made["p"], "z": made["p"] + beta1 * made["difference"], "squares": made["squares"]}

    def schedule_free_8bit(
        self, p: Tensor, difference: Tensor, absmax1: Tensor, values1: Tensor, g: Tensor, squares: Tensor, absmax2: Tensor,
        values2: Tensor, **group: Any,
    ) -> Tensors:  # fmt: skip
        states = {"difference": difference, "difference_absmax": absmax1, "squares": squares, "squares_absmax": absmax2}
        return _numbered(self._averaged(nonzero(schedule_free.ScheduleFree()), p, g, states, **group))

    def _averaged(
        self,
        rule: rules.Rule,
        p: Tensor,
        g: Tensor,
        states: Tensors,
        step: int,
        beta1: float,
        beta2: float,
        **group: Any,
    ) -> Tensors:
        made = {name: x.clone() for name, x in {"p": p, **states}.items()}
        planned = at_step(rule, step, {**group, "betas": (beta1, beta2), "train_mode": True}, p.device)
        update.step(*planned, made["p"], g, made, blocksize=BLOCKSIZE)
        return made

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

    def soap(self, p: Tensor, g: Tensor, step: int, **states_and_numbers: Any) -> Tensors:
        # At a multiple of the frequency the bases would be refreshed.
        made = self._soap(matrices.SOAP(), p, g, step, frequency=step + 1, **states_and_numbers)
        return {name: x for name, x in made.items() if not name.startswith("of_")}

    def soap_8bit(self, p: Tensor, g: Tensor, step: int, absmax1: Tensor, absmax2: Tensor, values1: Tensor, values2: Tensor,
                  **rest: Any) -> Tensors:  # fmt: skip
        scales: dict[str, Any] = {"momentum_absmax": absmax1, "squares_absmax": absmax2}
        made = self._soap(nonzero(matrices.SOAP()), p, g, step, frequency=step + 1, **scales, **rest)
        return _numbered({name: x for name, x in made.items() if not name.startswith("of_")})

    def soap_refresh(self, p: Tensor, g: Tensor, then: Tensor, step: int, **rest: Any) -> Tensors:
        first: dict[str, Any] = self._soap(matrices.SOAP(), p, g, step, frequency=max(1, step), **rest)
        numbers = {name: x for name, x in rest.items() if not isinstance(x, Tensor)}
        made = self._soap(matrices.SOAP(), **first, g=then, step=step + 1, frequency=step + 2, **numbers)
        return {name: made[name] for name in ("p", "momentum", "left", "right")}

    def _soap(self, rule: rules.Rule, p: Tensor, g: Tensor, step: int, beta1: float, beta2: float, beta3: float, lr: float,
              eps: float, weight_decay: float, frequency: int, **states: Tensor) -> Tensors:  # fmt: skip
        group = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "betas": (beta1, beta2), "shampoo_beta": beta3}
        # Our first step, which makes the bases alone, is the kit's step 0.
        return _whole(rule, step + 1, {**group, "frequency": frequency}, p, g, **states)

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
