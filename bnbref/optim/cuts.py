"""Blocks that a boundary between ranks cuts: completed, for many parameters by one collective call.

    rank 0    ... block ][ bl                     buffer    [ bl | ock ]      the same on all ranks: each writes what it has among
    rank 1                   ock ][ block ...                                 zeros, and the bytes of all are added

What is exchanged of a cut block is its parameter, gradient and codes, and the correction if there is one: as bytes, since the sum
of a -0.0 and nothing would be 0.0. The scale of the block is on each rank that has a part of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from bnbref.optim.parts import Coded, Part
from bnbref.optim.sharding import Shard

_ALIGNED = 16
"""A tensor begins at a multiple of so many bytes of the buffer, which suits any dtype."""


@dataclass(frozen=True)
class Cut:
    """A parameter as this rank has it, some of whose blocks lie on several ranks. shard: where it lies."""

    part: Part
    shard: Shard
    blocksize: int

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are exchanged: the gradient first, then all that a step writes."""
        return [self.part.g, *self.part.weights, *(state.codes for state in self.part.states)]

    @cached_property
    def numel(self) -> int:
        """Elements of the cut blocks. The last block of a parameter may be a short one."""
        blocks = self.shard.cut_blocks(self.blocksize)
        return (len(blocks) - 1) * self.blocksize + min(self.blocksize, self.shard.numel - blocks[-1] * self.blocksize)

    def nbytes(self, x: Tensor) -> int:
        """Bytes of the cut blocks of a tensor, and those that keep the next one aligned."""
        return -(-self.numel * x.itemsize // _ALIGNED) * _ALIGNED

    @property
    def size(self) -> int:
        """Bytes that are exchanged: the same on all ranks."""
        return sum(map(self.nbytes, self.tensors))

    def pieces(self) -> list[tuple[int, slice, slice]]:
        """For each cut block that this rank has a part of: the block's number on this rank, the slice of this rank's elements,
        and the slice of the same elements among those of all cut blocks."""
        first, found = self.shard.blocks(self.blocksize).start, []
        for row, block in enumerate(self.shard.cut_blocks(self.blocksize)):
            here, place = self.shard.part(block, self.blocksize)
            if here.start < here.stop:
                offset = row * self.blocksize
                found.append((block - first, here, slice(offset + place.start, offset + place.stop)))
        return found


def complete(cuts: Sequence[Cut]) -> tuple[list[Part | None], Callable[[], None]]:
    """The cut blocks of each parameter, completed, and the function that takes over what a step makes of them.

    cuts: at least one, all of one process group. A part is None if this rank has nothing of those blocks. A collective call.
    """
    buffer = torch.zeros(sum(cut.size for cut in cuts), dtype=torch.uint8, device=cuts[0].part.p.device)
    offset = 0
    parts: list[Part | None] = []
    exchanged: list[tuple[Tensor, Tensor]] = []
    stepped: list[tuple[Tensor, Tensor]] = []
    for cut in cuts:
        own, copies = cut.pieces(), []
        for x in cut.tensors:
            copy = buffer[offset : offset + cut.numel * x.itemsize].view(x.dtype)
            offset += cut.nbytes(x)
            copies.append(copy)
            pieces = [(copy[place], x[here]) for _, here, place in own]
            exchanged += pieces
            stepped += [(piece, place) for place, piece in pieces] if x is not cut.part.g else []
        part = _part(cut, own, copies) if own else None
        parts.append(part)
        for old, new in zip(cut.part.states, part.states if part else (), strict=part is not None):
            stepped += [(old.absmax[block : block + 1], new.absmax[i : i + 1]) for i, (block, *_) in enumerate(own)]
    _copy(exchanged)
    dist.all_reduce(buffer, group=cuts[0].shard.group)
    return parts, lambda: _copy(stepped)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy to the first of each pair from the second. Bytes alone are one kernel for all pairs."""
    if pairs:
        to, source = ([x.view(torch.uint8) for x in side] for side in zip(*pairs, strict=True))
        torch._foreach_copy_(to, source)


def _part(cut: Cut, own: Sequence[tuple[int, slice, slice]], copies: Sequence[Tensor]) -> Part:
    """The cut blocks that this rank has a part of, completed, as a step takes them. They follow each other. copies: the exchanged
    copies of `cut.tensors`."""
    first = own[0][2].start // cut.blocksize * cut.blocksize
    last = min(-(-own[-1][2].stop // cut.blocksize) * cut.blocksize, cut.numel)
    g, *rest = (x[first:last] for x in copies)
    noise = None
    if cut.part.noise is not None:
        noise = cut.part.noise.new_zeros(last - first)
        for _, here, place in own:
            noise[place.start - first : place.stop - first] = cut.part.noise[here]
    scales = [torch.stack([state.absmax[block] for block, *_ in own]) for state in cut.part.states]
    weights, codes = rest[: len(cut.part.weights)], rest[len(cut.part.weights) :]
    return Part(tuple(weights), g, noise, [Coded(x, absmax) for x, absmax in zip(codes, scales, strict=True)])
