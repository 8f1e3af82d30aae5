"""QLoRA on the demo model: a frozen 4-bit model and a small adapter, trained to write another kind of text.

The model writes Python documentation. The new text is Python source, of modules that every CPython ships with theirs.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2305.14314), section 3.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm

from bnbref.demo.compare import load
from bnbref.demo.evaluate import encode, next_token_loss, perplexity, sample, windows
from bnbref.demo.formats import NF4_NESTED, Mismatch
from bnbref.demo.report import doing, mebibytes, one_line
from bnbref.demo.resources import phase
from bnbref.demo.settings import Settings
from bnbref.integrations.peft import register_lora

MODULES = ("argparse", "ast", "configparser", "dataclasses", "difflib", "enum", "inspect", "tarfile")
UNSEEN = ("textwrap", "shlex")
WINDOW = 128
RANK = 8
PROMPT = "class Parser:"


def qlora(tokenizer: Any, heldout: Tensor, settings: Settings, device: torch.device, folder: Path) -> dict[str, Any]:
    """Train an adapter, say what it changed, save it in `folder`, and reload it to the same logits."""
    with doing("QLoRA: loading"):
        model = add_adapter(load(NF4_NESTED, device))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"\nQLoRA on {NF4_NESTED.name}: LoRA of rank {RANK} on the quantized layers, {parameters:,} parameters; AdamW,\n"
        f"{settings.steps} steps, each with {WINDOW} tokens of the Python source of each of {len(MODULES)} modules.\n",
        flush=True,
    )
    unseen = torch.cat([source(tokenizer, name, WINDOW) for name in UNSEEN])[: 4 * settings.windows].to(device)
    texts = {"source": unseen, "documentation": heldout}
    before = {name: perplexity(model, text, 4, f"QLoRA: {name} before") for name, text in texts.items()}
    text_before = sample(model, tokenizer, PROMPT, tokens=settings.tokens).text
    data = [source(tokenizer, name, WINDOW) for name in MODULES]
    with phase("training") as training:
        losses = train(model, batches(data, settings.steps), settings.steps)
    after = {name: perplexity(model, text, 4, f"QLoRA: {name} after") for name, text in texts.items()}
    count = min(10, settings.steps // 4)
    first, last = first_and_last(losses, count)
    text_after = sample(model, tokenizer, PROMPT, tokens=settings.tokens).text
    with doing("QLoRA: reloading"):
        model.save_pretrained(folder)
        again = reload_adapter(load(NF4_NESTED, device), folder)
        difference = largest_difference(model, again, heldout[:1])

    rate = settings.steps * len(MODULES) * WINDOW / training.seconds
    for name, value in (
        ("loss", f"{first:.3f} in the first {count} steps, {last:.3f} in the last {count}"),
        (f"perplexity of {' and '.join(UNSEEN)}", f"{before['source']:.2f} before, {after['source']:.2f} after"),
        ("perplexity of documentation", f"{before['documentation']:.2f} before, {after['documentation']:.2f} after"),
        ("training", f"{training.seconds:.1f} s, {rate:,.0f} tokens/s, peak {mebibytes(training.peak)} MiB"),
        ("saved and reloaded", f"max|d| of the logits {difference:g}"),
        ("writes, before", one_line(text_before, 85)),
        ("writes, after", one_line(text_after, 85)),
    ):
        print(f"  {name:<33}{value}")
    return {
        "parameters": parameters,
        "losses": losses,
        "loss_first": first,
        "loss_last": last,
        "perplexity_before": before,
        "perplexity_after": after,
        "training": asdict(training),
        "tokens_per_second": rate,
        "reload_difference": difference,
        "text_before": text_before,
        "text_after": text_after,
    }


def source(tokenizer: Any, module: str, length: int) -> Tensor:
    """The source of a module as windows of token ids, `[windows, length]`."""
    return windows(encode(tokenizer, inspect.getsource(importlib.import_module(module))), length)


def batches(texts: Sequence[Tensor], steps: int, seed: int = 0) -> Iterator[Tensor]:
    """A window of each text, in an order of its own, over and over: `[texts, length]` for each step.

    >>> [batch.tolist() for batch in batches([torch.tensor([[1, 2]]), torch.tensor([[3, 4]])], steps=2)]
    [[[1, 2], [3, 4]], [[1, 2], [3, 4]]]
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(text), generator=generator).tolist() for text in texts]
    for step in range(steps):
        yield torch.stack([text[order[step % len(order)]] for text, order in zip(texts, orders, strict=True)])


def add_adapter(model: Any) -> Any:
    """y = W~ x + (alpha / r) B A x on every quantized layer; A and B are trained, in float32."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, register_lora(config))


def reload_adapter(model: Any, folder: Path) -> Any:
    """The adapter in `folder` on a freshly loaded model."""
    return PeftModel.from_pretrained(model, folder, config=register_lora(LoraConfig.from_pretrained(folder)))


def train(model: Any, data: Iterable[Tensor], steps: int, lr: float = 2e-3) -> list[float]:
    """AdamW on the adapter, a step for each batch; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    with tqdm(data, desc="QLoRA: training", total=steps, unit="step", leave=False, disable=None) as bar:
        for batch in bar:
            loss = next_token_loss(model, batch.to(model.device))
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def first_and_last(losses: Sequence[float], count: int) -> tuple[float, float]:
    """Mean loss of the first and of the last `count` steps; `Mismatch` if it did not fall.

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
    """max|d| of the logits of two models; `Mismatch` unless it is 0."""
    before, after = (m.eval()(input_ids=ids).logits.float() for m in (model, again))
    difference = float((before - after).abs().max())
    if difference != 0:
        raise Mismatch(f"the reloaded adapter gives other logits than the one that was saved: max|d| {difference}")
    return difference
