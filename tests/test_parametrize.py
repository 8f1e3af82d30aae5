"""Any parameter in four bits: read as before, saved and loaded under its own name, and not kept a moment too long."""

import copy
import gc
import io
import itertools
import weakref

import pytest
import torch
from conftest import running
from hypothesis import given
from hypothesis import strategies as st
from layers import BF16, F16, F32, fill, raw, raw_state
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from bnbref.functional import dequantize_4bit, quantize_4bit
from bnbref.nn import parametrize as four_bit
from bnbref.nn import replace_parameter_4bit, replace_parameter_4bit_prequantized
from bnbref.quant_state import QuantState


@pytest.fixture(params=["eager"], autouse=True)
def kernels(request):
    """Kernels run uncompiled, unless a test asks for "compiled" by this parameter."""
    with running(request.param):
        yield


class Experts(nn.Module):
    """Reads each of its parameters once for each expert."""

    def __init__(self, experts=2, inner=64, outer=32, device="cpu"):
        super().__init__()
        self.experts = experts
        self.up = nn.Parameter(torch.zeros(experts, inner, outer, device=device))
        self.down = nn.Parameter(torch.zeros(experts, outer, inner, device=device))
        self.bias = nn.Parameter(torch.zeros(outer, device=device))

    def forward(self, x):
        y = self.bias
        for expert in range(self.experts):
            y = y + torch.relu(x @ self.up[expert].t()) @ self.down[expert].t()
        return y


def experts(seed=0, dtype=F32, device="cpu", **options):
    module = Experts(device=device)
    module = (module if device == "meta" else fill(module, seed)).to(dtype)
    for name in ("up", "down"):
        replace_parameter_4bit(module, name, **options)
    return module


def steps(module):
    return {name: step for name, _, step in four_bit.quantized_in(module)}


def raw_module(module):
    codes = {name: raw(module.parametrizations[name].original) for name in ("up", "down")}
    return codes, {name: raw_state(step.quant_state) for name, step in steps(module).items()}, raw(module.bias)


X = torch.linspace(-1, 1, 2 * 32).view(2, 32)


@pytest.mark.parametrize("nested", [False, True])
def test_the_parameters_of_another_module_have_its_scales(nested):
    """Under `functional_call` a module computes with the codes and the scales that it is given, and then with its own again."""
    module, other = experts(0, compress_statistics=nested), experts(1, compress_statistics=nested)
    before = raw(module(X))
    for source in (other, module, copy.deepcopy(module)):
        assert raw(functional_call(module, dict(source.named_parameters()), X)) == raw(source(X))
        assert raw(module(X)) == before


@given(
    dtype=st.sampled_from([F32, BF16, F16]), shape=st.sampled_from([(2, 3, 5), (1,), (0, 4), (7, 64)]),
    nested=st.booleans(), quant_type=st.sampled_from(["nf4", "fp4"]), blocksize=st.sampled_from([None, 32, 128]),
)  # fmt: skip
def test_reading_gives_the_quantized_values(dtype, shape, nested, quant_type, blocksize):
    module = nn.Module()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    module.w = nn.Parameter(values.clone())
    replace_parameter_4bit(module, "w", nested, quant_type, blocksize)
    want = dequantize_4bit(*quantize_4bit(values, None, None, blocksize, nested, quant_type))
    assert raw(module.w) == raw(want)
    assert not module.w.requires_grad
    assert [(name, p.dtype) for name, p in module.named_parameters()] == [("parametrizations.w.original", torch.uint8)]


def test_what_is_no_parameter_is_refused():
    module = nn.Module()
    module.number = torch.ones(2)
    with pytest.raises(AttributeError, match="Module has no parameter 'w'"):
        replace_parameter_4bit(module, "w")
    with pytest.raises(TypeError, match=r"'number' of Module must be an nn\.Parameter, got Tensor"):
        replace_parameter_4bit(module, "number")
    module.w = nn.Parameter(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match=r"parameter 'w' of shape .* 1 of its elements are NaN"):
        replace_parameter_4bit(module, "w")


# ---- saved and loaded -----------------------------------------------------------------------------------------------

SAVED = {
    "quantized": lambda module: _load(experts(1), module),
    "other options": lambda module: _load(experts(1, quant_type="fp4", blocksize=128), module),
    "meta": lambda module: _load(experts(device="meta"), module, assign=True),
    "assign": lambda module: _load(experts(1), module, assign=True),
    "within another": lambda module: _load(nn.Sequential(experts(1)), nn.Sequential(module))[0],
    "deepcopy": lambda module: copy.deepcopy(module),
    "to": lambda module: copy.deepcopy(module).to("cpu"),
    "share_memory": lambda module: copy.deepcopy(module).share_memory(),
}


def _load(into, module, **kwargs):
    into.load_state_dict(module.state_dict(), **kwargs)
    return into


@pytest.mark.parametrize("how", SAVED)
@pytest.mark.parametrize("options", [{}, {"compress_statistics": True, "quant_type": "fp4"}], ids=["nf4", "fp4-nested"])
def test_codes_scales_and_outputs_survive(how, options):
    module = experts(dtype=BF16, **options)
    want, output = raw_module(module), module(X.to(BF16))
    other = SAVED[how](module)
    if how in ("quantized", "other options", "within another"):
        other.bfloat16()  # values that were float32 come in float32, as load_state_dict has it
    got = raw_module(other)
    assert got == want or (got[0], got[2]) == (want[0], want[2])
    assert got[1] == want[1]
    assert raw(other(X.to(BF16))) == raw(output)
    assert raw_module(module) == want


def test_a_float_parameter_is_quantized_when_it_is_loaded():
    module, floats = experts(1), fill(Experts())
    module.load_state_dict(floats.state_dict())
    assert raw_module(module) == raw_module(experts())


def test_keys_are_those_of_bitsandbytes():
    stats = ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")
    assert list(experts().state_dict()) == ["bias", *(name + key for name in ("up", "down") for key in stats)]


def test_any_missing_key_is_an_error_and_changes_nothing():
    module, whole = experts(1), experts(compress_statistics=True).state_dict()
    before = raw_module(module)[:2]
    for key, strict in itertools.product([key for key in whole if key != "bias"], [True, False]):
        if (key, strict) in (("up", False), ("down", False)):
            continue
        part = {k: v for k, v in whole.items() if k != key and k.split(".")[0] == key.split(".")[0]}
        with pytest.raises(RuntimeError, match=key.split(".")[0]):
            module.load_state_dict(part, strict=strict)
        assert raw_module(module)[:2] == before
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "down"\.'):
        module.load_state_dict({k: v for k, v in whole.items() if not k.startswith("down")})


def test_what_does_not_fit_is_refused():
    module = experts()
    with pytest.raises(RuntimeError, match=r"up must have the shape \[2, 64, 32\]"):
        module.load_state_dict({"up": torch.ones(2, 64, 31)}, strict=False)
    with pytest.raises(RuntimeError, match="up is on the meta device: load_state_dict needs assign=True"):
        experts(device="meta").load_state_dict(
            {k: v for k, v in module.state_dict().items() if k != "bias"}, strict=False
        )


@pytest.mark.parametrize("nested", [False, True])
def test_functions_of_torch_distributed_checkpoint_get_and_set(nested):
    """They look for what each key of a state dict names."""
    module, other = experts(0, compress_statistics=nested), experts(1, compress_statistics=nested)
    state = get_model_state_dict(module)
    assert state.keys() == module.state_dict().keys()
    set_model_state_dict(other, state)
    assert torch.equal(other.up, module.up)
    assert torch.equal(other.down, module.down)
    file = io.BytesIO()
    torch.save(module.up, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), module.up)


def test_prequantized():
    module, saved = Experts(), experts(compress_statistics=True)
    state_dict = saved.state_dict()
    for name in ("up", "down"):
        setattr(module, name, nn.Parameter(state_dict[name], requires_grad=False))
        stats = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
        replace_parameter_4bit_prequantized(module, name, stats, "cpu")
    module.bias = saved.bias
    assert raw(module(X)) == raw(saved(X))
    module.short = nn.Parameter(state_dict["up"][1:], requires_grad=False)
    with pytest.raises(ValueError, match="parameter 'short' must hold 2048 bytes for the shape"):
        replace_parameter_4bit_prequantized(module, "short", {k: v for k, v in state_dict.items() if "up." in k})


# ---- moved and cast -------------------------------------------------------------------------------------------------


def test_the_values_follow_casts_and_the_codes_do_not():
    module = experts()
    before = raw_module(module)[:2]
    for cast, dtype in ((nn.Module.half, F16), (nn.Module.bfloat16, BF16), (nn.Module.float, F32)):
        cast(module)
        assert module.up.dtype == dtype
        assert raw_module(module)[:2] == before
        module(X.to(dtype))


# ---- kept while the forward runs, and no longer ---------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """A weak reference to each dequantized tensor."""
    made = []

    right = QuantState.dequantize

    def counting(*args):
        values = right(*args)
        made.append(weakref.ref(values))
        return values

    monkeypatch.setattr(QuantState, "dequantize", counting)
    return made


def alive(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_a_forward_dequantizes_once_and_keeps_nothing(reads):
    module = experts()
    with torch.no_grad():
        for count in (2, 4):
            module(X)
            assert (len(reads), alive(reads)) == (count, 0)
        assert raw(module.up) == raw(module.up)
    assert (len(reads), alive(reads)) == (6, 0)


def test_an_error_in_the_forward_leaves_nothing(reads):
    module = experts()
    with pytest.raises(RuntimeError):
        module(torch.ones(2, 31))
    assert (len(reads), alive(reads)) == (1, 0)
    assert all(step.cache is None for step in steps(module).values())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_leaves_nothing(reads, use_reentrant):
    module = experts()
    for _ in range(2):
        x = X.clone().requires_grad_()
        checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
        assert alive(reads) == 0
    assert not parametrize._cache_enabled
    want = X.clone().requires_grad_()
    module(want).sum().backward()
    assert raw(x.grad) == raw(want.grad)


def test_loading_within_is_seen():
    module, other = experts(), experts(1)

    def replace(module, args):
        _ = module.up
        module.load_state_dict(other.state_dict())

    module.register_forward_pre_hook(replace)
    assert raw(module(X)) == raw(other(X))


# ---- compiled and exported ------------------------------------------------------------------------------------------


def test_compiled_and_exported_it_has_the_same_bits():
    module = experts(compress_statistics=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    want, got = module(x), compiled(y)
    assert raw(got) == raw(want)
    want.sum().backward()
    got.sum().backward()
    assert raw(x.grad) == raw(y.grad)
    assert all(step.cache is None for step in steps(module).values())
    assert raw(torch.export.export(module, (X,)).module()(X)) == raw(want)


@pytest.mark.parametrize("kernels", ["compiled"], indirect=True)
def test_compiled_kernels_give_the_same_bits(kernels):
    module = experts()
    with running("eager"):
        want = experts()
        values = raw(want.up)
    assert raw_module(module) == raw_module(want)
    assert raw(module.up) == values
