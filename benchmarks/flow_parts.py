"""What gpu_flows.py times with a whole model, each in a process of its own: `python benchmarks/flow_parts.py '{"part": ...}'`.

A part takes a `Job` and yields rows, which are printed as they come. The model is Llama's, with random weights in bfloat16 and,
as trained models have them, a few features of the norms that are large: what LLM.int8() calls outliers.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROW, TURN = "ROW ", "TURN"
"""What begins a line that gpu_flows.py reads; and the argument that says that it gives turns, with the line that asks for one.
Libraries print other lines."""

OUTLIERS = 6
"""Features with outliers, of the hidden state: "up to 7" in LLM.int8() (2208.07339), section 4."""


@dataclass(frozen=True)
class Shape:
    """A model, and how much is done with it: tokens generated, and sequences, tokens of each and steps of training."""

    config: dict[str, Any]
    prompt: int = 128
    new_tokens: int = 128
    batch: int = 4
    length: int = 1024
    steps: int = 7
    rounds: int = 5


def llama(hidden: int, inner: int, layers: int, tied: bool, **other: int) -> dict[str, Any]:
    """The sizes that Llama 3's configs name; no end of text, so that each run generates as many tokens."""
    common = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": tied}
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return {**common, **sizes, **special, "max_position_embeddings": 8192, **other}


SHAPES = {
    "1.2B": Shape(llama(2048, 8192, 16, tied=True)),  # Llama 3.2 1B
    "8B": Shape(llama(4096, 14336, 32, tied=False)),  # Llama 3 8B
    "13B": Shape(
        llama(5120, 13824, 40, tied=False, vocab_size=32000, num_attention_heads=40, num_key_value_heads=40),
        batch=8,
        steps=4,
    ),  # Llama 2 13B
    "70B": Shape(llama(8192, 28672, 80, tied=False, num_attention_heads=64), batch=1, steps=3),  # Llama 3 70B
    "tiny": Shape(
        llama(64, 128, 2, tied=False, vocab_size=256, num_attention_heads=4, num_key_value_heads=2),
        prompt=8,
        new_tokens=4,
        batch=2,
        length=16,
        steps=1,
        rounds=1,
    ),
}


@dataclass(frozen=True)
class Job:
    """One process: a part, of whom, in which format; on what model, where."""

    part: str
    contender: str
    format: str
    shape: str
    model: str
    device: str

    def row(self, what: str = "", **measured: Any) -> dict[str, Any]:
        return {"part": self.part, "format": self.format, "what": what, "contender": self.contender, **measured}


# ---- what all need --------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: str) -> float:
    """Of one call, to its end on the device."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def peak(device: str) -> dict[str, float]:
    """Megabytes that were allocated at most since `forget_peak`; nothing is known of a CPU."""
    return {} if device == "cpu" else {"peak_MB": torch.cuda.max_memory_allocated() / 1e6}


def forget_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def quantization(job: Job) -> Any:
    """How transformers is told: the same format in both libraries' words, None for bfloat16."""
    if job.contender == "bf16":
        return None
    if job.contender == "bnbref":
        from bnbref import BnbRefConfig

        if job.format == "int8":
            return BnbRefConfig("int8", threshold=6.0)
        return BnbRefConfig("nf4", double_quant=True, compute_dtype=torch.bfloat16)
    from transformers import BitsAndBytesConfig

    if job.format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def loaded(job: Job) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        job.model,
        quantization_config=quantization(job),
        dtype=torch.bfloat16,
        device_map={"": torch.device(job.device)},
    )


def turn() -> None:
    """Waits until gpu_flows.py gives this process its turn: the others do nothing until it asks for the next, or ends."""
    if sys.argv[2:] == [TURN]:
        print(TURN, flush=True)
        sys.stdin.readline()


# ---- the parts ------------------------------------------------------------------------------------------------------


def checkpoint(job: Job) -> Iterator[dict[str, Any]]:
    """The model that the others load, written unless it is there."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = Path(job.model)
    if folder.exists():
        return
    torch.manual_seed(0)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[job.shape].config), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layernorm.weight"):
                weight[: OUTLIERS * 7 : 7] = 20.0
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    part.rename(folder)  # a folder that is half written is never taken for a whole one
    yield job.row(parameters=sum(p.numel() for p in model.parameters()))


def generate(job: Job, **options: Any) -> Iterator[dict[str, Any]]:
    """Greedy text after a prompt, batch 1. first_s: of the first call, compilation included."""
    shape, model = SHAPES[job.shape], loaded(job)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, shape.config["vocab_size"], (1, shape.prompt), generator=generator).to(job.device)
    tokens: list[int] = []

    def run() -> None:
        mask = torch.ones_like(prompt)
        ids = model.generate(
            prompt, attention_mask=mask, max_new_tokens=shape.new_tokens, do_sample=False, pad_token_id=0, **options
        )
        tokens[:] = ids[0, shape.prompt :].tolist()

    first = seconds(run, job.device)
    run()  # what the second call still compiles or records
    forget_peak(job.device)
    times = []
    for _ in range(shape.rounds):
        turn()
        times.append(seconds(run, job.device))
    if len(tokens) != shape.new_tokens:
        raise RuntimeError(f"generated {len(tokens)} tokens, not {shape.new_tokens}")
    rate = shape.new_tokens / statistics.median(times)
    yield job.row(**{"tokens/s": rate, "first_s": first}, **peak(job.device), seconds=times, tokens=tokens)


def static(job: Job) -> Iterator[dict[str, Any]]:
    """The same with a static cache, for which transformers compiles the model; in a fresh cache directory."""
    yield from generate(job, cache_implementation="static")


def first(job: Job) -> Iterator[dict[str, Any]]:
    """The first call of `generate` in this process, as it comes, and then the first one with a static cache."""
    model, prompt = loaded(job), torch.ones(1, SHAPES[job.shape].prompt, dtype=torch.int64, device=job.device)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    first_s = seconds(lambda: model.generate(prompt, **options), job.device)
    static_s = seconds(lambda: model.generate(prompt, cache_implementation="static", **options), job.device)
    yield job.row(first_s=first_s, static_s=static_s)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(job: Job) -> Any:
    """The model with LoRA on all linear layers, and gradient checkpointing."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model, checkpointing = loaded(job), {"use_reentrant": False}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    if job.contender == "bf16":  # to which peft's preparation would do nothing but make it float32
        model.gradient_checkpointing_enable(checkpointing)
    else:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
    model = get_peft_model(model, lora)
    model.config.use_cache = False
    return model.train()


def qlora(job: Job) -> Iterator[dict[str, Any]]:
    """A step of training, in a loop of one's own under autocast, and in transformers' Trainer. first_s: of the first step."""
    shape, model = SHAPES[job.shape], adapted(job)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, shape.config["vocab_size"], (shape.batch, shape.length), generator=generator)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    yield job.row("loop", **loop(model, adamw, ids, job.device, SHAPES[job.shape].steps))
    turn()
    yield job.row("Trainer", **trainer(job, model, ids))


def loop(model: Any, optimizer: Any, ids: torch.Tensor, device: str, steps: int) -> dict[str, Any]:
    """Steps, after two that are not counted."""
    batch = {"input_ids": ids.to(device), "labels": ids.to(device)}
    losses = []

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    first = seconds(step, device)
    step()
    forget_peak(device)
    times = []
    for _ in range(steps):
        turn()
        times.append(seconds(step, device))
    measured = {"ms": statistics.median(times) * 1e3, "first_s": first, **peak(device)}
    return {**measured, "seconds": times, "losses": [float(loss) for loss in losses]}


def trainer(job: Job, model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """The same by transformers' Trainer, as it comes."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    steps, times, start = SHAPES[job.shape].steps + 2, list[float](), time.perf_counter()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal start
            wait(job.device)
            times.append(time.perf_counter() - start)
            if len(times) == 2:
                forget_peak(job.device)
            turn()
            start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=len(ids),
            learning_rate=1e-4,
            bf16=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=job.device == "cpu",
        )
        data = [{"input_ids": row, "labels": row} for row in ids] * steps
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return {"ms": statistics.median(times[2:]) * 1e3, **peak(job.device)}


def load(job: Job) -> Iterator[dict[str, Any]]:
    """`from_pretrained`, the import of bnbref or bitsandbytes included: the first in this process, and a second one."""
    from transformers import LlamaForCausalLM  # noqa: F401, which all import

    torch.zeros(1, device=job.device)
    forget_peak(job.device)
    first = seconds(lambda: loaded(job), job.device)
    measured = peak(job.device)
    yield job.row(first_s=first, again_s=seconds(lambda: loaded(job), job.device), **measured)


PARTS: dict[str, Callable[[Job], Iterator[dict[str, Any]]]] = {
    "checkpoint": checkpoint,
    "generate": generate,
    "static": static,
    "first": first,
    "qlora": qlora,
    "load": load,
}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    for row in PARTS[job.part](job):
        print(ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
