"""A step that one parameter is to make: what it needs for it, and what is refused before anything is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref.arguments import bytes_needed, memory
from bnbref.blockwise import check_blocksize, check_float
from bnbref.optim.equation import Equation
from bnbref.optim.master_weights import corrections
from bnbref.optim.rule import Rule, absmax_key
from bnbref.optim.sharding import blocks_of, local, local_gradient
from bnbref.optim.state_dict import BLOCKSIZE, same_blocks


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
    """`local_gradient(p, grad)`. ValueError if p, which may have no state yet, cannot make a step by it."""
    check_float("a parameter", p)
    check_float("a gradient", grad)
    here, shape = local_gradient(p, grad), local(p).shape
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
    shape, blocks = local(p).shape, None
    for s in rule.states:
        own = state.get(s.key)
        if own is None:
            raise ValueError(
                f"the state of a parameter of shape {tuple(shape)} has {sorted(state)} and no {s.key!r}, which {rule!r} keeps: "
                f"it began by another rule. `del optimizer.state[p]` begins anew"
            )
        if own.shape != (shape if s.of == "elements" else s.shape(p.shape)):
            raise ValueError(
                f"a parameter must keep its shape: its {s.key} has {tuple(own.shape)}, from its first step, "
                f"the parameter now {tuple(shape)}. `del optimizer.state[p]` begins anew"
            )
        if own.dtype == torch.uint8:
            scales, begun = state[absmax_key(s.key)].numel(), state.get("blocksize", BLOCKSIZE)
            if blocks is None:
                blocks = len(blocks_of(p, check_blocksize(blocksize, p.numel())))
            if scales != blocks or not same_blocks(begun, blocksize, p.numel()):
                raise ValueError(
                    f"blocksize of a parameter must stay what it was when its state began: its {s.key} has {scales} scales, of "
                    f"blocks of {begun}, and there are {blocks} blocks of {blocksize}. `del optimizer.state[p]` begins anew"
                )


def _partly_shared(p: Tensor, g: Tensor) -> bool:
    """Whether a step, which writes p while it reads g, would write what it has yet to read."""
    if p.device.type == "meta" or not (p.is_contiguous() and g.is_contiguous()):
        return False  # what is not contiguous is copied first
    start, other = p.data_ptr(), g.data_ptr()
    ends = start + p.numel() * p.itemsize, other + g.numel() * g.itemsize
    return (start, p.dtype) != (other, g.dtype) and start < ends[1] and other < ends[0]


def in_common(steps: Sequence[PlannedStep]) -> set[int]:
    """The indices of the steps whose parameter has memory in common with that of another one, as views of one tensor may."""
    places = sorted([(*memory(local(planned.p)), i) for i, planned in enumerate(steps)])
    found: set[int] = set()
    end, furthest = 0, 0  # of those that begin before, how far one reaches, and which
    for first, last, i in places:
        if first < end:
            found |= {i, furthest}
        if last > end:
            end, furthest = last, i
    return found


def check_apart(steps: Sequence[PlannedStep]) -> None:
    """ValueError if a gradient is memory of another parameter that makes a step: is it to be read before that step, or after it?

    One after another would be the order of the parameters, but some wait for others (see `update.Tails`). Tensors with gaps, as
    columns of a matrix that has others beside them, are not looked at.
    """
    own = [(local(planned.p), planned.grad) for planned in steps if planned.p.numel() > 0 and not planned.p.is_meta]
    stored = {p.untyped_storage()._cdata for p, _ in own}
    if stored.isdisjoint([g.untyped_storage()._cdata for _, g in own]):
        return
    # Of a gradient that is its own parameter's memory, each element is read before it is written.
    apart = [(p, "a parameter") for p, _ in own] + [(g, "a gradient") for p, g in own if g.data_ptr() != p.data_ptr()]
    ends = {"a parameter": 0, "a gradient": 0}  # where the last one ends of those that begin before
    for x, what in sorted(apart, key=lambda one: one[0].data_ptr()):
        if bytes_needed(x) - x.storage_offset() * x.itemsize != x.nbytes:
            continue
        if any(x.data_ptr() < end for kind, end in ends.items() if kind != what):
            raise ValueError(
                f"a gradient must not be memory of a parameter that makes a step, unless it is its own: {what} of shape "
                f"{tuple(x.shape)} begins in the other. `p.grad = p.grad.clone()` gives it memory of its own"
            )
        ends[what] = max(ends[what], x.data_ptr() + x.nbytes)
