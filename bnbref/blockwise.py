"""Blockwise absmax quantization: scale a block by its largest magnitude, count thresholds, and undo it.

    scaled = x * (1 / absmax)            per block, float32
    code   = number of thresholds below scaled
    x~     = values[code] * absmax       one product in float32, one rounding to the output dtype

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2110.02861), section 2.1.

Kernels see `[blocks, blocksize]`, the last block padded by zeros, so that only the number of blocks varies.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bnbref.codebooks import Codebook, threshold_table
from bnbref.fused import compile_enabled, fused, tracing

SMALLEST_NORMAL = 2.0**-126
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def in_rows(x: Tensor, width: int) -> Tensor:
    """`x` flattened to `[rows, width]`, zeros after the last element; at least two rows, which Dynamo does not specialise.

    >>> in_rows(torch.ones(3), 2)
    tensor([[1., 1.],
            [1., 0.]])
    """
    flat = x.detach().reshape(-1).contiguous()
    n = flat.numel()
    rows = max(-(-n // width), 2)
    if rows * width != n:
        flat = F.pad(flat, (0, rows * width - n))
    elif not torch.compiler.is_compiling() and flat.storage_offset() * flat.itemsize % 8 != 0:
        flat = flat.clone()  # kernels read 64-bit words, and a slice may begin inside one (Dynamo knows no offsets)
    return flat.view(rows, width)


def cut(padded: Tensor, numel: int) -> Tensor:
    """The first `numel` elements, flat: `in_rows` undone.

    A copy where there was padding. A view would keep it: `torch.save` writes whole storages, safetensors refuses such views.

    >>> cut(in_rows(torch.ones(3), 2), 3).untyped_storage().nbytes()
    12
    """
    flat = padded.view(-1)
    return flat if flat.numel() == numel else flat[:numel].clone()


def block_count(numel: int, blocksize: int) -> int:
    """Blocks that hold `numel` elements, the last one perhaps in part."""
    return -(-numel // blocksize)


def check_blocksize(blocksize: int, numel: int) -> int:
    """A blocksize, an integer of at least 1, no larger than it needs to be for a tensor that is a part of one block.

    >>> check_blocksize(64, 10), check_blocksize(2**40, 5000)
    (64, 8192)
    """
    if not isinstance(blocksize, int) or blocksize < 1:
        raise ValueError(f"blocksize must be a positive integer, got {blocksize!r}")
    # A kernel pads to whole blocks; powers of two, so that few variants of it are compiled.
    return blocksize if blocksize <= 4096 else min(blocksize, 1 << max(12, (numel - 1).bit_length()))


def check_float(name: str, x: Tensor) -> Tensor:
    """The tensor, if its dtype is one that can be quantized."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    return x


def check_device(name: str, x: Tensor, **others: Tensor | None) -> None:
    """ValueError if one of the others is not on the device of `x`, which is called `name`."""
    for other, y in others.items():
        if y is not None and y.device != x.device:
            raise ValueError(f"{other} must be on the device of {name}, {x.device}, got {y.device}")


# ---- scale ----------------------------------------------------------------------------------------------------------


def magnitude(x: Tensor) -> Tensor:
    """`|x|`, and 0 for NaN, which takes no part in the scale of its block, and below 2^-126.

    A block whose largest magnitude is below 2^-126 then has absmax 0: its reciprocal would not be a number. (Flushing the
    elements flushes the maximum, without one more pass over the scales.)
    """
    size = x.abs()
    return torch.where(size >= SMALLEST_NORMAL, size, 0.0)


def reciprocal(absmax: Tensor) -> Tensor:
    """`1 / absmax`, correctly rounded, and 0 for 0: an all-zero block then scales to zeros."""
    # Not 1 / x or torch.reciprocal, for which Inductor emits the 2-ulp division on GPUs even when told to round.
    return torch.where(absmax > 0, torch.ones_like(absmax) / absmax, 0.0)


# ---- look up --------------------------------------------------------------------------------------------------------


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, for an index that is never negative: of a gather Inductor does not ask whether it is."""
    return table.gather(0, index.to(torch.int64).reshape(-1)).reshape(index.shape)


# ---- count thresholds -----------------------------------------------------------------------------------------------


def count_below(x: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds are strictly below each element; none is below NaN. The definition of encoding.  Exact.

    >>> count_below(torch.tensor([-1.0, 0.5, 0.6, float("nan")]), torch.tensor([-0.5, 0.5]))
    tensor([0, 1, 2, 0], dtype=torch.int32)
    """
    return torch.where(x == x, torch.bucketize(x, thresholds, out_int32=True), 0)


@dataclass(frozen=True, eq=False)
class CarryTable:
    """Thresholds as one look-up: the formulation of `count_below` for many thresholds.

    Order the floats as integers; the upper 16 bits are the cell. The entry of a cell that holds the threshold t is
    `(thresholds below the cell) << 16 | 65535 - low16(t)`: adding low16(x) carries into the count exactly if x > t.
    `first_cell` is None where two thresholds share a cell and the table cannot exist.
    """

    entries: Tensor
    first_cell: int | None


def _ordered(x: Tensor) -> Tensor:
    """Float32 bits as int32 in the order of the numbers; -0.0 is one below 0.0."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@functools.cache
def carry_table(codebook: Codebook, device: torch.device) -> CarryTable:
    """The carry table of a codebook's thresholds, on a device.

    >>> from bnbref.codebooks import dynamic
    >>> carry_table(dynamic(), torch.device("cpu")).entries.dtype
    torch.int32
    """
    # A threshold of 0.0 must not be below -0.0: as integers it takes the value of the larger zero, which is its own.
    keys = _ordered(torch.tensor(codebook.thresholds, dtype=torch.float32, device="cpu")).long()
    keys = torch.where(keys == -1, 0, keys)
    cells = keys >> 16
    if cells.unique().numel() != cells.numel():
        return CarryTable(torch.zeros(1, dtype=torch.int32, device=device), None)
    # One cell more on either side, where nothing can carry, for everything beyond the outermost thresholds.
    first, last = int(cells[0]) - 1, int(cells[-1]) + 1
    entries = torch.searchsorted(cells, torch.arange(first, last + 1, device="cpu")) << 16
    entries[cells - first] |= 0xFFFF - (keys & 0xFFFF)
    return CarryTable(entries.to(torch.int32).to(device), first)


def count_by_carry(x: Tensor, entries: Tensor, first_cell: int) -> Tensor:
    """`count_below` by one look-up in a carry table."""
    key = _ordered(x)
    cell = ((key >> 16) - first_cell).clamp(0, entries.numel() - 1)
    return torch.where(x == x, (look_up(entries, cell) + (key & 0xFFFF)) >> 16, 0)


# ---- words, for GPUs ------------------------------------------------------------------------------------------------
# A thread of a GPU is given several neighbouring elements in 64-bit words. Then its loads and stores are wide, a block is
# reduced mostly inside of threads, and reductions of up to 64 words stay in registers where a look-up is part of them.


def in_lanes(rows: Tensor, blocksize: int, elements: int) -> list[Tensor]:
    """`[rows, blocks * blocksize]` -> `elements` float32 tensors `[rows, blocks, blocksize / elements]`, in order.

    >>> in_lanes(torch.arange(8.0)[None], 8, 4)
    [tensor([[[0., 4.]]]), tensor([[[1., 5.]]]), tensor([[[2., 6.]]]), tensor([[[3., 7.]]])]
    """
    per_word = 8 // rows.itemsize
    sizes = {"lane": blocksize // elements, "word": elements // per_word}
    words = rearrange(rows.view(torch.int64), "n (b lane word) -> word n b lane", **sizes)
    return [x for word in words for x in _in_word(word, rows.dtype)]


def _in_word(words: Tensor, dtype: torch.dtype) -> list[Tensor]:
    low, high = words.to(torch.int32), (words >> 32).to(torch.int32)
    if dtype == torch.float32:
        return [low.view(torch.float32), high.view(torch.float32)]
    if dtype == torch.bfloat16:
        return [bits.view(torch.float32) for half in (low, high) for bits in (half << 16, half & -65536)]
    return [half.to(torch.int16).view(dtype).float() for half in (low, low >> 16, high, high >> 16)]


def absmax_of_lanes(lanes: list[Tensor]) -> Tensor:
    """`magnitude(x).amax(-1)` over all lanes, on the bits: floats without sign are in the order of integers."""
    # Adding 2^23 - 1 takes NaN, above infinity, over the top: the least of all integers.
    keys = [(x.view(torch.int32) & 0x7FFFFFFF) + 0x007FFFFF for x in lanes]
    while len(keys) > 1:
        keys = [torch.maximum(one, other) for one, other in zip(keys[::2], keys[1::2], strict=True)]
    key = keys[0].amax(-1)
    return torch.where(key > 2 * 0x007FFFFF, key - 0x007FFFFF, 0).view(torch.float32)


def float_cells(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The float32 that share their upper `bits` bits: of each cell the smallest and the largest magnitude as int64
    patterns, and whether the cell is that of infinities and NaN."""
    size = 32 - bits
    first = torch.arange(2**bits, dtype=torch.int64, device="cpu") << size
    return first, first | (2**size - 1), (first >> 23 & 255) == 255


def float_of(pattern: Tensor) -> Tensor:
    """The float32 with the lower 32 bits of an int64."""
    return torch.where(pattern >= 2**31, pattern - 2**32, pattern).to(torch.int32).view(torch.float32)


@functools.cache
def rank_table(codebook: Codebook, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """`count_below` by two look-ups in tables that stay in a few cache lines; None where two thresholds share a cell.

    The upper bits of a float32 are its cell, in which at most one threshold lies. `cells` has the thresholds below it; one
    comparison with the next threshold, in `bounds`, makes the count: cells[c] + (x > bounds[cells[c]]). Finite x or NaN.
    """
    thresholds = torch.tensor(codebook.thresholds, dtype=torch.float32, device="cpu")
    for bits in (15, 16):
        first, last, special = float_cells(bits)
        ends = torch.stack((float_of(first), float_of(last)))
        below = torch.searchsorted(thresholds, ends.amin(0)).masked_fill(special, 0)
        inside = torch.searchsorted(thresholds, ends.amax(0), right=True).masked_fill(special, 0) - below
        if int(inside.max()) <= 1 and len(thresholds) < 256:
            bounds = torch.cat((thresholds, torch.tensor([torch.inf], dtype=torch.float32, device="cpu")))
            return below.to(torch.uint8).to(device), bounds.to(device)
    return None


def _count_in_cells(x: Tensor, cells: Tensor, bounds: Tensor) -> Tensor:
    bits = cells.numel().bit_length() - 1
    rank = look_up(cells, x.view(torch.int32) >> (32 - bits) & (cells.numel() - 1)).to(torch.int32)
    return torch.where(x > look_up(bounds, rank), rank + 1, rank)


def _encode_lanes(blocks: Tensor, cells: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    # Four: with eight a block is 32 lanes, and Inductor then tries 128 blocks at once, which takes minutes to compile.
    # 256 Mi float32 took an H100 0.74 ms and bfloat16 0.55, the carry table 0.88 and 1.06, bitsandbytes 1.62 and 1.70. Later,
    # when these two look-ups took 0.51 and 0.46, a single one, of the count and the bound in an int32, took 0.50 and 0.51; and
    # in the optimizers, whose carry table is one look-up too, 10.9 ms for AdamW of 2^30 float32 instead of 8.6.
    lanes = [x.squeeze(1) for x in in_lanes(blocks, blocks.shape[1], 4)]
    absmax = absmax_of_lanes(lanes)
    scale = rearrange(reciprocal(absmax), "b -> b 1")
    first, second, third, fourth = (_count_in_cells(x * scale, cells, bounds) for x in lanes)
    return (first | second << 8 | third << 16 | fourth << 24).view(torch.uint8), absmax


# ---- kernels --------------------------------------------------------------------------------------------------------


def _encode_options(blocks: torch.dtype, *_: torch.dtype, **constants: Any) -> dict[str, Any]:
    # For 16.7M float32, two threads, 256-bit vectors took 9.9 ms on an EPYC and 11.8 on a Xeon, 512-bit ones 10.5 and 24.
    # For bfloat16 on the EPYC 27 and 15 ms.
    return {"cpp.simdlen": 256} if blocks == torch.float32 else {}


def tuned(*_: torch.dtype, **constants: Any) -> dict[str, Any]:
    """Options on GPUs of kernels that only move memory: time more block sizes, for some seconds of the first call."""
    # On an H100 quantize_4bit of 256 Mi float32 took 0.61 ms instead of 0.79.
    return {"coordinate_descent_tuning": True}


@fused(dynamic={"blocks": (0,)}, cpu=_encode_options, gpu=tuned)
def quantize_blocks(
    blocks: Tensor,
    thresholds: Tensor,
    entries: Tensor,
    cells: Tensor | None = None,
    bounds: Tensor | None = None,
    *,
    first_cell: int | None,
) -> tuple[Tensor, Tensor]:
    """`[blocks, blocksize]` -> uint8 codes `[blocks, blocksize]`, float32 absmax `[blocks]`.  Exact.

    Two tables for the same count: the carry table, or on GPUs the rank table.
    """
    x = blocks.float()
    absmax = magnitude(x).amax(-1)
    return count_below(x * rearrange(reciprocal(absmax), "b -> b 1"), thresholds).to(torch.uint8), absmax


@quantize_blocks.formulation
def _(
    blocks: Tensor,
    thresholds: Tensor,
    entries: Tensor,
    cells: Tensor | None = None,
    bounds: Tensor | None = None,
    *,
    first_cell: int | None,
) -> tuple[Tensor, Tensor]:
    if cells is not None and bounds is not None:
        return _encode_lanes(blocks, cells, bounds)
    x = blocks.float()
    absmax = magnitude(x).amax(-1)
    scaled = x * rearrange(reciprocal(absmax), "b -> b 1")
    code = count_below(scaled, thresholds) if first_cell is None else count_by_carry(scaled, entries, first_cell)
    return code.to(torch.uint8), absmax


def decode_options(*_: torch.dtype, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Options of kernels that look up 256 values."""
    # Scalar code, which GCC vectorises to gathers: for 16.7M elements to float32 on an EPYC 3.8 ms instead of 5.5. To the
    # 16-bit dtypes 8.9 instead of 6.6, as GCC leaves their conversion scalar.
    return {"cpp.simdlen": 1} if dtype == torch.float32 else {}


@fused(dynamic={"codes": (0,), "absmax": (0,)}, cpu=decode_options, gpu=tuned)
def dequantize_blocks(codes: Tensor, absmax: Tensor, values: Tensor, *, dtype: torch.dtype) -> Tensor:
    """uint8 `[blocks, blocksize]`, float32 `[blocks]`, float32 `[values]` -> dtype `[blocks, blocksize]`.  Exact."""
    return (look_up(values, codes) * rearrange(absmax, "b -> b 1")).to(dtype)


# ---- any shape ------------------------------------------------------------------------------------------------------


def reads_tables(device: torch.device) -> bool:
    """Whether kernels are given tables in memory: on GPUs, and never as part of somebody else's graph."""
    return device.type != "cpu" and compile_enabled() and not tracing()


def quantize(x: Tensor, codebook: Codebook, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor of any shape: uint8 like `x`, float32 `[ceil(numel / blocksize)]`.  Exact.

        absmax = max |x| of the block (NaN left out; below 2^-126: 0)        scaled = x * (1 / absmax)
        code   = number of thresholds strictly below scaled

    Blocks run over the elements in row-major order. `1 / inf` is 0, so a block with an infinity scales to zeros and NaN;
    NaN has code 0.

    >>> from bnbref.codebooks import dynamic
    >>> quantize(torch.tensor([[0.0, -2.0], [1.0, 2.0]]), dynamic(), 4)
    (tensor([[127,   0],
            [219, 255]], dtype=torch.uint8), tensor([2.]))
    """
    check_float("x", x)
    blocksize = check_blocksize(blocksize, x.numel())
    if codebook.order is not None or codebook.sign_bit:
        raise ValueError(f"codebook {codebook.name!r} is not in the order of its values; 8-bit codes are ranks")
    thresholds = threshold_table(codebook, x.device)
    ranks: tuple[Tensor, Tensor] | tuple[()] = ()
    if tracing() or not compile_enabled():  # a cached table is no part of somebody else's graph
        carry = CarryTable(thresholds.to(torch.int32), None)
    else:
        carry = carry_table(codebook, x.device)
        if reads_tables(x.device) and blocksize % 4 == 0:
            ranks = rank_table(codebook, x.device) or ()
    codes, absmax = quantize_blocks(
        in_rows(x, blocksize), thresholds, carry.entries, *ranks, first_cell=carry.first_cell
    )
    return cut(codes, x.numel()).view(x.shape), cut(absmax, block_count(x.numel(), blocksize))


def dequantize(codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """`dtype(fl(values[code] * absmax))` for every code, shaped like `codes`.  Exact.

    >>> dequantize(torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([3.0]), torch.tensor([-1.0, 0, 1]), 2, torch.float32)
    tensor([-3.,  3.])
    """
    blocksize = check_blocksize(blocksize, codes.numel())
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if absmax.numel() != block_count(codes.numel(), blocksize):
        raise ValueError(
            f"absmax must have one scale per block: {block_count(codes.numel(), blocksize)} for {codes.numel()} codes "
            f"in blocks of {blocksize}, got {absmax.numel()}"
        )
    check_device("codes", codes, absmax=absmax, values=values)
    blocks = in_rows(codes, blocksize)
    scales = in_rows(absmax.float(), 1).view(-1)
    out = dequantize_blocks(blocks, scales, values, dtype=dtype)
    return cut(out, codes.numel()).view(codes.shape)
