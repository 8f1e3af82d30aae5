"""Products with 4-bit codes on NVIDIA GPUs: sixteen codes looked up by byte permute, and multiplied.

A look-up in memory occupies the load unit for several cycles a warp, and bounds a product with few rows. `prmt` picks four bytes
out of eight by four selectors of four bits. The lower three are the place of the byte, so that a packed word of codes is a word
of selectors; with the fourth it copies the sign of that byte to all bits.

    select = word & 0x77777777                          the lower three bits of each code
    upper  = prmt(word, word << 4, 0x9d8c)              for each of four codes a byte of its fourth bit
    bytes  = upper ? prmt(t2, t3, select) : prmt(t0, t1, select)

looks up one byte of the values of four codes; t0 to t3 are the sixteen bytes of that place, one of each value: a plane. The bytes
of two planes (float16), or of four (float32), are put together by `prmt`.

Elsewhere (a CPU, another maker's GPU, a torch whose internals look different) the same operator is a plain look-up.
Source of the idea: docs/content/reading.md, table "formulations".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from bnbref.kernels.compiler import taught
from bnbref.kernels.floats import widened

CODES = 16
"""Of a word of 64 bits."""

# Four codes of a word: from which half of it, and by what shift and what selectors of their fourth bits.
_FOURS = (
    ("a", "", "0x9d8c"),
    ("a", "shr.b32 s, s, 16;", "0xbfae"),
    ("b", "", "0x9d8c"),
    ("b", "shr.b32 s, s, 16;", "0xbfae"),
)
# 0xca: by each bit of the first operand the bit of the second or of the third one.
_BYTES = (
    "{{ .reg .b32 a, b, s, u, p, q; mov.b64 {{a, b}}, $1; and.b32 s, {half}, 0x77777777; {shift} shl.b32 u, {half}, 4; "
    "prmt.b32 u, {half}, u, {upper}; prmt.b32 p, $2, $3, s; prmt.b32 q, $4, $5, s; lop3.b32 $0, u, q, p, 0xca; }}"
)
_PAIRS = (
    "prmt.b32 $0, $1, $2, 0x5140;",
    "prmt.b32 $0, $1, $2, 0x7362;",
)  # of the bytes of four codes: codes 0 and 1, 2 and 3
_WORDS = ("prmt.b32 $0, $1, $2, 0x7632;", "prmt.b32 $0, $1, $2, 0x5410;")  # the upper, the lower code of a pair
# The operand, of which ptxas does not know that all threads have the same: it would keep the table in registers of the warp, of
# which `prmt` takes none, and copy them before each one. The mask of a lane has one bit.
_OWN = "{ .reg .b32 m, t; mov.b32 m, %lanemask_eq; add.s32 t, m, -1; and.b32 t, t, m; or.b32 $0, $1, t; }"

_native: bool | None = None  # what `_enable` found: None before it was called

_operators = library.Library("bnbref", "FRAGMENT")
_operators.define(
    "dot16(Tensor[] words, Tensor[] columns, Tensor table, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def planes(values: Tensor) -> Tensor:
    """Sixteen float16 or float32 values by planes: int32 `[4 * itemsize]`. The four words of a plane hold one byte of each value.

    >>> [hex(word) for word in planes(torch.arange(16).half()).tolist()[4:]]
    ['0x42403c00', '0x47464544', '0x49494848', '0x4b4b4a4a']
    """
    return values.view(torch.uint8).view(16, -1).t().contiguous().view(torch.int32).view(-1)


def lookup16(word: Tensor, table: Tensor) -> list[Tensor]:
    """The values of the sixteen codes of each word, in the order of the elements: float32.  Exact.

    word: int64; of two elements of a byte the first is in the high nibble. table: `planes` of the values, float16 or float32.

    >>> table = planes(torch.arange(16.0))
    >>> [value.item() for value in lookup16(torch.tensor([0x4321]), table)[:4]]
    [2.0, 1.0, 4.0, 3.0]
    """
    values = table.view(torch.uint8).view(-1, 16).t().contiguous()
    values = values.view(torch.float16 if values.shape[1] == 2 else torch.float32).view(16).float()
    return [values[word >> 4 * (place ^ 1) & 15] for place in range(CODES)]


def dot16(words: Sequence[Tensor], columns: Sequence[Tensor], table: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over words, and over the sixteen codes of each, of the value of a code times its column, in this order: float32.

    words: as in `lookup16`, all of one shape, which the result has. columns: sixteen floats of `dtype` for each word, packed into
    int64 of the last dimensions of that shape: four for a word of codes, or eight if they are float32. Bounded: a product and the
    sum before it are rounded, or fused.

    Look-ups, products and sums are one operator, because of each operation that is not Inductor keeps a record, and counts it
    again and again: several hundred took it eight seconds.

    >>> table = planes(torch.arange(16.0))
    >>> columns = torch.tensor([1.0, 100.0] + 14 * [0.0]).view(torch.int64).unbind()
    >>> dot16([torch.tensor(0x21)], columns, table, torch.float32)
    tensor(102.)
    """
    if words[0].device.type == "cuda" and torch.compiler.is_compiling() and _enable():
        native: Tensor = torch.ops.bnbref.dot16(words, columns, table, dtype)
        return native
    return _plain(words, columns, table, dtype)


def _plain(words: Sequence[Tensor], columns: Sequence[Tensor], table: Tensor, dtype: torch.dtype) -> Tensor:
    values = [value for word in words for value in lookup16(word, table)]
    total, *products = (value * column for value, column in zip(values, widened(columns, dtype), strict=True))
    for product in products:
        total = total + product
    return total


@library.impl(_operators, "dot16", "CompositeExplicitAutograd")
def _(words: Sequence[Tensor], columns: Sequence[Tensor], table: Tensor, dtype: torch.dtype) -> Tensor:
    return _plain(words, columns, table, dtype)


@library.register_fake("bnbref::dot16", lib=_operators)  # type: ignore[untyped-decorator]
def _(words: Sequence[Tensor], columns: Sequence[Tensor], table: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(words[0].shape, dtype=torch.float32, device=words[0].device)


# ---- the instructions -----------------------------------------------------------------------------------------------


def values_of(ops: Any, word: Any, table: list[Any]) -> list[Any]:
    """What `lookup16` returns for a word, in Inductor's operations `ops` on one element: eight words of two float16, of which the
    first is the upper one, or the bits of sixteen float32.

    table: the words of the planes, each as `own` returns it.
    """
    values = []
    for half, shift, upper in _FOURS:
        text = _BYTES.format(half=half, shift=shift, upper=upper)
        found = [_asm(ops, text, "l" + 4 * "r", word, *table[i : i + 4]) for i in range(0, len(table), 4)]
        for pair in _PAIRS:
            halves = [_asm(ops, pair, "rr", *found[i : i + 2]) for i in range(0, len(found), 2)]
            values += halves if len(halves) == 1 else [_asm(ops, text, "rr", *halves) for text in _WORDS]
    return values


def added(ops: Any, total: Any, values: list[Any], columns: Sequence[Any], dtype: torch.dtype) -> Any:
    """`total` plus the sum of the products of `values_of` a word and the columns, one after the other, fused."""
    first = 2 + len(values)
    lines = [".reg .b16 l, h;", ".reg .b32 c, d, t;", ".reg .f32 v, x, s;", "mov.f32 s, $1;"]
    for element in range(CODES):
        each = 64 // (8 * dtype.itemsize)
        if element % each == 0:
            lines.append(f"mov.b64 {{c, d}}, ${first + element // each};")
        half, upper = "cd"[element * dtype.itemsize // 4 % 2], element % 2 == 1
        if len(values) == CODES:
            lines.append(f"mov.b32 v, ${2 + element};")
        else:
            lines.append(f"mov.b32 {{l, h}}, ${2 + element // 2}; cvt.f32.f16 v, {'l' if upper else 'h'};")
        if dtype == torch.float32:
            lines.append(f"mov.b32 x, {half};")
        elif dtype == torch.float16:
            lines.append(f"mov.b32 {{l, h}}, {half}; cvt.f32.f16 x, {'h' if upper else 'l'};")
        else:
            lines.append(f"and.b32 t, {half}, 0xffff0000;" if upper else f"shl.b32 t, {half}, 16;")
            lines.append("mov.b32 x, t;")
        lines.append("fma.rn.f32 s, v, x, s;")
    text = "{ " + " ".join([*lines, "mov.f32 $0, s;"]) + " }"
    kinds = "f" + len(values) * "r" + len(columns) * "l"
    return _asm(ops, text, kinds, total, *values, *columns, dtype=torch.float32)


def own(ops: Any, entry: Any) -> Any:
    """A word of the table as something that each lane has of its own."""
    return _asm(ops, _OWN, "r", entry)


def _asm(ops: Any, text: str, kinds: str, *operands: Any, dtype: torch.dtype = torch.int32) -> Any:
    """Instructions on one element. kinds: r, l or f for each operand, an int32, int64 or float32."""
    constraints = ",".join(["=f" if dtype == torch.float32 else "=r", *kinds])
    return ops.inline_asm_elementwise(*operands, asm=text, constraints=constraints, dtype=dtype, is_pure=True, pack=1)


# ---- teaching Inductor ----------------------------------------------------------------------------------------------


def _enable() -> bool:
    """Registers the lowering with Inductor, once per process; False where it cannot be, and then a plain look-up is compiled."""
    global _native
    if _native is None:
        _native = taught(_register)
    return _native


# As torch.compiler.assume_constant_result does, without importing torch._dynamo.
_enable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register() -> None:
    from torch._inductor import ir
    from torch._inductor import lowering as lowerings
    from torch._inductor.ops_handler import OpsHandler
    from torch._inductor.virtualized import ops

    for owner, name in ((ir, "Pointwise"), (lowerings, "register_lowering"), (OpsHandler, "inline_asm_elementwise")):
        getattr(owner, name)

    @lowerings.register_lowering(torch.ops.bnbref.dot16.default, type_promotion_kind=None)
    def _(words: Any, columns: Any, table: Any, dtype: torch.dtype) -> Any:
        load_words, load_columns = ([x.make_loader() for x in tensors] for tensors in (words, columns))
        load_table, count, each = table.make_loader(), int(table.get_size()[0]), len(columns) // len(words)
        behind = len(words[0].get_size()) - len(columns[0].get_size())

        def inner(index: Any) -> Any:
            planes_of_table = [own(ops, load_table([number])) for number in range(count)]
            total = ops.constant(0.0, torch.float32)
            for i, load in enumerate(load_words):
                values = values_of(ops, load(index), planes_of_table)
                of_word = [load(index[behind:]) for load in load_columns[i * each : (i + 1) * each]]
                total = added(ops, total, values, of_word, dtype)
            return total

        return ir.Pointwise.create(
            device=words[0].get_device(), dtype=torch.float32, inner_fn=inner, ranges=list(words[0].get_size())
        )
