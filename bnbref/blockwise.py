"""Blockwise absmax quantization: scale a block by its largest magnitude, count thresholds, and undo it.

    scaled = x * (1 / absmax)            per block, float32
    code   = number of thresholds below scaled
    x~     = values[code] * absmax       one product in float32, one rounding to the output dtype

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2110.02861), section 2.1.

Kernels see `[blocks, blocksize]`, the last block padded by zeros, so that only the number of blocks varies.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bnbref.arguments import check_tensors, checked, written
from bnbref.codebooks import Codebook, threshold_table
from bnbref.kernels import fused, tracing

SMALLEST_NORMAL = 2.0**-126
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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


# ---- count thresholds -----------------------------------------------------------------------------------------------


def count_below(x: Tensor, thresholds: Tensor) -> Tensor:
    """The number of thresholds that are strictly below each element, int32; 0 for NaN.  Exact.

    >>> count_below(torch.tensor([-1.0, 0.5, 0.6, float("nan")]), torch.tensor([-0.5, 0.5]))
    tensor([0, 1, 2, 0], dtype=torch.int32)
    """
    return torch.where(x == x, torch.bucketize(x, thresholds, out_int32=True), 0)


def encode(scaled: Tensor, codebook: Codebook) -> Tensor:
    """uint8 codes of scaled float32 elements, by the two lines of `Codebook`.  Exact.

    >>> from bnbref.codebooks import FP4, NF4
    >>> encode(torch.tensor([-1.0, -0.0, 0.0, 1e-3, 1.0]), NF4)
    tensor([ 0,  7,  7,  7, 15], dtype=torch.uint8)
    >>> encode(torch.tensor([-1.0, -0.0, 0.0, 1e-3, 1.0]), FP4)
    tensor([11,  0,  0,  0,  3], dtype=torch.uint8)
    """
    code = count_below(scaled.abs() if codebook.sign_bit else scaled, threshold_table(codebook, scaled.device))
    if codebook.order is not None:
        code = torch.tensor(codebook.order, dtype=torch.int32, device=scaled.device)[code]
    if codebook.sign_bit:
        code = code + (scaled < 0) * (len(codebook.values) // 2)
    return code.to(torch.uint8)


# ---- kernels --------------------------------------------------------------------------------------------------------


@fused(dynamic={"blocks": (0,)}, by_rows=True)
def quantize_blocks(blocks: Tensor, *, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """The codes and the scales of blocks.  Exact.

    blocks: float32, float16 or bfloat16 `[blocks, blocksize]`. Returns the codes, uint8 of that shape, and the absmax of each
    block, float32 `[blocks]`.
    """
    x = blocks.float()
    absmax = magnitude(x).amax(-1)
    return encode(x * rearrange(reciprocal(absmax), "b -> b 1"), codebook), absmax


@fused(dynamic={"codes": (0,), "absmax": (0,)})
def dequantize_blocks(codes: Tensor, absmax: Tensor, values: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The values of codes, times the scale of their block, in dtype.  Exact.

    codes: uint8 `[blocks, blocksize]`. absmax: float32 `[blocks]`. values: float32, the codebook's, by code.
    """
    return (values[codes.to(torch.int32)] * rearrange(absmax, "b -> b 1")).to(dtype)


# ---- any shape ------------------------------------------------------------------------------------------------------


def in_rows(x: Tensor, width: int) -> Tensor:
    """`x` flattened to `[rows, width]`, padded by zeros. It has at least two rows, because Dynamo specialises a graph on one.

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
        flat = flat.clone()  # kernels may read eight bytes at a time (Dynamo knows no offsets)
    return flat.view(rows, width)


def unpadded(rows: Tensor, n: int) -> Tensor:
    """The first n elements in row-major order, `[n]`, in memory that does not hold the padding any more."""
    flat = rows.reshape(-1)
    return flat if flat.numel() == n else flat[:n].clone()


def block_count(numel: int, blocksize: int) -> int:
    """The number of blocks for `numel` elements; the last block may be short."""
    return -(-numel // blocksize)


@checked
def quantize(x: Tensor, codebook: Codebook, blocksize: int) -> tuple[Tensor, Tensor]:
    """The codes of a tensor of any shape, uint8 shaped like `x`, and the scales, float32 `[ceil(numel / blocksize)]`.  Exact.

        absmax = max |x| of the block (NaN left out; below 2^-126: 0)        scaled = x * (1 / absmax)
        code   = number of thresholds strictly below scaled

    Blocks run over the elements in row-major order. `1 / inf` is 0, so a block with an infinity scales to zeros and NaN;
    NaN has code 0. Raises ValueError for other dtypes than float32, float16 and bfloat16, for a blocksize that is no positive
    integer, and for a codebook whose codes are not in the order of its values.

    >>> from bnbref.codebooks import dynamic
    >>> quantize(torch.tensor([[0.0, -2.0], [1.0, 2.0]]), dynamic(), 4)
    (tensor([[127,   0],
            [219, 255]], dtype=torch.uint8), tensor([2.]))
    """
    check_float("x", x)
    blocksize = check_blocksize(blocksize, x.numel())
    if codebook.order is not None or codebook.sign_bit:
        raise ValueError(f"codebook {codebook.name!r} is not in the order of its values; 8-bit codes are ranks")
    codes, absmax = quantize_blocks(in_rows(x, blocksize), codebook=codebook)
    return unpadded(codes, x.numel()).view(x.shape), unpadded(absmax, block_count(x.numel(), blocksize))


@checked
def dequantize(codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """`dtype(fl(values[code] * absmax))` for every code, shaped like `codes`.  Exact.

    Raises ValueError for codes that are not uint8, a dtype that is none of the three floats, or scales that are not one a block.

    >>> dequantize(torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([3.0]), torch.tensor([-1.0, 0, 1]), 2, torch.float32)
    tensor([-3.,  3.])
    """
    blocksize = check_blocksize(blocksize, codes.numel())
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    if values.dim() != 1 or not 1 <= values.numel() <= 256:
        raise ValueError(f"values must be 1 to 256 numbers in one dimension, got {tuple(values.shape)}")
    check_scales("absmax", absmax, codes.numel(), blocksize)
    check_device("codes", codes, absmax=absmax, values=values)
    if values.numel() < 256:  # compiled code does not ask whether a code has a value
        values = F.pad(values, (0, 256 - values.numel()))
    blocks = in_rows(codes, blocksize)
    scales = in_rows(absmax.float(), 1).view(-1)
    out = dequantize_blocks(blocks, scales, values, dtype=dtype)
    return unpadded(out, codes.numel()).view(codes.shape)


# ---- arguments ------------------------------------------------------------------------------------------------------


def check_blocksize(blocksize: int, numel: int) -> int:
    """The blocksize to compute with: that one, or a smaller one if a single block holds the whole tensor and more.

    A kernel pads a tensor to whole blocks, so that a blocksize far beyond `numel` would only ask for memory. It is reduced to the
    next power of two, but not below 4096. Raises ValueError unless blocksize is an integer of at least 1.

    >>> check_blocksize(64, 10), check_blocksize(2**40, 5000)
    (64, 8192)
    """
    if not isinstance(blocksize, int) or isinstance(blocksize, bool) or blocksize < 1:
        raise ValueError(f"blocksize must be a positive integer, got {written(blocksize)}")
    # Powers of two, so that few variants of a kernel are compiled.
    return blocksize if blocksize <= 4096 else min(blocksize, 1 << max(12, (numel - 1).bit_length()))


def check_float(name: str, x: Tensor) -> Tensor:
    """The tensor, if it is a dense one whose dtype can be quantized. TypeError or ValueError if not."""
    check_tensors(**{name: x})
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    return x


def check_quantizable(name: str, weight: Tensor, quant_type: str) -> None:
    """Raises ValueError if a weight that is to be quantized has NaN or infinite elements, or a dtype that cannot be quantized, as
    in a layer that was made under a default dtype of float64."""
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} cannot become {quant_type}: its dtype must be float32, float16 or bfloat16, "
            f"got {weight.dtype}"
        )
    if weight.numel() == 0 or weight.device.type == "meta" or tracing():
        return
    low, high = weight.aminmax()  # both are NaN if any element is
    if not bool(low.isfinite() & high.isfinite()):
        count = int((~weight.isfinite()).sum())
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} cannot become {quant_type}: {count} of its elements are NaN or infinite"
        )


def check_scales(name: str, absmax: Tensor, numel: int, blocksize: int) -> None:
    """ValueError if there is not one scale, a float and not its code, for each block of `numel` elements."""
    check_float(name, absmax)
    check_count(name, absmax, numel, blocksize)


def check_count(name: str, absmax: Tensor, numel: int, blocksize: int) -> None:
    """ValueError if there is not one scale, or its code, for each block of `numel` elements."""
    if absmax.numel() != block_count(numel, blocksize):
        raise ValueError(
            f"{name} must have one scale per block: {block_count(numel, blocksize)} for {numel} elements "
            f"in blocks of {blocksize}, got {absmax.numel()}"
        )


def into(name: str, given: Tensor | None, result: Tensor) -> Tensor:
    """The result; written into the caller's tensor, called `name`, if one is given. ValueError if that is not just like it:
    torch's `copy_` would repeat it over a larger shape, and round it to another dtype.

    >>> into("out", torch.zeros(2), torch.ones(2))
    tensor([1., 1.])
    """
    if given is None:
        return result
    check_tensors(**{name: given})
    if (given.shape, given.dtype, given.device) != (result.shape, result.dtype, result.device):
        must, got = (f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (result, given))
        raise ValueError(f"{name} must be {must}, got {got}")
    return given.copy_(result)


def check_device(name: str, x: Tensor, **others: Tensor | None) -> None:
    """ValueError if one of the others is not on the device of `x`, which is called `name`; TypeError if it is no tensor."""
    for other, y in others.items():
        if y is None:
            continue
        check_tensors(**{other: y})
        if y.device != x.device:
            raise ValueError(f"{other} must be on the device of {name}, {x.device}, got {y.device}")
