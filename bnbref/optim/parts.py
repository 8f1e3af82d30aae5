"""The parts of a parameter that kernels of 8 bits get: its whole blocks as they are, and an incomplete one padded, in a copy.

    elements of a parameter    [    block    ][    block    ][  rest ]
                                whole blocks: views           a padded copy, with the rests of other parameters

On a GPU a small parameter is a rest as a whole (`update._JOINED`). A block that a boundary between ranks cuts is completed on
each rank that has a part of it (`bnbref.optim.cuts`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bnbref.blockwise import block_count
from bnbref.context import without_autocast
from bnbref.optim.rule import Rule
from bnbref.optim.sharding import Shard


class Coded(NamedTuple):
    """A state in 8 bits: uint8 codes, a number for each element, and float32 scales, one for each block."""

    codes: Tensor
    absmax: Tensor


@dataclass(frozen=True)
class Part:
    """The tensors of a part of a parameter that a step reads and writes: elements in a row, or `[blocks, blocksize]`.

    weights: the parameter, and its correction if it has one.
    """

    weights: tuple[Tensor, ...]
    g: Tensor
    noise: Tensor | None
    states: list[Coded]

    def map(self, elements: Callable[[Tensor], Tensor], scales: Callable[[Tensor], Tensor]) -> "Part":
        """A part of new tensors: `elements` of each tensor that has a number for each element, and `scales` of the scales."""
        states = [Coded(elements(codes), scales(absmax)) for codes, absmax in self.states]
        noise = None if self.noise is None else elements(self.noise)
        return Part(tuple(map(elements, self.weights)), elements(self.g), noise, states)

    @property
    def p(self) -> Tensor:
        """The parameter."""
        return self.weights[0]

    @property
    def flat_states(self) -> list[Tensor]:
        """The codes and then the scales of each state, one state after the other, and the correction, as kernels take them."""
        return [x for state in self.states for x in state] + list(self.weights[1:])


Padded = tuple[Part, Callable[[], None]]
"""A copy in rows of whole blocks, and the function that writes back what a step makes of it."""


def zeros_of(rule: Rule) -> list[int]:
    """The code of 0 of each state, with which its codes are padded."""
    return [rule.codebook(state).code_of_zero for state in rule.states]


def split(part: Part, blocksize: int) -> tuple[Part | None, Part | None]:
    """The whole blocks of a part in rows, and the rest; None where there is nothing.

    A part with a single whole block counts as a rest, because Dynamo would compile a kernel of its own for one row.
    """
    n = part.p.numel()
    whole = n // blocksize if n >= 2 * blocksize else 0
    size = whole * blocksize
    rows = part.map(lambda x: x[:size].view(whole, blocksize), lambda x: x[:whole]) if whole else None
    rest = part.map(lambda x: x[size:], lambda x: x[whole:]) if size < n else None
    return rows, rest


def padded(rests: Sequence[Part], zeros: Sequence[int], blocksize: int) -> Padded:
    """The rests of several parameters in the rows of one part, each padded to whole blocks with `zeros`, the codes of 0."""
    sizes = [rest.p.numel() for rest in rests]
    gaps = [-size % blocksize for size in sizes]
    if sum(sizes) + sum(gaps) < 2 * blocksize:  # a single row, which Dynamo would specialise
        gaps[-1] += blocksize
    extra = int(gaps[-1] >= blocksize)
    bounds = [n for pair in zip(sizes, gaps, strict=True) for n in pair]

    def rows(tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
        padding = tensors[0].new_full((max(gaps),), fill)
        pieces = [x for t, gap in zip(tensors, gaps, strict=True) for x in ((t, padding[:gap]) if gap else (t,))]
        with without_autocast(tensors[0]):  # which puts no float16 together where it is of bfloat16
            return torch.cat(pieces).view(-1, blocksize)

    def scales(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([*tensors, tensors[0].new_zeros(extra)])

    noises = [rest.noise for rest in rests if rest.noise is not None]
    by_weight = zip(*(rest.weights for rest in rests), strict=True)
    by_state = zip(*(rest.states for rest in rests), strict=True)
    part = Part(
        tuple(map(rows, by_weight)),
        rows([rest.g for rest in rests]),
        rows(noises) if noises else None,
        [
            Coded(rows([s.codes for s in own], zero), scales([s.absmax for s in own]))
            for zero, own in zip(zeros, by_state, strict=True)
        ],
    )

    def write_back() -> None:
        # A call for each kind: of tensors that have one dtype a GPU copies all at a time.
        for i, weight in enumerate(part.weights):
            torch._foreach_copy_([rest.weights[i] for rest in rests], weight.view(-1).split(bounds)[::2])
        for i, (codes, absmax) in enumerate(part.states):
            own = [rest.states[i] for rest in rests]
            torch._foreach_copy_([state.codes for state in own], codes.view(-1).split(bounds)[::2])
            blocks = [state.absmax.numel() for state in own]
            torch._foreach_copy_([state.absmax for state in own], absmax.split([*blocks, extra])[:-1])

    return part, write_back


# ---- sharded --------------------------------------------------------------------------------------------------------


def sliced(part: Part, first: int, last: int, shard: Shard, blocksize: int) -> Part:
    """Elements `first` to `last` of what this rank has of a parameter, and the scales of their blocks."""
    before = shard.blocks(blocksize).start
    blocks = slice((shard.start + first) // blocksize - before, block_count(shard.start + last, blocksize) - before)
    return part.map(lambda x: x[first:last], lambda x: x[blocks])
