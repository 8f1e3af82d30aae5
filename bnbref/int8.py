"""LLM.int8(): row-wise 8-bit quantization, an exact integer product, and outlier columns kept in sixteen bits.

    q = rint(x * fl(127 * fl(1 / absmax)))            absmax: per row, over the elements below the threshold
    y = fl(fl(q_a @ q_b^T * absmax_a) * absmax_b) * RN(1 / 127^2)        plus the columns of A with outliers, in floats

Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (2208.07339), sections 2-3.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bnbref.arguments import checked
from bnbref.blockwise import FLOATS, check_device, check_float, reciprocal
from bnbref.context import constant_of_graphs, in_another_thread, plain, transforming, without_autocast
from bnbref.kernels import fused

# Below this 127 * (1 / absmax) is no float32 any more; such a row is stored as a row of zeros.
SMALLEST_ABSMAX = 2.0**-121
RECIPROCAL_127 = 0.007874015718698502  # RN(1 / 127)
# RN(1 / 16129). bitsandbytes' default backend has a typo in the fifth digit.
RECIPROCAL_127_SQUARED = 6.200012285262346e-05
# Any sum of 1024 products of int8 is at most 1024 * 128 * 128 = 2^24: exact in float32, in any order, fused or not.
EXACT_IN_FLOAT32 = 1024


@constant_of_graphs
def cpu_product_is_exact() -> bool:
    """Whether oneDNN's int8 product is exact: without VNNI, or told to do without, it adds pairs in 16 bits and saturates.

    It is asked at the first product and not at import, because it starts threads of OpenMP, after which a process that is made by
    `fork` hangs; and in a thread that has no mode, autocast or default device around it.
    """
    return _asked()


@functools.cache
def _asked() -> bool:
    def exact() -> bool:
        largest = torch.full((32, 64), 127, dtype=torch.int8)
        return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())

    return torch.cpu._is_vnni_supported() and in_another_thread(exact)


@fused(dynamic={"rows": (0, 1)}, by_rows=lambda threshold, **_: threshold <= 0)
def quantize_int8_rows(rows: Tensor, *, threshold: float, propagate_nan: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The int8 codes and the scales of rows, and which columns hold an outlier.  Exact.

    rows: float32, float16 or bfloat16 `[rows, columns]`. Returns codes, int8 of that shape, 0 in outlier columns; the absmax of
    each row over what is below the threshold, float32 `[rows]`; and bool `[columns]`, or `[0]` if the threshold is 0.
    propagate_nan: whether the absmax of a row with a NaN is NaN; if not, the NaN is left out.
    """
    x = rows.float()
    size = x.abs() if propagate_nan else torch.where(x == x, x.abs(), 0.0)
    if threshold > 0:
        outlier = size >= threshold
        size = torch.where(outlier, 0.0, size)
        columns = outlier.any(0)
    else:
        columns = torch.empty(0, dtype=torch.bool, device=rows.device)
    absmax = size.amax(-1)
    absmax = torch.where(absmax < SMALLEST_ABSMAX, 0.0, absmax)
    # Two roundings, as on every backend of bitsandbytes: CUDA multiplies by the reciprocal, and so does torch for 127 / x.
    scaled = x * rearrange(reciprocal(absmax) * 127.0, "r -> r 1")
    # NaN, and inf * 0 in a row whose absmax is infinite, are 0.
    keep = (scaled == scaled) if threshold <= 0 else (scaled == scaled) & ~columns
    return torch.where(keep, scaled.round(), 0.0).to(torch.int8), absmax, columns


@fused(dynamic={"product": (0, 1), "row": (0,), "column": (0,), "bias": (0,), "outliers": (0, 1)})
def dequantize_int8_product(
    product: Tensor, row: Tensor, column: Tensor, bias: Tensor | None, outliers: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """A product of int8 codes, scaled back: dtype `[m, n]`.  Exact.

        fl(fl(fl(product * row) * column) * RN(1 / 16129)), then + bias, then + outliers, then one rounding to dtype

    product: int32 `[m, n]`. row, column: the absmax of the rows of both operands, float32 `[m]` and `[n]`. bias: `[n]` or None.
    outliers: the product of the outlier columns in floats, `[m, n]`, or None.
    """
    y = product.float() * rearrange(row, "m -> m 1") * rearrange(column, "n -> 1 n") * RECIPROCAL_127_SQUARED
    if bias is not None:
        y = y + bias.float()
    if outliers is not None:
        y = y + outliers.float()
    return y.to(dtype)


@fused(dynamic={"codes": (0, 1), "absmax": (0,)})
def dequantize_int8_rows(codes: Tensor, absmax: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The values of int8 codes `[rows, columns]` in dtype: fl(fl(code * absmax) * RN(1 / 127)), rounded once.  Exact.

    absmax: of each row, float32 `[rows]`.
    """
    return (codes.float() * rearrange(absmax, "r -> r 1") * RECIPROCAL_127).to(dtype)


def as_matrix(x: Tensor) -> Tensor:
    """A tensor `[..., columns]` as a matrix `[rows, columns]`, also where one of the two sizes is 0."""
    # Not Size.numel(), which turns a symbolic size into the number of the example.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@checked
def quantize(x: Tensor, threshold: float = 0.0, propagate_nan: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row-wise int8 of a tensor `[..., columns]`, its rows' absmax, and which columns hold an outlier.  Exact.

        q = rint(x * fl(127 * fl(1 / absmax))), half to even; absmax over the row's elements with |x| < threshold (NaN left out)

    Returns int8 like `x`, float32 `[rows]` over the flattened leading dimensions, and bool `[columns]`, or None where
    the threshold is 0. Columns with an outlier are zero in every row, NaN is 0, and so is a row with an infinity.
    With propagate_nan the absmax of a row with a NaN is NaN, so that a product with this row is NaN: its codes alone are finite.

    >>> quantize(torch.tensor([[1.0, -0.5, 7.0], [2.0, 0.0, 1.0]]), threshold=6.0)
    (tensor([[127, -64,   0],
            [127,   0,   0]], dtype=torch.int8), tensor([1., 2.]), tensor([False, False,  True]))
    """
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 (off) or positive, got {threshold}")
    if x.numel() == 0:
        empty = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
        rows = x.shape[:-1].numel()
        return x.to(torch.int8), x.new_zeros(rows, dtype=torch.float32), empty if threshold > 0 else None
    codes, absmax, columns = quantize_int8_rows(
        as_matrix(x.detach()), threshold=float(threshold), propagate_nan=propagate_nan
    )
    return codes.view(x.shape), absmax, columns if threshold > 0 else None


@checked
def dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dtype(fl(fl(code * absmax) * RN(1 / 127)))` for int8 `[rows, columns]`.  Exact.

    absmax: of each row, `[rows]`. dtype: float32, float16 or bfloat16. ValueError: other dtypes, shapes or devices.

    >>> dequantize(torch.tensor([[127, -64]], dtype=torch.int8), torch.tensor([1.0]))
    tensor([[ 1.0000, -0.5039]])
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or absmax.shape != codes.shape[:1]:
        raise ValueError(
            f"codes must be int8 [rows, columns] and absmax [rows], got {codes.dtype} {tuple(codes.shape)} "
            f"and {tuple(absmax.shape)}"
        )
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    check_device("codes", codes, absmax=absmax)
    return dequantize_int8_rows(plain(codes), absmax.detach().float(), dtype=dtype)


@checked
def dequantize_product(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> Tensor:
    """`dequantize_int8_product` of an int32 product A `[..., n]`, in its shape.  Exact.

    row_stats, col_stats: the absmax of the rows of both operands, float32, as many as A has rows and columns. bias: `[n]`.
    dtype: float32, float16 or bfloat16. ValueError: other dtypes, shapes or devices.
    """
    if A.dtype != torch.int32 or A.dim() == 0:
        raise ValueError(f"A must be int32 [..., n], got {A.dtype} {tuple(A.shape)}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    check_device("A", A, row_stats=row_stats, col_stats=col_stats, bias=bias)
    product = as_matrix(A)
    m, n = product.shape
    for name, stats, size in (("row_stats", row_stats, m), ("col_stats", col_stats, n)):
        if stats.dtype != torch.float32 or stats.numel() != size:
            raise ValueError(f"{name} must be float32 [{size}], got {stats.dtype} {tuple(stats.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}], got {tuple(bias.shape)}")
    y = dequantize_int8_product(product, row_stats.reshape(-1), col_stats.reshape(-1), bias, None, dtype=dtype)
    return y.view(A.shape)


@checked
def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The int32 product `a @ b^T` of int8 `[..., k]` and `[n, k]`.  Exact (modulo 2^32, which needs k > 131,072).

    >>> multiply(torch.full((1, 3), 127, dtype=torch.int8), torch.full((2, 3), -128, dtype=torch.int8))
    tensor([[-48768, -48768]], dtype=torch.int32)
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"a and b must be int8, got {a.dtype} and {b.dtype}")
    if b.dim() != 2 or a.dim() < 1 or a.shape[-1] != b.shape[1]:
        raise ValueError(f"a must be [..., k] and b [n, k], got {tuple(a.shape)} and {tuple(b.shape)}")
    check_device("a", a, b=b)
    rows = as_matrix(a)
    if rows.numel() == 0 or b.numel() == 0:
        product = torch.zeros(rows.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    elif transforming():  # vmap knows float products
        product = _multiply_in_float32(rows, b)
    elif a.device.type == "cpu" and b.shape[1] > 1 and cpu_product_is_exact():
        product = torch._int_mm(rows, b.t())  # for k = 1 it returns what was in memory
    elif a.device.type == "cuda":
        product = _multiply_on_cuda(rows, b)
    else:
        product = _multiply_in_float32(rows, b)
    return product.view(*a.shape[:-1], b.shape[0])


def _multiply_on_cuda(a: Tensor, b: Tensor) -> Tensor:
    """The product by cuBLASLt, which takes 17 rows or more, and multiples of 8 elsewhere: zeros fill up what is missing.

    Nothing is padded that need not be, because `F.pad` by nothing would copy the weight all the same.
    """
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    if m <= 16 or k % 8:
        a = F.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    if k % 8 or n % 8:
        b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a, b.t())[:m, :n]


def _multiply_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """The product on any device: in float32, 1024 columns at a time, where it is exact, and the parts added as integers."""
    parts = zip(a.split(EXACT_IN_FLOAT32, 1), b.split(EXACT_IN_FLOAT32, 1), strict=True)
    with without_autocast(a):
        products = [(left.float() @ right.float().t()).to(torch.int32) for left, right in parts]
    return torch.stack(products).sum(0, dtype=torch.int32)
