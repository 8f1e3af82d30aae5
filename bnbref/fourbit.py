"""Four bits a weight: blockwise absmax with a codebook of 16 values, two codes a byte.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2305.14314), section 3 and appendix E.

The first element is in the high nibble. Kernels see rows of `row_blocks(blocksize)` whole blocks, the fewest that fill
64-bit words, so that any blocksize, odd ones too, packs without a byte that two rows share.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bnbref.blockwise import (
    FLOATS,
    absmax_of_lanes,
    block_count,
    check_blocksize,
    check_device,
    check_float,
    count_below,
    cut,
    float_cells,
    float_of,
    in_lanes,
    in_rows,
    look_up,
    magnitude,
    reads_tables,
    reciprocal,
    tuned,
)
from bnbref.codebooks import Codebook, threshold_table, value_table
from bnbref.fused import fused
from bnbref.lut16 import lookup16, scaled16_bits

WORD = 16  # codes in 64 bits


def row_blocks(blocksize: int) -> int:
    """The fewest blocks whose codes fill whole 64-bit words.

    >>> row_blocks(64), row_blocks(24), row_blocks(1)
    (1, 2, 16)
    """
    return WORD // math.gcd(WORD, blocksize)


# ---- encode: definition ---------------------------------------------------------------------------------------------


def encode(scaled: Tensor, codebook: Codebook) -> Tensor:
    """uint8 codes of scaled float32 elements, by the two lines of `Codebook`: the definition.  Exact.

    >>> from bnbref.codebooks import FP4, NF4
    >>> encode(torch.tensor([-1.0, -0.0, 0.0, 1e-3, 1.0]), NF4)
    tensor([ 0,  7,  7,  7, 15], dtype=torch.uint8)
    >>> encode(torch.tensor([-1.0, -0.0, 0.0, 1e-3, 1.0]), FP4)
    tensor([11,  0,  0,  0,  3], dtype=torch.uint8)
    """
    rank = count_below(scaled.abs() if codebook.sign_bit else scaled, threshold_table(codebook, scaled.device))
    if codebook.order is not None:
        rank = torch.tensor(codebook.order, dtype=torch.int32, device=scaled.device)[rank.long()]
    if codebook.sign_bit:
        rank = rank + (scaled < 0) * (len(codebook.values) // 2)
    return rank.to(torch.uint8)


def _encode_options(rows: torch.dtype, **constants: Any) -> dict[str, Any]:
    # 256-bit vectors: on a Xeon 7.6 and 10.9 ms instead of 19 and 15 for 16.7M bfloat16 and float32, two threads; on an
    # EPYC no difference. Comparisons leave AVX512's mask registers and come back.
    return {"cpp.simdlen": 256}


@fused(dynamic={"rows": (0,)}, cpu=_encode_options, gpu=tuned)
def quantize_rows(
    rows: Tensor, cells: Tensor | None = None, *, blocksize: int, codebook: Codebook
) -> tuple[Tensor, Tensor]:
    """`[rows, blocks * blocksize]` -> packed uint8 `[rows, bytes]`, float32 absmax `[rows, blocks]`.  Exact.

    cells: the codebook's `code_table`, for GPUs.
    """
    blocks = rearrange(rows.float(), "n (b s) -> n b s", s=blocksize)
    absmax = magnitude(blocks).amax(-1)
    code = encode(blocks * rearrange(reciprocal(absmax), "n b -> n b 1"), codebook)
    high, low = rearrange(rearrange(code, "n b s -> n (b s)"), "n (byte two) -> two n byte", two=2)
    return high << 4 | low, absmax


# ---- encode: formulation --------------------------------------------------------------------------------------------
# One integer load gives both elements of a byte, a decision tree of four comparisons gives the bits of the code, and all
# of it stays in vector registers: 7 ms for 16.7M bfloat16 on an EPYC with two threads, bitsandbytes' CPU kernel 210 ms.


def split_pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd elements of each row as two float32 tensors, without a load of stride two."""
    if rows.dtype == torch.float32:
        words = rows.view(torch.int64)
        return words.to(torch.int32).view(torch.float32), (words >> 32).to(torch.int32).view(torch.float32)
    words = rows.view(torch.int32)
    if rows.dtype == torch.bfloat16:
        return (words << 16).view(torch.float32), (words & -65536).view(torch.float32)
    return _half_bits(words << 16), _half_bits(words)


def _half_bits(words: Tensor) -> Tensor:
    """The float16 in the upper half of each int32, widened to float32 by integer arithmetic."""
    sign = words & -(2**31)
    digits = (words >> 3) & 0x0FFFE000  # exponent and mantissa where float32 has them
    # Scaling by 2^112 moves the bias from 15 to 127; float32 subnormals on the way make it exact for float16's too.
    finite = digits.view(torch.float32) * 2.0**112
    beyond = (digits | 0x7F800000).view(torch.float32)
    widened = torch.where(digits >= 0x0F800000, beyond, finite)
    return (widened.view(torch.int32) | sign).view(torch.float32)


def _select(bit: Tensor, upper: Tensor | float, lower: Tensor | float) -> Tensor:
    # torch.where of two Python floats would have the default dtype, which is bfloat16 while transformers loads a model.
    if not isinstance(upper, Tensor):
        upper = torch.full((), upper, dtype=torch.float32, device=bit.device)
    return torch.where(bit, upper, lower)


def _choose(bits: Sequence[Tensor], leaves: Sequence[float], like: Tensor) -> Tensor:
    """The leaf that the bits, most significant first, number."""
    row: list[Tensor | float] = list(leaves)
    for bit in bits:
        half = len(row) // 2
        row = [_select(bit, row[half + i], row[i]) for i in range(half)]
    return row[0] if isinstance(row[0], Tensor) else torch.full((), row[0], dtype=torch.float32, device=like.device)


def _code_by_tree(scaled: Tensor, codebook: Codebook) -> Tensor:
    """`encode` by binary decision, the code as float32."""
    x = scaled.abs() if codebook.sign_bit else scaled
    depth = len(codebook.thresholds).bit_length()
    size = 2**depth
    # No number is above inf, so that a table with fewer thresholds is a tree with unreachable leaves.
    thresholds = [*codebook.thresholds, *(math.inf,) * (size - 1 - len(codebook.thresholds))]
    bits: list[Tensor] = []
    for level in range(depth):
        stride = size >> level
        bits.append(x > _choose(bits, thresholds[stride // 2 - 1 :: stride], x))
    order = range(size) if codebook.order is None else codebook.order
    code = _choose(bits, [float(code) for code in order], x)
    if codebook.sign_bit:
        code = code + _select(scaled < 0, float(len(codebook.values) // 2), 0.0)
    return code


# ---- encode: formulation for GPUs -----------------------------------------------------------------------------------
# The tree costs a GPU fifty comparisons and selects an element, at half rate. A look-up that stays in a few cache lines
# costs a fraction of that, but each keeps the load unit busy for several cycles: there is one for an element.


@functools.cache
def code_table(codebook: Codebook, device: torch.device) -> Tensor | None:
    """`encode` by cell: the upper bits of a float32 are its cell, in which the code changes once at most.

    An entry is an int32: in its upper nibble the code of magnitudes up to a switch, in the next that of those above, and
    below them the lower bits of the switch. All are found by asking `encode`. None for a codebook that changes twice in
    2^13 cells.  Finite x or NaN.
    """
    thresholds = torch.tensor(codebook.thresholds, dtype=torch.float32, device="cpu")

    def code(pattern: Tensor, special: Tensor) -> Tensor:
        return encode(float_of(pattern).masked_fill(special, math.nan), codebook)

    for bits in range(9, 14):
        first, last, special = float_cells(bits)
        ends = torch.stack((float_of(first), float_of(last)))
        ends = ends.abs() if codebook.sign_bit else ends
        below = torch.searchsorted(thresholds, ends.amin(0))
        inside = torch.searchsorted(thresholds, ends.amax(0), right=True).masked_fill(special, 0) - below
        low = code(first, special)
        switch, beyond = first, last + 1  # the last magnitude with the code of the first, by bisection
        for _ in range(32 - bits):
            middle = (switch + beyond) >> 1
            same = code(middle, special) == low
            switch, beyond = torch.where(same, middle, switch), torch.where(same, beyond, middle)
        high = code(last, special)
        once = code(torch.minimum(beyond, last), special) == high  # below -0.0 there may be another code than at it
        if int(inside.max()) <= 1 and bool(once.all()):
            entry = low.long() << 28 | high.long() << 24 | switch & (1 << (32 - bits)) - 1
            return float_of(entry).view(torch.int32).to(device)
    return None


def _encode_by_cell(scaled: Tensor, cells: Tensor) -> Tensor:
    size = 33 - cells.numel().bit_length()  # of a cell, in bits
    pattern, below = scaled.view(torch.int32), (1 << size) - 1
    entry = look_up(cells, pattern >> size & (cells.numel() - 1))
    return torch.where((pattern & below) > (entry & below), entry >> 24, entry >> 28) & 15


def lane_elements(dtype: torch.dtype) -> int:
    """Elements that a lane encodes: 16 bytes of them."""
    return 16 // dtype.itemsize


def _encode_lanes(rows: Tensor, cells: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    lanes = in_lanes(rows, blocksize, lane_elements(rows.dtype))
    absmax = absmax_of_lanes(lanes)
    scale = rearrange(reciprocal(absmax), "n b -> n b 1")
    codes = [_encode_by_cell(x * scale, cells) for x in lanes]
    packed = [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    word = packed[0]
    for place, byte in enumerate(packed[1:], 1):
        word = word | byte << 8 * place
    return word.to(torch.int16 if len(packed) == 2 else torch.int32).flatten(1).view(torch.uint8), absmax


@quantize_rows.formulation
def _(rows: Tensor, cells: Tensor | None = None, *, blocksize: int, codebook: Codebook) -> tuple[Tensor, Tensor]:
    if cells is not None:
        return _encode_lanes(rows, cells, blocksize)
    even, odd = split_pairs(rows)
    if blocksize % 2 == 0:
        sizes = torch.maximum(magnitude(even), magnitude(odd))
        absmax = rearrange(sizes, "n (b s) -> n b s", s=blocksize // 2).amax(-1)
        scale_even = scale_odd = reciprocal(absmax)[:, :, None].expand(-1, -1, blocksize // 2).flatten(1)
    else:  # pairs straddle blocks
        absmax = magnitude(rearrange(rows.float(), "n (b s) -> n b s", s=blocksize)).amax(-1)
        scale = reciprocal(absmax)[:, :, None].expand(-1, -1, blocksize).flatten(1)
        scale_even, scale_odd = scale[:, 0::2], scale[:, 1::2]
    code = _code_by_tree(even * scale_even, codebook) * 16 + _code_by_tree(odd * scale_odd, codebook)
    return code.to(torch.uint8), absmax


# ---- decode ---------------------------------------------------------------------------------------------------------


@fused(dynamic={"packed": (0,), "absmax": (0,)}, gpu=tuned)
def dequantize_rows(
    packed: Tensor,
    absmax: Tensor,
    table: Tensor | None = None,
    *,
    blocksize: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    """packed uint8 `[rows, bytes]`, float32 `[rows, blocks]` -> dtype `[rows, blocks * blocksize]`.  Exact.

    table: the codebook's values in memory, for GPUs.
    """
    code = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
    value = value_table(codebook, packed.device)[code.to(torch.int32)]
    scaled = rearrange(value, "n (b s) -> n b s", s=blocksize) * rearrange(absmax, "n b -> n b 1")
    return scaled.to(dtype).flatten(1)


def sixteen(codebook: Codebook) -> tuple[float, ...]:
    """The values, zeros after them: four bits can say no more."""
    return codebook.values + (0.0,) * (16 - len(codebook.values))


def decode_nibble(codes: Tensor, table: Tensor | None, codebook: Codebook) -> Tensor:
    """The value of the lower four bits, looked up in memory where there is a table (a GPU) and else in registers."""
    return lookup16(codes, sixteen(codebook)) if table is None else look_up(table, codes & 15)


def _decode_bytes(
    packed: Tensor, absmax: Tensor, table: Tensor | None, blocksize: int, codebook: Codebook, dtype: torch.dtype
) -> Tensor:
    """A byte a lane, and both elements of it in one store: for GPUs, to the 16-bit dtypes.

    256 Mi elements to bfloat16 took an H100 0.32 ms with the table in memory, 0.39 in registers, 0.62 by 64-bit words as
    below; to float32 0.57, 0.54 and 0.50.
    """
    codes = rearrange(packed, "n (b s) -> n b s", s=blocksize // 2).to(torch.int32)
    scale = rearrange(absmax, "n b -> n b 1")
    first = decode_nibble(codes >> 4, table, codebook) * scale
    second = decode_nibble(codes, table, codebook) * scale
    low, high = (value.to(dtype).view(torch.int16).to(torch.int32) for value in (first, second))
    return (low & 0xFFFF | high << 16).view(dtype).flatten(1)


# Two ways, each the faster for its dtypes. A byte a lane: both its nibbles are scaled, rounded, and joined in one integer,
# so that the store is contiguous. Or sixteen codes to a 64-bit word, shifted out in the order of the output.
@dequantize_rows.formulation
def _(
    packed: Tensor,
    absmax: Tensor,
    table: Tensor | None = None,
    *,
    blocksize: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    by_bytes = dtype != torch.float32 and blocksize % 4 == 0  # torch 2.11 cannot view a block of one integer as two
    if by_bytes and packed.device.type != "cpu":
        return _decode_bytes(packed, absmax, table, blocksize, codebook, dtype)
    values = sixteen(codebook)
    if by_bytes:
        codes = rearrange(packed.to(torch.int32), "n (b s) -> n b s", s=blocksize // 2)
        scale = rearrange(absmax, "n b -> n b 1")
        first = scaled16_bits(codes >> 4, scale, values, dtype)
        second = scaled16_bits(codes, scale, values, dtype)
        return (first | (second << 16)).view(dtype).flatten(1)
    lane = torch.arange(WORD, device=packed.device)
    shift = (lane >> 1) * 8 + (1 - (lane & 1)) * 4  # 4, 0, 12, 8, 20, ...
    value = lookup16((packed.view(torch.int64)[:, :, None] >> shift).to(torch.int32), values)
    if blocksize % WORD == 0:
        blocks = rearrange(value, "n (b w) s -> n b w s", w=blocksize // WORD)
        scaled = blocks * rearrange(absmax, "n b -> n b 1 1")
    else:
        blocks = rearrange(rearrange(value, "n w s -> n (w s)"), "n (b s) -> n b s", s=blocksize)
        scaled = blocks * rearrange(absmax, "n b -> n b 1")
    return scaled.to(dtype).flatten(1)


# ---- any shape ------------------------------------------------------------------------------------------------------


def quantize(
    x: Tensor, codebook: Codebook, blocksize: int = 64, quant_storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of a tensor of any shape.  Exact.

    Returns the codes as `[ceil(numel / 2) / itemsize, 1]` of `quant_storage` (the bytes reinterpreted) and absmax as
    float32 `[ceil(numel / blocksize)]`. The nibble after an odd last element is the code of 0.0.

    >>> from bnbref.codebooks import NF4
    >>> packed, absmax = quantize(torch.tensor([2.0, -2.0, 0.0]), NF4)
    >>> [f"{byte:02x}" for byte in packed.flatten().tolist()], absmax
    (['f0', '77'], tensor([2.]))
    """
    check_float("x", x)
    n = x.numel()
    blocksize = check_blocksize(blocksize, n)
    n_bytes = -(-n // 2)
    if n_bytes % quant_storage.itemsize != 0:
        raise ValueError(
            f"quant_storage {quant_storage} has {quant_storage.itemsize} bytes, which do not divide "
            f"the {n_bytes} bytes of {n} packed elements"
        )
    rows = in_rows(x, blocksize * row_blocks(blocksize))
    by_cell = reads_tables(x.device) and blocksize % lane_elements(x.dtype) == 0
    cells = (code_table(codebook, x.device),) if by_cell else ()
    packed, absmax = quantize_rows(rows, *cells, blocksize=blocksize, codebook=codebook)
    return cut(packed, n_bytes).view(quant_storage).view(-1, 1), cut(absmax, block_count(n, blocksize))


def dequantize(
    packed: Tensor, absmax: Tensor, codebook: Codebook, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`dtype(fl(values[code] * absmax))` in the given shape.  Exact.

    >>> from bnbref.codebooks import NF4
    >>> dequantize(*quantize(torch.tensor([2.0, -2.0, 0.0]), NF4), NF4, 64, (3,), torch.float32)
    tensor([ 2., -2.,  0.])
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    n = math.prod(shape)
    blocksize = check_blocksize(blocksize, n)
    codes = packed.detach().reshape(-1).view(torch.uint8)
    if codes.numel() != -(-n // 2):
        raise ValueError(f"packed must hold {-(-n // 2)} bytes for shape {tuple(shape)}, got {codes.numel()}")
    if absmax.numel() != block_count(n, blocksize):
        raise ValueError(
            f"absmax must have one scale per block: {block_count(n, blocksize)} for {n} elements "
            f"in blocks of {blocksize}, got {absmax.numel()}"
        )
    check_device("packed", packed, absmax=absmax)
    blocks = row_blocks(blocksize)
    rows = in_rows(codes, blocks * blocksize // 2)
    scales = in_rows(absmax.float(), blocks)
    values: tuple[Tensor] | tuple[()] = ()
    if dtype != torch.float32 and reads_tables(codes.device):
        values = (value_table(codebook, codes.device),)
    out = dequantize_rows(rows, scales, *values, blocksize=blocksize, codebook=codebook, dtype=dtype)
    return cut(out, n).view(torch.Size(shape))
