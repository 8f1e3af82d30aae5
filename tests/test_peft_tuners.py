"""Every tuner of peft over quantized layers: it trains as over the dequantized model, or it is refused by the layer's name first.

None is without effect, and none computes with codes. A tuner that this version of peft has and nobody here knows is refused, too.
"""

import dataclasses
import os
import re
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import skip_beside_bitsandbytes
from torch import nn

import bnbref
from bnbref import int8
from bnbref.functional import dequantize_4bit
from bnbref.nn import Embedding4bit, Linear4bit, Linear8bitLt

peft = pytest.importorskip("peft")
pytest.importorskip("bnbref.integrations.hf.peft")

TUNERS = sorted(kind.value for kind in peft.PEFT_TYPE_TO_TUNER_MAPPING)
OPTIONS = {
    "ADALORA": {"total_step": 10, "tinit": 1, "tfinal": 1},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 100},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 8, "use_cayley_neumann": False},
    "VBLORA": {"vector_length": 16, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 100},
}
MADE = peft.tuners.lora.config
# What peft calls a variant: an option of a LoraConfig that makes another algorithm of it.
OF_LORA = {
    "alora_invocation_tokens": lambda: {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [3, 4]},
    "arrow_config": lambda: {"arrow_config": MADE.ArrowConfig()},
    "kasa_config": lambda: {"kasa_config": MADE.KasaConfig()},
    "monteclora_config": lambda: {"monteclora_config": MADE.MontecloraConfig()},
    "use_bdlora": lambda: {"use_bdlora": MADE.BdLoraConfig(target_modules_bd_a=["0"], nblocks=2)},
    "use_dora": lambda: {"use_dora": True},
    "velora_config": lambda: {"velora_config": MADE.VeloraConfig(num_groups=8)},
}
WORK_AS_THEY_ARE = {"alora_invocation_tokens", "arrow_config", "monteclora_config"}
VARIANTS = [
    *((kind, OPTIONS.get(kind, {})) for kind in TUNERS),
    *(
        ("LORA", {"init_lora_weights": how})
        for how in ("gaussian", "orthogonal", "pissa", "olora", "pissa_niter_4", "corda", "lora_ga")
    ),
    *(
        ("LORA", OF_LORA[name]())
        for name in ("kasa_config", "monteclora_config", "use_bdlora", "use_dora", "velora_config")
    ),
    ("LORA", {"init_lora_weights": "mica"}),
    ("LORA", {"use_rslora": True, "lora_bias": True}),
    ("LORA", {"rank_pattern": {"0": 3}}),
    ("MISS", {"init_weights": "bat"}),
    ("MISS", {"init_weights": "mini", "mini_r": 8}),
    ("OFT", {**OPTIONS["OFT"], "coft": True}),
    ("VERA", {"save_projection": False}),
]
# Whole numbers, 127 in every row: LLM.int8() does not round them.
X = (torch.arange(8 * 64).view(8, 64) * 37 % 255 - 127).index_fill(1, torch.tensor(5), 127).float()


def refused(function, *args):
    try:
        return function(*args), None
    except (ValueError, NotImplementedError, TypeError) as error:
        return None, str(error)


@pytest.fixture(autouse=True)
def environment():
    """What peft's BOFT leaves in CC and CXX, where it cannot build its extension, ends with the test."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def mode(request, monkeypatch):
    caches = (peft.import_utils.is_bnb_available, peft.import_utils.is_bnb_4bit_available)
    if request.param == "alias":
        skip_beside_bitsandbytes()
    if request.param == "without":
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for cached in caches:
        cached.cache_clear()
    with bnbref.eager():
        if request.param == "alias":
            with bnbref.as_bitsandbytes(force=True):
                yield request.param
        else:
            yield request.param
    for cached in caches:
        cached.cache_clear()


def network(kind, dequantized):
    """A quantized layer and a float one; or the same with the values in a float layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    new = {
        "nf4": lambda: Linear4bit(64, 128, quant_type="nf4"),
        "int8": lambda: Linear8bitLt(64, 128, has_fp16_weights=False),
    }[kind]()
    new.load_state_dict(net[0].state_dict())
    weight = new.to("cpu").weight
    if dequantized:
        four_bit = kind == "nf4"
        values = (
            dequantize_4bit(weight, weight.quant_state)
            if four_bit
            else int8.dequantize(weight, weight.SCB, torch.float32)
        )
        net[0].weight = nn.Parameter(values.detach())
        return net
    net[0] = new
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return net


def adapted(net, kind, options):
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**{"target_modules": ["0"], **options})
    torch.manual_seed(1)
    return peft.get_peft_model(net, config)


def trained(model):
    """The output before and after two large steps: where one factor is zero, the first one moves the other alone."""
    before = model(X).detach()
    for _ in range(2):
        model.zero_grad()
        model.train()(X).square().mean().backward()
        for p in model.parameters():
            if p.requires_grad and p.grad is not None:
                p.data -= 0.03 * p.grad / p.grad.abs().max().clamp(min=1e-30)
    with torch.no_grad():
        return before, model.eval()(X)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("without", "nf4"), ("without", "int8"), ("alias", "nf4"), pytest.param("alias", "int8", marks=pytest.mark.slow)],
    indirect=["mode"],
)
@pytest.mark.parametrize(("tuner", "options"), VARIANTS, ids=[f"{t}-{'-'.join(map(str, o))}" for t, o in VARIANTS])
@pytest.mark.filterwarnings("ignore")
def test_it_trains_as_over_the_dequantized_model_or_is_refused(mode, kind, tuner, options):
    try:
        _, want = trained(adapted(network(kind, True), tuner, options))
    except Exception as error:
        pytest.skip(f"not over float layers either: {type(error).__name__}: {error}")
    model, refusal = refused(adapted, network(kind, False), tuner, options)
    if refusal is not None:
        assert re.search(r"\b0\b|Linear4bit|Linear8bitLt", refusal), refusal
        return
    try:
        before, got = trained(model)
    except RuntimeError as error:
        if "is being modified inplace" not in str(error):
            raise
        pytest.xfail("C3A and GraLoRA add in place to the output of a layer")
    # Half of the widest gap of NF4 is 0.16 of the absmax of a block, half of that of int8 is 1/254; of normal weights the absmax
    # is less than four times their root mean square.
    one_rounding = 4 * (0.16 if kind == "nf4" else 1 / 254)
    assert not torch.equal(got, before)
    if (
        options.get("init_lora_weights") == "olora"
    ):  # which takes the adapter out of the weight, and quantizes what is left
        assert (got - want).norm() < 2 * one_rounding * want.norm()
    elif kind == "nf4":
        torch.testing.assert_close(got, want)
    else:  # inputs that a tuner turns before the layer are rounded to 127 steps: a norm of 1/254 of theirs, and so the gradient's
        assert (got - want).norm() < 0.02 * want.norm()
    _, refusal = refused(model.merge_adapter)
    if refusal is not None:
        assert "cannot be merged into 0," in refusal, refusal
        return
    with torch.no_grad():
        merged = model(X)
    assert not torch.equal(merged, before)
    assert (merged - got).norm() < one_rounding * got.norm()


# ---- what else names layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["without"], indirect=True)
@pytest.mark.parametrize(
    ("tuner", "options", "message"),
    [
        (
            "LORA",
            {"target_modules": ["2"], "modules_to_save": ["0"]},
            "modules_to_save: 0 is quantized: load the model with it in",
        ),
        ("UNILORA", {"target_modules": "all-linear"}, "UNILORA reads the weight of 0, which is packed"),
        ("UNILORA", {"target_modules": ["0", "2"]}, "UNILORA reads the weight of 0, which is packed"),
        ("UNILORA", {"target_modules": "[0-9]"}, "UNILORA reads the weight of 0, which is packed"),
        ("UNILORA", {"target_modules": ["2"]}, None),
        ("LOHA", {"target_modules": ["0", "2"], "exclude_modules": ["0"]}, None),
        ("LORA", {"target_modules": "all-linear"}, None),
        ("LORA", {"target_modules": ["2"], "init_lora_weights": "pissa"}, None),
        ("LORA", {"init_lora_weights": "pissa"}, "LORA with init_lora_weights='pissa' reads the weight of 0"),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_is_refused_however_it_is_named_and_others_are_not(mode, kind, tuner, options, message):
    net = network(kind, False)
    before = [name for name, _ in net.named_modules()]
    model, refusal = refused(adapted, net, tuner, options)
    if message is None:
        assert refusal is None
        before, after = trained(model)
        assert not torch.equal(before, after)
    else:
        assert message in refusal
        assert [name for name, _ in net.named_modules()] == before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("mode", ["without"], indirect=True)
@pytest.mark.parametrize(
    ("tuner", "options"),
    [("HIRA", {}), ("LOHA", {}), ("SHIRA", {}), ("IA3", {}), ("LORA", {"use_dora": True}), ("LORA", {})],
)
def test_layers_that_peft_chooses_are_checked(mode, tuner, options, kind):
    """A config without target_modules: HiRA took int8 codes for numbers, and trained."""
    layer, *_ = network(kind, dequantized=False)
    net = nn.Sequential(OrderedDict(v_proj=layer, head=nn.Linear(128, 8)))
    net.config = {"model_type": "llama"}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(tuner)](**options)
    model, said = refused(peft.get_peft_model, net, config)
    assert (model is not None) == (tuner == "LORA" and not options)
    assert model is not None or "reads the weight of v_proj, which is packed" in said


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("mode", ["without", "alias"], indirect=True)
def test_loftq_of_a_quantized_layer_is_refused(mode, kind):
    """It makes the adapter of what quantizing a float weight loses. peft cast the codes to float32 for it."""
    config = peft.LoraConfig(target_modules=["0"])
    config.init_lora_weights, config.loftq_config = "loftq", {}  # given to the constructor, they need scipy
    _, refusal = refused(peft.get_peft_model, network(kind, False), config)
    assert re.match("LORA with init_lora_weights='loftq' reads the weight of 0, which is packed", refusal)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("mode", ["without"], indirect=True)
def test_every_variant_of_lora_is_known_or_refused(mode, kind):
    """It is refused before anything is made: KaSA, VeLoRA and BD-LoRA make tensors of the weight's dtype, that of codes."""
    fields = dataclasses.fields(peft.LoraConfig)
    names = {each.name for each in fields if each.metadata.get("is_lora_variant")}
    assert names <= OF_LORA.keys(), "say in bnbref.integrations.hf.peft_checks whether the new ones read the weight"
    for name in sorted(names - WORK_AS_THEY_ARE):
        net = network(kind, False)
        before = [path for path, _ in net.named_modules()]
        _, refusal = refused(adapted, net, "LORA", OF_LORA[name]())
        assert refusal is not None
        assert re.match(rf"LORA with {name}\b.* reads the weight of 0, which is packed", refusal)
        assert [path for path, _ in net.named_modules()] == before


@pytest.mark.parametrize("mode", ["alias"], indirect=True)
def test_what_peft_s_layers_over_bitsandbytes_ignore_is_refused(mode):
    _, refusal = refused(adapted, network("nf4", False), "LORA", OF_LORA["monteclora_config"]())
    assert "unknown to peft's layers over bitsandbytes'" in refusal


@pytest.mark.parametrize("mode", ["without"], indirect=True)
def test_a_second_adapter_is_checked_too(mode):
    net = network("nf4", False)
    model = adapted(net, "LORA", {})
    _, refusal = refused(model.add_adapter, "more", peft.LoraConfig(target_modules=["0"], init_lora_weights="olora"))
    assert "init_lora_weights='olora' reads the weight of 0" in refusal


@pytest.mark.parametrize("mode", ["without"], indirect=True)
@pytest.mark.parametrize("tokens", [{"0": [1]}, {"tokens.0": [1]}])
def test_tokens_of_a_quantized_embedding_cannot_be_trained(mode, tokens):
    net = nn.ModuleDict({"tokens": nn.Sequential(Embedding4bit(8, 64)).to("cpu"), "head": nn.Linear(64, 8)})
    config = peft.LoraConfig(target_modules=["head"], trainable_token_indices=tokens)
    _, refusal = refused(peft.get_peft_model, net, config)
    assert refusal == "trainable_token_indices: tokens.0 is quantized: its rows are packed"


@pytest.mark.parametrize("mode", ["without"], indirect=True)
def test_tokens_of_the_input_embedding_cannot_be_trained_if_it_is_quantized(mode):
    """A list means the embedding that the model says its input goes through, whatever its name is."""
    net = nn.ModuleDict(
        {"words": Embedding4bit(8, 64).to("cpu"), "others": nn.Embedding(8, 64), "head": nn.Linear(64, 8)}
    )
    net.get_input_embeddings = lambda: net["words"]
    config = peft.LoraConfig(target_modules=["head"], trainable_token_indices=[1])
    _, refusal = refused(peft.get_peft_model, net, config)
    assert refusal == "trainable_token_indices: words is quantized: its rows are packed"


@pytest.mark.parametrize("mode", ["without"], indirect=True)
def test_a_parameter_that_is_quantized_by_itself_cannot_be_saved_as_a_module(mode):
    net = nn.Sequential(nn.Module(), nn.Linear(64, 8))
    net[0].up = nn.Parameter(torch.ones(2, 64, 64))
    bnbref.nn.replace_parameter_4bit(net[0], "up")
    _, refusal = refused(peft.get_peft_model, net, peft.LoraConfig(target_modules=["1"], modules_to_save=["0"]))
    assert refusal == "modules_to_save: 0 is quantized: load the model with it in skip_modules to train it"
