"""Fake kernels of bitsandbytes' operators, for torch.compile and the meta device: the shapes and dtypes of their results."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from bnbref.blockwise import FLOATS, block_count, check_float
from bnbref.codebooks import FOUR_BIT

WITH_OUT = ("dequantize_4bit", "dequantize_blockwise", "gemv_4bit", "int8_linear_matmul")
"""Operators that have an overload `.out`, which writes its result into the last argument and returns nothing."""


def check_4bit(quant_type: str, dtype: torch.dtype) -> None:
    """ValueError if there is no such 4-bit format, or it does not encode such a dtype."""
    if quant_type not in FOUR_BIT:
        raise ValueError(f"quant_type must be one of {sorted(FOUR_BIT)}, got {quant_type!r}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {FLOATS}, got {dtype}")


def _fake_int8_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, rows = torch.empty_like(A, dtype=torch.int8), A.new_empty(A.shape[:-1].numel(), dtype=torch.float32)
    if threshold == 0.0:
        return codes, rows, None
    return codes, rows, A.new_empty(library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _fake_int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    codes, rows, columns = _fake_int8_quant(A, threshold)
    by_column = A.new_empty(A.shape, dtype=torch.int8)
    return codes, by_column, rows, A.new_empty(A.shape[-1], dtype=torch.float32), columns


def _fake_mixed(
    A: Tensor, CA: Tensor, CB: Tensor, SCA: Tensor, SCB: Tensor, outlier_cols: Tensor | None = None,
    *bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    y = A.new_empty((*A.shape[:-1], CB.shape[0]))
    if outlier_cols is None:
        return y, A.new_empty(0)
    return y, A.new_empty((A.shape[:-1].numel(), outlier_cols.shape[0]))


def _fake_quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    check_4bit(quant_type, A.dtype)
    packed = A.new_empty(((A.numel() + 1) // 2 // quant_storage.itemsize, 1), dtype=quant_storage)
    return packed, A.new_empty(block_count(A.numel(), blocksize), dtype=torch.float32)


def _fake_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check_float("A", A)
    absmax = A.new_empty(block_count(A.numel(), blocksize), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.uint8), absmax


def _fake_dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    check_4bit(quant_type, dtype)
    return A.new_empty(tuple(shape), dtype=dtype)


FAKES: dict[str, Callable[..., Any]] = {
    "dequantize_4bit": _fake_dequantize_4bit,
    "dequantize_blockwise": lambda A, absmax, code, blocksize, dtype: A.new_empty(A.shape, dtype=dtype),
    "gemm_4bit": lambda A, B, shapeB, *rest, **options: A.new_empty((*A.shape[:-1], shapeB[0])),
    "gemv_4bit": lambda A, B, shapeB, *rest: A.new_empty((*A.shape[:-1], shapeB[0])),
    "int8_double_quant": _fake_int8_double_quant,
    "int8_linear_matmul": lambda A, B: A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32),
    "int8_mixed_scaled_mm": _fake_mixed,
    "int8_mm_dequant": lambda A, row, col, dtype=None, bias=None: A.new_empty(A.shape, dtype=dtype or torch.float16),
    "int8_scaled_mm": lambda A, B, row, col, bias=None, dtype=None: A.new_empty(
        (*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16
    ),
    "int8_vectorwise_dequant": lambda A, stats: A.new_empty(A.shape, dtype=torch.float32),
    "int8_vectorwise_quant": _fake_int8_quant,
    "optimizer_update_32bit": lambda *args, **options: None,
    "optimizer_update_8bit_blockwise": lambda *args, **options: None,
    "quantize_4bit": _fake_quantize_4bit,
    "quantize_blockwise": _fake_quantize_blockwise,
    **{f"{name}.out": lambda *args, **options: None for name in WITH_OUT},
}
