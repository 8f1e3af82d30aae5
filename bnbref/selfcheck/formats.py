"""The five formats on `example`, and on numbers beside their thresholds, where a rule of rounding shows.

tests/test_selfcheck.py derives the digests in plain Python, and shows that other rules of rounding give other digests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bnbref import functional, int8
from bnbref.codebooks import DYNAMIC, FP4, NF4, Codebook
from bnbref.selfcheck import Check, Outputs

INT8_THRESHOLDS = [(code + 0.5) / 127 for code in range(127)]
"""The positive middles between the codes of int8."""


def beside_thresholds(x: Tensor, thresholds: Sequence[float], blocksize: int) -> Tensor:
    """`x` with numbers at a threshold, or an ulp from it, in every odd place: fl(threshold * absmax) of the block.

    The thresholds take turns, as do one ulp below, none, one above, and the signs; absmax is put first in each block.

    >>> beside_thresholds(torch.tensor([[0.0, 0.0, 2.0, 0.0]]), [0.25], 4)
    tensor([[2.0000, 0.5000, 2.0000, 0.5000]])
    """
    blocks = x.view(-1, blocksize).cpu()
    absmax = blocks.abs().amax(1, keepdim=True)
    i = torch.arange(blocks.numel()).view(blocks.shape)
    near = torch.tensor(thresholds, dtype=torch.float32)[i // 2 % len(thresholds)] * absmax
    direction = torch.tensor([-torch.inf, 0.0, torch.inf])[i // 2 % 3]
    near = torch.where(direction == 0, near, near.nextafter(direction)) * torch.where(i // 2 % 4 < 2, 1.0, -1.0)
    mixed = torch.where(i % 2 == 1, near, blocks)
    mixed = torch.where(i % blocksize == 0, absmax, torch.where(absmax > 0, mixed, 0.0))
    return mixed.view(x.shape).to(x.device)


def _four_bit(x: Tensor, codebook: Codebook) -> Outputs:
    x = beside_thresholds(x, codebook.thresholds, 64)
    packed, state = functional.quantize_4bit(x, quant_type=codebook)
    return packed, state.absmax, functional.dequantize_4bit(packed, state).bfloat16()


def _nested(x: Tensor) -> Outputs:
    packed, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    state2 = state.state2
    if state2 is None or state.offset is None:
        raise RuntimeError("compress_statistics=True gave a quant state that is not nested")
    return packed, state.absmax, state2.absmax, state.offset, state.scales()


def _eight_bit(x: Tensor) -> Outputs:
    x = beside_thresholds(x, DYNAMIC.thresholds, 256)
    codes, state = functional.quantize_blockwise(x, blocksize=256)
    return codes, state.absmax, functional.dequantize_blockwise(codes, state)


def _int8(x: Tensor) -> Outputs:
    """64 rows of 256; in some columns an element reaches the threshold."""
    x = beside_thresholds(x, INT8_THRESHOLDS, 256)
    codes, absmax, columns = int8.quantize(x.view(64, 256), threshold=3.99)
    if columns is None:
        raise RuntimeError("a threshold above 0 gave no outlier columns")
    product = int8.multiply(codes, codes)
    y = int8.dequantize_int8_product(product, absmax, absmax, None, None, dtype=torch.float32)
    return codes, absmax, columns, int8.dequantize(codes, absmax), product, y


CHECKS = (
    Check("nf4", lambda x: _four_bit(x, NF4), "635e372d78067bf8"),
    Check("fp4", lambda x: _four_bit(x, FP4), "a91e0e11005d5f6d"),
    Check("nf4, double quantization", _nested, "d3f6b855cc763952"),
    Check("8-bit, dynamic codebook", _eight_bit, "5b7a7614de1f3925"),
    Check("LLM.int8()", _int8, "c6ffe95105d1f514"),
)
