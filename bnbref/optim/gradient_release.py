"""Gradient release: a parameter takes its step in the backward pass, when its gradient is complete, and the gradient is freed.

    after backward    all gradients, then all steps
    released          gradient of the last layer, its step; gradient of the layer before, its step; ...

The steps are the same, and so are the bits. At no time is there more than the gradients of what is being computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnbref.optim.optimizer import Optimizer
from bnbref.optim.sharding import shard_of


class GradientRelease:
    """Steps the parameters of an optimizer inside `backward()`, until `remove()`.  Exact: the bits of a step after `backward()`.

    The loop stays as it is. `optimizer.step()` ends the iteration, and steps what has no hook; `zero_grad()` finds nothing to do.
    What needs all gradients at once cannot be done:

    - accumulation: a second gradient of a parameter before `step()` raises RuntimeError, and so does a graph in which a parameter
      is differentiated in several passes (reentrant checkpointing)
    - clipping by the norm of all gradients, and `GradScaler`, come too late: they find no gradients
    - several processes, unless parameters are sharded by fully_shard, which reduces a gradient before the hook:
      NotImplementedError for DDP, which reduces it behind the hook

    Stochastic rounding draws in the order of the backward pass: another sequence than after it.

    >>> from bnbref.optim import AdamW8bit
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    >>> optimizer = AdamW8bit(model.parameters())
    >>> release = GradientRelease(optimizer)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> [p.grad for p in model.parameters()], optimizer.state[model[0].weight]["step"]
    ([None, None, None, None], 1)
    >>> optimizer.step()
    >>> release.remove()
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be one of bnbref.optim, got {type(optimizer).__name__}")
        self._optimizer = optimizer
        self._stepped: set[int] = set()
        self._places = _places_in(optimizer.param_groups)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for p in parameters:
            if p.grad is not None:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} has a gradient already: step or zero_grad first"
                )
            if shard_of(p) is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                raise NotImplementedError(
                    f"a parameter of shape {tuple(p.shape)} is whole on each of {dist.get_world_size()} processes, whose "
                    f"gradients would not be reduced before its step: shard the model by torch.distributed.fsdp.fully_shard"
                )
        self._handles = [p.register_post_accumulate_grad_hook(self._step) for p in parameters]
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._stepped.clear()))

    def _step(self, p: Tensor) -> None:
        group = self._group_of(p)
        if group is None:
            return
        if id(p) in self._stepped:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} has a second gradient before optimizer.step(): with released "
                f"gradients nothing is accumulated, neither over batches nor over passes of one graph"
            )
        with torch.no_grad():
            self._optimizer.advance([(p, group)])
        self._stepped.add(id(p))
        p.grad = None

    def _group_of(self, p: Tensor) -> Mapping[str, Any] | None:
        """The group of p, which may be another one than before; None if there is none. It is looked for where it was last, since
        a walk over all parameters for each of them would take long."""
        groups = self._optimizer.param_groups
        at, i = self._places.get(id(p), (0, 0))
        if at < len(groups) and i < len(groups[at]["params"]) and groups[at]["params"][i] is p:
            return groups[at]
        self._places = _places_in(groups)
        found = self._places.get(id(p))
        return None if found is None else groups[found[0]]

    def remove(self) -> None:
        """Step after the backward pass again."""
        for handle in self._handles:
            handle.remove()


def _places_in(groups: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """The index of the group of each parameter and its index there, by the `id` of the parameter."""
    return {id(p): (at, i) for at, group in enumerate(groups) for i, p in enumerate(group["params"])}
