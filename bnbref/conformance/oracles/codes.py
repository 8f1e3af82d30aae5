"""What quantization may give: the reference's codes and scales, and what the freedoms of the rules make of them.

Near a threshold a code may be one of two. So the scaled values are coded several times, each time changed as far as a rule
allows, and the code of an element may be any of those.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref import blockwise, fourbit, int8
from bnbref.blockwise import SMALLEST_NORMAL, reciprocal
from bnbref.codebooks import DYNAMIC, Codebook, four_bit, value_table
from bnbref.conformance.expected import Expected, also, where_true


class _Scaled(NamedTuple):
    """A tensor in blocks, and how exactly each element's scaled value is known."""

    flat: Tensor  # the elements as float32
    block: Tensor  # the number of each element's block
    scaled: Tensor
    inexact: Tensor  # the elements whose absmax is no power of two
    zero: Tensor  # the elements whose absmax is 0
    true_absmax: Tensor  # of each block, also where it is below 2^-126
    not_finite: Tensor  # the blocks with NaN or infinity


def _scale(x: Tensor, absmax: Tensor, blocksize: int, pad: int = 0) -> _Scaled:
    flat = F.pad(x.detach().reshape(-1).float(), (0, pad))
    block = (torch.arange(flat.numel()) // blocksize).clamp(max=absmax.numel() - 1)
    blocks = F.pad(flat, (0, absmax.numel() * blocksize - flat.numel())).view(-1, blocksize)
    not_finite = ~blocks.isfinite().all(-1)
    true = blocks.abs().nan_to_num(0.0).amax(-1) if blocks.numel() else blocks.new_zeros(0)
    inexact = (absmax.frexp().mantissa != 0.5) & (absmax > 0)
    return _Scaled(flat, block, flat * reciprocal(absmax)[block], inexact[block], absmax[block] == 0, true, not_finite)


def _two_ulp(x: Tensor, direction: float) -> Tensor:
    end = torch.full_like(x, direction)
    return torch.where(x == 0, x, x.nextafter(end).nextafter(end))


def _alternatives(s: _Scaled, encode: Callable[[Tensor], Tensor], codes: Tensor, zero_block: bool) -> list[Tensor]:
    """Tensors of codes of which each element may be any, the first being the reference's."""
    zero = encode(torch.zeros(1))
    near = [torch.where(s.inexact, encode(_two_ulp(s.scaled, end)), codes) for end in (-math.inf, math.inf)]
    flushed = torch.where((s.flat.abs() < SMALLEST_NORMAL) & (s.flat != 0), zero, codes)
    tiny = s.zero & (s.true_absmax[s.block] > 0)
    exact = torch.where(tiny, encode((s.flat.double() / s.true_absmax[s.block].double()).float()), codes)
    others = [*near, flushed, exact]
    if zero_block:
        others.append(torch.where(s.zero, torch.zeros_like(codes), codes))
    return [codes, *(other for other in others if not torch.equal(other, codes))]


def _absmax(absmax: Tensor, s: _Scaled) -> Expected:
    tiny = torch.where(absmax == 0, s.true_absmax, absmax)
    return Expected(absmax, also=also(absmax, [tiny]), free=where_true(s.not_finite))


@functools.lru_cache(maxsize=16)
def nearest_even(values: tuple[float, ...]) -> Codebook:
    """The codebook of 8-bit values: nearest by the float32 midpoint, an exact tie to the even code."""
    return Codebook.nearest("values", values, ties="even")


def encode_8bit(scaled: Tensor, values: Tensor) -> Tensor:
    """The 8-bit codes of scaled elements."""
    thresholds = torch.tensor(nearest_even(tuple(values.tolist())).thresholds)
    return blockwise.count_below(scaled, thresholds).to(torch.uint8)


def quantize_blockwise(x: Tensor, values: Tensor, blocksize: int) -> dict[str, Expected]:
    """Rules Q8."""
    return in_8_bits(x, nearest_even(tuple(values.tolist())), blocksize)


def in_8_bits(x: Tensor, book: Codebook, blocksize: int) -> dict[str, Expected]:
    """Blocks in the codes of an 8-bit codebook."""
    codes, absmax = blockwise.quantize(x, book, blocksize)
    s = _scale(x, absmax, blocksize)
    others = _alternatives(s, lambda scaled: blockwise.encode(scaled, book), codes.reshape(-1), zero_block=True)
    free = where_true(s.not_finite[s.block])
    return {"codes": Expected(codes, also=also(codes, others[1:]), free=free), "absmax": _absmax(absmax, s)}


def quantize_4bit(x: Tensor, blocksize: int, quant_type: str, zero_block: bool = True) -> dict[str, Expected]:
    """Rules Q4. zero_block: whether a block of zeros may have code 0."""
    book = four_bit(quant_type)
    packed, absmax = fourbit.quantize(x, book, blocksize)
    packed = packed.view(-1)
    s = _scale(x, absmax, blocksize, pad=x.numel() % 2)
    codes = torch.stack((packed >> 4, packed & 15), -1).view(-1)
    others = _alternatives(s, lambda scaled: blockwise.encode(scaled, book), codes, zero_block)
    if book.sign_bit:
        minus_zero = s.flat.signbit() & (s.flat == 0)
        others.append(torch.where(minus_zero, codes + len(book.values) // 2, codes))
    by_byte = [high[0::2] << 4 | low[1::2] for high in others for low in others]
    free = where_true(s.not_finite[s.block].view(-1, 2).any(-1))
    return {"packed": Expected(packed, also=also(packed, by_byte[1:]), free=free), "absmax": _absmax(absmax, s)}


def quantize_4bit_nested(x: Tensor, blocksize: int, quant_type: str) -> dict[str, Expected]:
    """Rules QN. The mean of the absmax must be exact in any order of summation for the rest to be comparable."""
    outer = quantize_4bit(x, blocksize, quant_type, zero_block=False)
    absmax = outer["absmax"].value
    offset = absmax.mean()
    inner = quantize_blockwise(absmax - offset, value_table(DYNAMIC, torch.device("cpu")), 256)
    return {"packed": outer["packed"], "codes": inner["codes"], "absmax2": inner["absmax"], "offset": Expected(offset)}


def int8_quantize(x: Tensor, threshold: float) -> dict[str, Expected]:
    """Rules I8."""
    codes, absmax, mask = int8.quantize(x, threshold)
    rows = int8.as_matrix(x).float()
    scaled = rows * (reciprocal(absmax) * 127.0)[:, None]
    flat = codes.view(rows.shape)
    inexact = ((127.0 / absmax).frexp().mantissa != 0.5)[:, None] & (flat != 0)
    near = [torch.where(inexact, _two_ulp(scaled, end).round().to(torch.int8), flat) for end in (-math.inf, math.inf)]
    not_finite = ~rows.isfinite().all(-1)
    free = where_true(not_finite[:, None].expand(rows.shape).reshape(-1))
    columns = torch.empty(0, dtype=torch.int64) if mask is None else mask.nonzero().view(-1)
    return {
        "codes": Expected(codes, also=also(codes, near), free=free),
        "absmax": Expected(absmax, free=where_true(not_finite)),
        "columns": Expected(columns),
    }
