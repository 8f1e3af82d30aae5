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
from typing import Any

import torch
from torch import Tensor

from bnbref.kernels.floats import floats_of_words, halves_of_words
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


def dot(words: Tensor, activations: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over words, and over the sixteen codes of each, of the value of a code times its activation, in order: float32.

    words: int64 `[words, ..., lanes]`. activations: int64 `[words * 2 * itemsize, lanes]`, of as many dimensions as the lanes
    have: the floats of `dtype` beside each other that these codes multiply. Returns `[..., lanes]`. Bounded: a product and the
    sum before it are rounded, or fused.

    All of it is one operator, because Inductor keeps a record of every operation and looks through all of them again and again.
    As operations of their own, a hundred look-ups took eight seconds to compile, and cutting and widening the words of a row one.

    >>> table, ones = planes(torch.arange(16.0)), torch.ones(16).view(torch.int64)[:, None]
    >>> dot(torch.tensor([[0x21]]), ones, table, torch.float32)
    tensor([3.])
    """
    if words.device.type == "cuda" and torch.compiler.is_compiling() and is_taught("dot"):
        native: Tensor = torch.ops.bnbref.dot(words, activations, table, dtype, _TEXT)
        return native
    return _plain(words, activations, table, dtype)


def _plain(words: Tensor, activations: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    halves = halves_of_words(words)
    columns = floats_of_words(activations, dtype)
    total = lookup8(halves[0], table, 0) * columns[0]
    for i, column in enumerate(columns[1:], 1):
        total = total + lookup8(halves[i // 8], table, i % 8) * column
    return total


@operator(
    "dot(Tensor words, Tensor activations, Tensor table, ScalarType dtype, str text='') -> Tensor",
    lambda words, activations, table, dtype, text="": words.new_empty(words.shape[1:], dtype=torch.float32),
)
def _(words: Tensor, activations: Tensor, table: Tensor, dtype: torch.dtype, text: str = "") -> Tensor:
    return _plain(words, activations, table, dtype)


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


def floats_of(ops: Any, word: Any, dtype: torch.dtype) -> list[Any]:
    """The floats in a word of 64 bits, widened to float32: what `floats.floats_of_words` returns, of one element."""

    def shifted(pattern: Any, operation: Any, places: int, kind: torch.dtype = torch.int32) -> Any:
        return operation(pattern, ops.constant(places, kind))

    halves = _halves(ops, word)
    if dtype == torch.float32:
        return [ops.to_dtype_bitcast(half, torch.float32, torch.int32) for half in halves]
    patterns = [p for half in halves for p in (half, shifted(half, ops.bitwise_right_shift, 16))]
    if dtype == torch.bfloat16:
        return [
            ops.to_dtype_bitcast(shifted(p, ops.bitwise_left_shift, 16), torch.float32, torch.int32) for p in patterns
        ]
    narrow = [ops.to_dtype(p, torch.int16, src_dtype=torch.int32) for p in patterns]
    wide = [ops.to_dtype_bitcast(p, dtype, torch.int16) for p in narrow]
    return [ops.to_dtype(p, torch.float32, src_dtype=dtype) for p in wide]


def _halves(ops: Any, word: Any) -> list[Any]:
    upper = ops.bitwise_right_shift(word, ops.constant(32, torch.int64))
    return [ops.to_dtype(half, torch.int32, src_dtype=torch.int64) for half in (word, upper)]


@expression("dot", torch.float32)
def _(ops: Any, words: Any, activations: Any, table: Any, dtype: torch.dtype, text: str = "") -> Any:
    load_word, load_activation, load_table = (x.make_loader() for x in (words, activations, table))
    (count, *size), (activation_words, *lanes), (entries,) = (x.get_size() for x in (words, activations, table))
    behind = len(size) - len(lanes)

    def element(index: Any) -> Any:
        planes_of_table = [per_lane(ops, load_table([number])) for number in range(int(entries))]
        halves = [half for i in range(int(count)) for half in _halves(ops, load_word([i, *index]))]
        values = [value for half in halves for value in values_of(ops, half, planes_of_table)]
        given = [load_activation([i, *index[behind:]]) for i in range(int(activation_words))]
        columns = [x for word in given for x in floats_of(ops, word, dtype)]
        products = [ops.mul(value, column) for value, column in zip(values, columns, strict=True)]
        return functools.reduce(ops.add, products)

    return words, size, element
