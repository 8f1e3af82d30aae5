"""Parameters that carry their scales: moved, copied, cast, rebuilt and taken apart."""

import copy
import functools
import inspect
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import (
    BF16,
    F16,
    F32,
    SURVIVORS,
    argument,
    fill,
    layers,
    linear4,
    linear8,
    raw,
    raw_state,
    raw_weight,
    unquantized,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bnbref
from bnbref.functional import dequantize_4bit
from bnbref.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bnbref.nn.quantized_parameter import in_bytes

STORAGES = [torch.uint8, BF16, F16, F32, torch.int8, torch.float64]


@pytest.fixture(autouse=True)
def _eager():
    with bnbref.eager():
        yield


def weights():
    return [
        linear4(quant_type="nf4", compress_statistics=False).weight,
        linear4(compress_statistics=True, quant_storage=BF16).weight,
        linear8().weight,
    ]


each_weight = pytest.mark.parametrize("weight", weights(), ids=["nf4", "fp4-nested-bf16", "int8"])


class Foreign(nn.Module):
    """A module that knows nothing of quantized parameters."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


# ---- one property for all -------------------------------------------------------------------------------------------


@given(layer=layers(), how=st.sampled_from(sorted(SURVIVORS)))
def test_codes_scales_and_outputs_survive(layer, how):
    x = argument(layer)
    want, output = raw_weight(layer), raw(layer(x))
    other = SURVIVORS[how](layer)
    assert raw_weight(other) == want
    assert raw(other(x)) == output
    assert raw_weight(layer) == want, "the original changed"


# ---- the constructor's keywords are the attributes ------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_every_attribute_is_a_keyword(cls):
    assert set(vars(cls(torch.ones(2, 2)))) <= set(inspect.signature(cls.__new__).parameters)


@each_weight
def test_rebuilding_from_the_attributes(weight):
    extra = {"_is_hf_initialized": True, "requires_grad": False}
    again = type(weight)(weight.data, **{**weight.__dict__, **extra}).to("cpu")
    assert raw_weight(Foreign(again)) == raw_weight(Foreign(weight))


def test_transformers_takes_SCB_out_of_the_attributes():
    kwargs = Int8Params(torch.ones(2, 4), requires_grad=False, SCB=torch.ones(2))
    attributes = kwargs.__dict__
    attributes.pop("SCB", None)
    assert kwargs.SCB is None
    assert Int8Params(torch.ones(2, 4), requires_grad=False, **attributes).to("cpu").SCB.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("changed", [{"bnb_quantized": False}, {}], ids=["peft", "litgpt, adapters"])
def test_merged_weights_are_quantized_again(changed):
    """peft says that the merged weight is not quantized; others pass the attributes of the old one as they are."""
    weight = linear4(quant_type="nf4", quant_storage=BF16).weight
    merged = dequantize_4bit(weight.data, weight.quant_state) + 1
    attributes = {**weight.__dict__, "requires_grad": False, **changed}
    again = Params4bit(merged.to("cpu"), **attributes).to(weight.device)
    want, state = bnbref.functional.quantize_4bit(merged, None, None, 64, True, "nf4", BF16)
    assert raw(again.data) == raw(want)
    assert again.quant_state == state


def test_olora_passes_some_attributes():
    weight = linear4().weight
    again = type(weight)(
        torch.ones(8, 64),
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        compress_statistics=weight.compress_statistics,
        module=weight.module,
    )
    assert again.to("cpu").quant_state.shape == (8, 64)


# ---- to -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda p: p.to("cpu"), lambda p: p.cpu(), lambda p: p.to(torch.ones(1))])
@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_a_move_quantizes_and_leaves_the_parameter_alone(cls, move):
    weight = cls(torch.ones(4, 64), requires_grad=False)
    moved = move(weight)
    assert moved.holds_codes()
    assert not weight.holds_codes()
    assert raw(weight.data) == raw(torch.ones(4, 64))


@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_neither_meta_nor_a_dtype_quantizes(cls):
    weight = cls(torch.ones(4, 64), requires_grad=False)
    assert weight.to("meta").shape == (4, 64)
    assert weight.to(BF16).dtype == weight.half().bfloat16().dtype == BF16
    assert not weight.to("meta").holds_codes()
    assert not weight.to(BF16).holds_codes()


def test_a_move_with_a_dtype_is_the_cast_and_then_the_move():
    layer = fill(Linear4bit(64, 8))
    at_once, in_turn = copy.deepcopy(layer).to("cpu", F16), copy.deepcopy(layer).to(F16).to("cpu")
    assert raw_weight(at_once) == raw_weight(in_turn)
    assert at_once.quant_state.dtype == F16


@each_weight
def test_moving_shares_no_scales_with_meta(weight):
    before = raw_weight(Foreign(weight))
    offloaded = weight.to("meta")
    assert offloaded.device.type == "meta"
    assert raw_weight(Foreign(weight)) == before
    # accelerate loads it again from what it kept of the data.
    again = type(weight)(weight.data.clone(), requires_grad=False, **offloaded.__dict__).to("cpu")
    assert raw_weight(Foreign(again)) == before


def test_a_moved_weight_has_scales_of_its_own():
    weight = linear4().weight
    moved = weight.to("cpu")
    moved.quant_state.absmax = torch.zeros(1)
    assert weight.quant_state.absmax.numel() == 32


def test_bnb_quantized_set_to_false_forces_quantization():
    weight = linear4().weight
    weight.bnb_quantized, weight.data = False, torch.ones(2, 64)
    assert weight.to("cpu").quant_state.shape == (2, 64)
    weight.bnb_quantized = False
    assert weight.to("cpu").bnb_quantized


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [Linear4bit(64, 4), Linear8bitLt(64, 4, has_fp16_weights=False)])
def test_what_is_not_finite_is_refused(layer, value):
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight[1, 2] = value
    with pytest.raises(ValueError, match=r"weight of shape \(4, 64\) .* 1 of its elements are NaN or infinite"):
        layer.to("cpu")


@pytest.mark.parametrize("layer", [Linear4bit, functools.partial(Linear8bitLt, has_fp16_weights=False)])
def test_a_weight_of_another_dtype_is_refused_as_a_weight(layer):
    """As in a layer that was made under that default dtype. Its user knows no "A", the argument of what is called inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = layer(64, 4)
    finally:
        torch.set_default_dtype(before)
    said = r"a weight of shape \(4, 64\) cannot become (nf4|fp4|int8): its dtype must be float32, .*got torch\.float64"
    with pytest.raises(ValueError, match=said):
        made.to("cpu")


@pytest.mark.parametrize("kwargs", [{"quant_type": "nf5"}, {"quant_type": None}])
def test_unknown_types_are_refused(kwargs):
    with pytest.raises(ValueError, match="quant_type must be one of"):
        Params4bit(torch.ones(2), **kwargs)


@pytest.mark.cuda
@given(layer=layers())
def test_quantized_weights_travel_to_a_gpu_and_back(layer):
    want = raw_weight(layer)
    there = copy.deepcopy(layer).to("cuda")
    assert there.weight.device.type == "cuda"
    tensors = [there.weight.SCB] if isinstance(there.weight, Int8Params) else there.weight.quant_state.tensors()
    assert all(t.device.type == "cuda" for t in tensors)
    there(argument(layer).to("cuda"))
    assert raw_weight(there) == want
    assert raw_weight(there.cpu()) == want
    assert raw_weight(copy.deepcopy(layer).cuda(0).cpu()) == want


@pytest.mark.cuda
@given(layer=layers())
def test_a_gpu_quantizes_as_the_cpu_does(layer):
    source = fill(unquantized(layer), 5)
    if getattr(source.weight, "compress_statistics", False):
        source.weight.compress_statistics = False  # the mean of the scales is a float sum, in the device's order
    assert raw_weight(copy.deepcopy(source).to("cuda")) == raw_weight(source.to("cpu"))


# ---- bytes are not numbers ------------------------------------------------------------------------------------------

CASTS = {
    "half": lambda p: p.half(),
    "float": lambda p: p.float(),
    "bfloat16": lambda p: p.bfloat16(),
    "double": lambda p: p.double(),
    "to": lambda p: p.to(F16),
    "to with device": lambda p: p.to("cpu", F16),
}


@each_weight
@pytest.mark.parametrize("cast", CASTS)
def test_a_quantized_parameter_is_not_cast(weight, cast):
    if weight.dtype == BF16 and cast == "bfloat16":
        assert raw(CASTS[cast](weight).data) == raw(weight.data)
        return
    with pytest.raises(
        TypeError,
        match=r"a quantized (Params4bit|Int8Params) cannot become torch\.float"
        r"|cannot become torch\.bfloat16",
    ):
        CASTS[cast](weight)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.float, nn.Module.bfloat16, nn.Module.double])
def test_casting_a_layer_leaves_its_codes_and_scales_alone(storage, cast):
    layer = linear4(quant_storage=storage)
    before = raw_weight(layer)
    assert raw_weight(cast(layer)) == before
    assert layer.bias.dtype != F32 or cast is nn.Module.float


def test_casting_a_foreign_module_with_float_storage_is_refused():
    with pytest.raises(TypeError, match=r"cannot become torch\.float16"):
        Foreign(linear4(quant_storage=BF16).weight).half()


@pytest.mark.parametrize("name", ["cpu", "half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("cls", [Int8Params, Params4bit])
def test_a_subclass_with_its_own_to_is_asked_by_each_cast(cls, name):
    asked = []

    class Own(cls):
        def to(self, *args, **kwargs):
            asked.append(args)
            return super().to(*args, **kwargs)

    getattr(Own(torch.ones(64, 64)), name)()
    assert len(asked) == 1
    assert getattr(cls, name).__doc__


def test_casting_integers_too_is_refused_and_leaves_the_bias():
    layer = linear4(bias=True)
    with pytest.raises(TypeError, match=r"is bytes, which cannot become torch\.float16"):
        layer.type(F16)
    assert layer.bias.dtype == F32


@given(st.sampled_from([F32, F16, BF16, torch.uint8, torch.int8]), st.sampled_from([(), (0,), (3,), (2, 1)]))
def test_in_bytes_gives_the_tensor_back(dtype, shape):
    x = torch.ones(shape).to(dtype)
    assert raw(in_bytes(lambda t: t.clone(), x)) == raw(x)


# ---- in a module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_a_foreign_module_moves_its_weight_whole(cls):
    module = Foreign(cls(torch.ones(4, 64), requires_grad=False))
    alone = module.weight.to("cpu")
    kept = module.weight
    module.to("cpu")
    assert module.weight is kept
    assert raw_weight(module) == raw_weight(Foreign(alone))


@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_data_takes_the_scales_along(cls):
    weight = cls(torch.ones(4, 64), requires_grad=False)
    weight.data = weight.to("cpu")
    assert weight.holds_codes()
    assert type(weight.data) is torch.Tensor


def test_other_int8_codes_are_used_when_their_scales_are_there():
    """Lightning's layers quantize a weight anew so when a checkpoint is loaded; those of the weight before are remembered."""
    layer, other = linear8(bias=False), linear8(bias=False, seed=1)
    x = torch.eye(64)
    layer(x)
    kept = layer.weight
    layer.weight.data = layer.weight.CB = other.weight.CB
    for waiting in (layer, copy.deepcopy(layer), copy.deepcopy(layer).to("cpu")):
        # Nor can it be saved: codes alone are nothing that can be loaded.
        for use, arguments in ((waiting, (x,)), (waiting.state_dict, ())):
            with pytest.raises(RuntimeError, match=r"has no scales: assign them to weight\.SCB"):
                use(*arguments)
        with pytest.raises(RuntimeError, match="weight is missing, but its"):
            waiting.load_state_dict({"SCB": other.SCB})
    layer.weight.SCB = other.weight.SCB[:-1]  # those that are remembered are of other codes
    with pytest.raises(RuntimeError, match=r"has no scales: assign them to weight\.SCB"):
        layer(x)
    layer.weight.SCB = other.weight.SCB
    assert layer.weight is kept
    assert raw(layer(x)) == raw(other(x))
    assert raw_weight(layer) == raw_weight(other)


def test_int8_codes_of_another_shape_are_refused():
    weight = Int8Params(torch.ones(4, 64), requires_grad=False).to("cpu")
    with pytest.raises(TypeError, match=r"assigned with their scales: .*torch.int8 \[5, 64\]"):
        weight.data = torch.ones(5, 64, dtype=torch.int8)


@given(
    layers(), st.sampled_from([{"copy": True}, {"device": "cpu", "copy": True}, {"copy": True, "non_blocking": True}])
)
def test_a_copy_by_to_shares_no_memory(layer, how):
    def pointers(weight):
        state, absmax = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
        scales = state.tensors() if state is not None else [absmax]
        return {t.data_ptr() for t in (weight.data, *scales)}

    before = raw_weight(layer)
    copied = layer.weight.to(**how)
    assert not pointers(copied) & pointers(layer.weight)
    layer.weight = copied
    assert raw_weight(layer) == before


@pytest.mark.parametrize("make", [lambda: Linear4bit(64, 8, False), lambda: Linear8bitLt(64, 8, False, False)])
def test_tied_weights_stay_tied(make):
    a, b = make(), make()
    b.weight = a.weight
    model = nn.Sequential(a, b).to("cpu")
    assert model[0].weight is model[1].weight
    assert raw(a(torch.ones(2, 64))) == raw(b(torch.ones(2, 64)))


def test_a_module_that_is_named_gets_the_state():
    module = nn.Module()
    weight = Params4bit(torch.ones(1, 64), module=module)
    assert weight.to("cpu").quant_state is module.quant_state


@each_weight
def test_all_tensors_are_shared(weight):
    weight = copy.deepcopy(weight)
    assert weight.share_memory_() is weight
    scales = [weight.SCB] if isinstance(weight, Int8Params) else weight.quant_state.tensors()
    assert all(t.is_shared() for t in [weight.data, *scales])


@each_weight
def test_a_bare_parameter_is_copied_and_pickled(weight):
    for again in (copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert isinstance(again, nn.Parameter)
        assert raw_weight(Foreign(again)) == raw_weight(Foreign(weight))


def test_deepcopy_keeps_what_is_one_object_one():
    layer = linear4()
    one, two = copy.deepcopy([layer.weight, layer])
    assert two.weight is one


# ---- Int8Params -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_a_tensor_without_memory_is_refused_by_name(cls):
    with FakeTensorMode(), pytest.raises(TypeError, match=f"data of a {cls.__name__} must .* got a FakeTensor"):
        cls(torch.randn(64, 64))


@pytest.mark.parametrize("make", [lambda: Linear4bit(64, 32), lambda: Linear8bitLt(64, 32, has_fp16_weights=False)])
@pytest.mark.parametrize("how", ["moved", "loaded", "assigned"])
def test_a_weight_that_was_trained_is_quantized_and_frozen(make, how):
    """As after `model.requires_grad_()`: torch refused to put codes into it."""
    layer, quantized = make(), make().to("cpu")
    weight = layer.requires_grad_().weight
    weight.grad = torch.ones(32, 64)
    if how == "moved":
        layer.to("cpu")
    else:
        layer.load_state_dict(quantized.state_dict(), assign=how == "assigned")
    assert layer.weight.holds_codes()
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None
    assert layer.bias.requires_grad
    layer(torch.ones(1, 64)).sum().backward()


def test_CB_is_the_data():
    weight = Int8Params(torch.ones(2, 4), requires_grad=False)
    assert weight.CB is None
    weight = weight.to("cpu")
    assert raw(weight.CB) == raw(weight.data)
    assert weight.CB.data_ptr() == weight.data_ptr()
    weight.CB = None
    weight.SCB.div_(2)
    assert weight.data.tolist() == [[127] * 4] * 2
    weight.CB = -weight.CB
    assert weight.data.tolist() == [[-127] * 4] * 2
    with pytest.raises(TypeError, match=r"CB must be int8 codes, got torch\.float32"):
        weight.CB = torch.ones(2, 4)


def test_a_float_weight_that_is_to_stay_float_does():
    weight = Int8Params(torch.ones(2, 4), has_fp16_weights=True)
    moved = weight.to("cpu")
    assert (type(moved), moved.dtype, moved.requires_grad, moved.SCB) == (Int8Params, F32, True, None)


# ---- Params4bit -----------------------------------------------------------------------------------------------------


def test_from_prequantized():
    layer = linear4(quant_storage=BF16)
    stats = {k.removeprefix("weight."): v for k, v in layer.state_dict().items() if k.startswith("weight.")}
    module = nn.Module()
    weight = Params4bit.from_prequantized(layer.weight.data, stats, module=module)
    assert raw_weight(Foreign(weight)) == raw_weight(layer)
    assert raw_state(module.quant_state) == raw_state(layer.quant_state)
    with pytest.raises(ValueError, match=r"data must hold 1024 bytes for a weight of shape \(32, 64\), got 1022"):
        Params4bit.from_prequantized(layer.weight.data[1:], stats)


@given(layer=layers())
def test_FSDP_finds_every_key_by_attribute(layer):
    if not isinstance(layer.weight, Params4bit):
        return
    for key, value in layer.state_dict().items():
        found = layer
        for name in key.split("."):
            found = getattr(found, name)
        assert raw(found) == raw(value), key


@pytest.mark.parametrize("name", ["absmax", "quant_map", "nested_absmax", "nested_offset", "state2"])
def test_there_are_no_scales_before_there_are(name):
    assert not hasattr(Params4bit(torch.ones(2)), name)
    assert hasattr(linear4(compress_statistics=True).weight, name)
    nested = name.startswith("nested") and name != "nested_offset"
    assert hasattr(linear4(compress_statistics=False).weight, name) is not nested
