"""`python -m bnbref plan`: against the bytes of models that are loaded, trained and generate, and published sizes."""

import json
import re
from pathlib import Path

import pytest
import torch

import bnbref
from bnbref import cli, optim

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
plan = pytest.importorskip("bnbref.integrations.hf.plan")
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
    return plan.read_config(str(DEMO))


def load(spec):
    options = {} if spec is None else {"quantization_config": spec}
    with bnbref.eager():
        return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("name", plan.FORMATS)
def test_weights_and_scales_to_the_byte(name, demo):
    spec = plan.FORMATS[name]
    found = plan.weight_bytes(demo, spec)
    assert sum(found.values()) == bnbref.report(load(spec)).total_bytes


def test_training_to_the_byte(demo):
    """Adapters, gradients and states of a step of QLoRA on the demo model."""
    (p,) = [p for p in plan.plans(demo, "qlora", optim.AdamW8bit, 32, 2) if p.format == "nf4, double"]
    model = peft.prepare_model_for_kbit_training(load(plan.FORMATS[p.format]))
    settings = peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
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


def test_the_cache_to_the_byte(demo):
    model = load(None)
    cache = model(input_ids=torch.arange(48).view(2, 24), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan.cache_bytes(demo, 2, 24) == held


@pytest.mark.parametrize("size", LLAMA2)
def test_published_sizes_of_llama_2(size):
    """14, 7 and 3.5 GB for 7B are two, one and half a byte a parameter; scales and what stays bfloat16 come on top."""
    config = transformers.LlamaConfig(vocab_size=32000, **LLAMA2[size])
    count = PARAMETERS[size]
    found = {name: sum(plan.weight_bytes(config, spec).values()) for name, spec in plan.FORMATS.items()}
    assert found["bfloat16"] == 2 * count
    kept = 2 * 32000 * config.hidden_size  # embedding and output head stay bfloat16
    vectors = (2 * config.num_hidden_layers + 1) * config.hidden_size
    inside = count - kept - vectors
    assert found["nf4"] == 2 * (kept + vectors) + inside // 2 + inside // 64 * 4
    assert 8 * (found["nf4, double"] - 2 * (kept + vectors)) / inside == pytest.approx(4.127, abs=1e-3)
    assert found["int8"] == pytest.approx(count, rel=0.05)


def test_full_training_of_7b(monkeypatch):
    config = transformers.LlamaConfig(vocab_size=32000, **LLAMA2["7b"])
    (p,) = plan.plans(config, "full", optim.PagedAdamW8bit, 512, 1)
    assert p.parts["gradients"] == p.parts["weights"] == 2 * PARAMETERS["7b"]
    assert p.host == pytest.approx(2 * PARAMETERS["7b"] * (1 + 4 / 256), rel=1e-3)
    assert p.parts["optimizer"] < 2**29
    (resident,) = plan.plans(config, "full", optim.AdamW8bit, 512, 1)
    assert resident.total - p.total == pytest.approx(p.host, rel=0.03)


@pytest.mark.parametrize("size", ["0.5B", "1.1B", "3B", "7B", "13B", "33B", "70B"])
def test_a_llama_of_a_size(size):
    count = sum(p.numel() for p in plan.on_meta(plan.read_config(size), None)[0].parameters())
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
    assert plan.undivided_bytes(config) == largest
    parts = (embedding, *layers, embedding)
    for count in (1, 2, 3):
        memory = -(-(sum(parts) + (count - 1) * largest) // count)
        assert plan_report.room(config, count, memory) >= sum(parts)
        gpus, left = 1, memory
        for part in parts:
            if part > left:
                gpus, left = gpus + 1, memory
            left -= part
        assert gpus <= count


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
        (["--optimizer", "Adafactor"], "--optimizer must be one of AdEMAMix, "),
    ],
)
def test_what_the_command_refuses(capsys, arguments, message):
    assert cli.main(["plan", str(DEMO), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    for model in (tmp_path, tmp_path / "nothing"):
        assert cli.main(["plan", str(model)]) == 2
        assert f"a name on the hub, or a size like 7B, got {str(model)!r}: " in capsys.readouterr().err
    for count in ("0", "two"):
        with pytest.raises(SystemExit):
            cli.main(["plan", str(DEMO), "--batch", count])
        assert f"--batch: must be an integer of at least 1, got {count!r}" in capsys.readouterr().err


def test_a_model_without_attention_to_adapt():
    config = transformers.RwkvConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(ValueError, match="none to adapt"):
        plan.plans(config, "qlora")
