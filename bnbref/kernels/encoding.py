"""The encoder of four bits: on CPUs a tree of comparisons in registers, on GPUs one look-up in a small table.

On a CPU one integer load gives the two elements of a byte. Four comparisons find the code of each: the first compares with the
middle threshold, and each result selects the threshold that the next one compares with. Nothing leaves the vector registers.
Comparisons and selections are about fifty operations an element. A GPU does them at half its rate, and there the look-up of
`counting` takes a fraction of the time: docs/content/reading.md, table "formulations".
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from bnbref.blockwise import magnitude, reciprocal
from bnbref.codebooks import Codebook
from bnbref.kernels import formulation, tracing
from bnbref.kernels.by_address import REAL_INPUTS
from bnbref.kernels.compiler import TUNED, is_gpu
from bnbref.kernels.counting import count, is_wide, table_of
from bnbref.kernels.floats import absmax_of_lanes, choose, in_lanes, in_pairs, select


def code_by_tree(scaled: Tensor, codebook: Codebook) -> Tensor:
    """The codes that `encode` would give, as float32 numbers, by a binary search in registers.  Exact."""
    x = scaled.abs() if codebook.sign_bit else scaled
    depth = len(codebook.thresholds).bit_length()
    size = 2**depth
    # Padded by infinities to a full tree: no number is above infinity, so that the leaves beyond it are never reached.
    thresholds = [*codebook.thresholds, *(math.inf,) * (size - 1 - len(codebook.thresholds))]
    bits: list[Tensor] = []
    for level in range(depth):
        stride = size >> level
        bits.append(x > choose(bits, thresholds[stride // 2 - 1 :: stride], x))
    order = codebook.order or range(size)
    codes = [float(code) for code in order] + [0.0] * (size - len(order))
    code = choose(bits, codes, x)
    if codebook.sign_bit:
        code = code + select(scaled < 0, float(len(codebook.values) // 2), 0.0)
    return code


def lane_elements(rows: Tensor, table: Tensor) -> int:
    """How many elements a lane encodes: four by a wide table, else as many as 16 bytes hold."""
    return 4 if table.dtype == torch.int64 else 16 // rows.itemsize


def _by_lanes(rows: Tensor, table: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    lanes = in_lanes(rows, blocksize, lane_elements(rows, table))
    absmax = absmax_of_lanes(lanes)
    scale = rearrange(reciprocal(absmax), "n b -> n b 1")
    codes = [count(x * scale, table, code_bits=4) for x in lanes]
    packed = [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    word = packed[0]
    for place, byte in enumerate(packed[1:], 1):
        word = word | byte << 8 * place
    return word.to(torch.int16 if len(packed) == 2 else torch.int32).flatten(1).view(torch.uint8), absmax


def _tables(rows: Tensor, *, blocksize: int, codebook: Codebook) -> tuple[Tensor, ...]:
    if not is_gpu(rows) or tracing():
        return ()
    table = table_of(codebook, rows.device, is_wide(rows, blocksize), code_bits=4)
    return () if table.dtype == torch.float32 or blocksize % lane_elements(rows, table) != 0 else (table,)


# Vectors of 256 bits, because comparisons of 512 bits go through AVX512's mask registers and back (docs: How to read the code,
# table "vector widths").
@formulation("quantize_rows", tables=_tables, cpu={"cpp.simdlen": 256}, gpu={**TUNED, **REAL_INPUTS})
def _(rows: Tensor, *, tables: tuple[Tensor, ...], blocksize: int, codebook: Codebook) -> tuple[Tensor, Tensor]:
    if tables:
        return _by_lanes(rows, tables[0], blocksize)
    even, odd = in_pairs(rows)
    if blocksize % 2 == 0:
        sizes = torch.maximum(magnitude(even), magnitude(odd))
        absmax = rearrange(sizes, "n (b s) -> n b s", s=blocksize // 2).amax(-1)
        scale_even = scale_odd = reciprocal(absmax)[:, :, None].expand(-1, -1, blocksize // 2).flatten(1)
    else:  # the two elements of a byte may lie in two blocks
        absmax = magnitude(rearrange(rows.float(), "n (b s) -> n b s", s=blocksize)).amax(-1)
        scale = reciprocal(absmax)[:, :, None].expand(-1, -1, blocksize).flatten(1)
        scale_even, scale_odd = scale[:, 0::2], scale[:, 1::2]
    code = code_by_tree(even * scale_even, codebook) * 16 + code_by_tree(odd * scale_odd, codebook)
    return code.to(torch.uint8), absmax
