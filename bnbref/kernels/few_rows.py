"""The product of one row and a 4-bit weight, computed from the codes without a dequantized weight in memory.

Generating a token is a sequence of such products. What this gains: docs/content/reading.md, table "formulations".
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bnbref.codebooks import Codebook
from bnbref.kernels.decoding import sixteen, value_tables
from bnbref.kernels.door import formulation
from bnbref.kernels.floats import look_up, rounded
from bnbref.kernels.lookup16 import lookup16, scaled16


def _tables(a: Tensor, packed: Tensor, *_: Tensor | None, codebook: Codebook, **constants: Any) -> tuple[Tensor, ...]:
    return value_tables(packed, codebook=codebook)


def _by_words(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    tables: tuple[Tensor, ...],
    blocksize: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    """For GPUs: a lane takes a word of eight codes. a: activations `[8, k/8]`, where `a[i, j]` is column `8 * j + i`."""
    words = rearrange(packed.view(torch.int32), "n (b w) -> n b w", w=blocksize // 8)
    scale = rearrange(absmax, "n b -> n b 1")
    columns = rearrange(a, "p (b w) -> p b w", w=blocksize // 8).float()

    def product(place: int) -> Tensor:
        codes = words >> (8 * (place // 2) + 4 * (1 - place % 2))
        weight = rounded(
            (look_up(tables[0], codes & 15) if tables else lookup16(codes, sixteen(codebook))) * scale, dtype
        )
        return weight * columns[place]

    total = product(0)
    for place in range(1, 8):
        total = total + product(place)
    return total.sum((1, 2))


def _by_halves(
    a: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, codebook: Codebook, dtype: torch.dtype
) -> Tensor:
    """For CPUs: a lane takes a byte of two codes. The rows of the weight are taken in two halves, so that two sums are under way
    at a time. a: activations `[2, k/2]`, where `a[i, j]` is column `2 * j + i`."""
    even, odd = rearrange(a.float(), "two (b s) -> two b s", s=blocksize // 2)
    n, values = packed.shape[0] // 2, sixteen(codebook)
    halves = []
    for rows, scales in ((packed[:n], absmax[:n]), (packed[n:], absmax[n:])):
        codes = rearrange(rows.to(torch.int32), "n (b s) -> n b s", s=blocksize // 2)
        scale = rearrange(scales, "n b -> n b 1")
        first, second = scaled16(codes >> 4, scale, values, dtype), scaled16(codes, scale, values, dtype)
        halves.append((first * even).sum((1, 2)) + (second * odd).sum((1, 2)))
    return torch.cat(halves)


@formulation(
    "multiply_row",
    tables=_tables,
    # The kernel is bounded: the order of its sum is the compiler's, so it may fuse products and sums to one rounding as well.
    cpu={"cpp.enable_floating_point_contract_flag": "fast"},
    gpu={"max_autotune_pointwise": True, "emulate_precision_casts": False},  # more block sizes than Inductor would try
)
def _(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    *,
    tables: tuple[Tensor, ...],
    blocksize: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    if a.shape[0] == 8:
        y = _by_words(a, packed, absmax, tables, blocksize, codebook, dtype)
    else:
        y = _by_halves(a, packed, absmax, blocksize, codebook, dtype)
    return (y if bias is None else y + bias.float()).to(dtype)
