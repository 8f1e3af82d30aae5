"""Double quantization: the scales of the blocks, quantized to eight bits themselves.

    offset = mean(absmax)        codes, absmax2 = blockwise 8-bit dynamic, blocks of 256, of absmax - offset
    absmax~ = fl(fl(values[code] * absmax2) + offset)

Source: Dettmers et al., QLoRA (2305.14314), section 3: 0.5 bit a parameter for the scales becomes 0.127.
"""

from einops import rearrange
from torch import Tensor

from bnbref import blockwise
from bnbref.blockwise import block_count, check_blocksize, cut, decode_options, in_rows, look_up
from bnbref.codebooks import DYNAMIC
from bnbref.fused import fused

BLOCKSIZE = 256


def quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 `[n]` -> uint8 codes `[n]`, float32 absmax2 `[ceil(n / 256)]`, float32 offset `[]`.

    Exact given the offset; the offset is `torch.mean`, whose order of summation is the device's. No scales have offset 0.

    >>> import torch
    >>> quantize(torch.tensor([1.0, 3.0]))
    (tensor([  0, 255], dtype=torch.uint8), tensor([1.]), tensor(2.))
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, absmax2 = blockwise.quantize(absmax - offset, DYNAMIC, BLOCKSIZE)
    return codes, absmax2, offset


@fused(dynamic={"codes": (0,), "absmax": (0,)}, cpu=decode_options)
def dequantize_nested(codes: Tensor, absmax: Tensor, values: Tensor, offset: Tensor) -> Tensor:
    """uint8 `[blocks, blocksize]`, float32 `[blocks]`, `[256]`, `[]` -> float32 `[blocks, blocksize]`.  Exact."""
    return look_up(values, codes) * rearrange(absmax, "b -> b 1") + offset


def dequantize(codes: Tensor, absmax2: Tensor, values: Tensor, offset: Tensor, blocksize: int = BLOCKSIZE) -> Tensor:
    """The scales again: float32, shaped like `codes`. Two roundings, never a fused multiply-add.  Exact.

    >>> import torch
    >>> from bnbref.codebooks import value_table
    >>> dequantize(*quantize(torch.tensor([1.0, 3.0]))[:2], value_table(DYNAMIC, torch.device("cpu")), torch.tensor(2.0))
    tensor([1.0070, 3.0000])
    """
    if absmax2.numel() != block_count(codes.numel(), blocksize):
        raise ValueError(
            f"absmax2 must have one scale per block: {block_count(codes.numel(), blocksize)} for {codes.numel()} codes "
            f"in blocks of {blocksize}, got {absmax2.numel()}"
        )
    blocksize = check_blocksize(blocksize, codes.numel())
    scales = in_rows(absmax2, 1).view(-1)
    out = dequantize_nested(in_rows(codes, blocksize), scales, values, offset)
    return cut(out, codes.numel()).view(codes.shape)
