"""The product of a few rows and a 4-bit weight, computed from the codes without a dequantized weight in memory.

Generating a token is a sequence of such products. The values of the codes are looked up once for all rows, and the scale of a
block multiplies the sum over the codes of a lane instead of each code. What this gains: docs/content/reading.md, table
"formulations".
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bnbref.codebooks import Codebook
from bnbref.context import kept
from bnbref.kernels import formulation, tracing
from bnbref.kernels.byte_permute import lookup8, planes
from bnbref.kernels.decoding import sixteen
from bnbref.kernels.floats import in_lanes, look_up
from bnbref.kernels.lookup16 import lookup16


def _new_planes(codebook: Codebook, dtype: torch.dtype, device: torch.device) -> Tensor:
    return planes(torch.tensor(sixteen(codebook), dtype=torch.float32, device="cpu").to(dtype)).to(device)


_planes = kept(maxsize=64)(_new_planes)


def _tables(a: Tensor, *_: Tensor | None, codebook: Codebook, **constants: Any) -> tuple[Tensor, ...]:
    if a.shape[1] != 1:
        return ()
    dtype = torch.float32 if a.dtype == torch.float32 else torch.float16
    return ((_new_planes if tracing() else _planes)(codebook, dtype, a.device),)


def _by_words(a: Tensor, packed: Tensor, scale: Tensor, table: Tensor, blocksize: int) -> list[Tensor]:
    """For GPUs: a lane takes a word of eight codes and the eight activations beside each other that they multiply, p = 1."""
    words = rearrange(packed.view(torch.int32), "n (b w) -> n b w", w=blocksize // 8)
    columns = in_lanes(rearrange(a, "m 1 k -> m k"), blocksize, 8)
    values = [lookup8(words, table, place) for place in range(8)]
    return [_summed(values, [column[row] for column in columns], scale) for row in range(a.shape[0])]


def _by_bytes(a: Tensor, packed: Tensor, scale: Tensor, blocksize: int, codebook: Codebook) -> list[Tensor]:
    """For CPUs: a lane takes a byte of two codes, p = 2.

    The rows of the weight are taken in two halves, so that two sums are under way at a time.
    """
    columns = rearrange(a.float(), "m p (b s) -> m p b s", s=blocksize // 2)
    n, table = packed.shape[0] // 2, sixteen(codebook)
    halves = []
    for half, scales in ((packed[:n], scale[:n]), (packed[n:], scale[n:])):
        codes = rearrange(half.to(torch.int32), "n (b s) -> n b s", s=blocksize // 2)
        values = [lookup16(codes >> 4, table), lookup16(codes, table)]
        halves.append([_summed(values, row.unbind(), scales) for row in columns.unbind()])
    return [torch.cat(row) for row in zip(*halves, strict=True)]


def _summed(values: Sequence[Tensor], columns: Sequence[Tensor], scale: Tensor) -> Tensor:
    """One row: the sum over the codes of a lane, times the scale of its block, summed over the lanes."""
    total = values[0] * columns[0]
    for value, column in zip(values[1:], columns[1:], strict=True):
        total = total + value * column
    return (total * scale).sum((1, 2))


@formulation(
    "multiply_rows",
    tables=_tables,
    # The kernel is bounded: the order of its sum is the compiler's, so it may fuse products and sums to one rounding as well.
    cpu={"cpp.enable_floating_point_contract_flag": "fast"},
    # A loop over the columns, because a row that is one tile takes too many registers.
    gpu={
        "coordinate_descent_tuning": True,
        "triton.persistent_reductions": False,
        "emulate_precision_casts": False,
    },
)
def _(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    absmax2: Tensor | None = None,
    values2: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    tables: tuple[Tensor, ...],
    blocksize: int,
    blocksize2: int = 0,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    scale = absmax
    if absmax2 is not None and values2 is not None and offset is not None:
        block = torch.arange(absmax.numel(), device=absmax.device) // blocksize2
        scale = look_up(values2, absmax) * look_up(absmax2, block).view(absmax.shape) + offset
    scale = rearrange(scale, "n b -> n b 1")
    rows = (
        _by_words(a, packed, scale, tables[0], blocksize)
        if tables
        else _by_bytes(a, packed, scale, blocksize, codebook)
    )
    y = torch.stack(rows).unsqueeze(1)
    return (y if bias is None else y + bias.float()).to(dtype)
