"""QLoRA on one GPU and on all of a host, timed: bnbref, bitsandbytes, and LoRA in bfloat16 where it fits; and what paging takes.

    python benchmarks/gpus.py [--shape 1.2B 8B] [--only qlora exchange paging] [--contenders NAME ...] [--ranks 1 2]
                              [--optimizers NAME ...] [--seconds 420] [--each 90] [--out benchmarks/results]

qlora     a step of training under FSDP2, or alone on one GPU: LoRA on all linear layers, gradient checkpointing, autocast to
          bfloat16; tokens/s of all GPUs, peak memory of the fullest one. Each GPU takes the same number of tokens
ddp       the same with a whole model on each GPU
full      a step of training all weights in bfloat16, under FSDP2 or alone, by AdamW8bit, PagedAdamW8bit and torch's AdamW
exchange  a step of AdamW8bit of sharded rows, whose boundaries cut blocks or do not: ms, what the exchange of blocks costs
paging    a step of PagedAdamW8bit with the state of four matrices of 8192 x 8192 on the host of each GPU: ms, GB/s each way

Models are Llamas with random weights, made from a config and quantized layer by layer in memory: nothing is read or downloaded.
Of 70B the bfloat16 weights are 141 GB, and in NF4 40 with what stays in bfloat16. All weights of 13B, their gradients and states
are 78 GB with AdamW8bit, 104 with AdamW; with PagedAdamW8bit a GPU has 52.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timing
import torch
from flow_parts import ROW, SHAPES
from gpus_parts import Job

HERE = Path(__file__).parent
PARTS = ("qlora", "ddp", "full", "exchange", "paging")
CONTENDERS = ("bnbref", "bitsandbytes", "bf16")
OPTIMIZERS = ("AdamW8bit", "PagedAdamW8bit", "AdamW")


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """In the order in which they run: contenders side by side, and what matters most first."""
    for part in args.only:
        own = {"exchange": ("bnbref",), "paging": ("bnbref",), "full": args.optimizers}
        for shape in args.shape[:1] if part in ("exchange", "paging") else args.shape:
            for contender in own.get(part, args.contenders):
                for ranks in args.ranks:
                    if (part, ranks) not in (("exchange", 1), ("ddp", 1)):
                        yield Job(part, contender, shape, ranks, args.device)


def run(job: Job, left: float) -> dict[str, Any]:
    """The row that a job prints; one with an error, and the end of what it wrote, if it fails or takes too long."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(job.ranks), "--master_port", str(port)]
    command = [sys.executable, "-W", "ignore", *launcher, str(HERE / "gpus_parts.py"), json.dumps(asdict(job))]
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
        one = found.get(("full" if part == "full" else "qlora", shape, contender, 1))
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
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, metavar="NAME", help="of full"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, max(2, torch.cuda.device_count())])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so long")
    parser.add_argument("--each", type=float, default=math.inf, help="of one row at most")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON file")
    args = parser.parse_args(argv)
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
