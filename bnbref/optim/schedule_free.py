"""Schedule-Free AdamW: an average of the iterates takes the place of a decaying learning rate (Defazio et al., 2405.15682).

Three sequences: z takes the steps, x is the average that is evaluated, and gradients are taken at y between them. The parameter
is y while training, and x after `eval()`. Beside it stands d = z - x, which begins at 0, as states do, and has the size of steps,
not of weights: so it can be kept in 8 bits, where z itself could not.
"""

# ruff: noqa: E701, the table of variants has a line for each

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from bnbref.optim.equation import at_step, coefficients_of
from bnbref.optim.family import Family, Options, betas_of
from bnbref.optim.kinds import count, flag, number, weights
from bnbref.optim.master_weights import corrections, set_value, value_of
from bnbref.optim.planned_steps import check_state
from bnbref.optim.rules import Rule, State, averages, coupled
from bnbref.optim.sharding import local, shard_of
from bnbref.optim.update import directions

_Member = tuple[Tensor, Mapping[str, Any]]
"""A parameter and its group."""


class ScheduleFree(Rule):
    """Algorithm 1 of 2405.15682, with the bias correction of its authors' package since 1.3.  Decay of y, as of a gradient.

    z = z - r u                      u = g / (sqrt(v^) + eps) + wd y,        r = lr min(1, t / warmup_steps)
    x = (1 - c) x + c z              c = r^2 / (sum of r^2 so far)
    y = (1 - b1) z + b1 x

    Written in y and d = z - x:      e = d - r u,    y = y - r (1 - b1 (1 - c)) u + b1 c d,    d = (1 - c) e
    """

    # Not what Adam's "state1" is, which must not be loaded here.
    states = (State("difference"), State("squares", signed=False))

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        (b1, b2), warmup, decays = weights(group, many=2), count(group, "warmup_steps", 0), coupled(group)
        r, c = decays["rate"] * min(1.0, t / max(1, warmup)), share(t, warmup)
        numbers = {**decays, "rate": 1.0, "unbias": 1 - b2**t, "eps": number(group, "eps")}
        return numbers | averages(b2=b2) | {"r": r, "own": r * (1 - b1 * (1 - c)), "pull": b1 * c, "stay": 1 - c}

    def direction(self, p: Tensor, g: Tensor, d: Tensor, v: Tensor, c: Any) -> tuple[Tensor, ...]:
        v = c.b2 * v + c.not_b2 * (g * g)
        u = g / (self.sqrt(v / c.unbias) + c.eps) + c.wd * p
        return c.own * u - c.pull * d, c.stay * (d - c.r * u), v


def share(t: int, warmup: int) -> float:
    """The weight of step t in the average: its squared learning rate over the sum of those so far, by the sum of squares.

    >>> share(1, 0), share(4, 0), share(2, 3) == 2**2 / (1**2 + 2**2)
    (1.0, 0.25, True)
    """
    w = max(1, warmup)
    if t <= w:
        return 6 * t / ((t + 1) * (2 * t + 1))
    return 1 / (t - w + (w + 1) * (2 * w + 1) / (6 * w))


class _Difference(Rule):
    """The rule by which y becomes x: its direction is d."""

    states = ScheduleFree.states

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        return {"rate": 1 - weights(group, many=2)[0], "decay": 1.0}

    def direction(self, p: Tensor, g: Tensor, d: Tensor, v: Tensor, c: Any) -> tuple[Tensor, ...]:
        return d, d, v


class AdamWScheduleFree(Family):
    """Adam that averages its parameters in place of a learning rate schedule (2405.15682).  Weight decay acts on y.  Exact.

        z = z - r u                      u = g / (sqrt(v^) + eps) + wd y,        r = lr min(1, t / warmup_steps)
        x = (1 - c) x + c z              c = r^2 / (sum of r^2 so far)
        y = (1 - b1) z + b1 x

    Parameters are y, where gradients belong, while training. `eval()` makes them x, to be evaluated or given away; `train()`
    makes them y again, before the next step. Each way is `p = p -+ (1 - b1) (z - x)`, two roundings to float32, and that to the
    parameter. If an exception ends it, the parameters that have moved are moved back, by the same roundings. lr and beta1 are
    constant: the averages do not see a change of them.

    lr: 2.5e-3 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    betas: (0.9, 0.999) by default, two numbers in [0, 1). b1 above, the weight of the average in y, and that of what v was
    before. A text like "(0.9, 0.95)", of a command line, is two numbers.
    eps: 1e-8 by default, from 0 on. It is added to the root, so that nothing is divided by 0.
    weight_decay: 0 by default, from 0 on. wd above: wd y is added to the direction.
    warmup_steps: 0 by default, an integer from 0 on. The steps over which r grows to lr.
    """

    def __init__(
        self, params: Any, lr: float = 2.5e-3, betas: tuple[float, float] | str = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, warmup_steps: int = 0, optim_bits: int = 32, min_8bit_size: int = 4096, is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas_of(betas), "eps": eps, "weight_decay": weight_decay}
        options.setdefault("nonzero_squares", True)
        super().__init__(
            params, ScheduleFree(), {**defaults, "warmup_steps": warmup_steps, "train_mode": True},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, is_paged=is_paged, **options,
        )  # fmt: skip

    def advance(self, parameters: Sequence[_Member]) -> None:
        if not all(flag(group, "train_mode") for _, group in parameters):
            raise RuntimeError("the parameters are averages since eval(): call train() before the next step")
        super().advance(parameters)

    def _check_known(self, own: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        if "train_mode" in own:
            raise ValueError(f"train_mode is that of a group, GlobalOptimManager overrides it by {own['train_mode']!r}")
        super()._check_known(own, config)

    def eval(self) -> None:
        """Set the parameters to their averages x, to evaluate or save them. `step` raises until `train()` is called."""
        self._switch(train=False)

    def train(self) -> None:
        """Set the parameters back to y, the point at which gradients are taken."""
        self._switch(train=True)

    @torch.no_grad()
    def _switch(self, train: bool) -> None:
        groups = [group for group in self.param_groups if group["train_mode"] != train]
        every = [(p, group) for group in groups for p in group["params"] if "step" in self._state(p)]
        for p, group in every:
            config = self.settings(p, group)
            self._judge(config)
            coefficients_of(_Difference(), 1, config)
            check_state(p, self._state(p), self._rules.of(config), config["blocksize"])
        moved: list[_Member] = []
        try:
            self._move(every, train, moved)
        except BaseException:
            self._move(moved, not train, [])  # lest some be averages and others not, which no group could say
            raise
        for group in groups:
            group["train_mode"] = train

    def _move(self, members: Sequence[_Member], train: bool, moved: list[_Member]) -> None:
        """Make these parameters y or x, and note each that is."""
        with closing(self._placement.stream([(p.device, self.state[p]) for p, _ in members])) as states:
            for (p, group), state in zip(members, states, strict=True):
                own, shard, config = local(p.detach()), shard_of(p), self.settings(p, group)
                rest, size = corrections(p, state), config["blocksize"]
                value = value_of(own.reshape(-1), rest)
                rule, hyper = at_step(_Difference(), 1, config, p.device)
                d = directions(rule, hyper, value, torch.zeros_like(value), state, blocksize=size, shard=shard)
                step = hyper[0] * d
                set_value(own, rest, value + step if train else value - step)
                moved.append((p, group))


# ---- variants -------------------------------------------------------------------------------------------------------
# fmt: off

class AdamWScheduleFree8bit(AdamWScheduleFree, bits=8): """`AdamWScheduleFree`: states in 8 bits."""
class AdamWScheduleFree32bit(AdamWScheduleFree, bits=32): """`AdamWScheduleFree`: states in 32 bits."""
class PagedAdamWScheduleFree(AdamWScheduleFree, paged=True): """`AdamWScheduleFree`: states in pages."""
class PagedAdamWScheduleFree8bit(AdamWScheduleFree, bits=8, paged=True): """`AdamWScheduleFree`: states in 8 bits, in pages."""
class PagedAdamWScheduleFree32bit(AdamWScheduleFree, bits=32, paged=True): """`AdamWScheduleFree`: states in 32 bits, in pages."""
