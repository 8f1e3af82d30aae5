"""Four bits: codes, packing, scales, storage and decoded values against the second implementation."""

import numpy as np
import pytest
import second
import torch
from conftest import difference, hexes, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BF16, F16, F32, LAYOUTS, laid_out, neighbours, scales, tensors

from bnbref import fourbit
from bnbref.blockwise import encode
from bnbref.codebooks import AF4, FOUR_BIT, FP4, INT4, NF4

DTYPES = (F32, BF16, F16)
# What runs compiled as well; these variants are those of the proofs.
COMPILED = [("nf4", BF16, 64), ("nf4", F32, 64), ("fp4", F16, 64), ("af4", F32, 7)]
BLOCKSIZES = [1, 7, 24, 64, 100, 4096]


def expected(name: str, x: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    data, absmax = second.quantize_4bit(name, second.floats(x), blocksize)
    return torch.tensor(data, dtype=torch.uint8).view(-1, 1), torch.from_numpy(absmax)


def check(name: str, x: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and scales as expected, decoded values too, the caller's tensor as it was."""
    before = x.detach().clone()
    got = fourbit.quantize(x, FOUR_BIT[name], blocksize)
    want = expected(name, x, blocksize)
    assert same_bits(got, want), difference(got, want, before)
    assert same_bits(x, before)
    assert not got[0].requires_grad
    return got


def check_decoding(name: str, packed, absmax, blocksize: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    got = fourbit.dequantize(packed, absmax, FOUR_BIT[name], blocksize, shape, dtype)
    codes = second.unpack(packed.reshape(-1).view(torch.uint8).tolist(), int(np.prod(shape)))
    want = second.dequantize(second.VALUES[name], codes, absmax.numpy(), blocksize, dtype).view(shape)
    assert same_bits(got, want), difference(got, want, packed, absmax)


# ---- encode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype", "blocksize"), COMPILED, ids=str)
def test_quantize(name, dtype, blocksize, mode):
    """Every layout, every tail, odd lengths, nothing at all; and back again."""

    @given(tensors(FOUR_BIT[name], blocksize, dtype))
    def run(x):
        packed, absmax = check(name, x, blocksize)
        check_decoding(name, packed, absmax, blocksize, tuple(x.shape), dtype)

    run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_any_blocksize(blocksize, dtype):
    for name in FOUR_BIT:

        @settings(max_examples=5 if blocksize < 4096 else 1)
        @given(tensors(FOUR_BIT[name], blocksize, dtype), st.just(name))
        def run(x, name):
            with running("eager"):
                packed, absmax = check(name, x, blocksize)
                check_decoding(name, packed, absmax, blocksize, tuple(x.shape), dtype)

        run()


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (0, 5), (2, 0, 3), (5,), (3, 5, 7), (2, 2, 2, 32), (65,), (129,)], ids=str
)
def test_shapes(shape, mode):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    packed, absmax = check("nf4", x, 64)
    check_decoding("nf4", packed, absmax, 64, shape, F32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, mode):
    g = torch.Generator().manual_seed(0)
    for n in (2, 6, 64, 127, 128, 191, 192, 193):
        for name, dtype, blocksize in COMPILED:
            check(name, laid_out(torch.randn(n, generator=g).to(dtype), layout), blocksize)


def test_every_sixteen_bit_float_is_encoded(mode):
    """All 2^16 bfloat16 and float16, at scale 1 where they are no larger, else in blocks of their own."""
    for dtype, names in ((BF16, ["nf4"]), (F16, ["fp4"])):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        small = every[every.abs() <= 1]
        blocks = torch.ones(-(-small.numel() // 63), 64, dtype=dtype)
        blocks[:, 1:] = torch.nn.functional.pad(small, (0, -small.numel() % 63)).view(-1, 63)
        for name in names if mode == "compiled" else FOUR_BIT:
            packed, absmax = fourbit.quantize(blocks, FOUR_BIT[name], 64)
            assert bool((absmax == 1).all())
            codes = second.encode(name, second.floats(blocks))
            want = torch.tensor(second.pack(list(codes), 0), dtype=torch.uint8).view(-1, 1)
            assert same_bits(packed, want), difference(packed, want)
        check(names[0], every[~(every.abs() <= 1)], 64)  # NaN and infinities too


def test_every_sixteen_bit_float_by_the_encoder():
    """The same at scale 1 throughout, beyond 1 too."""
    for dtype in (BF16, F16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        for name, book in FOUR_BIT.items():
            want = torch.from_numpy(second.encode(name, every.numpy())).to(torch.uint8)
            assert torch.equal(encode(every, book), want), (name, dtype)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_thresholds_and_their_neighbours(name, mode):
    """At scale 1 and at 3.77, whose reciprocal is not exact: there `x / absmax` would have other codes."""
    compiled = {n: (dtype, blocksize) for n, dtype, blocksize in COMPILED[1:]}
    dtype, blocksize = compiled.get(name, (F32, 7)) if mode == "compiled" else (F32, 64)
    if mode == "compiled" and name not in compiled:
        pytest.skip("not a compiled variant of the proofs")
    table = neighbours(FOUR_BIT[name].thresholds)
    table = np.concatenate([table, -table])
    for scale in (1.0, 3.7727534770965576, 2.0**-120, 2.0**126, 2.0**127):
        x = torch.from_numpy(table * np.float32(scale))
        full = torch.full((-(-x.numel() // (blocksize - 1)), blocksize), scale)
        full[:, 1:] = torch.nn.functional.pad(x, (0, -x.numel() % (blocksize - 1))).view(-1, blocksize - 1)
        check(name, full.to(dtype), blocksize)
        check(name, full.flatten()[:-1].to(dtype), blocksize)  # the tail is scaled as a whole block is


def test_a_tail_is_scaled_as_a_whole_block_is(mode):
    """numerics.md 4: with this absmax and element the default backend has code 11 in a whole block and 12 in a tail."""
    pair = torch.tensor([3.7727534770965576, 1.468780279159546])
    whole = torch.zeros(64)
    whole[:2] = pair
    tail = fourbit.quantize(pair, NF4, 64)[0].tolist()
    assert tail == fourbit.quantize(whole, NF4, 64)[0][:1].tolist() == [[0xFB]]


def test_edges_of_the_scale(mode):
    """design.md's table: absmax, 1 / absmax, NaN and infinity."""
    inf, nan, tiny = float("inf"), float("nan"), 2.0**-126
    below = float(np.nextafter(np.float32(tiny), np.float32(0)))
    largest = float(np.finfo(np.float32).max)

    def shown(*values: float) -> str:
        nf4 = fourbit.quantize(torch.tensor(values), NF4, 64)
        fp4 = fourbit.quantize(torch.tensor(values).half(), FP4, 64)
        return "  ".join(f"{hexes(absmax)}: {hexes(packed)}" for packed, absmax in (nf4, fp4))

    lines = [
        shown(0.0, -0.0, 0.0),
        shown(nan, 1.0, -1.0),
        shown(nan, nan),
        shown(inf, -inf, 1.0, 0.0, nan),
        shown(tiny, -tiny, 0.0),
        shown(below, -below, 0.0),
        shown(largest, -largest, largest / 2),
        shown(2.0**127, 2.0**100, 1.0, 0.0),
        shown(1.0, 2.0**-149, -(2.0**-149), -(2.0**-24)),
        shown(1.0, 1 / 384, -1 / 384, 1 / 383, -1 / 383),
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
00000000: 77 77  00000000: 00 00
3f800000: 0f 07  3f800000: 03 b0
00000000: 00  00000000: 00
7f800000: 00 77 07  7f800000: 00 00 00
00800000: f0 77  00000000: 00 00
00000000: 77 77  00000000: 00 00
7f7fffff: f0 c7  7f800000: 00 00
7f000000: f7 77  7f800000: 00 00
3f800000: f7 77  3f800000: 30 08
3f800000: f7 77 77  3f800000: 30 81 90""",
    )


def test_zeros_of_fp4(mode):
    """-0.0 and 0 are code 0, and so is what rounds to 0 from above; a small negative number is code 8: zero as well."""
    packed, absmax = fourbit.quantize(torch.tensor([1.0, -0.0, 0.0, 1e-3, -1e-3, -(2.0**-24)], dtype=F16), FP4, 64)
    assert hexes(packed) == "30 00 88"
    decoded = fourbit.dequantize(packed, absmax, FP4, 64, (6,), F16)
    assert same_bits(decoded, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=F16))


# ---- packing --------------------------------------------------------------------------------------------------------


def test_the_first_element_is_in_the_high_nibble(mode):
    packed, absmax = fourbit.quantize(torch.tensor([1.0, -1.0, 0.0]), NF4, 64)
    assert hexes(packed) == "f0 77"
    assert packed.shape == (2, 1)
    assert absmax.tolist() == [1.0]


@pytest.mark.parametrize("name", FOUR_BIT)
def test_an_odd_tail_is_padded_with_the_code_of_zero(name):
    for absmax in (1.0, 0.0):
        with running("eager"):
            packed, _ = fourbit.quantize(torch.full((5,), absmax), FOUR_BIT[name], 2)
        assert packed[-1].item() & 15 == second.code_of_zero(name)


STORAGES = (torch.uint8, torch.int8, torch.bool, BF16, F16, torch.int16, F32, torch.int32, torch.float64, torch.int64)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_quant_storage(storage, mode):
    """The same bytes under another dtype, if they are whole elements of it; else an error that says so."""
    g = torch.Generator().manual_seed(0)
    for n in (0, 2, 6, 16, 64, 70, 128):
        x = torch.randn(n, generator=g)
        data, absmax = fourbit.quantize(x, NF4, 64)
        n_bytes = -(-n // 2)
        if n_bytes % storage.itemsize:
            with pytest.raises(ValueError, match="do not divide"):
                fourbit.quantize(x, NF4, 64, storage)
            continue
        packed, again = fourbit.quantize(x, NF4, 64, storage)
        assert packed.dtype == storage
        assert packed.shape == (n_bytes // storage.itemsize, 1)
        assert same_bits(packed.view(torch.uint8).view(-1), data.view(-1))
        assert same_bits(again, absmax)
        check_decoding("nf4", packed, absmax, 64, (n,), F32)


# ---- decode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype", "blocksize"), COMPILED, ids=str)
def test_dequantize(name, dtype, blocksize, mode):
    """All 256 bytes times any scale, tails, and packed bytes that begin anywhere in memory."""

    @settings(max_examples=30)
    @given(
        scales() | st.sampled_from([-1.0, float("inf"), float("nan")]),
        st.integers(0, 64),
        st.sampled_from(LAYOUTS[:-1]),
    )
    def run(scale, tail, layout):
        data = laid_out(torch.arange(256 + tail).to(torch.uint8), layout)
        n = 2 * data.numel() - tail % 2
        absmax = torch.ones(-(-n // blocksize))
        absmax[::2] = scale
        check_decoding(name, data, absmax, blocksize, (n,), dtype)

    run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FOUR_BIT)
def test_every_byte_and_scale_of_sixteen_bits(name, dtype):
    """All codes times scales of every exponent: one rounding, to nearest even, to infinity and to subnormals too."""
    scales_ = torch.arange(0, 2**15, 37, dtype=torch.int32).to(torch.int16).view(BF16).float()
    scales_ = torch.cat([scales_, scales_ * 1.0000001, torch.tensor([65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25])])
    codes = torch.arange(16).repeat(scales_.numel())
    data = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
    kernel = fourbit.dequantize_rows
    rows = (data.view(-1, 8), scales_.view(-1, 1))
    want = second.rounded(np.outer(scales_.numpy(), second.VALUES[name]), dtype)
    for run in (kernel.definition, kernel.body):
        got = run(*rows, blocksize=16, codebook=FOUR_BIT[name], dtype=dtype)
        assert same_bits(got, want), difference(got, want)


def test_all_zero_blocks_decode_to_zero(mode):
    for name, dtype, blocksize in COMPILED:
        packed, absmax = fourbit.quantize(torch.zeros(65, dtype=dtype), FOUR_BIT[name], blocksize)
        zero = second.code_of_zero(name)
        assert packed.unique().tolist() == [zero * 17]
        assert not absmax.any()
        decoded = fourbit.dequantize(packed, absmax, FOUR_BIT[name], blocksize, (65,), dtype)
        assert same_bits(decoded, torch.zeros(65, dtype=dtype))


def test_int4_has_two_zeros():
    x = torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 1 / 14, 1.0])
    assert encode(x, INT4).tolist() == [15, 8, 8, 7, 7, 0]
    assert AF4.values[0] == 1.0


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors():
    x, packed = torch.ones(8), torch.zeros(4, 1, dtype=torch.uint8)

    def error(function, *args):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(*args)
        return str(caught.value)

    messages = [
        error(fourbit.quantize, x.double(), NF4, 64),
        error(fourbit.quantize, x.int(), NF4, 64),
        error(fourbit.quantize, x, NF4, 0),
        error(fourbit.quantize, x, NF4, "64"),
        error(fourbit.quantize, torch.ones(6), NF4, 64, F32),
        error(fourbit.quantize, torch.ones(1), NF4, 64, BF16),
        error(fourbit.dequantize, packed, torch.ones(1), NF4, 64, (8,), torch.float64),
        error(fourbit.dequantize, packed, torch.ones(1), NF4, 64, (9,), F32),
        error(fourbit.dequantize, packed, torch.ones(1), NF4, 64, (6,), F32),
        error(fourbit.dequantize, packed, torch.ones(2), NF4, 64, (8,), F32),
        error(fourbit.dequantize, packed, torch.ones(1), NF4, 4, (8,), F32),
        error(fourbit.dequantize, packed, torch.ones(1), NF4, -4, (8,), F32),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
x must be float32, float16 or bfloat16, got torch.float64
x must be float32, float16 or bfloat16, got torch.int32
blocksize must be a positive integer, got 0
blocksize must be an integer, got '64'
quant_storage torch.float32 has 4 bytes, which do not divide the 3 bytes of 6 packed elements
quant_storage torch.bfloat16 has 2 bytes, which do not divide the 1 bytes of 1 packed elements
dtype must be float32, float16 or bfloat16, got torch.float64
packed must hold 5 bytes for shape (9,), got 4
packed must hold 3 bytes for shape (6,), got 4
absmax must have one scale per block: 1 for 8 elements in blocks of 64, got 2
absmax must have one scale per block: 2 for 8 elements in blocks of 4, got 1
blocksize must be a positive integer, got -4""",
    )
