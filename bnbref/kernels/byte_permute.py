"""The sum of products of 4-bit codes' values and floats, whose values NVIDIA GPUs look up by byte permute.

A look-up in memory occupies the load unit for several cycles a warp, and bounds a product with few rows. `prmt` picks four bytes
out of eight by four selectors of four bits. The lower three are the place of the byte, so that a packed word of codes is a word
of selectors; with the fourth it copies the sign of that byte to all bits.

    select = word & 0x77777777                          the lower three bits of each code
    upper  = prmt(word, word << 4, 0x9d8c)              for each of four codes a byte of its fourth bit
    bytes  = upper ? prmt(t2, t3, select) : prmt(t0, t1, select)

looks up one byte of the values of four codes; t0 to t3 are the sixteen bytes of that place, one of each value: a plane. Values of
two planes (float16) are put together by `prmt` and widened, those of four planes (float32) are put together by three.

Elsewhere the same sum is of plain look-ups.
Source of the idea: docs/content/reading.md, table "formulations".
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.kernels.taught import digest_of, expression, instructions, is_taught, operator

# 0xca: by each bit of the first operand the bit of the second or of the third one.
_PLANE = "{ .reg .b32 s, t; prmt.b32 s, $3, $4, $1; prmt.b32 t, $5, $6, $1; lop3.b32 $0, $2, t, s, 0xca; }"
# Of the lower, and of the upper four codes of a word.
_UPPER = ("prmt.b32 $0, $1, $2, 0x9d8c;", "prmt.b32 $0, $1, $2, 0xbfae;")
_PAIRS = ("prmt.b32 $0, $1, $2, 0x5140;", "prmt.b32 $0, $1, $2, 0x7362;")  # codes 0 and 1, codes 2 and 3 of four
_WORDS = ("prmt.b32 $0, $1, $2, 0x5410;", "prmt.b32 $0, $1, $2, 0x7632;")  # the lower, the upper code of a pair
_WIDEN = (
    "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }",
    "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }",
)
# The operand, of which ptxas does not know that all threads have the same: it would keep the table in registers of the warp, of
# which `prmt` takes none, and copy them before each one. The mask of a lane has one bit.
_OWN = "{ .reg .b32 m, t; mov.b32 m, %lanemask_eq; add.s32 t, m, -1; and.b32 t, t, m; or.b32 $0, $1, t; }"

_TEXT = digest_of(__name__)


def planes(values: Tensor) -> Tensor:
    """Sixteen float16 or float32 values by planes: int32 `[4 * itemsize]`. The four words of a plane hold one byte of each value.

    >>> [hex(word) for word in planes(torch.arange(16).half()).tolist()[4:]]
    ['0x42403c00', '0x47464544', '0x49494848', '0x4b4b4a4a']
    """
    return values.view(torch.uint8).view(16, -1).t().contiguous().view(torch.int32).view(-1)


def lookup8(words: Tensor, table: Tensor, place: int) -> Tensor:
    """The value of the code of element `place`, 0 to 7, of each word of packed codes: float32.  Exact.

    words: int32, eight codes in the order of memory, of two elements the first in the high nibble. table: `planes` of the values.

    >>> table = planes(torch.arange(16.0))
    >>> [lookup8(torch.tensor([0x21]), table, place).item() for place in range(3)]
    [2.0, 1.0, 0.0]
    """
    values = table.view(torch.uint8).view(-1, 16).t().contiguous()
    values = values.view(torch.float16 if values.shape[1] == 2 else torch.float32).view(16).float()
    return values[(words >> 4 * (place ^ 1) & 15).to(torch.int64)]


def dot8(words: Sequence[Tensor], columns: Sequence[Tensor], table: Tensor) -> Tensor:
    """The sum over words, and over the eight codes of each, of the value of a code times its column, in this order: float32.

    words: as in `lookup8`, all of one shape, which the result has. columns: eight for each word, float32 of the last dimensions
    of that shape. Bounded: a product and the sum before it are rounded, or fused.

    Look-ups, products and sums are one operator, because Inductor keeps a record of every operation and looks through all of them
    again and again: as a hundred look-ups of their own they took eight seconds to compile.

    >>> table = planes(torch.arange(16.0))
    >>> dot8([torch.tensor([0x21])], [torch.tensor([10.0**i]) for i in range(8)], table)
    tensor([12.])
    """
    if words[0].device.type == "cuda" and torch.compiler.is_compiling() and is_taught("dot8"):
        native: Tensor = torch.ops.bnbref.dot8(words, columns, table, _TEXT)
        return native
    return _plain(words, columns, table)


def _plain(words: Sequence[Tensor], columns: Sequence[Tensor], table: Tensor) -> Tensor:
    total = lookup8(words[0], table, 0) * columns[0]
    for i, column in enumerate(columns[1:], 1):
        total = total + lookup8(words[i // 8], table, i % 8) * column
    return total


@operator(
    "dot8(Tensor[] words, Tensor[] columns, Tensor table, str text='') -> Tensor",
    lambda words, columns, table, text="": words[0].new_empty(words[0].shape, dtype=torch.float32),
)
def _(words: Sequence[Tensor], columns: Sequence[Tensor], table: Tensor, text: str = "") -> Tensor:
    return _plain(words, columns, table)


# ---- the instructions -----------------------------------------------------------------------------------------------


def values_of(ops: Any, word: Any, table: list[Any]) -> list[Any]:
    """What `lookup8` returns for the eight places, in Inductor's operations `ops` on one element.

    table: the words of the planes, each as `per_lane` returns it.
    """

    def number(value: int) -> Any:
        return ops.constant(value, torch.int32)

    values, select, shifted = [], ops.bitwise_and(word, number(0x77777777)), ops.bitwise_left_shift(word, number(4))
    for four in range(2):
        upper = _asm(ops, _UPPER[four], word, shifted)
        select = ops.bitwise_right_shift(select, number(16)) if four else select
        found = [_asm(ops, _PLANE, select, upper, *table[i : i + 4]) for i in range(0, len(table), 4)]
        for pair in _PAIRS:
            halves = [_asm(ops, pair, *found[i : i + 2]) for i in range(0, len(found), 2)]
            for first in (True, False):  # of two elements the first is in the high nibble
                if len(halves) == 1:
                    values.append(_asm(ops, _WIDEN[first], halves[0], dtype=torch.float32))
                else:
                    values.append(ops.to_dtype_bitcast(_asm(ops, _WORDS[first], *halves), torch.float32, torch.int32))
    return values


def per_lane(ops: Any, entry: Any) -> Any:
    """A word of the table as something that each lane has of its own."""
    return _asm(ops, _OWN, entry)


def _asm(ops: Any, text: str, *operands: Any, dtype: torch.dtype = torch.int32) -> Any:
    kinds = ("f" if dtype == torch.float32 else "r") + "r" * len(operands)
    return instructions(ops, text, *operands, kinds=kinds, dtype=dtype)


@expression("dot8", torch.float32)
def _(ops: Any, words: Any, columns: Any, table: Any, text: str = "") -> Any:
    load_words, load_columns = ([x.make_loader() for x in tensors] for tensors in (words, columns))
    load_table, count = table.make_loader(), int(table.get_size()[0])
    behind = len(words[0].get_size()) - len(columns[0].get_size())

    def element(index: Any) -> Any:
        planes_of_table = [per_lane(ops, load_table([number])) for number in range(count)]
        values = [value for load in load_words for value in values_of(ops, load(index), planes_of_table)]
        columns = [load(index[behind:]) for load in load_columns]
        products = [ops.mul(value, column) for value, column in zip(values, columns, strict=True)]
        return functools.reduce(ops.add, products)

    return words[0], element
