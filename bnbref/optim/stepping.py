"""The planned steps of many parameters, one after another, and what is said if they are interrupted."""

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from bnbref.optim import matrix_steps
from bnbref.optim.kinds import number
from bnbref.optim.paging import Placement
from bnbref.optim.planned_steps import PlannedStep, in_common
from bnbref.optim.sharding import local, shard_of
from bnbref.optim.update import Tails, step


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
    own = [states[planned.p] for planned in by_element]
    common: set[int] | None = None  # of them, by their index; None as long as nothing has waited
    try:
        places = [(planned.p.device, state) for planned, state in zip(by_element, own, strict=True)]
        with closing(placement.stream(places)) as streamed:
            for i, (planned, kept, state) in enumerate(zip(by_element, own, streamed, strict=True)):
                begun = [planned.p]
                if tails.waiting:  # those of one memory come one after the other
                    common = in_common(by_element) if common is None else common
                    if i in common:
                        tails.run_own()
                # Pages are written back before the next ones come, and so wait for nothing. Of a shard they may be on another
                # rank alone.
                sharded = shard_of(planned.p) is not None
                waiting = tails if state is kept or sharded else Tails()
                update(planned, state, planned.noise(generator), waiting)
                if sharded and placement.pages(planned.p.numel()):
                    tails.run()
                elif state is not kept:
                    waiting.run_own()
                kept["step"] += 1
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
    flat = own.contiguous().resolve_neg()
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
