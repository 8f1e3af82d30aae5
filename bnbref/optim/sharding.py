"""A parameter that is spread over ranks by its rows, and the bits that it would have in one piece.

    parameter in row-major order    |       rank 0       |       rank 1       |   rank 2   |
    blocks                          [      ][      ][      ][      ][      ][      ][      ]
                                                     ^ cut                  ^ cut

Which state is in 8 bits, and where its blocks begin, is decided from the whole parameter. A block that a boundary cuts is
completed on each rank that has a part of it, which then makes the same step, and keeps what is its own (`bnbref.optim.cuts`).
Rows of whole blocks exchange nothing, nor do states in 32 bits.
"""

import sys
import types
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from bnbref.blockwise import block_count


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that one of several ranks has: elements `bounds[rank]` to `bounds[rank + 1]` in row-major order.

    group: the process group of the ranks; None if there is one rank alone.
    """

    bounds: tuple[int, ...]
    rank: int
    group: Any

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return self.bounds[-1]

    @property
    def start(self) -> int:
        """The first element here."""
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        """After the last element here."""
        return self.bounds[self.rank + 1]

    def blocks(self, blocksize: int) -> range:
        """The blocks, of the whole, that have an element here.

        >>> Shard((0, 10, 20), 1, None).blocks(8), Shard((0, 20, 20), 1, None).blocks(8)
        (range(1, 3), range(2, 2))
        """
        first = self.start // blocksize
        return range(first, max(first, block_count(self.stop, blocksize)) if self.start < self.stop else first)

    def whole_blocks(self, blocksize: int) -> tuple[int, int]:
        """The elements, counted from `start`, of blocks that lie here alone.

        >>> Shard((0, 10, 20), 0, None).whole_blocks(8), Shard((0, 10, 20), 1, None).whole_blocks(8)
        ((0, 8), (6, 10))
        """
        first = min(block_count(self.start, blocksize) * blocksize, self.stop)
        last = self.stop if self.stop == self.numel else max(first, self.stop // blocksize * blocksize)
        return first - self.start, last - self.start

    def cut_blocks(self, blocksize: int) -> list[int]:
        """The blocks, of the whole, that lie on several ranks: the same list on all of them.

        >>> Shard((0, 10, 16, 20), 0, None).cut_blocks(8)
        [1]
        """
        return sorted({bound // blocksize for bound in self.bounds if bound % blocksize and bound < self.numel})

    def part(self, block: int, blocksize: int) -> tuple[slice, slice]:
        """The part of a block that this rank has: its elements here, counted from `start`, and their places in the block."""
        first = max(self.start, block * blocksize)
        last = max(first, min(self.stop, (block + 1) * blocksize))
        offset = block * blocksize
        return slice(first - self.start, last - self.start), slice(first - offset, last - offset)


def shard_of(p: Tensor) -> Shard | None:
    """Where this rank's part of a DTensor lies; None for a tensor in one piece.

    Rows sharded over one dimension of the mesh, by `Shard(0)` as in FSDP2, and replicated over the others as in HSDP;
    anything else raises NotImplementedError.
    """
    if type(p) in (Tensor, nn.Parameter) or not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as ByDimension

    if not isinstance(p, DTensor):
        return None
    by_rows = [i for i, placement in enumerate(p.placements) if placement == ByDimension(0)]
    others = [placement for placement in p.placements if placement != ByDimension(0)]
    if len(by_rows) > 1 or any(placement != Replicate() for placement in others):
        raise NotImplementedError(
            f"a parameter of shape {tuple(p.shape)} has placements {tuple(p.placements)}: bnbref's optimizers take rows, "
            f"Shard(0) on one dimension of the mesh and Replicate() on the others"
        )
    if not by_rows:
        return Shard((0, p.numel()), 0, None)
    rank, ranks = p.device_mesh.get_local_rank(by_rows[0]), p.device_mesh.size(by_rows[0])
    rows = p.shape[0]
    each, width = -(-rows // ranks), p.numel() // max(rows, 1)
    bounds = tuple(min(i * each, rows) * width for i in range(ranks + 1))
    return Shard(bounds, rank, p.device_mesh.get_group(by_rows[0]))


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank has: of a DTensor its local tensor, of any other tensor all of it."""
    return x.to_local() if hasattr(x, "to_local") else x


def local_gradient(p: Tensor, grad: Tensor) -> Tensor:
    """This rank's part of a gradient of p, where p has its part.

    The gradient of a DTensor may be placed otherwise: that of a weight which is replicated among ranks that share a sequence is
    `Partial()`, a sum of which each rank has a term. Then it is redistributed, as in torch's optimizers, by a collective call.
    """
    if type(grad) is Tensor or not dist.is_available():
        return grad
    from torch.distributed.tensor import DTensor

    if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def part_of(p: Tensor, x: Tensor) -> Tensor:
    """This rank's part of a tensor that has a number for each element of p: all of it, if p is in one piece."""
    flat, shard = x.reshape(-1), shard_of(p)
    return (flat if shard is None else flat[shard.start : shard.stop]).view(local(p).shape)


def blocks_of(p: Tensor, blocksize: int) -> range:
    """The blocks of p that have an element on this rank: all of them, if p is in one piece."""
    shard = shard_of(p)
    return range(block_count(p.numel(), blocksize)) if shard is None else shard.blocks(blocksize)


# ---- the whole ----------------------------------------------------------------------------------------------------------


def sum_over_shards(shard: Shard | None, x: Tensor) -> Tensor:
    """The sum over all shards."""
    if shard is not None and shard.group is not None:
        x = x.clone()
        dist.all_reduce(x, group=shard.group)
    return x


def sharded_like(p: Tensor, x: Tensor) -> Tensor:
    """x, which is this rank's part of a tensor, as a DTensor with the placements of p. If p is no DTensor, x as it is."""
    if shard_of(p) is None:
        return x
    from torch.distributed.tensor import DTensor

    sharded: Any = p
    return DTensor.from_local(x, sharded.device_mesh, sharded.placements, shape=p.shape, stride=p.stride())


def unsharded(p: Tensor, x: Tensor) -> Tensor:
    """All of what belongs to p. x: what belongs to this rank's part of it. A collective call, if p is a DTensor."""
    # On p's device, for which its process group is made: a paged state is on the host, where NCCL reads nothing.
    every: Any = sharded_like(p, x.to(p.device))
    tensor: Tensor = every.full_tensor() if hasattr(every, "full_tensor") else every
    return tensor


def gather_scales(p: Tensor, shard: Shard, absmax: Tensor, blocksize: int) -> Tensor:
    """The scales of all blocks of a state of p, on its device. absmax: of the blocks of this rank's part. A collective call."""
    whole = absmax.new_zeros(block_count(shard.numel, blocksize), device=p.device)
    own = shard.blocks(blocksize)
    whole[own.start : own.stop] = absmax
    if shard.group is not None:
        dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=shard.group)  # none is negative; two of one block are equal
    return whole


def check_not_fsdp1() -> None:
    """NotImplementedError if FSDP1 asks for the states of a model whose parameters it has flattened and spread over ranks.

    It gathers no state whose blocks are those of a flat piece, and would keep those of one rank for all of them.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("torch.distributed.fsdp.", "torch.distributed.checkpoint.")):
            model = frame.f_locals.get("model")
            handles = [getattr(m, "_handle", None) for m in model.modules()] if isinstance(model, nn.Module) else []
            if any(h is not None and (h.uses_sharded_strategy or not h._use_orig_params) for h in handles):
                raise NotImplementedError(
                    "FSDP1 (FullyShardedDataParallel) cannot gather the states of this optimizer, which belong to flat pieces of "
                    "parameters: save optimizer.state_dict() of each rank and load it there, or shard by FSDP2 (fully_shard)"
                )
        frame = frame.f_back
