"""optax: optimizers in JAX, as its functions make them.

A step is made of the state that `init` gives, with the numbers of the case in it.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bnbref.conformance.backends import Unsupported, require


def _filled(state: Any, new: Mapping[str, Any]) -> Any:
    """The nest of named tuples `state`, with the arrays of `new` in the fields of these names, however deep they are."""
    if isinstance(state, dict):
        return {key: _filled(x, new) for key, x in state.items()}
    if hasattr(state, "_fields"):
        fields = state._asdict().items()
        return type(state)(
            *(new[name] if name in new and hasattr(x, "dtype") else _filled(x, new) for name, x in fields)
        )
    return tuple(_filled(x, new) for x in state) if isinstance(state, tuple) else state


def _arrays(state: Any, name: str) -> Iterator[Any]:
    """The arrays in the fields of that name in a nest of named tuples."""
    if hasattr(getattr(state, name, None), "dtype"):
        yield getattr(state, name)
    for part in state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ():
        yield from _arrays(part, name)


class Optax:
    """Optimizers that an argument of optax makes those of the kit: of LAMB, LARS and Adagrad it has other formulas."""

    packages = ("optax", "jax")

    def __init__(self) -> None:
        self.optax, self.jax = require("optax"), require("jax")

    def _jax(self, x: Tensor) -> Any:
        # A copy of NumPy's: JAX takes no address that is not a multiple of 64 bytes without one.
        return self.jax.numpy.asarray(x.detach().contiguous().numpy())

    def _step(
        self, make: Any, p: Tensor, g: Tensor, states: Mapping[str, Tensor], **numbers: Any
    ) -> tuple[Tensor, ...]:
        """The new p, and the states of these names. numbers: other fields of the state."""
        old = self._jax(p)
        fields = {name: self._jax(x) for name, x in states.items()}
        fields |= {name: self.jax.numpy.asarray(x) for name, x in numbers.items()}
        updates, state = make.update(self._jax(g), _filled(make.init(old), fields), old)
        new = (self.optax.apply_updates(old, updates), *(next(_arrays(state, name)) for name in states))
        return tuple(from_dlpack(x).clone() for x in new)

    def optimizer_32bit(
        self, p: Tensor, g: Tensor, optimizer: str, state1: Tensor, state2: Tensor | None, state3: Tensor | None, step: int,
        lr: float, beta1: float, beta2: float, beta3: float, alpha: float, eps: float, weight_decay: float, gnorm_scale: float,
        max_unorm: float,
    ) -> Any:  # fmt: skip
        o = self.optax
        if gnorm_scale != 1 or p.dtype != torch.float32:
            raise Unsupported("optax' functions have no gnorm_scale, and are asked for float32 here")
        match optimizer:
            case "adam":
                make, names = o.adamw(lr, beta1, beta2, eps, weight_decay=weight_decay), ["mu", "nu"]
            case "lion":
                make, names = o.lion(lr, beta1, beta2, weight_decay=weight_decay), ["mu"]
            case "momentum":
                make, names = o.chain(o.add_decayed_weights(weight_decay), o.sgd(lr, beta1)), ["trace"]
            case "rmsprop":
                own = o.rmsprop(lr, beta1, eps, eps_in_sqrt=False)
                make, names = o.chain(o.add_decayed_weights(weight_decay), own), ["nu"]
            case "ademamix":
                make = o.contrib.ademamix(lr, beta1, beta2, beta3, alpha, eps=eps, weight_decay=weight_decay)
                names = ["m1", "nu", "m2"]
            case _:
                raise Unsupported(f"optax has another {optimizer}")
        states = {name: x for name, x in zip(names, (state1, state2, state3), strict=False) if x is not None}
        return self._step(make, p, g, states, count=step - 1, count_m2=step - 1)

    def muon(
        self, p: Tensor, g: Tensor, momentum: Tensor, lr: float, beta: float, weight_decay: float, nesterov: bool, adjust: str,
        ns_steps: int, eps: float,
    ) -> Any:  # fmt: skip
        # A matrix of optax is the transpose of torch's. Its momentum is corrected for its start: here it began long ago.
        make = self.optax.contrib.muon(
            lr, beta=beta, ns_steps=ns_steps, eps=eps, nesterov=nesterov, weight_decay=weight_decay,
            consistent_rms=None if adjust == "original" else 0.2,
        )  # fmt: skip
        return tuple(x.t() for x in self._step(make, p.t(), g.t(), {"mu": momentum.t()}, count=2**20))

    def adafactor(
        self, p: Tensor, g: Tensor, row: Tensor, column: Tensor, step: int, lr: float, beta2_decay: float, eps1: float,
        eps2: float, d: float, weight_decay: float,
    ) -> Any:  # fmt: skip
        if p.shape[0] > p.shape[1] or min(p.shape) < 2:
            # Of states that steps left both means are one. Those of the cases are not.
            raise Unsupported("optax divides by the mean of means that are by the shorter dimension")
        # What torch and the paper have as a bound of the rate is there a schedule of its own; decay is not times the rate.
        make = self.optax.adafactor(
            min(lr, 1 / math.sqrt(step)), min_dim_size_to_factor=2, decay_rate=-beta2_decay, clipping_threshold=d,
            weight_decay_rate=lr * weight_decay,
        )  # fmt: skip
        return self._step(make, p, g, {"v_row": row, "v_col": column}, count=step - 1)

    def schedule_free(
        self, p: Tensor, z: Tensor, g: Tensor, squares: Tensor, step: int, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, warmup_steps: int,
    ) -> Any:  # fmt: skip
        rates = [lr * min(1.0, t / max(1, warmup_steps)) for t in range(1, step + 1)]
        # Its own warm-up begins with a rate of 0. The rate of this step is given as a schedule of the caller's.
        make = self.optax.contrib.schedule_free_adamw(
            lambda _: rates[-1], b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay
        )
        so_far = {"weight_sum": math.fsum(rate**2 for rate in rates[:-1]), "max_lr": max(rates[:-1], default=0.0)}
        return self._step(make, p, g, {"z": z, "nu": squares}, count=step - 1, step_count=step - 1, **so_far)
