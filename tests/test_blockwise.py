"""Eight bits, blockwise: codes, scales and decoded values against the second implementation."""

from fractions import Fraction

import numpy as np
import pytest
import second
import torch
from conftest import difference, hexes, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BF16, F16, F32, LAYOUTS, laid_out, scales, tensors

from bnbref import blockwise
from bnbref.blockwise import in_rows
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, Codebook, fp8, linear, value_table

CPU = torch.device("cpu")
BOOKS = {
    "dynamic_signed": DYNAMIC,
    "dynamic_unsigned": DYNAMIC_UNSIGNED,
    "linear_signed": linear(),
    "linear_unsigned": linear(False),
    "fp8_s_e4p3t8": fp8(True, 4, 3),
}
# What runs compiled as well; these variants are those of the proofs.
COMPILED = [("dynamic_signed", F32), ("dynamic_unsigned", BF16), ("linear_signed", F32)]
DTYPES = (F32, BF16, F16)


def expected(name: str, x: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, absmax = second.quantize(name, second.floats(x), blocksize)
    return torch.from_numpy(codes).to(torch.uint8).view(x.shape), torch.from_numpy(absmax)


def check(name: str, x: torch.Tensor, blocksize: int) -> None:
    """Codes and scales as expected, the caller's tensor as it was."""
    before = x.detach().clone()
    got = blockwise.quantize(x, BOOKS[name], blocksize)
    want = expected(name, x, blocksize)
    assert same_bits(got, want), difference(got, want, before)
    assert same_bits(x, before)
    assert not got[0].requires_grad


# ---- the second implementation is itself arithmetic -----------------------------------------------------------------


@given(st.floats(2.0**-126, 2.0**126, width=32), st.floats(-(2.0**20), 2.0**20, width=32))
def test_numpy_rounds_once(scale, x):
    """1 / absmax and x * (1 / absmax) are the float32 nearest to the rational numbers (where those are normal)."""
    reciprocal = second.nearest_float32(1 / Fraction(scale))
    assert np.float32(1.0) / np.float32(scale) == reciprocal
    product = Fraction(x) * Fraction(float(reciprocal))
    if 2.0**-126 < abs(product) < 2.0**127:
        assert second.scaled(np.array([x], np.float32), np.float32(scale))[0] == second.nearest_float32(product)


@given(st.floats(width=32))
def test_rounding_to_sixteen_bits(x):
    for dtype in (BF16, F16):
        assert same_bits(second.rounded(np.float32(x), dtype), torch.tensor(x).to(dtype)), x


# ---- encode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), COMPILED, ids=str)
def test_quantize(name, dtype, mode):
    """256 elements a block, in every layout, with every tail."""

    @given(tensors(BOOKS[name], 256, dtype))
    def run(x):
        check(name, x, 256)

    run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [1, 7, 24, 64, 100, 4096])
def test_any_blocksize(blocksize, dtype):
    for name in BOOKS:

        @settings(max_examples=4 if blocksize < 4096 else 1)
        @given(tensors(BOOKS[name], blocksize, dtype), st.just(name))
        def run(x, name):
            with running("eager"):
                check(name, x, blocksize)

        run()


def test_default_blocksize_of_4096_compiled():
    """A power of two, a tail and a whole number of blocks through one kernel."""
    g = torch.Generator().manual_seed(0)
    for n in (1, 4095, 4096, 4097, 12288):
        check("dynamic_signed", torch.randn(n, generator=g), 4096)


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (0, 5), (2, 0, 3), (5,), (3, 5, 7), (2, 2, 2, 32), (257,), (513,)], ids=str
)
def test_shapes(shape, mode):
    g = torch.Generator().manual_seed(0)
    check("dynamic_signed", torch.randn(shape, generator=g), 256)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, mode):
    g = torch.Generator().manual_seed(0)
    for n in (6, 256, 510, 512, 768):
        for name, dtype in COMPILED:
            x = laid_out(torch.randn(n, generator=g).to(dtype), layout)
            check(name, x, 256)


def test_every_sixteen_bit_float_is_encoded(mode):
    """All 2^16 bfloat16 and float16, at scale 1 where they are no larger, else in a block of their own."""
    for dtype, names in ((BF16, ["dynamic_unsigned"]), (F16, ["dynamic_signed"])):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        small = every[every.abs() <= 1]
        blocks = torch.ones(-(-small.numel() // 255), 256, dtype=dtype)
        blocks[:, 1:] = torch.nn.functional.pad(small, (0, -small.numel() % 255)).view(-1, 255)
        for name in names if mode == "compiled" else BOOKS:
            codes, absmax = blockwise.quantize(blocks, BOOKS[name], 256)
            assert bool((absmax == 1).all())
            want = torch.from_numpy(second.encode(name, second.floats(blocks))).to(torch.uint8).view(blocks.shape)
            assert same_bits(codes, want), difference(codes, want)
            rest = every[~(every.abs() <= 1)]  # NaN and infinities too
            for block in rest.split(2**14) if mode == "compiled" else ():
                check(name, block, 256)


def test_edges_of_the_scale(mode):
    """design.md's table: absmax, 1 / absmax, NaN and infinity."""
    inf, nan, tiny = float("inf"), float("nan"), 2.0**-126
    below = float(np.nextafter(np.float32(tiny), np.float32(0)))
    largest = float(np.finfo(np.float32).max)

    def shown(*values: float) -> str:
        codes, absmax = blockwise.quantize(torch.tensor(values), DYNAMIC, 256)
        return f"{hexes(absmax)}: {codes.tolist()}"

    lines = [
        shown(0.0, -0.0, 0.0),
        shown(nan, 1.0, -1.0),
        shown(nan, nan),
        shown(inf, -inf, 1.0, 0.0, nan),
        shown(tiny, -tiny, 0.0),
        shown(below, -below, 0.0),
        shown(largest, -largest, largest / 2),
        shown(2.0**127, 2.0**100, 1.0),
        shown(1.0, 2.0**-149, -(2.0**-149)),
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
00000000: [127, 127, 127]
3f800000: [0, 255, 0]
00000000: [0, 0]
7f800000: [0, 0, 127, 127, 0]
00800000: [255, 0, 127]
00000000: [127, 127, 127]
7f7fffff: [255, 0, 219]
7f000000: [255, 127, 127]
3f800000: [255, 127, 127]""",
    )


def test_ties_go_to_the_even_code(mode):
    """Every midpoint of the signed map: at it, one ulp above, one ulp below."""
    middle = second.midpoints(second.VALUES["dynamic_signed"])
    for step, offsets in ((0, None), (np.inf, 1), (-np.inf, 0)):
        points = middle if step == 0 else np.nextafter(middle, np.float32(step))
        codes, _ = blockwise.quantize(torch.from_numpy(np.append(points, np.float32(1))), DYNAMIC, 256)
        below = np.arange(255)
        want = below + (below % 2 == 1) if offsets is None else below + offsets
        assert codes[:255].tolist() == want.tolist(), step


# ---- decode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(dtype, mode):
    """All 256 codes times any scale; a tail; any layout."""
    if dtype == F16 and mode == "compiled":
        pytest.skip("not a compiled variant of the proofs")
    values = value_table(DYNAMIC, CPU)

    @settings(max_examples=30)
    @given(
        scales() | st.sampled_from([-1.0, float("inf"), float("nan")]), st.integers(0, 255), st.sampled_from(LAYOUTS)
    )
    def run(scale, tail, layout):
        codes = torch.arange(512 + tail).to(torch.uint8)
        absmax = torch.tensor([1.0, scale, 3.0])[: -(-codes.numel() // 256)]
        given_codes = laid_out(codes, layout)
        flat = given_codes.reshape(-1).tolist()
        got = blockwise.dequantize(given_codes, absmax, values, 256, dtype)
        want = second.dequantize(second.VALUES["dynamic_signed"], flat, absmax.numpy(), 256, dtype).view(
            given_codes.shape
        )
        assert same_bits(got, want), difference(got, want, absmax)

    run()


@pytest.mark.parametrize("blocksize", [1, 7, 24, 64, 100, 4096])
def test_dequantize_any_blocksize(blocksize):
    g = torch.Generator().manual_seed(0)
    with running("eager"):
        for n in (0, 1, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 2):
            codes = torch.randint(0, 256, (n,), generator=g, dtype=torch.uint8)
            absmax = torch.randn(-(-n // blocksize), generator=g)
            got = blockwise.dequantize(codes, absmax, value_table(DYNAMIC, CPU), blocksize, F32)
            want = second.dequantize(second.VALUES["dynamic_signed"], codes.tolist(), absmax.numpy(), blocksize, F32)
            assert same_bits(got, want), difference(got, want)


@given(tensors(DYNAMIC, 256, F32))
def test_a_second_round_trip_changes_nothing(x):
    """Decoded values are fixed points: encoding them gives the same codes, wherever the largest value is representable."""
    codes, absmax = blockwise.quantize(x, DYNAMIC, 256)
    decoded = blockwise.dequantize(codes, absmax, value_table(DYNAMIC, CPU), 256, F32)
    assert decoded.shape == x.shape
    normal = bool((x.abs() <= 2.0**120).all()) and bool((absmax > 2.0**-100).all())
    if decoded.numel() and normal:
        again, absmax2 = blockwise.quantize(decoded, DYNAMIC, 256)
        same_scale = (absmax2 == absmax).repeat_interleave(256)[: x.numel()]
        assert torch.equal(again.reshape(-1)[same_scale], codes.reshape(-1)[same_scale])


def test_all_zero_blocks_decode_to_zero(mode):
    for name, dtype in COMPILED[:2]:
        x = torch.zeros(700, dtype=dtype)
        codes, absmax = blockwise.quantize(x, BOOKS[name], 256)
        assert codes.unique().tolist() == [BOOKS[name].code_of_zero]
        assert absmax.tolist() == [0.0, 0.0, 0.0]
        assert same_bits(blockwise.dequantize(codes, absmax, value_table(BOOKS[name], CPU), 256, F32), torch.zeros(700))


# ---- rows -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 12), st.sampled_from(LAYOUTS), st.sampled_from([F32, BF16, torch.uint8]))
def test_in_rows(n, width, layout, dtype):
    x = laid_out(torch.arange(1, n + 1).to(dtype), layout if n or layout != "expanded" else "plain")
    rows = in_rows(x, width)
    flat = rows.reshape(-1)
    assert rows.shape[1] == width
    assert rows.shape[0] == max(2, -(-x.numel() // width))
    assert rows.is_contiguous()
    assert torch.equal(flat[: x.numel()], x.detach().reshape(-1))
    assert not flat[x.numel() :].any()
    assert rows.storage_offset() * rows.itemsize % 8 == 0


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors():
    x, codes = torch.ones(8), torch.zeros(8, dtype=torch.uint8)
    values = value_table(DYNAMIC, CPU)

    def error(function, *args):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(*args)
        return str(caught.value)

    messages = [
        error(blockwise.quantize, x.double(), DYNAMIC, 4),
        error(blockwise.quantize, codes, DYNAMIC, 4),
        error(blockwise.quantize, x, DYNAMIC, 0),
        error(blockwise.quantize, x, DYNAMIC, -1),
        error(blockwise.quantize, x, DYNAMIC, 4.0),
        error(blockwise.quantize, x, FP4, 4),
        error(blockwise.quantize, x, Codebook("down", (1.0, 0.0), (0.5,), order=(1, 0)), 4),
        error(blockwise.dequantize, x, torch.ones(2), values, 4, F32),
        error(blockwise.dequantize, codes, torch.ones(2), values, 4, torch.float64),
        error(blockwise.dequantize, codes, torch.ones(3), values, 4, F32),
        error(blockwise.dequantize, codes, torch.ones(1), values, 4, F32),
        error(blockwise.dequantize, codes, torch.ones(2), values, 0, F32),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
x must be float32, float16 or bfloat16, got torch.float64
x must be float32, float16 or bfloat16, got torch.uint8
blocksize must be a positive integer, got 0
blocksize must be a positive integer, got -1
blocksize must be an integer, got 4.0
codebook 'fp4' is not in the order of its values; 8-bit codes are ranks
codebook 'down' is not in the order of its values; 8-bit codes are ranks
codes must be uint8, got torch.float32
dtype must be float32, float16 or bfloat16, got torch.float64
absmax must have one scale per block: 2 for 8 elements in blocks of 4, got 3
absmax must have one scale per block: 2 for 8 elements in blocks of 4, got 1
blocksize must be a positive integer, got 0""",
    )
