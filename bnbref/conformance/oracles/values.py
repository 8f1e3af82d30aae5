"""What undoes a quantization, and files: values of codes times scales, int32 products and their scaling, tensors of a
checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise, fourbit, functional, int8
from bnbref.blockwise import SMALLEST_NORMAL
from bnbref.codebooks import four_bit, value_table
from bnbref.conformance.expected import UNIT, Expected, also
from bnbref.quant_state import BLOB, TENSORS, QuantState


def weight(packed: Tensor, absmax: Tensor, quant_type: str, **rest: Any) -> Tensor:
    """The 4-bit weight; rest: blocksize, shape, dtype."""
    return fourbit.dequantize(packed, absmax, four_bit(quant_type), **rest)


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The first `numel` codes of packed bytes, int64."""
    return torch.stack((packed >> 4, packed & 15), -1).view(-1)[:numel].long()


def each(absmax: Tensor, blocksize: int, numel: int) -> Tensor:
    """The scale of each element."""
    return absmax.repeat_interleave(blocksize)[:numel]


def _product(y: Tensor, value: Tensor, scale: Tensor) -> dict[str, Expected]:
    """y = T(fl(value * scale)), where a product below 2^-126 may be zero."""
    flushed = ((value.double() * scale.double()).abs() < SMALLEST_NORMAL).view(y.shape)
    number = y.nan_to_num(nan=1.0)
    return {"y": Expected(y, also=also(number, [torch.where(flushed, 0.0, number)]))}


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype
) -> dict[str, Expected]:
    """Rules D8."""
    y = blockwise.dequantize(codes, absmax, values, blocksize, dtype)
    return _product(y, values[codes.reshape(-1).long()], each(absmax, blocksize, y.numel()))


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, **rest: Any
) -> dict[str, Expected]:
    """Rules D4."""
    y = weight(packed, absmax, quant_type, blocksize=blocksize, **rest)
    values = value_table(four_bit(quant_type), torch.device("cpu"))
    return _product(y, values[unpack(packed, y.numel())], each(absmax, blocksize, y.numel()))


def dequantize_4bit_nested(
    packed: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor, values: Tensor, **rest: Any
) -> dict[str, Expected]:
    """Rules DN."""
    value2, scale2 = values[codes.long()], each(absmax2, 256, codes.numel())
    y, fused = (
        weight(packed, absmax, **rest)
        # A product of two float32 is exact in float64, so that the second has one rounding to float32.
        for absmax in (value2 * scale2 + offset, (value2.double() * scale2.double() + offset.double()).float())
    )
    return {"y": Expected(y, also=also(y, [fused]))}


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


def int8_dequantize(codes: Tensor, absmax: Tensor) -> dict[str, Expected]:
    """Rules IV."""
    return {"y": Expected(int8.dequantize(codes, absmax), ulp=4)}


def save_4bit(x: Tensor, blocksize: int, quant_type: str, nested: bool) -> dict[str, Expected]:
    """Rules CW."""
    packed, state = functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    tensors = file_tensors(packed, state.as_dict(packed=True), quant_type)
    return {name: Expected(tensor) for name, tensor in tensors.items()}


def file_tensors(packed: Tensor, file: Mapping[str, Tensor], quant_type: str) -> dict[str, Tensor]:
    """The tensors of a quantized weight in a file, by the kit's names."""
    tensors = {"packed": packed.view(torch.uint8).view(-1), "state": file[BLOB + quant_type]}
    return {**tensors, **{name: file[name] for name in (*TENSORS[2:], *TENSORS[:2]) if name in file}}


def load_4bit(
    packed: Tensor, state: Tensor, quant_type: str, absmax: Tensor, quant_map: Tensor,
    nested_absmax: Tensor | None = None, nested_quant_map: Tensor | None = None,
) -> dict[str, Expected]:  # fmt: skip
    """Rules CR."""
    file = {"absmax": absmax, "quant_map": quant_map, BLOB + quant_type: state}
    if nested_absmax is not None and nested_quant_map is not None:
        file |= {"nested_absmax": nested_absmax, "nested_quant_map": nested_quant_map}
    return {"y": Expected(functional.dequantize_4bit(packed.view(-1, 1), QuantState.from_dict(file, packed.device)))}
