"""Thresholds counted by one look-up and one comparison, for encoders of many values.

Floats that share their upper bits are a cell. Cells are chosen so small that the code changes at most once in each. The table
has one int32 entry for each cell, which holds the code of the smaller magnitudes in it (`low`), the code of the larger ones
(`high`), and the lower bits of the largest magnitude whose code is still `low` (`switch`):

    entry = high << (32 - c) | low << (32 - 2c) | switch

A code has c bits, and the lower bits of a float are at most 32 - 2c, so that all three fit.

What this replaces and gains: docs/content/reading.md, table "formulations".
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bnbref.blockwise import count_below, encode, magnitude, reciprocal
from bnbref.codebooks import Codebook, threshold_table
from bnbref.context import cached
from bnbref.kernels import by_address, formulation, tracing
from bnbref.kernels.compiler import TUNED, is_gpu, is_nvidia
from bnbref.kernels.floats import absmax_of_lanes, in_lanes, look_up

_SMALLEST_TABLE, _LARGEST_TABLE = 9, 16  # upper bits of a float that number its cell: a table has 2^9 to 2^16 entries


def float_of(pattern: Tensor) -> Tensor:
    """The float32 with the lower 32 bits of an int64."""
    return pattern.to(torch.int32).view(torch.float32)  # integers are cut off


@cached()
def code_table(codebook: Codebook, device: torch.device, code_bits: int = 8) -> Tensor | None:
    """The table by which `code_by_table` does what `encode` does: int32 `[cells]`, with as few cells as will do.

    code_bits: c above, 4 or 8. Returns None for a codebook whose code changes twice even in one of 2^16 cells.
    """
    thresholds = threshold_table(codebook, torch.device("cpu"))
    for bits in range(max(_SMALLEST_TABLE, 2 * code_bits), _LARGEST_TABLE + 1):
        size = 32 - bits
        first = torch.arange(2**bits, dtype=torch.int64, device="cpu") << size
        last = first | (2**size - 1)

        def place(pattern: Tensor) -> Tensor:
            """The place of a float among the thresholds. It changes where the code does; and it is monotonic in the magnitude
            within a cell, which the code itself need not be."""
            x = float_of(pattern)
            if not codebook.sign_bit:
                return count_below(x, thresholds)
            return 2 * count_below(x.abs(), thresholds) + (x < 0)  # -0.0 is not below 0

        switch, beyond = first, last + 1  # by bisection: the largest magnitude of a cell with the place of the smallest
        for _ in range(size):
            middle = (switch + beyond) >> 1
            same = place(middle) == place(first)
            switch, beyond = torch.where(same, middle, switch), torch.where(same, beyond, middle)
        if torch.equal(place(torch.minimum(beyond, last)), place(last)):
            low, high = (encode(float_of(pattern), codebook).long() for pattern in (first, last))
            entry = high << (32 - code_bits) | low << (32 - 2 * code_bits) | switch & (1 << size) - 1
            return float_of(entry & 0xFFFFFFFF).view(torch.int32).to(device)
    return None


def code_by_table(scaled: Tensor, table: Tensor, code_bits: int = 8) -> Tensor:
    """The codes that `encode` would give, as int32, by the `code_table` of the codebook.  Exact for every float32."""
    size = 33 - table.numel().bit_length()  # of a cell, in bits
    pattern, below = scaled.view(torch.int32), (1 << size) - 1
    entry = look_up(table, pattern >> size & (table.numel() - 1))
    above = (pattern & below) > (entry & below)
    return torch.where(above, entry >> (32 - code_bits), entry >> (32 - 2 * code_bits)) & (1 << code_bits) - 1


# ---- a whole threshold in each entry --------------------------------------------------------------------------------


@cached()
def wide_table(codebook: Codebook, device: torch.device) -> Tensor | None:
    """The table by which `code_by_wide_table` does what `encode` does: int64 `[cells + 1]`, see `by_address`.

    An entry has the code up to the threshold above, and the threshold, a float32, below. Returns None for a codebook whose codes
    are not in the order of its values, and for one that has two thresholds even in one of 2^16 cells.
    """
    if codebook.order is not None or codebook.sign_bit:
        return None
    thresholds = threshold_table(codebook, torch.device("cpu"))
    above = torch.cat([thresholds, thresholds.new_full((1,), torch.inf)]) + 0.0  # without -0.0: -0.0 - 0.0 is negative
    for bits in range(_SMALLEST_TABLE + 1, _LARGEST_TABLE + 1):  # from 2^10 cells on, NaN and infinity are not in one
        first = torch.arange(2**bits, dtype=torch.int64, device="cpu") << (32 - bits)
        ends = float_of(first), float_of(first | (1 << (32 - bits)) - 1)
        one, other = (count_below(x, thresholds).long() for x in ends)
        nan = ends[1].isnan()
        if bool((nan | ((one - other).abs() <= 1)).all()):
            # A difference with a negative NaN has its sign, and counts as one: its code is 0 then too.
            low = torch.where(nan, -(first >> 31), torch.minimum(one, other))
            # The cell of an infinity is that of NaN too, but of signalling ones, which no product is. Its threshold is NaN, whose
            # difference with infinity has no sign: that of two infinities has one on a CPU.
            low = torch.where(ends[0].isinf(), one, low)
            threshold = torch.where(ends[0] == torch.inf, torch.nan, above[low])
            return by_address.addressed(low << 32 | threshold.view(torch.int32).long() & 0xFFFFFFFF, device)
    return None


def code_by_wide_table(scaled: Tensor, table: Tensor) -> Tensor:
    """The codes that `encode` would give, as int32, by the `wide_table` of the codebook.

    Exact for every float32 but signalling NaN, which no product is, if the machine gives both NaN, that of the scaling and that
    of the difference here, the same sign. CPUs keep the one that NaN had, NVIDIA GPUs never set it.
    """
    bits = table.numel().bit_length() - 1
    entry = by_address.look_up(table, scaled.view(torch.int32) >> (32 - bits) & (1 << bits) - 1)
    threshold = entry.to(torch.int32).view(torch.float32)
    # The sign of the difference and not a comparison, which ptxas makes a fifth more instructions of.
    return (entry >> 32).to(torch.int32) - ((threshold - scaled).view(torch.int32) >> 31)


# ---- quantize_blocks ------------------------------------------------------------------------------------------------


def table_of(codebook: Codebook, device: torch.device, wide: bool = False, code_bits: int = 8) -> Tensor:
    """The table that `count` takes: if wide, a wide one; else a code table. It is the thresholds where the codebook has neither,
    and in a trace, in which no tensor may be cached."""
    table = None
    if not tracing():
        table = wide_table(codebook, device) if wide else None
        table = code_table(codebook, device, code_bits) if table is None else table
    return threshold_table(codebook, device) if table is None else table


def is_wide(x: Tensor, blocksize: int) -> bool:
    """Whether the encoder of x takes a wide table: on an NVIDIA GPU that of 16-bit floats does, which waits for look-ups and not
    for memory."""
    return is_nvidia(x) and x.itemsize == 2 and blocksize % 4 == 0


def _tables(blocks: Tensor, *, codebook: Codebook) -> tuple[Tensor]:
    return (table_of(codebook, blocks.device, is_wide(blocks, blocks.shape[1])),)


def count(scaled: Tensor, table: Tensor, code_bits: int = 8) -> Tensor:
    """The codes of scaled elements as integers, by a wide table (int64), a code table (int32) or thresholds (float32)."""
    if table.dtype == torch.int64:
        return code_by_wide_table(scaled, table)
    return count_below(scaled, table) if table.dtype == torch.float32 else code_by_table(scaled, table, code_bits)


def _options(blocks: Tensor, **constants: Any) -> dict[str, Any]:
    # For float32, vectors of 256 bits are the faster ones; for 16-bit floats the widest (docs: How to read the code, table
    # "vector widths").
    return {"cpp.simdlen": 256} if blocks.dtype == torch.float32 else {}


@formulation("quantize_blocks", tables=_tables, cpu=_options, gpu={**TUNED, **by_address.REAL_INPUTS})
def _(blocks: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    (table,) = tables
    if is_gpu(blocks) and blocks.shape[1] % 4 == 0 and table.dtype != torch.float32:
        # A lane holds four elements. With eight, Inductor tries configurations of the kernel that take minutes to compile.
        lanes = [x.squeeze(1) for x in in_lanes(blocks, blocks.shape[1], 4)]
        absmax = absmax_of_lanes(lanes)
        scale = rearrange(reciprocal(absmax), "b -> b 1")
        one, two, three, four = (count(x * scale, table) for x in lanes)
        return (one | two << 8 | three << 16 | four << 24).view(torch.uint8), absmax
    x = blocks.float()
    absmax = magnitude(x).amax(-1)
    return count(x * rearrange(reciprocal(absmax), "b -> b 1"), table).to(torch.uint8), absmax
