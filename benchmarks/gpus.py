"""QLoRA on one GPU and on all of a host, timed: bnbref, bitsandbytes, and LoRA in bfloat16 where it fits; and what paging takes.

    python benchmarks/gpus.py [--shape 1.2B 8B] [--only qlora exchange paging] [--contenders NAME ...] [--ranks 1 2]
                              [--seconds 420] [--each 90] [--out benchmarks/results]

qlora     a step of training under FSDP2, or alone on one GPU: LoRA on all linear layers, gradient checkpointing, autocast to
          bfloat16; tokens/s of all GPUs, peak memory of the fullest one. Each GPU takes the same number of tokens
ddp       the same with a whole model on each GPU
exchange  a step of AdamW8bit of sharded rows, whose boundaries cut blocks or do not: ms, what the exchange of blocks costs
paging    a step of PagedAdamW8bit with the state of four matrices of 8192 x 8192 on the host of each GPU: ms, GB/s each way

Models are Llamas with random weights, made from a config and quantized layer by layer in memory: nothing is read or downloaded.
Each row is a run of its own of torchrun, ended after --each seconds; one that fails is a row with its error. Medians. Rows are
saved as they come, beside those of other runs in the same file. `--device cpu` runs on gloo.
"""

import argparse
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timing
import torch
from flow_parts import PROJECTIONS, ROW, SHAPES, forget_peak, loop, peak, seconds

HERE = Path(__file__).parent
PARTS = ("qlora", "ddp", "exchange", "paging")
CONTENDERS = ("bnbref", "bitsandbytes", "bf16")


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


# ---- the ranks ------------------------------------------------------------------------------------------------------


def here(job: Job) -> torch.device:
    return torch.device(job.device) if job.device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def linear4bit(job: Job) -> Any:
    """The contender's layer: NF4, double quantization, packed in bfloat16, as FSDP shards it."""
    if job.contender == "bnbref":
        from bnbref import nn as library
    else:
        from bitsandbytes import nn as library  # type: ignore[no-redef, import-not-found, unused-ignore]
    return library.Linear4bit


def model_of(job: Job) -> Any:
    """A Llama with random weights, its linear layers quantized one after the other, with LoRA and gradient checkpointing."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config, device = LlamaConfig(**SHAPES[job.shape].config), here(job)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
            weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(
                0, config.initializer_range
            )
            if job.contender == "bf16":
                layer: Any = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            else:
                layer = linear4bit(job)(
                    *weight.shape[::-1], bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
                    quant_type="nf4", quant_storage=torch.bfloat16, device="meta",
                )  # fmt: skip
                kept = {
                    "compress_statistics": True,
                    "quant_type": "nf4",
                    "quant_storage": torch.bfloat16,
                    "module": layer,
                }
                layer.weight = type(layer.weight)(
                    weight.cpu() if job.device == "cpu" else weight, requires_grad=False, **kept
                )
                layer = layer.to(device)
            model.set_submodule(name, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(
                0, config.initializer_range
            )
            value = torch.ones_like(value) if "norm" in name else value
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device=device)
    if job.contender != "bf16":
        model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    if job.contender == "bnbref":
        from bnbref import register_lora

        lora = register_lora(lora)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


def qlora(job: Job) -> dict[str, Any]:
    """Steps with torch's AdamW, after two that are not counted."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    shape, device = SHAPES[job.shape], here(job)
    start = time.monotonic()
    model: Any = model_of(job)
    made = time.monotonic() - start
    run = model
    if job.part == "ddp" and job.ranks > 1:
        run = DistributedDataParallel(model)
    elif job.ranks > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    ids = torch.randint(1, shape.config["vocab_size"], (shape.batch, shape.length), generator=generator).to(device)
    found = loop(run, ids, job.device, shape.steps)
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


RUN: dict[str, Callable[[Job], dict[str, Any]]] = {"qlora": qlora, "ddp": qlora, "exchange": exchange, "paging": paging}


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


# ---- the runs -------------------------------------------------------------------------------------------------------


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """In the order in which they run: contenders side by side, and what matters most first."""
    for part in args.only:
        own = part in ("exchange", "paging")
        for shape in args.shape[:1] if own else args.shape:
            for contender in ("bnbref",) if own else args.contenders:
                for ranks in args.ranks:
                    if (part, ranks) not in (("exchange", 1), ("ddp", 1)):
                        yield Job(part, contender, shape, ranks, args.device)


def run(job: Job, left: float) -> dict[str, Any]:
    """The row that a job prints; one with an error, and the end of what it wrote, if it fails or takes too long."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(job.ranks), "--master_port", str(port)]
    command = [sys.executable, "-W", "ignore", *launcher, str(HERE / "gpus.py"), "--job", json.dumps(asdict(job))]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            code: int | None = child.wait(timeout=left)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:  # with its ranks, and the workers that compile for them
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        wall = {"wall_s": round(time.monotonic() - start, 1)}
        out.seek(0), err.seek(0)
        rows = [line.removeprefix(ROW) for line in out.read().splitlines() if line.startswith(ROW)]
        if rows:
            return {**json.loads(rows[-1]), **wall}
        said = err.read()
        reasons = [line for line in said.splitlines() if re.search(r"\b\w*Error\b", line)]
        reason = f"cut short after {left:.0f} s" if code is None else (reasons or [f"exit code {code}"])[0]
        return job.row(**wall, error=reason[:300], stderr=said[-3000:])


def line(row: dict[str, Any]) -> str:
    """A row as it comes."""
    names = f"{row['part']:9s} {row['shape']:5s} {row['contender']:13s} {row['ranks']} "
    shown = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k not in ("wall_s",)]
    return names + (f"failed: {row['error']}" if "error" in row else "  ".join(shown)) + f"  ({row['wall_s']:.0f} s)"


def table(rows: list[dict[str, Any]]) -> str:
    """Tokens/s of one and of several GPUs, and what they are times one; beside bitsandbytes."""
    lines = [
        "| | GPUs | tokens/s | times one GPU | times bitsandbytes | peak GB of a GPU |",
        "|---|---|---|---|---|---|",
    ]
    found = {(r["part"], r["shape"], r["contender"], r["ranks"]): r for r in rows if "tokens/s" in r}
    for (part, shape, contender, ranks), row in found.items():
        one = found.get(("qlora", shape, contender, 1))
        other = found.get((part, shape, "bitsandbytes", ranks))
        ratios = [f"{row['tokens/s'] / x['tokens/s']:.2f}" if x else "" for x in (one, other)]
        memory = f"{row['peak_MB'] / 1e3:.1f}" if "peak_MB" in row else ""
        lines.append(
            f"| {shape} {part} {contender} | {ranks} | {row['tokens/s']:.0f} | {ratios[0]} | {ratios[1]} | {memory} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the rows as they come, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    packages = timing.machine()["packages"]
    present = [name for name in CONTENDERS if name != "bitsandbytes" or packages["bitsandbytes"]]
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=["8B"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=present, metavar="NAME")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, max(2, torch.cuda.device_count())])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so long")
    parser.add_argument("--each", type=float, default=math.inf, help="of one row at most")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job is not None:
        as_rank(Job(**json.loads(args.job)))
        return
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name(0)
    path = args.out / f"gpus-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/gpus.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": {**timing.machine(), "gpu": device, "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda},
        "rows": [],
    }
    start = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    for job in jobs(args):
        left = min(args.each, args.seconds - (time.monotonic() - start))
        if left <= 0:
            result["cut_short"] = True
            break
        row = run(job, left) if left < math.inf else run(job, 3600)
        result["rows"].append(row)
        print(line(row), flush=True)
        path.write_text(json.dumps({"runs": [*earlier, result]}, indent=1) + "\n", encoding="utf-8")
    print(f"saved {path}\n\n{table(result['rows'])}")


if __name__ == "__main__":
    main()
