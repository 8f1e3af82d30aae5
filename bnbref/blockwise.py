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


def block_count(numel: int, blocksize: int) -> int:
    """Blocks that hold `numel` elements, the last one perhaps in part."""
    return -(-numel // blocksize)


def check_blocksize(blocksize: int) -> int:
    """The blocksize, if it is an integer of at least 1."""
    if not isinstance(blocksize, int) or blocksize < 1:
        raise ValueError(f"blocksize must be a positive integer, got {blocksize!r}")
    return blocksize


def check_float(name: str, x: Tensor) -> Tensor:
    """The tensor, if its dtype is one that can be quantized."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    return x


# ---- scale ----------------------------------------------------------------------------------------------------------


def magnitude(x: Tensor) -> Tensor:
    """`|x|`, and 0 for NaN: a NaN takes no part in the scale of its block."""
    return torch.where(x == x, x.abs(), 0.0)


def flush(absmax: Tensor) -> Tensor:
    """0 in place of an absmax below 2^-126, whose reciprocal would not be a number."""
    return torch.where(absmax >= SMALLEST_NORMAL, absmax, 0.0)


def reciprocal(absmax: Tensor) -> Tensor:
    """`1 / absmax`, correctly rounded, and 0 for 0: an all-zero block then scales to zeros."""
    # Not 1 / x or torch.reciprocal, for which Inductor emits the 2-ulp division on GPUs even when told to round.
    return torch.where(absmax > 0, torch.ones_like(absmax) / absmax, 0.0)


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
    entry = entries.gather(0, cell.to(torch.int64).reshape(-1)).reshape(x.shape)
    return torch.where(x == x, (entry + (key & 0xFFFF)) >> 16, 0)


# ---- kernels --------------------------------------------------------------------------------------------------------


def _encode_options(blocks: torch.dtype, *_: torch.dtype, **constants: Any) -> dict[str, Any]:
    # For 16.7M float32, two threads, 256-bit vectors took 9.9 ms on an EPYC and 11.8 on a Xeon, 512-bit ones 10.5 and 24.
    # For bfloat16 on the EPYC 27 and 15 ms.
    return {"cpp.simdlen": 256} if blocks == torch.float32 else {}


@fused(dynamic={"blocks": (0,)}, cpu=_encode_options)
def quantize_blocks(
    blocks: Tensor, thresholds: Tensor, entries: Tensor, *, first_cell: int | None
) -> tuple[Tensor, Tensor]:
    """`[blocks, blocksize]` -> uint8 codes `[blocks, blocksize]`, float32 absmax `[blocks]`.  Exact."""
    x = blocks.float()
    absmax = flush(magnitude(x).amax(-1))
    return count_below(x * rearrange(reciprocal(absmax), "b -> b 1"), thresholds).to(torch.uint8), absmax


@quantize_blocks.formulation
def _(blocks: Tensor, thresholds: Tensor, entries: Tensor, *, first_cell: int | None) -> tuple[Tensor, Tensor]:
    x = blocks.float()
    absmax = flush(magnitude(x).amax(-1))
    scaled = x * rearrange(reciprocal(absmax), "b -> b 1")
    code = count_below(scaled, thresholds) if first_cell is None else count_by_carry(scaled, entries, first_cell)
    return code.to(torch.uint8), absmax


def decode_options(*_: torch.dtype, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Options of kernels that look up 256 values."""
    # Scalar code, which GCC vectorises to gathers: for 16.7M elements to float32 on an EPYC 3.8 ms instead of 5.5. To the
    # 16-bit dtypes 8.9 instead of 6.6, as GCC leaves their conversion scalar.
    return {"cpp.simdlen": 1} if dtype == torch.float32 else {}


@fused(dynamic={"codes": (0,), "absmax": (0,)}, cpu=decode_options)
def dequantize_blocks(codes: Tensor, absmax: Tensor, values: Tensor, *, dtype: torch.dtype) -> Tensor:
    """uint8 `[blocks, blocksize]`, float32 `[blocks]`, float32 `[values]` -> dtype `[blocks, blocksize]`.  Exact."""
    value = values.gather(0, codes.to(torch.int64).reshape(-1)).reshape(codes.shape)
    return (value * rearrange(absmax, "b -> b 1")).to(dtype)


# ---- any shape ------------------------------------------------------------------------------------------------------


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
    check_blocksize(blocksize)
    if codebook.order is not None or codebook.sign_bit:
        raise ValueError(f"codebook {codebook.name!r} is not in the order of its values; 8-bit codes are ranks")
    thresholds = threshold_table(codebook, x.device)
    if tracing() or not compile_enabled():  # a cached table is no part of somebody else's graph
        carry = CarryTable(thresholds.to(torch.int32), None)
    else:
        carry = carry_table(codebook, x.device)
    codes, absmax = quantize_blocks(in_rows(x, blocksize), thresholds, carry.entries, first_cell=carry.first_cell)
    return codes.view(-1)[: x.numel()].view(x.shape), absmax[: block_count(x.numel(), blocksize)]


def dequantize(codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """`dtype(fl(values[code] * absmax))` for every code, shaped like `codes`.  Exact.

    >>> dequantize(torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([3.0]), torch.tensor([-1.0, 0, 1]), 2, torch.float32)
    tensor([-3.,  3.])
    """
    check_blocksize(blocksize)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if absmax.numel() != block_count(codes.numel(), blocksize):
        raise ValueError(
            f"absmax must have one scale per block: {block_count(codes.numel(), blocksize)} for {codes.numel()} codes "
            f"in blocks of {blocksize}, got {absmax.numel()}"
        )
    blocks = in_rows(codes, blocksize)
    scales = in_rows(absmax.float(), 1).view(-1)
    out = dequantize_blocks(blocks, scales, values, dtype=dtype)
    return out.view(-1)[: codes.numel()].view(codes.shape)
