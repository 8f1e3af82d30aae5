"""Floats that find trouble, and for every registered kernel the inputs that do.

A threshold is wrong by an ulp, if at all: so the points are each threshold and each value of a codebook with the two
floats beside it, times a scale. A block's scale is where float32 ends (2^-126, 2^126, infinity) as often as not.

A kernel's entry in `KERNELS` has a strategy for each variant that the proofs compile. Each costs a compilation of some
seconds, so there is one for each path through a kernel, and no more; other combinations run uncompiled.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from conftest import pasted
from einops import rearrange
from hypothesis import strategies as st
from torch import Tensor

from bnbref.codebooks import AF4, DYNAMIC, DYNAMIC_UNSIGNED, FP4, NF4, Codebook, linear, value_table
from bnbref.fourbit import row_blocks
from bnbref.optim import rules
from bnbref.optim.equation import write_down

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")

np.seterr(all="ignore")  # infinities and NaN are made on purpose


# ---- floats ---------------------------------------------------------------------------------------------------------


def neighbours(values: Sequence[float]) -> np.ndarray:
    """Each float32 and the two beside it."""
    table = np.asarray(values, dtype=np.float32)
    inf = np.float32(np.inf)
    return np.concatenate([table, np.nextafter(table, inf), np.nextafter(table, -inf)])


_EDGES = neighbours([0.0, 2.0**-133, 2.0**-126, 2.0**-121, 2.0**-24, 1.0, 127.0, 65504.0, 65520.0, 2.0**126, 2.0**127])
_LARGEST = float(np.finfo(np.float32).max)

# Signed zeros, subnormals, where a reciprocal stops being a number, where float16 does, where float32 does.
SPECIAL: tuple[float, ...] = (*_EDGES.tolist(), *(-_EDGES).tolist(), _LARGEST, -_LARGEST, np.inf, -np.inf, np.nan)

# Scales: powers of two leave a threshold exactly where it is; in a block of absmax 3.7727535 a division by absmax has
# other codes than the product with its reciprocal; 127 / 1.4554425 and 127 * (1 / 1.4554425) are two floats.
_BELOW_NORMAL = float(np.nextafter(np.float32(2.0**-126), np.float32(0)))
SCALES: tuple[float, ...] = (0.0, 2.0**-149, 2.0**-127, _BELOW_NORMAL, 2.0**-126, 2.0**-121, 1.0, 1.0, 1.0, 2.0, 0.25, 1 / 3,
                             1.4554425477981567, 3.7727534770965576, 2.0**126, 2.0**127, _LARGEST)  # fmt: skip


def scales() -> st.SearchStrategy[float]:
    """The largest magnitude of a block."""
    return st.sampled_from(SCALES) | st.floats(2.0**-126, _LARGEST, width=32)


def any_float() -> st.SearchStrategy[float]:
    """Any float32; often a special one."""
    return st.sampled_from(SPECIAL) | st.floats(width=32)


@functools.cache
def points(codebook: Codebook) -> np.ndarray:
    """Each threshold and each value of a codebook with the two floats beside it."""
    table = neighbours(codebook.thresholds + codebook.values)
    return np.concatenate([table, -table]) if codebook.sign_bit else table


@st.composite
def block(draw: st.DrawFn, codebook: Codebook, blocksize: int) -> np.ndarray:
    """A block of points times a scale, the scale itself among them, and at times a few floats from anywhere."""
    table = points(codebook)
    scale = np.float32(draw(scales()))
    out = np.resize(np.roll(table, -draw(st.integers(0, len(table) - 1))), blocksize) * scale
    kind = draw(st.sampled_from(["points", "points", "points", "strangers", "zeros", "constant"]))
    if kind == "strangers":
        strangers = draw(st.lists(any_float(), min_size=1, max_size=6))[:blocksize]
        out[: len(strangers)] = strangers
    elif kind == "zeros":
        out = np.where(out < 0, np.float32(-0.0), np.float32(0.0))
    elif kind == "constant":
        out[:] = draw(any_float())
    if kind in ("points", "strangers"):
        out[draw(st.integers(0, blocksize - 1))] = scale if draw(st.booleans()) else -scale
    return out.astype(np.float32)


@st.composite
def flat(
    draw: st.DrawFn, codebook: Codebook, blocksize: int, dtype: torch.dtype, blocks: st.SearchStrategy[int]
) -> Tensor:
    """Whole blocks in a row, rounded to a dtype."""
    parts = [draw(block(codebook, blocksize)) for _ in range(draw(blocks))]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts])).to(dtype)


# ---- tensors as callers have them -----------------------------------------------------------------------------------

LAYOUTS = ("plain", "offset", "strided", "transposed", "expanded", "parameter")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor with the elements of a flat one in row-major order (of its first one, expanded), in some layout."""
    n = x.numel()
    if layout == "offset":  # begins inside a 64-bit word
        return torch.cat([x.new_zeros(3), x])[3:]
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, 1)], dim=1)[:, 0]
    if layout == "transposed":
        rows = next((r for r in (3, 2, 5, 7) if n % r == 0), 1)
        return x.view(rows, n // rows).t().contiguous().t() if n else x.view(0, 3).t().contiguous().t()
    if layout == "expanded":
        return x[:1].expand(n) if n < 6 or n % 2 else x[:1].expand(2, n // 2)
    if layout == "parameter":
        return torch.nn.Parameter(x) if x.is_floating_point() else x
    return x


@st.composite
def tensors(draw: st.DrawFn, codebook: Codebook, blocksize: int, dtype: torch.dtype) -> Tensor:
    """0 to 3 blocks and a tail of any length, in any layout; a single element may be 0-dimensional."""
    whole = draw(flat(codebook, blocksize, dtype, st.integers(0, 4)))
    numel = draw(st.integers(0, whole.numel()) | st.sampled_from([0, 1, blocksize, blocksize + 1]))
    x = whole[: min(numel, whole.numel())].clone()
    if x.numel() == 1 and draw(st.booleans()):
        return x.view(())
    return laid_out(x, draw(st.sampled_from(LAYOUTS)))


# ---- kernels --------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """The arguments of one call of a kernel; printed so that they can be pasted back."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    bound: Callable[[], Any] | None = None
    """For a kernel that adds up floats: the largest |compiled - definition| allowed, element by element."""

    def __repr__(self) -> str:
        constants = [f"{key}={getattr(value, 'name', value)!r}" for key, value in self.kwargs.items()]
        return f"Case({', '.join([*map(pasted, self.args), *constants])})"


Blocks = st.SearchStrategy[int]
# Direct calls have at least two rows, as `in_rows` gives them; 0 and 1 are tested on the functions for any shape.
MANY: Blocks = st.integers(2, 5)

Variant = Callable[[Blocks], st.SearchStrategy[Case]]


def _some_floats(dtype: torch.dtype, count: int) -> st.SearchStrategy[Tensor]:
    few = st.lists(any_float() | scales(), min_size=1, max_size=12)
    return few.map(lambda drawn: torch.from_numpy(np.resize(np.array(drawn, np.float32), count)).to(dtype))


def _some_integers(dtype: torch.dtype, count: int) -> st.SearchStrategy[Tensor]:
    info = torch.iinfo(dtype)
    edges = (0, 1, -1, 127, -127, -128, 2**24, 2**24 + 1, -(2**24) - 1, info.min, info.max)
    edges = [n for n in edges if info.min <= n <= info.max]
    few = st.lists(st.sampled_from(edges) | st.integers(info.min, info.max), min_size=1, max_size=40)
    return few.map(lambda drawn: torch.from_numpy(np.resize(np.array(drawn, np.int64), count)).to(dtype))


def _quantize_rows(dtype: torch.dtype, codebook: Codebook, blocksize: int) -> Variant:
    blocks = row_blocks(blocksize)

    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        n = draw(rows)
        x = draw(flat(codebook, blocksize, dtype, st.just(n * blocks)))
        return Case((x.view(n, blocks * blocksize),), {"blocksize": blocksize, "codebook": codebook})

    return cases


def _dequantize_rows(dtype: torch.dtype, codebook: Codebook, blocksize: int) -> Variant:
    blocks = row_blocks(blocksize)

    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        n = draw(rows)
        packed = draw(_some_integers(torch.uint8, n * blocks * blocksize // 2)).view(n, -1)
        absmax = draw(_some_floats(F32, n * blocks)).view(n, blocks)
        return Case((packed, absmax), {"blocksize": blocksize, "codebook": codebook, "dtype": dtype})

    return cases


def _quantize_blocks(dtype: torch.dtype, codebook: Codebook, blocksize: int) -> Variant:
    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        n = draw(rows)
        x = draw(flat(codebook, blocksize, dtype, st.just(n))).view(n, blocksize)
        return Case((x,), {"codebook": codebook})

    return cases


def _dequantize_blocks(dtype: torch.dtype, codebook: Codebook, blocksize: int) -> Variant:
    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        n = draw(rows)
        codes = draw(_some_integers(torch.uint8, n * blocksize)).view(n, blocksize)
        return Case((codes, draw(_some_floats(F32, n)), value_table(codebook, CPU)), {"dtype": dtype})

    return cases


@st.composite
def _dequantize_nested(draw: st.DrawFn, rows: Blocks) -> Case:
    n = draw(rows)
    codes = draw(_some_integers(torch.uint8, n * 256)).view(n, 256)
    offset = draw(_some_floats(F32, 1)).view(())
    return Case((codes, draw(_some_floats(F32, n)), value_table(DYNAMIC, CPU), offset))


def half_steps(scale: np.float32) -> np.ndarray:
    """The ties of int8 where they lie for a factor rounded once, 127 / absmax, or twice, and the floats beside them."""
    halves = np.arange(-127, 128, dtype=np.float32) + np.float32(0.5)
    once, twice = np.float32(127) / scale, np.float32(127) * (np.float32(1) / scale)
    return neighbours([*(halves / once), *(halves / twice), *((halves / 127) * scale)])


@st.composite
def int8_rows(draw: st.DrawFn, dtype: torch.dtype, threshold: float, rows: Blocks, columns: Blocks) -> Tensor:
    """`[rows, columns]`: ties, the threshold and the floats beside it, rows of zeros, of outliers, NaN and infinities."""
    n, k = draw(rows), draw(columns)
    out = []
    for _ in range(n):
        scale = np.float32(draw(scales()))
        table = half_steps(scale)
        row = np.resize(np.roll(table, -draw(st.integers(0, len(table) - 1))), k)
        kind = draw(st.sampled_from(["ties", "ties", "strangers", "zeros", "outliers"]))
        if kind == "strangers":
            edges = [t for t in neighbours([threshold]).tolist() if threshold > 0]
            drawn = draw(
                st.lists(any_float() | st.sampled_from([*edges, *(-t for t in edges), 1.0]), min_size=1, max_size=8)
            )
            row[: len(drawn)] = drawn[:k]
        elif kind == "zeros":
            row[:] = -0.0
        elif kind == "outliers":
            row[:] = threshold * 3
        elif k:
            row[draw(st.integers(0, k - 1))] = scale
        out.append(row)
    return torch.from_numpy(np.array(out, dtype=np.float32).reshape(n, k)).to(dtype)


def _quantize_int8_rows(dtype: torch.dtype, threshold: float, propagate_nan: bool) -> Variant:
    def cases(rows: Blocks) -> st.SearchStrategy[Case]:
        columns, constants = rows.map(lambda n: 19 * n), {"threshold": threshold, "propagate_nan": propagate_nan}
        return int8_rows(dtype, threshold, rows, columns).map(lambda x: Case((x,), constants))

    return cases


def _dequantize_int8_product(dtype: torch.dtype, bias: torch.dtype | None, outliers: torch.dtype | None) -> Variant:
    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        m, n = draw(rows), draw(rows) * 9
        product = draw(_some_integers(torch.int32, m * n)).view(m, n)
        addend = None if bias is None else draw(_some_floats(bias, n))
        outlier = None if outliers is None else draw(_some_floats(outliers, m * n)).view(m, n)
        return Case(
            (product, draw(_some_floats(F32, m)), draw(_some_floats(F32, n)), addend, outlier), {"dtype": dtype}
        )

    return cases


def _dequantize_int8_rows(dtype: torch.dtype) -> Variant:
    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        m, n = draw(rows), draw(rows) * 9
        return Case((draw(_some_integers(torch.int8, m * n)).view(m, n), draw(_some_floats(F32, m))), {"dtype": dtype})

    return cases


def _multiply_rows(dtype: torch.dtype, codebook: Codebook, blocksize: int, m: int, nested: bool, p: int) -> Variant:
    """Finite, and far from overflow: what is bounded is a sum, and its bound is relative to the sum of magnitudes.

    p: 2 as CPUs take activations, in float32, and 1 as GPUs do.
    """
    blocks, blocksize2 = 3, 2
    k = blocks * blocksize

    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        n = 2 * draw(rows)
        entry = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-3, 4097.0]) | st.floats(-1024, 1024, width=32)
        few = st.lists(entry, min_size=1, max_size=40)
        a = torch.from_numpy(np.resize(np.array(draw(few), np.float32), m * k)).to(dtype).view(m, p, k // p)
        a = a.float() if p == 2 else a
        packed = draw(_some_integers(torch.uint8, n * k // 2)).view(n, k // 2)
        entry = st.sampled_from([0.0, 2.0**-126, 1.0]) | st.floats(2.0**-20, 2.0**20, width=32)
        size = st.lists(entry, min_size=1, max_size=9)
        count = n * blocks // blocksize2 if nested else n * blocks
        absmax = torch.from_numpy(np.resize(np.array(draw(size), np.float32), count))
        second: tuple[Tensor | None, ...] = (None, None, None)
        scales = absmax
        if nested:
            codes, values, offset = (
                draw(_some_integers(torch.uint8, n * blocks)),
                value_table(DYNAMIC, CPU),
                torch.tensor(0.5),
            )
            scales = values[codes.long()] * absmax.repeat_interleave(blocksize2) + offset
            absmax, second = codes, (absmax, values, offset)
        bias = (
            torch.from_numpy(np.resize(np.array(draw(few), np.float32), n)).to(dtype) if draw(st.booleans()) else None
        )

        def bound() -> Tensor:
            # Two sums of k products and a bias. A product is of a value, an activation and a scale, whose four roundings and the
            # k + 1 of the sum are to u = 2^-24, in some order: each is within 1.01 (k + 5) u S of the exact one, S the sum of the
            # magnitudes, in which a nested scale counts with those of its two terms; a product below 2^-126 may lose 2^-150 times
            # what it is multiplied by. A GPU has the values as float16 where a has 16 bits: 2^-11 S, and 2^-25 for the least of
            # them. Then each is rounded to dtype, unit roundoff v: v times its magnitude, at most 1.01 S, or half of the least
            # subnormal.
            codes = torch.stack((packed >> 4, packed & 15), -1).view(n, blocks, blocksize).long()
            magnitude = scales.abs() if not nested else scales.abs() + 2 * 0.5
            value = value_table(codebook, CPU)[codes].abs().double()
            size = (value * magnitude.double().view(n, blocks, 1)).view(n, k)
            columns = rearrange(a.double().abs(), "m p l -> m (l p)")
            total = columns @ size.t() + (0 if bias is None else bias.double().abs())
            finfo = torch.finfo(dtype)
            v, w = (0.0, 0.0) if dtype == F32 else (1.01 * finfo.eps / 2, 1.01 * 2.0**-11)
            least = 2.0**-150 + (2.0**-25 if w else 0.0)
            lost = columns @ magnitude.double().view(n, blocks, 1).expand(-1, -1, blocksize).reshape(n, k).t()
            lost = least * lost + k * 2.0**-150
            whole = 2 * ((1.01 * (k + 5) * 2.0**-24 + v + w) * total + lost + finfo.smallest_normal * finfo.eps)
            return rearrange(whole, "m n -> m 1 n")

        words = packed if p == 2 else packed.view(torch.int32)
        constants = {"blocksize": blocksize, "blocksize2": blocksize2, "codebook": codebook, "dtype": dtype}
        return Case((a, words, absmax.view(n, blocks), bias, *second), constants, bound)

    return cases


def _multiply_int8_row(dtype: torch.dtype, outliers: bool) -> Variant:
    k = 40

    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        n = draw(rows)
        q, codes = draw(_some_integers(torch.int8, k)).view(1, k), draw(_some_integers(torch.int8, n * k)).view(n, k)
        row, column = draw(_some_floats(F32, 1)), draw(_some_floats(F32, n))
        bias = draw(_some_floats(dtype, n)) if draw(st.booleans()) else None
        if not outliers:
            return Case((q, row, codes, column, bias), {"dtype": dtype})
        row, column, bias = torch.ones(1), torch.full((n,), 127.0), None
        a = draw(_some_integers(torch.int8, k)).to(dtype).view(1, k)
        columns = draw(_some_integers(torch.uint8, k)).view(k) > 127

        def bound() -> Tensor:
            # The sums of integers are exact in any order. What is left are four roundings of each part and the last one.
            part = (codes.double() @ torch.where(columns, a[0].double(), 0)).abs() + (
                codes.double() @ q[0].double()
            ).abs()
            finfo = torch.finfo(dtype)
            v = 0.0 if dtype == F32 else finfo.eps / 2
            return (2 * 1.01 * (5 * 2.0**-24 + v) * part + finfo.smallest_normal * finfo.eps)[None]

        return Case((q, row, codes, column, bias, a, columns), {"dtype": dtype}, bound)

    return cases


GROUP = {
    "lr": 1e-2,
    "betas": (0.9, 0.95, 0.999),
    "eps": 1e-7,
    "weight_decay": 0.1,
    "alpha": 3.0,
    "t_alpha": 7,
    "t_beta3": 9,
}


RULES: tuple[rules.Rule, ...] = tuple(rules.RULES.values())


@st.composite
def _step_inputs(draw: st.DrawFn, rule: rules.Rule, dtype: torch.dtype, count: int) -> tuple[Any, ...]:
    """Parameter, gradient and coefficients; gradients of every size, zeros, NaN and infinities among them."""
    c = rule.coefficients(
        draw(st.sampled_from([1, 2, 10, 1000])), {**GROUP, "lr": draw(st.sampled_from([0.0, 1e-3, 2.0]))}
    )
    p = draw(_some_floats(dtype, count))
    p = torch.where(p.abs() < torch.inf, p, 1.0)  # a parameter that is none already is nobody's promise
    constants = {"rule": write_down(rule, tuple(c))}
    return p, draw(_some_floats(dtype, count)), torch.tensor(list(c.values())), constants


@st.composite
def _noise(draw: st.DrawFn, wanted: bool, count: int) -> Tensor | None:
    return draw(_some_integers(torch.int16, count)) if wanted else None


def _float_state(signed: bool, count: int) -> st.SearchStrategy[Tensor]:
    finite = _some_floats(F32, count).map(lambda x: torch.where(x.abs() < 2.0**60, x, 1.0))
    return finite if signed else finite.map(torch.abs)


def _step_elements(
    rule: rules.Rule, dtype: torch.dtype, noise: bool, direction: bool = False, correction: torch.dtype | None = None
) -> Variant:
    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        count = 37 * draw(rows)
        p, g, hyper, constants = draw(_step_inputs(rule, dtype, count))
        states = [draw(_float_state(s.signed, count)) for s in rule.states]
        states += [] if correction is None else [draw(_some_integers(correction, count))]
        extra = () if direction else (draw(_noise(noise, count)),)
        return Case((p, g, hyper, *extra, *states), constants)

    return cases


def _step_blocks(
    rule: rules.Rule, dtype: torch.dtype, noise: bool, blocksize: int = 256, direction: bool = False,
    correction: torch.dtype | None = None,
) -> Variant:  # fmt: skip
    @st.composite
    def cases(draw: st.DrawFn, rows: Blocks) -> Case:
        n = draw(rows)
        count = n * blocksize
        p, g, hyper, constants = draw(_step_inputs(rule, dtype, count))
        random = draw(_noise(noise, count))
        states = []
        for _ in rule.states:
            states.append(draw(_some_integers(torch.uint8, count)).view(n, blocksize))
            states.append(draw(_float_state(False, n)))
        states += [] if correction is None else [draw(_some_integers(correction, count)).view(n, blocksize)]
        p, g = p.view(n, blocksize), g.view(n, blocksize)
        if direction:
            return Case((p, g, hyper, *states), constants)
        random = None if random is None else random.view(n, blocksize)
        return Case((p, g, hyper, random, *states), constants)

    return cases


@st.composite
def _add_products(draw: st.DrawFn, rows: Blocks) -> Case:
    """Sums of numbers of unequal size, where order shows, more often than of infinities, where it does not."""
    m, n = draw(rows), 9 * draw(rows)
    sizes = st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=20, max_size=60)

    def some(count: int) -> Tensor:
        if draw(st.integers(0, 3)) == 0:
            return draw(_some_floats(F32, count))
        return torch.from_numpy(np.resize(np.array(draw(sizes), np.float32), count))

    return Case((some(m * n).view(m, n), some(m * 64).view(m, 64), some(64 * n).view(64, n)))


def _named(build: Callable[..., Variant], *variants: tuple[Any, ...]) -> dict[str, Variant]:
    def label(value: Any) -> str:
        return str(getattr(value, "name", value)).removeprefix("torch.")

    return {"-".join(map(label, variant)): build(*variant) for variant in variants}


KERNELS: dict[str, dict[str, Variant]] = {
    "quantize_rows": _named(_quantize_rows, (BF16, NF4, 64), (F32, NF4, 64), (F16, FP4, 64), (F32, AF4, 7)),
    "dequantize_rows": _named(
        _dequantize_rows, (BF16, NF4, 64), (F32, NF4, 64), (F16, FP4, 64), (F32, AF4, 7), (BF16, NF4, 2)
    ),
    "quantize_blocks": _named(
        _quantize_blocks, (F32, DYNAMIC, 256), (BF16, DYNAMIC_UNSIGNED, 256), (F32, linear(), 256)
    ),
    "dequantize_blocks": _named(_dequantize_blocks, (F32, DYNAMIC, 256), (BF16, DYNAMIC, 256)),
    "dequantize_nested": {"float32": _dequantize_nested},
    "quantize_int8_rows": _named(
        _quantize_int8_rows, (F32, 2.5, True), (F32, 0.0, False), (F32, 0.0, True), (F16, 6.0, False)
    ),
    "dequantize_int8_product": _named(_dequantize_int8_product, (F32, None, None), (BF16, F32, BF16), (F16, F16, None)),
    "multiply_rows": _named(
        _multiply_rows,
        (BF16, NF4, 64, 1, False, 2),
        (F32, FP4, 32, 2, False, 2),
        (BF16, NF4, 64, 2, True, 1),
        (F32, AF4, 32, 1, True, 1),
    ),
    "multiply_int8_row": _named(_multiply_int8_row, (F32, False), (BF16, False)),
    "multiply_int8_row_and_outliers": _named(_multiply_int8_row, (F32, True), (BF16, True)),
    "add_products": {"float32": _add_products},
    "dequantize_int8_rows": _named(_dequantize_int8_rows, (F32,), (BF16,)),
    "step_elements": _named(
        _step_elements,
        (rules.Adam(), F32, False),
        (rules.AdEMAMix(), BF16, True),
        (rules.SGD(), F16, False, False, torch.int8),
    ),
    "step_blocks": _named(
        _step_blocks,
        (rules.Adam(), F32, False),
        (rules.AdEMAMix(), BF16, True),
        (rules.Lion(), F16, False),
        (rules.SGD(), BF16, False, 256, False, torch.int16),
    ),
    "direction_elements": _named(_step_elements, (rules.LARS(), F32, False, True)),
    "direction_blocks": _named(_step_blocks, (rules.LAMB(), F32, False, 256, True)),
}
"""For each registered kernel its variants; the first one is the one that runs in every context."""
