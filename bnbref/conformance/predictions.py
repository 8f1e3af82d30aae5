"""The results of a backend that follows a dialect."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref import blockwise
from bnbref.blockwise import SMALLEST_NORMAL, count_below
from bnbref.codebooks import DYNAMIC, value_table
from bnbref.conformance.case import CPU, Case
from bnbref.conformance.dialects import Dialect
from bnbref.conformance.expected import Expected
from bnbref.conformance.operations import arguments
from bnbref.conformance.oracles import steps
from bnbref.conformance.oracles.codes import encode_8bit
from bnbref.conformance.oracles.intervals import SLACK, Interval
from bnbref.conformance.oracles.values import each, unpack
from bnbref.kernels import eager

Tensors = dict[str, Tensor]


def _scaled(x: Tensor, blocksize: int, d: Dialect, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled elements, stored absmax, and which elements are in an all-zero block."""
    flat = F.pad(x.reshape(-1) if d.in_dtype else x.reshape(-1).float(), (0, pad))
    count = -(-x.numel() // blocksize)
    blocks = F.pad(flat, (0, count * blocksize - flat.numel())).view(count, blocksize)
    absmax = blocks.abs().nan_to_num(0.0, posinf=torch.inf).amax(-1)
    partial = torch.arange(count) == (count - 1 if x.numel() % blocksize else count)
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    absmax = torch.where(absmax < tiny, 1.0, absmax) if d.tiny_is_one else absmax.clamp(min=d.floor)
    stored, divisor = absmax, absmax
    if d.small == "zero":
        stored = divisor = torch.where(absmax >= SMALLEST_NORMAL, absmax, 0.0)
    elif d.small == "clamp":
        divisor = absmax.clamp(min=1e-38)
        stored = torch.where(partial, divisor, absmax)
    inverse = 1 / divisor
    if d.small == "zero":
        inverse = torch.where(divisor > 0, inverse, 0.0)
    if d.large:
        inverse = torch.where(inverse < SMALLEST_NORMAL, 0.0, inverse)
    scaled = blocks * inverse[:, None]
    by_division = partial[:, None] if d.division == "tail" else torch.tensor(d.division == "always")
    divided = torch.where(divisor[:, None] > 0, blocks / divisor[:, None], scaled)
    scaled = torch.where(by_division, divided, scaled)
    zero = (absmax == 0)[:, None].expand(blocks.shape)
    return scaled.reshape(-1)[: flat.numel()], stored.float(), zero.reshape(-1)[: flat.numel()]


def _eight_bit(scaled: Tensor, values: Tensor, ties: str) -> Tensor:
    middle = (values[:-1] + values[1:]) / 2
    if ties == "bins":
        i = ((((scaled.clamp(-1, 1) + 1) * 0.5) * 65535) + 0.5).nan_to_num(0.0).floor()
        return count_below(-1 + (2 * i) / 65535, middle).to(torch.uint8)
    if ties == "upper":
        down = (torch.searchsorted(values, scaled, right=True) - 1).clamp(min=0)
        up = (down + 1).clamp(max=values.numel() - 1)
        return torch.where(scaled - values[down] >= (values[up] - values[down]) * 0.5, up, down).to(torch.uint8)
    if ties == "even":
        return encode_8bit(scaled, values)
    return count_below(scaled, middle).to(torch.uint8)


# ---- operations: each is called with a dialect and its arguments, and returns its results by name -----------------------


def _quantize_blockwise(d: Dialect, x: Tensor, values: Tensor, blocksize: int) -> Tensors:
    scaled, absmax, zero = _scaled(x, blocksize, d)
    codes = _eight_bit(scaled, values, d.ties)
    codes = codes if d.zero_block is None else torch.where(zero, d.zero_block, codes)
    return {"codes": codes.to(torch.uint8).view(x.shape), "absmax": absmax}


def _quantize_4bit(d: Dialect, x: Tensor, blocksize: int, quant_type: str) -> Tensors:
    book = d.fp4 if quant_type == "fp4" else d.nf4
    scaled, absmax, zero = _scaled(x, blocksize, d, pad=-x.numel() % blocksize if d.whole_blocks else x.numel() % 2)
    if d.nearest:
        codes = (scaled[:, None] - torch.tensor(book.values, dtype=scaled.dtype)).abs().argmin(-1)
    elif d.in_dtype:
        codes = count_below(scaled.float(), torch.tensor(book.thresholds).to(scaled.dtype).float())
    else:
        codes = blockwise.encode(scaled, book)
    codes = (codes if d.zero_block is None else torch.where(zero, d.zero_block, codes)).to(torch.uint8)
    first, second = (codes[1::2], codes[0::2]) if d.low_first else (codes[0::2], codes[1::2])
    return {"packed": (first << 4) + second, "absmax": absmax}


def _quantize_4bit_nested(d: Dialect, x: Tensor, blocksize: int, quant_type: str) -> Tensors:
    outer = _quantize_4bit(d, x, blocksize, quant_type)
    offset = outer["absmax"].mean()
    inner = _quantize_blockwise(d, outer["absmax"] - offset, value_table(DYNAMIC, CPU), 256)
    return {"packed": outer["packed"], "codes": inner["codes"], "absmax2": inner["absmax"], "offset": offset}


def weight(
    d: Dialect, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """The 4-bit weight, each element with the scale that the dialect takes for it."""
    i, columns = torch.arange(torch.Size(shape).numel()), shape[-1]
    if d.row_scales and columns % 16 == 0 and blocksize < 2048:
        block = (i // columns) * (columns // blocksize) + i % columns // blocksize
    else:
        block = i // blocksize
    packed = packed >> 4 | packed << 4 if d.low_first else packed
    book = d.fp4 if quant_type == "fp4" else d.nf4
    values, scale = value_table(book, CPU)[unpack(packed, len(i))], absmax[block]
    if d.float16_weight:
        values, scale = values.half().float(), scale.half().float()
    product = values * scale
    product = product.half() if d.float16_weight == "rounded" else product
    return product.view(shape).to(dtype)


def _dequantize_4bit(d: Dialect, packed: Tensor, absmax: Tensor, shape: tuple[int, ...], **rest: Any) -> Tensors:
    y = weight(d, packed, absmax, shape=shape, **rest)
    return {"y": y.view(1, -1) if d.vector_as_row and len(shape) == 1 and shape[0] % 2 == 0 else y}


def _dequantize_4bit_nested(
    d: Dialect, packed: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor, values: Tensor, **rest: Any
) -> Tensors:
    absmax = values[codes.long()] * each(absmax2, 256, codes.numel()) + offset
    y = _dequantize_4bit(d, packed, absmax, **rest)["y"]
    return {"y": y.t() if d.row_transposed and packed.numel() == 1 else y}


def _dequantize_blockwise(
    d: Dialect, codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensors:
    y = values[codes.long()] * each(absmax, blocksize, codes.numel()).view(codes.shape)
    if d.bfloat16_nan and dtype == torch.bfloat16:
        bits = y.view(torch.int32).long() & 0xFFFFFFFF
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF
        return {"y": torch.where(rounded >= 2**15, rounded - 2**16, rounded).to(torch.int16).view(dtype)}
    return {"y": y.to(dtype)}


def _int8_mm_dequant(
    d: Dialect, product: Tensor, row: Tensor, column: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensors:
    flat = product.reshape(-1, product.shape[-1])
    y = flat * (row[:, None] * column) * d.int8_constant
    y = (y if bias is None else y + bias).to(dtype)
    return {"y": y if d.int8_2d else y.view(product.shape)}


def _int8_matmul(d: Dialect, a: Tensor, b: Tensor) -> Tensors:
    if d.int8_float32:
        return {"product": (a.float() @ b.float().t()).to(torch.int32)}
    return {"product": (a.long() @ b.long().t()).to(torch.int32)}


def _int8_quantize(d: Dialect, x: Tensor, threshold: float) -> Tensors:
    if threshold > 0:
        outliers = x.abs() >= threshold
        codes, absmax = _int8_quantize(d, x.masked_fill(outliers, 0), 0.0).values()
        return {"codes": codes.masked_fill(outliers.view(-1, x.shape[-1]).any(0), 0), "absmax": absmax}
    absmax = x.abs().amax(1).float() if d.int8_2d and x.dim() > 2 else x.abs().amax(-1).float().view(-1)
    absmax = absmax.clamp(min=d.floor)
    scale = absmax.unsqueeze(-1) if d.int8_2d and x.dim() > 2 else absmax.view(*x.shape[:-1], 1)
    return {"codes": (x * (127.0 / scale)).round().to(torch.int8), "absmax": absmax}


def _load_4bit(
    d: Dialect, packed: Tensor, absmax: Tensor, quant_map: Tensor, state: Tensor, quant_type: str, **nested: Tensor
) -> Tensors:
    stored = arguments(json.loads(bytes(state.tolist())))
    if "nested_absmax" in nested:
        inner = nested["nested_quant_map"][absmax.long()] * each(nested["nested_absmax"], 256, absmax.numel())
        absmax = inner + stored["nested_offset"]
    rest = {name: stored[name] for name in ("blocksize", "shape", "dtype")}
    return _dequantize_4bit(d, packed, absmax, quant_type=quant_type, **rest)


def step_within(d: Dialect, operation: str, /, **given: Any) -> dict[str, Expected]:
    """The results that a step with these conventions may have."""
    if operation == "optimizer_32bit":
        return steps.optimizer_32bit(c=d, **given)
    floor = float(torch.tensor(d.floor, dtype=torch.float32))
    return steps.optimizer_8bit(c=d, encode=lambda x, values: _eight_bit(x, values, d.ties), floor=floor, **given)


def decayed_within(d: Dialect, case: Case) -> dict[str, Expected]:
    """The results that a case of Adafactor or SOAP allows, with p moved by the difference that another decay makes.

    SOAP        d = 1 - lr wd, after the step    p' = d^n (1 - d) p0 + d p          of n steps that decay
    Adafactor   by the rate times the size       p' = p + wd (lr - rate size) p0    p0: before, p: by the rules
    """
    k, p0, p = case.params, case.inputs["p"].double(), Interval.within(case.expected["p"])
    decay, times, own = k["lr"] * k["weight_decay"], 0.0, 1.0
    if d.decay_after:
        own = 1 - decay
        times = own ** (2 if case.operation == "soap_refresh" and k["step"] else 1) * decay
    if d.scaled_decay:
        rate, size = min(k["lr"], k["step"] ** -0.5), max(float((p0 * p0).mean().sqrt()), k["eps2"])
        times = decay - k["weight_decay"] * rate * size
    moved = Interval.near(own, SLACK) * p + Interval.near(times, SLACK * abs(times)) * Interval.point(p0)
    return {**case.expected, "p": Expected(moved.middle.float(), low=moved.low, high=moved.high)}


def _step(operation: str) -> Callable[..., Tensors]:
    return lambda d, /, **given: {name: found.value for name, found in step_within(d, operation, **given).items()}


_PREDICTED = (
    _quantize_blockwise, _quantize_4bit, _quantize_4bit_nested, _dequantize_blockwise, _dequantize_4bit,
    _dequantize_4bit_nested, _int8_quantize, _int8_matmul, _int8_mm_dequant, _load_4bit,
)  # fmt: skip

PREDICT: dict[str, Callable[..., Tensors]] = {
    **{function.__name__.removeprefix("_"): function for function in _PREDICTED},
    **{operation: _step(operation) for operation in ("optimizer_32bit", "optimizer_8bit")},
}
"""The operations of which dialects say something."""


def predict(dialect: Dialect, case: Case) -> Mapping[str, Tensor]:
    """The results of a backend with these conventions; none if its conventions say nothing of the operation."""
    with eager():
        keywords = {**case.inputs, **arguments(case.params)}
        try:
            return PREDICT[case.operation](dialect, **keywords) if case.operation in PREDICT else {}
        except RuntimeError:  # shapes that the dialect cannot do at all
            return {}
