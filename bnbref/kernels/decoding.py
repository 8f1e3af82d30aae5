"""Decoders: several codes are loaded at once, their values are looked up, scaled, and stored in the order of the output.

    by bytes     a lane takes one byte. The two values of its codes are scaled, rounded to 16 bits and joined in one integer,
                 so that the store is contiguous. For outputs of 16 bits.
    by words     a word of 64 bits has sixteen codes, which are shifted out in the order of the output. For float32.

Each is the faster one for its outputs: docs/content/reading.md, table "formulations".
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bnbref.codebooks import Codebook, value_table
from bnbref.kernels import formulation, tracing
from bnbref.kernels.compiler import is_gpu
from bnbref.kernels.floats import look_up, rounded_bits
from bnbref.kernels.lookup16 import lookup16, scaled16_bits

WORD = 16  # codes in 64 bits


# ---- four bits ------------------------------------------------------------------------------------------------------


def sixteen(codebook: Codebook) -> tuple[float, ...]:
    """The values of a 4-bit codebook, padded by zeros to sixteen, one for each code that four bits can hold."""
    return codebook.values + (0.0,) * (16 - len(codebook.values))


def value_tables(packed: Tensor, *_: Tensor | None, codebook: Codebook, **constants: Any) -> tuple[Tensor, ...]:
    """On a GPU the values of the codebook in memory. None on a CPU, and none in a trace, in which no tensor may be cached."""
    return (value_table(codebook, packed.device),) if is_gpu(packed) and not tracing() else ()


def _by_bytes(
    packed: Tensor, absmax: Tensor, tables: tuple[Tensor, ...], blocksize: int, codebook: Codebook, dtype: torch.dtype
) -> Tensor:
    codes = rearrange(packed.to(torch.int32), "n (b s) -> n b s", s=blocksize // 2)
    scale = rearrange(absmax, "n b -> n b 1")
    if tables:
        first, second = (rounded_bits(look_up(tables[0], c & 15) * scale, dtype) for c in (codes >> 4, codes))
    else:
        first, second = (scaled16_bits(c, scale, sixteen(codebook), dtype) for c in (codes >> 4, codes))
    return (first | second << 16).view(dtype).flatten(1)


@formulation("dequantize_rows", tables=value_tables)
def _(
    packed: Tensor, absmax: Tensor, *, tables: tuple[Tensor, ...], blocksize: int, codebook: Codebook, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    if dtype != torch.float32 and blocksize % 4 == 0:  # torch 2.11 cannot view a block of one integer as two
        return _by_bytes(packed, absmax, tables, blocksize, codebook, dtype)
    lane = torch.arange(WORD, device=packed.device)
    shift = (lane >> 1) * 8 + (1 - (lane & 1)) * 4  # 4, 0, 12, 8, 20, ...
    # The values are in registers on GPUs too, not in a table: for float32 the store takes the time, whatever the look-up does.
    value = lookup16((packed.view(torch.int64)[:, :, None] >> shift).to(torch.int32), sixteen(codebook))
    if blocksize % WORD == 0:
        blocks = rearrange(value, "n (b w) s -> n b w s", w=blocksize // WORD)
        scaled = blocks * rearrange(absmax, "n b -> n b 1 1")
    else:
        blocks = rearrange(rearrange(value, "n w s -> n (w s)"), "n (b s) -> n b s", s=blocksize)
        scaled = blocks * rearrange(absmax, "n b -> n b 1")
    return scaled.to(dtype).flatten(1)


# ---- eight bits -----------------------------------------------------------------------------------------------------


def _by_gathers(*_: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    # Scalar code, which GCC turns into vectors with gathers. It leaves a conversion to 16 bits scalar, so there Inductor writes
    # the vectors (docs: How to read the code, table "vector widths").
    return {"cpp.simdlen": 1} if dtype == torch.float32 else {}


@formulation("dequantize_blocks", cpu=_by_gathers)
def _(codes: Tensor, absmax: Tensor, values: Tensor, *, dtype: torch.dtype) -> Tensor:
    return (look_up(values, codes) * rearrange(absmax, "b -> b 1")).to(dtype)


@formulation("dequantize_nested", cpu=_by_gathers)
def _(codes: Tensor, absmax: Tensor, values: Tensor, offset: Tensor) -> Tensor:
    return look_up(values, codes) * rearrange(absmax, "b -> b 1") + offset
