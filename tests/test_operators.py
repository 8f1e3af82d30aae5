"""Products inside somebody's graph: one operator each, with the eager gradient, whatever else is going on."""

import copy
import threading

import pytest
import torch
from conftest import as_on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

import bnbref
from bnbref import MatmulLtState, codebook, few_rows, int8, matmul, matmul_4bit, nn
from bnbref.codebooks import NF4, Codebook
from bnbref.functional import quantize_4bit
from bnbref.kernels import multiplying, taught

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
BACKENDS = ("eager", "aot_eager", "inductor")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_second_copy_of_bnbref_in_a_process_is_named():
    """As after `del sys.modules["bnbref"]`, or where another version of it is loaded by hand."""
    schema = "ordered_product(Tensor a, Tensor b, Tensor? bias) -> Tensor"
    with pytest.raises(
        ImportError, match="bnbref is in this process already, with its operator bnbref::ordered_product"
    ):
        taught.operator(schema, lambda a, b, bias: a)(lambda a, b, bias: a)
    with pytest.raises(RuntimeError, match="expected"):
        taught.operator("no schema", lambda: None)(lambda: None)


PACKED, STATE = quantize_4bit(randn(8, 64), quant_type="nf4")
CODES, ABSMAX, _ = int8.quantize(randn(8, 64))


def four_bit(x, bias=None):
    return matmul_4bit(x, PACKED, STATE, bias=bias)


def eight_bit(x, bias=None):
    return matmul(x, CODES, state=MatmulLtState(CODES, ABSMAX, has_fp16_weights=False), bias=bias)


def compiled(function, backend, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, **options)


@pytest.mark.parametrize("product", [four_bit, eight_bit])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_a_graph(product, backend):
    x, bias = randn(3, 64, seed=1).requires_grad_(), randn(8, seed=2).requires_grad_()
    want = torch.autograd.grad(product(x, bias).square().sum(), (x, bias))
    got = torch.autograd.grad(compiled(product, backend, fullgraph=True)(x, bias).square().sum(), (x, bias))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_gives_its_parameter_and_the_kernels_see_memory(rows, backend, monkeypatch):
    """What a graph passes to an operator is the parameter, also where a GPU would multiply a row of int8 by its own kernel."""
    monkeypatch.setattr(few_rows, "is_row_of_int8", lambda a, codes: len(a) == 1)
    layers = bnbref.nn.Linear4bit(64, 64, quant_type="nf4"), bnbref.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    model = torch.nn.Sequential(*layers).requires_grad_(False).to("cpu")
    x = randn(rows, 64, seed=1)
    assert torch.equal(compiled(model, backend)(x), model(x))
    x.requires_grad_()
    want = torch.autograd.grad(model(x).sum(), x)
    assert all(map(torch.equal, torch.autograd.grad(compiled(model, backend)(x).sum(), x), want))


def test_compiled_autograd():
    from torch._dynamo import compiled_autograd

    x = randn(3, 64, seed=1).requires_grad_()
    want = torch.autograd.grad(four_bit(x).square().sum(), x)
    with compiled_autograd._enable(lambda graph: graph):
        compiled(four_bit, "aot_eager")(x).square().sum().backward()
    assert torch.equal(x.grad, *want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_in_a_graph(backend):
    x = randn(3, 64, seed=1)

    def gradient(x):
        return torch.func.grad(lambda x: four_bit(x).sum())(x)

    def tangent(x):
        return torch.func.jvp(four_bit, (x,), (x,))[1]

    def batched(x):
        return torch.vmap(four_bit)(x)

    for function in (gradient, tangent, batched):
        torch.testing.assert_close(compiled(function, backend, fullgraph=True)(x), function(x))


@pytest.mark.skipif(TORCH < (2, 12), reason="Dynamo of torch 2.11 fails where a graph breaks inside torch.func.grad")
def test_torch_func_over_an_int8_product_is_right_or_refused():
    x = randn(3, 64, seed=1)

    def gradient(x):
        return torch.func.grad(lambda x: eight_bit(x).sum())(x)

    torch.testing.assert_close(compiled(gradient, "eager")(x), gradient(x))  # with a graph break
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
        compiled(gradient, "eager", fullgraph=True)(x)


def test_the_operators_are_whole():
    x, bias = randn(3, 64).requires_grad_(), randn(8).requires_grad_()
    for values in ("nf4", " ".join(map(str, NF4.values))):
        state = (PACKED, STATE.absmax, [], [8, 64], 64, 0, values, False)
        library.opcheck(torch.ops.bnbref.linear_4bit.default, (x, bias, False, *state))
        library.opcheck(torch.ops.bnbref.weight_4bit.default, (*state, torch.float32))
    library.opcheck(torch.ops.bnbref.linear_8bit.default, (x, None, CODES, ABSMAX, bias, 0.0, False))
    library.opcheck(torch.ops.bnbref.weight_8bit.default, (CODES, ABSMAX, False, torch.float32))


def test_a_product_runs_while_something_else_is_compiled():
    """`torch.compiler.is_compiling()` is then true for it as well."""
    x, faults = randn(3, 64), []

    def loop():
        try:
            for _ in range(500):
                four_bit(x)
                eight_bit(x)
        except RecursionError as fault:
            faults.append(fault)

    thread = threading.Thread(target=loop)
    thread.start()
    compiled(lambda z: z.sin() + four_bit(z).sum(), "inductor")(x)
    thread.join()
    assert faults == []


def test_a_backend_that_runs_the_product():
    x = randn(3, 64)

    def backend(graph, inputs):
        graph(*inputs)  # on real tensors, while it compiles
        return graph

    assert torch.equal(compiled(four_bit, backend)(x), four_bit(x))


def test_codebooks_of_operators_are_told_apart_by_their_bits():
    packed = torch.full((32, 1), 0x11, dtype=torch.uint8)
    for zero in (0.0, -0.0):
        book = Codebook("three", (-1.0, zero, 1.0), (-0.5, 0.5))
        state = (packed, torch.ones(1), [], [1, 64], 64, 0, " ".join(map(str, book.values)), False)
        weight = torch.ops.bnbref.weight_4bit(*state, torch.float32)
        assert bool(torch.signbit(weight).all()) == (str(zero) == "-0.0")


@settings(deadline=None, max_examples=10)
@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=16, unique=True), st.booleans())
def test_a_codebook_of_ones_own_in_a_graph(values, double):
    """Its numbers reach the operator as text, each of them as it is."""
    book = Codebook.nearest("own", sorted(values))
    packed, state = quantize_4bit(randn(8, 64, seed=3), quant_type=book, compress_statistics=double)
    x = randn(3, 64, seed=1)
    product = compiled(lambda x: bnbref.matmul_4bit(x, packed, state), "aot_eager", fullgraph=True)
    assert torch.equal(product(x), bnbref.matmul_4bit(x, packed, state))


def test_a_codebook_that_an_operator_does_not_know_is_refused():
    x, state = randn(3, 64, seed=1), copy.copy(STATE)
    state.quant_type = "of nobody"
    with pytest.raises(ValueError, match=r"quant_type must be one of .*'of nobody'"):
        compiled(lambda x: bnbref.matmul_4bit(x, PACKED, state), "aot_eager")(x)


# ---- few rows -------------------------------------------------------------------------------------------------------


def test_a_row_may_be_changed_in_place():
    layer = torch.nn.Sequential(bnbref.nn.Linear4bit(64, 8), torch.nn.ReLU(inplace=True)).to("cpu")
    for shape in ((64,), (1, 64), (1, 1, 64)):
        layer(randn(*shape)).sum().backward()
        with torch.no_grad():
            y = four_bit(randn(*shape))
        y.add_(randn(8).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_row_has_the_dtypes_that_many_rows_have(dtype):
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"A must be float32, float16 or bfloat16, got {dtype}"):
            four_bit(randn(rows, 64).to(dtype))


def test_codes_of_any_strides():
    strided = PACKED.view(16, 16).t().contiguous().t()
    for rows in (1, 3):
        x = randn(rows, 64)
        assert torch.equal(matmul_4bit(x, strided, STATE), four_bit(x))


@pytest.mark.skipif(TORCH < (2, 12), reason="Inductor of torch 2.11 cannot compile the kernel of GPUs for a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["transposed", "every second", "beside others", "from the second on"])
def test_activations_of_any_strides_on_a_gpu(dtype, form):
    x = randn(1, 64).to(dtype)
    shapes = {"transposed": (64, 3), "every second": (1, 128), "beside others": (1, 66), "from the second on": (1, 65)}
    memory = torch.zeros(shapes[form], dtype=dtype)
    a = {
        "transposed": lambda: memory.t()[:1],
        "every second": lambda: memory[:, ::2],
        "beside others": lambda: memory[:, :64],
        "from the second on": lambda: memory[:, 1:],
    }[form]()
    a.copy_(x)
    with as_on_gpu():
        got = few_rows.multiply_few(a, PACKED, STATE, None)
        assert torch.equal(got, few_rows.multiply_few(x, PACKED, STATE, None))


@pytest.mark.cuda
@pytest.mark.parametrize("product", [four_bit, eight_bit])
def test_a_cuda_graph_holds_a_product_that_was_never_called(product):
    """The tables of its kernels are made while the graph is warmed up, and must not be in the graph's memory."""
    x = randn(1, 64).cuda()
    packed, state = quantize_4bit(randn(8, 64).cuda(), quant_type="nf4", compress_statistics=True)
    codes, absmax, _ = int8.quantize(randn(8, 64).cuda())
    function = {
        four_bit: lambda x: matmul_4bit(x, packed, state),
        eight_bit: lambda x: matmul(x, codes, state=MatmulLtState(codes, absmax, has_fp16_weights=False)),
    }[product]
    for cache in (multiplying._planes, codebook._table):
        cache.kept.cache_clear()
    graphed = compiled(function, "inductor", fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        got = [graphed(x + i).clone() for i in range(4)]
        want = [function(x + i) for i in range(4)]
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_a_graph_checks_no_class_of_a_layer_before_each_call(kind):
    """Which it does for a property that was read, on torch 2.11: 2 ms for each token of a model of 224 layers."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    layer = nn.Linear4bit(64, 8) if kind == "4 bits" else nn.Linear8bitLt(64, 8, has_fp16_weights=False, threshold=6.0)
    layer = layer.to("cpu")

    def run(x):
        return layer(x)

    compiled(run, "eager", fullgraph=True)(randn(3, 64))
    (entry,) = _debug_get_cache_entry_list(run.__code__)
    guards = str(entry.guard_manager)
    assert "TENSOR_MATCH" in guards
    assert "TypeDictGuardAccessor" not in guards
