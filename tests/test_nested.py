"""Double quantization: two roundings, never a fused multiply-add, and an offset that is a mean."""

from fractions import Fraction

import numpy as np
import pytest
import second
import torch
from conftest import difference, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from strategies import BF16, F32, any_float, scales

import bnbref
from bnbref import functional as F
from bnbref import nested
from bnbref.codebooks import DYNAMIC, value_table

VALUES = value_table(DYNAMIC, torch.device("cpu"))


def some_scales(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g).abs() + 0.01


def check(absmax: torch.Tensor) -> None:
    """Codes, second scales and reconstruction, given the offset; the offset is checked on its own."""
    before = absmax.clone()
    codes, absmax2, offset = nested.quantize(absmax)
    assert same_bits(absmax, before)
    want_codes, want_absmax2 = second.nested_quantize(absmax.numpy(), np.float32(offset.item()))
    assert codes.tolist() == want_codes.tolist()
    assert same_bits(absmax2, torch.from_numpy(want_absmax2))
    got = nested.dequantize(codes, absmax2, VALUES, offset)
    want = torch.from_numpy(second.nested_dequantize(codes.tolist(), absmax2.numpy(), np.float32(offset.item())))
    assert same_bits(got, want), difference(got, want, absmax)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 512, 700])
def test_sizes(n, mode):
    check(some_scales(n))
    check(torch.full((n,), 3.0))  # all equal: every difference is 0


def test_nothing(mode):
    codes, absmax2, offset = nested.quantize(torch.zeros(0))
    assert (codes.shape, absmax2.shape, offset.item()) == ((0,), (0,), 0.0)
    assert nested.dequantize(codes, absmax2, VALUES, offset).shape == (0,)


@given(st.lists(scales() | st.just(0.0), min_size=1, max_size=300))
def test_any_scales(drawn):
    with running("eager"):
        check(torch.tensor(drawn))


@given(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=400))
def test_the_offset_is_the_mean(drawn):
    """Within the error of any order of summation: n - 1 additions and a division, each with u = 2^-24, so that
    |offset - mean| <= ((1 + u)^n - 1) mean <= 1.01 n u mean, as all scales are positive."""
    offset = nested.quantize(torch.tensor(drawn))[2]
    mean = sum(map(Fraction, drawn)) / len(drawn)
    assert abs(Fraction(offset.item()) - mean) <= Fraction(101, 100) * len(drawn) * Fraction(1, 2**24) * mean


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_two_roundings(mode):
    """Any codes, scales and offset; and inputs where a fused multiply-add would give another float."""
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (1024,), generator=g, dtype=torch.uint8)
    absmax2, offset = some_scales(4), torch.tensor(0.7978846)
    with running(mode):
        got = nested.dequantize(codes, absmax2, VALUES, offset)
    want = second.nested_dequantize(codes.tolist(), absmax2.numpy(), np.float32(offset.item()))
    assert same_bits(got, torch.from_numpy(want)), difference(got, torch.from_numpy(want))
    exact = [
        Fraction(DYNAMIC.values[c]) * Fraction(absmax2[i // 256].item()) + Fraction(offset.item())
        for i, c in enumerate(codes.tolist())
    ]
    fused = np.array([second.nearest_float32(x) for x in exact])
    assert (fused != want).sum() > 50, "these inputs would not notice a fused multiply-add"


@given(st.lists(any_float(), min_size=1, max_size=8), any_float())
def test_reconstruction_of_anything(absmax2, offset):
    """Infinities and NaN too: the formula, as it stands."""
    codes = torch.arange(256 * len(absmax2)).to(torch.uint8)
    got = nested.dequantize(codes, torch.tensor(absmax2), VALUES, torch.tensor(offset))
    want = second.nested_dequantize(codes.tolist(), np.array(absmax2, np.float32), np.float32(offset))
    assert same_bits(got, torch.from_numpy(want)), difference(got, torch.from_numpy(want))


@pytest.mark.parametrize("blocksize", [1, 7, 64, 4096])
def test_any_inner_blocksize(blocksize):
    codes = torch.arange(500).to(torch.uint8)
    absmax2 = some_scales(-(-500 // blocksize))
    with running("eager"):
        got = nested.dequantize(codes, absmax2, VALUES, torch.tensor(0.5), blocksize)
    want = second.nested_dequantize(codes.tolist(), absmax2.numpy(), np.float32(0.5), blocksize)
    assert same_bits(got, torch.from_numpy(want))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_zero_block_is_zero_after_double_quantization(quant_type, mode):
    """bitsandbytes' CUDA kernel gives an all-zero NF4 block code 0, which decodes to minus its reconstructed scale."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=g).to(BF16 if quant_type == "nf4" else torch.float16)
    x[3] = 0
    x[17] = -0.0
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
    assert bool((state.scales()[[3, 17]] != 0).all()), "the reconstructed scale of a zero block is not 0"
    decoded = F.dequantize_4bit(packed, state)
    assert not decoded[[3, 17]].any()
    assert bool(decoded[[0, 1, 2, 4]].any())


def test_the_state_of_a_tensor(mode):
    """quantize_4bit composes the two quantizations and nothing else."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(300, 65, generator=g)
    packed, plain = F.quantize_4bit(x, quant_type="nf4")
    again, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    codes, absmax2, offset = nested.quantize(plain.absmax)
    assert same_bits((again, state.absmax, state.state2.absmax, state.offset), (packed, codes, absmax2, offset))
    assert (state.nested, state.state2.blocksize, state.state2.dtype) == (True, 256, F32)
    assert same_bits(state.state2.code, VALUES)
    want = second.nested_dequantize(codes.tolist(), absmax2.numpy(), np.float32(offset.item()))
    assert same_bits(state.scales(), torch.from_numpy(want))


def test_errors():
    codes = torch.zeros(257, dtype=torch.uint8)
    with pytest.raises(ValueError) as caught:
        nested.dequantize(codes, torch.ones(1), VALUES, torch.tensor(0.0))
    assert_expected_inline(
        str(caught.value), """absmax2 must have one scale per block: 2 for 257 elements in blocks of 256, got 1"""
    )
    with pytest.raises(ValueError, match=r"absmax must be float32, .* got torch\.float64"):
        nested.quantize(torch.ones(3, dtype=torch.float64))


def test_states_of_which_one_lacks_a_field_are_unequal():
    absmax = torch.ones(1)
    with_values, without = F.QuantState(absmax, code=VALUES), F.QuantState(absmax)
    assert with_values != without
    assert without != with_values
    without.to("cpu")
    assert with_values == F.QuantState(absmax.clone(), code=VALUES.clone())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("codes", torch.ones(4), r"codes of scales must be uint8, got torch\.float32"),
        ("codes", torch.zeros(4, dtype=torch.uint8, device="meta"), "absmax2 must be on the device of codes, meta"),
        ("absmax2", torch.ones(1, device="meta"), "absmax2 must be on the device of codes, cpu"),
        ("values", VALUES[:3], r"values of scales must be float32 with 256 elements, got torch\.float32 \(3,\)"),
        ("values", VALUES.double(), r"values of scales must be float32 with 256 elements, got torch\.float64"),
        ("offset", torch.ones(4), r"offset of scales must be float32 with 1 elements, got torch\.float32 \(4,\)"),
        ("offset", torch.tensor(1), r"offset of scales must be float32 with 1 elements, got torch\.int64"),
        ("blocksize", 0, "blocksize must be a positive integer, got 0"),
    ],
)
def test_what_undoes_the_second_quantization_fits(field, value, said, mode):
    """Compiled, a table that is too short was read beyond its end; codes on meta gave whatever was in memory."""
    right = {"codes": torch.full((4,), 255, dtype=torch.uint8), "absmax2": torch.ones(1), "values": VALUES}
    right["offset"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=said):
        nested.dequantize(**{**right, field: value})


def test_the_scales_of_a_state_that_was_changed_are_checked_in_a_product():
    """Also where the product of a parameter is prepared, which then asks no more."""
    layer = bnbref.nn.Linear4bit(64, 4, bias=False, quant_type="nf4").to("cpu")
    layer.weight.quant_state.state2.code = VALUES[:3]
    for rows in (1, 2):
        with pytest.raises(ValueError, match="values of scales must be float32 with 256 elements"):
            layer(torch.ones(rows, 64))
