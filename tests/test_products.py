"""The products with quantized weights: forwards within a derived bound, backwards, every rank, every dtype."""

import math
import re

import pytest
import second
import torch
from conftest import difference, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

import bnbref
from bnbref import fourbit, int8
from bnbref import functional as F
from bnbref.codebooks import FP4, NF4
from bnbref.products import MatmulLtState

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Unit roundoffs: half the distance from 1 to the next number.
U = 2.0**-24
UNIT = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
SMALLEST = {F32: 2.0**-149, BF16: 2.0**-133, F16: 2.0**-24}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear_and_bound(a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """a @ w^T + bias in float64, and by how much a product in the dtype T of `a` may differ from it.

    A sum of k + 1 terms in float32, in any order, fused or not: each product is rounded at most once and each term passes
    through at most k additions, so that the error is at most g S with S = sum |a w| + |bias|, g = t u / (1 - t u), t = k + 1,
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). Three more, because a row that is computed from
    the codes multiplies by the scale afterwards, and the weight that it is compared with is a rounded product itself. A last
    rounding to T adds v |y| of the rounded-from value, |y| <= |exact| + g S, and half a unit in the last place where y is
    subnormal in T.
    float64's own error, k 2^-53 S, is within the slack of (k + 1) for k terms.
    """
    a64, w64 = a.detach().double(), w.detach().double()
    exact = torch.nn.functional.linear(a64, w64, None if bias is None else bias.detach().double())
    size = torch.nn.functional.linear(a64.abs(), w64.abs(), None if bias is None else bias.detach().double().abs())
    terms = a.shape[-1] + 4
    g = terms * U / (1 - terms * U)
    v = UNIT[a.dtype] if a.dtype != F32 else 0.0
    return exact, g * size + v * (exact.abs() + g * size) + SMALLEST[a.dtype]


def check(got: torch.Tensor, a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    exact, bound = linear_and_bound(a, w, bias)
    assert got.dtype == a.dtype
    assert got.shape == (*a.shape[:-1], w.shape[0])
    error = (got.detach().double() - exact).abs()
    assert bool((error <= bound).all()), f"error {error.max():.3g}, {(error / bound).max():.3g} of the bound"


def only(compiled: torch.dtype, dtype: torch.dtype, mode: str) -> None:
    """Every dtype uncompiled, one of them compiled: the others are the proofs' concern."""
    if mode == "compiled" and dtype != compiled:
        pytest.skip("not compiled here")


# ---- four bits ------------------------------------------------------------------------------------------------------


def weight_4bit(n: int, k: int, quant_type: str = "nf4", double: bool = False, dtype: torch.dtype = F32, seed: int = 7):
    packed, state = F.quantize_4bit(
        randn(n, k, seed=seed, dtype=dtype), quant_type=quant_type, compress_statistics=double
    )
    return packed, state


RANKS = [(64,), (1, 64), (3, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_matmul_4bit(dtype, mode):
    """Every rank, nothing at all, with and without a bias: the dtype of A, within the bound."""
    only(BF16, dtype, mode)
    packed, state = weight_4bit(6, 64)
    for shape in RANKS:
        # A row by the compiled kernel has a weight that is not rounded.
        row = mode == "compiled" and math.prod(shape) == 64
        w = fourbit.dequantize(packed, state.absmax, NF4, 64, (6, 64), F32 if row else dtype)
        for bias in (None, randn(6, seed=1, dtype=dtype), randn(6, seed=1)):
            a = randn(*shape, seed=2, dtype=dtype)
            check(bnbref.matmul_4bit(a, packed, state, bias=bias), a, w, None if bias is None else bias.to(dtype))


@settings(max_examples=30)
@given(st.sampled_from(["nf4", "fp4", "af4", "int4"]), st.integers(1, 9), st.integers(1, 70), st.integers(1, 5), st.booleans(),
       st.sampled_from([F32, BF16, F16]))  # fmt: skip
def test_any_weight(quant_type, n, k, m, double, dtype):
    """Blocks that span rows, odd sizes, doubly quantized scales."""
    with running("eager"):
        packed, state = weight_4bit(n, k, quant_type, double)
        codes = second.unpack(packed.flatten().tolist(), n * k)
        w = second.dequantize(second.VALUES[quant_type], codes, state.scales().numpy(), 64, dtype).view(n, k)
        a = randn(m, k, seed=3, dtype=dtype)
        check(bnbref.matmul_4bit(a, packed, state), a, w)


def test_a_bias_is_added_before_the_one_rounding(mode):
    """At 2^-10 of the product, a bias added to a bfloat16 result would be lost; before the rounding it decides a tie."""
    packed, state = F.quantize_4bit(torch.ones(4, 64), quant_type="nf4")
    for rows in (1, 3):
        a = torch.zeros(rows, 64, dtype=BF16)
        a[:, 0], a[:, 1] = 1.0, 2.0**-8  # the sum is halfway between 1 and the next bfloat16, and 1 is even
        bias = torch.tensor([0.0, 2.0**-16, -(2.0**-16), 2.0**-16], dtype=BF16)
        got = bnbref.matmul_4bit(a, packed, state, bias=bias)
        assert got.tolist() == [[1.0, 1.0 + 2.0**-7, 1.0, 1.0 + 2.0**-7]] * rows


def test_a_large_row_is_summed_in_float32(mode):
    """1024 ones: a sum in bfloat16 would stop at 256. In float16 4096: it would stop at 2048."""
    for dtype, k in ((BF16, 1024), (F16, 4096)) if mode == "eager" else ((BF16, 1024),):
        packed, state = F.quantize_4bit(torch.ones(4, k), quant_type="nf4")
        for rows in (1, 2):
            a = torch.ones(rows, k, dtype=dtype)
            assert bool((bnbref.matmul_4bit(a, packed, state) == k).all())


@pytest.mark.parametrize("shape", RANKS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_of_matmul_4bit(shape, dtype, eager):
    """grad_A = grad @ W, grad_bias = the sum over rows in the bias' dtype; the weight has none.

    W is rounded once, to grad's dtype; that of the quantized tensor, here float16, has no part in it.
    """
    packed, state = weight_4bit(6, 64, dtype=F16)
    assert state.dtype == F16
    w = fourbit.dequantize(packed, state.absmax, NF4, 64, (6, 64), dtype)
    a = randn(*shape, seed=2, dtype=dtype).requires_grad_()
    bias = randn(6, seed=1, dtype=dtype).requires_grad_()
    grad = randn(*shape[:-1], 6, seed=4, dtype=dtype)
    y = bnbref.matmul_4bit(a, packed, state, bias=bias)
    check(y, a, w, bias)
    y.backward(grad)
    check(a.grad, grad, w.t())
    assert same_bits(a.grad, grad @ w), difference(a.grad, grad @ w)
    assert bias.grad.dtype == dtype
    rows = grad.reshape(-1, 6)
    check_sum(bias.grad, rows)
    assert not packed.requires_grad


def check_sum(got: torch.Tensor, rows: torch.Tensor) -> None:
    """A sum over rows in float32, rounded once: the bound of a product with ones."""
    if rows.shape[0] == 0:
        assert not got.any()
        return
    check(got[None].t().contiguous(), rows.t().contiguous(), torch.ones(1, rows.shape[0], dtype=rows.dtype))


def test_only_what_needs_a_gradient_gets_one(eager):
    packed, state = weight_4bit(6, 64)
    a, bias = randn(3, 64), randn(6)
    assert not bnbref.matmul_4bit(a, packed, state, bias=bias).requires_grad
    for which in range(2):
        inputs = [a.clone(), bias.clone()]
        inputs[which].requires_grad_()
        bnbref.matmul_4bit(inputs[0], packed, state, bias=inputs[1]).sum().backward()
        assert [t.grad is not None for t in inputs] == [which == 0, which == 1]
    with torch.no_grad():
        assert not bnbref.matmul_4bit(a.clone().requires_grad_(), packed, state).requires_grad


def test_the_gradient_is_that_of_a_linear_layer(eager):
    """A network through two products: the gradient of the first input, against float64 with the dequantized weights."""
    (p1, s1), (p2, s2) = weight_4bit(64, 64, seed=1), weight_4bit(6, 64, seed=2)
    w1, w2 = F.dequantize_4bit(p1, s1), F.dequantize_4bit(p2, s2)
    a = randn(5, 64).requires_grad_()
    bnbref.matmul_4bit(bnbref.matmul_4bit(a, p1, s1).tanh(), p2, s2).square().sum().backward()
    b = a.detach().double().requires_grad_()
    torch.nn.functional.linear(torch.nn.functional.linear(b, w1.double()).tanh(), w2.double()).square().sum().backward()
    # Relative to the largest gradient: four sums of 64 terms in float32, each 65 u of its magnitude, which the squares and
    # the sizes of |w1|, |w2| <= 3 in sums of 64 make 64 * 3 times larger than the result at the worst.
    assert (a.grad - b.grad).abs().max() <= 4 * 65 * U * 64 * 3 * b.grad.abs().max()


def test_out(mode):
    packed, state = weight_4bit(6, 64)
    for rows in (1, 3):
        a, out = randn(rows, 64, dtype=BF16), torch.empty(rows, 6, dtype=BF16)
        assert bnbref.matmul_4bit(a, packed, state, out=out) is out
        assert same_bits(out, bnbref.matmul_4bit(a, packed, state))


def test_quant_storage_of_the_weight(mode):
    """The packed bytes under any dtype, transposed or not, give the same product."""
    w = randn(6, 64)
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    for rows in (1, 3):
        a = randn(rows, 64, dtype=BF16)
        want = bnbref.matmul_4bit(a, packed, state)
        for storage in (torch.int8, BF16, F32):
            other, other_state = F.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
            assert same_bits(bnbref.matmul_4bit(a, other, other_state), want)
        assert same_bits(bnbref.matmul_4bit(a, packed.t(), state), want)


def test_double_quantization_in_products(eager):
    packed, state = weight_4bit(8, 128, double=True)
    scales = second.nested_dequantize(state.absmax.tolist(), state.state2.absmax.numpy(), state.offset.numpy()[()])
    for rows in (1, 3):
        for dtype in (F32, BF16):
            w = second.dequantize(
                second.VALUES["nf4"], second.unpack(packed.flatten().tolist(), 1024), scales, 64, dtype
            ).view(8, 128)
            a = randn(rows, 128, dtype=dtype)
            check(bnbref.matmul_4bit(a, packed, state), a, w)


# ---- eight bits -----------------------------------------------------------------------------------------------------


def int8_by_hand(a, w, bias, threshold: float = 0.0):
    """The int8 part as defined, in the second implementation's arithmetic; the outlier part is left out."""
    rows = second.floats(a).reshape(-1, a.shape[-1])
    codes, stats, columns = second.int8_quantize(rows, threshold)
    weight_codes, weight_stats, _ = second.int8_quantize(second.floats(w).reshape(w.shape), 0.0)
    product = codes @ weight_codes.T
    added = None if bias is None else second.floats(bias)
    return second.int8_dequantize_product(product, stats, weight_stats, added, None, a.dtype).view(
        *a.shape[:-1], w.shape[0]
    ), columns


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_matmul_int8_is_exact(dtype, mode):
    """Without outliers every bit is defined: quantization, the integer product, its scaling, the bias, one rounding."""
    only(F32, dtype, mode)
    w = randn(5, 64, seed=7)
    state = MatmulLtState()
    state.CB, state.SCB, _ = int8.quantize(w)
    for shape in RANKS if mode == "eager" else RANKS[:4]:
        for bias in (None, randn(5, seed=1)) if dtype != F16 else (randn(5, seed=1, dtype=F16),):
            a = randn(*shape, seed=2, dtype=dtype)
            want, _ = int8_by_hand(a, w, bias)
            for b in (w, state.CB):
                got = bnbref.matmul(a, b, state=state, bias=bias)
                assert same_bits(got, want), difference(got, want, a)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_threshold_that_nothing_meets_changes_nothing(mode):
    a, w = randn(4, 64), randn(5, 64, seed=7)
    assert a.abs().max() < 6
    with running(mode):
        assert same_bits(bnbref.matmul(a, w, threshold=6.0), bnbref.matmul(a, w))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_outliers_are_multiplied_in_floats(dtype, mode):
    """y = T(int8 part + bias + outlier part), the outlier part a float product in T: the bounds of both, added."""
    only(F32, dtype, mode)
    a = randn(4, 64, seed=2, dtype=dtype)
    a[:, [3, 40]] *= 10
    w = randn(5, 64, seed=7)
    codes, stats, _ = int8.quantize(w)
    for bias in (None, randn(5, seed=1)):
        plain, columns = int8_by_hand(a.float(), w, bias, 6.0)
        index = [j for j, outlier in enumerate(columns) if outlier]
        assert {3, 40} <= set(index)
        assert len(index) < 10
        got = bnbref.matmul(a, w, threshold=6.0, bias=bias)
        # The part without outliers is exact in float32 up to the addition of the third term.
        decoded = second.int8_dequantize(codes.numpy(), stats.numpy(), dtype)
        outlier, bound = linear_and_bound(a[:, index], decoded[:, index], None)
        exact = plain.double() + outlier
        size = plain.double().abs() + outlier.abs() + bound
        bound = bound + U * size + UNIT[dtype] * (size + U * size) + SMALLEST[dtype]
        assert got.dtype == dtype
        assert bool(((got.double() - exact).abs() <= bound).all())
        state = MatmulLtState(CB=codes, SCB=stats, threshold=6.0)
        assert same_bits(bnbref.matmul(a, codes, state=state, bias=bias), got), "the state's threshold"


def test_outliers_eager_and_compiled_and_traced():
    """The gathered columns (eager, compiled) and the masked ones (inside a graph) add up the same products."""
    a, w = randn(4, 64), randn(5, 64, seed=7)
    a[:, [3, 40]] *= 10

    def product(a):
        return bnbref.matmul(a, w, threshold=6.0)

    compiled = product(a)
    with bnbref.eager():
        assert same_bits(product(a), compiled), "one and the same ATen product on both sides"
    traced = torch.compile(product, fullgraph=True, backend="eager")(a)
    decoded = int8.dequantize(*int8.quantize(w)[:2])
    _, bound = linear_and_bound(torch.where((a.abs() >= 6).any(0), a, 0), decoded, None)
    slack = 2 * bound + 2 * U * (compiled.double().abs() + bound)  # both are within one bound, and one more addition
    assert bool(((traced.double() - compiled.double()).abs() <= slack).all())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", RANKS, ids=str)
def test_gradients_of_matmul_int8(shape, dtype, eager):
    """grad_A = grad @ W with W rounded to grad's dtype; grad_B = grad^T @ A, as of the float product; grad_bias the sum."""
    a = randn(*shape, seed=2, dtype=dtype).requires_grad_()
    w = randn(5, 64, seed=7, dtype=dtype).requires_grad_()
    bias = randn(5, seed=1, dtype=dtype).requires_grad_()
    grad = randn(*shape[:-1], 5, seed=4, dtype=dtype)
    bnbref.matmul(a, w, bias=bias).backward(grad)
    codes, stats, _ = int8.quantize(w.detach())
    decoded = second.int8_dequantize(codes.numpy(), stats.numpy(), dtype)
    assert same_bits(a.grad, grad @ decoded), difference(a.grad, grad @ decoded)
    check(a.grad, grad, decoded.t())
    rows, inputs = grad.reshape(-1, 5), a.detach().reshape(-1, 64)
    assert w.grad.dtype == dtype
    assert w.grad.shape == (5, 64)
    if rows.shape[0]:
        check(w.grad, rows.t().contiguous(), inputs.t().contiguous())
        linear = torch.nn.functional.linear(inputs, w.detach().requires_grad_())
        assert linear.shape == rows.shape
    else:
        assert not w.grad.any()
    check_sum(bias.grad, rows)


def test_the_weight_gradient_is_that_of_a_float_layer(eager):
    """Bit for bit that of F.linear: the same operator on the same operands."""
    a, grad = randn(6, 64), randn(6, 5, seed=4)
    w = randn(5, 64, seed=7).requires_grad_()
    bnbref.matmul(a, w).backward(grad)
    other = w.detach().clone().requires_grad_()
    torch.nn.functional.linear(a, other).backward(grad)
    assert same_bits(w.grad, other.grad)


def test_gradients_in_the_dtypes_of_the_inputs():
    """A bfloat16 activation, a float32 weight and bias: each gets a gradient of its own dtype."""
    a = randn(4, 64, dtype=BF16).requires_grad_()
    w, bias = randn(5, 64, seed=7).requires_grad_(), randn(5, seed=1).requires_grad_()
    with running("eager"):
        y = bnbref.matmul(a, w, bias=bias)
        y.sum().backward()
        assert (y.dtype, a.grad.dtype, w.grad.dtype, bias.grad.dtype) == (BF16, BF16, F32, F32)
        assert bias.grad.tolist() == [4.0] * 5
        a.grad = bias.grad = None
        packed, state = weight_4bit(5, 64)
        y = bnbref.matmul_4bit(a, packed, state, bias=bias)
        y.sum().backward()
        assert (y.dtype, a.grad.dtype, bias.grad.dtype) == (BF16, BF16, F32)


def test_an_int8_weight_gets_no_gradient(eager):
    state = MatmulLtState()
    state.CB, state.SCB, _ = int8.quantize(randn(5, 64, seed=7))
    a = randn(4, 64).requires_grad_()
    bnbref.matmul(a, state.CB, state=state, threshold=2.5).sum().backward()
    decoded = int8.dequantize(state.CB, state.SCB)
    assert same_bits(a.grad, torch.ones(4, 5) @ decoded), "outlier columns have the gradient of the whole weight too"


def test_int8_out_and_state():
    a, w = randn(4, 64), randn(5, 64, seed=7)
    with running("eager"):
        out = torch.empty(4, 5)
        assert bnbref.matmul(a, w, out=out) is out
        assert same_bits(out, bnbref.matmul(a, w))
        state = MatmulLtState(threshold=2.0)
        assert same_bits(bnbref.matmul(a, w, state=state, threshold=6.0), bnbref.matmul(a, w, threshold=6.0))
        state.CB, state.SCB = int8.quantize(w)[:2]
        state.reset_grads()
        assert state.CB is None
        assert state.SCB is None


def test_edges_of_k():
    """No columns at all: the bias."""
    with running("eager"):
        for bias in (None, torch.tensor([1.0, 2.0, 3.0])):
            want = torch.zeros(2, 3) if bias is None else bias.expand(2, 3)
            assert torch.equal(bnbref.matmul(torch.zeros(2, 0), torch.zeros(3, 0), bias=bias, threshold=6.0), want)
            packed, state = F.quantize_4bit(torch.zeros(3, 0), quant_type="nf4")
            assert torch.equal(bnbref.matmul_4bit(torch.zeros(2, 0), packed, state, bias=bias), want)
        a = torch.zeros(2, 0).requires_grad_()
        w = torch.zeros(3, 0).requires_grad_()
        bnbref.matmul(a, w).sum().backward()
        assert a.grad.shape == (2, 0)
        assert w.grad.shape == (3, 0)
        # one column: torch's own int8 product leaves the result unwritten there
        a, w = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [3.0], [-127.0]])
        assert bnbref.matmul(a, w).tolist() == int8_by_hand(a, w, None)[0].tolist()


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors():
    def message(function, *args, error=ValueError):
        with pytest.raises(error) as caught:
            function(*args)
        return str(caught.value)

    packed, state = weight_4bit(6, 64)
    flat, flat_state = F.quantize_4bit(randn(64), quant_type="nf4")
    codes = torch.ones(5, 64, dtype=torch.int8)
    messages = [
        message(bnbref.matmul_4bit, randn(3, 64), packed, None),
        message(bnbref.matmul_4bit, randn(3, 63), packed, state),
        message(bnbref.matmul_4bit, torch.tensor(1.0), packed, state),
        message(bnbref.matmul_4bit, randn(3, 64), flat, flat_state),
        message(bnbref.matmul_4bit, randn(3, 64).double(), packed, state),
        message(bnbref.matmul_4bit, torch.ones(3, 64, dtype=torch.int64), packed, state),
        message(bnbref.matmul, randn(3, 64), codes),
        message(bnbref.matmul, randn(3, 63), randn(5, 64)),
        message(bnbref.matmul, torch.tensor(1.0), randn(5, 64)),
        message(bnbref.matmul, randn(3, 64).double(), randn(5, 64)),
        message(bnbref.matmul, randn(3, 64), randn(5, 64).double()),
        message(bnbref.matmul_4bit, randn(3, 64), state.absmax, packed, error=TypeError),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
quant_state is required: it holds the scales and the shape of B
B must be a weight [n, k] with k the last size of A, got (6, 64) and (3, 63)
B must be a weight [n, k] with k the last size of A, got (6, 64) and ()
B must be a weight [n, k] with k the last size of A, got (64,) and (3, 64)
A must be float32, float16 or bfloat16, got torch.float64
A must be float32, float16 or bfloat16, got torch.int64
B is int8, but state.CB or state.SCB is None: its scales are unknown
B must be [n, k] with k the last size of A, got (5, 64) and (3, 63)
B must be [n, k] with k the last size of A, got (5, 64) and ()
A must be float32, float16 or bfloat16, got torch.float64
B must be float32, float16 or bfloat16, got torch.float64
quant_state must be a QuantState or None, got Tensor""",
    )
    assert FP4.bits == 4


@pytest.mark.parametrize(
    ("absmax", "got"),
    [
        (torch.ones(1), "torch.float32 (1,)"),
        (torch.ones(6), "torch.float32 (6,)"),
        (torch.ones(5, 1), "torch.float32 (5, 1)"),
        (torch.ones(5, dtype=torch.int32), "torch.int32 (5,)"),
        ([1.0] * 5, "list"),
        (torch.ones(5, device="meta"), "state.SCB must be on the device of A, cpu, got meta"),
    ],
    ids=str,
)
def test_an_int8_weight_has_a_scale_for_each_row(absmax, got):
    """A single one was a scale of all rows, without a word."""
    state = MatmulLtState(CB=torch.ones(5, 64, dtype=torch.int8), SCB=absmax)
    with pytest.raises(ValueError, match=re.escape(got)):
        bnbref.matmul(randn(3, 64), state.CB, state=state)


def test_a_negative_threshold_is_refused():
    with pytest.raises(ValueError, match=r"threshold must be 0 \(that of the state\) or positive, got -6.0"):
        bnbref.matmul(randn(3, 64), randn(5, 64), threshold=-6.0)


@pytest.mark.parametrize("shape", [(3,), (1,), (), (1, 8), (8, 1)])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_bias_is_a_number_for_each_row_of_the_weight(rows, shape, mode):
    """Compiled, another one ended in an AssertionError of Dynamo's guards, or an IndexError."""
    a, bias = randn(rows, 64), randn(*shape)
    with bnbref.eager():
        packed, state = F.quantize_4bit(randn(8, 64), quant_type="nf4")
    with pytest.raises(ValueError, match=r"bias must be \[8\], a number for each row of the weight, got \("):
        bnbref.matmul_4bit(a, packed, state, bias=bias)
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        bnbref.matmul(a, randn(8, 64), bias=bias)
    layer = bnbref.nn.Linear4bit(64, 8, bias=False, quant_type="nf4").to("cpu")
    layer.bias = torch.nn.Parameter(bias)
    with torch.no_grad(), pytest.raises(ValueError, match=r"bias must be \[8\]"):
        layer(a)
