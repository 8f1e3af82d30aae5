"""Products of few rows, computed from the codes of the weight: what generating a token is made of.

    y[i, j] = sum over blocks of  absmax[j, block] * (sum over the block of  value[code[j, l]] * a[i, l])      4 bits
    y[i, j] = fl(fl(sum of code[j, l] * q[i, l]) * row[i] * column[j] / 127^2)                                 8 bits

No dequantized weight is in memory, and its elements are not rounded. Many rows are faster by a dequantized weight and a
library's product: see `products`.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bnbref.blockwise import FLOATS
from bnbref.codebooks import Codebook, value_table
from bnbref.context import as_bytes, not_a_view
from bnbref.int8 import RECIPROCAL_127, RECIPROCAL_127_SQUARED
from bnbref.kernels import compile_enabled, fused, tracing
from bnbref.kernels.compiler import is_gpu, missing_compiler
from bnbref.quant_state import QuantState, present

# ---- 4 bits ---------------------------------------------------------------------------------------------------------


@fused(dynamic={"packed": (0,), "absmax": (0,), "bias": (0,), "absmax2": (0,)}, exact=False)
def multiply_rows(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    absmax2: Tensor | None = None,
    values2: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    blocksize: int,
    blocksize2: int = 0,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    """A few rows of activations times a 4-bit weight, computed from the codes: dtype `[rows, 1, n]`.

        y[i, j] = sum over blocks of  absmax[j, block] * (sum over the block of  value[code[j, l]] * a[i, l])

    a: the activations `[rows, p, k/p]`, where `a[i, j, l]` is column `p * l + j` of row i. packed: codes, uint8 `[n, k/2]`, or
    these bytes as int32. absmax: scales, float32 `[n, blocks]`; or their uint8 codes, and then absmax2, values2 and offset undo
    the second quantization (`nested.dequantize`). bias: `[n]`.

    Bounded: float32 sums of products, each rounded or fused, in the compiler's order; the weight is not rounded. With u = 2^-24,
    v the unit roundoff of dtype and S = sum |a value absmax| + |bias|: |y - exact| <= (k + 5) u S + v |exact| to first order,
    where the magnitude of a nested scale is that of its two terms.
    On a GPU the values are rounded to float16 if a has 16 bits, which adds 2^-11 S + 2^-25 sum |a absmax|.
    """
    packed = packed.view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
    value = rearrange(value_table(codebook, packed.device)[codes.to(torch.int32)], "n (b s) -> n b s", s=blocksize)
    columns = rearrange(a.float(), "m p l -> m (l p)")
    sums = torch.einsum("nbs,mbs->mnb", value, rearrange(columns, "m (b s) -> m b s", s=blocksize))
    if absmax2 is not None and values2 is not None and offset is not None:
        block = torch.arange(absmax.numel(), device=absmax.device).view(absmax.shape)
        absmax = values2[absmax.to(torch.int32)] * absmax2[block // blocksize2] + offset
    y = (sums * absmax).sum(-1)
    return rearrange(y if bias is None else y + bias.float(), "m n -> m 1 n").to(dtype)


# How many rows are few: beyond it the dequantized weight and a library's product are faster (docs: How to read the code).
_FEW = {"cpu": 1, "cuda": 8}
MOST = max(_FEW.values())


def _is_compiled(a: Tensor) -> bool:
    """Whether a kernel would be compiled: uncompiled, the sums over codes take more memory and time than a library's product."""
    return not tracing() and compile_enabled() and missing_compiler(a.device.type) is None


def are_few(a: Tensor, state: QuantState, bias: Tensor | None) -> bool:
    """Whether the rows are few, and of a weight that the formulations of `multiply_rows` take."""
    if not _is_compiled(a):
        return False
    n, k = present(state.shape, "shape")
    blocksize = present(state.blocksize, "blocksize")
    few = 0 < a.numel() <= _FEW.get(a.device.type, 0) * k and a.shape[-1] == k and a.dtype in FLOATS
    return few and k % blocksize == blocksize % 32 == n % 2 == 0 and (bias is None or bias.dim() == 1)


def multiply_few(a: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    """`a [..., k]` of few rows times a 4-bit weight, as `multiply_rows` does it; `[..., n]` in the dtype of a."""
    codes, absmax, second, constants = _of_weight(a, packed, state, state.scales)
    return _shaped(multiply_rows(_columns(a), codes, absmax(), bias, *second, **constants, dtype=a.dtype), a)


def prepared(
    a: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None, scales: Callable[[], Tensor]
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """`multiply_few` of one weight as a function of activations and a bias whose layouts are those of a and bias.

    scales: what `state.scales` returns. Returns None where nothing is compiled.
    """
    codes, absmax, second, constants = _of_weight(a, packed, state, scales)
    constants["dtype"] = a.dtype
    arguments: tuple[Any, ...] = (_columns(a), codes, absmax(), bias, *second)
    multiply_rows(*arguments, **constants)
    code = multiply_rows.ready(arguments, constants)
    if code is None or codes.data_ptr() != packed.data_ptr():  # a copy would not see a change in place
        return None
    return lambda a, bias: _shaped(code((_columns(a), codes, absmax(), bias, *second)), a)


def compile_ahead(a: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> None:
    """Has the product of one row like those of a compiled by another process, where it is likely to come: with many rows begins a
    text, which goes on with one at a time."""
    if torch.is_grad_enabled() or not is_gpu(a):
        return
    row = a.new_empty(1, 1, a.shape[-1])
    if are_few(row, state, bias):
        codes, absmax, second, constants = _of_weight(row, packed, state, state.scales)
        multiply_rows.ahead((_columns(row), codes, absmax(), bias, *second), {**constants, "dtype": a.dtype})


def _of_weight(
    a: Tensor, packed: Tensor, state: QuantState, scales: Callable[[], Tensor]
) -> tuple[Tensor, Callable[[], Tensor], tuple[Tensor | None, ...], dict[str, Any]]:
    """The arguments of `multiply_rows` that the weight gives: the codes; a function that returns the scales; what undoes their
    second quantization; the constants."""
    n, k = present(state.shape, "shape")
    blocksize = present(state.blocksize, "blocksize")
    constants: dict[str, Any] = {"blocksize": blocksize, "codebook": state.codebook}
    codes = _in_words((packed if packed.dtype == torch.uint8 else as_bytes(packed)).reshape(n, k // 2))
    if not is_gpu(a):
        return codes, lambda: scales().view(n, k // blocksize), (), constants
    codes = codes.view(torch.int32)
    second: tuple[Tensor, ...] = ()
    given = state.absmax
    if state.state2 is not None:  # not on a CPU, which would look up one scale at a time
        second = (state.state2.absmax, present(state.state2.code, "state2.code"), present(state.offset, "offset"))
        constants["blocksize2"] = present(state.state2.blocksize, "state2.blocksize")

    def viewed() -> Tensor:
        return (given if second else scales()).view(n, k // blocksize)

    view = viewed()
    # `absmax.data = ` may give the scales other memory.
    return codes, lambda: view if view.data_ptr() == given.data_ptr() else viewed(), second, constants


def _columns(a: Tensor) -> Tensor:
    """Activations as `multiply_rows` takes them."""
    k = a.shape[-1]
    if is_gpu(a):
        return _in_words(a if a.dim() == 3 and a.shape[1] == 1 else a.reshape(-1, 1, k))
    # As float32: vectors of 16-bit numbers have other lengths than those of the codes, which is five times slower. Not by einops,
    # which takes 5 us of Python: a model calls this 200 times a token.
    return a.float().reshape(-1, k // 2, 2).transpose(1, 2).contiguous()


def _shaped(y: Tensor, a: Tensor) -> Tensor:
    """The product `[rows, 1, n]` in the shape of the activations, which most often are one token of each text, `[rows, 1, k]`."""
    return y if a.dim() == 3 and a.shape[1] == 1 else not_a_view(y.view(*a.shape[:-1], y.shape[-1]))


def _in_words(x: Tensor) -> Tensor:
    """The same tensor, or a copy if a GPU could not read it in words of 64 bits."""
    x = x.contiguous()
    return x if x.storage_offset() * x.itemsize % 8 == 0 else x.clone()


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


@fused(dynamic={"codes": (0,), "column": (0,), "bias": (0,)})
def multiply_int8_row(
    q: Tensor, row: Tensor, codes: Tensor, column: Tensor, bias: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """One row of int8 activations times an int8 weight, scaled: dtype `[1, n]`.  Exact.

    q: codes of the row, int8 `[1, k]`. row: its absmax, float32 `[1]`. codes: of the weight, int8 `[n, k]`. column: the absmax
    of the weight's rows, float32 `[n]`. bias: `[n]`. The result is that of `int8.multiply` and `dequantize_int8_product`.
    """
    y = _scaled_sum(q, codes) * row * column * RECIPROCAL_127_SQUARED
    return rearrange(y if bias is None else y + bias.float(), "n -> 1 n").to(dtype)


@fused(dynamic={"codes": (0,), "column": (0,), "bias": (0,)}, exact=False)
def multiply_int8_row_and_outliers(
    q: Tensor,
    row: Tensor,
    codes: Tensor,
    column: Tensor,
    bias: Tensor | None,
    a: Tensor,
    columns: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """`multiply_int8_row`, plus the row's outliers times the same codes: dtype `[1, n]`.

    a: the row `[1, k]`. columns: which of its elements are outliers, bool `[k]`. The outliers are the rest of LLM.int8():

        fl(sum of code * a over the outlier columns) * fl(column / 127)

    Bounded: this float32 sum is in the compiler's order. With u = 2^-24 and v the unit roundoff of dtype the result is within
    (k + 4) u sum |a code column / 127| + 4 u |int8 part| + v |exact| of the real number, to first order.
    """
    y = _scaled_sum(q, codes) * row * column * RECIPROCAL_127_SQUARED
    if bias is not None:
        y = y + bias.float()
    outliers = torch.where(columns, a[0].float(), 0.0)
    y = y + (codes.float() * outliers).sum(-1) * (column * RECIPROCAL_127)
    return rearrange(y, "n -> 1 n").to(dtype)


def is_row_of_int8(a: Tensor, codes: Tensor) -> bool:
    """Whether `a [rows, k]` times an int8 weight is a sum over the codes: for one row on a GPU, where the library's product wants
    17 rows and outliers would be counted on the host."""
    return _is_compiled(a) and is_gpu(a) and a.shape[0] == 1 and codes.numel() > 0


def _scaled_sum(q: Tensor, codes: Tensor) -> Tensor:
    return (codes.to(torch.int32) * q[0].to(torch.int32)).sum(-1, dtype=torch.int32).float()
