"""The golden digests of `python -m bnbref info`, derived in plain Python: no tensor operation takes part."""

import bisect
import hashlib
import math
import struct

import pytest
import torch

import bnbref
from bnbref.codebooks import DYNAMIC, FP4, NF4
from bnbref.info import why_eager
from bnbref.selfcheck import digest, example, kernels_compiled, run
from bnbref.selfcheck.formats import CHECKS

CPU = torch.device("cpu")


def f32(x):
    """A float64 rounded to float32. For + - * / of two float32 that is the correctly rounded float32 operation."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def next_float(x, ulps):
    """The float32 so many steps up from a positive one."""
    return struct.unpack("<f", struct.pack("<i", struct.unpack("<i", struct.pack("<f", x))[0] + ulps))[0]


def bf16(x):
    """The 16 bits of a float32 rounded to bfloat16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def floats(values):
    return struct.pack(f"<{len(values)}f", *values)


def flat(rows):
    return [v for row in rows for v in row]


def blocks_of(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def beside_thresholds(x, thresholds, size):
    """See bnbref/selfcheck/formats.py."""
    result = []
    for start, block in zip(range(0, len(x), size), blocks_of(x, size), strict=True):
        absmax = max(map(abs, block))
        for i, v in enumerate(block, start):
            turn = i // 2
            threshold = f32(f32(thresholds[turn % len(thresholds)]) * absmax)
            if absmax == 0:
                v = 0.0
            elif i == start:
                v = absmax
            elif i % 2 == 1:
                # a step up in value is a step down in magnitude where the threshold is negative
                step = (turn % 3 - 1) * (1 if threshold >= 0 else -1)
                near = math.copysign(next_float(abs(threshold), step), threshold)
                v = near if turn % 4 < 2 else -near
            result.append(v)
    return result


# What a rule decides, apart from the formats' tables: bound here so that a test can put another rule in its place.
RULES = {
    "scale": lambda v, absmax: f32(v * f32(1 / absmax)),
    "rank": bisect.bisect_left,  # how many thresholds are strictly below
    "int8": lambda v, absmax: f32(v * f32(127 * f32(1 / absmax))),
    "fp4": FP4.thresholds,
}


def scaled(block, rules):
    absmax = max(map(abs, block))
    return absmax, [rules["scale"](v, absmax) if absmax else 0.0 for v in block]


def nf4(v, rules):
    return rules["rank"](NF4.thresholds, v)


def fp4(v, rules):
    return (0, 1, 6, 7, 4, 5, 2, 3)[rules["rank"](rules["fp4"], abs(v))] + 8 * (v < 0)


def pack(codes):
    return bytes(high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True))


def input_values():
    block = [[(31 * i * i + 17 * i) % 8191 - 4095 for i in range(64 * b, 64 * b + 64)] for b in range(256)]
    block[5] = [0] * 64
    return [v * 2.0 ** (b % 5 - 14) for b in range(256) for v in block[b]]


def four_bit(x, rules, encode, book):
    pairs = [scaled(block, rules) for block in blocks_of(beside_thresholds(x, book.thresholds, 64), 64)]
    codes = [[encode(v, rules) for v in block] for _, block in pairs]
    scales = [absmax for absmax, _ in pairs]
    decoded = [bf16(f32(book.values[c] * s)) for s, block in zip(scales, codes, strict=True) for c in block]
    return pack(flat(codes)) + floats(scales) + struct.pack(f"<{len(decoded)}H", *decoded)


def nested(x, rules):
    pairs = [scaled(block, rules) for block in blocks_of(x, 64)]
    packed = pack([nf4(v, rules) for _, block in pairs for v in block])
    scales = [absmax for absmax, _ in pairs]
    offset = f32(sum(scales) / len(scales))  # exact: see `example`
    absmax2, relative = scaled([f32(s - offset) for s in scales], rules)
    codes2 = [rules["rank"](DYNAMIC.thresholds, v) for v in relative]
    restored = [f32(f32(DYNAMIC.values[c] * absmax2) + offset) for c in codes2]
    return packed + bytes(codes2) + floats([absmax2, offset, *restored])


def eight_bit(x, rules):
    pairs = [scaled(block, rules) for block in blocks_of(beside_thresholds(x, DYNAMIC.thresholds, 256), 256)]
    codes = [[rules["rank"](DYNAMIC.thresholds, v) for v in block] for _, block in pairs]
    scales = [absmax for absmax, _ in pairs]
    restored = [f32(DYNAMIC.values[c] * s) for s, block in zip(scales, codes, strict=True) for c in block]
    return bytes(flat(codes)) + floats(scales) + floats(restored)


def llm_int8(x, rules, threshold=3.99):
    rows = blocks_of(beside_thresholds(x, [(code + 0.5) / 127 for code in range(127)], 256), 256)
    columns = [any(abs(row[j]) >= threshold for row in rows) for j in range(256)]
    scales = [max(abs(v) for v in row if abs(v) < threshold) for row in rows]
    codes = [
        # Python's round takes ties to even
        [0 if columns[j] else round(rules["int8"](v, s)) for j, v in enumerate(row)]
        for s, row in zip(scales, rows, strict=True)
    ]
    product = [[sum(map(int.__mul__, a, b)) for b in codes] for a in codes]
    restored = [f32(f32(c * s) * f32(1 / 127)) for s, row in zip(scales, codes, strict=True) for c in row]
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
    "nf4": lambda x, rules: four_bit(x, rules, nf4, NF4),
    "fp4": lambda x, rules: four_bit(x, rules, fp4, FP4),
    "nf4, double quantization": nested,
    "8-bit, dynamic codebook": eight_bit,
    "LLM.int8()": llm_int8,
}
GOLDEN = {check.name: check.golden for check in CHECKS}


def derived(name, **other_rules):
    return hashlib.sha256(DERIVATIONS[name](input_values(), RULES | other_rules)).hexdigest()[:16]


def test_the_example_is_what_its_docstring_says():
    assert example(CPU).tolist() == input_values()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_digests_follow_from_the_formulas(name):
    assert derived(name) == GOLDEN[name]


MIDPOINTS = [f32(f32(a + b) / 2) for a, b in zip(*[sorted({*map(abs, FP4.values)})[i:] for i in (0, 1)], strict=False)]


@pytest.mark.parametrize(
    ("name", "other_rules"),
    [
        pytest.param("nf4", {"scale": lambda v, absmax: f32(v / absmax)}, id="nf4: divide by absmax"),
        pytest.param("nf4", {"rank": bisect.bisect_right}, id="nf4: a tie goes up"),
        pytest.param("fp4", {"scale": lambda v, absmax: f32(v / absmax)}, id="fp4: divide by absmax"),
        pytest.param("fp4", {"rank": bisect.bisect_right}, id="fp4: a tie goes up"),
        pytest.param("fp4", {"fp4": MIDPOINTS}, id="fp4: nearest value instead of CUDA's constants"),
        pytest.param("8-bit, dynamic codebook", {"scale": lambda v, absmax: f32(v / absmax)}, id="8-bit: divide"),
        pytest.param("8-bit, dynamic codebook", {"rank": bisect.bisect_right}, id="8-bit: a tie goes to the odd code"),
        pytest.param("LLM.int8()", {"int8": lambda v, absmax: f32(v * f32(127 / absmax))}, id="int8: 127 / absmax"),
        pytest.param("LLM.int8()", {"int8": lambda v, absmax: f32(f32(v * 127) / absmax)}, id="int8: 127 v / absmax"),
    ],
)
def test_other_rules_of_rounding_have_other_digests(name, other_rules):
    assert derived(name, **other_rules) != GOLDEN[name]


@pytest.mark.skipif(why_eager("cpu") is not None, reason="not compiled here")
def test_every_check_passes_eager_and_compiled():
    results = list(run(CHECKS, CPU, compiled=True, seconds=600))
    assert [r.check.name for r in results if not r.ok or r.compiled is None] == []
    compiled, _ = kernels_compiled()
    assert {"quantize_rows", "dequantize_rows", "quantize_blocks", "dequantize_blocks", "dequantize_nested"} <= {
        *compiled
    }


def test_a_wrong_bit_is_found():
    check = CHECKS[0]
    with bnbref.eager():
        outputs = check.run(example(CPU))
    assert digest(outputs) == check.golden
    outputs[0].view(-1)[0] ^= 1
    assert digest(outputs) != check.golden


def test_nothing_is_compiled_after_the_time():
    assert {r.compiled for r in run(CHECKS, CPU, compiled=True, seconds=0)} == {None}
