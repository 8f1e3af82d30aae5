"""`torch.ops.bitsandbytes.*`: bitsandbytes' operators, for code that calls those and not its functions.

`define` makes the operators with kernels for every device and with fake ones, under bitsandbytes' schemas: the alias does it.
`KERNELS` alone are what `backend.py` registers with the real bitsandbytes.

Exactness is that of the function of the same name. Results never share memory with arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from bnbref import functional, int8
from bnbref.blockwise import into
from bnbref.codebooks import FOUR_BIT, value_table
from bnbref.context import without_autocast
from bnbref.fourbit import dequantize as dequantize_packed
from bnbref.fourbit import quantize as quantize_packed
from bnbref.integrations.bitsandbytes import updates
from bnbref.integrations.bitsandbytes.fakes import FAKES, WITH_OUT, check_4bit
from bnbref.nested import dequantize as dequantize_scales
from bnbref.products import matmul_4bit
from bnbref.quant_state import QuantState

SCHEMAS = {
    "dequantize_4bit": "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    "dequantize_blockwise": "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    "gemm_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    "gemv_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    "int8_double_quant": "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_mixed_scaled_mm": "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    "int8_mm_dequant": "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor",
    "int8_scaled_mm": "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    "optimizer_update_32bit": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, "
    "float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()",
    "optimizer_update_8bit_blockwise": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()",
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
}

# ---- kernels --------------------------------------------------------------------------------------------------------


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    check_4bit(quant_type, dtype)
    return dequantize_packed(A, absmax, FOUR_BIT[quant_type], blocksize, torch.Size(shape), dtype)


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    state = QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype)
    return functional.dequantize_blockwise(A, state)


def _gemm_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, blocksize: int, quant_type: str,
    bias: Tensor | None = None, absmax_8bit: Tensor | None = None, absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if absmax_8bit is not None:
        if absmax_code is None or absmax_offset is None:
            raise ValueError("absmax_8bit needs absmax_code and absmax_offset, got None")
        absmax = dequantize_scales(absmax_8bit, absmax, absmax_code, absmax_offset, 256)
    if len(shapeB) != 2 or A.shape[-1:] != torch.Size(shapeB[1:]):
        raise ValueError(f"shapeB must be [n, k] with k the last size of A, got {list(shapeB)} and {tuple(A.shape)}")
    check_4bit(quant_type, A.dtype)
    state = QuantState(absmax, shape=torch.Size(shapeB), blocksize=blocksize, quant_type=quant_type)
    with without_autocast(A):  # as the schema has it, the result has A's dtype
        return matmul_4bit(A, B, state, bias=bias)


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    for name, book in FOUR_BIT.items():
        values = value_table(book, code.device)
        # By value: writers differ in the sign of FP4's second zero.
        if values.shape == code.shape and bool((values == code).all()):
            return _gemm_4bit(A, B, shapeB, absmax, blocksize, name)
    raise ValueError(f"code must be the values of one of {sorted(FOUR_BIT)}, got {code.tolist()}")


def _int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    return int8.dequantize_product(A, row_stats, col_stats, bias, dtype or torch.float16)


def _int8_scaled_mm(
    A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return _int8_mm_dequant(int8.multiply(A, B), row_stats, col_stats, dtype, bias)


def _int8_mixed_scaled_mm(
    A: Tensor, CA: Tensor, CB: Tensor, SCA: Tensor, SCB: Tensor, outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    outliers, columns = None, A.new_empty(0)
    rows = int8.as_matrix(A)
    if outlier_cols is not None and outlier_cols.numel() > 0:
        columns = rows[:, outlier_cols].contiguous()
        with without_autocast(A):
            outliers = columns @ int8.dequantize(CB[:, outlier_cols].contiguous(), SCB.reshape(-1), A.dtype).t()
    product = int8.multiply(int8.as_matrix(CA), CB)
    y = int8.dequantize_int8_product(product, SCA.reshape(-1), SCB.reshape(-1), bias, outliers, dtype=A.dtype)
    return y.view(*A.shape[:-1], CB.shape[0]), columns


def _int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return functional.int8_double_quant(A, threshold=threshold)


def _optimizer_update_32bit(
    optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, unorm_vec: Tensor | None,
    max_unorm: float, param_norm: float, beta1: float, beta2: float, beta3: float, alpha: float, eps: float,
    weight_decay: float, step: int, lr: float, gnorm_scale: float, skip_zeros: bool = False,
) -> None:  # fmt: skip
    updates.optimizer_update_32bit(
        optimizer_name, g, p, state1, beta1, eps, step, lr, state2, beta2, beta3, alpha, weight_decay, gnorm_scale,
        unorm_vec, max_unorm, skip_zeros,
    )  # fmt: skip


def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    check_4bit(quant_type, A.dtype)
    return quantize_packed(A, FOUR_BIT[quant_type], blocksize, quant_storage)


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_blockwise(A, code, blocksize=blocksize)
    return codes, state.absmax


_NAMED = (
    _dequantize_4bit, _dequantize_blockwise, _gemm_4bit, _gemv_4bit, _int8_double_quant, _int8_mixed_scaled_mm, _int8_mm_dequant,
    _int8_scaled_mm, functional.int8_vectorwise_dequant, functional.int8_vectorwise_quant, _optimizer_update_32bit,
    updates.optimizer_update_8bit_blockwise, _quantize_4bit, _quantize_blockwise,
)  # fmt: skip

KERNELS: dict[str, Callable[..., Any]] = {"int8_linear_matmul": int8.multiply}
KERNELS |= {function.__name__.removeprefix("_"): function for function in _NAMED}


def _writing(function: Callable[..., Tensor]) -> Callable[..., None]:
    """The overload `.out` of an operator."""

    def write(*args: Any, out: Tensor | None = None) -> None:
        *args, out = args if out is None else (*args, out)  # type: ignore[assignment]
        result = function(*args)
        if out is None:
            raise ValueError(f"out must be {result.dtype} {tuple(result.shape)} on {result.device}, got None")
        into("out", out, result)

    return write


KERNELS |= {f"{name}.out": _writing(KERNELS[name]) for name in WITH_OUT}

# ---- registration ---------------------------------------------------------------------------------------------------

_operators: library.Library | None = None


def define() -> None:
    """Makes the operators. A second call does nothing."""
    global _operators
    if _operators is not None:
        return
    operators = library.Library("bitsandbytes", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        operators.define(name + schema)
        if name in WITH_OUT:
            operators.define(f"{name}.out{schema.replace(') -> Tensor', ', Tensor! out) -> ()')}")
    for name, kernel in KERNELS.items():
        operators.impl(name, kernel, "CompositeExplicitAutograd")
        library.register_fake(f"bitsandbytes::{name}", FAKES[name], lib=operators)
    _operators = operators


def undefine() -> None:
    """Removes the operators, so that another bitsandbytes can define them."""
    global _operators
    if _operators is not None:
        _operators._destroy()
        _operators = None
