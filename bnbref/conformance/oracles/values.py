"""What undoes a quantization: values of codes times scales, int32 products and their scaling."""

from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise, fourbit, int8
from bnbref.blockwise import SMALLEST_NORMAL
from bnbref.codebooks import four_bit, value_table
from bnbref.conformance.expected import UNIT, Expected, also


def weight(packed: Tensor, absmax: Tensor, quant_type: str, **rest: Any) -> Tensor:
    """The 4-bit weight; rest: blocksize, shape, dtype."""
    return fourbit.dequantize(packed, absmax, four_bit(quant_type), **rest)


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The first `numel` codes of packed bytes, int64."""
    return torch.stack((packed >> 4, packed & 15), -1).view(-1)[:numel].long()


def each(absmax: Tensor, blocksize: int, numel: int) -> Tensor:
    """The scale of each element."""
    return absmax.repeat_interleave(blocksize)[:numel]


def product(y: Tensor, value: Tensor, scale: Tensor) -> dict[str, Expected]:
    """y = T(fl(value * scale)), where a product below 2^-126 may be zero."""
    flushed = ((value.double() * scale.double()).abs() < SMALLEST_NORMAL).view(y.shape)
    number = y.nan_to_num(nan=1.0)
    return {"y": Expected(y, also=also(number, [torch.where(flushed, 0.0, number)]))}


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, **rest: Any
) -> dict[str, Expected]:
    """Rules D4."""
    y = weight(packed, absmax, quant_type, blocksize=blocksize, **rest)
    values = value_table(four_bit(quant_type), torch.device("cpu"))
    return product(y, values[unpack(packed, y.numel())], each(absmax, blocksize, y.numel()))


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype
) -> dict[str, Expected]:
    """Rules D8."""
    y = blockwise.dequantize(codes, absmax, values, blocksize, dtype)
    return product(y, values[codes.reshape(-1).long()], each(absmax, blocksize, y.numel()))


def int8_matmul(a: Tensor, b: Tensor) -> dict[str, Expected]:
    """Rules IM."""
    return {"product": Expected(int8.multiply(a, b))}


def int8_mm_dequant(
    product: Tensor, row: Tensor, column: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> dict[str, Expected]:
    """Rules ID; the bound is derived there."""
    y = int8.dequantize_int8_product(int8.as_matrix(product), row, column, bias, None, dtype=dtype).view(product.shape)
    scaled = product.double() * (row.double()[:, None] * column.double() / 16129).view(product.shape)
    added = torch.zeros(()).double() if bias is None else bias.double()
    exact, single, unit = scaled + added, 2.0**-24, UNIT[dtype]
    bound = 5 * single * scaled.abs() + 2 * single * exact.abs() + 2 * unit * (exact.abs() + added.abs())
    return {"y": Expected(y, low=exact - bound, high=exact + bound)}
