"""Steps of QLoRA in one process or as one rank of several (gloo, CPU): what `test_distributed.py` runs under its launchers.

    ranks.py HOW STORAGE FOLDER            HOW: ddp, fsdp2, or accelerator (accelerate prepares DDP)

Rank 0 prints the losses as JSON, the last of them after training; FOLDER gets `state.pt`, the whole state dict, and `sharded`,
the same written by all ranks with torch.distributed.checkpoint.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bnbref
from bnbref import BnbRefConfig, register_lora

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
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def train(how: str, storage: str, folder: Path, rank: int = 0, world: int = 1) -> list[float]:
    """The losses of the steps, each the mean over ranks, and that of the next batch without a step."""
    model = adapted(storage)
    run, backward = model, torch.autograd.backward
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    if how == "ddp":
        run = DistributedDataParallel(model)
    elif how == "accelerator":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        run, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    elif how == "fsdp2":
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(STEPS + 1):
        loss = loss_of(run, batch(step)[rank * 4 // world : (rank + 1) * 4 // world])
        if step < STEPS:
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        loss = loss.detach().clone()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
    # torch's get_model_state_dict looks for `absmax` on the DTensor that took the weight's place, and fails.
    state = model.state_dict()
    dcp.save(state, checkpoint_id=folder / "sharded", no_dist=world == 1)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    if rank == 0:
        torch.save(whole, folder / "state.pt")
    return losses


def main(how: str, storage: str, folder: str) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    with bnbref.eager():
        losses = train(how, storage, Path(folder), rank, world)
    if rank == 0:
        print(json.dumps(losses), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
