"""What gpus.py times, on one rank of several: `torchrun gpus_parts.py '{"part": ...}'`. The first rank prints a row."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from flow_parts import PROJECTIONS, ROW, SHAPES, forget_peak, loop, peak, seconds


@dataclass(frozen=True)
class Job:
    """A row: a part, of whom, on what model, on how many ranks."""

    part: str
    contender: str
    shape: str
    ranks: int
    device: str

    def row(self, **measured: Any) -> dict[str, Any]:
        return {**asdict(self), **measured}


def here(job: Job) -> torch.device:
    return torch.device(job.device) if job.device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def linear4bit(job: Job) -> Any:
    """The contender's layer: NF4, double quantization, packed in bfloat16, as FSDP shards it."""
    if job.contender == "bnbref":
        from bnbref import nn as library
    else:
        from bitsandbytes import nn as library  # type: ignore[no-redef, import-not-found, unused-ignore]
    return library.Linear4bit


def base_of(job: Job) -> Any:
    """A Llama with random weights, its linear layers quantized one after the other, or in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config, device = LlamaConfig(**SHAPES[job.shape].config), here(job)

    def random(shape: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, config.initializer_range)

    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        quantized = job.part != "full" and job.contender != "bf16"
        if quantized and isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
            weight = random(module.weight.shape)
            options = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.bfloat16}
            layer = linear4bit(job)(
                *weight.shape[::-1], bias=False, compute_dtype=torch.bfloat16, device="meta", **options
            )
            weight = weight.cpu() if job.device == "cpu" else weight
            layer.weight = type(layer.weight)(weight, requires_grad=False, module=layer, **options)
            model.set_submodule(name, layer.to(device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = random(parameter.shape)
            value = torch.ones_like(value) if "norm" in name else value
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=job.part == "full"))
    model.tie_weights()
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    if quantized:
        model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    model.config.use_cache = False
    return model


def adapted(job: Job, model: Any) -> Any:
    """The model with LoRA."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    if job.contender == "bnbref":
        from bnbref import register_lora

        lora = register_lora(lora)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    return model


def optimizer_of(job: Job, model: Any) -> Any:
    """torch's AdamW; of full training the one that the contender names."""
    from bnbref import optim

    library = optim if job.part == "full" and job.contender != "AdamW" else torch.optim
    name = job.contender if job.part == "full" else "AdamW"
    return getattr(library, name)([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def training(job: Job) -> dict[str, Any]:
    """Steps, after two that are not counted."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    shape, device = SHAPES[job.shape], here(job)
    start = time.monotonic()
    base: Any = base_of(job)
    run = model = base if job.part == "full" else adapted(job, base)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    made = time.monotonic() - start
    if job.part == "ddp" and job.ranks > 1:
        run = DistributedDataParallel(model)
    elif job.ranks > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in base.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    ids = torch.randint(1, shape.config["vocab_size"], (shape.batch, shape.length), generator=generator).to(device)
    found = loop(run, optimizer_of(job, model), ids, job.device, shape.steps)
    tokens = shape.batch * shape.length * job.ranks
    return {"tokens/s": tokens / (found["ms"] / 1e3), "made_s": made, **found}


def exchange(job: Job) -> dict[str, Any]:
    """The same number of elements, in rows of whole blocks and in rows whose shards end inside one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from bnbref.optim import AdamW8bit

    device, large = here(job), job.shape != "tiny"
    mesh, found = init_device_mesh(device.type, (job.ranks,)), {}
    rows, columns = (4096, 4096) if large else (64, 64)
    # An odd number of rows and columns: no boundary between shards is one between blocks.
    for what, size in (("whole blocks", (rows, columns)), ("cut blocks", (rows + job.ranks, columns - 1))):
        params = [
            torch.nn.Parameter(distribute_tensor(torch.randn(size, device=device), mesh, [Shard(0)])) for _ in range(16)
        ]
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer = AdamW8bit(params, lr=1e-4)
        for _ in range(3):
            optimizer.step()
        found[f"{what}_ms"] = statistics.median(seconds(optimizer.step, job.device) for _ in range(10)) * 1e3
    return found


def paging(job: Job) -> dict[str, Any]:
    """Alone on each GPU at the same time: the links are shared or not."""
    import torch.distributed as dist

    from bnbref.optim import PagedAdamW8bit

    device, side = here(job), 8192 if job.shape != "tiny" else 512
    params = [torch.nn.Parameter(torch.randn(side, side, device=device, dtype=torch.bfloat16)) for _ in range(4)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = PagedAdamW8bit(params, lr=1e-4)
    for _ in range(2):
        optimizer.step()
    dist.barrier()
    forget_peak(job.device)
    middle = statistics.median(seconds(optimizer.step, job.device) for _ in range(10))
    bytes_ = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    return {"ms": middle * 1e3, "GB/s": bytes_ / middle / 1e9, **peak(job.device)}


RUN: dict[str, Callable[[Job], dict[str, Any]]] = {
    "qlora": training,
    "ddp": training,
    "full": training,
    "exchange": exchange,
    "paging": paging,
}


def as_rank(job: Job) -> None:
    """One of the ranks. Of what they find the first says what it has, of times and memory the largest of all."""
    import torch.distributed as dist

    device = here(job)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    found: Any = RUN[job.part](job)
    every: list[Any] = [None] * job.ranks
    dist.all_gather_object(every, found)
    for key in found.keys() & {"ms", "peak_MB", "first_s"}:
        found[key] = max(one[key] for one in every)
    if "tokens/s" in found:
        found["tokens/s"] = min(one["tokens/s"] for one in every)
    if dist.get_rank() == 0:
        print(ROW + json.dumps(job.row(**found)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    as_rank(Job(**json.loads(sys.argv[1])))
