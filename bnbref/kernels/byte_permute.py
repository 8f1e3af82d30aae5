"""Eight values of sixteen looked up for a word of eight 4-bit codes, by the byte permute of NVIDIA GPUs.

A look-up in memory occupies the load unit for several cycles a warp, and bounds a product with few rows. `prmt` picks four bytes
out of eight by four selectors of four bits, of which the lower three count: a packed word of codes is a word of selectors.

    select = word & 0x77777777                                 the lower three bits of each code
    half   = (word >> 1) & 0x44444444 | 0x32103210             for byte i: from the lower or from the upper half of the table
    bytes  = prmt(prmt(t0, t1, select), prmt(t2, t3, select), half)

looks up one byte of the values of four codes; t0 to t3 are the sixteen bytes of that place, one of each value: a plane. Values of
two planes (float16) are put together by `prmt` and widened, those of four planes (float32) are put together by three.

Elsewhere (a CPU, another maker's GPU, a torch whose internals look different) the same operator is a plain look-up.
Source of the idea: docs/content/reading.md, table "formulations".
"""

from typing import Any

import torch
from torch import Tensor, library

from bnbref.kernels.compiler import taught

_PLANE = "{ .reg .b32 s, t; prmt.b32 s, $3, $4, $1; prmt.b32 t, $5, $6, $1; prmt.b32 $0, s, t, $2; }"
_PAIRS = ("prmt.b32 $0, $1, $2, 0x5140;", "prmt.b32 $0, $1, $2, 0x7362;")  # codes 0 and 1, codes 2 and 3 of four
_WORDS = ("prmt.b32 $0, $1, $2, 0x5410;", "prmt.b32 $0, $1, $2, 0x7632;")  # the lower, the upper code of a pair
_WIDEN = (
    "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }",
    "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }",
)

_native: bool | None = None  # what `_enable` found: None before it was called

_operators = library.Library("bnbref", "FRAGMENT")
_operators.define("lookup8(Tensor words, Tensor table, int place) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


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
    if words.device.type == "cuda" and torch.compiler.is_compiling() and _enable():
        native: Tensor = torch.ops.bnbref.lookup8(words, table, place)
        return native
    return _plain(words, table, place)


def _shift(place: int) -> int:
    return 4 * (place ^ 1)


def _plain(words: Tensor, table: Tensor, place: int) -> Tensor:
    values = table.view(torch.uint8).view(-1, 16).t().contiguous()
    values = values.view(torch.float16 if values.shape[1] == 2 else torch.float32).view(16).float()
    return values[(words >> _shift(place) & 15).to(torch.int64)]


@library.impl(_operators, "lookup8", "CompositeExplicitAutograd")
def _(words: Tensor, table: Tensor, place: int) -> Tensor:
    return _plain(words, table, place)


@library.register_fake("bnbref::lookup8", lib=_operators)  # type: ignore[untyped-decorator]
def _(words: Tensor, table: Tensor, place: int) -> Tensor:
    return torch.empty(words.shape, dtype=torch.float32, device=words.device)


# ---- the instructions -----------------------------------------------------------------------------------------------


def value_of(ops: Any, word: Any, table: list[Any], place: int) -> Any:
    """What `lookup8` returns, in Inductor's operations `ops` on one element. What is the same for several places is written the
    same, and Inductor computes it once."""

    def number(value: int) -> Any:
        return ops.constant(value, torch.int32)

    def asm(text: str, *operands: Any, dtype: torch.dtype = torch.int32) -> Any:
        constraints = ("=f" if dtype == torch.float32 else "=r") + ",r" * len(operands)
        return ops.inline_asm_elementwise(
            *operands, asm=text, constraints=constraints, dtype=dtype, is_pure=True, pack=1
        )

    select = ops.bitwise_and(word, number(0x77777777))
    half = ops.bitwise_and(ops.bitwise_right_shift(word, number(1)), number(0x44444444))
    half = ops.bitwise_or(half, number(0x32103210))
    if place >= 4:
        select, half = (ops.bitwise_right_shift(x, number(16)) for x in (select, half))
    found = [asm(_PLANE, select, half, *table[i : i + 4]) for i in range(0, len(table), 4)]
    pair, upper = _PAIRS[place % 4 // 2], place % 2 == 0  # of two elements the first is in the high nibble
    halves = [asm(pair, *found[i : i + 2]) for i in range(0, len(found), 2)]
    if len(halves) == 1:
        return asm(_WIDEN[upper], halves[0], dtype=torch.float32)
    return ops.to_dtype_bitcast(asm(_WORDS[upper], *halves), torch.float32, torch.int32)


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

    @lowerings.register_lowering(torch.ops.bnbref.lookup8.default, type_promotion_kind=None)
    def _(words: Any, table: Any, place: int) -> Any:
        load_word, load_table = words.make_loader(), table.make_loader()
        count = int(table.get_size()[0])

        def inner(index: Any) -> Any:
            return value_of(ops, load_word(index), [load_table([number]) for number in range(count)], place)

        return ir.Pointwise.create(
            device=words.get_device(), dtype=torch.float32, inner_fn=inner, ranges=list(words.get_size())
        )
