"""A step by a rule that sees whole matrices: its direction as it is written down, on matrices of one shape together.

    of each parameter    gradient, and states decoded        [rows, columns], float32
    of a batch           direction(p, g, *states, c)         [k, rows, columns], by torch as it stands
    of each parameter    states encoded again,  p = decay p - rate direction

What lies on several ranks is gathered. Each of them runs the same operators on the same numbers, and keeps its part; states
of the whole matrix are on each. A parameter whose gradient has an element that is not finite, or is longer than 2^63 as a whole,
stays as it was, with all states: a sum of its squares, which they are made of, might be no float32.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise
from bnbref.codebooks import value_table
from bnbref.context import without_autocast
from bnbref.optim.equation import Equation
from bnbref.optim.master_weights import corrections, value_of
from bnbref.optim.rule import Coefficients, Rule, State, absmax_key, matrix_shape
from bnbref.optim.sharding import Shard, gather_scales, shard_of, unsharded
from bnbref.optim.step import LARGEST_GRADIENT
from bnbref.optim.update import step

BATCH = 2**24
"""Elements of the parameters that are stepped together, unless a single one has more: 64 MiB for each of some matrices."""

Stream = Callable[[Sequence[tuple[torch.device, Mapping[str, Any]]]], Iterable[Mapping[str, Any]]]


@dataclass
class Job:
    """A parameter to be stepped.

    p: as the optimizer has it. flat: this rank's part of it, contiguous. g: the same part of the gradient. state: its states, as
    `update.new_state` made them. blocksize, noise, shard: as `update.step` takes them.
    """

    p: Tensor
    flat: Tensor
    g: Tensor
    state: Mapping[str, Any]
    blocksize: int
    noise: Tensor | None
    shard: Shard | None

    def matrix(self, x: Tensor) -> Tensor:
        """The whole, float32 `[..., rows, columns]`, of which this rank has a part."""
        return unsharded(self.p, x).float().reshape(matrix_shape(self.p.shape))

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of a tensor that has a number for each element."""
        flat = x.reshape(-1)
        return (flat if self.shard is None else flat[self.shard.start : self.shard.stop]).view(self.flat.shape)

    def value(self, state: Mapping[str, Any]) -> Tensor:
        """The float32 value of the parameter and its correction, as a matrix."""
        return self.matrix(value_of(self.flat.view(-1), corrections(self.flat, state)).view(self.flat.shape))

    def decoded(self, rule: Rule, s: State, state: Mapping[str, Any]) -> Tensor:
        """A state in memory of its own: of each element as a matrix, of the whole matrix as it is."""
        x: Tensor = state[s.key]
        if s.of != "elements":
            return x.clone()
        if x.dtype != torch.uint8:
            return self.matrix(x).clone()
        absmax = state[absmax_key(s.key)]
        if self.shard is not None:
            absmax = gather_scales(self.p, self.shard, absmax, self.blocksize)
        values = value_table(rule.codebook(s), self.p.device)
        x = blockwise.dequantize(unsharded(self.p, x), absmax, values, self.blocksize, torch.float32)
        return x.view(matrix_shape(self.p.shape))

    def set_state(self, rule: Rule, s: State, state: Mapping[str, Any], new: Tensor, finite: Tensor) -> None:
        """Make the new value of a state this rank's, if all of the gradient is finite."""
        found = {s.key: new}
        if state[s.key].dtype == torch.uint8:
            codes, absmax = blockwise.quantize(new, rule.codebook(s), self.blocksize)
            own = self.shard.blocks(self.blocksize) if self.shard is not None else range(absmax.numel())
            found = {s.key: codes, absmax_key(s.key): absmax[own.start : own.stop]}
        if s.of == "elements":
            found[s.key] = self.part(found[s.key])
        for key, x in found.items():
            state[key].copy_(torch.where(finite, x, state[key]))


def alike(p: Tensor) -> tuple[Any, ...]:
    """A key that is equal for parameters that can be stepped together."""
    shard = shard_of(p)
    return p.shape, p.dtype, p.device, None if shard is None else shard.group


def step_together(rule: Equation, hyper: Tensor, jobs: Sequence[Job], stream: Stream) -> None:
    """One step in place of parameters that are `alike`.  *Bounded* by what the rule says of its functions of the whole matrix.

    rule, hyper: as `equation.at_step` gives them. stream: brings states to their device, as `Placement.stream` does.
    """
    states = [(job.p.device, job.state) for job in jobs]
    given, finite = [], []
    for job, state in zip(jobs, stream(states), strict=True):
        g = job.matrix(job.g)
        finite.append(torch.linalg.vector_norm(g) <= LARGEST_GRADIENT)
        g = torch.where(finite[-1], g, 0.0)
        p = job.value(state) if "p" in rule.read else g  # else it lends its shape alone
        given.append((p, g, *(job.decoded(rule, s, state) for s in rule.states)))
    stacks = [torch.stack(each) for each in zip(*given, strict=True)]
    del given
    with without_autocast(stacks[1]):
        results = rule.direction(*stacks, Coefficients(rule.names, hyper))
    names = ["direction must have the parameter's shape", *(f"a new {s.key} must have the shape" for s in rule.states)]
    for x, like, must in zip(results, stacks[1:], names, strict=True):
        if x.shape != like.shape:
            raise ValueError(f"{rule!r}: {must} {tuple(like.shape[1:])}, got {tuple(x.shape[1:])}")
    descent = Equation(rule, "def direction(p, g, c):\n    return (g,)", rule.names, states=())
    for job, state, well, *own in zip(jobs, stream(states), finite, *results, strict=True):
        for s, new in zip(rule.states, own[1:], strict=True):
            job.set_state(rule, s, state, new, well)
        u = torch.where(well, job.part(own[0]), torch.nan)  # of NaN a step leaves everything as it was
        step(descent, hyper, job.flat, u, state, blocksize=job.blocksize, noise=job.noise)
