"""Weights of 16 bits with a correction: every float32 comes back, or the bound; and every rule trains as on float32 weights."""

import copy
import math
import struct
from fractions import Fraction

import pytest
import torch
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import RULES
from torch import nn

import bnbref
from bnbref import optim
from bnbref.optim import weights
from bnbref.optim.equation import at_step
from bnbref.optim.step import step_blocks, step_elements
from test_optim_classes import ALL, make

BF16, F16 = torch.bfloat16, torch.float16
KINDS = [(BF16, torch.int16), (BF16, torch.int8), (F16, torch.int16), (F16, torch.int8)]
each_kind = pytest.mark.parametrize(("dtype", "correction"), KINDS)
quick = pytest.mark.usefixtures("eager")


@st.composite
def float32s(draw):
    """Float32s of all magnitudes: any bits; a number of 16 bits and its neighbours; the middle of two, and its neighbours."""
    bits = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["any", "bfloat16", "float16", "small"]))
    if kind == "bfloat16":
        bits = (bits & 0xFFFF8000) + draw(st.sampled_from([-257, -129, -128, -127, -1, 0, 1, 127, 128, 129, 255])) & 0xFFFFFFFF
    if kind == "float16":
        near = draw(st.floats(width=16, allow_nan=False))
        bits = (struct.unpack("I", struct.pack("f", near))[0] & 0xFFFFF000) + draw(st.integers(-40, 40)) & 0xFFFFFFFF
    if kind == "small":
        bits &= 0x8001FFFF
    return struct.unpack("f", struct.pack("I", bits))[0]


def tensor(values):
    """Exactly these floats: torch.tensor goes by way of float64, which keeps every float32."""
    return torch.tensor(values, dtype=torch.float32)


def nearest_away(x: float, dtype: torch.dtype) -> float:
    """x rounded to the nearest number of a dtype, a tie away from zero, in exact arithmetic."""
    digits, smallest, largest = (8, -133, math.inf) if dtype == BF16 else (11, -24, 65520.0)
    if not abs(x) < largest or x == 0:
        return math.copysign(math.inf, x) if not math.isnan(x) and x != 0 else x
    unit = Fraction(2) ** max(math.frexp(x)[1] - digits, smallest)
    count = Fraction(abs(x)) / unit
    return math.copysign(float((2 * count + 1) // 2 * unit), x)


@quick
@each_kind
@given(st.lists(float32s(), min_size=1, max_size=40))
def test_split_and_exact(dtype, correction, values):
    x = tensor(values)
    p, c = weights.split(x, dtype, correction)
    back = weights.exact(p, c)
    assert p.dtype == dtype and c.dtype == correction and back.dtype == torch.float32
    if (dtype, correction) == (BF16, torch.int16):
        assert same_bits(torch.where(x.isnan(), 0.0, back), torch.where(x.isnan(), 0.0, x))
    for one, near, got in zip(values, p.tolist(), back.tolist(), strict=True):
        if math.isnan(one):
            assert math.isnan(near) and math.isnan(got)
            continue
        assert math.copysign(1, one) == math.copysign(1, got) == math.copysign(1, near)
        if correction == torch.int16:
            want = nearest_away(one, dtype)  # bfloat16 has no number above its largest but infinity
            assert near == (want if abs(want) < 2.0**128 else math.copysign(math.inf, one))
        if math.isinf(got) or math.isinf(one):
            assert abs(one) >= (65520 - 2**-4 * 2 if dtype == F16 else (2 - 2.0**-16) * 2.0**127)
            continue
        # Half of the last bit that is kept. Of 24 bits: 16 of significand, or 19. A product with 2^-112 rounds once more, to a
        # multiple of 2^-149, which is one of 2^-37.
        error = abs(Fraction(got) - Fraction(one))
        if dtype == BF16:
            bound = 0 if correction == torch.int16 else max(Fraction(abs(one)) / 2**16, Fraction(2) ** -142)
        else:
            below = Fraction(2) ** -38 if abs(one) < 2**-14 else 0
            bound = below if correction == torch.int16 else max(Fraction(abs(one)) / 2**19, Fraction(2) ** -33) + below
        assert error <= bound, (one, near, got)


@quick
@each_kind
@given(st.lists(float32s(), min_size=1, max_size=40))
def test_what_was_split_is_split_alike(dtype, correction, values):
    p, c = weights.split(tensor(values), dtype, correction)
    again = weights.split(weights.exact(p, c), dtype, correction)
    assert same_bits(p.float().nan_to_num(), again[0].float().nan_to_num()) and torch.equal(c, again[1])


def test_every_bfloat16_with_every_correction_is_a_float32_of_its_own():
    """All 2^32: the pairs of a finite parameter number the float32s, with no gap, and come back."""
    steps = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for high in [*range(0, 0x7F80, 97), 1, 0x7F7F]:
        p = torch.full((2**16,), high, dtype=torch.int16).view(BF16)
        c = steps.clamp(min=0) if high == 0 else steps
        x = weights.exact(p, c.to(torch.int16))
        assert torch.equal(x.view(torch.int32), (high << 16) + c)
        for sign in (1, -1):
            q, rest = weights.split(sign * x, BF16, torch.int16)
            assert same_bits(q, sign * p) and torch.equal(rest.to(torch.int32), c)


@quick
@each_kind
def test_a_parameter_that_somebody_sets_keeps_its_sign(dtype, correction):
    least, most = torch.iinfo(correction).min, torch.iinfo(correction).max
    p = torch.tensor([0.0, -0.0, 0.0, 1.0, -1.0], dtype=dtype)
    got = weights.exact(p, torch.tensor([least, least, most, least, least], dtype=correction))
    assert got[:2].tolist() == [0, 0] and 0 < got[2] < 2**-14
    assert (got[3:] - p[3:].float()).abs().max() <= 2**-5


@pytest.mark.parametrize(("dtype", "correction"), KINDS)
@pytest.mark.parametrize("kernel", [step_elements, step_blocks], ids=lambda k: k.name)
def test_compiled_is_eager(kernel, dtype, correction):
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    rule, hyper = at_step(optim.rules.Adam(), 3, group)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (8 * 256,), generator=generator)
    x = bits.to(torch.int32).view(torch.float32).view(8, 256)
    x = torch.where(x.isnan(), 1.0, x)
    p, c = weights.split(x, dtype, correction)
    g = torch.randn(8, 256, generator=generator).to(dtype)
    g[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    codes = [torch.randint(0, 256, (8, 256), generator=generator, dtype=torch.uint8) for _ in range(2)]
    floats = [torch.randn(8, 256, generator=generator), torch.rand(8, 256, generator=generator)]
    states = [y for k in codes for y in (k, torch.rand(8, generator=generator))]
    if kernel is step_elements:
        p, g, c, states = p.view(-1), g.view(-1), c.view(-1), [f.view(-1) for f in floats]
    results = []
    for compiled in (True, False):
        args = [y.clone() for y in (p, g, hyper)] + [None] + [y.clone() for y in (*states, c)]
        if compiled:
            kernel(*args, rule=rule)
        else:
            with bnbref.eager():
                kernel(*args, rule=rule)
        results.append([y for y in args if y is not None])
        assert same_bits(args[0].view(-1)[:3], p.view(-1)[:3]) and torch.equal(args[-1].view(-1)[:3], c.view(-1)[:3])
    assert all(map(same_bits, *results))
