"""Interleaved medians: every contender in turn, round after round, so that a slow minute of the machine hits all alike."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# A fresh output of 32 MB or more is mapped anew on every call; its page faults (7 ms) would decide every comparison.
STEADY_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}

PACKAGES = (
    "bnbref", "torch", "triton", "bitsandbytes", "transformers", "peft", "accelerate", "torchao", "schedulefree", "heavyball",
    "pytorch_optimizer", "torch-optimi",
)  # fmt: skip


def with_steady_malloc() -> None:
    """Start this program again with malloc's settings, which are read only at the start of a process."""
    if any(os.environ.get(name) != value for name, value in STEADY_MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **STEADY_MALLOC})


def medians(
    contenders: Mapping[str, Callable[[], Any]], rounds: int = 21, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Milliseconds of each contender: the median over interleaved rounds, after two calls to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            start = clock()
            run()
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """Versions and device, to stand beside every number."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    return {
        "packages": {name: installed(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def beside(ours: str, theirs: str, ms: Mapping[str, float], bar: float | None = None) -> dict[str, Any]:
    """The row of a table that compares two contenders by their times: above 1 ours is faster."""
    ratio = ms[theirs] / ms[ours]
    return {"what": f"{ours} / {theirs}", "ours": ms[ours], "theirs": ms[theirs], "ratio": ratio, "bar": bar}


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned text: what, ours, theirs, ratio, bar."""
    lines = [f"{'':58s} {'bnbref':>9s} {'bnb':>9s} {'ratio':>7s}  {'bar':>5s}"]
    for row in rows:
        bar = "" if row.get("bar") is None else f"{row['bar']:g}"
        verdict = "" if row.get("bar") is None else ("" if row["ratio"] >= row["bar"] else "  missed")
        lines.append(
            f"{row['what']:58s} {row['ours']:9.3f} {row['theirs']:9.3f} {row['ratio']:7.2f}  {bar:>5s}{verdict}"
        )
    return "\n".join(lines)


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """The rows with versions, device, day and command, in results/NAME.json."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    command = " ".join(["python", *sys.argv])
    day = time.strftime("%Y-%m-%d")
    path.write_text(json.dumps({"command": command, "day": day, "machine": machine(), "rows": rows}, indent=1) + "\n")
    return path
