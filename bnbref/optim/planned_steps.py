"""A step of many parameters, one after another: what each needs for it, and what is said if the step is interrupted."""

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref.blockwise import check_blocksize, check_float
from bnbref.optim import matrix_steps
from bnbref.optim.equation import Equation
from bnbref.optim.kinds import number
from bnbref.optim.master_weights import corrections
from bnbref.optim.paging import Placement
from bnbref.optim.rule import Rule, absmax_key
from bnbref.optim.sharding import blocks_of, local, shard_of
from bnbref.optim.state_dict import BLOCKSIZE, same_blocks
from bnbref.optim.update import Tails, step


@dataclass(frozen=True)
class PlannedStep:
    """A parameter that is to make a step.

    p: as the optimizer has it. grad: this rank's part of its gradient. config: its settings. equation, hyper: what its rule
    computes in this step, and with which coefficients.
    """

    p: Tensor
    grad: Tensor
    config: Mapping[str, Any]
    equation: Equation
    hyper: Tensor

    @property
    def ascent(self) -> Tensor:
        """The gradient of what the step makes smaller: with `maximize` that is the negative loss."""
        return -self.grad if self.config["maximize"] else self.grad

    @property
    def blocksize(self) -> int:
        """The elements of a block of states in 8 bits."""
        return check_blocksize(self.config["blocksize"], self.p.numel())

    def noise(self, generator: torch.Generator | None) -> Tensor | None:
        """Random bits for a parameter that is to be rounded at random."""
        if not self.config["stochastic_rounding"] or self.p.dtype != torch.bfloat16:
            return None
        numel = local(self.p).numel()
        return torch.randint(-(2**15), 2**15, (numel,), dtype=torch.int16, device=self.p.device, generator=generator)


def checked_gradient(p: Tensor, grad: Tensor, state: Mapping[str, Any], rule: Rule, blocksize: int) -> Tensor:
    """The part of a gradient that this rank has. ValueError if p, which may have no state yet, cannot make a step by it."""
    check_float("a parameter", p)
    check_float("a gradient", grad)
    here, shape = local(grad), local(p).shape
    if here.shape != shape:
        raise ValueError(
            f"a gradient must have the shape of its parameter, and be sharded like it: here it has shape "
            f"{tuple(here.shape)}, the parameter {tuple(shape)}"
        )
    begun = "step" in state
    if not begun and _partly_shared(local(p), here):
        raise ValueError(
            f"a gradient must not overlap its parameter in memory, unless it is the same memory: a parameter of shape "
            f"{tuple(shape)} and its gradient begin {here.data_ptr() - local(p).data_ptr()} bytes apart"
        )
    corrections(p, state)
    if begun:
        check_state(p, state, rule, blocksize)
    return here


def check_state(p: Tensor, state: Mapping[str, Any], rule: Rule, blocksize: int) -> None:
    """ValueError if a state does not fit its parameter, its rule or its blocksize, as one that has begun by others."""
    shape = local(p).shape
    for s in rule.states:
        if s.key not in state:
            raise ValueError(
                f"the state of a parameter of shape {tuple(shape)} has {sorted(state)} and no {s.key!r}, which {rule!r} keeps: "
                f"it began by another rule. `del optimizer.state[p]` begins anew"
            )
        if state[s.key].shape != (shape if s.of == "elements" else s.shape(p.shape)):
            raise ValueError(
                f"a parameter must keep its shape: its {s.key} has {tuple(state[s.key].shape)}, from its first step, "
                f"the parameter now {tuple(shape)}. `del optimizer.state[p]` begins anew"
            )
        if state[s.key].dtype == torch.uint8:
            scales, own = state[absmax_key(s.key)].numel(), state.get("blocksize", BLOCKSIZE)
            blocks = len(blocks_of(p, check_blocksize(blocksize, p.numel())))
            if scales != blocks or not same_blocks(own, blocksize, p.numel()):
                raise ValueError(
                    f"blocksize of a parameter must stay what it was when its state began: its {s.key} has {scales} scales, of "
                    f"blocks of {own}, and there are {blocks} blocks of {blocksize}. `del optimizer.state[p]` begins anew"
                )


def _partly_shared(p: Tensor, g: Tensor) -> bool:
    """Whether a step, which writes p while it reads g, would write what it has yet to read."""
    if p.device.type == "meta" or not (p.is_contiguous() and g.is_contiguous()):
        return False  # what is not contiguous is copied first
    start, other = p.data_ptr(), g.data_ptr()
    ends = start + p.numel() * p.itemsize, other + g.numel() * g.itemsize
    return (start, p.dtype) != (other, g.dtype) and start < ends[1] and other < ends[0]


def take_steps(
    steps: Sequence[PlannedStep], states: MutableMapping[Tensor, dict[str, Any]], placement: Placement,
    generator: torch.Generator | None, every: Callable[[], Sequence[Tensor]],
) -> None:  # fmt: skip
    """Makes the planned steps. states: of each parameter, made before. every: returns all parameters of the optimizer, by the
    index that they have in its state dict. An exception in the middle leaves whole the parameters before the one that it met, and
    a warning says which.
    """
    tails = Tails()
    made: list[Tensor] = []  # those that have made their step
    begun: list[Tensor] = []  # those that are making it
    by_element = [planned for planned in steps if not planned.equation.calls]
    try:
        with closing(placement.stream([(planned.p.device, states[planned.p]) for planned in by_element])) as streamed:
            for planned, state in zip(by_element, streamed, strict=True):
                begun = [planned.p]
                update(planned, state, planned.noise(generator), tails)
                # Pages are written back before the next ones come. Of a shard they may be on another rank alone.
                if placement.pages(planned.p.numel()) and shard_of(planned.p) is not None:
                    tails.run()
                elif state is not states[planned.p]:
                    tails.run_own()
                states[planned.p]["step"] += 1
                made += begun
                begun = []
        tails.run()
        for batch in _together([planned for planned in steps if planned.equation.calls]):
            begun = [planned.p for planned in batch]
            matrix_steps.step_together(batch, states, placement.stream, generator)
            for planned in batch:
                states[planned.p]["step"] += 1
            made += begun
            begun = []
    except BaseException as error:
        try:
            _say_interrupted(made, begun, tails, every(), [planned.p for planned in steps])
        except Warning as said:  # where warnings are errors, what happened is still this error
            raise error from said
        raise


def update(planned: PlannedStep, state: Mapping[str, Any], noise: Tensor | None, tails: Tails) -> None:
    """The step of one parameter by a rule of elements. state: on its device."""
    own, shard = local(planned.p.detach()), shard_of(planned.p)
    flat = own.contiguous()
    copied = flat.data_ptr() != own.data_ptr()
    step(
        planned.equation, planned.hyper, flat, planned.ascent, state, blocksize=planned.config["blocksize"], noise=noise,
        shard=shard, max_norm=number(planned.config, "max_unorm") if planned.equation.clipped else 0.0,
        tails=None if copied and shard is None else tails,
    )  # fmt: skip
    if copied and shard is None:
        own.copy_(flat)
    elif copied:  # other ranks may have no copy, and all exchange their blocks at the same time
        tails.then(lambda: own.copy_(flat))


def _together(steps: Sequence[PlannedStep]) -> Iterator[Sequence[PlannedStep]]:
    """Batches of parameters whose rules see whole matrices: of those that are alike, as many at a time as `BATCH` allows."""
    groups: dict[Any, list[PlannedStep]] = {}
    for planned in steps:
        groups.setdefault((id(planned.hyper), *matrix_steps.alike(planned.p)), []).append(planned)
    for group in groups.values():
        size = max(1, matrix_steps.BATCH // max(1, group[0].p.numel()))
        yield from (group[first : first + size] for first in range(0, len(group), size))


def _say_interrupted(
    made: list[Tensor], partly: list[Tensor], tails: Tails, every: Sequence[Tensor], params: Sequence[Tensor]
) -> None:
    """After an exception: finish the parameters before the one that failed, and warn of what is not as a step leaves it.

    made, partly: the parameters that have made their step, or begun it. tails: the last blocks that are waiting. every: the
    parameters by their index in the state dict. params: those that were to make the step.
    """
    try:
        tails.interrupt()
    except RuntimeError:
        tails.torn = True
    if tails.torn:  # they lack their last blocks, each of which may be of any of them
        made, partly = [], made + partly
    index = {id(p): i for i, p in enumerate(every)}
    done, part = ({index[id(p)] for p in ps} for ps in (made, partly))
    not_yet = [index[id(p)] for p in params if index[id(p)] not in done | part]
    warnings.warn(
        f"a step was interrupted. By their index in the state dict: {sorted(done)} have made it, {not_yet} are as they were, "
        f"and {sorted(part)} may have made a part of it",
        stacklevel=9,
    )
