"""QLoRA on the demo model, by `bnbref.integrations.hf.qlora`, and what it changed.

The model writes Python documentation. The new text is Python source, of modules that every CPython ships with theirs.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import Tensor

from bnbref.demo import MODEL, Settings
from bnbref.demo.evaluate import encode, perplexity, sample, windows
from bnbref.demo.formats import Mismatch
from bnbref.demo.report import mebibytes, one_line
from bnbref.demo.resources import phase
from bnbref.info import compute_dtype
from bnbref.integrations.hf.qlora import load, qlora

MODULES = ("argparse", "dataclasses")
UNSEEN = ("textwrap", "shlex")
WINDOW = 128
BATCH = 8
RANK = 8
PROMPT = "class Parser:"


def source(modules: Sequence[str]) -> str:
    """The source of modules, one after the other."""
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)


def finetune(tokenizer: Any, heldout: Tensor, settings: Settings, device: torch.device, folder: Path) -> dict[str, Any]:
    """Train an adapter, say what it changed, save it in `folder`, and reload it to the same logits.

    Raises `Mismatch` if the loss does not fall, or if the reloaded adapter gives other logits.
    """
    print(
        f"\nQLoRA on nf4 nested: LoRA of rank {RANK} on the quantized layers; PagedAdamW8bit,\n"
        f"{settings.steps} steps, each with {BATCH} windows of {WINDOW} tokens of the source of {' and '.join(MODULES)}.\n",
        flush=True,
    )
    unseen = windows(encode(tokenizer, source(UNSEEN)), WINDOW)[: 4 * settings.windows].to(device)
    dtype = compute_dtype(device)
    base = prepare_model_for_kbit_training(load(str(MODEL), device, dtype), use_gradient_checkpointing=False)
    before, text_before = measure(base, tokenizer, unseen, heldout, settings, "before")
    with phase() as training:
        found = qlora(
            str(MODEL), source(MODULES), folder, steps=settings.steps, batch=BATCH, length=WINDOW, rank=RANK,
            targets="all-linear", device=device, dtype=dtype,
        )  # fmt: skip
    after, text_after = measure(found.model, tokenizer, unseen, heldout, settings, "after")
    count = min(10, settings.steps // 4)
    first, last = first_and_last(found.losses, count)
    again = PeftModel.from_pretrained(base, folder)
    difference = largest_difference(found.model, again, heldout[:1])

    rate = settings.steps * BATCH * WINDOW / found.seconds
    for name, value in (
        ("parameters", f"{found.parameters:,}"),
        ("loss", f"{first:.3f} in the first {count} steps, {last:.3f} in the last {count}"),
        (f"perplexity of {' and '.join(UNSEEN)}", f"{before['source']:.2f} before, {after['source']:.2f} after"),
        ("perplexity of documentation", f"{before['documentation']:.2f} before, {after['documentation']:.2f} after"),
        ("training", f"{found.seconds:.1f} s, {rate:,.0f} tokens/s, peak {mebibytes(training.peak)} MiB"),
        ("saved and reloaded", f"max|d| of the logits {difference:g}"),
        ("writes, before", one_line(text_before, 85)),
        ("writes, after", one_line(text_after, 85)),
    ):
        print(f"  {name:<33}{value}")
    return {
        "parameters": found.parameters, "losses": list(found.losses), "loss_first": first, "loss_last": last,
        "perplexity_before": before, "perplexity_after": after, "training": asdict(training), "tokens_per_second": rate,
        "reload_difference": difference, "text_before": text_before, "text_after": text_after,
    }  # fmt: skip


def measure(
    model: Any, tokenizer: Any, unseen: Tensor, heldout: Tensor, settings: Settings, when: str
) -> tuple[dict[str, float], str]:
    """Perplexities of source that was not trained on and of documentation, and a text that the model writes."""
    texts = {"source": unseen, "documentation": heldout}
    found = {name: perplexity(model, text, 4, f"QLoRA: {name} {when}") for name, text in texts.items()}
    return found, sample(model, tokenizer, PROMPT, tokens=settings.tokens).text


def first_and_last(losses: Sequence[float], count: int) -> tuple[float, float]:
    """Mean loss of the first and of the last `count` steps. Raises `Mismatch` if it did not fall.

    >>> first_and_last([4.0, 3.0, 2.0, 1.0], 2)
    (3.5, 1.5)
    """
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    if not last < first:
        raise Mismatch(
            f"fine-tuning did not lower the loss: {first:.3f} in the first {count} steps, {last:.3f} in the last"
        )
    return first, last


@torch.inference_mode()
def largest_difference(model: Any, again: Any, ids: Tensor) -> float:
    """max|d| of the logits of two models. Raises `Mismatch` unless it is 0."""
    before, after = (m.eval()(input_ids=ids).logits.float() for m in (model, again))
    difference = float((before - after).abs().max())
    if difference != 0:
        raise Mismatch(f"the reloaded adapter gives other logits than the one that was saved: max|d| {difference}")
    return difference
