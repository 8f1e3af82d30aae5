"""Training as one rank of several, or as one process: what `test_distributed.py` runs under its launchers.

    ranks.py HOW STORAGE FOLDER

ddp, fsdp2      steps of QLoRA; accelerator: the same, which accelerate prepares
mixed           fsdp2 in bfloat16, with gradient checkpointing
full, paged     fine-tuning of all weights with AdamW8bit or PagedAdamW8bit and FSDP2, from what is saved in FOLDER, if it is
trainer, sft    QLoRA by transformers' Trainer or TRL's SFTTrainer: FSDP2 where accelerate has it, on GPUs, and else DDP
tp              what a tp_plan says of a quantized model

Rank 0 prints a line of JSON: losses, the last of them after training. FOLDER gets `state.pt`, the whole state dict, and
`sharded`, the same written by all ranks with torch.distributed.checkpoint. Backend and devices are those of `backend.py`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import backend
import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bnbref.demo
from bnbref import BnbRefConfig, optim, register_lora
from bnbref.optim import paging

BASE = Path(__file__).resolve().parent / "fixtures" / "checkpoints" / "base"
STEPS = 3


def adapted(storage: str) -> Any:
    """The base model in NF4 with an adapter."""
    torch.manual_seed(0)
    config = BnbRefConfig("nf4", quant_storage=getattr(torch, storage))
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, quantization_config=config)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, register_lora(settings))


def batch(step: int) -> torch.Tensor:
    return torch.arange(10 + step, 10 + step + 64).view(4, 16)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    ids = ids.to(backend.TYPE)
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def part(step: int, rank: int, world: int) -> torch.Tensor:
    """The rows of a batch that a rank takes: the same number on each."""
    return batch(step)[torch.arange(rank * 4 // world, max(rank * 4 // world + 1, (rank + 1) * 4 // world)) % 4]


def mean(loss: torch.Tensor, world: int) -> float:
    """Over ranks."""
    loss = loss.detach().clone()
    if world > 1:
        dist.all_reduce(loss)
    return loss.item() / world


def sharded(layers: Any, model: Any, **options: Any) -> None:
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


# ---- QLoRA ----------------------------------------------------------------------------------------------------------


def train(how: str, storage: str, folder: Path, rank: int = 0, world: int = 1) -> list[float]:
    """The losses of the steps, each the mean over ranks, and that of the next batch without a step."""
    model = adapted(storage)
    run, backward = model, torch.autograd.backward
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    if how == "ddp":
        run = DistributedDataParallel(model)
    elif how == "accelerator":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=not backend.NCCL)
        run, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    elif how in ("fsdp2", "mixed"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if how == "mixed":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        sharded(model.base_model.model.model.layers, model, **({"mp_policy": policy} if how == "mixed" else {}))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(STEPS + 1):
        loss = loss_of(run, part(step, rank, world))
        if step < STEPS:
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(mean(loss, world))
    state = get_model_state_dict(model)
    dcp.save(state, checkpoint_id=folder / "sharded", no_dist=world == 1)
    whole = {name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu() for name, t in state.items()}
    if rank == 0:
        torch.save(whole, folder / "state.pt")
    return losses


# ---- all weights ----------------------------------------------------------------------------------------------------


@mock.patch.object(paging, "PAGED_FROM", 1000)
def fine_tune(how: str, folder: Path, rank: int, world: int) -> list[float]:
    """Losses of two steps: the first two or, if these are saved in the folder, the next two."""
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).to(backend.device(rank))
    if world > 1:
        sharded(model.model.layers, model)
    kind = {"full": optim.AdamW8bit, "paged": optim.PagedAdamW8bit}[how]
    optimizer = kind(model.parameters(), lr=1e-3, min_8bit_size=1)
    state, first = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, 0
    if (folder / "sharded").exists():
        dcp.load(state, checkpoint_id=folder / "sharded", no_dist=world == 1)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        first = 2
    else:  # torch made the first step by itself, with gradients of zeros, for the state to be there
        optimizer = kind(model.parameters(), lr=1e-3, min_8bit_size=1)
    losses = []
    for step in range(first, first + 2):
        loss = loss_of(model, part(step, rank, world))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss, world))
    if first == 0:
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder / "sharded", no_dist=world == 1)
    return losses


# ---- trainers -------------------------------------------------------------------------------------------------------


def arguments(folder: Path, world: int) -> dict[str, Any]:
    """Of TrainingArguments: FSDP2 on GPUs, which accelerate does not have on a CPU. Steps have as many rows on any ranks."""
    # A full state dict without the frozen weights still has their scales, for which torch then finds no place.
    shards = {
        "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    }  # fmt: skip
    return {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2 * backend.RANKS // world,
        "learning_rate": 1e-2, "report_to": [], "use_cpu": not backend.NCCL, "save_steps": 2, "logging_steps": 1,
        "disable_tqdm": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": backend.NCCL, **({"fsdp": True, "fsdp_config": shards} if backend.NCCL else {}),
    }  # fmt: skip


def losses_of(trainer: Any, resume: Any = None) -> list[float]:
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


OPTIMIZER = (optim.PagedAdamW8bit, {"lr": 1e-2, "min_8bit_size": 1})


def by_trainer(storage: str, folder: Path, world: int) -> list[float]:
    """The losses of four steps or, if there are checkpoints in the folder, of the last two, from that in their middle."""
    rows = [{"input_ids": row, "labels": row} for step in range(8) for row in batch(step)]
    given = transformers.TrainingArguments(**arguments(folder, world))
    trainer = transformers.Trainer(adapted(storage), given, train_dataset=rows, optimizer_cls_and_kwargs=OPTIMIZER)
    middle = folder / "checkpoint-2"
    return losses_of(trainer, str(middle) if middle.exists() else None)


def by_sft(storage: str, folder: Path, world: int) -> list[float]:
    """The losses of four steps of TRL's trainer."""
    import datasets
    import trl

    rows = datasets.Dataset.from_dict({"input_ids": [row.tolist() for step in range(8) for row in batch(step)]})
    given = trl.SFTConfig(**arguments(folder, world), max_length=16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bnbref.demo.MODEL)
    return losses_of(
        trl.SFTTrainer(
            adapted(storage), given, train_dataset=rows, processing_class=tokenizer, optimizer_cls_and_kwargs=OPTIMIZER
        )
    )


def by_tp_plan() -> list[str]:
    """What is said of tensor parallelism: of float weights, and of two files that are quantized already."""
    said = []
    for name, quant_type in (("base", "nf4"), ("nf4_nested", "nf4"), ("int8", "int8")):
        config = BnbRefConfig(quant_type)
        try:
            transformers.AutoModelForCausalLM.from_pretrained(
                BASE.parent / name, tp_plan="auto", quantization_config=config
            )
        except NotImplementedError as error:
            said.append(str(error))
    return said


def main(how: str, storage: str, folder: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend.prepare(rank)
    dist.init_process_group(backend.PROCESS_GROUP)
    with bnbref.eager():
        if how in ("full", "paged"):
            found: Any = fine_tune(how, Path(folder), rank, world)
        elif how in ("trainer", "sft"):
            found = {"trainer": by_trainer, "sft": by_sft}[how](storage, Path(folder), world)
        else:
            found = by_tp_plan() if how == "tp" else train(how, storage, Path(folder), rank, world)
    if rank == 0:
        print("FOUND", json.dumps(found), flush=True)
    dist.barrier()
    backend.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
