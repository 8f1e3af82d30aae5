"""Linear8bitLt: the integer product to the last bit, the float weight that is trained, and the state that others poke at."""

import copy

import pytest
import torch
from conftest import running
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import BF16, F16, F32, fill, linear8, linear8_layers, raw, raw_weight
from torch import nn

import bnbref
from bnbref import int8
from bnbref.nn import Int8Params, Linear8bitLt


@pytest.fixture(params=["eager"], autouse=True)
def kernels(request):
    """Kernels run uncompiled, unless a test asks for "compiled" by this parameter."""
    with running(request.param):
        yield


def inputs(*shape, dtype=F32, seed=0, outliers=()):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)
    x[..., list(outliers)] *= 20
    return x.to(dtype)


def product(x, layer):
    """The integer part of the definition, in Python integers and float32: no matrix product of floats."""
    rows = x.reshape(-1, x.shape[-1])
    codes, absmax, columns = int8.quantize(rows, layer.state.threshold)
    exact = (codes.long()[:, None, :] * layer.weight.data.long()[None]).sum(-1)
    y = exact.float() * absmax[:, None] * layer.weight.SCB[None] * int8.RECIPROCAL_127_SQUARED
    return (y if layer.bias is None else y + layer.bias.float()), columns


# ---- the product ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_an_outlier_in_one_row_ties_the_rows_of_a_batch(threshold):
    """The column of the outlier is multiplied in floats for all rows. Without outliers a row does not depend on the others."""
    layer = linear8(threshold=threshold)
    quiet, loud = inputs(1, 64), inputs(1, 64, seed=1)
    loud[0, 3] = 30.0
    together, alone = layer(torch.cat([quiet, loud]))[:1], layer(quiet)
    assert (raw(together) == raw(alone)) == (threshold == 0)


@given(
    layer=linear8_layers(), shape=st.sampled_from([(), (1,), (5,), (0,), (2, 3), (2, 0), (1, 2, 3)]),
    dtype=st.sampled_from([F32, BF16, F16]),
)  # fmt: skip
def test_without_outliers_it_is_exact(layer, shape, dtype):
    layer.state.threshold = 0.0
    x = inputs(*shape, layer.in_features, dtype=dtype)
    y = layer(x)
    assert raw(y) == raw(product(x, layer)[0].to(dtype).view(*shape, layer.out_features))


@pytest.mark.parametrize("kernels", ["eager", "compiled"], indirect=True)
@settings(max_examples=20)
@given(
    threshold=st.sampled_from([0.0, 6.0]), rows=st.lists(st.booleans(), min_size=1, max_size=3),
    float_weight=st.booleans(), outlier=st.booleans(), data=st.data(),
)  # fmt: skip
def test_a_nan_stays_nan(threshold, rows, float_weight, outlier, data):
    """In the rows that have one, as in a float product, and in no other; that of a float weight in its column."""
    layer = linear8(3, 64, threshold=threshold, has_fp16_weights=float_weight)
    x = inputs(len(rows), 64, outliers=[7] * outlier)
    want = torch.zeros(len(rows), 3, dtype=torch.bool)
    for row, has_nan in enumerate(rows):
        if has_nan:
            x[row, data.draw(st.integers(0, 63))] = float("nan")
            want[row] = True
    if float_weight and data.draw(st.booleans()):
        layer.weight.data[1, data.draw(st.integers(0, 63))] = float("nan")
        want[:, 1] = True
    assert torch.equal(layer(x).isnan(), want)


@given(layer=linear8_layers(), dtype=st.sampled_from([F32, BF16, F16]))
def test_outlier_columns_are_multiplied_as_floats(layer, dtype):
    layer.state.threshold = 6.0
    x = inputs(5, layer.in_features, dtype=dtype, outliers=[0, layer.in_features // 2])
    exact, columns = product(x, layer)
    assert columns.sum() in (1, 2)
    weight = int8.dequantize(layer.weight.data, layer.weight.SCB, dtype)[:, columns]
    floats = x[:, columns].double() @ weight.t().double()
    # At most two products and one addition in float32 (three roundings, u = 2^-24), one rounding of their sum to the
    # activation's dtype, one addition in float32, and one rounding to that dtype again: eps / 2 each.
    size = x[:, columns].double().abs() @ weight.t().double().abs() + exact.double().abs()
    eps = torch.finfo(dtype).eps
    bound = (2 * eps / 2 + 5 * 2.0**-24) * 1.01 * size + 2 * torch.finfo(dtype).tiny * eps
    assert ((layer(x).double() - (exact.double() + floats)).abs() <= bound).all()


def test_what_was_never_moved_is_multiplied_as_if_it_were():
    layer = fill(Linear8bitLt(64, 32, has_fp16_weights=False))
    x = inputs(3, 64)
    before = raw_weight(layer)
    want = raw(layer(x))
    assert raw_weight(layer) == before
    assert raw(layer.to("cpu")(x)) == want
    assert layer.weight.dtype == torch.int8


@given(layer=linear8_layers(), dtype=st.sampled_from([F32, BF16, F16]), shape=st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_gradients_are_those_of_the_dequantized_layer(layer, dtype, shape):
    x = inputs(*shape, layer.in_features, dtype=dtype).requires_grad_()
    grad = inputs(*shape, layer.out_features, dtype=dtype, seed=1)
    layer(x).backward(grad)
    assert raw(x.grad) == raw(grad @ int8.dequantize(layer.weight.data, layer.weight.SCB, dtype))
    if layer.bias is not None:
        want = grad.reshape(-1, layer.out_features).sum(0, dtype=layer.bias.dtype)
        assert raw(layer.bias.grad) == raw(want)


def test_a_forward_changes_nothing():
    layer = linear8(threshold=2.0)
    before, names, state = raw_weight(layer), set(vars(layer)), dict(vars(layer.state))
    for mode in (layer.eval(), layer.train()):
        mode(inputs(2, 64, dtype=F16))
        mode(inputs(2, 64).requires_grad_()).sum().backward()
    assert (raw_weight(layer), set(vars(layer)), layer.bias.dtype) == (before, names, F32)
    assert vars(layer.state) == state


@pytest.mark.parametrize("has_fp16_weights", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 63), ()])
def test_activations_of_another_width_are_refused(shape, has_fp16_weights):
    layer = linear8(has_fp16_weights=has_fp16_weights)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\] for Linear8bitLt\(in_features=64, "):
        layer(torch.ones(shape))


def test_scales_that_are_lost_are_missed():
    layer = linear8()
    layer._parameters["weight"] = Int8Params(layer.weight.data, requires_grad=False)
    layer.state.SCB = None
    with pytest.raises(RuntimeError, match=r"the int8 weight of Linear8bitLt\(.*has no scales"):
        layer(inputs(1, 64))


# ---- the float weight that is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_trained_weight_is_quantized_as_it_is_now(threshold):
    layer = fill(Linear8bitLt(64, 32, threshold=threshold)).to("cpu")
    assert (type(layer.weight), layer.weight.dtype) == (Int8Params, F32)
    x = inputs(3, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        now = Linear8bitLt(64, 32, has_fp16_weights=False, threshold=threshold)
        now.load_state_dict(layer.state_dict())
        assert raw(layer(x)) == raw(now.to("cpu")(x))
        assert raw(copy.deepcopy(layer).eval()(x)) == raw(now(x))
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_the_gradient_of_a_trained_weight_is_that_of_the_float_layer(shape):
    layer = fill(Linear8bitLt(64, 32))
    x, grad = inputs(*shape, 64), inputs(*shape, 32, seed=1)
    layer(x).backward(grad)
    assert raw(layer.weight.grad) == raw(grad.reshape(-1, 32).t() @ x.reshape(-1, 64))
    assert type(layer.weight) is Int8Params


def test_moves_and_casts_take_the_gradient_along():
    layer = fill(Linear8bitLt(64, 32))
    weight = layer.weight
    layer(inputs(3, 64)).sum().backward()
    want = raw(layer.weight.grad.to(BF16))
    layer.to("cpu", BF16)
    assert layer.weight is weight
    assert (layer.weight.dtype, raw(layer.weight.grad)) == (BF16, want)
    assert layer.to("meta").weight.requires_grad


# ---- the state that others poke at ----------------------------------------------------------------------------------


def test_the_state_is_that_of_the_weight():
    layer = linear8(threshold=6.0)
    assert isinstance(layer.state, bnbref.MatmulLtState)
    assert (layer.state.threshold, layer.state.has_fp16_weights, layer.index) == (6.0, False, None)
    assert raw(layer.state.CB) == raw(layer.weight.data)
    assert layer.state.SCB is layer.weight.SCB
    layer.weight.SCB.div_(2)  # as rwkv does
    assert layer.state.SCB is layer.weight.SCB
    other = linear8(seed=1)
    layer.weight = other.weight
    assert raw(layer.state.CB) == raw(other.weight.data)


def test_a_threshold_that_is_changed_counts():
    layer, x = linear8(), inputs(3, 64, outliers=[3])
    without = layer(x)
    layer.state.threshold = 6.0
    assert not torch.equal(layer(x), without)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_the_state_of_a_copy_is_that_of_the_copy(copied):
    layer = copied(linear8())
    assert layer.state._parameters is layer._parameters


def test_peft_merges():
    layer, x = linear8(), inputs(3, 64)
    weight, state = layer.weight, layer.state
    if state.SCB is None:
        state.SCB = weight.SCB
    merged = bnbref.functional.int8_vectorwise_dequant(weight.data, state.SCB) + 1
    layer.weight = Int8Params(merged, requires_grad=False, has_fp16_weights=weight.has_fp16_weights).to(weight.device)
    state.reset_grads()
    want = Linear8bitLt(64, 32, has_fp16_weights=False)
    want.load_state_dict({"weight": merged, "bias": layer.bias})
    assert raw(layer(x)) == raw(want.to("cpu")(x))
    assert state.SCB is layer.weight.SCB


def test_dora_wraps_the_weight_again_and_again():
    layer, x = linear8(), inputs(3, 64)
    want = raw(layer(x))
    for _ in range(3):
        layer.weight = layer.weight.to("cpu")  # peft, dequantize_module_weight
        assert layer.state.SCB is not None
        assert raw(layer(x)) == want


def test_accelerate_offloads():
    layer, x = linear8(), inputs(3, 64)
    want, kept, before = raw(layer(x)), layer.weight.data.clone(), raw_weight(layer)
    for _ in range(2):
        weight = layer.weight
        layer._parameters["weight"] = Int8Params(weight.to("meta"), requires_grad=False, **weight.__dict__).to("meta")
        layer.state.SCB = None
        layer.state.CxB = None
        assert layer.weight.device.type == "meta"
        weight = layer.weight
        layer._parameters["weight"] = Int8Params(kept.to("cpu"), requires_grad=False, **weight.__dict__).to("cpu")
        assert raw(layer(x)) == want
    assert raw_weight(layer) == before


def test_scales_are_found_where_a_wrapper_leaves_a_plain_parameter():
    layer, x = linear8(), inputs(3, 64)
    want, keys = raw(layer(x)), {k: raw(v) for k, v in layer.state_dict().items()}
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert raw(layer(x)) == want
    assert {k: raw(v) for k, v in layer.state_dict().items()} == keys
    layer.share_memory()  # as a move to another device, of which a test on a CPU has none
    assert layer.SCB.is_shared()
    layer.weight = nn.Parameter(torch.ones(32, 64))
    assert set(layer.state_dict()) == {"weight", "bias"}


# ---- compiled and exported ------------------------------------------------------------------------------------------


def _layer(kind):
    if kind == "float":
        return fill(Linear8bitLt(64, 32))
    return linear8(threshold=6.0 if kind == "outliers" else 0.0)


def _same(got, want, kind, x):
    if kind != "outliers":
        return raw(got) == raw(want)
    # In a graph the outlier part is a product of all 64 columns, most of them zeros: the same two float32 products of
    # 60 x |w| at most, summed in another order, so one rounding apart, and one more where the sum is added.
    size = x.detach().abs().amax() * 4 * 2 + want.detach().abs().amax()
    return bool(((got - want).abs() <= 4 * 2.0**-24 * size).all())


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("int8", "aot_eager"),
        ("outliers", "aot_eager"),
        ("float", "aot_eager"),
        pytest.param("int8", "inductor", marks=pytest.mark.slow),
        pytest.param("outliers", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_it_is_one_graph_with_the_same_bits(kind, backend):
    layer = _layer(kind)
    before = raw_weight(layer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for rows in (5, 7, 9):  # the second makes the batch dynamic, the third must not compile again
        x, y = (inputs(rows, 64, outliers=[3, 40]).requires_grad_() for _ in range(2))
        grad = inputs(rows, 32, seed=1)
        want, got = layer(x), compiled(y)
        assert _same(got, want, kind, x)
        want.backward(grad)
        weight_grad = layer.weight.grad
        layer.weight.grad = None
        got.backward(grad)
        assert raw(y.grad) == raw(x.grad)
        assert weight_grad is None or raw(layer.weight.grad) == raw(weight_grad)
        layer.weight.grad = None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert raw_weight(layer) == before


@pytest.mark.parametrize("kind", ["int8", "outliers", "float"])
@pytest.mark.parametrize("strict", [True, False])
def test_exported_it_has_the_same_bits(kind, strict):
    layer = _layer(kind)
    before = raw_weight(layer)
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(layer, (inputs(5, 64),), strict=strict, dynamic_shapes=batch).module()
    for rows in (5, 9):
        x = inputs(rows, 64, outliers=[3, 40])
        assert _same(program(x), layer(x), kind, x)
    assert raw_weight(layer) == before


@pytest.mark.parametrize("kernels", ["compiled"], indirect=True)
def test_compiled_kernels_give_the_same_bits(kernels):
    layer, x = fill(Linear8bitLt(64, 32, has_fp16_weights=False)).to("cpu"), inputs(3, 64)
    with running("eager"):
        eager = linear8()
        want = raw(eager(x))
    assert raw_weight(layer) == raw_weight(eager)
    assert raw(layer(x)) == want
