"""The two measures of a language model in the demo: perplexity on held-out text, and the text that it writes."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

CONTEXT = 512


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text of any length, `[tokens]` int64."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def windows(ids: Tensor, length: int = CONTEXT) -> Tensor:
    """Token ids `[tokens]` cut into windows that do not overlap, `[windows, length]`. What remains after the last is left out.

    >>> windows(torch.arange(5), 2)
    tensor([[0, 1],
            [2, 3]])
    """
    return ids[: len(ids) // length * length].view(-1, length)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean cross-entropy of each token but the first of its window. ids: `[windows, length]`. Summed in float32."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: nn.Module, batches: Tensor, batch: int = 16, progress: str | None = None) -> float:
    """exp of the mean loss over windows `[windows, length]`, in the dtype that the model has.

    A window's first token is not predicted. `progress` labels a bar.
    """
    model.eval()
    bar = tqdm(
        torch.split(batches, batch),
        desc=progress,
        disable=True if progress is None else None,
        leave=False,
        unit="batch",
    )
    losses = [next_token_loss(model, ids) * len(ids) for ids in bar]
    return math.exp(torch.stack(losses).sum().item() / len(batches))


class Sample(NamedTuple):
    """A prompt and its continuation, and how long the continuation took."""

    text: str
    tokens: int
    seconds: float


def sample(model: Any, tokenizer: Any, prompt: str, tokens: int = 90, seed: int = 0, greedy: bool = False) -> Sample:
    """The prompt continued by up to `tokens` tokens, as in the model card: temperature 0.7, top-k 40, penalty 1.15.

    greedy: the likeliest token each time, under the same penalty. Drawn tokens differ by luck, these by the logits alone.
    """
    model.eval()
    torch.manual_seed(seed)
    ids = encode(tokenizer, prompt)[None].to(model.device)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.7, "top_k": 40}
    start = time.perf_counter()
    output = model.generate(ids, max_new_tokens=tokens, repetition_penalty=1.15, **how)
    text = str(tokenizer.decode(output[0], skip_special_tokens=True))  # waits for the device
    return Sample(text, output.shape[1] - ids.shape[1], time.perf_counter() - start)
