"""The golden digests of `python -m bnbref info`, derived in plain Python: no tensor operation takes part."""

import bisect
import hashlib
import struct

import pytest
import torch

from bnbref.codebooks import DYNAMIC, FP4, NF4
from bnbref.selfcheck import CHECKS, digest, example, kernels_compiled, self_check

CPU = torch.device("cpu")


def f32(x):
    """A float64 rounded to float32. For + - * / of two float32 that is the correctly rounded float32 operation."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def bf16(x):
    """The 16 bits of a float32 rounded to bfloat16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def floats(values):
    return struct.pack(f"<{len(values)}f", *values)


def blocks_of(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def flat(rows):
    return [v for row in rows for v in row]


def scaled(block):
    """absmax, and x * (1 / absmax) in float32; zeros for a block of zeros."""
    absmax = max(map(abs, block))
    inverse = f32(1 / absmax) if absmax else 0.0
    return absmax, [f32(v * inverse) for v in block]


def rank(x, thresholds):
    """How many thresholds are strictly below x."""
    return bisect.bisect_left(thresholds, x)


def nf4(v):
    return rank(v, NF4.thresholds)


def fp4(v):
    return (0, 1, 6, 7, 4, 5, 2, 3)[rank(abs(v), FP4.thresholds)] + 8 * (v < 0)


def pack(codes):
    return bytes(high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True))


def input_values():
    block = [[(31 * i * i + 17 * i) % 8191 - 4095 for i in range(64 * b, 64 * b + 64)] for b in range(256)]
    block[5] = [0] * 64
    return [v * 2.0 ** (b % 5 - 14) for b in range(256) for v in block[b]]


def four_bit(x, encode, values):
    scales, codes = zip(*map(scaled, blocks_of(x, 64)), strict=True)
    codes = [[encode(v) for v in block] for block in codes]
    decoded = [bf16(f32(values[c] * s)) for s, block in zip(scales, codes, strict=True) for c in block]
    return pack(flat(codes)) + floats(scales) + struct.pack(f"<{len(decoded)}H", *decoded)


def nested(x):
    scales, codes = zip(*map(scaled, blocks_of(x, 64)), strict=True)
    packed = pack([nf4(v) for block in codes for v in block])
    offset = f32(sum(scales) / len(scales))  # exact: see `example`
    absmax2, relative = scaled([f32(s - offset) for s in scales])
    codes2 = [rank(v, DYNAMIC.thresholds) for v in relative]
    restored = [f32(f32(DYNAMIC.values[c] * absmax2) + offset) for c in codes2]
    return packed + bytes(codes2) + floats([absmax2, offset, *restored])


def eight_bit(x):
    scales, relative = zip(*map(scaled, blocks_of(x, 256)), strict=True)
    codes = [[rank(v, DYNAMIC.thresholds) for v in block] for block in relative]
    restored = [f32(DYNAMIC.values[c] * s) for s, block in zip(scales, codes, strict=True) for c in block]
    return bytes(flat(codes)) + floats(scales) + floats(restored)


def llm_int8(x, threshold=3.99):
    rows = blocks_of(x, 256)
    columns = [any(abs(row[j]) >= threshold for row in rows) for j in range(256)]
    scales = [max(abs(v) for v in row if abs(v) < threshold) for row in rows]
    codes = [
        # round() of Python takes ties to even
        [0 if columns[j] else round(f32(v * f32(127 / s))) for j, v in enumerate(row)]
        for s, row in zip(scales, rows, strict=True)
    ]
    product = [[sum(map(int.__mul__, a, b)) for b in codes] for a in codes]
    seventh = f32(1 / 127)
    restored = [f32(f32(c * s) * seventh) for s, row in zip(scales, codes, strict=True) for c in row]
    y = [
        f32(f32(f32(p * a) * b) * f32(1 / 16129))
        for a, row in zip(scales, product, strict=True)
        for b, p in zip(scales, row, strict=True)
    ]
    return (
        struct.pack(f"<{len(x)}b", *flat(codes))
        + floats(scales)
        + bytes(columns)
        + floats(restored)
        + struct.pack(f"<{64 * 64}i", *flat(product))
        + floats(y)
    )


DERIVATIONS = {
    "nf4": lambda x: four_bit(x, nf4, NF4.values),
    "fp4": lambda x: four_bit(x, fp4, FP4.values),
    "nf4, double quantization": nested,
    "8-bit, dynamic codebook": eight_bit,
    "LLM.int8()": llm_int8,
}


def test_the_example_is_what_its_docstring_says():
    assert example(CPU).tolist() == input_values()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_golden_digests_follow_from_the_formulas(check):
    assert hashlib.sha256(DERIVATIONS[check.name](input_values())).hexdigest()[:16] == check.golden


def test_every_check_passes_eager_and_compiled():
    results = list(self_check(CPU, compiled=True, seconds=600))
    assert [r.check.name for r in results if not r.ok or r.compiled is None] == []
    compiled, _ = kernels_compiled()
    assert {"quantize_rows", "dequantize_rows", "quantize_blocks", "dequantize_blocks", "dequantize_nested"} <= {
        *compiled
    }


def test_a_wrong_bit_is_found():
    golden = CHECKS[0]
    outputs = golden.run(example(CPU))
    assert digest(outputs) == golden.golden
    outputs[0].view(-1)[0] ^= 1
    assert digest(outputs) != golden.golden


def test_nothing_is_compiled_after_the_time():
    assert {r.compiled for r in self_check(CPU, compiled=True, seconds=0)} == {None}
