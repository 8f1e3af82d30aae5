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
    gemm_4bit_backward(grad, packed, absmax, blocksize, quant_type, shape)  -> grad_a
    int8_backward(a, weight, grad)                                      -> grad_a, grad_weight
    evaluate_then_train(x, grad, packed, absmax, bias, blocksize, quant_type, shape)  -> y, grad_x, packed, absmax
    optimizer_32bit(p, g, state1, state2, state3, HYPER)                -> p, state1, state2, state3
    optimizer_8bit(p, g, state1, absmax1, values1, state2, absmax2, values2, state3, absmax3, HYPER)  -> p, state1, absmax1, ...

HYPER: optimizer (momentum, lars, adam, lamb, lion, rmsprop, adagrad or ademamix), step, lr, beta1, beta2, beta3, alpha, eps,
weight_decay, max_unorm, gnorm_scale. States that an optimizer does not have are None, and none of its results; nothing is
updated in place.

`values` is float32 [256], sorted. `columns` holds the indices of outlier columns, int64, ascending, [0] if there are none.
`bias` may be None. In save_4bit and load_4bit the names are packed, absmax, quant_map, state, nested_absmax, nested_quant_map.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref import blockwise, fourbit, functional, int8
from bnbref.blockwise import SMALLEST_NORMAL, reciprocal
from bnbref.codebooks import DYNAMIC, Codebook, four_bit, value_table
from bnbref.conformance import optimizers, products
from bnbref.conformance.judging import UNIT, Also, Expected
from bnbref.kernels import eager
from bnbref.quant_state import BLOB, QuantState

Tensors = Mapping[str, Tensor]

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
    others = _alternatives(s, lambda scaled: blockwise.encode(scaled, book), codes, zero_block)
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
    "evaluate_then_train": ("bias",),
    "optimizer_32bit": ("state2", "state3"),
    "optimizer_8bit": ("state2", "absmax2", "values2", "state3", "absmax3"),
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
        Operation("gemm_4bit", ("y",), products.gemm_4bit),
        Operation("gemm_4bit_backward", ("grad_a",), products.gemm_4bit_backward),
        Operation("int8_quantize", ("codes", "absmax", "columns"), int8_quantize),
        Operation("int8_matmul", ("product",), int8_matmul),
        Operation("int8_mm_dequant", ("y",), int8_mm_dequant),
        Operation("int8_dequantize", ("y",), int8_dequantize),
        Operation("int8_backward", ("grad_a", "grad_weight"), products.int8_backward),
        Operation("save_4bit", None, save_4bit),
        Operation("load_4bit", ("y",), load_4bit),
        Operation("evaluate_then_train", ("y", "grad_x", "packed", "absmax"), products.evaluate_then_train),
        Operation("optimizer_32bit", None, optimizers.step_32bit),
        Operation("optimizer_8bit", None, optimizers.step_8bit),
    )
}
"""Every operation of the kit by name."""
