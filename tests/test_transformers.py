"""transformers with bnbref, and without bitsandbytes, whether that is installed or not."""

import copy
import importlib.util
import inspect
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bnbref
from bnbref import functional, int8, report
from bnbref.codebooks import FOUR_BIT, Codebook
from bnbref.nn import Linear4bit, Linear8bitLt, replace_parameter_4bit

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
hf = pytest.importorskip("bnbref.integrations.hf.transformers")
architectures = pytest.importorskip("architectures")

dequantize_experts = pytest.importorskip("bnbref.integrations.hf.experts").dequantize_experts
is_linear = pytest.importorskip("bnbref.integrations.hf.layers").is_linear
SequentialLlama4TextExperts = transformers.quantizers.base.SequentialLlama4TextExperts

AutoModel, AutoModelForCausalLM = transformers.AutoModel, transformers.AutoModelForCausalLM
BitsAndBytesConfig, BnbRefConfig = transformers.BitsAndBytesConfig, hf.BnbRefConfig
Conv1D = transformers.pytorch_utils.Conv1D

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
NESTED = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
# What the stored checkpoints were made with.
CONFIGS = {"nf4_nested": NESTED, "nf4_plain": NF4, "int8": INT8}
each_checkpoint = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No bitsandbytes to import, bnbref in its place, kernels uncompiled."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    hf.take_over_bitsandbytes()
    with bnbref.eager():
        yield
    hf.give_back_bitsandbytes()


@pytest.fixture(scope="module")
def ids():
    return load_file(FIXTURES / "int8" / "reference.safetensors")["ids"] % 128


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small bfloat16 models on disk, by name."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"vocab_size": 128, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    layers = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    configs = {
        "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **small),
        "mixtral": transformers.MixtralConfig(intermediate_size=96, num_local_experts=4, **small, **layers),
        "qwen3": transformers.Qwen3MoeConfig(
            moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16, **small, **layers
        ),
    }
    for name, config in configs.items():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():  # biases too
            nn.init.normal_(parameter, std=0.05 if parameter.dim() < 2 else 0.2)
        model.save_pretrained(root / name)
    return {"llama": FIXTURES / "base"} | {name: root / name for name in configs}


def load(path, quantization=None, dtype=torch.bfloat16, kind=AutoModelForCausalLM, **kwargs):
    given = {} if quantization is None else {"quantization_config": quantization}
    return kind.from_pretrained(path, dtype=dtype, **given, **kwargs)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def tensors(path):
    return load_file(Path(path) / "model.safetensors")


def config_of(path):
    config = json.loads((Path(path) / "config.json").read_text())
    del config["transformers_version"]
    return config


def different(a, b):
    """The names of the tensors whose bytes differ between two checkpoints."""
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    return {
        name
        for name in one
        if one[name].dtype != other[name].dtype
        or one[name].shape != other[name].shape
        or not torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
    }


def same_files(a, b):
    return all(
        (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes() for name in ("model.safetensors", "config.json")
    )


# ---- checkpoints of bitsandbytes ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("kind", ["nf4_nested", "nf4_plain"])
def test_checkpoints_of_bitsandbytes_give_its_logits(kind):
    reference = load_file(FIXTURES / kind / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / kind)
    assert torch.equal(logits(model, reference["ids"]).float(), reference["plain"])


@each_checkpoint
def test_saving_a_checkpoint_again_changes_nothing(kind, tmp_path):
    """In bitsandbytes this raises NotImplementedError."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / kind)
    model.save_pretrained(tmp_path)
    assert different(tmp_path, FIXTURES / kind) == set()
    assert config_of(tmp_path) == config_of(FIXTURES / kind)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@each_checkpoint
@pytest.mark.parametrize("installed", [False, True])
def test_a_checkpoint_loads_with_a_config_as_the_float_model_does(kind, installed, ids, tmp_path):
    """transformers compares the names of classes, and config.json has a BitsAndBytesConfig."""
    own, other = ("int8", "nf4") if kind == "int8" else ("nf4", "fp4")
    want = logits(load(FIXTURES / kind), ids)
    if installed:  # another quantizer serves BitsAndBytesConfig
        hf.give_back_bitsandbytes()
    model = load(FIXTURES / kind, BnbRefConfig(own))
    assert torch.equal(logits(model, ids), want)
    model.save_pretrained(tmp_path)
    assert not different(tmp_path, FIXTURES / kind)
    assert torch.equal(logits(load(tmp_path, BnbRefConfig(own)), ids), want)
    with pytest.raises(ValueError, match=f"quant_type must be that of the checkpoint, .* '{own}', got '{other}'"):
        load(FIXTURES / kind, BnbRefConfig(other))
    if kind != "int8":
        model = load(FIXTURES / kind, BnbRefConfig(own, compute_dtype=torch.float32))
        assert {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)} == {torch.float32}


@each_checkpoint
def test_quantizing_while_loading_gives_the_bytes_of_bitsandbytes(kind, tmp_path):
    load(FIXTURES / "base", CONFIGS[kind]).save_pretrained(tmp_path)
    names = different(tmp_path, FIXTURES / kind)
    assert config_of(tmp_path) == config_of(FIXTURES / kind)
    if kind == "nf4_plain":
        assert names == set()
    if kind == "nf4_nested":
        # bitsandbytes on CPU looks codes of scales up in a table of 65,536 bins: some neighbours are exchanged.
        assert {name.rpartition(".")[2] for name in names} <= {"absmax"}
        for name in names:
            codes = tensors(tmp_path)[name].int() - tensors(FIXTURES / kind)[name].int()
            assert codes.abs().max() == 1
    if kind == "int8":
        assert not names


def test_a_checkpoint_is_cast_but_for_codes_and_scales(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "nf4_plain", dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    model.save_pretrained(tmp_path)
    changed = different(tmp_path, FIXTURES / "nf4_plain")
    assert changed == {name for name, t in tensors(FIXTURES / "nf4_plain").items() if t.dtype == torch.bfloat16}


@pytest.mark.skipif(
    not hasattr(transformers.quantizers.base.HfQuantizer, "get_new_dtype"),
    reason="this version of transformers casts them, and loading raises",
)
def test_codes_in_float_storage_are_never_cast(tmp_path):
    model = load(FIXTURES / "base", CASES["bfloat16 storage"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    one, other = (m.model.layers[0].mlp.up_proj for m in (model, again))
    assert other.weight.dtype == torch.bfloat16
    assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
    assert again.model.norm.weight.dtype == torch.float32


def edited(path, kind, change):
    """A copy of a stored checkpoint, its tensors changed."""
    found = tensors(FIXTURES / kind)
    change(found)
    path.mkdir(exist_ok=True)
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((FIXTURES / kind / "config.json").read_text())
    return path


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("nf4_plain", lambda t: t.pop(f"{Q}.weight.absmax")),
        ("nf4_plain", lambda t: t.pop(f"{Q}.weight")),
        ("nf4_plain", lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{Q}.weight.")]),
        ("nf4_plain", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:100].clone()})),
        ("nf4_plain", lambda t: t[f"{Q}.weight.absmax"].fill_(float("nan"))),
        ("nf4_nested", lambda t: t.pop(f"{Q}.weight.nested_absmax")),
        ("int8", lambda t: t.pop(f"{Q}.SCB")),
        ("int8", lambda t: [t.pop(f"{Q}.{name}") for name in ("SCB", "weight_format")]),
        ("int8", lambda t: t.pop(f"{Q}.weight")),
        ("int8", lambda t: t[f"{Q}.weight_format"].fill_(1)),
    ],
)
def test_half_a_layer_is_refused(kind, change, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError), caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(edited(tmp_path, kind, change))
    assert Q in caplog.text


def test_codes_are_no_float_weights(tmp_path, caplog, monkeypatch):
    """As when a config.json comes from the float model."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (edited(tmp_path, "int8", dict) / "config.json").write_text((FIXTURES / "base" / "config.json").read_text())
    with pytest.raises(RuntimeError), caplog.at_level(logging.WARNING):
        load(tmp_path, CASES["int8"])
    assert "q_proj.weight is quantized already, but config.json has no quantization_config" in caplog.text


def test_what_the_checkpoint_says_of_a_layer_holds(tmp_path, ids):
    """The config and the tensors disagree about which layers are quantized: the tensors are right."""
    model = load(FIXTURES / "base", BnbRefConfig(skip_modules=[".*self_attn", "lm_head"]))
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    for skip in (None, [".*mlp", "lm_head"]):
        config["quantization_config"]["llm_int8_skip_modules"] = skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
        assert isinstance(again.model.layers[0].mlp.up_proj, Linear4bit)
        assert torch.equal(logits(again, ids), want)
        reasons = {p.name: p.reason for p in report(again).skipped}
        assert reasons[f"{Q}.weight"] == "float in the checkpoint"


class NamedConfig(transformers.PreTrainedConfig):
    model_type = "bnbref_named"

    def __init__(self, parameters=(), layers=(), **kwargs):
        self.parameters, self.layers = list(parameters), list(layers)
        super().__init__(**kwargs)


class Named(transformers.PreTrainedModel):
    """Linear layers and plain parameters by any names."""

    config_class = NamedConfig

    def __init__(self, config):
        super().__init__(config)
        for path in config.layers:
            self.place(path, nn.Linear(64, 8))
        for path in config.parameters:
            self.place(path, nn.Parameter(torch.zeros(3, 2)))
        self.head = nn.Linear(64, 4)
        self.post_init()

    def place(self, path, value):
        parent, *rest = self, *path.split(".")
        for name in rest[:-1]:
            if not hasattr(parent, name):
                parent.register_module(name, nn.Module())
            parent = getattr(parent, name)
        setattr(parent, rest[-1], value)

    def _init_weights(self, module):
        from transformers import initialization

        for parameter in module.parameters(recurse=False):
            initialization.ones_(parameter)


word = st.sampled_from(["weight", "in_proj_weight", "weight_proj", "weight_ih_l0", "weights", "g", "proj", "original0"])
path = st.lists(word, min_size=1, max_size=3).map(".".join)


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    st.lists(path, min_size=1, max_size=4, unique=True), st.lists(path, min_size=1, max_size=3, unique=True), st.data()
)
def test_parameters_and_layers_come_back_whatever_their_names_are(parameters, layers, data):
    every = [*parameters, *layers]
    hypothesis.assume(not any(a != b and f"{b}.".startswith(f"{a}.") for a in every for b in every))
    hypothesis.assume(len(set(every)) == len(every))
    config = data.draw(st.sampled_from([CASES["nf4"], CASES["int8"]]))
    with tempfile.TemporaryDirectory() as folder:
        plain = Named(NamedConfig(parameters, layers))
        for k, parameter in enumerate(plain.parameters()):
            nn.init.normal_(parameter, mean=k)
        plain.save_pretrained(f"{folder}/plain")
        model = Named.from_pretrained(f"{folder}/plain", quantization_config=config)
        assert len(report(model).quantized) == len(layers) + 1  # and the head
        model.save_pretrained(f"{folder}/a")
        again = Named.from_pretrained(f"{folder}/a")
        for name in parameters:
            assert torch.equal(again.get_parameter(name), plain.get_parameter(name))
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
        again.save_pretrained(f"{folder}/b")
        assert same_files(f"{folder}/a", f"{folder}/b")


def test_the_config_of_a_model_that_was_spread_over_ranks_loads_another_one_whole():
    """transformers keeps `distributed_config` in it, and reads what is given to `from_pretrained` alone."""
    config = transformers.AutoConfig.from_pretrained(FIXTURES / "base")
    config.distributed_config = SimpleNamespace(tp_size=2)
    model = load(FIXTURES / "base", CASES["nf4"], config=config)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state is not None


@pytest.mark.parametrize("case", ["nf4", "bfloat16 storage"])
def test_a_layer_whose_name_transformers_changes_is_refused(case, tmp_path):
    """ "weight_g" is what weight norm called its parameter once."""
    Named(NamedConfig([], ["conv.weight_g"])).save_pretrained(tmp_path / "plain")
    model = Named.from_pretrained(tmp_path / "plain", quantization_config=CASES[case])
    model.save_pretrained(tmp_path / "a")
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        with pytest.raises((ValueError, RuntimeError), match=r"conv.weight_g\.weight has no scales"):
            Named.from_pretrained(tmp_path / "a")
    elif case == "nf4":  # transformers 5.17 leaves the name as it is
        again = Named.from_pretrained(tmp_path / "a", dtype=torch.float32).state_dict()
        assert all(
            torch.equal(t.view(torch.uint8), again[name].view(torch.uint8)) for name, t in model.state_dict().items()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_those_of_the_float_model(dtype, tmp_path):
    """T5 keeps "wo" in float32, for float16 alone."""
    small = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    plain = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    plain.save_pretrained(tmp_path / "plain")
    kind = type(plain)
    kind.from_pretrained(tmp_path / "plain", quantization_config=BnbRefConfig()).save_pretrained(tmp_path / "a")
    want = {name: p.dtype for name, p in kind.from_pretrained(tmp_path / "plain", dtype=dtype).named_parameters()}
    model = kind.from_pretrained(tmp_path / "a", dtype=dtype)
    quantized = {p.name for p in report(model).quantized}
    found = {name: p.dtype for name, p in model.named_parameters()}
    assert {name: found[name] for name in want if name not in quantized} == {
        name: dtype for name, dtype in want.items() if name not in quantized
    }


# ---- quantize, save, load, save -------------------------------------------------------------------------------------

CASES = {
    "nf4": BnbRefConfig(),
    "fp4": BnbRefConfig("fp4", double_quant=False, blocksize=128),
    "af4": BnbRefConfig("af4", checkpoint_format="bnbref"),
    "bfloat16 storage": BnbRefConfig(quant_storage="bfloat16"),
    "int8": BnbRefConfig("int8"),
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_save_load_save(name, case, models, ids, tmp_path):
    config = CASES[case]
    model = load(models[name], config)
    want = logits(model, ids)
    kinds = {type(m) for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))}
    assert kinds == {Linear8bitLt if case == "int8" else Linear4bit}
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again, ids), want)
    again.save_pretrained(tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")
    method = config_of(tmp_path / "a")["quantization_config"]["quant_method"]
    assert method == ("bnbref" if case == "af4" else "bitsandbytes")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32, None])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_dequantize(name, dtype, quant_type, models, ids, tmp_path):
    model = load(models[name], BnbRefConfig(quant_type))
    path = "transformer.h.0.mlp.c_fc" if name == "gpt2" else "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(path)
    want = torch.bfloat16 if dtype != torch.float32 else torch.float32
    if quant_type == "int8":
        weight = int8.dequantize(layer.weight.data, layer.weight.SCB, want)
    else:
        weight = layer.quant_state.dequantize(layer.weight, want)  # straight to that dtype: one rounding
    quantized = logits(model, ids)
    plain = model.dequantize() if dtype is None else model.dequantize(dtype)
    layer = plain.get_submodule(path)
    assert type(layer) is (Conv1D if name == "gpt2" else nn.Linear)
    assert torch.equal(layer.weight, weight.t() if name == "gpt2" else weight)
    assert {p.dtype for p in plain.parameters()} == {want}
    assert not hasattr(plain, "is_loaded_in_4bit")
    assert not hasattr(plain, "hf_quantizer")
    if quant_type == "nf4" and want == torch.bfloat16 and name == "llama":
        assert torch.equal(logits(plain, ids), quantized)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=want)
    assert torch.equal(logits(again, ids), logits(plain, ids))


def test_a_dequantized_layer_keeps_the_hook_of_accelerate(models):
    """By it a model that is spread over devices moves the activations."""
    model = load(models["llama"], BnbRefConfig())
    seen = []

    class Noting(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(model.get_submodule(Q), Noting())
    layer = model.dequantize().get_submodule(Q)
    assert type(layer) is nn.Linear
    layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16))
    assert seen == [layer]


def test_generate(models, ids):
    model = load(models["gpt2"], BnbRefConfig())
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    tokens = model.generate(ids, **options)
    assert tokens.shape == (2, ids.shape[1] + 5)
    assert torch.equal(model.dequantize().generate(ids, **options), tokens)


def test_weights_that_are_not_finite_are_refused_by_name(models, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError), caplog.at_level(logging.WARNING):
        load(tmp_path, BnbRefConfig())
    assert "model.layers.1.mlp.up_proj.weight" in caplog.text
    assert "1 of its elements are NaN or infinite" in caplog.text


def test_tied_weights_are_never_quantized(models, ids):
    """bitsandbytes makes a 4-bit layer of a tied head, if the list of what to skip does not name it."""
    model = load(models["gpt2"], BnbRefConfig(skip_modules=[]))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight
    assert logits(model, ids).isfinite().all()


# ---- which layers, and the report -----------------------------------------------------------------------------------


def test_report(models):
    model = load(models["gpt2"], BnbRefConfig(skip_modules=[".*h.0.attn", "c_fc"]))
    found = report(model)
    by_name = {p.name: p for p in found.parameters}
    assert by_name.keys() == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    one = by_name["transformer.h.1.attn.c_attn.weight"]
    # 4 bits a code, 8 a block of 64, 32 a block of 256 of those, and the offset
    assert (one.shape, one.format, one.quantized) == ((192, 64), "nf4", True)
    assert one.bytes == 192 * 64 // 2 + 192 + 4 + 4
    assert by_name["transformer.h.0.attn.c_attn.weight"].reason == "skip_modules: '.*h.0.attn'"
    assert by_name["transformer.h.1.mlp.c_fc.weight"].reason == "skip_modules: 'c_fc'"
    assert by_name["lm_head.weight"].format == "tied"
    assert by_name["lm_head.weight"].reason == "to transformer.wte.weight"
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(p.reason for p in found.parameters)
    assert found.total_bytes == sum(p.bytes for p in found.parameters)
    assert sum(p.elements for p in found.parameters) == model.num_parameters()
    text = str(found)
    assert "transformer.h.[0-1].mlp.c_proj.weight" in text
    assert f"{found.total_bytes:,} bytes" in text


def test_a_name_that_skips_nothing_is_said(caplog):
    load(FIXTURES / "base", BnbRefConfig(skip_modules=["self_attn", ".*mlp", "lm_head"]))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("bnbref")] == [
        "skip_modules: 'self_attn' skips nothing; '.*self_attn' would skip all that is below"
    ]


@pytest.mark.parametrize("name", ["load_in_4bit", "bnb_4bit_quant_type", "llm_int8_threshold", "double_quantize"])
def test_an_argument_of_another_name_is_refused_with_those_that_there_are(name):
    with pytest.raises(TypeError, match=f"double_quant, .* got {name}: .* load_in_4bit .* quant_type='nf4'"):
        BnbRefConfig(**{name: True})
    with pytest.raises(TypeError, match=f"got {name}"):
        BnbRefConfig.from_dict({"quant_method": "bnbref", name: True})


def test_settings_that_a_quantized_checkpoint_overrules_are_said(recwarn):
    said = BnbRefConfig("int8", threshold=4.0).to_dict()
    BnbRefConfig("int8").of_checkpoint(said)
    BnbRefConfig("int8", threshold=4.0, compute_dtype="float16").of_checkpoint(said)
    said_half = BnbRefConfig(compute_dtype="float16").to_dict()
    assert BnbRefConfig().of_checkpoint(said_half).compute_dtype == torch.float16
    assert BnbRefConfig(compute_dtype="float32").of_checkpoint(said_half).compute_dtype == torch.float32
    own = BnbRefConfig("af4", blocksize=96, checkpoint_format="bnbref")
    assert own.of_checkpoint(own.to_dict()).to_dict() == own.to_dict()
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"quantized already: its skip_modules=None, threshold=4\.0 hold, not"):
        config = BnbRefConfig("int8", threshold=2.0, skip_modules=["lm_head"]).of_checkpoint(said)
    assert (config.threshold, config.skip_modules) == (4.0, None)


@pytest.mark.parametrize("pattern", ["*.mlp.*", "(", "layers[0"])
def test_a_name_that_is_no_regular_expression_is_refused(pattern):
    """A glob, for example."""
    with pytest.raises(ValueError, match=f"skip_modules must be .*, got {re.escape(repr(pattern))}"):
        BnbRefConfig(skip_modules=["lm_head", pattern])
    with pytest.raises(ValueError, match="skip_modules must be"):
        load(FIXTURES / "base", BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[pattern]))


class Spelled(nn.Linear):
    """As Falcon spells it."""

    def forward(self, x):
        hidden = x @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Inherits(nn.Linear):
    """Nothing of its own."""


FORWARDS = {
    "a factor": lambda self, x: 2 * F.linear(x, self.weight, self.bias),
    "dropout": lambda self, x: F.dropout(F.linear(x, self.weight, self.bias), 0.5, self.training),
    "a tuple": lambda self, x: (F.linear(x, self.weight, self.bias), x),
    "float32": lambda self, x: F.linear(
        x.float(), self.weight.float(), None if self.bias is None else self.bias.float()
    ),
    "no bias": lambda self, x: F.linear(x, self.weight) + 1,
    "transposed": lambda self, x: F.linear(x, self.weight.flip(0), self.bias),
    "more arguments": lambda self, x, scale: scale * F.linear(x, self.weight, self.bias),
    "groups": lambda self, x: F.linear(x.unflatten(-1, (8, -1)).flatten(-2), self.weight, self.bias),
    "rows": lambda self, x: F.linear(x - x.mean(-1, keepdim=True), self.weight, self.bias),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_subclass_that_does_nothing_else_is_a_linear_layer(device, bias):
    for kind in (Spelled, Inherits):
        layer = kind(64, 32, bias=bias, device=device)
        before = dict(layer.__dict__)
        assert is_linear(layer)
        assert layer.__dict__ == before
    for name, forward in FORWARDS.items():
        kind = type("Own", (nn.Linear,), {"forward": forward})
        assert not is_linear(kind(64, 32, bias=bias, device=device)), name
    for change in (
        lambda layer: layer.register_buffer("scale", torch.ones(1)),
        lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1))),
        lambda layer: layer.register_module("norm", nn.Identity()),
        lambda layer: layer.register_forward_hook(lambda *args: None),
        lambda layer: layer.register_forward_pre_hook(lambda *args: None),
    ):
        layer = Inherits(64, 32, bias=bias, device=device)
        change(layer)
        assert not is_linear(layer)
    assert not is_linear(nn.MultiheadAttention(64, 4).out_proj)


def test_falcon_is_quantized(ids, tmp_path):
    small = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.FalconForCausalLM(transformers.FalconConfig(**small)).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", BnbRefConfig())
    assert len(report(model).quantized) == 8
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(model, ids))
    model.dequantize()
    assert len(report(model).quantized) == 0


class Twice(nn.Linear):
    """A linear layer of its own kind."""

    def forward(self, x):
        return 2 * super().forward(x)


class Odd(transformers.LlamaForCausalLM):
    """A model whose linear layers are of their own kind."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Twice


def test_what_cannot_be_quantized_is_said(models, caplog):
    model = load(models["llama"], BnbRefConfig("int8", skip_modules=[]), kind=Odd)
    assert isinstance(model.lm_head, Linear8bitLt)
    assert type(model.model.layers[0].mlp.up_proj) is Twice
    assert "69 % of this model is in parameters that cannot be quantized" in caplog.text
    assert "Twice, not an nn.Linear itself" in caplog.text
    caplog.clear()
    load(models["llama"], BnbRefConfig("int8"), kind=Odd)
    assert "nothing in this model was quantized" in caplog.text


def test_a_config_is_not_changed_by_the_models_it_loads(models):
    config = BnbRefConfig()
    before = config.to_dict()
    model = load(models["mixtral"], config)
    assert config.to_dict() == before
    assert model.config.quantization_config.checkpoint_format == "bnbref"


def test_the_output_head_is_kept_by_default_and_a_list_replaces_that(models):
    kept = load(FIXTURES / "base", BnbRefConfig())
    assert type(kept.lm_head) is nn.Linear
    assert "kept by default" in next(p.reason for p in report(kept).skipped if p.name == "lm_head.weight")
    assert isinstance(load(FIXTURES / "base", BnbRefConfig(skip_modules=[])).lm_head, Linear4bit)


def test_a_classifier_with_a_bias_is_kept_by_name(tmp_path):
    """transformers looks for the last layer by the name of the last parameter, from which it takes `.weight` but not `.bias`."""
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, **small)).save_pretrained(
        tmp_path
    )
    kind = transformers.AutoModelForSequenceClassification
    assert type(load(tmp_path, BnbRefConfig(), kind=kind).classifier) is Linear4bit
    kept = load(tmp_path, BnbRefConfig(skip_modules=["classifier"]), kind=kind)
    assert type(kept.classifier) is nn.Linear
    assert {p.name: p.reason for p in report(kept).skipped}["classifier.weight"] == "skip_modules: 'classifier'"


def test_a_new_head_is_a_plain_layer(models, ids):
    kind = transformers.AutoModelForSequenceClassification
    model = load(models["gpt2"], BnbRefConfig(skip_modules=["lm_head"]), kind=kind)
    assert type(model.score) is nn.Linear
    assert logits(model, ids).isfinite().all()
    assert {p.name: p.reason for p in report(model).skipped}["score.weight"].startswith("not in the checkpoint")


@pytest.mark.parametrize("case", ["nf4", "int8"])
def test_a_new_head_on_a_quantized_file(case, models, ids, tmp_path):
    load(models["gpt2"], CASES[case]).save_pretrained(tmp_path / "a")
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "a")
    assert type(model.score) is nn.Linear
    assert type(model.score.weight) is nn.Parameter
    assert model.score.weight.dtype == torch.bfloat16
    assert logits(model, ids).isfinite().all()
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "b"), ids), logits(model, ids))


@pytest.mark.skipif(
    not hasattr(transformers.quantizers.base.HfQuantizer, "get_new_dtype"),
    reason="this version of transformers takes any shape beside a quantizer, and loading raises",
)
@pytest.mark.parametrize("case", ["nf4", "bfloat16 storage", "int8"])
@pytest.mark.parametrize("quantized", [False, True], ids=["on the fly", "from a quantized file"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_ignore_mismatched_sizes(name, quantized, case, models, ids, tmp_path, caplog, monkeypatch):
    """What has another shape in the file is made anew, in float, and the rest is quantized; without the option it is named."""
    if name == "bert":
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = transformers.BertConfig(vocab_size=128, max_position_embeddings=64, num_labels=3, **small)
        model, changed, path = transformers.BertForSequenceClassification(config), {"num_labels": 7}, "classifier"
    else:
        model, path = AutoModelForCausalLM.from_pretrained(models["gpt2"]), "transformer.h.1.mlp.c_fc"
        changed = {"n_inner": 64}  # of [64, 256], transposed: a square, and neither its transpose nor its half
    model.save_pretrained(tmp_path / "plain")
    kind, given = type(model), {"quantization_config": CASES[case]}
    source = tmp_path / "plain"
    if quantized:
        source = tmp_path / "quantized"
        kind.from_pretrained(tmp_path / "plain", **given).save_pretrained(source)
        given = {}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"), caplog.at_level(logging.WARNING):
        kind.from_pretrained(source, **given, **changed)
    assert path.rpartition(".")[2] in caplog.text
    if name == "gpt2":  # both shapes as a Conv1D has them
        assert "torch.Size([64, 256])" in caplog.text
        assert "torch.Size([64, 64])" in caplog.text
    model = kind.from_pretrained(source, ignore_mismatched_sizes=True, **given, **changed)
    layer = model.get_submodule(path)
    assert type(layer) is (nn.Linear if name == "bert" else Conv1D)
    assert {p.name: p.reason for p in report(model).skipped}[f"{path}.weight"].startswith("another shape")
    assert isinstance(
        model.get_submodule(path.replace("classifier", "bert.pooler.dense").replace("mlp.c_fc", "attn.c_attn")),
        (Linear4bit, Linear8bitLt),
    )
    assert layer.weight.std() < 0.1
    assert logits(model, ids).isfinite().all()


@pytest.mark.skipif(
    not hasattr(transformers.quantizers.base.HfQuantizer, "get_new_dtype"),
    reason="this version of transformers takes any shape beside a quantizer, and loading raises",
)
def test_experts_of_another_shape(models, ids, tmp_path):
    load(models["mixtral"], BnbRefConfig()).save_pretrained(tmp_path)
    for source, config in ((models["mixtral"], BnbRefConfig()), (tmp_path, None)):
        model = load(source, config, intermediate_size=32, ignore_mismatched_sizes=True)
        reasons = {p.reason for p in report(model).parameters if "experts" in p.name}
        assert reasons == {"another shape in the checkpoint: newly initialized"}
        assert model.model.layers[0].mlp.experts.down_proj.shape == (4, 64, 32)
        assert logits(model, ids).isfinite().all()


def test_a_base_model_of_a_checkpoint_with_a_head(models, ids, tmp_path):
    model = load(models["gpt2"], BnbRefConfig())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model.transformer(ids).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, want)


def test_counting_parameters_needs_no_bitsandbytes(models):
    plain = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    for config in (BnbRefConfig(), BnbRefConfig(quant_storage="float32"), BnbRefConfig("int8")):
        model = load(models["gpt2"], config)
        assert model.num_parameters() == plain.num_parameters()
        assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in trainable)


def test_counting_parameters_walks_through_the_modules_once(models, monkeypatch):
    """Trainer counts in every step. Six walks took 48 ms of a step of a model with adapters, whose GPU waited."""
    model, walks, walk = load(models["gpt2"], BnbRefConfig()), [], nn.Module.named_modules

    def named_modules(self, *args, **kwargs):
        walks.extend([1] if self is model else [])
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    model.num_parameters(exclude_embeddings=True)
    assert len(walks) == 1


def test_flags():
    model = load(FIXTURES / "base", NF4)
    assert model.is_loaded_in_4bit
    assert not hasattr(model, "is_loaded_in_8bit")
    assert model.to("cpu") is model
    with pytest.raises(ValueError, match="cast"):
        model.to(torch.float16)
    model = load(FIXTURES / "base", INT8)
    assert model.is_loaded_in_8bit
    assert not hasattr(model, "is_loaded_in_4bit")
    assert model.to("cpu") is model


# ---- mixtures of experts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
@pytest.mark.parametrize(
    "config",
    [BnbRefConfig(), BnbRefConfig("fp4", double_quant=False, blocksize=128), NF4],
    ids=["nested nf4", "fp4", "BitsAndBytesConfig"],
)
def test_experts_are_quantized(name, config, models, ids, tmp_path):
    model = load(models[name], config)
    plain = AutoModelForCausalLM.from_pretrained(models[name])
    rows = {p.name: p for p in report(model).parameters}
    for part in ("gate_up_proj", "down_proj"):
        path = f"model.layers.1.mlp.experts.{part}"
        values = plain.get_parameter(path)
        row = rows[path]
        assert row.quantized
        assert row.shape == values.shape
        spec = BnbRefConfig.of_bitsandbytes(NF4) if config is NF4 else config
        packed, state = functional.quantize_4bit(
            values.data, blocksize=spec.blocksize, quant_type=spec.quant_type, compress_statistics=spec.double_quant
        )
        experts = model.model.layers[1].mlp.experts
        assert torch.equal(getattr(experts, part), functional.dequantize_4bit(packed, state))
    assert model.num_parameters() == plain.num_parameters()

    want = logits(model, ids)
    model.save_pretrained(tmp_path / "a")
    assert config_of(tmp_path / "a")["quantization_config"]["quant_method"] == "bnbref"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again, ids), want)
    again.save_pretrained(tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")

    dequantized = model.dequantize()
    assert torch.equal(logits(dequantized, ids), want)
    dequantized.save_pretrained(tmp_path / "c")  # as the original: a matrix for each expert
    assert tensors(tmp_path / "c").keys() == tensors(models[name]).keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c"), ids), want)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_experts_that_transformers_would_transpose(quant_type, tmp_path):
    """Files of Qwen3-VL have them transposed or as the model has them. Codes are as the model has them, and are no matrices."""
    model = architectures.build("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "plain")
    model = type(model).from_pretrained(tmp_path / "plain", quantization_config=BnbRefConfig(quant_type))
    model.save_pretrained(tmp_path / "a")
    if quant_type == "int8":  # the experts are floats
        old = {
            key: value.mT.contiguous() if ".experts." in key else value
            for key, value in tensors(tmp_path / "a").items()
        }
        save_file(old, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    again = type(model).from_pretrained(tmp_path / "a")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    given = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    for other in (again, given):
        assert architectures.different(architectures.numbers(other), architectures.numbers(model)) == []
        assert [p.name for p in report(other).quantized] == [p.name for p in report(model).quantized]


@pytest.mark.skipif(not hasattr(transformers, "HrmTextConfig"), reason="a newer version of transformers has this model")
@pytest.mark.parametrize("first", [False, True])
def test_a_part_of_a_weight_that_transformers_splits_can_be_skipped(first, tmp_path):
    """In a file of this model gate_proj and up_proj are one tensor, and so are the four matrices of attention."""
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.HrmTextConfig(**small, **heads, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    skip = ["gate_proj" if first else "up_proj", "lm_head"]
    model = load(tmp_path / "plain", BnbRefConfig(skip_modules=skip))
    skipped = {p.name.split(".")[-2]: p.reason for p in report(model).skipped if len(p.shape) > 1}
    reasons = {name: f"skip_modules: {name!r}" for name in skip} | {"embed_tokens": "embedding"}
    assert skipped == reasons
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    model.dequantize().save_pretrained(tmp_path / "b")  # one tensor of both, as before
    assert tensors(tmp_path / "b").keys() == tensors(tmp_path / "plain").keys()
    again = load(tmp_path / "b").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_experts_in_another_dtype_and_in_half_a_checkpoint(models, ids, tmp_path, caplog, monkeypatch):
    load(models["mixtral"], BnbRefConfig()).save_pretrained(tmp_path)
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ids).dtype == torch.float32
    found = tensors(tmp_path)
    del found["model.layers.0.block_sparse_moe.experts.down_proj.absmax"]
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError), caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "experts.down_proj" in caplog.text


def test_dequantizing_a_copy_leaves_the_experts_of_the_original():
    """torch reads a parametrized parameter by a property of the module's class, which the copy has too."""
    original = nn.Module()
    original.up = nn.Parameter(torch.ones(2, 4, 64))
    replace_parameter_4bit(original, "up")
    other, want = copy.deepcopy(original), original.up
    dequantize_experts(other, torch.float32)
    assert type(other.up) is nn.Parameter
    assert torch.equal(original.up, want)
    assert torch.equal(other.up, want)


def test_experts_can_be_skipped_and_are_with_int8(models, ids, tmp_path, caplog):
    for config, reason in (
        (BnbRefConfig(skip_modules=["experts"]), "skip_modules"),
        (BnbRefConfig("int8"), "experts:"),
    ):
        model = load(models["mixtral"], config)
        skipped = {p.name: p.reason for p in report(model).skipped}
        assert skipped["model.layers.0.mlp.experts.down_proj"].startswith(reason)
        model.save_pretrained(tmp_path)
        assert config_of(tmp_path)["quantization_config"]["quant_method"] == "bitsandbytes"
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))
        # What the user has skipped is no surprise.
        surprising = [text for text in caplog.messages if text.startswith("not quantized: ")]
        assert len(surprising) == (reason == "experts:")


def test_experts_that_stayed_float_come_back(tmp_path):
    """Of Llama 4 transformers makes a module of each expert, if the file says "bitsandbytes", and looks for other names."""
    small = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "intermediate_size_mlp": 96,
        "num_hidden_layers": 2,
    }
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}
    torch.manual_seed(0)
    plain = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**small, pad_token_id=0)).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    plain.save_pretrained(tmp_path / "plain")
    ids = torch.arange(3, 11)[None]
    for config in (BnbRefConfig("int8"), BnbRefConfig(skip_modules=["experts", "lm_head"])):
        model = load(tmp_path / "plain", config, dtype=torch.float32)
        model.save_pretrained(tmp_path / "a")
        assert config_of(tmp_path / "a")["quantization_config"]["quant_method"] == "bnbref"
        files = edited_config(tmp_path / "a", model.hf_quantizer.spec)
        for again in (load(tmp_path / "a", dtype=torch.float32), load(files, dtype=torch.float32)):
            assert torch.equal(logits(again, ids), logits(model, ids))
            assert type(again.model.layers[1].feed_forward.experts).__name__ == "Llama4TextExperts"

    # A file that has them apart: as bitsandbytes writes a model whose experts were exchanged before it was quantized.
    apart = SequentialLlama4TextExperts
    for layer in plain.model.layers:
        layer.feed_forward.experts = apart(plain.config)
    for name, layer in list(plain.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            new = Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None)
            new.weight.data = layer.weight.data
            plain.set_submodule(name, new.to("cpu"))
    folder = tmp_path / "apart"
    folder.mkdir()
    save_file({key: t.clone() for key, t in plain.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    config = plain.config.to_dict() | {
        "architectures": ["Llama4ForCausalLM"],
        "quantization_config": BnbRefConfig(double_quant=False).to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))
    model = load(folder, dtype=torch.float32)
    assert isinstance(model.model.layers[1].feed_forward.experts[1].up_proj, Linear4bit)
    assert torch.equal(logits(model, ids), logits(plain, ids))


def edited_config(path, spec):
    """A copy of a checkpoint whose config says "bitsandbytes", as earlier versions wrote it."""
    other = path.with_name(f"{path.name} bitsandbytes")
    shutil.copytree(path, other, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = spec._to_bitsandbytes()
    (other / "config.json").write_text(json.dumps(config))
    return other


# ---- devices --------------------------------------------------------------------------------------------------------

MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_some_on_disk(name, quant_type, models, ids, tmp_path, caplog):
    config = BnbRefConfig(quant_type)
    model = load(models[name], config)
    want = logits(model, ids)
    model.save_pretrained(tmp_path / "a")
    options = {"device_map": MAP, "offload_folder": tmp_path / "folder"}
    for source, given in ((models[name], config), (tmp_path / "a", None)):
        parts = load(source, given, **options)
        layer = parts.model.layers[0].self_attn.q_proj
        for _ in range(2):
            assert layer.weight.is_meta
            assert torch.equal(logits(parts, ids), want)
        file = tmp_path / "folder" / "model.layers.0.self_attn.q_proj.weight.safetensors"
        assert load_file(file)[f"{Q}.weight"].dtype == (torch.int8 if quant_type == "int8" else torch.uint8)
        parts.save_pretrained(tmp_path / "b")
        assert same_files(tmp_path / "a", tmp_path / "b")
        with pytest.raises(ValueError, match="offloaded"):
            parts.dequantize()
        if name == "mixtral" and quant_type == "nf4":
            with pytest.raises(ValueError, match=r"experts\.\w+ is offloaded"):
                dequantize_experts(parts, torch.bfloat16)
    # What is offloaded is left as it is for the same reasons as elsewhere.
    assert "cannot be quantized" not in caplog.text


@pytest.mark.parametrize("kind", ["nf4_nested", "int8"])
def test_offloading_by_accelerate(kind, ids, tmp_path):
    want = logits(AutoModelForCausalLM.from_pretrained(FIXTURES / kind), ids)
    for device in ("cpu", torch.device("cpu")):
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / kind)
        accelerate.cpu_offload(model, device)
        assert torch.equal(logits(model, ids), want)
        assert torch.equal(logits(model, ids), want)
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / kind)
        accelerate.disk_offload(model, tmp_path / str(type(device)), device)
        assert torch.equal(logits(model, ids), want)


def test_device_map_auto_and_max_memory(ids, tmp_path):
    want = logits(load(FIXTURES / "base", NESTED), ids)
    assert torch.equal(logits(load(FIXTURES / "base", NESTED, device_map="auto"), ids), want)
    # 416 KB in all, quantized; 854 KB before.
    fits = load(FIXTURES / "base", NESTED, device_map="auto", max_memory={"cpu": 700_000})
    assert set(getattr(fits, "hf_device_map", {"": "cpu"}).values()) == {"cpu"}
    parts = load(
        FIXTURES / "base", NESTED, device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path / "folder"
    )
    assert "disk" in parts.hf_device_map.values()
    assert torch.equal(logits(parts, ids), want)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_on_cuda(name, quant_type, models, ids, tmp_path):
    """Without a device map on the GPU, with the codes that the CPU computes; offloaded, the same logits."""
    on_cpu = load(models[name], BnbRefConfig(quant_type, double_quant=False), device_map={"": "cpu"})
    model = load(models[name], BnbRefConfig(quant_type, double_quant=False))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    for one, other in zip(on_cpu.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other.cpu())
    ids = ids.cuda()
    want = logits(model, ids)
    assert want.isfinite().all()
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, ids.shape[1] + 4)
    model.save_pretrained(tmp_path / "a")
    if name != "gpt2":
        mixed = MAP | {"model.embed_tokens": 0, "model.layers.1": "cpu", "model.norm": 0, "model.rotary_emb": 0}
        parts = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map=mixed, offload_folder=tmp_path / "b")
        for _ in range(2):
            assert torch.equal(logits(parts, ids), want)
    if quant_type == "nf4":
        assert torch.equal(logits(model.dequantize(), ids), want)


# ---- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"quant_type": "nf3"}, ValueError, "quant_type must be one of"),
        ({"double_quant": 1}, TypeError, "double_quant must be a bool, got 1"),
        ({"compute_dtype": "float8"}, ValueError, "compute_dtype must be one of float32, float16, bfloat16"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype must be one of"),
        ({"quant_storage": torch.int64}, ValueError, "quant_storage must be one of uint8, float32"),
        ({"blocksize": 0}, ValueError, "blocksize must be"),
        ({"blocksize": 48}, ValueError, "pass checkpoint_format='bnbref'"),
        ({"quant_type": "af4"}, ValueError, "pass checkpoint_format='bnbref'"),
        ({"skip_modules": "lm_head"}, TypeError, "skip_modules must be None or a list of strings, got 'lm_head'"),
        ({"threshold": -1.0}, ValueError, "threshold must be 0"),
        ({"threshold": float("nan")}, ValueError, "threshold must be 0"),
        ({"checkpoint_format": "gguf"}, ValueError, "checkpoint_format must be"),
        ({"load_in_4bit": True}, TypeError, "load_in_4bit"),
    ],
)
def test_bad_configs_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        BnbRefConfig(**options)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_configs_survive_json(config):
    again = BnbRefConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    own = {"quant_type", "double_quant", "compute_dtype", "quant_storage", "skip_modules", "threshold"}
    if config.is_int8:
        own -= {"double_quant"}
    assert {name: getattr(again, name) for name in own} == {name: getattr(config, name) for name in own}


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.float16])
def test_a_compute_dtype_survives_where_another_quantizer_serves_bitsandbytes(compute_dtype):
    """`take_over_bitsandbytes` has not taught BitsAndBytesConfig to remember it then."""
    hf.give_back_bitsandbytes()
    config = BnbRefConfig(compute_dtype=compute_dtype)
    config.model_dtype = torch.bfloat16
    assert BnbRefConfig.from_dict(config.to_dict()).compute_dtype == compute_dtype


def test_int8_is_written_as_bitsandbytes_writes_it():
    assert BnbRefConfig("int8").to_dict() == BitsAndBytesConfig(load_in_8bit=True).to_dict()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_bits_are_those_of_the_bytes(config):
    """Of a weight whose blocks are all whole, but for the mean of the scales, which is one float32 a weight."""
    rows, columns = 4096, 4096
    mean = 0 if config.is_int8 or not config.double_quant else 4
    scales_of_rows = 4 * rows if config.is_int8 else 0
    bits = 8 * (sum(config.bytes_of(rows, columns)) - mean - scales_of_rows) / (rows * columns)
    assert config.bits == bits


def test_a_config_that_asks_for_no_bits_is_refused():
    with pytest.raises(ValueError, match="must have load_in_4bit=True or load_in_8bit=True, got neither"):
        BnbRefConfig.of_bitsandbytes(BitsAndBytesConfig())


def test_what_bitsandbytes_reads():
    hf.give_back_bitsandbytes()
    config = BitsAndBytesConfig(**BnbRefConfig(skip_modules=["a"], compute_dtype="float16").to_dict())
    assert (config.quantization_method(), config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert (config.bnb_4bit_compute_dtype, config.llm_int8_skip_modules) == (torch.float16, ["a"])


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        ({}, None),
        ({"bnb_4bit_compute_dtype": "float32"}, torch.float32),
        ({"bnb_4bit_compute_dtype": torch.float16}, torch.float16),
    ],
)
def test_a_compute_dtype_that_is_not_given_is_the_activations(given, computed, tmp_path):
    model = load(FIXTURES / "base", BitsAndBytesConfig(load_in_4bit=True, **given))
    assert model.model.layers[0].mlp.up_proj.compute_dtype == computed
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].mlp.up_proj.compute_dtype == computed
    own = load(FIXTURES / "base", BnbRefConfig(compute_dtype=computed))
    own.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].mlp.up_proj.compute_dtype == computed
    written = config_of(tmp_path)["quantization_config"]["bnb_4bit_compute_dtype"]
    assert written == str(computed or torch.bfloat16).removeprefix("torch.")


def test_taking_over_and_giving_back_twice():
    hf.take_over_bitsandbytes()
    hf.take_over_bitsandbytes()
    assert hf.auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is hf.BnbRefHfQuantizer
    hf.give_back_bitsandbytes()
    assert hf.auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__module__.startswith("transformers.")
    assert BitsAndBytesConfig.__init__.__module__ == BitsAndBytesConfig.__module__
    assert "remember" not in BitsAndBytesConfig.__init__.__code__.co_name
    hf.give_back_bitsandbytes()


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_whole_model_is_one_graph(quant_type, ids):
    config = transformers.AutoConfig.from_pretrained(FIXTURES / "base", num_hidden_layers=1)
    model = load(FIXTURES / "base", BnbRefConfig(quant_type, threshold=6.0), config=config)
    want = logits(model, ids)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=count)
        assert torch.equal(compiled(ids, use_cache=False).logits, want)
    assert len(graphs) == 1


# ---- beside the real one --------------------------------------------------------------------------------------------

BESIDE = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import bitsandbytes
import bnbref
from bnbref import BnbRefConfig, report, take_over_bitsandbytes
from bnbref.nn import Linear4bit

path = sys.argv[1]
ids = load_file(f"{path}/nf4_plain/reference.safetensors")["ids"]
layer = lambda model: model.model.layers[0].mlp.up_proj

theirs = AutoModelForCausalLM.from_pretrained(f"{path}/nf4_plain")
assert isinstance(layer(theirs), bitsandbytes.nn.Linear4bit), layer(theirs)
ours = AutoModelForCausalLM.from_pretrained(f"{path}/base", dtype="bfloat16", quantization_config=BnbRefConfig())
assert isinstance(layer(ours), Linear4bit), layer(ours)
assert theirs.num_parameters() == ours.num_parameters()
take_over_bitsandbytes()
taken = AutoModelForCausalLM.from_pretrained(f"{path}/nf4_plain")
assert isinstance(layer(taken), Linear4bit), layer(taken)
assert torch.equal(layer(taken).weight.data, layer(theirs).weight.data)
bnbref.give_back_bitsandbytes()
again = AutoModelForCausalLM.from_pretrained(f"{path}/nf4_plain")
assert isinstance(layer(again), bitsandbytes.nn.Linear4bit), layer(again)
assert not any(p.quantized for p in report(theirs).parameters)
"""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_beside_bitsandbytes():
    command = [sys.executable, "-c", BESIDE, str(FIXTURES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_bitsandbytes_importing_is_enough():
    code = """
import sys
sys.modules["bitsandbytes"] = None
from bnbref import BnbRefConfig
from transformers.quantizers import auto
print(auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"].__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "BnbRefHfQuantizer\n", done.stderr


def test_a_codebook_that_is_entered_later_is_saved_and_loaded(ids, tmp_path, monkeypatch):
    """After this module was imported, and so the integration."""
    book = Codebook.nearest("late", [-1, -0.5, 0, 0.25, 0.5, 0.75, 0.875, 1])
    monkeypatch.setitem(FOUR_BIT, "late", book)
    spec = BnbRefConfig("late", checkpoint_format="bnbref")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32, quantization_config=spec)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.model.layers[0].mlp.up_proj.weight.quant_type == "late"
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_conversions_of_a_model_that_would_take_codes_are_left_out(tmp_path):
    """Of 4 and of 8 bits: those by whose name a file has codes. One that gives its result another name is of other weights."""
    from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter
    from transformers.quantizers.base import HfQuantizer

    from bnbref.integrations.hf.quantizer import BnbRefHfQuantizer

    four, eight, plain, many = (
        WeightConverter(source_patterns=source, target_patterns=target, operations=[operation])
        for source, target, operation in (
            ("experts.gate_up_proj", "experts.gate_up_proj", Transpose(1, 2)),
            ("down_proj.weight", "down_proj.weight", Transpose(0, 1)),
            ("head.weight", "head.weight", Transpose(0, 1)),
            ("experts.*.w1.weight", "experts.other", MergeModulelist(dim=0)),
        )
    )
    names = ("experts.gate_up_proj.absmax", "down_proj.SCB", "experts.0.w1.weight.absmax", "head.weight")
    save_file({f"model.layers.0.{name}": torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    quantizer = BnbRefHfQuantizer(BnbRefConfig("nf4"), pre_quantized=True)
    quantizer.files = [str(tmp_path / "model.safetensors")]
    given = [four, eight, plain, many]
    takes = inspect.signature(HfQuantizer.update_weight_conversions).parameters
    model = [nn.Module()] if "model" in takes else []  # transformers 5.17 has no such argument
    assert [c for c in quantizer.update_weight_conversions(given, *model) if c in given] == [plain, many]


def test_a_conversion_of_a_part_of_a_model_is_undone_for_the_weights_of_that_part():
    from transformers.core_model_loading import Chunk, WeightConverter

    from bnbref.integrations.hf.loaded import undone_on_saving

    split = WeightConverter(
        source_patterns="qkv", target_patterns=["q_proj", "k_proj", "v_proj"], operations=[Chunk(0)]
    )
    assert undone_on_saving(split, ["vision.layers.0.q_proj.weight"])
    split.scope_prefix = "vision"
    assert undone_on_saving(split, ["vision.layers.0.q_proj.weight"])
    assert not undone_on_saving(split, ["text.layers.0.q_proj.weight"])
