"""Products in a fixed order: one result, whatever the batch, the threads, the compiler and the graph around it."""

import numpy as np
import pytest
import second
import torch
from conftest import difference, running, same_bits
from torch import library

import bnbref
from bnbref import functional as F
from bnbref.kernels import ordered

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def randn(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The order of bnbref/ordered.py for one row and column at a time, in numpy's float32: a queue of neighbours."""
    m, k, n = len(a), a.shape[1], b.shape[1]
    out = np.zeros((m, n), np.float32)
    for i, j in np.ndindex(m, n):
        for start in range(0, k, 64):
            terms = [a[i, column] * b[column, j] for column in range(start, min(start + 64, k))]
            terms += [np.float32(0)] * (64 - len(terms))
            while len(terms) > 1:
                terms = [terms[p] + terms[p + 1] for p in range(0, len(terms), 2)]
            out[i, j] = out[i, j] + terms[0]
    return out


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 64, 1), (3, 130, 5), (2, 63, 17), (1, 1, 3), (4, 0, 2), (0, 5, 2), (2, 70, 0)]
)
def test_the_order_is_the_written_one(m, k, n, mode):
    a, b = randn(m, k) * 3, randn(k, n, seed=1)
    a[:, ::7] *= 1e20  # of terms so unequal every order has another sum
    got = ordered.product(a, b)
    want = torch.from_numpy(by_hand(a.numpy(), b.numpy()))
    assert same_bits(got, want), difference(got, want, a, b)


def test_another_order_would_be_seen():
    a, b = randn(3, 130), randn(130, 5, seed=1)
    other = by_hand(a.numpy()[:, ::-1], b.numpy()[::-1])
    assert not same_bits(ordered.product(a, b), torch.from_numpy(other))
    assert not same_bits(ordered.product(a, b), (a.double() @ b.double()).float())


def layer(bias=True, n=96, k=192):
    torch.manual_seed(0)
    with bnbref.eager():
        return bnbref.nn.Linear4bit(k, n, bias=bias, compute_dtype=BF16, quant_type="nf4").to("cpu")


def test_a_row_has_the_same_bits_in_every_batch():
    """Rows alone, in pairs, in all; eager and compiled; one thread and two; inside a graph with default options."""
    linear = layer().requires_grad_(False)
    x = randn(9, 192, seed=3, dtype=BF16)
    threads = torch.get_num_threads()
    with bnbref.batch_invariant():
        want = linear(x)
        results = {"in threes": torch.cat([linear(part) for part in x.split(3)])}
        results["one by one"] = torch.stack([linear(row) for row in x])
        results["three dimensions"] = linear(x.view(3, 3, 192)).view(9, 96)
        with running("eager"):
            results["eager"] = linear(x)
        torch.set_num_threads(1)
        results["one thread"] = linear(x)
        torch.set_num_threads(threads)
        graph = torch.compile(lambda x: linear(x * 1.0) * 1.0, fullgraph=True)
        results["in a graph"] = graph(x)
        results["in a graph, one row"] = torch.cat([graph(x[:5]), graph(x[5:6]), graph(x[6:])])
    for how, got in results.items():
        assert same_bits(got, want), (how, difference(got, want))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_value_and_its_bound(dtype, eager):
    """k = 130 in three blocks: each term passes its product, six sums of a tree, and at most three sums of blocks."""
    packed, state = F.quantize_4bit(randn(6, 130, seed=7), quant_type="nf4")
    codes = second.unpack(packed.flatten().tolist(), 6 * 130)
    w = second.dequantize(second.VALUES["nf4"], codes, state.absmax.numpy(), 64, dtype).view(6, 130)
    a, bias = randn(4, 130, dtype=dtype), randn(6, seed=1, dtype=dtype)
    with bnbref.batch_invariant():
        got = bnbref.matmul_4bit(a, packed, state, bias=bias)
        out = torch.empty_like(got)
        assert bnbref.matmul_4bit(a, packed, state, out=out, bias=bias) is out
        with torch.autocast("cpu", dtype=BF16):
            cast = bnbref.matmul_4bit(a, packed, state, bias=bias)
        assert cast.dtype == BF16
    want = torch.from_numpy(by_hand(second.floats(a).reshape(4, 130), second.floats(w.t()).reshape(130, 6)))
    want = second.rounded((want + bias.float()).numpy(), dtype)
    assert same_bits(got, want), difference(got, want)
    assert same_bits(out, want)
    u, v = 2.0**-24, {F32: 0.0, BF16: 2.0**-8, F16: 2.0**-11}[dtype]
    size = a.double().abs() @ w.double().abs().t() + bias.double().abs()
    exact = a.double() @ w.double().t() + bias.double()
    g = 11 * u / (1 - 11 * u)  # 1 + 6 + 3 roundings, and the sum with the bias
    assert bool(((got.double() - exact).abs() <= g * size + v * (exact.abs() + g * size)).all())


def test_gradients_are_in_order(mode):
    linear = layer()
    x = randn(5, 192, seed=3, dtype=BF16)
    grad = randn(5, 96, seed=4, dtype=BF16)

    def gradients(rows):
        part = x[rows].clone().requires_grad_()
        linear.bias.grad = None
        with bnbref.batch_invariant():
            y = linear(part)
        y.backward(grad[rows])  # outside of the block: the product remembers
        return part.grad, linear.bias.grad

    together, bias = gradients(slice(0, 5))
    alone = torch.cat([gradients(slice(i, i + 1))[0] for i in range(5)])
    assert same_bits(together, alone), difference(together, alone)
    w = F.dequantize_4bit(linear.weight, linear.weight.quant_state).to(BF16)
    want = second.rounded(by_hand(second.floats(grad).reshape(5, 96), second.floats(w).reshape(96, 192)), BF16)
    assert same_bits(together, want), difference(together, want)
    want = second.rounded(by_hand(np.ones((1, 5), np.float32), second.floats(grad).reshape(5, 96)), BF16)[0]
    assert same_bits(bias.to(BF16), want), difference(bias, want)


def test_the_switch_is_back_where_it_was():
    with bnbref.batch_invariant():
        with pytest.raises(ZeroDivisionError), bnbref.batch_invariant():
            raise ZeroDivisionError
        assert ordered.batch_invariant_enabled()
    assert not ordered.batch_invariant_enabled()


def test_columns_that_are_no_rows_are_refused(eager):
    """Of a longer b the rest was left out."""
    with pytest.raises(
        ValueError, match=r"a must have as many columns as b has rows, got shapes \[1, 2\] and \[3, 4\]"
    ):
        ordered.product(torch.ones(1, 2), torch.ones(3, 4))


def test_the_operator(eager):
    for dtype in (torch.float32, torch.bfloat16):
        a, b, bias = (x.to(dtype) for x in (randn(3, 70), randn(70, 5), randn(5)))
        for args in ((a, b, bias), (a, b, None), (a[:1], b.t().contiguous().t(), None)):
            library.opcheck(torch.ops.bnbref.ordered_product.default, args)
    with torch.device("meta"):
        assert ordered.product(torch.empty(3, 70), torch.empty(70, 5)).shape == (3, 5)
