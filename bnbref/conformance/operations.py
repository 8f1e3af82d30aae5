"""What a backend may implement: each operation's arguments, its results, and what the rules allow them to be.

A backend is any object with functions of these names, called with keyword arguments. Tensors are on one device, packed codes
are uint8 `[bytes]`, dtypes are torch's. A function returns its one result, a tuple of them in order, or a dict by name.

    quantize_blockwise(x, values, blocksize)                            -> codes, absmax
    dequantize_blockwise(codes, absmax, values, blocksize, dtype)       -> y
    quantize_4bit(x, blocksize, quant_type)                             -> packed, absmax
    dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)  -> y
    quantize_4bit_nested(x, blocksize, quant_type)                      -> packed, codes, absmax2, offset
    dequantize_4bit_nested(packed, codes, absmax2, offset, values, blocksize, quant_type, shape, dtype)  -> y
    gemm_4bit(a, packed, absmax, bias, blocksize, quant_type, shape)    -> y
    int8_quantize(x, threshold)                                         -> codes, absmax, columns
    int8_matmul(a, b)                                                   -> product
    int8_mm_dequant(product, row, column, bias, dtype)                  -> y
    int8_dequantize(codes, absmax)                                      -> y
    save_4bit(x, blocksize, quant_type, nested)                         -> the tensors of a file, by name
    load_4bit(the same tensors, quant_type)                             -> y

`values` is float32 [256], sorted. `columns` holds the indices of outlier columns, int64, ascending, [0] if there are none.
`bias` may be None. In save_4bit and load_4bit the names are packed, absmax, quant_map, state, nested_absmax, nested_quant_map.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref import blockwise, fourbit, functional, int8
from bnbref.blockwise import SMALLEST_NORMAL, reciprocal
from bnbref.codebooks import DYNAMIC, Codebook, four_bit, value_table
from bnbref.fused import eager
from bnbref.quant_state import BLOB, QuantState

Tensors = Mapping[str, Tensor]

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Unit roundoff: half the distance of 1 to the next number."""


class Also(NamedTuple):
    """Further values that are allowed: flat indices int64 `[m]` and, of the dtype of the result, values `[m]`."""

    where: Tensor
    value: Tensor


@dataclass(frozen=True)
class Expected:
    """What the rules allow one result to be.

    value, bit for bit but for the sign of zero and the bits of NaN. ulp: how many representable numbers off it may be.
    also: other values, by element; free: elements (flat indices) that may be anything. pairs: flat indices `[2, m]` of elements
    that must be equal to each other. low, high: instead of a value an interval, float64.
    """

    value: Tensor
    ulp: int = 0
    also: Also | None = None
    free: Tensor | None = None
    pairs: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def grade(self) -> str:
        """How strict this is: exact, one-of, ulp(n), interval or structural."""
        if self.low is not None:
            return "interval"
        if self.free is not None and self.free.numel() == self.value.numel() > 0:
            return "structural"
        if self.ulp:
            return f"ulp({self.ulp})"
        return "one-of" if self.also is not None or self.free is not None else "exact"


# ---- judging --------------------------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype are equal: NaN is NaN, and zero is zero whatever its sign.

    >>> same(torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([-0.0, float("nan"), 2.0]))
    tensor([ True,  True, False])
    """
    return (a == b) | ((a != a) & (b != b))


def steps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers apart two floating-point tensors of one dtype are, int64; 0 for NaN and NaN.

    >>> steps(torch.tensor([1.0, -0.0]), torch.tensor([1.0000001, 1e-45])).tolist()
    [1, 1]
    """
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    sign = torch.iinfo(kind).min

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(kind).long()
        return torch.where(bits < 0, sign - bits, bits)

    distance = (ordered(a) - ordered(b)).abs()
    nan = (a != a) | (b != b)
    return torch.where(nan, torch.where((a != a) & (b != b), 0, 2**31), distance)


def wrong_elements(got: Tensor, expected: Expected) -> Tensor:
    """Flat indices of the elements that the rules do not allow. The shapes and dtypes are equal."""
    flat, want = got.reshape(-1), expected.value.reshape(-1)
    if expected.low is not None and expected.high is not None:
        y = flat.double()
        return (~((y >= expected.low.reshape(-1)) & (y <= expected.high.reshape(-1)))).nonzero().view(-1)
    ok = steps(flat, want) <= expected.ulp if expected.ulp else same(flat, want)
    if expected.also is not None:
        where, value = expected.also
        ok[where[same(flat[where], value)]] = True
    if expected.free is not None:
        ok[expected.free] = True
    if expected.pairs is not None:
        first, second = expected.pairs
        ok[second[~same(flat[first], flat[second])]] = False
    return (~ok).nonzero().view(-1)


# ---- quantization ---------------------------------------------------------------------------------------------------


class _Scaled(NamedTuple):
    """A tensor in blocks, and how exactly each element's scaled value is known."""

    flat: Tensor
    block: Tensor  # of each element
    scaled: Tensor
    inexact: Tensor  # elements: absmax is no power of two
    zero: Tensor  # elements: absmax is 0
    true_absmax: Tensor  # blocks: also where it is below 2^-126
    not_finite: Tensor  # blocks


def _scale(x: Tensor, absmax: Tensor, blocksize: int, pad: int = 0) -> _Scaled:
    flat = F.pad(x.detach().reshape(-1).float(), (0, pad))
    block = (torch.arange(flat.numel()) // blocksize).clamp(max=absmax.numel() - 1)
    blocks = F.pad(flat, (0, absmax.numel() * blocksize - flat.numel())).view(-1, blocksize)
    not_finite = ~blocks.isfinite().all(-1)
    true = blocks.abs().nan_to_num(0.0).amax(-1) if blocks.numel() else blocks.new_zeros(0)
    inexact = (absmax.frexp().mantissa != 0.5) & (absmax > 0)
    return _Scaled(flat, block, flat * reciprocal(absmax)[block], inexact[block], absmax[block] == 0, true, not_finite)


def _two_ulp(x: Tensor, direction: float) -> Tensor:
    end = torch.full_like(x, direction)
    return torch.where(x == 0, x, x.nextafter(end).nextafter(end))


def _alternatives(s: _Scaled, encode: Callable[[Tensor], Tensor], codes: Tensor, zero_block: bool) -> list[Tensor]:
    """Tensors of codes of which each element may be any, the first being the reference's."""
    zero = encode(torch.zeros(1))
    near = [torch.where(s.inexact, encode(_two_ulp(s.scaled, end)), codes) for end in (-math.inf, math.inf)]
    flushed = torch.where((s.flat.abs() < SMALLEST_NORMAL) & (s.flat != 0), zero, codes)
    tiny = s.zero & (s.true_absmax[s.block] > 0)
    exact = torch.where(tiny, encode((s.flat.double() / s.true_absmax[s.block].double()).float()), codes)
    others = [*near, flushed, exact]
    if zero_block:
        others.append(torch.where(s.zero, torch.zeros_like(codes), codes))
    return [codes, *(other for other in others if not torch.equal(other, codes))]


def _also(want: Tensor, others: Sequence[Tensor]) -> Also | None:
    """The elements in which the others differ."""
    want = want.reshape(-1)
    found = [
        (where, other.reshape(-1)[where])
        for other in others
        if len(where := (other.reshape(-1) != want).nonzero().view(-1))
    ]
    if not found:
        return None
    index, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    pairs = sorted(set(zip(index.tolist(), value.tolist(), strict=True)))
    return Also(torch.tensor([i for i, _ in pairs]), torch.tensor([v for _, v in pairs], dtype=want.dtype))


def _free(mask: Tensor) -> Tensor | None:
    return mask.nonzero().view(-1) if bool(mask.any()) else None


def _expected_absmax(absmax: Tensor, s: _Scaled) -> Expected:
    tiny = torch.where(absmax == 0, s.true_absmax, absmax)
    return Expected(absmax, also=_also(absmax, [tiny]), free=_free(s.not_finite))


@functools.lru_cache(maxsize=16)
def _book(values: tuple[float, ...]) -> Codebook:
    return Codebook.nearest("values", values, ties="even")


def quantize_blockwise(x: Tensor, values: Tensor, blocksize: int) -> dict[str, Expected]:
    """Rules Q8."""
    book = _book(tuple(values.tolist()))
    codes, absmax = blockwise.quantize(x, book, blocksize)
    s = _scale(x, absmax, blocksize)

    def encode(scaled: Tensor) -> Tensor:
        return blockwise.count_below(scaled, torch.tensor(book.thresholds)).to(torch.uint8)

    others = _alternatives(s, encode, codes.reshape(-1), zero_block=True)
    return {
        "codes": Expected(codes, also=_also(codes, others[1:]), free=_free(s.not_finite[s.block])),
        "absmax": _expected_absmax(absmax, s),
    }


def _expect_4bit(x: Tensor, blocksize: int, quant_type: str, zero_block: bool) -> tuple[Expected, Expected]:
    book = four_bit(quant_type)
    packed, absmax = fourbit.quantize(x, book, blocksize)
    packed = packed.view(-1)
    s = _scale(x, absmax, blocksize, pad=x.numel() % 2)
    codes = torch.stack((packed >> 4, packed & 15), -1).view(-1)
    others = _alternatives(s, lambda scaled: fourbit.encode(scaled, book), codes, zero_block)
    if book.sign_bit:
        minus_zero = s.flat.signbit() & (s.flat == 0)
        others.append(torch.where(minus_zero, codes + len(book.values) // 2, codes))
    by_byte = [_pack_pair(high, low) for high in others for low in others]
    free = s.not_finite[s.block].view(-1, 2).any(-1)
    return Expected(packed, also=_also(packed, by_byte[1:]), free=_free(free)), _expected_absmax(absmax, s)


def _pack_pair(high: Tensor, low: Tensor) -> Tensor:
    return high[0::2] << 4 | low[1::2]


def quantize_4bit(x: Tensor, blocksize: int, quant_type: str) -> dict[str, Expected]:
    """Rules Q4."""
    packed, absmax = _expect_4bit(x, blocksize, quant_type, zero_block=True)
    return {"packed": packed, "absmax": absmax}


def quantize_4bit_nested(x: Tensor, blocksize: int, quant_type: str) -> dict[str, Expected]:
    """Rules QN. The mean of the absmax must be exact in any order of summation for the rest to be comparable."""
    packed, absmax = _expect_4bit(x, blocksize, quant_type, zero_block=False)
    offset = absmax.value.mean()
    inner = quantize_blockwise(absmax.value - offset, value_table(DYNAMIC, torch.device("cpu")), 256)
    return {"packed": packed, "codes": inner["codes"], "absmax2": inner["absmax"], "offset": Expected(offset)}


# ---- dequantization -------------------------------------------------------------------------------------------------


def _expect_product(y: Tensor, value: Tensor, scale: Tensor) -> Expected:
    """y = T(fl(value * scale)), where a product below 2^-126 may be zero."""
    flushed = (value.double() * scale.double()).abs() < SMALLEST_NORMAL
    return Expected(
        y, also=_also(y.nan_to_num(nan=1.0), [torch.where(flushed.view(y.shape), 0.0, y.nan_to_num(nan=1.0))])
    )


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype
) -> dict[str, Expected]:
    """Rules D8."""
    y = blockwise.dequantize(codes, absmax, values, blocksize, dtype)
    scale = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return {"y": _expect_product(y, values[codes.reshape(-1).long()], scale)}


def _unpacked_values(packed: Tensor, quant_type: str, numel: int) -> Tensor:
    codes = torch.stack((packed >> 4, packed & 15), -1).view(-1)[:numel]
    return value_table(four_bit(quant_type), torch.device("cpu"))[codes.long()]


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> dict[str, Expected]:
    """Rules D4."""
    y = fourbit.dequantize(packed, absmax, four_bit(quant_type), blocksize, shape, dtype)
    scale = absmax.repeat_interleave(blocksize)[: y.numel()]
    return {"y": _expect_product(y, _unpacked_values(packed, quant_type, y.numel()), scale)}


def dequantize_4bit_nested(
    packed: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor, values: Tensor, blocksize: int, quant_type: str,
    shape: Sequence[int], dtype: torch.dtype,
) -> dict[str, Expected]:  # fmt: skip
    """Rules DN."""
    value2, scale2 = values[codes.long()], absmax2.repeat_interleave(256)[: codes.numel()]
    y, fused = (
        fourbit.dequantize(packed, absmax, four_bit(quant_type), blocksize, shape, dtype)
        # A product of two float32 is exact in float64, so that the second has one rounding to float32.
        for absmax in (value2 * scale2 + offset, (value2.double() * scale2.double() + offset.double()).float())
    )
    return {"y": Expected(y, also=_also(y, [fused]))}


def gemm_4bit(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> dict[str, Expected]:
    """Rules G4; the bound is derived there."""
    weight = fourbit.dequantize(packed, absmax, four_bit(quant_type), blocksize, shape, a.dtype)
    return {"y": product_interval(a, weight, bias)}


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T in float64, each element rounded once: a library's order of summation depends on CPU and threads."""
    rows, columns = a.double().reshape(-1, a.shape[-1]).tolist(), b.double().tolist()
    sums = [[math.fsum(map(operator.mul, row, column)) for column in columns] for row in rows]
    return torch.tensor(sums, dtype=torch.float64).view(*a.shape[:-1], b.shape[0])


def product_interval(a: Tensor, weight: Tensor, bias: Tensor | None) -> Expected:
    """a @ weight^T + bias within the bound of rule G4-1."""
    unit = UNIT[a.dtype]
    exact, size = _exact_product(a, weight), _exact_product(a.abs(), weight.abs())
    extra = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()
    y = exact + extra
    bound = (4.1 * unit + 2 * weight.shape[1] * 2.0**-24) * size + 2 * unit * (y.abs() + extra.abs())
    return Expected(y.to(a.dtype), low=y - bound, high=y + bound)


# ---- int8 -----------------------------------------------------------------------------------------------------------


def int8_quantize(x: Tensor, threshold: float) -> dict[str, Expected]:
    """Rules I8."""
    codes, absmax, mask = int8.quantize(x, threshold)
    columns = torch.empty(0, dtype=torch.int64) if mask is None else mask.nonzero().view(-1)
    rows = int8.in_rows(x).float()
    factor = reciprocal(absmax) * 127.0
    scaled = rows * factor[:, None]
    inexact = ((127.0 / absmax).frexp().mantissa != 0.5)[:, None] & (codes.view(rows.shape) != 0)
    near = [
        torch.where(inexact, _two_ulp(scaled, end).round().to(torch.int8), codes.view(rows.shape))
        for end in (-math.inf, math.inf)
    ]
    not_finite = ~rows.isfinite().all(-1)
    return {
        "codes": Expected(
            codes, also=_also(codes, near), free=_free(not_finite[:, None].expand(rows.shape).reshape(-1))
        ),
        "absmax": Expected(absmax, free=_free(not_finite)),
        "columns": Expected(columns),
    }


def int8_matmul(a: Tensor, b: Tensor) -> dict[str, Expected]:
    """Rules IM."""
    return {"product": Expected(int8.multiply(a, b))}


def int8_mm_dequant(
    product: Tensor, row: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> dict[str, Expected]:
    """Rules ID; the bound is derived there."""
    flat = int8.in_rows(product)
    y = int8.dequantize_int8_product(flat, row, column, bias, None, dtype=dtype).view(product.shape)
    scaled = product.double() * (row.double()[:, None] * column.double() / 16129).view(product.shape)
    exact = scaled if bias is None else scaled + bias.double()
    added = torch.zeros(()) if bias is None else bias.double().abs()
    single, unit = 2.0**-24, UNIT[dtype]
    bound = 5 * single * scaled.abs() + 2 * single * exact.abs() + 2 * unit * (exact.abs() + added)
    return {"y": Expected(y, low=exact - bound, high=exact + bound)}


def int8_dequantize(codes: Tensor, absmax: Tensor) -> dict[str, Expected]:
    """Rules IV."""
    return {"y": Expected(int8.dequantize(codes, absmax), ulp=4)}


# ---- files ----------------------------------------------------------------------------------------------------------

_KEYS = {
    "absmax": "absmax",
    "quant_map": "quant_map",
    "nested_absmax": "nested_absmax",
    "nested_quant_map": "nested_quant_map",
}


def save_4bit(x: Tensor, blocksize: int, quant_type: str, nested: bool) -> dict[str, Expected]:
    """Rules CW."""
    packed, state = functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    file = state.as_dict(packed=True)
    tensors = {"packed": packed.view(-1), "state": file[BLOB + quant_type]}
    return {name: Expected(t) for name, t in {**tensors, **{k: file[k] for k in _KEYS if k in file}}.items()}


def load_4bit(
    packed: Tensor, absmax: Tensor, quant_map: Tensor, state: Tensor, quant_type: str,
    nested_absmax: Tensor | None = None, nested_quant_map: Tensor | None = None,
) -> dict[str, Expected]:  # fmt: skip
    """Rules CR."""
    return {
        "y": Expected(
            functional.dequantize_4bit(
                packed.view(-1, 1), quant_state(absmax, quant_map, state, quant_type, nested_absmax, nested_quant_map)
            )
        )
    }


def quant_state(
    absmax: Tensor,
    quant_map: Tensor,
    state: Tensor,
    quant_type: str,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
) -> QuantState:
    """The state that the tensors of a file describe."""
    given = {
        "absmax": absmax,
        "quant_map": quant_map,
        "nested_absmax": nested_absmax,
        "nested_quant_map": nested_quant_map,
    }
    file = {name: tensor for name, tensor in given.items() if tensor is not None}
    return QuantState.from_dict({**file, BLOB + quant_type: state}, absmax.device)


# ---- the list -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """An operation: its name, the names of its results (None: as many as there are), and its oracle."""

    name: str
    outputs: tuple[str, ...] | None
    oracle: Callable[..., dict[str, Expected]]

    def expect(self, inputs: Tensors, params: Mapping[str, Any]) -> dict[str, Expected]:
        """What each result may be, computed by the reference, uncompiled."""
        with eager():
            return self.oracle(**inputs, **arguments(params), **self._absent(inputs))

    def _absent(self, inputs: Tensors) -> dict[str, None]:
        return {name: None for name in OPTIONAL.get(self.name, ()) if name not in inputs}


OPTIONAL = {
    "gemm_4bit": ("bias",),
    "int8_mm_dequant": ("bias",),
    "load_4bit": ("nested_absmax", "nested_quant_map"),
}
"""Arguments that are None where a case has no tensor for them."""


def arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """A case's parameters, JSON values, as a function takes them: dtypes as torch's, shapes as tuples.

    >>> arguments({"dtype": "float16", "shape": [2, 3], "blocksize": 64})
    {'dtype': torch.float16, 'shape': (2, 3), 'blocksize': 64}
    """
    made = dict(params)
    if "dtype" in made:
        made["dtype"] = getattr(torch, made["dtype"])
    if "shape" in made:
        made["shape"] = tuple(made["shape"])
    return made


OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        Operation("quantize_blockwise", ("codes", "absmax"), quantize_blockwise),
        Operation("dequantize_blockwise", ("y",), dequantize_blockwise),
        Operation("quantize_4bit", ("packed", "absmax"), quantize_4bit),
        Operation("dequantize_4bit", ("y",), dequantize_4bit),
        Operation("quantize_4bit_nested", ("packed", "codes", "absmax2", "offset"), quantize_4bit_nested),
        Operation("dequantize_4bit_nested", ("y",), dequantize_4bit_nested),
        Operation("gemm_4bit", ("y",), gemm_4bit),
        Operation("int8_quantize", ("codes", "absmax", "columns"), int8_quantize),
        Operation("int8_matmul", ("product",), int8_matmul),
        Operation("int8_mm_dequant", ("y",), int8_mm_dequant),
        Operation("int8_dequantize", ("y",), int8_dequantize),
        Operation("save_4bit", None, save_4bit),
        Operation("load_4bit", ("y",), load_4bit),
    )
}
"""Every operation of the kit by name. The optimizers' updates are to be entries here, once there is a room for them."""
