"""Floats handled as the integers that their bits are: several are loaded at once, widened, rounded and compared in registers.

A lane is what one thread of a GPU, or one place of a CPU's vector, computes. It is given several neighbouring elements in a word
of 32 or 64 bits. Then loads and stores are wide, a block is reduced mostly inside of lanes, and a byte of two codes is
made by the lane that has both.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from bnbref.kernels.compiler import is_gpu


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` for indices that are never negative. Written as a gather, for which Inductor does not check that."""
    return table.gather(0, index.to(torch.int64).reshape(-1)).reshape(index.shape)


def select(bit: Tensor, upper: Tensor | float, lower: Tensor | float) -> Tensor:
    """`upper` where the bit is set, else `lower`: float32."""
    # A tensor, as torch.where of two Python floats has the default dtype, which is bfloat16 while transformers loads a model.
    if not isinstance(upper, Tensor):
        upper = torch.full((), upper, dtype=torch.float32, device=bit.device)
    return torch.where(bit, upper, lower)


def choose(bits: Sequence[Tensor], leaves: Sequence[float], like: Tensor) -> Tensor:
    """The leaf whose number has these bits, the most significant one first: a tree of selections, without a look at memory.

    >>> choose([torch.tensor([False, True]), torch.tensor([True, True])], [0.0, 1.0, 2.0, 3.0], torch.ones(2))
    tensor([1., 3.])
    """
    row: list[Tensor | float] = list(leaves)
    for bit in bits:
        half = len(row) // 2
        row = [select(bit, row[half + i], row[i]) for i in range(half)]
    return row[0] if isinstance(row[0], Tensor) else torch.full((), row[0], dtype=torch.float32, device=like.device)


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
    # Inductor's vectors for CPUs cannot reinterpret an integer as a float16. So exponent and mantissa are shifted to where
    # float32 has them. The exponent is then too small by 112, the difference of the two biases, which the product with 2^112
    # mends. It is exact for float16's subnormals too, which are float32 subnormals before it.
    placed = (pattern << 13) & 0x0FFFFFFF | (pattern << 16) & -(2**31)
    value = placed.view(torch.float32) * 2.0**112
    return torch.where((pattern & 0x7C00) == 0x7C00, (placed | 0x7F800000).view(torch.float32), value)


def rounded_bits(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 rounded to `dtype`: the bits of the result in the lower end of an int32, with zeros above them.  Exact."""
    if dtype == torch.float32:
        return value.view(torch.int32)
    return value.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF


# ---- several in one load --------------------------------------------------------------------------------------------


def in_pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd elements of each row as float32. Both come from one load of words, instead of two with stride two."""
    if rows.dtype == torch.float32:
        words = rows.view(torch.int64)
        return words.to(torch.int32).view(torch.float32), (words >> 32).to(torch.int32).view(torch.float32)
    words = rows.view(torch.int32)
    return widen(words, rows.dtype), widen(words >> 16, rows.dtype)


def in_lanes(rows: Tensor, blocksize: int, elements: int) -> list[Tensor]:
    """The rows dealt to lanes of `elements` neighbours each: a list with the first element of every lane, the second, and so on.

    rows: `[rows, blocks * blocksize]`. Returns `elements` tensors, float32 `[rows, blocks, blocksize / elements]`.

    >>> in_lanes(torch.arange(8.0)[None], 8, 4)
    [tensor([[[0., 4.]]]), tensor([[[1., 5.]]]), tensor([[[2., 6.]]]), tensor([[[3., 7.]]])]
    """
    return floats_of_words(words_of_lanes(rows, blocksize, elements), rows.dtype)


def words_of_lanes(rows: Tensor, blocksize: int, elements: int) -> Tensor:
    """The same lanes as words of 64 bits: int64 `[elements * itemsize / 8, rows, blocks, blocksize / elements]`."""
    sizes = {"lane": blocksize // elements, "word": elements * rows.itemsize // 8}
    return rearrange(rows.view(torch.int64), "n (b lane word) -> word n b lane", **sizes)


def halves_of_words(words: Tensor) -> list[Tensor]:
    """The lower and the upper half of each word of 64 bits: int32, in the order of memory."""
    return [half.to(torch.int32) for word in words for half in (word, word >> 32)]


def floats_of_words(words: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The floats of a dtype in words of 64 bits, in the order of memory: float32, each of the shape of a word.  Exact."""
    halves = halves_of_words(words)
    if dtype == torch.float32:
        return [half.view(torch.float32) for half in halves]
    return [widen(part, dtype) for half in halves for part in (half, half >> 16)]


def absmax_of_lanes(lanes: list[Tensor]) -> Tensor:
    """`magnitude(x).amax(-1)` over all lanes of a block.  Exact.

    Computed on the bits: of two floats without their sign, the larger one is the larger integer too.
    """
    # The patterns of NaN are those above infinity. Adding 2^23 - 1 makes just them overflow to negative integers, which lose.
    keys = [(x.view(torch.int32) & 0x7FFFFFFF) + 0x007FFFFF for x in lanes]
    while len(keys) > 1:
        keys = [torch.maximum(one, other) for one, other in zip(keys[::2], keys[1::2], strict=True)]
    key = keys[0].amax(-1)
    return torch.where(key > 2 * 0x007FFFFF, key - 0x007FFFFF, 0).view(torch.float32)
