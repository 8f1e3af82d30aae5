"""Whatever a user does to a quantized model, it computes with the weights that it then has, and what is saved comes back.

hypothesis walks: each step is an operation of torch or of a library around it. Beside the layer goes what it should hold, its
weight and its state dict, taken down whenever an operation is to change them. After each step the state dict is the same bit
for bit, and products are within the bound of a float product of the one in float64.
"""

import copy
import functools
import io
import pickle

import pytest
import torch
from conftest import running
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from layers import raw
from safetensors.torch import load, save
from test_products import linear_and_bound
from torch import nn
from torch.nn.utils import parametrize, prune, vector_to_parameters
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

import bnbref
from bnbref.nn import Embedding4bit, Embedding8bit, Int8Params, Linear4bit, Linear8bitLt

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
N = 8
KINDS = {
    "nf4": lambda k: Linear4bit(k, N, quant_type="nf4", compress_statistics=False),
    "nf4, nested": lambda k: Linear4bit(k, N, bias=False, quant_type="nf4"),
    "fp4 in bfloat16": lambda k: Linear4bit(k, N, quant_type="fp4", quant_storage=BF16),
    "int8": lambda k: Linear8bitLt(k, N, has_fp16_weights=False),
    "a table in fp4": lambda k: Embedding4bit(N, k, quant_type="fp4"),
    "a table in int8": lambda k: Embedding8bit(N, k),
}
# Of 96 columns a block of 64 may lie in two rows; few rows of 128 are multiplied from the codes, where kernels are compiled.
WIDTHS = [96, 128]


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


def without(layer, of_weight):
    """Its state dict without the codes, or without what stands beside them."""
    return {key: x for key, x in layer.state_dict().items() if (key in ("weight", "bias")) == of_weight}


REFUSED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "left as it is by a parametrization": lambda layer: parametrize.register_parametrization(
        layer, "weight", nn.Identity()
    ),
    "normed": weight_norm,
    "initialized": lambda layer: nn.init.normal_(layer.weight),
    "made anew": lambda layer: layer.reset_parameters(),
    "cast with its codes": lambda layer: layer.type(torch.float64),
    "scaled": lambda layer: layer.weight.mul_(2),
    "scaled with others": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "averaged": lambda layer: layer.weight.lerp_(layer.weight.clone(), 0.5),
    "written by a vector": lambda layer: vector_to_parameters(torch.zeros(9999), [layer.weight]),
    "floats as its data": lambda layer: setattr(layer.weight, "data", torch.ones(N, 1)),
    "floats copied": lambda layer: layer.weight.copy_(torch.ones(layer.weight.shape)),
    "half a state dict": lambda layer: layer.load_state_dict(without(layer, True), strict=False),
    "other scales": lambda layer: layer.load_state_dict(
        {key: x + ("absmax" in key or "SCB" in key) for key, x in without(layer, False).items()}, strict=False
    ),
}
"""What a program does with weights that are numbers, by what becomes of them."""


class Walk(RuleBasedStateMachine):
    """`layer` walks. Beside it: `weight`, its float32 values; `saved`, its state dict; `dtype`, in which its other floats are."""

    @initialize(kind=st.sampled_from([*KINDS]), width=st.sampled_from(WIDTHS), seed=st.integers(0, 9))
    def begin(self, kind, width, seed):
        self.kind, self.width = kind, width
        self.layer = self.another(seed)
        self.note()

    def floats(self, seed):
        """A state dict in float32."""
        weight = torch.randn(N, self.width, generator=torch.Generator().manual_seed(seed))
        return {"weight": weight, **({"bias": weight[:, 0].clone()} if self.biased else {})}

    @property
    def biased(self):
        return getattr(KINDS[self.kind](self.width), "bias", None) is not None

    def another(self, seed, dtype=F32):
        layer = KINDS[self.kind](self.width)
        layer.load_state_dict(self.floats(seed))
        return layer.to("cpu").to(dtype)

    def note(self):
        """The layer has new weights: take down what it should hold from now on."""
        weight = self.layer.weight
        if isinstance(weight, Int8Params):
            self.weight = weight.data.double() * weight.SCB.double()[:, None] / 127
        else:
            state, data = weight.quant_state, weight.data.clone()
            self.weight = bnbref.functional.dequantize_4bit(data, copy.deepcopy(state)).float()
        self.saved = {key: raw(x) for key, x in self.layer.state_dict().items()}
        self.dtype = (
            self.layer.dtype if isinstance(self.layer, nn.Embedding) else self.layer.bias.dtype if self.biased else F32
        )
        self.products()

    # ---- what changes nothing ---------------------------------------------------------------------------------------

    @rule(how=st.sampled_from([copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x)), through_file]))
    def copied(self, how):
        self.layer = how(self.layer)

    @rule(how=st.sampled_from(["to", "cpu", "share_memory", "train", "eval", "requires_grad_", "zero_grad"]))
    def moved(self, how):
        getattr(self.layer, how)(*["cpu"] if how == "to" else [])

    @rule(frozen=st.booleans())
    def frozen_bias(self, frozen):
        if self.biased:
            self.layer.bias.requires_grad_(not frozen)

    @rule(way=st.sampled_from(["float", "quantized", "meta", "empty", "assign", "itself", "safetensors"]))
    def loaded(self, way):
        entries = {key: x.clone() for key, x in self.layer.state_dict().items()}
        if way == "safetensors":
            entries = load(save({key: x.contiguous() for key, x in entries.items()}))
        fresh = self.layer if way == "itself" else KINDS[self.kind](self.width)
        if way in ("quantized", "safetensors"):
            fresh = self.another(77, self.dtype)
        elif way == "meta":
            fresh = fresh.to("meta")
        elif way == "empty":
            fresh = self.another(78, self.dtype).to_empty(device="cpu")
        else:
            fresh.to(self.dtype)
        fresh.load_state_dict(entries, assign=way in ("meta", "assign"))
        self.layer = fresh

    @rule()
    def offloaded(self):
        """As accelerate does: the weight is taken away, and put back when the layer is called."""
        weight = self.layer.weight
        self.layer._parameters["weight"] = weight.to("meta")
        self.layer._parameters["weight"] = type(weight)(weight.data.clone(), **weight.__dict__)

    @rule()
    def swapped(self):
        torch.utils.swap_tensors(self.layer.weight, copy.deepcopy(self.layer.weight))

    @rule(way=st.sampled_from(["sequential", "dict", "averaged", "tied"]))
    def among_others(self, way):
        """The layer is part of a model, which is copied and loaded by the names that the layer has there."""
        other = self.another(30, self.dtype)
        if way == "tied":
            other.weight = self.layer.weight
            both = copy.deepcopy(nn.ModuleList([self.layer, other]))
            assert both[0].weight is both[1].weight
        elif way == "averaged":
            both = [AveragedModel(self.layer).module]
        else:
            wrapped = nn.Sequential if way == "sequential" else lambda layer: nn.ModuleDict({"0": layer})
            both, model = wrapped(other), wrapped(self.layer)
            both.load_state_dict(model.state_dict())
            assert {key.removeprefix("0.") for key in model.state_dict()} == {*self.layer.state_dict()}
            both = [*both.children()]
        self.layer = both[0]

    @rule(way=st.sampled_from(["itself", "another", "detached", "replica"]))
    def called_with_parameters(self, way):
        """As functional_call and DataParallel do: the layer computes with parameters that are given for one call."""
        other = self.layer if way == "itself" else self.another(31, self.dtype)
        x = torch.arange(N) if isinstance(self.layer, nn.Embedding) else torch.randn(3, self.width).to(self.dtype)
        given = {name: p.detach() if way == "detached" else p for name, p in other.named_parameters()}
        if way == "replica":
            called = self.layer._replicate_for_data_parallel()
            for name in ("weight", *["bias"] * self.biased):
                setattr(called, name, given[name].detach())
            if not self.biased:
                called.bias = None
            got = called(x)
        else:
            got = torch.func.functional_call(self.layer, given, (x,))
        assert torch.equal(got, other(x))

    @rule(what=st.sampled_from([*REFUSED]))
    def refused(self, what):
        """What takes codes for numbers, or has half a weight, is refused, and leaves the layer as it was."""
        with pytest.raises((ValueError, TypeError, RuntimeError)), torch.no_grad():
            REFUSED[what](self.layer)
        assert "weight" in self.layer._parameters
        if self.biased:
            assert self.layer.bias.dtype == self.dtype

    @rule()
    def with_a_hook(self):
        handle = self.layer.register_forward_hook(lambda layer, args, out: out + 0)
        self.products()
        handle.remove()

    # ---- what changes something -------------------------------------------------------------------------------------

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype):
        self.layer.to(dtype)
        if self.biased:
            self.saved["bias"] = raw(self.layer.bias)
            assert self.layer.bias.dtype == dtype
        if isinstance(self.layer, nn.Embedding):
            assert self.layer.dtype == dtype
        self.dtype = dtype

    @rule(seed=st.integers(10, 19), how=st.sampled_from(["float", "state dict", "parameter", "data", "detached"]))
    def other_weights(self, seed, how):
        other = self.another(seed, self.dtype)
        if how == "float":
            self.layer.load_state_dict(self.floats(seed))
        elif how == "state dict":
            self.layer.load_state_dict(other.state_dict())
        elif how == "parameter":
            self.layer.weight = other.weight
        else:
            self.layer.weight.data = other.weight if how == "data" else other.weight.detach()
        want = {key: raw(x) for key, x in other.state_dict().items() if key != "bias"}
        got = {key: raw(x) for key, x in self.layer.state_dict().items() if key != "bias"}
        if how != "float" or self.dtype == F32:
            assert got == want
        self.note()

    @rule(scale=st.sampled_from([0.5, 2.0]), in_place=st.booleans())
    def other_scales(self, scale, in_place):
        weight = self.layer.weight
        owner, name = (weight, "SCB") if isinstance(weight, Int8Params) else (weight.quant_state, "absmax")
        if name == "absmax" and weight.quant_state.nested:
            owner = weight.quant_state.state2
        scales = getattr(owner, name)
        if in_place:
            with torch.no_grad():
                scales.mul_(scale)
        else:
            setattr(owner, name, scales * scale)
        self.note()

    @rule(byte=st.integers(0, 255))
    def other_codes(self, byte):
        self.layer.weight.data.view(torch.uint8)[1:3] = byte
        self.note()

    @rule(seed=st.integers(20, 29))
    def merged(self, seed):
        """An adapter is merged as peft merges one: decoded, added, quantized anew as the keywords of the old one say."""
        weight = self.layer.weight
        values = self.weight.to(F32) + self.floats(seed)["weight"]
        kwargs = {key: x for key, x in weight.__dict__.items() if key not in ("quant_state", "SCB", "bnb_quantized")}
        kwargs["requires_grad"] = False
        self.layer.weight = type(weight)(values, **kwargs).to("cpu")
        self.note()

    # ---- what must hold ---------------------------------------------------------------------------------------------

    @rule(
        rows=st.sampled_from([(), (1,), (3,), (1, 1), (0,), (2, 3)]),
        dtype=st.sampled_from(DTYPES),
        how=st.sampled_from(["no grad", "grad", "inference", "autocast"]),
        layout=st.sampled_from(["plain", "strided", "negative", "expanded"]),
    )
    def called(self, rows, dtype, how, layout):
        if not isinstance(self.layer, nn.Embedding):
            self.product(torch.randn(*rows, self.width), dtype, how, layout)

    def products(self):
        if isinstance(self.layer, nn.Embedding):
            got = self.layer(torch.arange(N))
            assert got.dtype == self.dtype
            assert torch.allclose(got.double(), self.weight.double(), rtol=2.0**-8, atol=1e-6)
            return
        for rows in (1, 3):
            self.product(torch.randn(rows, self.width), F32, "no grad", "plain")

    def product(self, x, dtype, how, layout):
        x = x.to(dtype)
        if layout == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        elif layout == "negative":
            x = torch._neg_view(-x)
        elif layout == "expanded":
            x = x[..., :1].expand(x.shape)
        autocast = functools.partial(torch.autocast, "cpu", BF16)
        modes = {"inference": torch.inference_mode, "no grad": torch.no_grad, "autocast": autocast}
        if how == "grad":
            x = x.detach().requires_grad_()
        with modes.get(how, torch.enable_grad)():
            got = self.layer(x)
        if how == "grad":
            got.sum().backward()
            assert x.grad.shape == x.shape
        assert got.shape == (*x.shape[:-1], N)
        assert got.dtype == x.dtype
        bias = None if self.layer.bias is None else self.layer.bias.detach()
        if isinstance(self.layer, Linear8bitLt):
            exact = nn.functional.linear(x.detach().double(), self.weight, None if bias is None else bias.double())
            # Activations are rounded to 127ths of their largest; the product is exact, scaled in float32 and rounded to x.dtype.
            coding = x.detach().double().abs().amax(-1, keepdim=True) / 254 * self.weight.abs().sum(-1)
            bound = 1.001 * coding + (2.0**-22 + torch.finfo(x.dtype).eps) * (exact.abs() + coding) + 1e-6
        else:
            inner = BF16 if how == "autocast" else dtype
            a, weight = x.detach().to(inner), self.weight.to(inner)
            exact, bound = linear_and_bound(a, weight, None if bias is None else bias.to(inner))
            # Few rows are computed with the weight that is not rounded to the dtype of the product.
            bound = (
                bound
                + torch.finfo(inner).eps * (a.double().abs() @ weight.double().abs().T)
                + torch.finfo(dtype).eps * exact.abs()
            )
        assert bool(((got.detach().double() - exact).abs() <= bound).all())

    @invariant()
    def the_same_bits(self):
        if hasattr(self, "layer"):
            assert {key: raw(x) for key, x in self.layer.state_dict().items()} == self.saved


@pytest.mark.filterwarnings("ignore:a quantized weight stays frozen")
@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_walks(examples, eager):
    walk(examples)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a quantized weight stays frozen")
def test_walks_compiled():
    with running("compiled"):
        walk(150)


def walk(examples):
    own = settings(max_examples=examples, stateful_step_count=15, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Walk, settings=own)
