"""What people do with bitsandbytes through transformers, peft, accelerate and Trainer, written once for both packages.

Each flow takes an empty folder and returns tensors by name, or raises. It imports bitsandbytes at most; `side_by_side.py` runs
all of them on the real one and on bnbref, each in a process of its own, and compares.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

Flow = Callable[[Path], dict[str, Tensor]]

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
IDS = load_file(FIXTURES / "int8" / "reference.safetensors")["ids"]
FLOWS: dict[str, Flow] = {}

CONFIGS: dict[str, dict[str, Any]] = {
    "NF4": {"bnb_4bit_quant_type": "nf4"},
    "NF4, double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "FP4": {"bnb_4bit_quant_type": "fp4"},
    "NF4 in bfloat16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {},
}
TWO = ("NF4, double", "int8")


def flow(name: str) -> Callable[[Flow], Flow]:
    """Add a flow to FLOWS."""

    def add(function: Flow) -> Flow:
        if name in FLOWS:
            raise ValueError(f"there is a flow {name!r} already")
        FLOWS[name] = function
        return function

    return add


# ---- pieces ---------------------------------------------------------------------------------------------------------


def config(kind: str, compute: torch.dtype = torch.bfloat16) -> Any:
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **CONFIGS[kind])


def quantized(kind: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """The base model, quantized while it is loaded."""
    arguments = {"quantization_config": config(kind, dtype), "dtype": dtype} | options
    return transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "base", **arguments)


def saved(kind: str) -> Any:
    """A model that bitsandbytes has written."""
    return transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / kind, dtype=torch.bfloat16)


def state(model: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}


@torch.no_grad()
def logits(model: Any) -> dict[str, Tensor]:
    return {"logits": model.eval()(input_ids=IDS).logits.float()}


def steps(model: Any, count: int = 3) -> dict[str, Tensor]:
    """Losses, and the gradients of each step, of torch's own AdamW."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    model.train()
    found = {}
    for step in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found[f"loss {step}"] = loss.detach().float()
        found |= {f"gradient {step} {name}": p.grad.clone() for name, p in trained.items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return found


TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def adapted(kind: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """The base model with an adapter that does something, ready for training."""
    settings = {"r": 4, "init_lora_weights": False, **TARGETS, **options}
    base = peft.prepare_model_for_kbit_training(
        quantized(kind, dtype), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(**settings))


# ---- transformers ---------------------------------------------------------------------------------------------------

for kind in CONFIGS:

    @flow(f"load on the fly: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        return state(quantized(kind))

    @flow(f"logits: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        return logits(quantized(kind))

    @flow(f"save_pretrained: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        quantized(kind).save_pretrained(folder)
        return load_file(folder / "model.safetensors")

    @flow(f"dequantize: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        return state(quantized(kind).dequantize())


for kind in ("nf4_plain", "nf4_nested", "int8"):

    @flow(f"checkpoint, tensors: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        return state(saved(kind))

    @flow(f"checkpoint, logits: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        return logits(saved(kind))


@flow("load in float32: int8")
def _(folder: Path) -> dict[str, Tensor]:
    return state(quantized("int8", torch.float32))


@flow("generate: NF4, double")
def _(folder: Path) -> dict[str, Tensor]:
    found = quantized("NF4, double").generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return {"ids": found}


@flow("save_pretrained after a forward pass: NF4")
def _(folder: Path) -> dict[str, Tensor]:
    model = quantized("NF4")
    logits(model)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@flow("save a checkpoint again: nf4_nested")
def _(folder: Path) -> dict[str, Tensor]:
    saved("nf4_nested").save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@flow("save_original_format=False: nf4_nested")
def _(folder: Path) -> dict[str, Tensor]:
    saved("nf4_nested").save_pretrained(folder, save_original_format=False)
    return load_file(folder / "model.safetensors")


@flow("dequantize after save_pretrained: NF4")
def _(folder: Path) -> dict[str, Tensor]:
    model = quantized("NF4")
    model.save_pretrained(folder)
    return state(model.dequantize())


@flow("half() of weights in bfloat16 storage: NF4")
def _(folder: Path) -> dict[str, Tensor]:
    model = quantized("NF4 in bfloat16")
    layer = model.model.layers[0].self_attn.q_proj.half()
    with torch.no_grad():
        return {"output": layer(torch.ones(1, 128, dtype=torch.float16, requires_grad=True))}


# ---- accelerate -----------------------------------------------------------------------------------------------------

for kind in TWO:

    @flow(f"cpu_offload: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        model = quantized(kind)
        accelerate.cpu_offload(model, torch.device("cpu"))
        return logits(model)

    @flow(f"disk_offload: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        model = quantized(kind)
        accelerate.disk_offload(model, folder, torch.device("cpu"))
        return logits(model)

    @flow(f"device_map with a disk: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
        places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
        return logits(quantized(kind, device_map=places, offload_folder=folder))

    @flow(f"load_and_quantize_model: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

        with accelerate.init_empty_weights():
            empty = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(FIXTURES / "base")
            )
        options: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}
        model = load_and_quantize_model(
            empty,
            BnbQuantizationConfig(torch_dtype=torch.bfloat16, **options),
            weights_location=str(FIXTURES / "base" / "model.safetensors"),
            device_map={"": "cpu"},
        )
        return state(model)


# ---- peft -----------------------------------------------------------------------------------------------------------

for kind in CONFIGS:

    @flow(f"LoRA, losses and gradients: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        return steps(adapted(kind))


@flow("LoRA in float32, losses and gradients: NF4")
def _(folder: Path) -> dict[str, Tensor]:
    return steps(adapted("NF4", torch.float32))


@flow("LoRA, a float16 model computing in bfloat16: NF4")
def _(folder: Path) -> dict[str, Tensor]:
    base = quantized("NF4", torch.float16, quantization_config=config("NF4"))
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS))
    return steps(model.float(), 1)


for kind in TWO:

    @flow(f"DoRA, losses and gradients: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        return steps(adapted(kind, use_dora=True))

    @flow(f"OLoRA, the base it leaves and losses: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        model = adapted(kind, init_lora_weights="olora")
        return {**state(model), **steps(model, 1)}

    @flow(f"LoftQ: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        base = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)
        bits = peft.LoftQConfig(loftq_bits=8 if kind == "int8" else 4)
        settings = peft.LoraConfig(r=4, init_lora_weights="loftq", loftq_config=bits, **TARGETS)
        return state(peft.get_peft_model(base, settings))

    @flow(f"merge: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        model = adapted(kind)
        model.merge_adapter()
        return state(model)

    @flow(f"merge and unmerge: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        model = adapted(kind)
        model.merge_adapter()
        model.unmerge_adapter()
        return state(model)

    @flow(f"merge_and_unload: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        return state(adapted(kind).merge_and_unload())

    @flow(f"adapter saved and loaded: {kind}")
    def _(folder: Path, kind: str = kind) -> dict[str, Tensor]:
        adapted(kind).save_pretrained(folder)
        return state(peft.PeftModel.from_pretrained(quantized(kind), folder))


FEW: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TUNERS: dict[str, Callable[[], Any]] = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, tinit=1, tfinal=1, init_r=4, target_r=2, **FEW),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, **FEW),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **FEW),
    "MiSS": lambda: peft.MissConfig(r=4, **FEW),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, **FEW),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, **FEW),
    "RoAd": lambda: peft.RoadConfig(**FEW),
    "SHiRA": lambda: peft.ShiraConfig(r=4, **FEW),
    "VeRA": lambda: peft.VeraConfig(r=4, **FEW),
}

for tuner in TUNERS:

    @flow(f"{tuner}, loss and gradients: NF4")
    def _(folder: Path, tuner: str = tuner) -> dict[str, Tensor]:
        base = quantized("NF4", torch.float32)
        torch.manual_seed(0)
        return steps(peft.get_peft_model(base, TUNERS[tuner]()), 1)


# ---- Trainer --------------------------------------------------------------------------------------------------------

STRINGS = (
    "adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "ademamix",
    "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
)  # fmt: skip


def trainer(folder: Path, model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 500, (8, 16))]
    settings = {
        "max_steps": 4,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
    } | options
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, weight_decay=0.1, **settings
    )
    run = transformers.Trainer(model, args, train_dataset=data)
    run.remove_callback(transformers.PrinterCallback)
    return run


def outcome(run: Any) -> dict[str, Tensor]:
    """Losses and what was trained."""
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    trained = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    return {"losses": torch.tensor(losses), **trained}


for optim in STRINGS:

    @flow(f"Trainer, {optim}: NF4")
    def _(folder: Path, optim: str = optim) -> dict[str, Tensor]:
        run = trainer(folder, adapted("NF4", r=32), optim=optim)  # 32 x 128: large enough for states of 8 bits
        run.train()
        return outcome(run)


@flow("Trainer resumes: paged_adamw_8bit")
def _(folder: Path) -> dict[str, Tensor]:
    """The difference of a run with a stop and one without."""
    options = {"optim": "paged_adamw_8bit", "save_strategy": "steps", "save_steps": 2}
    whole = trainer(folder, adapted("NF4", r=32), **options)
    whole.train()
    resumed = trainer(folder, adapted("NF4", r=32), **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    want, found = outcome(whole), outcome(resumed)
    return {name: found[name] - want[name] for name in want if name != "losses"}


@flow("Trainer keeps the states of embeddings in 32 bits")
def _(folder: Path) -> dict[str, Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)
    run = trainer(folder, model, optim="adamw_bnb_8bit", max_steps=1)
    run.train()
    states = run.optimizer.optimizer.state
    wide = [states[p]["state1"].dtype == torch.float32 for p in model.parameters()]
    return {"in 32 bits": torch.tensor(wide)}


# ---- calls of the documentation -------------------------------------------------------------------------------------


def calls() -> dict[str, Flow]:
    """Every snippet of `test_alias_snippets.py` as a flow: the tensor that it makes."""
    from test_alias_snippets import SETUP, SNIPPETS

    def call(code: str, name: str) -> Flow:
        def run(folder: Path) -> dict[str, Tensor]:
            names: dict[str, Any] = {}
            exec(SETUP + code, names)
            return {name: names[name].detach().clone()}

        return run

    return {code: call(code, name) for code, (name, _, _) in SNIPPETS.items()}
