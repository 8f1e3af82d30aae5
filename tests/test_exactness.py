"""The digests of `python -m bnbref check --self`, derived in numpy and integers; and that one wrong bit is found."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import second
import torch
from test_ordered import by_hand
from test_selfcheck import input_values

import bnbref
from bnbref import cli, fourbit, info, int8
from bnbref.kernels import REGISTRY
from bnbref.selfcheck import run
from bnbref.selfcheck.kernels import CHECKS, GRADIENTS, GROUP, SCALES, between_codes

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")
GOLDEN = {check.name: check.golden for check in CHECKS}
X = np.array(input_values(), np.float32)


def sixteen_bits(dtype):
    words = np.arange(2**16, dtype=np.uint32)
    return (
        (words << np.uint32(16)).view(np.float32)
        if dtype == BF16
        else words.astype(np.uint16).view(np.float16).astype(np.float32)
    )


def quantized(thresholds, width):
    """The three inputs of an encoder."""
    table = np.asarray(thresholds, np.float32)
    points = np.concatenate([table, np.nextafter(table, np.float32(np.inf)), np.nextafter(table, np.float32(-np.inf))])
    points = np.concatenate([points, -points])
    rows = []
    for scale in np.array(SCALES, np.float32):
        scaled = points * scale
        scaled = np.concatenate([scaled, np.zeros(-len(scaled) % (width - 1), np.float32)]).reshape(-1, width - 1)
        rows.extend(np.concatenate([[scale], part]) for part in scaled)
    return sixteen_bits(BF16), sixteen_bits(F16), np.concatenate(rows).astype(np.float32)


def data(x):
    """The bytes of a result; all NaN are one."""
    if isinstance(x, torch.Tensor):
        nan = x.isnan()
        words = x.view(torch.int16 if x.element_size() == 2 else torch.int32).clone()
        words[nan] = {F32: 0x7FC00000, BF16: 0x7FC0, F16: 0x7E00}[x.dtype]
        return words.numpy().tobytes()
    return np.ascontiguousarray(x).tobytes()


def quantize_rows():
    for name, thresholds in second.THRESHOLDS.items():
        for x in quantized(thresholds, 64):
            packed, absmax = second.quantize_4bit(name, x, 64)
            yield from (bytes(packed), absmax)


def quantize_blocks():
    for name in ("dynamic_signed", "dynamic_unsigned"):
        # the thresholds of the library: a tie to the even code is one ulp lower than the midpoint
        middle = second.midpoints(second.VALUES[name])
        odd = np.arange(len(middle)) % 2 == 0
        for x in quantized(np.where(odd, middle, np.nextafter(middle, np.float32(-np.inf))), 256):
            codes, absmax = second.quantize(name, x, 256)
            yield from (codes.astype(np.uint8), absmax)


def products(values, step, offset=None):
    scales = sixteen_bits(BF16)[::step]
    y = values * scales[:, None]
    return y if offset is None else y + offset


def dequantize_rows():
    for name, dtype in (("nf4", BF16), ("nf4", F32), ("fp4", F16)):
        yield second.rounded(np.tile(products(second.VALUES[name], 1), 4), dtype)


def dequantize_blocks():
    for dtype in (F32, BF16, F16):
        yield second.rounded(products(second.VALUES["dynamic_signed"], 7), dtype)


def dequantize_nested():
    yield second.rounded(products(second.VALUES["dynamic_signed"], 7, np.float32(1 / 3)), F32)


def quantize_int8_rows():
    halves = (np.arange(127) + 0.5) / 127
    for i, x in enumerate(quantized(halves, 64)):
        codes, absmax, outlier = second.int8_quantize(x.reshape(-1, 64), 6.0 * i)
        yield from (codes.astype(np.int8), absmax)
        if i:
            yield np.array(outlier)
    scale = 1 + np.arange(97, dtype=np.float32)[:, None] / np.float32(97)
    middle = halves.astype(np.float32) * scale
    beside = [np.nextafter(middle, np.float32(end)) for end in (np.inf, -np.inf)]
    codes, absmax, _ = second.int8_quantize(np.concatenate([scale, middle, *beside], axis=1), 0.0)
    yield from (codes.astype(np.int8), absmax)


def dequantize_int8_product():
    words = range(-(2**31), 2**31, 2**20 + 1)
    product = [*words, *(w >> 8 for w in words), *(w >> 16 for w in words), *(w % 3 - 1 for w in words)]
    product = np.array(product).reshape(256, 64)
    row, column, bias, outliers = sixteen_bits(BF16)[5::256], np.abs(X[:64]), X[64:128], X.reshape(256, 64)
    yield second.int8_dequantize_product(product, row, column, None, None, F32)
    for dtype in (BF16, F16):
        added = second.floats(second.rounded(outliers, dtype)).reshape(256, 64)
        yield second.int8_dequantize_product(product, row, column, bias, added, dtype)


def multiply_int8_row():
    q = np.arange(256).astype(np.int8)
    product = np.array([[int(np.dot(q.astype(np.int64), np.roll(q, i).astype(np.int64))) for i in range(64)]])
    row = np.float32([1 / 3])
    for dtype in (F32, BF16, F16):
        yield second.int8_dequantize_product(product, row, np.abs(X[:64]), X[64:128], None, dtype)


def dequantize_int8_rows():
    codes = np.arange(256).astype(np.int8).astype(np.float32)
    constant = second.nearest_float32(Fraction(1, 127))
    for dtype in (F32, BF16, F16):
        yield second.rounded(products(codes, 7) * constant, dtype)


def add_products():
    a, b = X[: 8 * 130].reshape(8, 130), X[-130 * 24 :].reshape(130, 24)
    y = by_hand(a, b)
    yield y + X[:24]
    yield y[3]


def gradients():
    """The three gradients, by the description in bnbref/selfcheck/kernels.py."""
    i = np.arange(700)
    for t, factor in enumerate(np.float32([0, 2**-50, 1])):
        special = np.roll(np.array(GRADIENTS, np.float32), -t)[i // 3 % 9]
        g = np.where(i % 3 == t, special, np.ldexp(X[700 * (t + 1) :][:700], i // 64 * 4 - 40)).astype(np.float32)
        g[:256] *= factor
        if t == 2:
            g[600:602] = 2.0**63, np.nextafter(np.float32(-(2.0**63)), np.float32(-np.inf))
        yield g


IN_DIGESTS = ("SGD", "LARS", "Adam", "LAMB", "Lion", "RMSprop", "Adagrad", "AdEMAMix")
"""The rules of the digests, in their order: another rule changes no digest."""


def steps(bits, names=IN_DIGESTS, results=lambda p, u, states: (p, *states)):
    """A zero of the codebooks is code 127 with a sign and code 0 without."""
    for name in names:
        p, signed = X[:700], second.STATES[name]
        states = [np.zeros(700, np.float32) for _ in signed]
        if bits == 8:
            states = [(np.full(700, 127 if s else 0), np.zeros(3, np.float32)) for s in signed]
        for t, g in enumerate(gradients(), 1):
            if bits == 32:
                p, u, states = second.step(name, t, GROUP, p, g, states)
                yield from results(p, u, states)
            else:
                p, u, states = second.step_blocks(name, t, GROUP, p, g, states, 256)
                yield from results(p, u, [x for codes, absmax in states for x in (codes.astype(np.uint8), absmax)])


def step_elements():
    return steps(32)


def step_blocks():
    return steps(8)


def direction_elements():
    return steps(32, ("LARS", "LAMB"), lambda p, u, states: [u])


def direction_blocks():
    return steps(8, ("LARS", "LAMB"), lambda p, u, states: [u])


DERIVATIONS = (quantize_rows, dequantize_rows, quantize_blocks, dequantize_blocks, dequantize_nested, quantize_int8_rows,
               dequantize_int8_product, multiply_int8_row, dequantize_int8_rows, add_products,
               step_elements, step_blocks, direction_elements, direction_blocks)  # fmt: skip


@pytest.mark.parametrize("derive", DERIVATIONS, ids=lambda derive: derive.__name__)
def test_golden_digests_follow_from_the_formulas(derive):
    assert hashlib.sha256(b"".join(map(data, derive()))).hexdigest()[:16] == GOLDEN[derive.__name__]


def test_every_exact_kernel_is_checked():
    assert {check.name for check in CHECKS} == {name for name, kernel in REGISTRY.items() if kernel.exact}
    assert {derive.__name__ for derive in DERIVATIONS} == set(GOLDEN)


def test_the_command(capsys):
    assert cli.main(["check", "--self", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name:<26}eager ok, compiled ok" in out for name in GOLDEN)
    assert (
        f"ok: {5 + len(GOLDEN)} formats and kernels eager, {5 + len(GOLDEN)} compiled, in 14 of 14 exact kernels" in out
    )


def test_a_device_that_is_not_there():
    assert cli.main(["check", "--self", "--device", "moon"]) == 2


@pytest.mark.parametrize("option", [["--backend", "bnbref"], ["--quick"], ["--json", "report.json"]])
def test_what_belongs_to_the_kit_is_refused(option, capsys):
    assert cli.main(["check", "--self", *option]) == 2
    assert f"--self goes with --device alone, got {option[0]}" in capsys.readouterr().err


def verdicts(*names):
    checks = [check for check in CHECKS if check.name in names]
    with bnbref.eager():
        return {result.check.name: result.ok for result in run(checks, CPU, compiled=False)}


INT8_SCALES = {
    "127 / absmax": lambda x, absmax: x * (127 / absmax.double()).float(),
    "127 * (1 / absmax) in float64": lambda x, absmax: x * (127 * (1 / absmax.double())).float(),
    "x * 127 / absmax in float64": lambda x, absmax: x.double() * (127 / absmax.double()),
    "(x * (1 / absmax)) * 127": lambda x, absmax: x * (1 / absmax) * 127,
}


@pytest.mark.parametrize("scaled", INT8_SCALES)
def test_another_precision_of_the_int8_scale_is_found(scaled, monkeypatch):
    """Codes by a scale that is rounded once, or not at all, differ on 3020 and more of the 37054 numbers between codes."""
    right = int8.quantize_int8_rows.definition

    def wrong(rows, *, threshold, **constants):
        _, absmax, columns = right(rows, threshold=threshold, **constants)
        other = INT8_SCALES[scaled](rows.float(), torch.where(absmax > 0, absmax, torch.inf)[:, None]).round()
        keep = (other == other) & ~columns if threshold > 0 else other == other
        return torch.where(keep, other, 0.0).to(torch.int8), absmax, columns

    monkeypatch.setattr(int8.quantize_int8_rows, "definition", wrong)
    assert verdicts("quantize_int8_rows") == {"quantize_int8_rows": False}
    with bnbref.eager():
        got = int8.quantize(between_codes())[0]
    assert (got != right(between_codes(), threshold=0.0)[0]).sum() >= 3020


def test_a_wrong_bit_is_found(monkeypatch, capsys):
    """One bit of the codes of one absmax: another digest, and exit status 1."""
    assert verdicts("quantize_rows") == {"quantize_rows": True}
    right = fourbit.quantize_rows.definition

    def wrong(rows, *tables, **constants):
        packed, absmax = right(rows, *tables, **constants)
        return packed ^ (rows[:, :1] == 3.7727534770965576).to(torch.uint8), absmax

    monkeypatch.setattr(fourbit.quantize_rows, "definition", wrong)
    assert verdicts("quantize_rows") == {"quantize_rows": False}
    monkeypatch.setattr("bnbref.selfcheck.kernels.CHECKS", CHECKS[:1])
    with bnbref.eager():
        assert not info.check_kernels(CPU)
    assert "FAILED: quantize_rows" in capsys.readouterr().out


def test_it_says_that_subnormal_floats_are_flushed(monkeypatch, capsys):
    monkeypatch.setattr("bnbref.selfcheck.kernels.CHECKS", [c for c in CHECKS if c.name == "quantize_blocks"])
    torch.set_flush_denormal(True)
    try:
        with bnbref.eager():
            assert not info.check_kernels(CPU)
    finally:
        torch.set_flush_denormal(False)
    assert "The cause may be that this process flushes subnormal floats to zero" in capsys.readouterr().out
