"""Whatever state of torch a caller is in, a product is the same; torch.func, torch.jit and torch.fx see a linear layer."""

import contextlib
import functools
import io
import itertools
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from conftest import running
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import BF16, F16, F32, argument, fill, layers, linear4, linear8, raw
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import bnbref
from bnbref import int8
from bnbref.context import cached, in_another_thread
from bnbref.functional import dequantize_4bit, gemv_4bit, int8_linear_matmul, int8_mm_dequant, int8_vectorwise_quant
from bnbref.integrations.bitsandbytes import ops
from bnbref.nn import Linear4bit, Linear8bitLt


@pytest.fixture(params=["eager"], autouse=True)
def kernels(request):
    """Kernels run uncompiled, unless a test asks for "compiled" by this parameter."""
    with running(request.param):
        yield


def inputs(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def float8(threshold=0.0):
    """An int8 layer that keeps a float weight."""
    return fill(Linear8bitLt(64, 32, threshold=threshold)).to("cpu")


LINEAR = {"4 bits": lambda: linear4(quant_type="nf4"), "int8": lambda: linear8(threshold=2.0), "float int8": float8}
each_linear = pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)


def weight_of(layer):
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight, layer.quant_state)
    return int8.dequantize(*(int8.quantize(layer.weight.data)[:2] if layer.weight.is_floating_point() else
                             (layer.weight.data, layer.weight.SCB)))  # fmt: skip


# ---- the state of torch ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _precision(value):
    return lambda: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


def _attribute(owner, name, value):
    return lambda: setting(lambda: getattr(owner, name), lambda v: setattr(owner, name, v), value)


AUTOCAST = {f"autocast {dtype}": (lambda dtype=dtype: torch.autocast("cpu", dtype=dtype)) for dtype in (BF16, F16)}
STATES = {
    **AUTOCAST,
    "precision medium": _precision("medium"),
    "precision high": _precision("high"),
    "mkldnn matmul bf16": _attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "mkldnn matmul tf32": _attribute(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, BF16),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "one thread": lambda: setting(torch.get_num_threads, torch.set_num_threads, 1),
}


@pytest.mark.parametrize("exact", [True, False], ids=["int_mm", "floats"])
@pytest.mark.parametrize("state", STATES)
def test_the_integer_product_is_exact_in_every_state(state, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(int8, "cpu_product_is_exact", lambda: False)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (n, 3000), generator=generator).to(torch.int8) for n in (5, 7))
    a[0], b[0] = -128, -128
    want = a.long() @ b.long().t()
    with STATES[state]():
        assert torch.equal(int8.multiply(a, b).long(), want)
        assert torch.equal(int8_linear_matmul(a, b).long(), want)


@pytest.mark.parametrize("kernels", ["eager", "compiled"], indirect=True)
@pytest.mark.parametrize("state", STATES)
def test_a_layer_is_the_same_in_every_state(state, kernels):
    """To the bit, less the float products of a state that asks for other float products."""
    other_floats = state.startswith(("precision", "mkldnn", "one thread"))
    cases = [linear8(), float8()]
    cases += [] if other_floats else [linear8(threshold=2.0), float8(2.0)]
    cases += [] if other_floats or state in AUTOCAST else [linear4(quant_type="nf4")]
    for layer, dtype in itertools.product(cases, (F32, BF16)):
        x, grad_y = inputs(3, 64, dtype=dtype), inputs(3, 32, dtype=dtype, seed=1)
        if state in ("inference mode", "no_grad"):
            want = raw(layer(x))
            with STATES[state]():
                assert raw(layer(x)) == want
            continue
        results = []
        for forward, backward in itertools.product((contextlib.nullcontext, STATES[state]), repeat=2):
            a = x.clone().requires_grad_()
            with forward():
                y = layer(a)
            with backward():
                y.backward(grad_y)
            results.append((raw(y), None if other_floats else raw(a.grad)))
            layer.zero_grad()
        assert results.count(results[0]) == 4, (state, layer, dtype)


@given(layer=layers(), state=st.sampled_from([*AUTOCAST, "default dtype", "default device", "inference mode"]))
def test_tables_are_read_in_every_state(layer, state):
    if not isinstance(layer, nn.Embedding):
        return
    index = argument(layer)
    want = raw(layer(index))
    with STATES[state]():
        assert raw(layer(index)) == want


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kernels", ["eager", "compiled"], indirect=True)
def test_four_bits_under_autocast_are_the_product_in_its_dtype(dtype, rows, kernels):
    layer, x = linear4(quant_type="nf4"), inputs(rows, 64).requires_grad_()
    y = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        got = bnbref.matmul_4bit(x, layer.weight, layer.quant_state, bias=layer.bias)
    want = bnbref.matmul_4bit(y, layer.weight, layer.quant_state, bias=layer.bias)
    assert raw(got) == raw(want)
    with torch.autocast("cpu", dtype=dtype):  # the wrong place for it, and what happens
        got.float().sum().backward()
    want.float().sum().backward()
    assert raw(x.grad) == raw(y.grad.float())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_operators_return_the_dtype_of_their_schema_under_autocast(dtype):
    layer, x = linear4(quant_type="nf4", compress_statistics=False), inputs(2, 64, dtype=dtype)
    state = layer.quant_state
    want = ops._gemm_4bit(x, layer.weight.data, [32, 64], state.absmax, 64, "nf4")
    codes, absmax, columns = int8_vectorwise_quant(x, 1.5)
    int8_layer = linear8()
    mixed = (x, codes, int8_layer.weight.data, absmax, int8_layer.weight.SCB, columns)
    expected = ops._int8_mixed_scaled_mm(*mixed)
    with torch.autocast("cpu", dtype=F16):
        assert raw(ops._gemm_4bit(x, layer.weight.data, [32, 64], state.absmax, 64, "nf4")) == raw(want)
        assert [raw(t) for t in ops._int8_mixed_scaled_mm(*mixed)] == [raw(t) for t in expected]


@pytest.mark.slow
@pytest.mark.parametrize("state", [*AUTOCAST, "deterministic", "default dtype"])
@each_linear
def test_in_a_graph_that_was_compiled_in_a_state_or_outside(make, state):
    layer, x = make(), inputs(3, 64)
    if isinstance(layer, Linear4bit) and state in AUTOCAST:
        return
    want = layer(x).detach()
    for first, second in ((contextlib.nullcontext, STATES[state]), (STATES[state], contextlib.nullcontext)):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager")
        for context in (first, second):
            with context():
                assert torch.allclose(compiled(x), want, rtol=0, atol=4e-6)


# ---- one function for all spellings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(1, 64), (5, 64), (64,), (2, 3, 64)])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("kernels", ["eager", "compiled"], indirect=True)
def test_every_spelling_of_a_four_bit_product_is_the_same(rows, in_order, kernels):
    layer, x = linear4(quant_type="nf4", compress_statistics=False, bias=False), inputs(*rows)
    state, packed = layer.quant_state, layer.weight.data
    with torch.no_grad(), bnbref.batch_invariant() if in_order else contextlib.nullcontext():
        want = raw(bnbref.matmul_4bit(x, packed, state))
        assert raw(layer(x)) == want
        assert raw(gemv_4bit(x, packed.t(), state=state)) == want
        assert raw(ops._gemm_4bit(x, packed, [32, 64], state.absmax, 64, "nf4")) == want
        assert raw(ops._gemv_4bit(x, packed, [32, 64], state.absmax, state.code, 64)) == want
        if in_order and len(rows) == 2:
            assert raw(gemv_4bit(x[:1], packed, state=state)[0]) == raw(gemv_4bit(x, packed, state=state)[0])


def test_no_product_keeps_a_dense_weight():
    layer, x = linear4(256, 64, quant_type="nf4", bias=False), inputs(2, 64).requires_grad_()
    for product in (layer, lambda x: gemv_4bit(x, layer.weight, state=layer.quant_state)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            product(x)
        assert sum(kept) < 256 * 64


# ---- changed in place -----------------------------------------------------------------------------------------------

IN_PLACE = {
    "+=": lambda y: y.add_(torch.ones_like(y)),
    "relu_": torch.relu_,
    "mul_": lambda y: y.mul_(2.0),
    "masked_fill_": lambda y: y.masked_fill_(y < 0, 0.0),
    "index": lambda y: y.__setitem__((..., 0), 1.0),
}


@given(
    make=st.sampled_from([linear4, linear8, lambda **options: fill(Linear8bitLt(64, 32, **options))]),
    bias=st.booleans(), shape=st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 3), (0,)]), dtype=st.sampled_from([F32, BF16]),
    change=st.sampled_from(sorted(IN_PLACE)), frozen=st.booleans(), in_order=st.booleans(), train=st.booleans(),
)  # fmt: skip
def test_an_output_may_be_changed_in_place(make, bias, shape, dtype, change, frozen, in_order, train):
    layer = make(bias=bias).train(train).requires_grad_(not frozen) if bias else make(bias=bias)
    x = inputs(*shape, 64, dtype=dtype)
    gradients = []
    for prepare in (lambda y: y, torch.clone):
        a = x.clone().requires_grad_()
        with bnbref.batch_invariant() if in_order else contextlib.nullcontext():
            y = prepare(layer(a))
        IN_PLACE[change](y)
        y.square().sum().backward()
        gradients.append(raw(a.grad))
    assert gradients[0] == gradients[1]
    with torch.no_grad():
        y = layer(x)
    delta = torch.ones(y.shape, dtype=dtype, requires_grad=True)
    y += delta  # after no_grad, as peft does it
    y.sum().backward()
    assert raw(delta.grad) == raw(torch.ones_like(delta))


def test_results_of_functions_may_be_changed_in_place():
    codes, absmax, _ = int8_vectorwise_quant(inputs(4, 4))
    with torch.no_grad():
        y = int8_mm_dequant(int8_linear_matmul(codes, codes), absmax, absmax)
    delta = torch.ones(4, 4, requires_grad=True)
    y += delta
    y.sum().backward()
    assert delta.grad is not None


# ---- torch.func -----------------------------------------------------------------------------------------------------


def close(got, want):
    return torch.allclose(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)


@each_linear
@pytest.mark.parametrize("kernels", ["eager", "compiled"], indirect=True)
def test_transforms_of_torch_func(make, kernels):
    layer, x = make(), inputs(5, 64)
    weight, ones = weight_of(layer), torch.ones(5, 32)
    assert close(vmap(layer)(x), torch.stack([layer(row) for row in x]))
    assert close(vmap(layer)(x.expand(2, 5, 64))[1], layer(x))
    assert close(grad(lambda x: layer(x).sum())(x), ones @ weight)
    assert close(vmap(grad(lambda x: layer(x).sum()))(x), ones @ weight)
    assert close(jacrev(layer)(x[0]), weight)
    assert close(jacfwd(layer)(x[0]), weight)
    assert close(jvp(layer, (x,), (x,))[1], x @ weight.t())
    assert close(hessian(lambda x: layer(x).square().sum())(x[0]), 2 * weight.t() @ weight)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), forward_ad.dual_level():
            assert close(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent, x @ weight.t())


@each_linear
def test_functional_call(make):
    layer, x = make(), inputs(5, 64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    assert raw(functional_call(layer, dict(layer.named_parameters()), (x,))) == raw(layer(x))
    assert raw(functional_call(layer, parameters, (x,))) == raw(layer(x))
    bias = layer.bias.detach()
    by_bias = grad(lambda bias: functional_call(layer, {**parameters, "bias": bias}, (x,)).sum())(bias)
    assert close(by_bias, torch.full((32,), 5.0))
    each = vmap(lambda bias: functional_call(layer, {"bias": bias}, (x,)))(torch.stack([bias, bias + 1]))
    assert close(each[1] - each[0], torch.ones(5, 32))


def test_the_trained_weight_of_an_int8_layer():
    layer, x = float8(), inputs(5, 64)
    weight = layer.weight.detach()

    def call(weight):
        return functional_call(layer, {"weight": weight}, (x,))

    assert close(grad(lambda w: call(w).sum())(weight), torch.ones(32, 5) @ x)
    assert close(jvp(call, (weight,), (weight,))[1], x @ weight.t())


@pytest.mark.parametrize("make", [linear4, linear8])
def test_codes_of_several_layers_are_refused(make):
    ensemble = [make(), make(seed=1)]
    with torch.no_grad(), pytest.raises(ValueError, match="stack takes the codes of a quantized"):
        stack_module_state(ensemble)
    parameters = {"weight": torch.stack([layer.weight.data for layer in ensemble])}
    x = inputs(5, 64)
    with pytest.raises(ValueError, match="a quantized weight must be one weight, got the codes of several under vmap"):
        vmap(lambda p: functional_call(ensemble[0], p, (x,)))(parameters)


# ---- torch.jit ------------------------------------------------------------------------------------------------------


@given(layer=layers(), double=st.booleans())
@pytest.mark.filterwarnings("ignore")  # the tracer's own, of checks that it does not record; it is deprecated besides
def test_traced_saved_and_loaded(layer, double):
    x = argument(layer)
    if not isinstance(layer, nn.Embedding) and double:
        x = x.expand(2, *x.shape)
    if getattr(layer.weight, "quant_storage", torch.uint8) != torch.uint8:
        with pytest.raises(
            NotImplementedError, match=r"torch\.jit\.trace needs codes of quant_storage torch\.uint8, got"
        ):
            torch.jit.trace(layer, x, check_trace=False)
        return
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x, check_trace=False), file)
    file.seek(0)
    program = torch.jit.load(file)
    for argument_ in (x, torch.cat([x, x.flip(0)])):
        want = layer(argument_)
        # Outlier columns are a product of all columns there: summed in another order, see test_linear8bit.
        assert torch.allclose(program(argument_), want, rtol=0, atol=1e-4 if want.dtype == F32 else 0.5)


# ---- inference mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["eager", "compiled"], indirect=True)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_quantized_or_loaded_in_inference_mode_is_trained_through(bits, nested, kernels):
    with torch.no_grad():
        layer = fill(
            Linear4bit(64, 32, quant_type="nf4", compress_statistics=nested)
            if bits == 4
            else Linear8bitLt(64, 32, has_fp16_weights=False, threshold=2.0)
        )
    want = inputs(3, 64).requires_grad_()
    with torch.inference_mode():
        layer = layer.to("cpu")
        layer.load_state_dict(layer.state_dict())
    x = inputs(3, 64).requires_grad_()
    layer(x).sum().backward()
    F.linear(want, weight_of(layer)).sum().backward()
    assert close(x.grad, want.grad)


def test_what_is_kept_on_a_gpu_is_made_by_another_thread():
    """A CUDA graph that is being recorded would own what this thread allocates."""
    here, made = threading.get_ident(), []

    @cached()
    def table(name, device):
        made.append((name, threading.get_ident() == here))
        return torch.zeros(1)

    for name, kind in (("a", "cpu"), ("b", "cuda"), ("b", "cuda")):
        assert table(name, torch.device(kind)) is table(name, torch.device(kind))
    assert made == [("a", True), ("b", False)]


LATE = """
import threading
from bnbref.context import in_another_thread
def late():
    threading.main_thread().join()
    print(in_another_thread(lambda: 7))
threading.Thread(target=late).start()
"""


def test_in_another_thread():
    """Also once the main thread has ended, where concurrent.futures takes no work; an error is its caller's."""
    done = subprocess.run(
        [sys.executable, "-c", LATE], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout == "7\n", done.stderr
    with pytest.raises(ZeroDivisionError):
        in_another_thread(lambda: 1 // 0)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signal can be sent to a thread here")
def test_an_interrupt_waits_for_the_other_thread():
    ended = []

    def interrupted():
        time.sleep(0.05)  # until the main thread waits
        # Not _thread.interrupt_main, which does not end a wait.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)
        ended.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            in_another_thread(interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [True]


# ---- torch.fx -------------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.relu = layer, nn.ReLU()

    def forward(self, x):
        return self.relu(self.layer(x)) + 1


@settings(max_examples=20)
@given(layer=layers())
def test_a_layer_is_one_node_of_a_graph_of_torch_fx(layer):
    """Like a layer of torch.nn."""
    x, model = argument(layer), Shifted(layer)
    want = model(x)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.find_nodes(op="call_module", target="layer")] == ["layer"]
    assert graph.layer is layer
    assert torch.equal(graph(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), want)


def test_a_layer_alone_is_not_traced_by_torch_fx():
    with pytest.raises(TypeError, match=r"torch\.fx traces a model that contains layers like Linear4bit\("):
        torch.fx.symbolic_trace(linear4())


class Scaled(Linear4bit):
    def forward(self, x):
        return super().forward(2 * x)


def replaced(layer):
    layer.forward = functools.partial(type(layer).forward, layer)  # as accelerate's hooks are put around a layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda module, given, result: 2 * result),
        lambda layer: layer.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
        lambda layer: setattr(layer, "__class__", Scaled),
        replaced,
    ],
)
def test_what_is_around_a_forward_is_not_traced_by_torch_fx(change):
    """It was recorded, and the node did it once more: 4 x in place of 2 x."""
    model = Shifted(linear4())
    change(model.layer)
    with pytest.raises(TypeError, match=r"with hooks or a forward of its own: it would run them twice"):
        torch.fx.symbolic_trace(model)
