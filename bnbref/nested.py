"""Double quantization: the scales of the blocks, quantized to eight bits themselves.

    offset = mean(absmax)        codes, absmax2 = blockwise 8-bit dynamic, blocks of 256, of absmax - offset
    absmax~ = fl(fl(values[code] * absmax2) + offset)

Source: Dettmers et al., QLoRA (2305.14314), section 3: 0.5 bit a parameter for the scales becomes 0.127.
"""

import torch
from einops import rearrange
from torch import Tensor

from bnbref import blockwise
from bnbref.arguments import checked
from bnbref.blockwise import check_blocksize, check_device, check_float, check_scales, in_rows, unpadded
from bnbref.codebooks import DYNAMIC
from bnbref.kernels import fused

BLOCKSIZE = 256


@checked
def quantize(absmax: Tensor, blocksize: int = BLOCKSIZE) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of scales, the scales of these codes, and the offset.

    absmax: float32 `[n]`. Returns uint8 codes `[n]`, float32 absmax2 `[ceil(n / blocksize)]` and the float32 mean `[]`. Exact but
    for that mean: it is `torch.mean`, whose order of summation is the device's. The mean of no scales is 0.

    >>> import torch
    >>> quantize(torch.tensor([1.0, 3.0]))
    (tensor([  0, 255], dtype=torch.uint8), tensor([1.]), tensor(2.))
    """
    check_float("absmax", absmax)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, absmax2 = blockwise.quantize(absmax - offset, DYNAMIC, blocksize)
    return codes, absmax2, offset


@fused(dynamic={"codes": (0,), "absmax": (0,)})
def dequantize_nested(codes: Tensor, absmax: Tensor, values: Tensor, offset: Tensor) -> Tensor:
    """The scales that codes stand for, float32 in the shape of the codes.  Exact.

    codes: uint8 `[blocks, blocksize]`. absmax: the scales of the codes, float32 `[blocks]`. values: float32 `[256]`, by code.
    offset: float32 `[]`.
    """
    return values[codes.to(torch.int32)] * rearrange(absmax, "b -> b 1") + offset


def check(codes: Tensor, absmax2: Tensor, values: Tensor, offset: Tensor, blocksize: int) -> int:
    """The blocksize that kernels take. ValueError for what is no second quantization of scales, see `dequantize`."""
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes of scales must be uint8, got {codes.dtype}")
    blocksize = check_blocksize(blocksize, codes.numel())
    check_scales("absmax2", absmax2, codes.numel(), blocksize)
    for name, x, count in (("values", values, 256), ("offset", offset, 1)):
        if x.dtype != torch.float32 or x.numel() != count:
            raise ValueError(f"{name} of scales must be float32 with {count} elements, got {x.dtype} {tuple(x.shape)}")
    # torch itself indexes a table on the CPU by codes on meta, and returns memory as it is.
    check_device("codes", codes, absmax2=absmax2, values=values, offset=offset)
    return blocksize


@checked
def dequantize(codes: Tensor, absmax2: Tensor, values: Tensor, offset: Tensor, blocksize: int = BLOCKSIZE) -> Tensor:
    """The scales again: float32, shaped like `codes`. Two roundings, never a fused multiply-add.  Exact.

    codes: uint8. absmax2: the scales of the codes, float32 `[ceil(numel / blocksize)]`. values: float32 `[256]`, by code. offset:
    one float32. ValueError: other dtypes, other numbers of them, or another device than that of the codes.

    >>> import torch
    >>> from bnbref.codebooks import value_table
    >>> dequantize(*quantize(torch.tensor([1.0, 3.0]))[:2], value_table(DYNAMIC, torch.device("cpu")), torch.tensor(2.0))
    tensor([1.0070, 3.0000])
    """
    blocksize = check(codes, absmax2, values, offset, blocksize)
    scales = in_rows(absmax2, 1).view(-1)
    out = dequantize_nested(in_rows(codes, blocksize), scales, values, offset)
    return unpadded(out, codes.numel()).view(codes.shape)
