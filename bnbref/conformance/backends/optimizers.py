"""Optimizers by their packages: torch.optim, transformers' Adafactor, Schedule-Free and Muon of their authors, pytorch_optimizer.

A step is made by the package's own class, on a parameter whose state is that of the case.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Unsupported


def stepped(
    make: Callable[..., Any], p: Tensor, gradients: Tensor | list[Tensor], state: Mapping[str, Any], **options: Any
) -> tuple[Tensor, Any]:
    """The parameter p and its state after one step for each gradient. `make([p], **options)` makes the optimizer.

    p, state and gradients are copied before.
    """
    parameter = torch.nn.Parameter(p.clone())
    optimizer = make([parameter], **options)
    optimizer.state[parameter] = {key: x.clone() if isinstance(x, Tensor) else x for key, x in state.items()}
    for g in gradients if isinstance(gradients, list) else [gradients]:
        parameter.grad = g.clone()
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def _before(step: int) -> Tensor:
    return torch.tensor(float(step - 1))


class TorchOptim:
    """torch.optim; steps in a backward pass by a hook of torch."""

    packages = ("torch",)

    def optimizer_32bit(
        self, p: Tensor, g: Tensor, optimizer: str, state1: Tensor, state2: Tensor | None, step: int, **k: Any
    ) -> Any:
        options = {key: k[key] for key in ("lr", "weight_decay")}
        by_name: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
            "momentum": (torch.optim.SGD, ("momentum_buffer",), {"momentum": k["beta1"]}),
            "adam": (
                torch.optim.AdamW,
                ("exp_avg", "exp_avg_sq"),
                {"betas": (k["beta1"], k["beta2"]), "eps": k["eps"]},
            ),
            "rmsprop": (torch.optim.RMSprop, ("square_avg",), {"alpha": k["beta1"], "eps": k["eps"]}),
            "adagrad": (torch.optim.Adagrad, ("sum",), {"eps": k["eps"]}),
        }
        if optimizer not in by_name or k["gnorm_scale"] != 1 or p.dtype != torch.float32:
            raise Unsupported("torch.optim has SGD, AdamW, RMSprop and Adagrad of float32, without gnorm_scale")
        make, names, own = by_name[optimizer]
        states = dict(zip(names, (state1, state2), strict=False))
        new, state = stepped(make, p, g, {"step": _before(step), **states}, **options, **own)
        return new, *(state[name] for name in names)

    def muon(self, p: Tensor, g: Tensor, momentum: Tensor, beta: float, adjust: str, **k: Any) -> Any:
        new, state = stepped(
            torch.optim.Muon, p, g, {"momentum_buffer": momentum}, momentum=beta, adjust_lr_fn=adjust, **k
        )
        return new, state["momentum_buffer"]

    def adafactor(
        self, p: Tensor, g: Tensor, row: Tensor, column: Tensor, step: int, eps1: float, eps2: float, **k: Any
    ) -> Any:
        state = {"step": _before(step), "row_var": row[:, None], "col_var": column[None]}
        new, state = stepped(torch.optim.Adafactor, p, g, state, eps=(eps1, eps2), **k)
        return new, state["row_var"][:, 0], state["col_var"][0]

    def released_step(self, x: Tensor, weight1: Tensor, weight2: Tensor | None, grad: Tensor, lr: float) -> Any:
        parameters = [torch.nn.Parameter(w.clone()) for w in (weight1, weight2) if w is not None]

        def release(p: Tensor) -> None:
            torch.optim.SGD([p], lr=lr).step()
            p.grad = None

        for p in parameters:
            p.register_post_accumulate_grad_hook(release)
        (x @ parameters[0].t() @ parameters[-1].t()).backward(grad)
        return tuple(p.detach() for p in parameters)


class Transformers:
    """transformers' Adafactor."""

    packages = ("transformers",)

    def adafactor(
        self, p: Tensor, g: Tensor, row: Tensor, column: Tensor, step: int, lr: float, beta2_decay: float, eps1: float,
        eps2: float, d: float, weight_decay: float,
    ) -> Any:  # fmt: skip
        make = importlib.import_module("transformers.optimization").Adafactor
        state = {"step": step - 1, "RMS": 0, "exp_avg_sq_row": row, "exp_avg_sq_col": column}
        # There eps1 is added to the squares of the gradient; the rules have it as the least root of their product.
        options = {"eps": (eps1**2, eps2), "clip_threshold": d, "decay_rate": beta2_decay, "weight_decay": weight_decay}
        # The bound of the rate, by which torch and the paper mean lr, is a schedule of its own there.
        rate = min(lr, 1 / math.sqrt(step))
        new, state = stepped(make, p, g, state, lr=rate, relative_step=False, scale_parameter=True, **options)
        return new, state["exp_avg_sq_row"], state["exp_avg_sq_col"]


class ScheduleFree:
    """The package of Schedule-Free's authors."""

    packages = ("schedulefree",)

    def schedule_free(
        self, p: Tensor, z: Tensor, g: Tensor, squares: Tensor, step: int, beta1: float, beta2: float, lr: float,
        warmup_steps: int, **k: Any,
    ) -> Any:  # fmt: skip
        make = importlib.import_module("schedulefree").AdamWScheduleFree
        rates = [lr * min(1.0, t / max(1, warmup_steps)) for t in range(1, step)]

        def resumed(parameters: Any, **options: Any) -> Any:
            optimizer = make(parameters, **options)
            optimizer.train()
            so_far = {
                "k": step - 1,
                "lr_max": max(rates, default=-1.0),
                "weight_sum": math.fsum(rate**2 for rate in rates),
            }
            optimizer.param_groups[0].update(so_far)
            return optimizer

        options = {"lr": lr, "betas": (beta1, beta2), "warmup_steps": warmup_steps, "foreach": False}
        new, state = stepped(resumed, p, g, {"z": z, "exp_avg_sq": squares}, **options, **k)
        return new, state["z"], state["exp_avg_sq"]


class MuonOptimizer:
    """The package of Muon's author."""

    packages = ("muon",)

    def muon(
        self, p: Tensor, g: Tensor, momentum: Tensor, lr: float, beta: float, weight_decay: float, nesterov: bool, adjust: str,
        ns_steps: int, eps: float,
    ) -> Any:  # fmt: skip
        if adjust != "original":
            raise Unsupported("muon scales a step in one way alone")
        # Its class steps so, with nesterov and five turns.
        make, momentum = importlib.import_module("muon").muon_update, momentum.clone()
        update = make(g.clone(), momentum, beta, ns_steps, nesterov)
        return (p * (1 - lr * weight_decay)).add_(update, alpha=-lr), momentum


class PytorchOptimizer:
    """pytorch_optimizer's SOAP and Muon."""

    packages = ("pytorch_optimizer",)

    def muon(self, p: Tensor, g: Tensor, momentum: Tensor, beta: float, adjust: str, eps: float, **k: Any) -> Any:
        def grouped(parameters: Any, **options: Any) -> Any:
            make = importlib.import_module("pytorch_optimizer").Muon
            return make([{"params": parameters, "use_muon": True}], foreach=False, **options)

        adjusted = adjust == "match_rms_adamw"
        state = {"momentum_buffer": momentum}
        new, state = stepped(grouped, p, g, state, momentum=beta, use_adjusted_lr=adjusted, **k)
        return new, state["momentum_buffer"]

    def soap(self, g: Tensor, step: int, **given: Any) -> Any:
        new, state = self._soap([g], step, frequency=step + 1, **given)  # no refresh at this step
        return new, state["exp_avg"], state["exp_avg_sq"], *state["GG"]

    def soap_refresh(self, g: Tensor, then: Tensor, step: int, **given: Any) -> Any:
        new, state = self._soap([g, then], step, frequency=max(1, step), **given)
        return new, state["exp_avg"], *state["GG"]

    def _soap(
        self, gradients: list[Tensor], step: int, frequency: int, p: Tensor, momentum: Tensor, squares: Tensor, left: Tensor,
        right: Tensor, of_left: Tensor, of_right: Tensor, beta1: float, beta2: float, beta3: float, **k: Any,
    ) -> Any:  # fmt: skip
        make = importlib.import_module("pytorch_optimizer").SOAP
        options = {**k, "betas": (beta1, beta2), "shampoo_beta": beta3, "precondition_frequency": frequency}
        bases = {"GG": [left.clone(), right.clone()], "Q": [of_left, of_right], "shampoo_beta": beta3}
        state = {"exp_avg": momentum, "exp_avg_sq": squares, **bases, "precondition_frequency": frequency}
        if step == 0:
            state = {}  # the first gradient makes all of it

        def resumed(parameters: Any, **options: Any) -> Any:
            optimizer = make(parameters, **options)
            optimizer.param_groups[0]["step"] = step
            return optimizer

        return stepped(resumed, p, gradients, state, **options)
