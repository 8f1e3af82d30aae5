"""The tour: one model in five formats, measured side by side, then QLoRA on the smallest (compare.py, finetune.py)."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import bnbref
from bnbref.arguments import dtype_name
from bnbref.demo import FULL, MODEL, QUICK
from bnbref.demo.compare import compare
from bnbref.demo.evaluate import encode, windows
from bnbref.demo.finetune import finetune
from bnbref.demo.report import write_plot
from bnbref.demo.resources import cpu_seconds
from bnbref.info import compute_dtype, default_device, describe_device, why_eager


def run(
    *, quick: bool = False, device: str | None = None, out: Path | None = None, json_file: Path | None = None,
    plot_file: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures and prints everything, and returns what was measured. Raises `Mismatch` where something is not what it must be."""
    start, cpu = time.perf_counter(), cpu_seconds()
    transformers.utils.logging.disable_progress_bar()
    # Of an option that peft and Trainer set themselves.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    settings = QUICK if quick else FULL
    where = torch.device(device) if device else default_device()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    heldout = windows(encode(tokenizer, (MODEL / "heldout.txt").read_text("utf-8")))[: settings.windows].to(where)

    facts: dict[str, Any] = {"machine": machine(where), "settings": settings._asdict()}
    print(headline(facts["machine"]), flush=True)
    facts["formats"] = compare(tokenizer, heldout, settings, where)
    with tempfile.TemporaryDirectory() if out is None else contextlib.nullcontext(out) as folder:
        facts["qlora"] = finetune(tokenizer, heldout, settings, where, Path(folder))
    facts["seconds"], facts["cpu_seconds"] = time.perf_counter() - start, cpu_seconds() - cpu
    kept = f"; the adapter is in {out}" if out else ""
    print(f"\n{facts['seconds']:.0f} s, {facts['cpu_seconds']:.0f} s of processor time, compilers included{kept}")
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if plot_file is not None:
        write_plot(plot_file, facts["qlora"]["losses"], "QLoRA on the demo model: NF4, nested scales")
    return facts


def machine(device: torch.device) -> dict[str, str]:
    """The machine and the versions with which the numbers were measured."""
    why = why_eager(device.type)
    return {
        "bnbref": bnbref.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": describe_device(device),
        "dtype": dtype_name(compute_dtype(device)),
        "kernels": "compiled" if why is None else f"eager: {why}",
    }


def headline(facts: dict[str, str]) -> str:
    """The machine in two lines."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("bnbref", "torch", "transformers"))
    return f"{versions}\n{facts['device']}; computed in {facts['dtype']}, kernels {facts['kernels']}"
