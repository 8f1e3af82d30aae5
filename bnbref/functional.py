"""The functions of `bitsandbytes.functional`, with its names and signatures. Each is a few lines over a definition.

A blocksize is any positive integer, and a tensor has any shape. Where bitsandbytes takes `out=` or a tensor for the scales, so do
these; that tensor must have the dtype, shape and device of the result. Each docstring names the definition that is called, in
`blockwise`, `fourbit`, `nested` or `int8`.
"""

import torch
from torch import Tensor

from bnbref import blockwise, int8, maps
from bnbref.arguments import checked
from bnbref.blockwise import check_float, into
from bnbref.codebooks import Codebook, value_table
from bnbref.context import not_a_view
from bnbref.maps import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map, get_4bit_type
from bnbref.products import matmul_4bit
from bnbref.quant_state import QuantState, present, quantize_scales, quantize_with_state

__all__ = [
    "QuantState", "create_dynamic_map", "create_fp8_map", "create_linear_map", "create_normal_map", "dequantize_4bit",
    "dequantize_blockwise", "dequantize_fp4", "dequantize_nf4", "gemv_4bit", "get_4bit_type", "int8_double_quant",
    "int8_linear_matmul", "int8_mm_dequant", "int8_vectorwise_dequant", "int8_vectorwise_quant", "quantize_4bit",
    "quantize_blockwise", "quantize_fp4", "quantize_nf4",
]  # fmt: skip

# ---- eight bits, blockwise ------------------------------------------------------------------------------------------


@checked
def quantize_blockwise(
    A: Tensor, code: Tensor | Codebook | None = None, absmax: Tensor | None = None, out: Tensor | None = None,
    blocksize: int = 4096, nested: bool = False,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """Blockwise 8-bit quantization of a tensor: `blockwise.quantize`.  Exact.

    A: float32, float16 or bfloat16 of any shape. code: sorted values, 2 to 256, dynamic signed by default; nearest value by
    the float32 midpoint, a tie to the even code; or a Codebook. nested: quantize the scales too, less their mean, with the
    same blocksize.
    Returns uint8 codes shaped like A and their QuantState. out and absmax receive the results if given. ValueError: another
    dtype, no block size, a code that is not sorted, an out of another shape, dtype or device.

    >>> codes, state = quantize_blockwise(torch.tensor([0.0, -2.0, 1.0]))
    >>> codes, state.absmax
    (tensor([127,   0, 219], dtype=torch.uint8), tensor([2.]))
    """
    check_float("A", A)
    book = maps.codebook_of(code)
    codes, scales = blockwise.quantize(A, book, blocksize)
    values = maps.padded_to_256(code if isinstance(code, Tensor) else value_table(book, A.device)).to(A.device)
    offset = state2 = None
    if nested:
        scales, offset, state2 = quantize_scales(scales, blocksize)
    scales = into("absmax", absmax, scales)
    state = QuantState(scales, code=values, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2)
    return into("out", out, codes), state


@checked
def dequantize_blockwise(
    A: Tensor, quant_state: QuantState | None = None, absmax: Tensor | None = None, code: Tensor | Codebook | None = None,
    out: Tensor | None = None, blocksize: int = 4096, nested: bool = False,
) -> Tensor:  # fmt: skip
    """Undo `quantize_blockwise`: `dtype(fl(values[code] * absmax))`.  Exact.

    A: the uint8 codes, any shape. Either quant_state, or absmax, float32 `[blocks]`, with code and blocksize. Returns A's shape
    in the state's dtype, float32 without a state; out receives it if given. nested is bitsandbytes' and changes nothing: a
    state says itself whether its scales are codes. ValueError: neither of both; a state of 4-bit codes.

    >>> dequantize_blockwise(*quantize_blockwise(torch.tensor([0.0, -2.0, 2.0])))
    tensor([ 0.0000, -1.9859,  2.0000])
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs quant_state or absmax, got neither")
        values = maps.values_of(code) if isinstance(code, Tensor) else value_table(maps.codebook_of(code), A.device)
        quant_state = QuantState(absmax, code=values, blocksize=blocksize, dtype=torch.float32)
    if quant_state.quant_type is not None:
        raise ValueError(f"quant_state is one of 4-bit codes, {quant_state.quant_type!r}: dequantize_4bit undoes these")
    values = maps.padded_to_256(present(quant_state.code, "code")).to(A.device)
    dtype, blocksize = present(quant_state.dtype, "dtype"), present(quant_state.blocksize, "blocksize")
    return into("out", out, not_a_view(blockwise.dequantize(A, quant_state.scales(), values, blocksize, dtype)))


# ---- four bits ------------------------------------------------------------------------------------------------------


@checked
def quantize_4bit(
    A: Tensor, absmax: Tensor | None = None, out: Tensor | None = None, blocksize: int | None = None,
    compress_statistics: bool = False, quant_type: str | Codebook = "fp4", quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """Blockwise 4-bit quantization of a tensor: `fourbit.quantize`, with double quantization: `nested.quantize`.  Exact.

    A: float32, float16 or bfloat16 of any shape. blocksize: 64 by default. quant_type: "nf4", "fp4", "af4", "int4" or a
    Codebook of at most 16 values. compress_statistics: quantize the scales as well, in 8 bits (double quantization).
    quant_storage: the dtype that the packed bytes are called. Returns them, `[bytes / itemsize, 1]`, and their QuantState; out
    and absmax receive the results if given. ValueError: another dtype, no block size, an unknown quant_type, bytes that
    quant_storage does not divide.

    >>> packed, state = quantize_4bit(torch.tensor([1.0, -1.0, 0.0, 0.5]), quant_type="nf4")
    >>> [f"{byte:02x}" for byte in packed.flatten().tolist()], state.absmax
    (['f0', '7c'], tensor([1.]))
    """
    check_float("A", A)
    blocksize = 64 if blocksize is None else blocksize
    packed, state = quantize_with_state(A, quant_type, blocksize, compress_statistics, quant_storage)
    state.absmax = into("absmax", absmax, state.absmax)
    return into("out", out, packed), state


@checked
def dequantize_4bit(
    A: Tensor, quant_state: QuantState | None = None, absmax: Tensor | None = None, out: Tensor | None = None,
    blocksize: int | None = None, quant_type: str = "fp4",
) -> Tensor:  # fmt: skip
    """Undo `quantize_4bit`: `dtype(fl(values[code] * absmax))` in the original shape and dtype.  Exact.

    A: the packed codes. Either quant_state, or absmax, blocksize (64 by default), quant_type and out, whose shape and dtype are
    then the result's. A packed weight that is given as a row `[1, bytes]` returns the transpose, as in bitsandbytes.
    ValueError: neither of both; packed codes of another size than the state's shape.

    >>> dequantize_4bit(*quantize_4bit(torch.tensor([1.0, -1.0, 0.0, 0.5]), quant_type="nf4"))
    tensor([ 1.0000, -1.0000,  0.0000,  0.4407])
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs quant_state, or both absmax and out")
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, shape=out.shape, blocksize=blocksize, quant_type=quant_type, dtype=out.dtype)
    result = into("out", out, not_a_view(quant_state.dequantize(A, present(quant_state.dtype, "dtype"))))
    return result.t() if A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1 else result


@checked
def quantize_fp4(
    A: Tensor, absmax: Tensor | None = None, out: Tensor | None = None, blocksize: int | None = None,
    compress_statistics: bool = False, quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """`quantize_4bit` with quant_type "fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


@checked
def quantize_nf4(
    A: Tensor, absmax: Tensor | None = None, out: Tensor | None = None, blocksize: int | None = None,
    compress_statistics: bool = False, quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """`quantize_4bit` with quant_type "nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


@checked
def dequantize_fp4(
    A: Tensor, quant_state: QuantState | None = None, absmax: Tensor | None = None, out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:  # fmt: skip
    """`dequantize_4bit` with quant_type "fp4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


@checked
def dequantize_nf4(
    A: Tensor, quant_state: QuantState | None = None, absmax: Tensor | None = None, out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:  # fmt: skip
    """`dequantize_4bit` with quant_type "nf4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


@checked
def gemv_4bit(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:  # fmt: skip
    """`A @ W^T` for a packed 4-bit weight, any number of rows. Bounded: see `bnbref.matmul_4bit`.

    A: `[..., k]`. B: the packed weight, whose state has the shape `[n, k]`. Returns `[..., n]` in A's dtype; out receives it if
    given. transposed_A and transposed_B must be False: ValueError.

    >>> packed, state = quantize_4bit(torch.eye(2), quant_type="nf4")
    >>> gemv_4bit(torch.tensor([[2.0, 3.0]]), packed.t(), state=state)
    tensor([[2., 3.]])
    """
    if state is None:
        raise ValueError("state is required: it holds the scales and the shape of B")
    if transposed_A or transposed_B:
        raise ValueError(
            "transposed_A and transposed_B must be False: B is a weight [n, k] and multiplies from the right"
        )
    return matmul_4bit(A, B, state, out)


# ---- int8 -----------------------------------------------------------------------------------------------------------


@checked
def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row-wise int8: `int8.quantize`, with the outlier columns as int64 indices, None where threshold is 0.  Exact.

    A: `[..., columns]`, float32, float16 or bfloat16. Returns int8 codes shaped like A and the absmax of each row, float32.
    threshold: an element of at least this magnitude makes an outlier column, whose codes are 0.

    >>> int8_vectorwise_quant(torch.tensor([[1.0, -0.5, 7.0]]), threshold=6.0)
    (tensor([[127, -64,   0]], dtype=torch.int8), tensor([1.]), tensor([2]))
    """
    check_float("A", A)
    codes, absmax, columns = int8.quantize(A, threshold)
    return codes, absmax, None if columns is None else columns.nonzero().view(-1)


@checked
def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """`fl(fl(A * stats) * RN(1 / 127))`, float32: `int8.dequantize`.  Exact.

    A: int8 codes `[..., columns]`. stats: the absmax of each row, `[rows]` or `[rows, 1]`.

    >>> int8_vectorwise_dequant(torch.tensor([[127, -64]], dtype=torch.int8), torch.tensor([2.0]))
    tensor([[ 2.0000, -1.0079]])
    """
    return int8.dequantize(A, stats.reshape(-1))


@checked
def int8_double_quant(
    A: Tensor, col_stats: Tensor | None = None, row_stats: Tensor | None = None, out_col: Tensor | None = None,
    out_row: Tensor | None = None, threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Int8 by rows and by columns of `[rows, columns]`: codes and codes, row absmax and column absmax, outlier columns.  Exact.

    A: `[rows, columns]`, float32, float16 or bfloat16. Elements of a magnitude >= threshold are left out of both. The codes by
    columns have A's layout. col_stats, row_stats, out_col and out_row must be None: ValueError.

    >>> [t.tolist() for t in int8_double_quant(torch.tensor([[1.0, -4.0], [0.5, 2.0]]))[:4]]
    [[[32, -127], [32, 127]], [[127, -127], [64, 64]], [4.0, 2.0], [1.0, 4.0]]
    """
    for name, value in (("col_stats", col_stats), ("row_stats", row_stats), ("out_col", out_col), ("out_row", out_row)):
        if value is not None:
            raise ValueError(f"{name} must be None: results are returned, not written into tensors of the caller")
    if A.dim() != 2:
        raise ValueError(f"A must be [rows, columns], got {tuple(A.shape)}")
    rows = int8_vectorwise_quant(A, threshold)
    inliers = torch.where(A.abs() >= float(threshold), 0, A) if threshold > 0 else A
    by_column, column_absmax, _ = int8.quantize(inliers.t())
    return rows[0], by_column.t().contiguous(), rows[1], column_absmax, rows[2]


@checked
def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """The int32 product `A @ B^T` of int8 tensors: `int8.multiply`.  Exact.

    A: int8 `[..., k]`. B: int8 `[n, k]`. Returns int32 `[..., n]`, the only dtype there is; out receives it if given.

    >>> int8_linear_matmul(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, 4], [5, 6]], dtype=torch.int8))
    tensor([[11, 17]], dtype=torch.int32)
    """
    if dtype != torch.int32:
        raise ValueError(f"dtype must be torch.int32, got {dtype}")
    return into("out", out, int8.multiply(A, B))


@checked
def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """float16 of an int32 product: `int8.dequantize_product`, in A's shape.  Exact.

        y = fl(fl(A * row_stats) * col_stats) * RN(1 / 16129) + bias

    A: int32 `[..., n]`. row_stats: the absmax of each row, float32 `[rows]`. col_stats: that of each column, `[n]`. bias: `[n]`
    or None. out receives the result if given. ValueError: other dtypes, shapes or devices.

    >>> int8_mm_dequant(torch.tensor([[16129]], dtype=torch.int32), torch.tensor([2.0]), torch.tensor([3.0]))
    tensor([[6.]], dtype=torch.float16)
    """
    y = int8.dequantize_product(A, row_stats, col_stats, bias)
    return into("out", out, not_a_view(y))
