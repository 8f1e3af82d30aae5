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
from bnbref.context import cached
from bnbref.kernels import formulation
from bnbref.kernels.byte_permute import dot, planes
from bnbref.kernels.compiler import is_gpu
from bnbref.kernels.configured import configured
from bnbref.kernels.decoding import sixteen
from bnbref.kernels.floats import look_up, words_of_lanes
from bnbref.kernels.lookup16 import lookup16


@cached(maxsize=64)
def _planes(codebook: Codebook, dtype: torch.dtype, device: torch.device) -> Tensor:
    return planes(torch.tensor(sixteen(codebook), dtype=torch.float32, device="cpu").to(dtype)).to(device)


def _tables(a: Tensor, *_: Tensor | None, codebook: Codebook, **constants: Any) -> tuple[Tensor, ...]:
    if a.shape[1] != 1:
        return ()
    dtype = torch.float32 if a.dtype == torch.float32 else torch.float16
    return (_planes(codebook, dtype, a.device),)


_GROUP = 4
"""Rows of a weight that a program of a GPU takes, if the weight has enough of them for many programs."""
_ENOUGH = 1024
"""Rows of a weight that make 256 programs of `_GROUP` rows, about two for each of the 132 processors of an H100. Not tuned."""


def _by_words(
    a: Tensor, packed: Tensor, scale: Tensor, table: Tensor, bias: Tensor | None, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """For GPUs: a lane takes some words of 64 bits, and the activations that they multiply, which lie beside each other in a row
    of a: `[m, 1, k]`.

    A program does so for several rows of the weight, for which it loads and widens the activations once: the weight is cut into
    parts of n / parts rows, and a program takes row i of each. What the lanes of a warp load at a time does not lie side by side,
    neither codes nor activations. So Triton gives both one layout, and no value passes through shared memory to another lane.
    """
    m, n = len(a), len(packed)
    codes = 32 if m <= 4 else 16  # more activations than 4 * 32 are more than a lane's registers hold
    # On a CPU Dynamo is told another size than n, and may not ask what divides it.
    parts = _GROUP if is_gpu(packed) and n >= _ENOUGH and n % _GROUP == 0 else 1
    words = rearrange(
        packed.view(torch.int64), "(p n) (b l w) -> p w n b l", p=parts, l=blocksize // codes, w=codes // 16
    )
    scales = rearrange(scale, "(p n) b 1 -> p n b 1", p=parts)
    biases = [None] * parts if bias is None else rearrange(bias, "(p n) -> p n", p=parts)
    activations = words_of_lanes(rearrange(a, "m 1 k -> m k"), blocksize, codes)
    out = []
    for row in range(m):
        for part, scale_of_part, bias_of_part in zip(words, scales, biases, strict=True):
            total = dot(part, activations[:, row], table, a.dtype) * scale_of_part
            out.append(_finished(total.sum((1, 2)), bias_of_part, dtype))
    return torch.cat(out).view(m, 1, n)


def _by_bytes(
    a: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, blocksize: int, codebook: Codebook, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """For CPUs: a lane takes a byte of two codes, of an even column and of the odd one beside it.

    a: `[m, 2, k / 2]`, the even columns and the odd ones. The rows of the weight are taken in two halves, so that two sums are
    under way at a time.
    """
    columns = rearrange(a.float(), "m p (b s) -> m p b s", s=blocksize // 2)
    n, table = packed.shape[0] // 2, sixteen(codebook)
    halves = []
    for half, scales in ((packed[:n], scale[:n]), (packed[n:], scale[n:])):
        codes = rearrange(half.to(torch.int32), "n (b s) -> n b s", s=blocksize // 2)
        values = [lookup16(codes >> 4, table), lookup16(codes, table)]
        halves.append([_summed(values, row.unbind(), scales) for row in columns.unbind()])
    return _finished(torch.stack([torch.cat(row) for row in zip(*halves, strict=True)]).unsqueeze(1), bias, dtype)


def _summed(values: Sequence[Tensor], columns: Sequence[Tensor], scale: Tensor) -> Tensor:
    """One row: the sum over the codes of a lane, times the scale of its block, summed over the lanes."""
    total = values[0] * columns[0]
    for value, column in zip(values[1:], columns[1:], strict=True):
        total = total + value * column
    return (total * scale).sum((1, 2))


def _finished(total: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (total if bias is None else total + bias.float()).to(dtype)


def _gpu(a: Tensor, *_: Tensor | None, **constants: Any) -> dict[str, Any]:
    # A loop over the columns, because a row that is one tile takes too many registers. Each sum is one expression and all of them
    # one kernel: Inductor would write what reads many tensors to memory, and cut long sums into two kernels.
    # What was timed: docs, How to read the code, "configurations of few rows".
    columns, warps = (64, 2) if len(a) <= 2 else (32, 1)
    return {
        "triton.persistent_reductions": False,
        "emulate_precision_casts": False,
        "split_reductions": False,
        **dict.fromkeys(("realize_reads_threshold", "realize_acc_reads_threshold", "realize_opcount_threshold"), 10**6),
        **configured(rows=1, columns=columns, warps=warps),
    }


@formulation(
    "multiply_rows",
    tables=_tables,
    # The kernel is bounded: the order of its sum is the compiler's, so it may fuse products and sums to one rounding as well.
    cpu={"cpp.enable_floating_point_contract_flag": "fast"},
    gpu=_gpu,
)
def _(
    a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None = None, absmax2: Tensor | None = None,
    values2: Tensor | None = None, offset: Tensor | None = None, *, tables: tuple[Tensor, ...], blocksize: int,
    blocksize2: int = 0, codebook: Codebook, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    scale = absmax
    if absmax2 is not None and values2 is not None and offset is not None:
        block = torch.arange(absmax.numel(), device=absmax.device) // blocksize2
        values = values2.expand(len(absmax), -1).gather(1, absmax.to(torch.int64))
        scale = values * look_up(absmax2, block).view(absmax.shape) + offset
    scale = rearrange(scale, "n b -> n b 1")
    if tables:
        return _by_words(a, packed, scale, tables[0], bias, blocksize, dtype)
    return _by_bytes(a, packed, scale, bias, blocksize, codebook, dtype)
