"""`python -m bnbref plan`: against the bytes of models that are loaded, trained and generate, and published sizes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

import bnbref
from bnbref import cli, optim

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
plan = pytest.importorskip("bnbref.integrations.hf.plan")
blueprint = pytest.importorskip("bnbref.integrations.hf.blueprint")
plan_report = pytest.importorskip("bnbref.integrations.hf.plan_report")
hf = pytest.importorskip("bnbref.integrations.hf.transformers")

DEMO = Path(bnbref.__file__).parent / "demo" / "model"
LLAMA2 = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
PARAMETERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}  # of the models that were published


@pytest.fixture(scope="module")
def demo():
    return blueprint.Blueprint(plan.read_config(str(DEMO)))


def load(spec):
    options = {} if spec is None else {"quantization_config": spec}
    with bnbref.eager():
        return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16, **options)


def weight_bytes(model, name):
    found = model.weights(name)
    return 2 * found.floats + found.codes + found.scales


@pytest.mark.parametrize("name", blueprint.FORMATS)
def test_weights_and_scales_to_the_byte(name, demo):
    assert weight_bytes(demo, name) == bnbref.report(load(blueprint.FORMATS[name])).total_bytes


def test_training_to_the_byte(demo):
    """Adapters, gradients and states of a step of QLoRA on the demo model."""
    (p,) = [p for p in plan.plans(demo, "qlora", optim.AdamW8bit, 32, 2) if p.format == "nf4, double"]
    model = peft.prepare_model_for_kbit_training(load(blueprint.FORMATS[p.format]))
    settings = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optim.AdamW8bit(trained, lr=1e-3)
    ids = torch.arange(64).view(2, 32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with bnbref.eager(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert p.parts["adapters"] == sum(parameter.nbytes for parameter in trained)
    weights = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" not in name)
    assert p.parts["weights"] == weights  # peft casts what is not quantized to float32
    assert p.parts["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert p.parts["optimizer"] == sum(t.nbytes for t in states)
    # The estimate of activations: within a factor of 4 of what the graph holds, all recomputed layers together.
    held = sum(size for pointer, size in kept.items() if pointer not in owned)
    assert held / 4 < p.parts["activations"] < held * 4


TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TINY, num_key_value_heads=2, head_dim=16, use_cache=False),
    "sliding windows": lambda: transformers.Gemma3TextConfig(
        **TINY, num_key_value_heads=2, head_dim=16, sliding_window=20, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "compressed keys": lambda: transformers.DeepseekV3Config(
        **TINY, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),
    "recurrent": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
    "encoder and decoder": lambda: transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=4),
    "needs values": lambda: transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64,
    ),
}  # fmt: skip


def held(cache):
    """Bytes of the tensors of each layer of a cache; what an encoder's keys take is in a cache beside."""
    parts = (
        [cache.self_attention_cache, cache.cross_attention_cache]
        if hasattr(cache, "cross_attention_cache")
        else [cache]
    )
    found = [
        x for part in parts for layer in part.layers for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor)
    ]
    return sum(x.nbytes for x in found if x.dim())


def test_activations_by_the_parts_that_are_said():
    """2 x 10 tokens, counted by hand: of a layer 7 tensors as wide as the model and 3 as the inner ones; a weight; the logits, of
    the last tokens alone to run, and in training of all, with float32 copies and their gradient."""
    tiny = blueprint.Blueprint(CONFIGS["llama"]())
    layer, weight = 2 * 20 * (7 * 32 + 3 * 64), 2 * 32 * 64
    assert tiny.activation_bytes(2, 10, train=False) == layer + weight + 2 * 64 * (2 + 4)
    inputs_of_layers = 2 * 4 * 20 * 32
    assert tiny.activation_bytes(2, 10, train=True) == inputs_of_layers + 2 * layer + weight + 20 * 64 * (2 + 4 + 4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seq", [12, 40])
def test_the_cache_to_the_byte(name, seq):
    found = blueprint.Blueprint(CONFIGS[name]())
    torch.manual_seed(0)
    model = found._class._from_config(found.config, dtype=torch.bfloat16).eval()
    ids = torch.arange(2 * seq).view(2, seq) % 60 + 3
    inputs = {"decoder_input_ids": ids} if found.config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True, **inputs)
    assert found.cache_bytes(2, seq) == held(output.get("past_key_values") or output.cache_params)


@pytest.mark.parametrize(
    ("config", "loader"),
    [
        ("ViTConfig", "ViTModel"), ("T5Config", "T5ForConditionalGeneration"), ("BertConfig", "AutoModelForCausalLM"),
        ("LlavaConfig", "LlavaForConditionalGeneration"), ("MixtralConfig", "AutoModelForCausalLM"),
    ],
)  # fmt: skip
def test_models_of_other_kinds(config, loader, tmp_path, capsys):
    getattr(transformers, config)().save_pretrained(tmp_path)
    assert cli.main(["plan", str(tmp_path), "--memory", "2TB", "--train", "qlora"]) == 0
    said = capsys.readouterr().out
    assert f"from transformers import {loader}\n" in said
    assert 'target_modules="all-linear"' in said
    cli.main(["plan", str(tmp_path)])
    assert "train everything" in capsys.readouterr().out


def test_the_class_that_a_config_names():
    config = transformers.BertConfig(architectures=["BertForMaskedLM"], num_hidden_layers=1)
    assert blueprint.Blueprint(config).loader == "BertForMaskedLM"
    with pytest.raises(ValueError, match="has no model for a PreTrainedConfig"):
        blueprint.Blueprint(transformers.PretrainedConfig())


def test_the_class_of_a_config_that_names_none():
    """Or what transformers has not, or what is no model there."""
    for named in (None, ["MineForCausalLM"], ["__doc__"], ["PreTrainedModel"], ["AutoModel"], [3]):
        tiny = transformers.LlamaConfig(**TINY)
        tiny.__dict__["architectures"] = named  # which some versions of huggingface_hub judge when it is assigned
        assert blueprint.Blueprint(tiny).loader == "AutoModelForCausalLM"
    assert blueprint.Blueprint(CONFIGS["needs values"]()).loader == "BartForConditionalGeneration"
    funnel = transformers.FunnelConfig(vocab_size=64, block_sizes=[1], d_model=32, n_head=2, d_head=16, d_inner=64)
    assert blueprint.Blueprint(funnel).loader == "FunnelModel"


WEIGHTS = {
    "tied": lambda: transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "transposed": lambda: transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16),
    "experts": lambda: transformers.MixtralConfig(
        **{**TINY, "hidden_size": 64, "num_hidden_layers": 1}, num_key_value_heads=2, num_local_experts=3
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["int8", "nf4, double"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_other_models_to_the_byte(name, form, tmp_path):
    """Tied embeddings, weights that lie transposed, and experts, which are quantized in 4 bits and not in 8."""
    found = blueprint.Blueprint(WEIGHTS[name]())
    found._class._from_config(found.config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with bnbref.eager():
        model = found._class.from_pretrained(
            tmp_path, dtype=torch.bfloat16, quantization_config=blueprint.FORMATS[form], device_map="cpu"
        )
    assert weight_bytes(found, form) == bnbref.report(model).total_bytes


@pytest.mark.parametrize("name", ["llama", "needs values"])
def test_the_cache_of_a_model_that_cannot_be_run_is_that_of_usual_attention(name, monkeypatch):
    found = blueprint.Blueprint(CONFIGS[name]())
    run = found.cache_bytes(2, 12)
    monkeypatch.setattr(found, "_kept", lambda tokens: [])
    assert found.cache_bytes(2, 12) == run
    mamba = blueprint.Blueprint(CONFIGS["recurrent"]())
    monkeypatch.setattr(mamba, "_kept", lambda tokens: [])
    with pytest.raises(ValueError, match="how much MambaForCausalLM keeps of a token is not known: "):
        mamba.cache_bytes(1, 8)


def test_tensors_of_a_cache_that_a_stranger_has_written():
    """Each once, whatever refers to it, classes aside; with the window of the object that has it."""
    layer = SimpleNamespace(keys=torch.zeros(1), sliding_window=4, kind=type("Layer", (), {"table": torch.zeros(2)}))
    cache = SimpleNamespace(layers=[layer], first=layer, more={"x": [torch.zeros(3), None]})
    cache.itself = cache
    assert list(blueprint._tensors(cache, None, set())) == [(layer.keys, 4), (cache.more["x"][0], None)]


def test_what_a_config_does_not_say():
    """GPT-2's feed-forward net is four times as wide as its input; a model of pictures has no vocabulary and no cache."""
    text = blueprint.Blueprint(WEIGHTS["transposed"]())
    layer, weight = 2 * 20 * (7 * 64 + 3 * 256), 2 * 64 * 256
    assert text.activation_bytes(2, 10, train=False) == layer + weight + 2 * 64 * (2 + 4)
    seen = blueprint.Blueprint(
        transformers.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    assert seen.activation_bytes(2, 10, train=False) == 2 * 20 * (7 * 32 + 3 * 64) + 2 * 32 * 64
    assert seen.cache_bytes(2, 10) == 0


@pytest.mark.parametrize("size", LLAMA2)
def test_published_sizes_of_llama_2(size):
    """14, 7 and 3.5 GB for 7B are two, one and half a byte a parameter; scales and what stays bfloat16 come on top."""
    config = transformers.LlamaConfig(vocab_size=32000, **LLAMA2[size])
    count = PARAMETERS[size]
    model = blueprint.Blueprint(config)
    found = {name: weight_bytes(model, name) for name in blueprint.FORMATS}
    assert found["bfloat16"] == 2 * count
    kept = 2 * 32000 * config.hidden_size  # embedding and output head stay bfloat16
    vectors = (2 * config.num_hidden_layers + 1) * config.hidden_size
    inside = count - kept - vectors
    assert found["nf4"] == 2 * (kept + vectors) + inside // 2 + inside // 64 * 4
    assert 8 * (found["nf4, double"] - 2 * (kept + vectors)) / inside == pytest.approx(4.127, abs=1e-3)
    assert found["int8"] == pytest.approx(count, rel=0.05)


def test_full_training_of_7b(monkeypatch):
    config = transformers.LlamaConfig(vocab_size=32000, **LLAMA2["7b"])
    model = blueprint.Blueprint(config)
    (p,) = plan.plans(model, "full", optim.PagedAdamW8bit, 512, 1)
    assert p.parts["gradients"] == p.parts["weights"] == 2 * PARAMETERS["7b"]
    assert p.host == pytest.approx(2 * PARAMETERS["7b"] * (1 + 4 / 256), rel=1e-3)
    assert p.parts["optimizer"] < 2**29
    (resident,) = plan.plans(model, "full", optim.AdamW8bit, 512, 1)
    assert resident.total - p.total == pytest.approx(p.host, rel=0.03)


@pytest.mark.parametrize("size", ["0.5B", "1.1B", "3B", "7B", "13B", "33B", "70B"])
def test_a_llama_of_a_size(size):
    count = sum(p.numel() for p in blueprint.Blueprint(plan.read_config(size)).model.parameters())
    assert count == pytest.approx(float(size[:-1]) * 1e9, rel=0.1)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_recommends_and_its_code_runs(capsys, tmp_path):
    assert cli.main(["plan", str(DEMO), "--memory", "10MiB", "--seq", "64"]) == 0
    text = capsys.readouterr().out
    assert "recommended: int8" in text
    namespace = {}
    code = text[text.index("import torch") :]
    with bnbref.eager():
        exec(code.replace('device_map="auto"', 'device_map="cpu"'), namespace)
    assert bnbref.report(namespace["model"]).quantized
    assert cli.main(["plan", str(DEMO), "--memory", "100 MB", "--seq", "64", "--train", "qlora"]) == 0
    code = capsys.readouterr().out.partition("import torch")
    with bnbref.eager():
        exec("import torch" + code[2].replace('device_map="auto"', 'device_map="cpu"'), namespace)
    assert isinstance(namespace["optimizer"], optim.PagedAdamW8bit)
    assert cli.main(["plan", str(DEMO), "--memory", "1GiB", "--seq", "64", "--train", "qlora"]) == 0
    code = capsys.readouterr().out
    assert "recommended: bfloat16" in code
    exec(code[code.index("import torch") :].replace('device_map="auto"', 'device_map="cpu"'), namespace)
    kept = {p.dtype for name, p in namespace["model"].named_parameters() if "lora_" not in name}
    assert kept == {torch.bfloat16}
    ids = torch.arange(16)[None]
    namespace["model"].train()(input_ids=ids, labels=ids).loss.backward()


def cells(line):
    """The columns of a line of the table, which are two blanks apart."""
    return [cell.strip() for cell in re.split(r" {2,}", line.strip())]


def test_what_fits_on_which_card(capsys):
    assert cli.main(["plan", "7B"]) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if "yes" in line]
    first = {}  # use, format and optimizer -> the smallest GPU
    for use, form, *rest in rows:
        number = [cell in ("yes", "-") for cell in rest].index(True)
        chosen = rest[0] if rest[0][0].isalpha() else None
        first[use, form, chosen] = (8, 12, 16, 24, 40, 80)[rest[number:].index("yes")]
    assert first == {
        ("run", "bfloat16", None): 16,
        ("run", "int8", None): 8,
        ("run", "nf4", None): 8,
        ("run", "nf4, double", None): 8,
        ("train an adapter", "bfloat16", "PagedAdamW8bit"): 16,
        ("train an adapter", "int8", "PagedAdamW8bit"): 12,
        ("train an adapter", "nf4", "PagedAdamW8bit"): 8,
        ("train an adapter", "nf4, double", "PagedAdamW8bit"): 8,
        ("train everything", "bfloat16", "AdamW"): 80,
        ("train everything", "bfloat16", "AdamW8bit"): 40,
        ("train everything", "bfloat16", "PagedAdamW8bit"): 40,
        ("train everything", "bfloat16", "Lion8bit"): 40,
    }


def test_the_table_of_one_use_and_what_fits_nowhere(capsys):
    assert cli.main(["plan", "7B", "--train", "full", "--optimizer", "LAMB"]) == 0
    (row,) = [cells(line) for line in capsys.readouterr().out.splitlines() if "LAMB" in line]
    parts = dict(zip(("weights", "training", "tokens", "GiB"), map(float, row[3:7]), strict=True))
    assert parts["training"] == pytest.approx(PARAMETERS["7b"] * (2 + 8) / 2**30, abs=0.01)
    assert parts["GiB"] == pytest.approx(parts["weights"] + parts["training"] + parts["tokens"], abs=0.02)
    assert cli.main(["plan", "70B", "--train", "full"]) == 1


def test_a_size_has_no_name_to_load(capsys):
    assert cli.main(["plan", "7B", "--memory", "8GiB"]) == 0
    assert "recommended: int8" in (text := capsys.readouterr().out)
    assert "'NAME OF THE MODEL'" in text


def test_the_page_shows_what_the_command_prints(capsys):
    page = (Path(__file__).parent.parent / "docs/content/memory.md").read_text(encoding="utf-8")
    for arguments in (["7B"], ["7B", "--memory", "8GiB", "--train", "qlora"], ["70B", "--memory", "2x24GiB"]):
        cli.main(["plan", *arguments])
        assert f"```text\n{capsys.readouterr().out}```" in page, arguments


def test_layers_are_divided_among_gpus_as_a_whole():
    """GPUs that are filled in turn, as accelerate does, hold whatever fits into the room that a plan counts with."""
    config = plan.llama(1e9)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layers = [2 * sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    embedding = 2 * model.model.embed_tokens.weight.numel()
    largest = max(*layers, embedding)
    found = blueprint.Blueprint(config)
    assert found.undivided_bytes() == largest
    parts = (embedding, *layers, embedding)
    for count in (1, 2, 3):
        memory = -(-(sum(parts) + (count - 1) * largest) // count)
        assert plan_report.room(found, count, memory) >= sum(parts)
        gpus, left = 1, memory
        for part in parts:
            if part > left:
                gpus, left = gpus + 1, memory
            left -= part
        assert gpus <= count


def test_what_fits_to_the_byte(capsys, demo):
    least = min(p.total for p in plan.plans(demo, seq=64))
    arguments = ["plan", str(DEMO), "--seq", "64", "--memory"]
    assert cli.main([*arguments, f"{least}B"]) == 0
    assert re.search(r"^nf4, double .* yes$", (said := capsys.readouterr().out), re.M)
    assert "recommended: nf4, double" in said
    assert cli.main([*arguments, f"{least - 1}B"]) == 1
    assert " yes" not in capsys.readouterr().out
    assert cli.main([*arguments, f"{least - 3 * 2**19}B"]) == 1
    assert "none fits: nf4, double needs 1.50 MiB more\n" in capsys.readouterr().out


def test_what_does_not_fit(capsys):
    assert cli.main(["plan", str(DEMO / "config.json"), "--memory", "1MiB"]) == 1
    assert "none fits: nf4, double needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "much"], "memory must be a number with a unit, like 24GiB, 16GB or 2x24GiB, got 'much'"),
        (["--memory", "3 km"], "memory must be"),
        (["--memory", "8"], "memory must be a number with a unit"),
        (["--memory", "0x8GiB"], "memory must be a number with a unit"),
        (["--memory", "9" * 400 + "GiB"], "memory must be a number with a unit"),
        (["--memory", "9" * 400 + "x8GiB"], "memory must be a number with a unit"),
        (["--optimizer", "Adafactor"], "--optimizer must be one of AdEMAMix, "),
    ],
)
def test_what_the_command_refuses(capsys, arguments, message):
    assert cli.main(["plan", str(DEMO), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_size_of_nothing_is_refused(capsys):
    assert cli.main(["plan", "0.0B"]) == 2
    assert "a size must be above 0, like 7B, got '0.0B'" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1M", "0.0001B", "9999999B"])
def test_a_size_that_no_llama_has_is_refused(capsys, size):
    assert cli.main(["plan", size]) == 2
    assert "a size must be from 8M to 3279B, or near: there is no Llama of " in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    for model in (tmp_path, tmp_path / "nothing"):
        assert cli.main(["plan", str(model)]) == 2
        assert f"a name on the hub, or a size like 7B, got {str(model)!r}: " in capsys.readouterr().err
    for count, allowed in (
        ("0", "an integer of at least 1"),
        ("two", "an integer of at least 1"),
        ("9" * 400, "at most 1e+18"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["plan", str(DEMO), "--batch", count])
        assert f"--batch: must be {allowed}, got {count!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        ({"hidden_size": "64"}, "hidden_size"), ({"num_attention_heads": 0}, "zero"), ({"num_attention_heads": 7}, "multiple"),
        ({"dtype": "nonsense"}, "nonsense"), ({"hidden_act": "nonsense"}, "of this config: KeyError: 'nonsense'"), (None, "None"),
    ],
)  # fmt: skip
def test_a_config_that_lies(lie, error, tmp_path, capsys):
    """Whatever it is that transformers raises."""
    llama = {"model_type": "llama", **TINY}
    (tmp_path / "config.json").write_text(json.dumps(None if lie is None else {**llama, **lie}))
    assert cli.main(["plan", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bnbref: error: ")
    assert error in said


def test_what_is_not_known_of_a_model():
    found = blueprint.Blueprint(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(ValueError, match="ResNetModel has no linear layer to adapt"):
        plan.plans(found, "qlora")
    with pytest.raises(ValueError, match="the activations of ResNetModel are not known: "):
        plan.plans(found)


FAMILIES = ("SGD", "LARS", "Adam", "AdamW", "LAMB", "Lion", "RMSprop", "Adagrad", "AdEMAMix")


def test_every_optimizer_that_steps_by_element_is_planned(monkeypatch):
    """Wherever its class is written down: the alias gives them modules of bitsandbytes."""
    monkeypatch.setattr(optim.AdamW, "__module__", "bitsandbytes.optim.adamw")
    variants = ("{}", "{}8bit", "{}32bit", "Paged{}", "Paged{}8bit", "Paged{}32bit")
    assert {kind.__name__ for kind in plan.optimizers()} == {v.format(name) for v in variants for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_code_of_a_plan_makes_any_of_them(name, capsys):
    assert cli.main(["plan", "1B", "--train", "full", "--memory", "80GiB", "--optimizer", f"Paged{name}8bit"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("optimizer = ")]
    namespace = {"optim": optim, "model": torch.nn.Linear(2, 2)}
    exec(line, namespace)
    assert type(namespace["optimizer"]).__name__ == f"Paged{name}8bit"
