"""What a user does with a model on a GPU, timed: bnbref, bitsandbytes and bfloat16 through transformers and peft as they are.

    python benchmarks/gpu_flows.py [--shape 1.2B] [--only generate static] [--seconds 600] [--out benchmarks/results]
    python benchmarks/gpu_flows.py --again one.json two.json [--plot docs/content/flows.svg] [--out benchmarks/results]

generate  greedy text as it comes, batch 1: tokens/s, prompt included
static    the same with a static cache, for which transformers compiles the model, but not bitsandbytes': tokens/s, and seconds
          of the first call, with empty caches
first     the first call of `generate` in a process, 8 tokens: seconds, as it comes and then with a static cache, with cold and
          warm caches
qlora     a training step, LoRA on all linear layers, gradient checkpointing: ms and peak memory, in a loop and in Trainer
load      `from_pretrained`: seconds with cold and with warm caches and a second time in the process, peak memory
layers    a layer from Python, and its kernels alone, from a CUDA graph: microseconds

A Llama of random weights is written once to --models, nothing is downloaded. Each contender runs in a process of its own. They
take turns: a round of one, a round of the next, while the others wait. One that fails is a row with its error. Medians. Rows are
saved as they come, beside those of other parts and shapes in the same file; --again joins files, and prints and plots them
without measuring.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flow_table
import timing
import torch
from flow_parts import ROW, SHAPES, TURN, Job

HERE = Path(__file__).parent
PARTS = ("generate", "static", "first", "qlora", "load", "layers")
CONTENDERS = ("bnbref", "bitsandbytes", "bf16")


@dataclass(frozen=True)
class Process:
    """A program with its argument; what its rows are called; whether its caches are empty, and what they are."""

    program: str
    argument: dict[str, Any]
    what: str = ""
    caches: Path | None = None
    cold: bool = True


def processes(args: argparse.Namespace, scratch: Path) -> Iterator[list[Process]]:
    """In the order in which they run; a list of those that take turns, so that a slow minute of the machine hits all alike."""
    for part in args.only:
        if part == "layers":
            yield [Process("flow_layers.py", {"contenders": args.contenders, "device": args.device, **args.layers})]
            continue
        together: list[Process] = []
        for format_ in ("nf4", "int8") if part in ("generate", "static") else ("nf4",):
            for contender in args.contenders:
                if contender == "bf16" and format_ == "int8":
                    continue
                job = Job(part, contender, "" if contender == "bf16" else format_, args.shape, args.model, args.device)
                caches = scratch / f"{part}-{contender}-{format_}"
                if part in ("first", "load"):
                    yield [Process("flow_parts.py", asdict(job), "cold caches", caches)]
                    yield [Process("flow_parts.py", asdict(job), "warm caches", caches, cold=False)]
                else:
                    together.append(Process("flow_parts.py", asdict(job), "", caches if part == "static" else None))
        if together:
            yield together


def environment(process: Process) -> dict[str, str]:
    """With empty directories for what is compiled, where the time of compiling is a result."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if process.caches is None:
        return {**os.environ, **offline}
    if process.cold:
        shutil.rmtree(process.caches, ignore_errors=True)
    inductor, triton = process.caches / "inductor", process.caches / "triton"
    return {**os.environ, **offline, "TORCHINDUCTOR_CACHE_DIR": str(inductor), "TRITON_CACHE_DIR": str(triton)}


class Child:
    """A running process. It ends when the block does, with the workers that compile for it."""

    def __init__(self, process: Process) -> None:
        self.process, self.start, self.ended = process, time.monotonic(), False
        self.folder = tempfile.TemporaryDirectory()
        paths = [Path(self.folder.name) / name for name in ("out", "err")]
        command = [sys.executable, str(HERE / process.program), json.dumps(process.argument), TURN]
        with paths[0].open("w") as out, paths[1].open("w") as err:
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment(process), start_new_session=True,
                text=True,
            )  # fmt: skip
        self.lines, self.err = paths[0].open(), paths[1]

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
        if self.child.stdin is not None:
            self.child.stdin.close()
        self.lines.close()
        self.folder.cleanup()

    def go(self) -> None:
        """Gives it the turn that it asked for."""
        if self.child.stdin is not None and self.child.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                self.child.stdin.write("go\n")
                self.child.stdin.flush()

    def rows(self, left: float) -> Iterator[dict[str, Any]]:
        """Its rows as it prints them, until it asks for a turn or ends; one with an error, and the end of what it wrote, if it
        fails or takes too long."""
        code, line, start = None, "", time.monotonic()
        while code is None and time.monotonic() - start < left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.child.wait(timeout=0.01)
            while (line := line + self.lines.readline()).endswith("\n"):
                if line.startswith(ROW):
                    row = json.loads(line.removeprefix(ROW))
                    yield {**row, "what": row["what"] or self.process.what, "wall_s": time.monotonic() - self.start}
                elif line.strip() == TURN:
                    return
                line = ""
        self.ended = True
        if code != 0:
            said = self.err.read_text(errors="replace").strip()
            reason = (
                f"cut short after {left:.0f} s" if code is None else (said.splitlines() or [f"exit code {code}"])[-1]
            )
            named = {"part": "layers", "contender": "", "format": "", **self.process.argument}
            names = {key: named[key] for key in ("part", "contender", "format")}
            yield {**names, "what": self.process.what, "error": reason, "stderr": said[-2000:]}


def run(processes: Sequence[Process], left: float = math.inf) -> Iterator[dict[str, Any]]:
    """The rows of processes that take turns. One begins when the one before it asks for its first turn: no two ever compute."""
    end = time.monotonic() + left
    with contextlib.ExitStack() as stack:
        children = []
        for process in processes:
            children.append(stack.enter_context(Child(process)))
            yield from children[-1].rows(end - time.monotonic())
        while waiting := [child for child in children if not child.ended]:
            for child in waiting:
                child.go()
                yield from child.rows(end - time.monotonic())


def line(row: dict[str, Any]) -> str:
    """A row as it comes."""
    names = f"{row['part']:9s} {row['format']:17s} {row['what']:23s} {row['contender']:13s}"
    numbers = [f"{key} {row[key]:.4g}" for key in flow_table.MEASURES[row["part"]] if key in row]
    return names + (f" failed: {row['error']}" if "error" in row else "  ".join(numbers))


def joined(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each part and shape the last run: what is compared was measured in one."""
    last = {(run["shape"], row["part"]): run for run in runs for row in run["rows"]}
    kept = [{**run, "rows": [r for r in run["rows"] if last[run["shape"], r["part"]] is run]} for run in runs]
    return [run for run in kept if run["rows"]]


def read(path: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return runs


def save(runs: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": joined(runs)}, indent=1) + "\n", encoding="utf-8")


def named(folder: Path, device: str) -> Path:
    return folder / f"gpu-flows-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def measure(args: argparse.Namespace, result: dict[str, Any], save: Callable[[], Any]) -> None:
    """All rows into `result`, saved after each."""
    start = time.monotonic()
    Path(args.model).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if set(args.only) - {"layers"}:
            written = Job("checkpoint", "bf16", "", args.shape, args.model, args.device)
            for row in run([Process("flow_parts.py", asdict(written))], args.seconds):
                if "error" in row:
                    raise SystemExit(f"no model was written: {row['error']}\n{row['stderr']}")
                print(f"{row['parameters'] / 1e9:.2f} B parameters written in {row['wall_s']:.0f} s", flush=True)
        if "load" in args.only:  # from memory for all, not from the disk for the first
            for file in Path(args.model).glob("*.safetensors"):
                with file.open("rb") as content:
                    while content.read(2**26):
                        pass
        for together in processes(args, Path(scratch)):
            left = args.seconds - (time.monotonic() - start)
            if left <= 0:
                result["cut_short"] = True
                break
            for row in run(together, left):
                result["rows"].append(row)
                print(line(row), flush=True)
                save()
            for process in together:
                if process.caches and not process.cold:
                    shutil.rmtree(process.caches, ignore_errors=True)
    result["seconds"] = round(time.monotonic() - start)
    save()


def main(argv: list[str] | None = None) -> None:
    """Print the rows as they come, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    packages = timing.machine()["packages"]
    present = [name for name in CONTENDERS if name != "bitsandbytes" or packages["bitsandbytes"]]
    models = Path(tempfile.gettempdir()) / "bnbref-flows"
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1.2B")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=present, metavar="NAME")
    parser.add_argument("--device", default="cuda:0", help="with its index, or cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so long")
    parser.add_argument("--models", type=Path, default=models, help="folder of the models, kept")
    parser.add_argument("--out", type=Path, help="folder of the JSON file: benchmarks/results, or none with --again")
    parser.add_argument("--again", nargs="+", type=Path, metavar="FILE", help="print and plot these, measure nothing")
    parser.add_argument("--plot", type=Path, help="file of the plot: needs matplotlib")
    args = parser.parse_args(argv)
    args.model = str(args.models / args.shape)
    tiny = {"sizes": [(128, 64)], "counts": [1, 3], "cache": 0, "rounds": 1}
    args.layers = tiny if args.shape == "tiny" else {}
    if args.again is not None:
        runs = joined([run for file in args.again for run in read(file)])
        if args.out is not None:
            save(runs, named(args.out, runs[-1]["machine"]["gpu"]))
    else:
        device = args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        result: dict[str, Any] = {
            "command": " ".join(["python", "benchmarks/gpu_flows.py", *(sys.argv[1:] if argv is None else argv)]),
            "machine": {**timing.machine(), "gpu": device, "cuda": torch.version.cuda},
            "shape": args.shape,
            "rows": [],
        }
        path = named(args.out or HERE / "results", device)
        earlier = read(path) if path.exists() else []
        measure(args, result, lambda: save([*earlier, result], path))
        print("saved", path)
        runs = [result]
    for found in runs:
        print(f"\n{found['shape']}, {found['machine']['gpu']}\n\n{flow_table.table(found)}")
    if args.plot is not None:
        flow_table.plot(runs, args.plot)


if __name__ == "__main__":
    main()
