"""A second implementation, written from the formulas of the formats and not from bnbref: the judge of the tests.

One element, one block, one byte at a time, in numpy's float32 (IEEE: every operation is rounded once, to nearest even;
subnormals are kept) and Python's integers. Nothing here imports bnbref, and torch only carries the results.
"""

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Floats = np.ndarray

_HEX = json.loads((Path(__file__).parent / "data" / "codebooks_hex.json").read_text(encoding="utf-8"))

# What IEEE arithmetic does with infinities and NaN is what is meant.
np.seterr(all="ignore")


def from_hex(hexes: Sequence[str]) -> Floats:
    """Float32 numbers from the hexadecimal words of their bits."""
    return np.array([int(word, 16) for word in hexes], dtype=np.uint32).view(np.float32)


AF4 = (-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
       0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0)  # fmt: skip
INT4 = (7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7)

VALUES: dict[str, Floats] = {name: from_hex(words) for name, words in _HEX.items() if not name.endswith("thresholds")}
VALUES["af4"] = np.array(AF4[::-1], dtype=np.float32)
VALUES["int4"] = np.array([np.float32(i) / np.float32(7) for i in INT4], dtype=np.float32)

# Where they are written down: of all other four-bit formats they are the midpoints, and a tie goes to the lower value.
THRESHOLDS = {"nf4": from_hex(_HEX["nf4_thresholds"]), "fp4": from_hex(_HEX["fp4_thresholds"])}

# How many values they have.
FOUR_BIT = {"nf4": 16, "fp4": 16, "af4": 16, "int4": 16}


def add_four_bit(name: str, values: Sequence[float]) -> None:
    """A format that is not written down here: its values by code, upwards or downwards. Codes that are left decode to 0."""
    if name not in FOUR_BIT:
        FOUR_BIT[name] = len(values)
        VALUES[name] = np.array([*values, *(0.0,) * (16 - len(values))], dtype=np.float32)


# ---- floats ---------------------------------------------------------------------------------------------------------


def floats(x: Tensor) -> Floats:
    """The elements of a tensor in row-major order, as float32: exact for every dtype that is quantized."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    if x.dtype == torch.float32:
        return flat.numpy().copy()
    if x.dtype == torch.float16:
        return flat.view(torch.int16).numpy().view(np.float16).astype(np.float32)
    if x.dtype == torch.bfloat16:
        return (flat.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    raise TypeError(x.dtype)


def rounded(x: Floats, dtype: torch.dtype) -> Tensor:
    """Float32 numbers rounded to a dtype, to nearest even."""
    x = np.asarray(x, dtype=np.float32)
    if dtype == torch.float32:
        return torch.from_numpy(x.copy())
    if dtype == torch.float16:
        return torch.from_numpy(x.astype(np.float16).view(np.int16)).view(torch.float16)
    word = x.view(np.uint32)
    half = word >> np.uint32(16)
    rest = word & np.uint32(0xFFFF)
    up = (rest > 0x8000) | ((rest == 0x8000) & ((half & np.uint32(1)) == 1))
    half = np.where(np.isnan(x), np.uint32(0x7FC0), half + up.astype(np.uint32)).astype(np.uint16)
    return torch.from_numpy(half.view(np.int16)).view(torch.bfloat16)


def nearest_float32(x: Fraction) -> np.float32:
    """The float32 nearest to a rational number, the even one of two: found among neighbours by exact comparison."""
    guess = np.float32(float(x))
    candidates = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    finite = [c for c in candidates if np.isfinite(c)]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - x), int(c.view(np.uint32)) & 1))


# ---- a block --------------------------------------------------------------------------------------------------------


def absmax(block: Floats, smallest: float = 2.0**-126) -> np.float32:
    """Largest magnitude, NaN left out, 0 if it is below the smallest one allowed."""
    largest = np.float32(0.0)
    for element in block:
        size = np.abs(element)
        if size > largest:
            largest = size
    return largest if largest >= np.float32(smallest) else np.float32(0.0)


def scaled(block: Floats, scale: np.float32) -> Floats:
    """x * (1 / absmax): two roundings; everything is scaled to 0 (NaN and infinity to NaN) where absmax is 0."""
    reciprocal = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
    return block * reciprocal


def midpoints(values: Floats) -> Floats:
    return (values[:-1] + values[1:]) * np.float32(0.5)


def encode(name: str, v: Floats) -> np.ndarray:
    """Codes of scaled elements, by the rule of each format."""
    code = np.zeros(v.shape, dtype=np.int64)
    if name == "fp4":  # bitsandbytes csrc/kernels.cu, dQuantizeFP4
        tiny, sixth_low, quarter_low, third_low, half_low, two_thirds_low, one_low = THRESHOLDS["fp4"]
        for i, x in enumerate(v):
            sign = 8 if x < 0 else 0
            a = abs(x)
            if a > third_low:
                magnitude = (3 if a > one_low else 2) if a > two_thirds_low else (5 if a > half_low else 4)
            elif a > sixth_low:
                magnitude = 7 if a > quarter_low else 6
            else:
                magnitude = 1 if a > tiny else 0
            code[i] = magnitude + sign
    elif name in FOUR_BIT:  # QLoRA, appendix E: strictly above a threshold is above it; NaN is above none
        values = VALUES[name][: FOUR_BIT[name]]
        downwards = values[0] > values[-1]
        for t in THRESHOLDS.get(name, midpoints(values[::-1] if downwards else values)):
            code += v > t
        code = len(values) - 1 - code if downwards else code
    else:  # eight bits: the nearest by float32 midpoints, an exact tie to the even code
        for below, m in enumerate(midpoints(VALUES[name])):
            code += (v > m) | ((v == m) & ((below + 1) % 2 == 0))
    return code


def quantize(name: str, x: Floats, blocksize: int) -> tuple[np.ndarray, Floats]:
    """Codes and scales of a flat tensor."""
    codes, scales = [np.zeros(0, dtype=np.int64)], []
    for start in range(0, len(x), blocksize):
        block = x[start : start + blocksize]
        scales.append(absmax(block))
        codes.append(encode(name, scaled(block, scales[-1])))
    return np.concatenate(codes), np.array(scales, dtype=np.float32)


def dequantize(values: Floats, codes: Sequence[int], scales: Floats, blocksize: int, dtype: torch.dtype) -> Tensor:
    """T(fl(value * absmax)), element by element."""
    out = [values[code] * scales[i // blocksize] for i, code in enumerate(codes)]
    return rounded(np.array(out, dtype=np.float32), dtype)


# ---- four bits ------------------------------------------------------------------------------------------------------


def pack(codes: Sequence[int], code_of_zero: int) -> list[int]:
    """Two codes a byte, the first in the high nibble, the code of 0.0 after an odd last one."""
    codes = [int(code) for code in codes]
    if len(codes) % 2:
        codes.append(code_of_zero)
    return [first * 16 + second for first, second in zip(codes[::2], codes[1::2], strict=True)]


def unpack(data: Sequence[int], count: int) -> list[int]:
    return [nibble for byte in data for nibble in divmod(int(byte), 16)][:count]


CODE_OF_ZERO = {"nf4": 7, "fp4": 0, "af4": 8, "int4": 8}


def code_of_zero(name: str) -> int:
    return CODE_OF_ZERO.get(name, int(encode(name, np.zeros(1, dtype=np.float32))[0]))


def quantize_4bit(name: str, x: Floats, blocksize: int) -> tuple[list[int], Floats]:
    """Bytes and scales."""
    codes, scales = quantize(name, x, blocksize)
    return pack(list(codes), code_of_zero(name)), scales


# ---- double quantization --------------------------------------------------------------------------------------------


def nested_quantize(scales: Floats, offset: np.float32) -> tuple[np.ndarray, Floats]:
    """Codes of the scales less the offset, and the scales of the scales."""
    return quantize("dynamic_signed", scales - offset, 256)


def nested_dequantize(codes: Sequence[int], scales: Floats, offset: np.float32, blocksize: int = 256) -> Floats:
    """fl(fl(value * absmax2) + offset)."""
    out = [VALUES["dynamic_signed"][code] * scales[i // blocksize] + offset for i, code in enumerate(codes)]
    return np.array(out, dtype=np.float32)


# ---- int8 -----------------------------------------------------------------------------------------------------------


def half_even(x: np.float32) -> int:
    """A finite float32 rounded to an integer, in exact arithmetic."""
    return round(Fraction(float(x)))


def int8_quantize(rows: Floats, threshold: float) -> tuple[np.ndarray, Floats, list[bool]]:
    """Codes, scales and outlier columns of `[rows, columns]`; the threshold takes part as a float32."""
    limit = np.float32(threshold)
    outlier = [threshold > 0 and any(abs(x) >= limit for x in column) for column in rows.T]
    codes = np.zeros(rows.shape, dtype=np.int64)
    scales = []
    for i, row in enumerate(rows):
        kept = np.array([x for x in row if not (threshold > 0 and abs(x) >= limit)], dtype=np.float32)
        scales.append(absmax(kept, smallest=2.0**-121))
        factor = np.float32(127.0) * (np.float32(1.0) / scales[-1]) if scales[-1] > 0 else np.float32(0.0)
        for j, x in enumerate(row):
            v = x * factor
            codes[i, j] = 0 if outlier[j] or np.isnan(v) else half_even(v)
    return codes, np.array(scales, dtype=np.float32), outlier


def int8_product(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> list[list[int]]:
    """a @ b^T in Python's integers, wrapped to 32 bits."""
    wrap = 2**31
    return [
        [(sum(int(x) * int(y) for x, y in zip(r, s, strict=True)) + wrap) % (2 * wrap) - wrap for s in b] for r in a
    ]


def int8_dequantize_product(
    product: np.ndarray, row: Floats, column: Floats, bias: Floats | None, outliers: Floats | None, dtype: torch.dtype
) -> Tensor:
    """T(fl(fl(fl(float(product) * row) * column) * RN(1 / 16129)) + bias + outliers)."""
    constant = nearest_float32(Fraction(1, 127 * 127))
    out = np.zeros(product.shape, dtype=np.float32)
    for i, j in np.ndindex(*product.shape):
        y = nearest_float32(Fraction(int(product[i, j]))) * row[i] * column[j] * constant
        y = y if bias is None else y + bias[j]
        out[i, j] = y if outliers is None else y + outliers[i, j]
    return rounded(out, dtype)


def int8_dequantize(codes: np.ndarray, scales: Floats, dtype: torch.dtype) -> Tensor:
    """T(fl(fl(code * absmax) * RN(1 / 127)))."""
    constant = nearest_float32(Fraction(1, 127))
    out = [[np.float32(int(code)) * scales[i] * constant for code in row] for i, row in enumerate(codes)]
    return rounded(np.array(out, dtype=np.float32).reshape(codes.shape), dtype)


# ---- optimizers -----------------------------------------------------------------------------------------------------

F = np.float32

# Of each state whether it has a sign, in the order in which the formulas name them.
STATES = {"SGD": (True,), "LARS": (True,), "Adam": (True, False), "LAMB": (True, False), "Lion": (True,),
          "RMSprop": (False,), "Adagrad": (False,), "AdEMAMix": (True, True, False)}  # fmt: skip


def direction(
    name: str, t: int, group: Mapping[str, Any], p: Floats, g: Floats, s: Sequence[Floats]
) -> tuple[Floats, Any, Any, list[Floats]]:
    """(direction, rate, decay, new states) of step t; Python numbers are float64 until F() rounds them."""
    lr, eps, wd = group["lr"], F(group["eps"]), group["weight_decay"]
    b1, b2, b3 = group["betas"]
    if name in ("SGD", "LARS"):
        m = F(b1) * s[0] + (g + F(wd) * p)
        return m, F(lr), F(1), [m]
    if name in ("RMSprop", "Adagrad"):
        g = g + F(wd) * p
        v = F(b1) * s[0] + F(1 - b1) * (g * g) if name == "RMSprop" else s[0] + g * g
        return g / (np.sqrt(v) + eps), F(lr), F(1), [v]
    decay = F(1 - lr * wd)
    if name == "Lion":
        return np.sign(F(b1) * s[0] + F(1 - b1) * g), F(lr), decay, [F(b2) * s[0] + F(1 - b2) * g]
    m1 = F(b1) * s[0] + F(1 - b1) * g
    v = F(b2) * s[-1] + F(1 - b2) * (g * g)
    root = np.sqrt(v) / F(math.sqrt(1 - b2**t)) + eps
    if name == "Adam":
        return m1 / root, F(lr / (1 - b1**t)), decay, [m1, v]
    if name == "LAMB":
        return F(1 / (1 - b1**t)) * (m1 / root), F(lr), decay, [m1, v]
    alpha = min(t * group["alpha"] / group["t_alpha"], group["alpha"])
    r = t / group["t_beta3"]
    b3 = min(math.exp(math.log(b1) * math.log(b3) / ((1 - r) * math.log(b3) + r * math.log(b1))), b3)
    m2 = F(b3) * s[1] + F(1 - b3) * g
    return (m1 / F(1 - b1**t) + F(alpha) * m2) / root, F(lr), decay, [m1, m2, v]


def step(
    name: str, t: int, group: Mapping[str, Any], p: Floats, g: Floats, s: Sequence[Floats]
) -> tuple[Floats, Floats, list[Floats]]:
    """(new p, direction, new states); a gradient that is NaN, infinite or beyond 2^63 changes nothing."""
    u, rate, decay, new = direction(name, t, group, p, g, s)
    finite = np.abs(g) <= F(2.0**63)
    kept = [np.where(finite, now, before) for now, before in zip(new, s, strict=True)]
    return np.where(finite, decay * p - rate * u, p), np.where(finite, u, F(0)), kept


Coded = tuple[np.ndarray, Floats]


def step_blocks(
    name: str, t: int, group: Mapping[str, Any], p: Floats, g: Floats, s: Sequence[Coded], blocksize: int,
    signs: Sequence[bool] | None = None,
) -> tuple[Floats, Floats, list[Coded]]:  # fmt: skip
    """The same with states as codes and scales. What a bad gradient holds where it was keeps its block's scale from falling."""
    books = ["dynamic_signed" if signed else "dynamic_unsigned" for signed in signs or STATES[name]]
    decoded = [
        VALUES[book][codes] * np.repeat(scales, blocksize)[: len(p)]
        for book, (codes, scales) in zip(books, s, strict=True)
    ]
    p, u, new = step(name, t, group, p, g, decoded)
    bad = ~(np.abs(g) <= F(2.0**63))
    coded = []
    for book, x, (_, before) in zip(books, new, s, strict=True):
        codes, scales = [], []
        for i, start in enumerate(range(0, len(x), blocksize)):
            part = slice(start, start + blocksize)
            held = before[i : i + 1] if bad[part].any() else before[:0]
            scales.append(absmax(np.concatenate([np.where(bad[part], F(0), x[part]), held])))
            codes.append(encode(book, scaled(x[part], scales[-1])))
        coded.append((np.concatenate(codes), np.array(scales, dtype=np.float32)))
    return p, u, coded
