"""Linear4bit: which product it is, in which dtype, and that nothing is left behind; compiled and exported."""

import contextlib
import copy
import warnings

import backend
import pytest
import torch
import torch.nn.functional as F
from conftest import running
from hypothesis import given
from hypothesis import strategies as st
from layers import BF16, F16, F32, fill, linear4, linear4_layers, raw, raw_state, raw_weight
from torch import nn

import bnbref
from bnbref.codebooks import FOUR_BIT, Codebook
from bnbref.functional import dequantize_4bit, quantize_4bit
from bnbref.kernels import ordered
from bnbref.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit, linear


@pytest.fixture(params=["eager"], autouse=True)
def kernels(request):
    """Kernels run uncompiled, unless a test asks for "compiled" by this parameter."""
    with running(request.param):
        yield


def weight_of(layer, dtype):
    """The dequantized weight in a dtype, as the definition has it: one rounding from the float32 product."""
    return layer.quant_state.dequantize(layer.weight.data, dtype)


def inputs(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- the product ----------------------------------------------------------------------------------------------------


@given(
    layer=linear4_layers(), shape=st.sampled_from([(), (1,), (5,), (0,), (2, 3), (2, 0), (1, 2, 3)]),
    dtype=st.sampled_from([F32, BF16, F16]), compute_dtype=st.sampled_from([None, F32, BF16]),
)  # fmt: skip
def test_it_is_the_float_product_with_the_dequantized_weight(layer, shape, dtype, compute_dtype):
    layer.compute_dtype = compute_dtype
    x = inputs(*shape, layer.in_features, dtype=dtype)
    y = layer(x)
    inner = compute_dtype or dtype
    bias = None if layer.bias is None else layer.bias.to(inner)
    assert raw(y) == raw(F.linear(x.to(inner), weight_of(layer, inner), bias).to(dtype))
    assert y.dtype == dtype


@given(
    n=st.sampled_from([1, 5, 96]), k=st.sampled_from([2, 7, 64]), rows=st.sampled_from([(), (0,), (1,), (3,), (2, 3)]),
    dtype=st.sampled_from([F32, BF16, F16]), nested=st.booleans(), biased=st.booleans(), in_order=st.booleans(),
)  # fmt: skip
def test_a_weight_that_was_quantized_as_k_n_is_transposed(n, k, rows, dtype, nested, biased, in_order):
    """bitsandbytes takes it, with this warning; values and gradients are those of the float product."""
    packed, state = quantize_4bit(inputs(k, n), quant_type="nf4", compress_statistics=nested)
    x = inputs(*rows, k, dtype=dtype).requires_grad_()
    bias = inputs(n, dtype=dtype).requires_grad_() if biased else None
    weight = state.dequantize(packed, dtype).t()
    with bnbref.batch_invariant() if in_order else contextlib.nullcontext():
        with pytest.warns(DeprecationWarning, match=r"quantized as \[k, n\]") as said:
            y = bnbref.matmul_4bit(x, packed.t(), state, bias=bias)
        assert {warning.filename for warning in said} == {__file__}  # Python shows it to whom it is about
        flat = x.detach().reshape(-1, k)
        want = ordered.product(flat, weight.t(), bias).view(*rows, n) if in_order else F.linear(x, weight, bias)
        assert raw(y) == raw(want)
        grad = inputs(*rows, n, dtype=dtype, seed=1)
        y.backward(grad)
        product = ordered.product(grad.reshape(-1, n), weight).view(*rows, k) if in_order else grad @ weight
    assert raw(x.grad) == raw(product)
    assert bias is None or bias.grad.shape == (n,)


def test_a_square_weight_is_n_k():
    packed, state = quantize_4bit(inputs(64, 64), quant_type="nf4")
    x = inputs(3, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert raw(bnbref.matmul_4bit(x, packed, state)) == raw(F.linear(x, state.dequantize(packed, F32)))
    with pytest.raises(ValueError, match=r"B must be a weight \[n, k\].*got \(64, 64\) and \(3, 63\)"):
        bnbref.matmul_4bit(x[:, 1:], packed, state)


def test_a_subclass_copies_its_attributes_from_another_layer():
    """As the LoRA layers of AdapterHub's `adapters` do."""
    layer, copy = linear4(compute_dtype=BF16), linear4(seed=1)
    for name in ("weight", "bias", "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage"):
        setattr(copy, name, getattr(layer, name))
    x = inputs(2, 64)
    assert copy.compute_type_is_set
    assert not linear4().compute_type_is_set
    assert torch.equal(copy(x), layer(x))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_float32_products_of_16_bit_activations_are_logged_once(dtype, caplog):
    linear._say_slow.cache_clear()
    with caplog.at_level("WARNING", logger="bnbref"):
        linear4(compute_dtype=dtype)(inputs(2, 64, dtype=dtype))
        linear4()(inputs(2, 64, dtype=dtype))
        linear4(compute_dtype=F32)(inputs(2, 64))
        assert not caplog.messages
        for layer in (linear4(compute_dtype=F32), linear4(compute_dtype=F32)):
            layer(inputs(2, 64, dtype=dtype))
    [message] = caplog.messages
    assert message.startswith(f"Input type into Linear4bit is {dtype}, but compute_dtype=torch.float32")
    assert "slow inference or training" in message


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_product_is_within_its_bound(dtype):
    layer = linear4(64, 256, quant_type="nf4", bias=False)
    x = inputs(16, 256, dtype=dtype)
    weight = weight_of(layer, dtype).double()
    exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    # 256 products, each a rounding and an addition in float32, u = 2^-24: gamma_512 = 512 u / (1 - 512 u) of sum |x w|.
    # Then one rounding to the output dtype, half an ulp: eps / 2 of the result, or of the smallest normal below that.
    gamma = 512 * 2.0**-24 / (1 - 512 * 2.0**-24)
    half_ulp = torch.finfo(dtype).eps / 2
    computed = exact.abs() + gamma * size
    bound = gamma * size + half_ulp * computed.clamp(min=torch.finfo(dtype).tiny)
    assert ((layer(x).double() - exact).abs() <= bound).all()


def test_the_named_layers_have_their_codebooks():
    assert LinearFP4(2, 2).weight.quant_type == "fp4" == Linear4bit(2, 2).weight.quant_type
    assert LinearNF4(2, 2).weight.quant_type == "nf4"
    assert LinearNF4(2, 2, False, BF16, False, BF16, "meta").weight.quant_storage == BF16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_not_quantized_is_not_multiplied(device):
    with pytest.raises(RuntimeError, match=r"Linear4bit\(in_features=64, .* is not quantized yet: .* \.to\(device\)"):
        Linear4bit(64, 2, device=device)(torch.ones(64, device=device))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("compute_dtype", [None, BF16])
def test_activations_that_were_cast_to_the_dtype_of_codes_are_refused(dtype, compute_dtype):
    layer = Linear4bit(64, 2, compute_dtype=compute_dtype).to("cpu")
    with pytest.raises(TypeError, match=rf"x must be floating, got {dtype}: .* torch.uint8, .* skip_modules"):
        layer(torch.ones(3, 64).to(dtype))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 8), (3, 5), ()])
def test_activations_of_another_width_are_refused(grad, shape):
    """As wide as the layer's result, they were multiplied by the transposed weight."""
    layer = linear4(8, 64, bias=False)
    layer(inputs(1, 64))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\] for Linear4bit\(in_features=64, "):
        layer(torch.ones(shape).requires_grad_(grad))


# ---- nothing is left behind -----------------------------------------------------------------------------------------


def test_the_compute_dtype_is_that_of_each_activation():
    layer, fresh = linear4(), linear4()
    layer(inputs(2, 64, dtype=BF16))
    assert layer.compute_dtype is None
    assert raw(layer(inputs(2, 64))) == raw(fresh(inputs(2, 64)))


def test_the_bias_is_not_cast_in_place():
    layer = linear4()
    before, where = raw(layer.bias), layer.bias.data_ptr()
    layer(inputs(2, 64, dtype=F16))
    assert raw(layer.bias) == before
    assert layer.bias.data_ptr() == where


def test_a_forward_changes_nothing():
    layer = linear4()
    before, names, parameters = raw_weight(layer), set(vars(layer)), dict(layer.named_parameters())
    for mode in (layer.eval(), layer.train()):
        mode(inputs(2, 64))
        mode(inputs(2, 64).requires_grad_()).sum().backward()
    assert raw_weight(layer) == before
    assert set(vars(layer)) == names
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())


# ---- gradients ------------------------------------------------------------------------------------------------------


@given(layer=linear4_layers(), dtype=st.sampled_from([F32, BF16, F16]), shape=st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_gradients_are_those_of_the_float_layer(layer, dtype, shape):
    x = inputs(*shape, layer.in_features, dtype=dtype).requires_grad_()
    grad = inputs(*shape, layer.out_features, dtype=dtype, seed=1)
    layer(x).backward(grad)
    assert raw(x.grad) == raw(grad @ weight_of(layer, dtype))
    assert layer.weight.grad is None
    if layer.bias is not None:
        assert layer.bias.grad.dtype == layer.bias.dtype
        # Sums of at most six terms of magnitude a: five roundings of the running sum (at most 6 max a) in grad's dtype,
        # and one to the bias's.
        exact = grad.double().reshape(-1, layer.out_features).sum(0)
        eps = max(torch.finfo(dtype).eps, torch.finfo(layer.bias.dtype).eps)
        bound = 6 * eps / 2 * 6 * (grad.double().abs().max() if grad.numel() else 0)
        assert ((layer.bias.grad.double() - exact).abs() <= bound).all()


def test_a_frozen_bias_gets_no_gradient():
    layer = linear4().requires_grad_(False)
    x = inputs(2, 64).requires_grad_()
    layer(x).sum().backward()
    assert layer.bias.grad is None
    assert not layer(inputs(2, 64)).requires_grad


# ---- quantization ---------------------------------------------------------------------------------------------------


@given(dtype=st.sampled_from([F32, BF16, F16]), nested=st.booleans(), storage=st.sampled_from([torch.uint8, BF16]))
def test_the_layer_quantizes_as_the_function_does(dtype, nested, storage):
    layer = fill(Linear4bit(64, 32, quant_type="nf4", compress_statistics=nested, quant_storage=storage)).to(dtype)
    packed, state = bnbref.functional.quantize_4bit(layer.weight.data, None, None, None, nested, "nf4", storage)
    layer.to("cpu")
    assert raw(layer.weight.data) == raw(packed)
    assert raw_state(layer.quant_state) == raw_state(state)
    assert raw(dequantize_4bit(layer.weight, layer.weight.quant_state)) == raw(dequantize_4bit(packed, state))


def test_a_second_move_quantizes_nothing():
    layer = linear4()
    before = raw_weight(layer)
    for move in (lambda: layer.to("cpu"), layer.cpu, layer.half, lambda: layer.to(BF16), lambda: layer.to("cpu", F32)):
        move()
        assert raw_weight(layer) == before


def test_a_codebook_is_a_type_too(monkeypatch):
    book = Codebook.nearest("thirds", [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1])
    layer, x = linear4(quant_type=book, compress_statistics=True), inputs(2, 64)
    assert raw(layer(x)) == raw(F.linear(x, weight_of(layer, F32), layer.bias))
    assert raw_weight(copy.deepcopy(layer)) == raw_weight(layer)
    with pytest.raises(ValueError, match="codebook 'thirds' must be entered in FOUR_BIT to be saved"):
        layer.state_dict()
    monkeypatch.setitem(FOUR_BIT, "thirds", book)  # later than the weight was quantized
    again = linear4()
    again.load_state_dict(layer.state_dict())
    assert raw(again(x)) == raw(layer(x))


# ---- the weight loses its attributes --------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
@pytest.mark.parametrize("nested", [True, False])
def test_scales_are_found_where_FSDP_leaves_a_plain_parameter(storage, nested):
    layer = linear4(quant_storage=storage, compress_statistics=nested)
    want, keys = raw(layer(inputs(2, 64))), {k: raw(v) for k, v in layer.state_dict().items()}
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert not isinstance(layer.weight, Params4bit)
    assert raw(layer(inputs(2, 64))) == want
    assert {k: raw(v) for k, v in layer.state_dict().items()} == keys
    layer.to("cpu")
    assert raw(layer(inputs(2, 64))) == want
    layer.share_memory()  # as a move to another device, of which a test on a CPU has none
    assert all(t.is_shared() for t in layer.quant_state.tensors())
    with pytest.raises(RuntimeError, match="load before it is wrapped"):
        layer.load_state_dict(linear4().state_dict())


def test_a_float_weight_has_no_scales_of_another():
    layer = linear4()
    layer.weight = nn.Parameter(torch.ones(32, 64))
    assert layer.quant_state is None
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.weight = Params4bit(torch.ones(32, 64))
    assert layer.quant_state is None
    assert layer.to("cpu").quant_state.shape == (32, 64)


def _sharded(rank, ranks, storage, results):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layer = linear4(quant_storage=storage, quant_type="nf4")
    sharded = fully_shard(copy.deepcopy(layer))
    x = inputs(2, 64)
    same = [raw(sharded(x)) == raw(layer(x)) for _ in range(2)]
    sharded(x).sum().backward()
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in sharded.state_dict().items()}
    alike = {k: raw(v) for k, v in whole.items()} == {k: raw(v) for k, v in layer.state_dict().items()}
    results[rank] = (*same, alike)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_sharded_by_FSDP2_it_has_the_same_bits_and_state_dict(storage, tmp_path):
    results = torch.multiprocessing.Manager().dict()
    backend.spawn(_sharded, 2, tmp_path, storage, results)
    assert dict(results) == {0: (True,) * 3, 1: (True,) * 3}


# ---- accelerate -----------------------------------------------------------------------------------------------------


def test_offloading_and_loading_again_keeps_all_bits():
    layer = linear4(quant_type="nf4")
    want, kept = raw(layer(inputs(2, 64))), layer.weight.data.clone()
    before = raw_weight(layer)
    # What accelerate's set_module_tensor_to_device does, behind the layer's back.
    for _ in range(2):
        weight = layer.weight
        layer._parameters["weight"] = type(weight)(weight.data.to("meta"), requires_grad=False, **weight.__dict__).to(
            "meta"
        )
        assert layer.weight.device.type == "meta"
        weight = layer.weight
        layer._parameters["weight"] = type(weight)(kept.to("cpu"), requires_grad=False, **weight.__dict__).to("cpu")
        assert raw(layer(inputs(2, 64))) == want
    assert raw_weight(layer) == before


def test_meta_and_back_is_empty_and_waits_to_be_loaded():
    layer, other = linear4(), linear4(seed=1)
    layer.to("meta")
    assert layer.weight.device.type == layer.bias.device.type == "meta"
    layer.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert raw_weight(layer) == raw_weight(other)
    empty = Linear4bit(64, 32, device="meta").to_empty(device="cpu")
    empty.load_state_dict(other.state_dict())
    assert raw_weight(empty) == raw_weight(other)


# ---- compiled and exported ------------------------------------------------------------------------------------------

VARIANTS = [
    pytest.param({"quant_type": "nf4", "compress_statistics": True}, F32, id="nf4-nested-fp32"),
    pytest.param({"quant_type": "fp4", "compress_statistics": False, "quant_storage": BF16}, BF16, id="fp4-bf16"),
]


@pytest.mark.parametrize(("options", "dtype"), VARIANTS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph_with_the_same_bits(options, dtype, backend):
    layer = linear4(dtype=dtype, **options)
    before = raw_weight(layer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for rows in (5, 7, 9):  # the second makes the batch dynamic, the third must not compile again
        x, y = (inputs(rows, 64, dtype=dtype).requires_grad_() for _ in range(2))
        grad = inputs(rows, 32, dtype=dtype, seed=1)
        want, got = layer(x), compiled(y)
        assert raw(got) == raw(want)
        want.backward(grad)
        got.backward(grad)
        assert raw(y.grad) == raw(x.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert raw_weight(layer) == before


@pytest.mark.parametrize(("options", "dtype"), VARIANTS)
@pytest.mark.parametrize("strict", [True, False])
def test_exported_it_has_the_same_bits(options, dtype, strict):
    layer = linear4(dtype=dtype, **options)
    before = raw_weight(layer)
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(layer, (inputs(5, 64, dtype=dtype),), strict=strict, dynamic_shapes=batch).module()
    for rows in (5, 9):
        x = inputs(rows, 64, dtype=dtype)
        assert raw(program(x)) == raw(layer(x))
    assert raw_weight(layer) == before


@pytest.mark.parametrize("kernels", ["compiled"], indirect=True)
def test_compiled_kernels_give_the_same_bits(kernels):
    layer, x = fill(Linear4bit(64, 32, quant_type="nf4")).to("cpu"), inputs(3, 64)
    with running("eager"):
        eager = linear4(quant_type="nf4")
        want = raw(eager(x))
    assert raw_weight(layer) == raw_weight(eager)
    assert raw(layer(x)) == want
