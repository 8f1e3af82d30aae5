"""Four bits a weight: blockwise absmax with a codebook of 16 values, two codes a byte.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2305.14314), section 3 and appendix E.

The first element of a pair is in the high nibble. Kernels see rows of `row_blocks(blocksize)` whole blocks, so that any
blocksize, odd ones too, packs without a byte that two rows share.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from bnbref.arguments import checked
from bnbref.blockwise import (
    FLOATS,
    block_count,
    check_blocksize,
    check_device,
    check_float,
    check_scales,
    encode,
    in_rows,
    magnitude,
    reciprocal,
    unpadded,
)
from bnbref.codebooks import Codebook, value_table
from bnbref.context import as_bytes
from bnbref.kernels import fused


def row_blocks(blocksize: int) -> int:
    """The fewest blocks whose elements are whole groups of sixteen: eight bytes of codes.

    >>> row_blocks(64), row_blocks(24), row_blocks(1)
    (1, 2, 16)
    """
    return 16 // math.gcd(16, blocksize)


# ---- kernels --------------------------------------------------------------------------------------------------------


@fused(dynamic={"rows": (0,)}, by_rows=True)
def quantize_rows(rows: Tensor, *, blocksize: int, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """The packed codes and the scales of rows of whole blocks.  Exact.

    rows: float32, float16 or bfloat16 `[rows, blocks * blocksize]`. Returns two codes a byte, uint8
    `[rows, blocks * blocksize / 2]`, and the absmax of each block, float32 `[rows, blocks]`.
    """
    blocks = rearrange(rows.float(), "n (b s) -> n b s", s=blocksize)
    absmax = magnitude(blocks).amax(-1)
    code = encode(blocks * rearrange(reciprocal(absmax), "n b -> n b 1"), codebook)
    high, low = rearrange(rearrange(code, "n b s -> n (b s)"), "n (byte two) -> two n byte", two=2)
    return high << 4 | low, absmax


@fused(dynamic={"packed": (0,), "absmax": (0,)})
def dequantize_rows(
    packed: Tensor, absmax: Tensor, *, blocksize: int, codebook: Codebook, dtype: torch.dtype
) -> Tensor:
    """The values of packed codes, times the scale of their block, in dtype `[rows, blocks * blocksize]`.  Exact.

    packed: two codes a byte, uint8 `[rows, blocks * blocksize / 2]`. absmax: float32 `[rows, blocks]`.
    """
    code = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
    value = value_table(codebook, packed.device)[code.to(torch.int32)]
    scaled = rearrange(value, "n (b s) -> n b s", s=blocksize) * rearrange(absmax, "n b -> n b 1")
    return scaled.to(dtype).flatten(1)


# ---- any shape ------------------------------------------------------------------------------------------------------


@checked
def quantize(
    x: Tensor, codebook: Codebook, blocksize: int = 64, quant_storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of a tensor of any shape.  Exact.

    Returns the codes as `[ceil(numel / 2) / itemsize, 1]` of `quant_storage` (the bytes reinterpreted) and absmax as
    float32 `[ceil(numel / blocksize)]`. The nibble after an odd last element is the code of 0.0. Raises ValueError for other
    dtypes than float32, float16 and bfloat16, for a blocksize that is no positive integer, and for a quant_storage whose
    size does not divide the number of bytes.

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
    packed, absmax = quantize_rows(rows, blocksize=blocksize, codebook=codebook)
    return unpadded(packed, n_bytes).view(quant_storage).view(-1, 1), unpadded(absmax, block_count(n, blocksize))


@checked
def dequantize(
    packed: Tensor, absmax: Tensor, codebook: Codebook, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`dtype(fl(values[code] * absmax))` in the given shape.  Exact.

    Raises ValueError for a dtype that is none of the three floats, and for codes or scales that are too few or too many;
    TypeError for sizes that are no integers.

    >>> from bnbref.codebooks import NF4
    >>> dequantize(*quantize(torch.tensor([2.0, -2.0, 0.0]), NF4), NF4, 64, (3,), torch.float32)
    tensor([ 2., -2.,  0.])
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    # A size is a SymInt while torch.compile or torch.export traces, and a tensor while torch.jit.trace does.
    if isinstance(shape, str) or not all(isinstance(size, (int, torch.SymInt, Tensor)) for size in shape):
        raise TypeError(f"shape must be a sequence of integers, got {shape!r}")
    n = math.prod(shape)
    blocksize = check_blocksize(blocksize, n)
    codes = as_bytes(packed)
    if codes.numel() != -(-n // 2):
        raise ValueError(f"packed must hold {-(-n // 2)} bytes for shape {tuple(shape)}, got {codes.numel()}")
    check_scales("absmax", absmax, n, blocksize)
    check_device("packed", packed, absmax=absmax)
    blocks = row_blocks(blocksize)
    rows = in_rows(codes, blocks * blocksize // 2)
    scales = in_rows(absmax.float(), blocks)
    out = dequantize_rows(rows, scales, blocksize=blocksize, codebook=codebook, dtype=dtype)
    return unpadded(out, n).view(torch.Size(shape))
