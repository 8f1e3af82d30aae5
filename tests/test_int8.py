"""LLM.int8(): rows, outliers, the exact product and its scaling, against the second implementation."""

import numpy as np
import pytest
import second
import torch
from conftest import difference, hexes, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BF16, F16, F32, LAYOUTS, any_float, half_steps, int8_rows, laid_out, neighbours, scales

from bnbref import functional as F
from bnbref import int8

COMPILED = [(F32, 2.5), (F32, 0.0), (F16, 6.0)]
INF, NAN = float("inf"), float("nan")


def check(x: torch.Tensor, threshold: float) -> None:
    """Codes, scales and outlier columns as expected, the caller's tensor as it was."""
    before = x.detach().clone()
    codes, absmax, columns = int8.quantize(x, threshold)
    rows = second.floats(x).reshape(x.shape[:-1].numel(), x.shape[-1])
    want, want_absmax, outlier = second.int8_quantize(rows, threshold)
    want_codes = torch.from_numpy(want).to(torch.int8).view(x.shape)
    assert same_bits(codes, want_codes), difference(codes, want_codes, before)
    assert same_bits(absmax, torch.from_numpy(want_absmax)), difference(absmax, torch.from_numpy(want_absmax), before)
    assert columns is None if threshold == 0 else columns.tolist() == outlier
    assert same_bits(x, before)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "threshold"), COMPILED, ids=str)
def test_quantize(dtype, threshold, mode):
    """Ties, the threshold and its neighbours, rows of zeros, of outliers, NaN and infinities."""

    @settings(max_examples=40)
    @given(int8_rows(dtype, threshold, st.integers(2, 5), st.integers(2, 40)))
    def run(x):
        check(x, threshold)

    run()


@pytest.mark.parametrize("threshold", [0.0, 6.0, 6.1, 1e-3, INF])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_any_rows(dtype, threshold):
    @settings(max_examples=15)
    @given(int8_rows(dtype, threshold, st.integers(0, 4), st.integers(0, 20)))
    def run(x):
        with running("eager"):
            check(x, threshold)

    run()


def test_sizes_of_0_and_1(mode):
    for shape in ((1, 5), (5, 1), (1, 1), (0, 5), (5, 0), (0, 0), (5,), (1,), (0,), (2, 3, 4), (2, 0, 4), (1, 1, 1, 3)):
        x = torch.arange(torch.Size(shape).numel()).float().view(shape) - 3
        check(x, 2.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, mode):
    g = torch.Generator().manual_seed(0)
    flat = laid_out(torch.randn(60, generator=g), layout)
    check(flat if flat.dim() > 1 else flat.view(6, 10) if layout != "strided" else flat.unflatten(0, (6, 10)), 2.5)
    check(torch.randn(7, 30, generator=g)[:, 3:17], 2.5)
    check(torch.randn(7, 30, generator=g).t(), 2.5)


def test_ties_are_even(mode):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], [2.0] * 8])
    codes, _, _ = int8.quantize(x)
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_the_scale_is_rounded_twice(mode):
    """127 * (1 / absmax): dividing 127 by absmax at once would make this element 64."""
    absmax, element = np.float32(1.4554425477981567), np.float32(0.7391814589500427)
    x = torch.zeros(2, 6)
    x[0, :2] = torch.tensor([float(absmax), float(element)])
    assert second.half_even(element * (np.float32(127) / absmax)) == 64
    assert int8.quantize(x)[0][0, 1].item() == 65


def test_near_every_tie(mode):
    """Of 200 scales the 255 ties, where they are by this rule and where they would be with 127 / absmax."""
    size = torch.rand(200, generator=torch.Generator().manual_seed(0)).numpy() + np.float32(0.5)
    rows = np.stack([np.append(np.clip(half_steps(s), -s, s), s) for s in size]).astype(np.float32)
    codes, absmax, _ = int8.quantize(torch.from_numpy(rows))
    assert same_bits(absmax, torch.from_numpy(size))
    want = np.rint(rows * (np.float32(127) * (np.float32(1) / size))[:, None])  # numpy rounds half to even
    assert same_bits(codes, torch.from_numpy(want).to(torch.int8))
    once = np.rint(rows * (np.float32(127) / size)[:, None])
    assert (once != want).sum() > 100, "these inputs would not notice a scale rounded once"


@pytest.mark.parametrize("threshold", [6.0, 6.1, 6.3, 2.0**-130])
def test_the_threshold_exactly_met(threshold):
    """As a float32 number: met is above, one ulp below is not."""
    met, _, below = neighbours([threshold]).tolist()
    with running("eager"):
        check(torch.tensor([[met, below, 0.0], [-met, -below, 1e-3]]), threshold)
        codes, absmax, columns = int8.quantize(torch.tensor([[met, below], [0.0, 0.0]]), threshold)
    assert columns.tolist() == [True, False]
    assert codes[:, 0].tolist() == [0, 0]
    assert absmax[0].item() == (below if below >= 2.0**-121 else 0.0)


def test_outliers(mode):
    """A column with one outlier is zero in every row; a row of outliers has absmax 0; NaN is no outlier."""
    x = torch.tensor(
        [
            [3.0, 1.0, NAN, 0.5],
            [0.25, -2.0, 1.0, 0.5],
            [9.0, -9.0, 9.0, -INF],
            [0.0, 0.0, 0.0, 0.0],
            [2.5, 2.4, 1.0, 1.0],
        ]
    )
    codes, absmax, columns = int8.quantize(x[[0, 1]], 2.5)
    assert codes.tolist() == [[0, 127, 0, 64], [0, -127, 64, 32]]
    assert columns.tolist() == [True, False, False, False]
    assert absmax.tolist() == [1.0, 2.0]
    check(x, 2.5)
    codes, absmax, columns = int8.quantize(x, 2.5)
    assert columns.all()
    assert not codes.any()
    assert absmax[2:4].tolist() == [0.0, 0.0]


def test_a_single_row_with_an_outlier(mode):
    """bitsandbytes zeroes columns only where there is more than one row."""
    codes, absmax, columns = int8.quantize(torch.tensor([[1.0, 7.0, 0.5]]), 2.5)
    assert (codes.tolist(), absmax.tolist(), columns.tolist()) == ([[127, 0, 64]], [1.0], [False, True, False])


def test_nan_and_infinity(mode):
    x = torch.tensor([[NAN, 1.0, -0.5], [INF, 1.0, -0.5], [-INF, NAN, 0.0], [NAN, NAN, NAN], [0.0, -0.0, 0.0]])
    codes, absmax, _ = int8.quantize(x)
    assert codes.tolist() == [[0, 127, -64], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert hexes(absmax) == "3f800000 7f800000 7f800000 00000000 00000000"


def test_the_smallest_and_the_largest_absmax(mode):
    """Below 2^-121 a row is a row of zeros, for 127 * (1 / absmax) would be no float32; at 2^-121 it is not."""
    limit = np.float32(2.0**-121)
    x = torch.tensor([float(limit), float(np.nextafter(limit, np.float32(0))), 2.0**-126, 3.0e38, 2.0**-149, 1.0])
    rows = torch.stack([x, -x, x / 3], dim=1)
    codes, absmax, _ = int8.quantize(rows)
    assert codes[:, :2].tolist() == [[127, -127], [0, 0], [0, 0], [127, -127], [0, 0], [127, -127]]
    assert absmax.tolist() == [float(limit), 0.0, 0.0, float(np.float32(3.0e38)), 0.0, 1.0]
    check(rows, 0.0)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_sixteen_bit_float(dtype, mode):
    """All 2^16 in rows whose absmax is 1 where they are no larger; alone in a row with 1.0 where they are."""
    if dtype == BF16 and mode == "compiled":
        pytest.skip("not a compiled variant of the proofs")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    limit = 6.0 if dtype == F16 else 0.0
    small = every[every.abs() <= 1]
    rows = torch.cat([torch.ones(small.numel() // 2, 1, dtype=dtype), small.view(-1, 2)], dim=1)
    codes, absmax, _ = int8.quantize(rows, limit)
    scaled = np.float32(127) * second.floats(small)
    assert bool((absmax == 1).all())
    assert codes[:, 1:].reshape(-1).tolist() == [second.half_even(v) for v in scaled]
    alone = every[~(every.abs() <= 1)]
    with running("eager"):
        for part in alone.split(8192):
            pairs = torch.stack([part, torch.ones_like(part)], dim=1)
            codes, absmax, _ = int8.quantize(pairs)
            size = np.abs(second.floats(part))
            size[np.isnan(size)] = 1
            assert same_bits(absmax, torch.from_numpy(size))
            factor = np.float32(127) / size
            want = second.floats(pairs).reshape(-1, 2) * factor[:, None]
            assert same_bits(codes, torch.from_numpy(np.rint(np.nan_to_num(want, nan=0.0))).to(torch.int8))


# ---- product --------------------------------------------------------------------------------------------------------


def product_in_float64(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact up to k = 2^39: float64 holds every partial sum."""
    return (a.double() @ b.double().t()).to(torch.int64)


@pytest.mark.parametrize("k", [1, 3, 4, 1023, 1024, 1025, 2048, 4099, 70000])
@pytest.mark.parametrize("multiply", [int8.multiply, int8._multiply_in_float32], ids=["multiply", "float32"])
def test_worst_case_products(multiply, k):
    """-128 * -128, -128 * 127 and mixtures, where a float32 sum or 16-bit pairs would be off."""
    g = torch.Generator().manual_seed(k)
    extremes = torch.tensor([-128, 127, -128, -127], dtype=torch.int8)
    a = extremes[torch.randint(0, 4, (5, k), generator=g)]
    b = extremes[torch.randint(0, 4, (6, k), generator=g)]
    a[0], b[0], a[1], b[1] = -128, -128, 127, -128
    b[2], a[2] = torch.where(torch.arange(k) % 2 == 0, -128, 127).to(torch.int8), -128
    got = multiply(a, b)
    assert got.dtype == torch.int32
    assert same_bits(got, product_in_float64(a, b).to(torch.int32))
    assert got[0, 0].item() == 16384 * k
    assert got[1, 0].item() == -16256 * k
    assert got[0].tolist() == second.int8_product(a[:1].tolist(), b.tolist())[0]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 40), st.randoms(use_true_random=False))
def test_products_against_pythons_integers(m, n, k, random):
    a = torch.tensor([[random.randint(-128, 127) for _ in range(k)] for _ in range(m)], dtype=torch.int8).view(m, k)
    b = torch.tensor([[random.randint(-128, 127) for _ in range(k)] for _ in range(n)], dtype=torch.int8).view(n, k)
    want = torch.tensor(second.int8_product(a.tolist(), b.tolist()), dtype=torch.int32).view(m, n)
    assert same_bits(int8.multiply(a, b), want)
    if k:
        assert same_bits(int8._multiply_in_float32(a, b), want)


def test_overflow_wraps():
    """131,072 products of -128 * -128 are 2^31: the first product that int32 does not hold."""
    k = 131072
    a = torch.full((2, k), -128, dtype=torch.int8)
    for multiply in (int8.multiply, int8._multiply_in_float32):
        assert multiply(a, a).tolist() == [[-(2**31)] * 2] * 2
        assert multiply(a[:, 1:], a[:, 1:]).tolist() == [[2**31 - 16384] * 2] * 2


def test_shapes_of_products():
    b = torch.ones(3, 4, dtype=torch.int8)
    for shape in ((4,), (2, 4), (0, 4), (2, 5, 4), (2, 0, 4), (1, 2, 3, 4)):
        got = int8.multiply(torch.ones(shape, dtype=torch.int8), b)
        assert got.shape == (*shape[:-1], 3)
        assert bool((got == 4).all())
    assert (
        int8.multiply(torch.ones(2, 0, dtype=torch.int8), torch.ones(3, 0, dtype=torch.int8)).tolist() == [[0] * 3] * 2
    )
    assert int8.multiply(torch.ones(2, 4, dtype=torch.int8), b[:0]).shape == (2, 0)
    transposed = torch.arange(8, dtype=torch.int8).view(4, 2).t()
    assert int8.multiply(transposed, b).tolist() == [[12] * 3, [16] * 3]


def test_padding_for_cublas(monkeypatch):
    """What cuBLASLt demands of torch._int_mm: more than 16 rows, multiples of 8 elsewhere, b as a transposed view."""
    seen = []

    def strict(a, b):
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0
        assert b.shape[1] % 8 == 0
        assert a.shape[1] == b.shape[0]
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        seen.append(tuple(a.shape))
        return product_in_float64(a, b.t()).to(torch.int32)  # a CPU's own saturates without VNNI

    monkeypatch.setattr(torch, "_int_mm", strict)
    g = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 1, 1), (16, 8, 8), (17, 8, 8), (3, 5, 7), (40, 9, 70), (18, 16, 64)):
        a = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
        b = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
        got = int8._multiply_on_cuda(a, b)
        assert same_bits(got, product_in_float64(a, b).to(torch.int32)), (m, n, k)
        assert got.view(*got.shape).shape == (m, n)
    assert seen[0] == (17, 8)
    assert seen[-1] == (18, 64)


# ---- scaling back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bias", "outliers"), [(F32, None, None), (BF16, F32, BF16), (F16, F16, None)], ids=str
)
def test_dequantize_product(dtype, bias, outliers, mode):
    """The order of the products, the constant, one rounding at the end; int32 beyond 2^24 rounds to nearest even."""

    @settings(max_examples=25)
    @given(st.integers(2, 5), st.integers(2, 6), st.data())
    def run(m, n, data):
        integers = st.sampled_from([0, 1, -1, 2**24 + 1, -(2**24) - 3, 2**31 - 1, -(2**31), 16129]) | st.integers(
            -(2**31), 2**31 - 1
        )
        product = torch.tensor(data.draw(st.lists(integers, min_size=m * n, max_size=m * n)), dtype=torch.int32).view(
            m, n
        )

        def drawn(strategy, *shape):
            count = int(np.prod(shape))
            return torch.tensor(data.draw(st.lists(strategy, min_size=count, max_size=count))).view(shape)

        row, column = drawn(scales(), m), drawn(scales(), n)
        addend = None if bias is None else drawn(any_float(), n).to(bias)
        outlier = None if outliers is None else drawn(any_float(), m, n).to(outliers)
        got = int8.dequantize_int8_product(product, row, column, addend, outlier, dtype=dtype)
        want = second.int8_dequantize_product(
            product.numpy(), row.numpy(), column.numpy(), None if addend is None else second.floats(addend),
            None if outlier is None else second.floats(outlier).reshape(m, n), dtype,
        )  # fmt: skip
        assert same_bits(got, want), difference(got, want, product, row, column, addend, outlier)

    run()


def test_sizes_of_a_product(mode):
    for m in (0, 1, 2, 3):
        for n in (0, 1, 2, 5):
            product = torch.arange(m * n, dtype=torch.int32).view(m, n) * 1000
            row, column = torch.arange(m) + 0.5, torch.arange(n) + 0.25
            got = int8.dequantize_int8_product(product, row, column, None, None, dtype=F32)
            want = second.int8_dequantize_product(product.numpy(), row.numpy(), column.numpy(), None, None, F32)
            assert same_bits(got, want), (m, n)


def test_the_constants():
    assert np.float32(int8.RECIPROCAL_127) == np.float32(second.nearest_float32(second.Fraction(1, 127)))
    assert np.float32(int8.RECIPROCAL_127_SQUARED) == second.nearest_float32(second.Fraction(1, 16129))
    assert hexes(torch.tensor([int8.RECIPROCAL_127, int8.RECIPROCAL_127_SQUARED])) == "3c010204 38820610"


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dequantize_rows(dtype, mode):
    if dtype == F16 and mode == "compiled":
        pytest.skip("not a compiled variant of the proofs")

    @settings(max_examples=20)
    @given(st.lists(scales() | st.sampled_from([-1.0, INF, NAN]), min_size=2, max_size=5))
    def run(absmax):
        codes = torch.arange(-128, 128).to(torch.int8).repeat(len(absmax), 1)
        got = int8.dequantize(codes, torch.tensor(absmax), dtype)
        want = second.int8_dequantize(codes.numpy(), np.array(absmax, np.float32), dtype)
        assert same_bits(got, want), difference(got, want, torch.tensor(absmax))

    run()


def test_double_quant():
    """Columns as rows are: outliers left out of both; the codes by columns lie as A does."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(6, 9, generator=g) * 3
    with running("eager"):
        for threshold in (0.0, 4.0):
            row, col, row_stats, col_stats, outliers = F.int8_double_quant(a, threshold=threshold)
            want, want_stats, columns = second.int8_quantize(a.numpy(), threshold)
            assert row.tolist() == want.tolist()
            assert row_stats.tolist() == want_stats.tolist()
            kept = np.where((threshold > 0) & (np.abs(a.numpy()) >= np.float32(threshold)), np.float32(0), a.numpy())
            want, want_stats, _ = second.int8_quantize(kept.T, 0.0)
            assert col.tolist() == want.T.tolist()
            assert col_stats.tolist() == want_stats.tolist()
            assert col.is_contiguous()
            assert (
                (outliers is None) if threshold == 0 else outliers.tolist() == [j for j, c in enumerate(columns) if c]
            )


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors():
    a, b = torch.ones(2, 4, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)

    def error(function, *args):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(*args)
        return str(caught.value)

    messages = [
        error(int8.quantize, torch.ones(2, 4).double()),
        error(int8.quantize, a),
        error(int8.quantize, torch.tensor(1.0)),
        error(int8.quantize, torch.ones(2, 4), -1.0),
        error(int8.quantize, torch.ones(2, 4), NAN),
        error(int8.multiply, a.float(), b),
        error(int8.multiply, a, b.int()),
        error(int8.multiply, a, b[:, :3]),
        error(int8.multiply, a, b[0]),
        error(int8.multiply, a[0, 0], b),
        error(int8.dequantize, a, torch.ones(3)),
        error(int8.dequantize, a[0], torch.ones(1)),
        error(int8.dequantize, a.int(), torch.ones(2)),
        error(int8.dequantize_product, torch.tensor(1, dtype=torch.int32), torch.ones(1), torch.ones(1)),
        error(int8.dequantize_product, a.int(), torch.ones(2), torch.ones(4), torch.ones(2)),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
x must be float32, float16 or bfloat16, got torch.float64
x must be float32, float16 or bfloat16, got torch.int8
x must have at least one dimension, got a scalar
threshold must be 0 (off) or positive, got -1.0
threshold must be a number, got nan
a and b must be int8, got torch.float32 and torch.int8
a and b must be int8, got torch.int8 and torch.int32
a must be [..., k] and b [n, k], got (2, 4) and (3, 3)
a must be [..., k] and b [n, k], got (2, 4) and (4,)
a must be [..., k] and b [n, k], got () and (3, 4)
codes must be int8 [rows, columns] and absmax [rows], got torch.int8 (2, 4) and (3,)
codes must be int8 [rows, columns] and absmax [rows], got torch.int8 (4,) and (1,)
codes must be int8 [rows, columns] and absmax [rows], got torch.int32 (2, 4) and (2,)
A must be int32 [..., n], got torch.int32 ()
bias must be [4], got (2,)""",
    )
