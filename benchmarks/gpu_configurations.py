"""Configurations of kernels on an NVIDIA GPU, timed as calls of bnbref: how many rows and columns a program takes, and its warps.

    python benchmarks/gpu_configurations.py [--only products adam four eight] [--seconds 150]

products     one to eight rows by a 4-bit weight, NF4 with double quantization, bfloat16: microseconds, from a CUDA graph
adam         a step of AdamW8bit, 2^28 float32: share of the bandwidth of a copy, of the same second
four, eight  quantize_4bit (NF4, blocks of 64) and quantize_blockwise (blocks of 256), 2^28 bfloat16: the same share

Each configuration is a process of its own, which compiles beside the others and then waits for its turn on the GPU. Medians, by
CUDA events. first_s: of the first calls, while the others compile too. The rows are saved in results/gpu-configurations.json.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timing
import torch
from gpu_encoders import GPU, milliseconds
from torch import Tensor

import bnbref
from bnbref import few_rows, functional
from bnbref.kernels import by_address, formulations, multiplying
from bnbref.kernels.configured import configured

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
CACHE = 100e6
"""Bytes of weights that are more than the caches of an H100 hold: 50 MB."""
ELEMENTS = 2**28


@dataclass(frozen=True)
class Case:
    """A configuration: rows of the weight, or blocks, that a program takes, columns at a time, and warps. rows 0: the one in use.

    activations: rows that are multiplied by the weight.
    """

    part: str
    rows: int = 0
    warps: int = 0
    columns: int = 0
    activations: int = 0


CASES = [
    Case("products", rows, warps, columns, activations)
    for activations, rows, (columns, warps) in product((8, 4, 2, 1), (4, 2, 1), ((64, 2), (32, 1), (128, 4), (128, 2)))
]
CASES += [Case("adam", rows, warps) for rows, warps in ((0, 0), (2, 2), (4, 4), (4, 2), (2, 4))]
CASES += [Case("four", rows, warps) for rows, warps in ((0, 0), (8, 2), (16, 4), (8, 1), (16, 2), (32, 4))]
CASES += [Case("eight", rows, warps) for rows, warps in ((0, 0), (2, 2), (4, 4), (4, 2), (2, 1), (8, 4))]

KERNELS = {"adam": ("step_blocks", 256), "four": ("quantize_rows", 16), "eight": ("quantize_blocks", 64)}
"""Of each part the kernel, and how many columns Inductor sees in it: for an encoder the words of 64 bits of a block."""

# ---- what is timed --------------------------------------------------------------------------------------------------


def weight(n: int, k: int) -> tuple[Tensor, Any]:
    """Packed codes `[n, k/2]` and their state. Quantized by the definition: nothing is compiled but what is timed."""
    with bnbref.eager():
        return functional.quantize_4bit(
            torch.randn(n, k, device=GPU, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
        )


def products(case: Case, turn: Callable[[], None]) -> dict[str, Any]:
    """Microseconds of a product by each shape. A graph goes through weights that do not fit into the cache."""
    formulations.load()
    multiplying._GROUP = case.rows
    multiplying.configured = lambda **_: configured(rows=1, columns=case.columns, warps=case.warps)
    weights = {(n, k): [weight(n, k) for _ in range(2 + int(CACHE / (n * k / 2)))] for n, k in SHAPES}
    rows = {k: torch.randn(case.activations, 1, k, device=GPU, dtype=torch.bfloat16) for _, k in SHAPES}
    start = time.perf_counter()
    for (_, k), of_shape in weights.items():
        few_rows.multiply_few(rows[k], *of_shape[0], None)
    torch.cuda.synchronize()
    found: dict[str, Any] = {"first_s": time.perf_counter() - start}
    turn()
    for (n, k), of_shape in weights.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [few_rows.multiply_few(rows[k], *each, None) for each in of_shape]
        found[f"{n}x{k}"] = milliseconds(graph.replay, calls=10) / len(results) * 1e3
    return found


def streamed(case: Case, turn: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of a call, and its share of the bandwidth of a copy."""
    formulations.load()
    name, width = KERNELS[case.part]
    if case.rows:
        formulation = formulations.ATTACHED[name]
        options = {**configured(rows=case.rows, warps=case.warps, width=width), **by_address.REAL_INPUTS}
        formulation._options = formulation._options[0], options
    x = torch.randn(ELEMENTS, device=GPU, dtype=torch.float32 if case.part == "adam" else torch.bfloat16)
    blocks = ELEMENTS // (64 if case.part == "four" else 256)
    call: Callable[[], Any]
    if case.part == "adam":
        p = torch.nn.Parameter(x)
        p.grad = torch.randn_like(x)
        call = bnbref.optim.AdamW8bit([p], lr=1e-3).step
        size = (
            4 + 4 + 4 + 4 * 1
        ) * ELEMENTS + 4 * 4 * blocks  # parameter twice, gradient; codes and scales, read and written
    elif case.part == "four":
        call = partial(functional.quantize_4bit, x, quant_type="nf4")
        size = x.nbytes + ELEMENTS // 2 + 4 * blocks
    else:
        call = partial(functional.quantize_blockwise, x, blocksize=256)
        size = x.nbytes + ELEMENTS + 4 * blocks
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    source = torch.randn(ELEMENTS // 2, device=GPU)
    target = torch.empty_like(source)
    turn()
    copy = milliseconds(lambda: target.copy_(source), calls=10)
    ms = milliseconds(call, calls=10)
    return {"first_s": first, "ms": ms, "share": (size / ms) / (2 * source.nbytes / copy)}


def work(case: Case, lock: Path) -> None:
    """One process. Its row is the last line that it prints."""
    torch._inductor.config.compile_threads = 1
    with lock.open("w") as held:
        run = products if case.part == "products" else streamed
        found = run(case, lambda: fcntl.flock(held, fcntl.LOCK_EX))
    print(json.dumps({**asdict(case), **found}))


# ---- one process each -----------------------------------------------------------------------------------------------


def side_by_side(waiting: list[Case], seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of all cases as they are done; what is not done after so many seconds is a row with an error."""
    end = time.monotonic() + seconds
    running: dict[Case, subprocess.Popen[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 2):
                case = waiting.pop(0)
                env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{len(waiting)}", "OMP_NUM_THREADS": "1"}
                command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--lock", f"{folder}/lock"]
                running[case] = subprocess.Popen(
                    command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            late = time.monotonic() > end
            for case, process in list(running.items()):
                if late:
                    process.kill()
                if late or process.poll() is not None:
                    said = process.communicate()[0].strip().splitlines()
                    del running[case]
                    if process.returncode == 0:
                        yield json.loads(said[-1])
                    else:
                        yield {**asdict(case), "error": "out of time" if late else (said or ["nothing said"])[-1]}
            if late:
                yield from ({**asdict(case), "error": "not begun"} for case in waiting)
                return
            time.sleep(0.1)


def main() -> None:
    """Print the rows as they come, and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("products", *KERNELS)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--seconds", type=float, default=150, help="end after so long")
    parser.add_argument("--case", type=json.loads, help="one process: its case, as JSON")
    parser.add_argument("--lock", type=Path, help="one process: the file that is locked during its turn")
    args = parser.parse_args()
    if args.case is not None:
        return work(Case(**args.case), args.lock)
    rows = []
    for row in side_by_side([case for case in CASES if case.part in args.only], args.seconds):
        rows.append(row)
        print(
            " ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            ),
            flush=True,
        )
    print("saved", timing.save("gpu-configurations", rows))


if __name__ == "__main__":
    main()
