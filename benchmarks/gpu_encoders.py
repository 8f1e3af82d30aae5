"""Encoders on an NVIDIA GPU: formulations side by side, their bits, and their share of copy bandwidth.

    python benchmarks/gpu_encoders.py [--elements 268435456] [--seconds 100] [--only four eight adam]
    python benchmarks/gpu_encoders.py --floats 0

Every variant is compared with the definition, byte for byte, on blocks that hold every threshold and its neighbours, zeros,
NaN, infinities and numbers at random. Then it is timed, over the block sizes and numbers of warps below, of which Inductor
takes the fastest; the line ends with what it timed: rows x warps, milliseconds, registers. Share: of the bandwidth of a copy,
bytes read + written; medians, timed with CUDA events.

Each variant is a process of its own, which compiles beside the others, and then waits for its turn on the GPU. Lines come in the
order in which they are done. `--floats` compares encoders with the definition for all floats, and times nothing.
"""

import argparse
import contextlib
import fcntl
import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import broadcast_tensors, register_lowering
from torch._inductor.virtualized import ops

from bnbref import blockwise, fourbit
from bnbref.blockwise import reciprocal
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, NF4, Codebook, threshold_table, value_table
from bnbref.kernels import compiler, counting, floats
from bnbref.optim import rules
from bnbref.optim import step as steps
from bnbref.optim.equation import numbers, write_down
from bnbref.selfcheck.kernels import GROUP

# ---- a primitive: one instruction of PTX ----------------------------------------------------------------------------

library = torch.library.Library("encoders", "DEF")
library.define("asm(Tensor a, Tensor b, Tensor c, str text, bool real) -> Tensor")


@torch.library.register_fake("encoders::asm", lib=library)
def _(a: Tensor, b: Tensor, c: Tensor, text: str, real: bool) -> Tensor:
    shape = torch.broadcast_shapes(a.shape, b.shape, c.shape)
    return torch.empty(shape, dtype=torch.float32 if real else torch.int32, device=a.device)


@register_lowering(torch.ops.encoders.asm.default, type_promotion_kind=None)
def _(a: Any, b: Any, c: Any, text: str, real: bool) -> Any:
    loaders = [x.make_loader() for x in broadcast_tensors(a, b, c)]
    size, dtype = broadcast_tensors(a, b, c)[0].get_size(), torch.float32 if real else torch.int32
    kind = "f" if real else "r"

    def inner(index: Any) -> Any:
        values = [load(index) for load in loaders]
        return ops.inline_asm_elementwise(
            *values, asm=text, constraints=f"={kind},{kind},{kind},{kind}", dtype=dtype, is_pure=True, pack=1
        )

    return ir.Pointwise.create(device=a.get_device(), dtype=dtype, inner_fn=inner, ranges=list(size))


def asm(text: str, a: Tensor, b: Tensor, c: Tensor, real: bool = False) -> Tensor:
    return torch.ops.encoders.asm(a, b, c, text, real)


library.define("load(Tensor table, Tensor address, Tensor index) -> Tensor")


@torch.library.register_fake("encoders::load", lib=library)
def _(table: Tensor, address: Tensor, index: Tensor) -> Tensor:
    return torch.empty(index.shape, dtype=table.dtype, device=index.device)


@torch.library.impl(library, "load", "CPU")
def _(table: Tensor, address: Tensor, index: Tensor) -> Tensor:
    return table[index]


@register_lowering(torch.ops.encoders.load.default, type_promotion_kind=None)
def _(table: Any, address: Any, index: Any) -> Any:
    loaders = [x.make_loader() for x in broadcast_tensors(address, index)]
    dtype = table.get_dtype()
    kind, bits = {torch.int64: ("l", 64), torch.int32: ("r", 32), torch.float32: ("f", 32)}[dtype]
    load = f"ld.global.nc.{'f' if kind == 'f' else 'b'}{bits}"
    text = f"{{ .reg .b64 a; mad.wide.u32 a, $2, {bits // 8}, $1; {load} $0, [a]; }}"

    def inner(at: Any) -> Any:
        values = [loader(at) for loader in loaders]
        return ops.inline_asm_elementwise(
            *values, asm=text, constraints=f"={kind},l,r", dtype=dtype, is_pure=True, pack=1
        )

    return ir.Pointwise.create(device=index.get_device(), dtype=dtype, inner_fn=inner, ranges=list(index.get_size()))


def addressed(table: Tensor) -> tuple[Tensor, Tensor]:
    return table, torch.tensor(table.data_ptr(), dtype=torch.int64, device=table.device)


def by_address(table: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
    """`table[index]` by a load in PTX: Inductor sees neither a mask nor a hint, and Triton no layout of its own for it."""
    return torch.ops.encoders.load(*table, index.to(torch.int32))


# ---- lanes ------------------------------------------------------------------------------------------------------------


def words(rows: Tensor, blocksize: int, elements: int) -> list[Tensor]:
    """The int32 words of lanes of so many 16-bit elements."""
    sizes = {"lane": blocksize // elements, "word": elements // 4}
    by_word = rearrange(rows.view(torch.int64), "n (b lane word) -> word n b lane", **sizes)
    return [half.to(torch.int32) for word in by_word for half in (word, word >> 32)]


def absmax_by_asm(halves: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Of pairs of 16-bit floats at once: the larger magnitudes, and NaN only if both are."""
    kind = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    first = f"{{ .reg .b32 a, b; abs.{kind} a, $1; abs.{kind} b, $2; max.{kind} $0, a, b; }}"
    found = [asm(first, a, b, a) for a, b in zip(halves[::2], halves[1::2], strict=True)]
    while len(found) > 1:
        found = [asm(f"max.{kind} $0, $1, $2;", a, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
    return floats.absmax_of_lanes([floats.widen(found[0], dtype), floats.widen(found[0] >> 16, dtype)])


def pack_four(codes: Sequence[Tensor]) -> Tensor:
    packed = [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    word = packed[0]
    for place, byte in enumerate(packed[1:], 1):
        word = word | byte << 8 * place
    return word


def four(
    rows: Tensor, table: Tensor, blocksize: int, elements: int, encode: Callable[..., Tensor], absmax_of: str
) -> tuple[Tensor, Tensor]:
    halves, lanes = lanes_of(rows, blocksize, elements)
    if absmax_of == "asm" and halves:
        absmax = absmax_by_asm(halves, rows.dtype)
    else:
        absmax = floats.absmax_of_lanes(lanes)
    scale = rearrange(reciprocal(absmax), "n b -> n b 1")
    codes = [encode(x * scale, table) for x in lanes]
    made = [pack_four(codes[i : i + 8]) for i in range(0, len(codes), 8)]
    if len(made) == 2:
        word = made[0].to(torch.int64) & 0xFFFFFFFF | made[1].to(torch.int64) << 32
    else:
        word = made[0].to({2: torch.uint8, 4: torch.int16, 8: torch.int32}[elements])
    return word.flatten(1).view(torch.uint8), absmax


# ---- 4 and 8 bits: the pattern's upper bits, with a whole threshold in each entry -----------------------------------


@functools.cache
def wide_table(book: Codebook, device: torch.device) -> Tensor:
    """int64 `[cells]` by the upper bits of the pattern, as few as will do; the threshold as float32 in the lower half of
    an entry, the code up to it above. NaN has the code of rank 0; one less with a sign, which is then that of a difference."""
    ts = torch.tensor(book.thresholds, dtype=torch.float32)
    for bits in range(9, 17):
        first = torch.arange(2**bits, dtype=torch.int64) << (32 - bits)
        last = first | (1 << (32 - bits)) - 1
        nan = counting.float_of(last).isnan()
        a, b = (blockwise.count_below(counting.float_of(p), ts).long() for p in (first, last))
        a = torch.where(nan, b, a)  # an infinity shares its cell with NaN
        if int((a - b).abs().max()) <= 1:
            break
    else:
        raise ValueError(book.name)
    low = torch.minimum(a, b)
    t = torch.where(nan, 0.0, torch.cat([ts, torch.full((1,), torch.inf)])[low])
    base = torch.where(nan, torch.where(first < 2**31, 0, -1), low)
    return (base << 32 | t.view(torch.int32).long() & 0xFFFFFFFF).to(device)


def code_by_wide_table(x: Tensor, table: Any, look_up: Callable[..., Tensor] = floats.look_up) -> Tensor:
    bits = bits_of(table)
    entry = look_up(table, x.view(torch.int32) >> (32 - bits) & (2**bits - 1))
    return (entry >> 32).to(torch.int32) - ((entry.to(torch.int32).view(torch.float32) - x).view(torch.int32) >> 31)


def code_by_narrow_table(x: Tensor, table: Any, code_bits: int) -> Tensor:
    """`counting.code_by_table` by address."""
    pattern, size = x.view(torch.int32), 32 - bits_of(table)
    entry = by_address(table, pattern >> size & (2 ** (32 - size) - 1))
    above = (pattern & (1 << size) - 1) > (entry & (1 << size) - 1)
    return torch.where(above, entry >> (32 - code_bits), entry >> (32 - 2 * code_bits)) & (1 << code_bits) - 1


def bits_of(table: Any) -> int:
    return int((table[0] if isinstance(table, tuple) else table).numel()).bit_length() - 1


def lanes_of(rows: Tensor, blocksize: int, elements: int) -> tuple[list[Tensor], list[Tensor]]:
    """Words of 16-bit floats, none of float32; and the elements of the lanes in float32."""
    if rows.dtype == torch.float32:
        return [], floats.in_lanes(rows, blocksize, elements)
    if elements == 2:
        return [], [rearrange(x, "n (b lane) -> n b lane", lane=blocksize // 2) for x in floats.in_pairs(rows)]
    halves = words(rows, blocksize, elements)
    return halves, [floats.widen(part, rows.dtype) for half in halves for part in (half, half >> 16)]


def eight(blocks: Tensor, encode: Callable[[Tensor], Tensor], elements: int, absmax_of: str) -> tuple[Tensor, Tensor]:
    halves, lanes = ([x.squeeze(1) for x in xs] for xs in lanes_of(blocks, blocks.shape[1], elements))
    if absmax_of == "asm" and halves:
        absmax = absmax_by_asm(halves, blocks.dtype)
    else:
        absmax = floats.absmax_of_lanes(lanes)
    scale = rearrange(reciprocal(absmax), "b -> b 1")
    codes = [encode(x * scale) for x in lanes]
    made = [a | b << 8 | c << 16 | d << 24 for a, b, c, d in zip(*[iter(codes)] * 4, strict=True)]
    word = made[0] if len(made) == 1 else made[0].to(torch.int64) & 0xFFFFFFFF | made[1].to(torch.int64) << 32
    return word.view(torch.uint8), absmax


# ---- variants -------------------------------------------------------------------------------------------------------
# Each is a function of the tensors, of tables after them; its tables; and how many elements a lane has. None: the sizes that
# Inductor tries by itself.

GPU = torch.device("cuda")
Variant = tuple[Callable[..., Any], tuple[Tensor, ...], int | None]
ENCODERS: dict[str, Callable[..., Tensor]] = {
    "int32 table": lambda x, table, bits: counting.code_by_table(x, table, bits),
    "int32 table, address": code_by_narrow_table,
    "int64 table": lambda x, table, bits: code_by_wide_table(x, table),
    "int64 table, address": lambda x, table, bits: code_by_wide_table(x, table, by_address),
}


def table_of(how: str, book: Codebook, bits: int) -> tuple[Tensor, ...]:
    table = counting.code_table(book, GPU, bits) if how.startswith("int32") else wide_table(book, GPU)
    assert table is not None
    return addressed(table) if how.endswith("address") else (table,)


def only(tables: tuple[Tensor, ...]) -> Any:
    return tables if len(tables) == 2 else tables[0]


def four_variants() -> Iterator[tuple[str, torch.dtype, Variant]]:
    for dtype, how, elements, absmax_of in (
        (torch.bfloat16, "int32 table", 4, "lanes"),
        (torch.bfloat16, "int32 table", 2, "lanes"),
        (torch.bfloat16, "int64 table", 4, "lanes"),
        (torch.bfloat16, "int64 table, address", 4, "lanes"),
        (torch.float32, "int32 table", 2, "lanes"),
        (torch.float32, "int32 table", 4, "lanes"),
    ):

        def run(
            rows: Tensor, *tables: Tensor, how: str = how, elements: int = elements, absmax_of: str = absmax_of
        ) -> Any:
            return four(rows, only(tables), 64, elements, lambda x, t: ENCODERS[how](x, t, 4), absmax_of)

        yield (
            f"four {how}, {elements} a lane, absmax {absmax_of}",
            dtype,
            (run, table_of(how, NF4, 4), elements),
        )


def eight_variants() -> Iterator[tuple[str, torch.dtype, Variant]]:
    for dtype, how, elements, absmax_of in (
        (torch.bfloat16, "int32 table", 8, "lanes"),
        (torch.bfloat16, "int32 table, address", 8, "lanes"),
        (torch.bfloat16, "int64 table, address", 8, "lanes"),
        (torch.bfloat16, "int64 table, address", 4, "lanes"),
        (torch.float32, "int32 table", 4, "lanes"),
        (torch.float32, "int32 table", 8, "lanes"),
    ):

        def run(
            rows: Tensor, *tables: Tensor, how: str = how, elements: int = elements, absmax_of: str = absmax_of
        ) -> Any:
            return eight(rows, lambda x: ENCODERS[how](x, only(tables), 8), elements, absmax_of)

        yield (
            f"eight {how}, {elements} a lane, absmax {absmax_of}",
            dtype,
            (run, table_of(how, DYNAMIC, 8), elements),
        )


RULE = rules.Adam()
NUMBERS = numbers(RULE, 1, GROUP)
EQUATION = write_down(RULE, tuple(NUMBERS))
BOOKS = (DYNAMIC, DYNAMIC_UNSIGNED)


def adam_variants() -> Iterator[tuple[str, torch.dtype, Variant]]:
    for dtype, how, decode, elements in (
        (torch.float32, "int32 table", floats.look_up, 1),
        (torch.bfloat16, "int32 table", floats.look_up, 1),
        (torch.float32, "int32 table", floats.look_up, None),
        (torch.float32, "int64 table, address", by_address, 1),
        (torch.float32, "int32 table, address", by_address, 1),
        (torch.bfloat16, "int64 table, address", by_address, 1),
        (torch.bfloat16, "int32 table", floats.look_up, None),
    ):

        def run(p: Tensor, g: Tensor, hyper: Tensor, *rest: Tensor, how: str = how, decode: Any = decode) -> Any:
            states, tables = rest[:4], rest[4:]
            each = len(tables) // 4
            by_state = [only(tables[i * each : (i + 1) * each]) for i in range(4)]
            results = steps.advance_blocks(
                p, g, hyper, None, states, EQUATION, tuple(NUMBERS),
                values=lambda i, codes: decode(by_state[i], codes),
                codes=lambda i, x: ENCODERS[how](x, by_state[2 + i], 8),
            )  # fmt: skip
            for target, result in zip((p, *states), results, strict=True):
                target.copy_(result)

        values = [value_table(b, GPU) for b in BOOKS]
        tables = [addressed(v) if decode is by_address else (v,) for v in values]
        tables += [table_of(how, b, 8) for b in BOOKS]
        name = "address" if decode is by_address else "look_up"
        own = "" if elements else ", Inductor's own sizes"
        yield f"adam {how}, values by {name}{own}", dtype, (run, tuple(t for pair in tables for t in pair), elements)


WIDTHS = {"four": 64, "eight": 256, "adam": 256}
VARIANTS = {"four": four_variants, "eight": eight_variants, "adam": adam_variants}

# ---- compilation ----------------------------------------------------------------------------------------------------

OPTIONS = {
    **compiler._GPU_OPTIONS,
    "autotune_local_cache": False,
    "autotune_remote_cache": False,
    "fx_graph_cache": False,
}
# (elements a thread, warps). Coordinate descent, an option of the door, finds the best of them too, but compiles one by one.
SIZES = [(8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (16, 8), (32, 2), (32, 4)]
ADAM_SIZES = [(4, 2), (4, 4), (4, 8), (8, 1), (8, 2), (8, 4), (16, 1), (16, 2)]


@contextlib.contextmanager
def sizes(kind: str, lane: int | None) -> Iterator[None]:
    """Inside, Inductor tries these block sizes for reductions over blocks in lanes of so many elements."""
    import torch._inductor.runtime.triton_heuristics as heuristics
    from torch._inductor.runtime.triton_compat import Config

    if lane is None:
        yield
        return

    def configs(*args: Any, **kwargs: Any) -> list[Any]:
        pairs = [(e * 32 * w // WIDTHS[kind], w) for e, w in (ADAM_SIZES if kind == "adam" else SIZES) if e >= lane]
        return [Config({"XBLOCK": rows}, num_warps=w, num_stages=1) for rows, w in pairs if rows]

    original = heuristics._persistent_reduction_configs
    heuristics._persistent_reduction_configs = configs
    try:
        yield
    finally:
        heuristics._persistent_reduction_configs = original


def compiled(function: Callable[..., Any], dynamic: Sequence[Tensor]) -> Callable[..., Any]:
    def inductor(graph: Any, example_inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, example_inputs, config_patches=OPTIONS)

    torch._dynamo.reset()
    for t in dynamic:
        torch._dynamo.mark_dynamic(t, 0)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=inductor)


TIMED: list[str] = []


def watch(at_first_run: Callable[[], None]) -> None:
    """Calls this before the first run of a compiled kernel; and notes what Inductor times, the fastest first."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    original, run, ran = CachingAutotuner.benchmark_all_configs, CachingAutotuner.run, []

    def benchmark(self: Any, *args: Any, **kwargs: Any) -> Any:
        timings = original(self, *args, **kwargs)
        for launcher, ms in sorted(timings.items(), key=lambda pair: pair[1]):
            config = launcher.config
            TIMED.append(f"{config.kwargs['XBLOCK']}x{config.num_warps}w {ms:.3f} r{launcher.n_regs}")
        return timings

    def run_in_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not ran:
            ran.append(True)
            at_first_run()
        return run(self, *args, **kwargs)

    CachingAutotuner.benchmark_all_configs = benchmark
    CachingAutotuner.run = run_in_turn


# ---- inputs and truth -----------------------------------------------------------------------------------------------


def rows_for_check(dtype: torch.dtype, width: int, book: Codebook) -> Tensor:
    """Blocks at random and blocks of everything that is special, float32 ones with every threshold and its neighbours."""
    g = torch.Generator(GPU).manual_seed(1)
    x = torch.randn(2**22 // width, width, device=GPU, generator=g)
    x = x * torch.exp2(torch.randint(-140, 120, (len(x), 1), device=GPU, generator=g).float())
    x[::7] = (x[::7] * 0 + torch.randn(x[::7].shape, device=GPU, generator=g)).pow(5)
    special = torch.tensor(
        [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, 2.0**-126, 3e38, -3e38], device=GPU
    )
    x[::11, 3] = special[torch.randint(0, 10, x[::11, 3].shape, device=GPU, generator=g)]
    x[::13] = 0.0
    x[1::501] = special[torch.randint(0, 10, x[1::501].shape, device=GPU, generator=g)]
    ts = threshold_table(book, GPU)
    near = torch.cat([ts, ts.nextafter(torch.ones_like(ts)), ts.nextafter(-torch.ones_like(ts))])
    rows = near.repeat(width // len(near) + 1 if len(near) < width else 1)
    rows = torch.cat([rows, rows.new_zeros(-len(rows) % (width - 1))]).view(-1, width - 1)
    x[2 : 2 + len(rows), 1:], x[2 : 2 + len(rows), 0] = rows, 1.0
    return x.to(dtype)


def adam_inputs(blocks: int, dtype: torch.dtype, special: bool) -> list[Tensor]:
    g = torch.Generator(GPU).manual_seed(2)
    p, grad = (torch.randn(blocks, 256, device=GPU, generator=g).to(dtype) for _ in range(2))
    codes = [
        torch.randn(blocks, 256, device=GPU, generator=g),
        torch.randn(blocks, 256, device=GPU, generator=g).square(),
    ]
    made = []
    for x, book in zip(codes, BOOKS, strict=True):
        made += [blockwise.encode(x / x.abs().amax(1, True), book), x.abs().amax(1) * 0.1]
    if special:
        for value in (torch.nan, torch.inf, -torch.inf, 1e30, 1e18, 0.0, 1e-30, -1e-42):
            at = torch.randint(0, grad.numel(), (500,), device=GPU, generator=g)
            grad.view(-1)[at] = value
        grad[3::64] = 0.0
        made[0][5::64], made[2][5::64] = 127, 0
        made[1][7::64], made[3][7::64] = 0.0, 0.0
        made[0][9::64] = torch.randint(0, 256, made[0][9::64].shape, device=GPU, generator=g).to(torch.uint8)
        made[2][9::64] = torch.randint(0, 256, made[2][9::64].shape, device=GPU, generator=g).to(torch.uint8)
        made[1][11::64] = torch.nan
    hyper = torch.tensor(list(NUMBERS.values()), dtype=torch.float32, device=GPU)
    return [p, grad, hyper, *made]


def same(a: Any, b: Any) -> bool:
    a, b = ([x] if isinstance(x, Tensor) else list(x) for x in (a, b))
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    both_nan = [x.isnan() & y.isnan() if x.is_floating_point() else None for x, y in zip(a, b, strict=True)]
    return all(
        bool(((x.view(kinds[x.itemsize]) == y.view(kinds[y.itemsize])) | (False if n is None else n)).all())
        for x, y, n in zip(a, b, both_nan, strict=True)
    )


def right(kind: str, dtype: torch.dtype, variant: Variant, run: Callable[..., Any]) -> bool:
    _, tables, _ = variant
    if kind == "adam":
        args = adam_inputs(2048, dtype, True)
        want = steps.step_blocks.definition(
            args[0], args[1], args[2], None, *args[3:], rule=EQUATION, names=tuple(NUMBERS)
        )
        run(*args, *tables)
        return same([args[0], *args[3:]], want)
    x = rows_for_check(dtype, 64 if kind == "four" else 256, NF4 if kind == "four" else DYNAMIC)
    if kind == "four":
        want = fourbit.quantize_rows.definition(x, blocksize=64, codebook=NF4)
        got = run(x, *tables)
        return same(got[0], want[0]) and same(got[1].reshape(-1), want[1].reshape(-1))
    return same(run(x, *tables), blockwise.quantize_blocks.definition(x, codebook=DYNAMIC))


CHUNK = 2**27


def all_floats(how: str, book: Codebook, bits: int) -> str:
    """An encoder against `encode` for every float32 of magnitude up to 1 + 2^-20, and every NaN."""
    table = table_of(how, book, bits)
    wrong, count = 0, 0
    run = compiled(lambda x, *t: ENCODERS[how](x, only(t), bits).to(torch.uint8), ())
    for sign in (0, -(2**31)):
        for first, last in ((0, 0x3F800008), (0x7F800001, 2**31)):
            for low in range(first, last, CHUNK):
                part = torch.arange(low, low + CHUNK, device=GPU).clamp(max=last - 1) + sign
                x = part.to(torch.int32).view(torch.float32).view(-1, 256)
                wrong += int((run(x, *table) != blockwise.encode(x, book)).sum())
                count += x.numel()
    return f"{how}, {book.name}: {wrong} of {count:,} float32 encoded otherwise"


# ---- timing ---------------------------------------------------------------------------------------------------------


def milliseconds(call: Callable[[], Any], rounds: int = 9, calls: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """GB/s, read + written."""
    source = torch.randn(2**28, device=GPU)
    target = torch.empty_like(source)
    return 8 * 2**28 / milliseconds(lambda: target.copy_(source)) / 1e6


def compare(kind: str, number: int, elements: int, turn: Path) -> str:
    """A line about a variant, which takes its turn on the GPU when it is compiled."""
    name, dtype, variant = list(VARIANTS[kind]())[number]
    function, tables, lane = variant
    if kind == "adam":
        blocks = elements // 4 // 256
        size = blocks * 256 * (3 * dtype.itemsize + 4 + 4 * 4 / 256)
        args = [torch.empty_like(x).new_empty(blocks, *x.shape[1:]) for x in adam_inputs(1, dtype, False)]
        args[2] = adam_inputs(1, dtype, False)[2]
        dynamic = [args[0], args[1], *args[3:]]
    else:
        width = WIDTHS[kind]
        size = elements * (dtype.itemsize + (0.5 if kind == "four" else 1) + 4 / width)
        args = dynamic = [torch.empty(elements // width, width, device=GPU, dtype=dtype)]
    held = turn.open("w")

    def begin() -> None:
        fcntl.flock(held, fcntl.LOCK_EX)
        filled = adam_inputs(len(args[0]), dtype, False) if kind == "adam" else [torch.randn_like(args[0])]
        for arg, values in zip(args, filled, strict=True):
            arg.copy_(values)

    watch(begin)
    try:
        with torch.no_grad(), sizes(kind, lane):
            run = compiled(function, dynamic)
            run(*args, *tables)
            ms = milliseconds(lambda: run(*args, *tables))
            result = f"{ms:.4f} ms  {size / ms / 1e6:.0f} GB/s  bits {'right' if right(kind, dtype, variant, run) else 'WRONG'}"
    except Exception as error:  # one variant that fails must not cost the others
        result = f"{type(error).__name__}: {str(error)[:300]}"
    held.close()
    return f"{str(dtype)[6:]:<9} {name:<56} {result}  {TIMED}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**28)
    parser.add_argument("--seconds", type=int, default=100)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS))
    parser.add_argument("--variant", help="only this one, as KIND:NUMBER:FILE, a file that is locked during a turn")
    parser.add_argument("--floats", type=int, help="only compare an encoder with the definition for all floats")
    args = parser.parse_args()
    torch._inductor.config.compile_threads = 1
    if args.variant is not None:
        kind, number, turn = args.variant.split(":")
        print(compare(kind, int(number), args.elements, Path(turn)))
    elif args.floats is not None:
        print(all_floats(*EXHAUSTIVE[args.floats]))
    else:
        side_by_side([(kind, i) for kind in args.only for i, _ in enumerate(VARIANTS[kind]())], args)


EXHAUSTIVE = (
    ("int32 table", DYNAMIC, 8),
    ("int32 table", DYNAMIC_UNSIGNED, 8),
    ("int32 table", NF4, 4),
    ("int64 table", NF4, 4),
)


def shares(line: str, bandwidth: float) -> str:
    return re.sub(r"(\d+) GB/s", lambda m: f"{int(m[1]) / bandwidth:.3f} of copy", line)


def side_by_side(variants: Sequence[tuple[str, int]], args: argparse.Namespace) -> None:
    """A process for each of these variants, as many at a time as there are cores, and what they print."""
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp())
    turn, waiting = folder / "turn", list(variants)
    running: dict[Path, subprocess.Popen[bytes]] = {}
    bandwidth = 0.0
    with turn.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the others import and compile meanwhile
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 2):
                kind, number = waiting.pop(0)
                path = folder / f"{kind}{number}"
                with path.open("w") as file:
                    own = ["--variant", f"{kind}:{number}:{turn}", "--elements", str(args.elements)]
                    command = [sys.executable, __file__, *own]
                    running[path] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            if not held.closed:
                bandwidth = copy_bandwidth()
                name = f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
                print(f"{name}: copy {bandwidth:.0f} GB/s", flush=True)
                torch.cuda.empty_cache()
                held.close()
            late = time.monotonic() - begun > args.seconds
            for path, process in list(running.items()):
                if late:
                    process.kill()
                if late or process.poll() is not None:
                    last = (path.read_text().splitlines() or ["nothing said"])[-1]
                    print(
                        f"{path.name:<8} {shares(last, bandwidth)[:700]}  {time.monotonic() - begun:.0f} s", flush=True
                    )
                    del running[path]
            if late:
                print("out of time; not begun:", waiting, flush=True)
                return
            time.sleep(0.1)


if __name__ == "__main__":
    main()
