"""Unmodified transformers, peft and accelerate on `import bitsandbytes`, which is bnbref: each flow once, on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bnbref
from bnbref import as_bitsandbytes, checkpoint
from bnbref.nn import Linear4bit, Linear8bitLt

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
flows = pytest.importorskip("flows")

AutoModelForCausalLM = transformers.AutoModelForCausalLM
FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
KINDS = ("nf4_nested", "int8")
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", autouse=True)
def served():
    """`import bitsandbytes` is bnbref for the whole module; kernels uncompiled."""
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes itself is imported")
    bnbref.give_back_bitsandbytes()  # of what a test of another file may have left to bnbref
    with as_bitsandbytes(force=True), bnbref.eager():
        yield


@pytest.fixture
def patched():
    """bnbref's quantizer in transformers: what `install_as_bitsandbytes(patch_hf=True)` adds."""
    hf = pytest.importorskip("bnbref.integrations.hf.transformers")
    before = dict(hf.auto.AUTO_QUANTIZER_MAPPING)
    bnbref.install_as_bitsandbytes(force=True, patch_hf=True)
    yield
    bnbref.uninstall_as_bitsandbytes()
    assert before == hf.auto.AUTO_QUANTIZER_MAPPING
    bnbref.install_as_bitsandbytes(force=True)


@pytest.fixture(scope="module")
def ids():
    return load_file(FIXTURES / "int8" / "reference.safetensors")["ids"]


def config(kind):
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def quantized(kind, **options):
    """The base model, quantized while it is loaded."""
    return AutoModelForCausalLM.from_pretrained(
        FIXTURES / "base", quantization_config=config(kind), dtype=torch.float32, **options
    )


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids).logits


def trained(model, ids, steps=3):
    """The losses of a few steps on the same batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- transformers ---------------------------------------------------------------------------------------------------


@each_kind
def test_loading_gives_what_bnbrefs_own_quantizer_gives(kind, ids):
    model = quantized(kind)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is (Linear8bitLt if kind == "int8" else Linear4bit)
    assert model.num_parameters() == 426624
    hf = pytest.importorskip("bnbref.integrations.hf.transformers")
    own = hf.BnbRefConfig("int8" if kind == "int8" else "nf4", compute_dtype=None)
    again = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", quantization_config=own, dtype=torch.float32)
    assert torch.equal(logits(model, ids), logits(again, ids))


@pytest.mark.parametrize("kind", ["nf4_nested", "nf4_plain", "int8"])
def test_checkpoints_of_bitsandbytes(kind, ids):
    """In 4 bits those of the plain model with the weights of the file. int8: bitsandbytes' own, a float product on the CPU."""
    found = logits(AutoModelForCausalLM.from_pretrained(FIXTURES / kind, dtype=torch.bfloat16), ids)
    if kind == "int8":
        want = load_file(FIXTURES / kind / "reference.safetensors")["plain"]
        assert distance(found.float(), want) < 0.05
    else:
        plain = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.bfloat16)
        plain.load_state_dict(checkpoint.read(FIXTURES / kind))
        assert torch.equal(found, logits(plain, ids))


@each_kind
def test_saved_and_loaded(kind, ids, tmp_path):
    model = quantized(kind)
    model.save_pretrained(tmp_path, save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.quantization_config.quant_method == "bitsandbytes"
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["nf4_nested", "nf4_plain", "int8"])
def test_models_that_transformers_loads_quantized_are_saved_again(kind, tmp_path):
    """On bitsandbytes itself transformers raises NotImplementedError."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / kind)
    assert type(model.hf_quantizer).__module__.startswith("transformers.")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        with pytest.raises(NotImplementedError):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    names = ("model.safetensors",)
    assert [name for name in names if (tmp_path / name).read_bytes() != (FIXTURES / kind / name).read_bytes()] == []


def test_transformers_is_as_before_without_the_alias():
    """Whether it was imported before the alias, or after."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("transformers before 5.23 is left to refuse")
    code = """
import sys
import bnbref
first = "{first}"
if first == "transformers":
    import transformers.integrations.bitsandbytes
bnbref.install_as_bitsandbytes(force=True)
from transformers.core_model_loading import ConversionOps
from transformers.integrations import bitsandbytes as theirs
kinds = (theirs.Bnb4bitDeserialize, theirs.Bnb8bitDeserialize)
assert all(kind(None).reverse_op.convert({{1: 2}}) == {{1: 2}} for kind in kinds)
bnbref.uninstall_as_bitsandbytes()
assert all(kind.reverse_op is ConversionOps.reverse_op for kind in kinds)
"""
    for first in ("transformers", "the alias"):
        done = subprocess.run([sys.executable, "-c", code.format(first=first)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@each_kind
def test_patched_models_are_saved_again_and_dequantized(kind, ids, tmp_path, patched):
    """In transformers' own quantizer the second fails, also on bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / kind, dtype=torch.float32)
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again, ids), want)
    plain = again.dequantize()
    assert type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    # in float32 instead of bfloat16, or without int8 activations: 2^-8 for each of a dozen products in a row
    assert distance(logits(plain, ids), want) < 12 * 2**-8


@each_kind
def test_offloading(kind, ids, tmp_path):
    want = logits(quantized(kind), ids)
    for offload, arguments in ((accelerate.cpu_offload, ()), (accelerate.disk_offload, (tmp_path / "offload",))):
        model = quantized(kind)
        offload(model, *arguments, torch.device("cpu"))
        assert torch.equal(logits(model, ids), want)


@each_kind
def test_patched_device_map_with_a_disk(kind, ids, tmp_path, patched):
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    model = quantized(kind, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path)
    assert torch.equal(logits(model, ids), logits(quantized(kind), ids))


def test_accelerate_loads_and_quantizes(ids):
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(FIXTURES / "base"))
    model = load_and_quantize_model(
        empty,
        BnbQuantizationConfig(load_in_8bit=True, torch_dtype=torch.float32),
        weights_location=str(FIXTURES / "base" / "model.safetensors"),
        device_map={"": "cpu"},
    )
    layer = model.model.layers[0].self_attn.q_proj
    expected = quantized("int8").model.layers[0].self_attn.q_proj
    assert type(layer) is Linear8bitLt
    assert torch.equal(layer.weight.data, expected.weight.data)
    assert logits(model, ids).isfinite().all()


def small():
    """Two layers to quantize, and a head."""
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64, bias=False), torch.nn.Linear(64, 8))


def accelerate_loads(path, device_map, offload=None):
    """The small model in int8, from a folder or a file."""
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype=torch.float32, skip_modules=["2"])
    with accelerate.init_empty_weights():
        empty = small()
    return load_and_quantize_model(empty, config, str(path), device_map, offload_folder=offload)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"0": "cpu", "1": "disk", "2": "cpu"}])
def test_accelerate_loads_the_int8_that_it_saved(device_map, tmp_path):
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(small(), tmp_path / "float")
    model = accelerate_loads(tmp_path / "float", {"": "cpu"})
    accelerator.save_model(model, tmp_path / "int8")
    again = accelerate_loads(tmp_path / "int8", device_map, str(tmp_path / "offload"))
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
    if device_map == {"": "cpu"}:
        want, got = model.state_dict(), again.state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(got[key], value) for key, value in want.items())


def test_int8_whose_scales_accelerate_did_not_find(tmp_path):
    from safetensors.torch import save_file

    codes = {
        name: p.to(torch.int8) if name in ("0.weight", "1.weight") else p for name, p in small().state_dict().items()
    }
    save_file(codes, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"0\.weight is codes whose scales accelerate has not found"):
        accelerate_loads(tmp_path, {"": "cpu"})


# ---- peft -----------------------------------------------------------------------------------------------------------

LORA = {
    "lora": {},
    "dora": {"use_dora": True},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize(
    ("kind", "how"), [("nf4_nested", "lora"), ("nf4_nested", "dora"), ("nf4_nested", "olora"), ("int8", "dora")]
)
def test_lora_trains_merges_and_is_loaded_again(kind, how, ids, tmp_path):
    torch.manual_seed(0)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    base = peft.prepare_model_for_kbit_training(quantized(kind), **options)
    assert base.is_gradient_checkpointing
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings, **LORA[how]))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
    losses = trained(model, ids)
    assert losses[-1] < losses[0]
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    if how != "olora":  # which changes the base
        again = peft.PeftModel.from_pretrained(peft.prepare_model_for_kbit_training(quantized(kind)), tmp_path)
        assert torch.equal(logits(again, ids), want)
    # A merged weight is rounded anew, and again when it is unmerged: once or twice the error of quantizing the model.
    error = distance(logits(quantized(kind), ids), logits(unquantized(), ids))
    model.merge_adapter()
    assert 0 < distance(logits(model, ids), want) < 2 * error
    model.unmerge_adapter()
    assert distance(logits(model, ids), want) < 3 * error


def unquantized():
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)


CANNOT_MERGE = ("AdaLoRA", "IA3", "RandLoRA")  # in peft: not written for quantized layers, or for any non-square ones


@pytest.mark.parametrize("kind", ["nf4_nested", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tuner", flows.TUNERS)
def test_other_tuners(kind, tuner, ids):
    torch.manual_seed(0)
    model = peft.get_peft_model(quantized(kind), flows.TUNERS[tuner]())
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    want = logits(model, ids)
    if tuner not in CANNOT_MERGE:
        model.merge_adapter()
        assert distance(logits(model, ids), want) < 0.25


# ---- Trainer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", flows.STRINGS)
def test_every_optimizer_of_trainer_steps(optim, tmp_path):
    args = transformers.TrainingArguments(tmp_path, optim=optim, use_cpu=True, learning_rate=1e-3, report_to=[])
    cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    assert issubclass(cls, bnbref.optim.Optimizer)
    p = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
    optimizer = cls([p], **options)
    p.grad = torch.linspace(1, -2, 8192)
    before = p.detach().clone()
    optimizer.step()
    assert not torch.equal(p, before)
    eight = "8bit" in optim
    assert any(t.dtype == torch.uint8 for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)) == eight
    assert optimizer.is_paged == ("paged" in optim)


def trainer(folder, model, **options):
    torch.manual_seed(1)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 500, (8, 16))]
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2} | options
    optimizer = settings.pop("optimizer", None)
    args = transformers.TrainingArguments(
        folder, use_cpu=True, report_to=[], learning_rate=1e-3, disable_tqdm=True, **settings
    )
    return transformers.Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer and optimizer(args))


def adapted(kind):
    torch.manual_seed(0)
    settings = {"r": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(peft.prepare_model_for_kbit_training(quantized(kind)), peft.LoraConfig(**settings))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["nf4_nested", pytest.param("int8", marks=pytest.mark.slow)])
def test_trainer_runs_and_resumes(kind, tmp_path):
    """Four steps, and two steps, a checkpoint and two steps more: the same bits."""
    run = trainer(tmp_path, adapted(kind), optim="paged_adamw_8bit")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4
    states = run.optimizer.optimizer.state.values()
    assert any(t.dtype == torch.uint8 for state in states for t in state.values() if isinstance(t, torch.Tensor))
    resumed = trainer(tmp_path, adapted(kind), optim="paged_adamw_8bit")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights(resumed.model).items():
        assert torch.equal(value, weights(run.model)[name]), name


def test_embeddings_have_their_state_in_32_bits(tmp_path):
    """Trainer asks for it where the word bitsandbytes is in the optimizer's name; the helper does it without."""
    run = trainer(tmp_path, unquantized(), optim="adamw_bnb_8bit", max_steps=1)
    run.train()
    embedding = run.model.get_input_embeddings().weight
    state = run.optimizer.optimizer.state
    assert state[embedding]["state1"].dtype == torch.float32
    assert state[run.model.model.layers[0].self_attn.q_proj.weight]["state1"].dtype == torch.uint8


def test_without_the_alias_trainer_takes_the_optimizer(tmp_path):
    helper = pytest.importorskip("bnbref.integrations.hf.trainer")
    runs = []
    for optimizer in (None, lambda args: helper.optimizer_cls_and_kwargs(bnbref.optim.PagedAdamW8bit, args)):
        model = adapted("nf4_nested")
        optim = {"optim": "paged_adamw_8bit"} if optimizer is None else {"optimizer": optimizer}
        run = trainer(tmp_path, model, **optim)
        run.train()
        runs.append(weights(model))
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_what_the_helper_refuses(tmp_path):
    helper = pytest.importorskip("bnbref.integrations.hf.trainer")
    args = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    with pytest.raises(TypeError, match=r"optimizer must be a class of bnbref\.optim, got <class 'torch"):
        helper.optimizer_cls_and_kwargs(torch.optim.AdamW, args)
    assert helper.embeddings_in_32_bits(unquantized()) == 1
