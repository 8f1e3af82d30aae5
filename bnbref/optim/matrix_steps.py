"""A step by a rule that sees whole matrices: its direction as it is written down, on matrices of one shape together.

    of each parameter    gradient, and states decoded        [rows, columns], float32
    of a batch           direction(p, g, *states, c)         [k, rows, columns], by torch as it stands
    of each parameter    states encoded again,  p = decay p - rate direction

What lies on several ranks is gathered. Each of them runs the same operators on the same numbers, and keeps its part; states
of the whole matrix are on each. A parameter whose gradient has an element that is not finite, or is longer than 2^63 as a whole,
stays as it was, with all states: a sum of its squares, which they are made of, might be no float32.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise
from bnbref.codebooks import value_table
from bnbref.context import without_autocast
from bnbref.optim.equation import Equation
from bnbref.optim.master_weights import corrections, value_of
from bnbref.optim.planned_steps import PlannedStep
from bnbref.optim.rule import Coefficients, State, absmax_key, matrix_shape
from bnbref.optim.sharding import blocks_of, gather_scales, local, part_of, shard_of, unsharded
from bnbref.optim.step import LARGEST_GRADIENT
from bnbref.optim.update import step

BATCH = 2**24
"""Elements of the parameters that are stepped together, unless a single one has more: 64 MiB for each of some matrices."""

Stream = Callable[[Sequence[tuple[torch.device, Mapping[str, Any]]]], Iterable[Mapping[str, Any]]]


def alike(p: Tensor) -> tuple[Any, ...]:
    """A key that is equal for parameters that can be stepped together."""
    shard = shard_of(p)
    return p.shape, p.dtype, p.device, None if shard is None else shard.group


def _matrix(p: Tensor, x: Tensor) -> Tensor:
    """What has a number for each element of p, whole and as a matrix: float32 `[..., rows, columns]`. x: this rank's part."""
    return unsharded(p, x).float().reshape(matrix_shape(p.shape))


def _decoded(planned: PlannedStep, s: State, state: Mapping[str, Any]) -> Tensor:
    """A state in memory of its own: of each element as a matrix, of the whole matrix as it is."""
    p, x = planned.p, state[s.key]
    if s.of != "elements":
        return x.clone()  # type: ignore[no-any-return]
    if x.dtype != torch.uint8:
        return _matrix(p, x).clone()
    absmax, shard = state[absmax_key(s.key)], shard_of(p)
    if shard is not None:
        absmax = gather_scales(p, shard, absmax, planned.blocksize)
    values = value_table(planned.equation.codebook(s), p.device)
    x = blockwise.dequantize(unsharded(p, x), absmax, values, planned.blocksize, torch.float32)
    return x.view(matrix_shape(p.shape))


def _set_state(planned: PlannedStep, s: State, state: Mapping[str, Any], new: Tensor, finite: Tensor) -> None:
    """Make the new value of a state this rank's, if all of the gradient is finite."""
    found = {s.key: new}
    if state[s.key].dtype == torch.uint8:
        codes, absmax = blockwise.quantize(new, planned.equation.codebook(s), planned.blocksize)
        own = blocks_of(planned.p, planned.blocksize)
        found = {s.key: codes, absmax_key(s.key): absmax[own.start : own.stop]}
    if s.of == "elements":
        found[s.key] = part_of(planned.p, found[s.key])
    for key, x in found.items():
        state[key].copy_(torch.where(finite, x, state[key]))


def step_together(
    steps: Sequence[PlannedStep], states: Mapping[Tensor, Mapping[str, Any]], stream: Stream,
    generator: torch.Generator | None = None,
) -> None:  # fmt: skip
    """One step in place of parameters that are `alike`.  *Bounded* by what the rule says of its functions of the whole matrix.

    steps: by one rule. states: of each parameter. stream: brings them to their device, as `Placement.stream` does.
    """
    rule, hyper = steps[0].equation, steps[0].hyper
    noises = [planned.noise(generator) for planned in steps]
    places = [(planned.p.device, states[planned.p]) for planned in steps]
    given, finite = [], []
    for planned, state in zip(steps, stream(places), strict=True):
        p = planned.p
        g = _matrix(p, planned.ascent.contiguous())
        finite.append(torch.linalg.vector_norm(g) <= LARGEST_GRADIENT)
        g = torch.where(finite[-1], g, 0.0)
        value = g  # which lends its shape alone, where the rule does not read the parameter
        if "p" in rule.read:
            own = local(p.detach()).contiguous()
            value = _matrix(p, value_of(own.view(-1), corrections(own, state)).view(own.shape))
        given.append((value, g, *(_decoded(planned, s, state) for s in rule.states)))
    stacks = [torch.stack(each) for each in zip(*given, strict=True)]
    del given
    with without_autocast(stacks[1]):
        results = rule.direction(*stacks, Coefficients(rule.names, hyper))
    names = ["direction must have the parameter's shape", *(f"a new {s.key} must have the shape" for s in rule.states)]
    for x, like, must in zip(results, stacks[1:], names, strict=True):
        if x.shape != like.shape:
            raise ValueError(f"{rule!r}: {must} {tuple(like.shape[1:])}, got {tuple(x.shape[1:])}")
    descent = Equation(rule, "def direction(p, g, c):\n    return (g,)", rule.names, states=())
    for planned, noise, state, well, u, *new in zip(steps, noises, stream(places), finite, *results, strict=True):
        for s, x in zip(rule.states, new, strict=True):
            _set_state(planned, s, state, x, well)
        u = torch.where(well, part_of(planned.p, u), torch.nan)  # of NaN a step leaves everything as it was
        own = local(planned.p.detach())
        flat = own.contiguous().resolve_neg()
        step(descent, hyper, flat, u, state, blocksize=planned.blocksize, noise=noise)
        if flat.data_ptr() != own.data_ptr():
            own.copy_(flat)
