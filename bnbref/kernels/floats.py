"""Floats as the integers that their bits are: several in one load, widened, rounded and compared without leaving registers.

A thread is given several neighbouring elements in words of 32 or 64 bits. Then its loads and stores are wide, a block is
reduced mostly inside of threads, and what two elements share, a byte of two codes, is made where both are.
"""

import torch
from einops import rearrange
from torch import Tensor

from bnbref.kernels.compiler import is_gpu


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, for an index that is never negative: of a gather Inductor does not ask whether it is."""
    return table.gather(0, index.to(torch.int64).reshape(-1)).reshape(index.shape)


# ---- sixteen bits ---------------------------------------------------------------------------------------------------


def widen(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 value of the bfloat16 or float16 in the lower half of an int32.  Exact.

    >>> widen(torch.tensor([0x3F80]), torch.bfloat16), widen(torch.tensor([0x3C00]), torch.float16)
    (tensor([1.]), tensor([1.]))
    """
    pattern = pattern.to(torch.int32)
    if dtype == torch.bfloat16:
        return (pattern << 16).view(torch.float32)
    if is_gpu(pattern):
        return pattern.to(torch.int16).view(dtype).float()
    # Inductor's vectors for CPUs have no cast to float16's bits: exponent and mantissa where float32 has them, and the
    # difference of the two biases by a product, which is exact because float32's subnormals hold float16's.
    placed = (pattern << 13) & 0x0FFFFFFF | (pattern << 16) & -(2**31)
    value = placed.view(torch.float32) * 2.0**112
    return torch.where((pattern & 0x7C00) == 0x7C00, (placed | 0x7F800000).view(torch.float32), value)


def rounded_bits(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded to `dtype`: its bits in the low end of an int32, zeros above.  Exact."""
    if dtype == torch.float32:
        return value.view(torch.int32)
    return value.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded to `dtype`, as float32 again; also where Inductor would leave out `.to(dtype).float()`.  Exact.

    >>> rounded(torch.tensor([1.01]), torch.bfloat16)
    tensor([1.0078])
    """
    if dtype == torch.float32:
        return value
    if not torch.compiler.is_compiling():
        return value.to(dtype).float()
    return widen(value.to(dtype).view(torch.int16), dtype)  # a bit cast is never left out


# ---- several in one load --------------------------------------------------------------------------------------------


def in_pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd elements of each row as float32, without a load of stride two."""
    if rows.dtype == torch.float32:
        words = rows.view(torch.int64)
        return words.to(torch.int32).view(torch.float32), (words >> 32).to(torch.int32).view(torch.float32)
    words = rows.view(torch.int32)
    return widen(words, rows.dtype), widen(words >> 16, rows.dtype)


def in_lanes(rows: Tensor, blocksize: int, elements: int) -> list[Tensor]:
    """`[rows, blocks * blocksize]` -> `elements` float32 tensors `[rows, blocks, blocksize / elements]`, in order.

    >>> in_lanes(torch.arange(8.0)[None], 8, 4)
    [tensor([[[0., 4.]]]), tensor([[[1., 5.]]]), tensor([[[2., 6.]]]), tensor([[[3., 7.]]])]
    """
    per_word = 8 // rows.itemsize
    sizes = {"lane": blocksize // elements, "word": elements // per_word}
    words = rearrange(rows.view(torch.int64), "n (b lane word) -> word n b lane", **sizes)
    halves = [half.to(torch.int32) for word in words for half in (word, word >> 32)]
    if rows.dtype == torch.float32:
        return [half.view(torch.float32) for half in halves]
    return [widen(part, rows.dtype) for half in halves for part in (half, half >> 16)]


def absmax_of_lanes(lanes: list[Tensor]) -> Tensor:
    """`magnitude(x).amax(-1)` over all lanes, on the bits: floats without sign are in the order of integers."""
    # Adding 2^23 - 1 takes NaN, above infinity, over the top: the least of all integers.
    keys = [(x.view(torch.int32) & 0x7FFFFFFF) + 0x007FFFFF for x in lanes]
    while len(keys) > 1:
        keys = [torch.maximum(one, other) for one, other in zip(keys[::2], keys[1::2], strict=True)]
    key = keys[0].amax(-1)
    return torch.where(key > 2 * 0x007FFFFF, key - 0x007FFFFF, 0).view(torch.float32)
