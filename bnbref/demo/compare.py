"""One model in five formats: what each takes, what it costs in perplexity, how fast it writes, and what."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bnbref.demo import MODEL, Settings
from bnbref.demo.evaluate import CONTEXT, perplexity, sample
from bnbref.demo.formats import FORMATS, Format, plain, weights
from bnbref.demo.report import aligned, doing, mebibytes, one_line
from bnbref.demo.resources import phase
from bnbref.info import compute_dtype

PROMPT = "class collections."


def load(kind: Format, device: torch.device) -> Any:
    """The demo model in a format, as any user loads a model."""
    return AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=compute_dtype(device), quantization_config=kind.config, device_map={"": device}
    )


COLUMNS = {
    "weights": 11, "bits": 7, "bytes": 10, "perplexity": 10, "change": 8, "tokens/s": 8,
    "ready s": 7, "evaluation s": 12, "peak MiB": 8,
}  # fmt: skip


def compare(tokenizer: Any, heldout: Tensor, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """A row for each format, printed as soon as it is measured."""
    print(
        f"\nHeld-out documentation, {len(heldout)} windows of {CONTEXT} tokens; "
        f"{settings.tokens} tokens written, the likeliest each time.\n"
    )
    print(aligned(COLUMNS.values(), COLUMNS))
    rows: list[dict[str, Any]] = []
    for kind in (plain(compute_dtype(device)), *FORMATS):
        row = measure(kind, tokenizer, heldout, settings, device)
        rows.append(row)
        row["change"] = row["perplexity"] / rows[0]["perplexity"] - 1
        peak = max(row[part]["peak"] for part in ("ready", "evaluation", "generation"))
        cells = (
            kind.name, f"{row['bits']:.3f}", f"{row['bytes']:,}", f"{row['perplexity']:.3f}",
            "" if row is rows[0] else f"{row['change']:+.2%}", f"{row['tokens_per_second']:.1f}",
            f"{row['ready']['seconds']:.1f}", f"{row['evaluation']['seconds']:.1f}", mebibytes(peak),
        )  # fmt: skip
        print(aligned(COLUMNS.values(), cells), flush=True)
    print(EXPLAINED.format(layers=rows[0]["layers"], parameters=rows[0]["parameters"]))
    for row in rows:
        print(f"  {row['name']:<11} {one_line(row['text'])}")
    return rows


EXPLAINED = """
bits, bytes: of the {layers} linear layers that are quantized, {parameters:,} parameters, exactly what the formats say.
ready: loading, quantizing, compiling what is not in the cache, a first forward pass. peak: of the whole process.
The speeds are those of a model whose layers are tiny; they say nothing about large ones.
"""


def measure(kind: Format, tokenizer: Any, heldout: Tensor, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Everything about one format."""
    with phase() as ready, doing(f"{kind.name}: loading"):
        model = load(kind, device)
        sample(model, tokenizer, PROMPT, tokens=2, greedy=True)
    found = weights(model, kind)
    count = sum(p.elements for p in found.parameters)
    with phase() as evaluation:
        value = perplexity(model, heldout, batch=1, progress=f"{kind.name}: perplexity")
    with phase() as generation, doing(f"{kind.name}: generating"):
        text = sample(model, tokenizer, PROMPT, tokens=settings.tokens, greedy=True)
    return {
        "name": kind.name,
        "layers": len(found.parameters),
        "parameters": count,
        "bytes": found.total_bytes,
        "bits": 8 * found.total_bytes / count,
        "perplexity": value,
        "tokens_per_second": text.tokens / text.seconds,
        "text": text.text,
        "ready": asdict(ready),
        "evaluation": asdict(evaluation),
        "generation": asdict(generation),
    }
