"""The arguments of the cases of pairs.py, for any settings of an operation.

What is quantized are the values of the codebook times scales, so that each has one code by any rule of rounding and in any dtype,
and a case fails for its settings alone. Scales differ by half and more from block to block.
"""

import math
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, four_bit, value_table
from bnbref.conformance.case import CPU
from bnbref.conformance.oracles.formula import STATES
from bnbref.conformance.oracles.steps import BLOCKSIZE

Arguments = tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]
"""Tensors, parameters, and the tensors that are given as transposes of contiguous ones."""


def _mixed(count: int, seed: int, below: int) -> Tensor:
    """Pseudo-random int64 `[count]` in [0, below): a multiplicative hash of the index, the same everywhere."""
    x: Tensor = torch.arange(count, dtype=torch.int64) + seed * 1_000_003
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * multiplier) & 0x7FFFFFFF
    return (x ^ (x >> 15)) % below


def _noise(count: int, seed: int) -> Tensor:
    """float32 multiples of 1/64 from -1 to 1: numbers that every dtype has."""
    return (_mixed(count, seed, 129) - 64).float() / 64


def _bytes(count: int, seed: int) -> Tensor:
    return _mixed(count, seed, 256).to(torch.uint8)


def _scales(count: int, seed: int = 1) -> Tensor:
    """float32 in [1, 8), of eleven bits: none of them is a bfloat16."""
    return 2.0 ** (_mixed(count, seed, 3).float()) * (1 + (2 * _mixed(count, seed + 1, 512).float() + 1) / 1024)


def _map(signed: bool) -> Tensor:
    return value_table(DYNAMIC if signed else DYNAMIC_UNSIGNED, CPU)


def _shape(blocksize: int, size: str, form: str) -> tuple[int, ...]:
    """Two blocks, one and a half, or an odd number of elements between them, as a tensor of this form."""
    rows, columns = {"whole": (4, blocksize // 2), "part": (3, blocksize // 2), "odd": (3, blocksize // 2 + 1)}[size]
    return {"vector": (rows * columns,), "cube": (rows, 1, columns)}.get(form, (rows, columns))


def _layout(name: str, form: str) -> tuple[str, ...]:
    return (name,) if form == "transposed" else ()


def _elements(values: Tensor, absmax: Tensor, blocksize: int, count: int, dtype: str) -> Tensor:
    """Elements of blocks with these absmax: their values are those of the codebook, none of them small but zero."""
    usable = values[(values.abs() > 0.01) | (values == 0)] + 0.0  # FP4 has -0.0, whose code may be another's
    chosen = usable[_mixed(count, 2, len(usable))]
    starts = torch.arange(0, count, blocksize)
    chosen[starts + 7 * torch.arange(len(starts)) % (count - starts).clamp(max=blocksize)] = 1.0
    return (chosen * absmax.repeat_interleave(blocksize)[:count]).to(getattr(torch, dtype))


def _quantized(values: Tensor, dtype: str, blocksize: int, size: str, form: str) -> Tensor:
    shape = _shape(blocksize, size, form)
    count = math.prod(shape)
    return _elements(values, _scales(-(-count // blocksize)), blocksize, count, dtype).view(shape)


def _quantize_blockwise(dtype: str, blocksize: int, size: str, signed: bool, form: str) -> Arguments:
    values = _map(signed)
    inputs = {"x": _quantized(values, dtype, blocksize, size, form), "values": values}
    return inputs, {"blocksize": blocksize}, _layout("x", form)


def _dequantize_blockwise(dtype: str, blocksize: int, size: str, signed: bool, form: str) -> Arguments:
    shape = _shape(blocksize, size, form)
    inputs = {"codes": _bytes(math.prod(shape), 3).view(shape), "absmax": _scales(2), "values": _map(signed)}
    return inputs, {"blocksize": blocksize, "dtype": dtype}, _layout("codes", form)


def _quantize_4bit(dtype: str, blocksize: int, size: str, quant_type: str, form: str) -> Arguments:
    x = _quantized(value_table(four_bit(quant_type), CPU), dtype, blocksize, size, form)
    return {"x": x}, {"blocksize": blocksize, "quant_type": quant_type}, _layout("x", form)


def _weight(blocksize: int, quant_type: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    count = math.prod(shape)
    tensors = {"packed": _bytes(-(-count // 2), 4), "absmax": _scales(-(-count // blocksize))}
    return tensors, {"blocksize": blocksize, "quant_type": quant_type, "shape": list(shape)}


def _dequantize_4bit(dtype: str, blocksize: int, size: str, quant_type: str, form: str) -> Arguments:
    tensors, params = _weight(blocksize, quant_type, _shape(blocksize, size, form))
    return tensors, {**params, "dtype": dtype}, ()


def _quantize_4bit_nested(dtype: str, blocksize: int, size: str, quant_type: str) -> Arguments:
    """300 blocks whose absmax are 2 - s and 2 + s: their mean is exact in any order. s is larger in the second 256 blocks."""
    values = _map(True)
    s = values[(values >= 0.25) & (values < 1)][_mixed(150, 5, 30)]
    s = torch.where(torch.arange(150) % 64 == 0, 1.0, (s * 64).round() / 64) / 2
    s = torch.where(torch.arange(150) < 128, s / 2, s)
    count = 300 * blocksize - {"whole": 0, "part": blocksize // 2, "odd": 1}[size]
    absmax = torch.stack((2 - s, 2 + s), 1).view(-1)
    x = _elements(value_table(four_bit(quant_type), CPU), absmax, blocksize, count, dtype)
    return {"x": x}, {"blocksize": blocksize, "quant_type": quant_type}, ()


def _rows(rows: int, columns: int, form: str, dtype: str, seed: int) -> Tensor:
    x = _noise(rows * columns, seed).to(getattr(torch, dtype))
    return x.view((1, rows, columns) if form == "cube" else (rows, columns))


def _gemm_4bit(
    dtype: str, blocksize: int, quant_type: str, rows: int, form: str, columns: int, bias: bool
) -> Arguments:  # fmt: skip
    tensors, params = _weight(blocksize, quant_type, (48, columns))
    inputs = {"a": _rows(rows, columns, form, dtype, 6), **tensors}
    if bias:
        inputs["bias"] = (_noise(48, 7) * 256).to(getattr(torch, dtype))
    return inputs, params, ()


def _gemm_4bit_backward(
    dtype: str, blocksize: int, quant_type: str, rows: int, form: str, columns: int
) -> Arguments:  # fmt: skip
    tensors, params = _weight(blocksize, quant_type, (48, columns))
    return {"grad": _rows(rows, 48, form, dtype, 8), **tensors}, params, ()


def _int8_quantize(dtype: str, threshold: float, form: str, columns: int) -> Arguments:
    x = _noise(6 * columns, 9).view(6, columns) / 2
    x[:, 5] = torch.tensor([0.25, 0.5, 8.0, 0.125, 0.25, 0.5])
    x[3, 7] = 1.0  # beside the outlier of every threshold one of the smallest threshold alone
    x = x.to(getattr(torch, dtype)).view((2, 3, columns) if form == "cube" else (6, columns))
    return {"x": x}, {"threshold": threshold}, _layout("x", form)


def _int8_mm_dequant(dtype: str, bias: bool, form: str, columns: int) -> Arguments:
    product = (_mixed(6 * columns, 10, 200_001) - 100_000).to(torch.int32)
    product = product.view((2, 3, columns) if form == "cube" else (6, columns))
    inputs = {"product": product, "row": _scales(6), "column": _scales(columns, 3)}
    if bias:
        inputs["bias"] = (_noise(columns, 11) * 64).to(getattr(torch, dtype))
    return inputs, {"dtype": dtype}, _layout("product", form)


def _step(
    optimizer: str, dtype: str, step: int, weight_decay: float, gnorm_scale: float, form: str, size: int, eight: bool
) -> Arguments:  # fmt: skip
    shape = (size // 8, 8) if form == "matrix" and size % 8 == 0 else (1, size) if form == "matrix" else (size,)
    kind = getattr(torch, dtype)
    inputs = {"p": _noise(size, 12).to(kind).view(shape), "g": _noise(size, 13).to(kind).view(shape)}
    for i in range(1, STATES[optimizer] + 1):
        squares = i == 2 or optimizer in ("rmsprop", "adagrad")
        if not eight:
            state = _noise(size, 13 + i) / 2
            inputs[f"state{i}"] = (state.abs() + 0.125 if squares else state).view(shape)
            continue
        # Of squares the upper half of the codes: of the signed map the others are negative.
        inputs[f"state{i}"] = (_bytes(size, 13 + i) // 2 + 128 if squares else _bytes(size, 13 + i)).view(shape)
        inputs[f"absmax{i}"] = _scales(-(-size // BLOCKSIZE), 20 + i)
        inputs.setdefault(f"values{min(i, 2)}" if i != 3 else "values1", _map(i != 2))
    numbers = {
        "optimizer": optimizer, "step": step, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "beta3": 0.999, "alpha": 3.0, "eps": 1e-3,
        "weight_decay": weight_decay, "max_unorm": 0.0, "gnorm_scale": gnorm_scale,
    }  # fmt: skip
    return inputs, numbers, ()


def _optimizer_32bit(**settings: Any) -> Arguments:
    return _step(**settings, eight=False)


def _optimizer_8bit(**settings: Any) -> Arguments:
    return _step(**settings, eight=True)


_MAKERS = (
    _quantize_blockwise, _dequantize_blockwise, _quantize_4bit, _dequantize_4bit, _quantize_4bit_nested, _gemm_4bit,
    _gemm_4bit_backward, _int8_quantize, _int8_mm_dequant, _optimizer_32bit, _optimizer_8bit,
)  # fmt: skip
MAKERS = {maker.__name__.removeprefix("_"): maker for maker in _MAKERS}
"""The function of each operation that makes the arguments of its cases."""
