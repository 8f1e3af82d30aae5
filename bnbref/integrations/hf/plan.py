"""How much memory a model takes, from its config.json alone or from its number of parameters: `python -m bnbref plan`.

Weights, scales, adapters, gradients, optimizer states and the KV cache are counted to the byte on a model without memory
(`blueprint.py`); the cache of a model that needs values to run, and activations, are estimates.

    inference    weights + KV cache + activations of one layer
    qlora        quantized weights + adapters, their gradients and states + activations, by gradient checkpointing
    full         weights, gradients and states of all parameters + activations, by gradient checkpointing

What is said of it, and the code to paste, is in `plan_report`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig

from bnbref import optim
from bnbref.integrations.hf.blueprint import DTYPE, FORMATS, Blueprint
from bnbref.optim.family import Family
from bnbref.optim.paging import PAGE_BYTES, PAGED_FROM


@dataclass(frozen=True)
class Plan:
    """Bytes on the device by what they are for, and those of paged states, which are in host memory."""

    format: str
    parts: Mapping[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


def optimizers() -> list[type[optim.Optimizer]]:
    """The named optimizers of `bnbref.optim` whose states are counted here: of each element a number or two. Those of matrices
    keep more than their shapes tell, and the schedule-free one keeps a parameter more."""
    named = [getattr(optim, name) for name in optim.__all__]
    others = (optim.Muon, optim.Adafactor, optim.SOAP, optim.AdamWScheduleFree)
    return [c for c in named if isinstance(c, type) and issubclass(c, Family) and not issubclass(c, others)]


def must_say(optimizer: type[optim.Optimizer]) -> dict[str, float]:
    """The arguments that an optimizer needs beside its learning rate: SGD and LARS refuse their default momentum, which is 0."""
    return {"momentum": 0.9} if issubclass(optimizer, (optim.SGD, optim.LARS)) else {}


# ---- what is counted ------------------------------------------------------------------------------------------------


def read_config(model: str) -> Any:
    """A config from a directory, a config.json, a name on the hub or a number of parameters. OSError if there is none, or
    transformers makes none of it.

    >>> read_config("7B").num_hidden_layers
    32
    """
    path = Path(model)
    parameters = number_of_parameters(model)
    if parameters is not None:
        return llama(parameters)
    try:
        return AutoConfig.from_pretrained(path.parent if path.name == "config.json" else model)
    except Exception as error:  # a stranger's file: transformers raises whatever its settings make of each other
        raise OSError(
            f"the model must be a directory with a config.json, a config.json, a name on the hub, or a size like 7B, "
            f"got {model!r}: {error}"
        ) from error


def number_of_parameters(model: str) -> float | None:
    """The number of parameters that a size like 7B means; None for the name of a model, or of a file that is there.

    >>> number_of_parameters("0.5B"), number_of_parameters("demo")
    (500000000.0, None)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MmBb])", model)
    if found is None or Path(model).exists():
        return None
    if float(found[1]) == 0:
        raise ValueError(f"a size must be above 0, like 7B, got {model!r}")
    return float(found[1]) * (1e6 if found[2] in "Mm" else 1e9)


_MOST_HEADS = 256  # with which a Llama would have more than 3,000 B parameters


def llama(parameters: float) -> LlamaConfig:
    """The config of a Llama of about so many parameters, in the proportions of Llama-2 7B: as many layers as heads, of 128 each.

    With h heads a layer has (4 + 3 * 2.6875) * (128 h)^2 parameters; there are h layers, and two matrices of the vocabulary.
    ValueError for a number that no such Llama comes near.
    """

    def count(heads: int) -> float:
        hidden = 128 * heads
        return 12.0625 * heads * hidden**2 + 2 * 32000 * hidden

    heads = min(range(1, _MOST_HEADS), key=lambda h: abs(count(h) - parameters))
    if not 0.6 < count(heads) / parameters < 1.6:
        least, most = count(1), count(_MOST_HEADS - 1)
        raise ValueError(
            f"a size must be from {least / 1e6:.0f}M to {most / 1e9:.0f}B, or near: there is no Llama of {parameters:g} "
            f"parameters with heads of 128"
        )
    hidden = 128 * heads
    return LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=heads,
        num_attention_heads=heads,
    )  # fmt: skip


def state_bytes(optimizer: type[optim.Optimizer], shapes: Iterable[torch.Size]) -> tuple[int, int]:
    """Bytes of an optimizer's states on the device, and in host memory if it is paged.

    >>> state_bytes(optim.AdamW8bit, [torch.Size([4096, 4096])]), state_bytes(optim.PagedAdamW, [torch.Size([4096, 4096])])
    ((34078720, 0), (134217728, 134217728))
    """

    def empty(key: str, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    parameters = [torch.nn.Parameter(empty("", shape, torch.float32)) for shape in shapes]
    make: Any = optimizer
    instance: optim.Optimizer = make(parameters, lr=1e-3, **must_say(optimizer))
    resident = paged = largest = 0
    for p in parameters:
        state = instance.new_state(p, instance.settings(p, instance.param_groups[0]), empty)
        size = sum(x.nbytes for x in state.values() if isinstance(x, torch.Tensor))
        if instance.is_paged and p.numel() >= PAGED_FROM:
            paged, largest = paged + size, max(largest, size)
        else:
            resident += size
    return resident + min(paged, max(PAGE_BYTES, largest)), paged


# ---- plans ----------------------------------------------------------------------------------------------------------


def plans(
    blueprint: Blueprint, train: str | None = None, optimizer: type[optim.Optimizer] = optim.PagedAdamW8bit, seq: int = 2048,
    batch: int = 1, rank: int = 16,
) -> list[Plan]:  # fmt: skip
    """A plan for each format that suits the use. train: None (to run), "qlora" (adapters on all linear layers) or "full"."""
    found = []
    shapes: list[torch.Size] = []
    if train is not None:
        shapes = blueprint.adapter_shapes(rank) if train == "qlora" else [p.shape for p in blueprint.model.parameters()]
    count, cache = sum(shape.numel() for shape in shapes), 0 if train else blueprint.cache_bytes(batch, seq)
    for name, spec in FORMATS.items():
        if train == "full" and spec is not None:
            continue
        # Parameters that are not quantized, embeddings above all, are cast to float32 by peft's prepare_model_for_kbit_training.
        floats = torch.float32 if train == "qlora" and spec is not None else DTYPE
        weights = blueprint.weights(name)
        parts = {"weights": weights.floats * floats.itemsize + weights.codes, "scales": weights.scales}
        host = 0
        if train is None:
            parts["KV cache"] = cache
        else:
            itemsize = 4 if train == "qlora" else DTYPE.itemsize  # peft keeps adapters of a quantized model in float32
            if train == "qlora":
                parts["adapters"] = count * itemsize
            parts["gradients"] = count * itemsize
            parts["optimizer"], host = state_bytes(optimizer, shapes)
        parts["activations"] = blueprint.activation_bytes(batch, seq, train is not None)
        found.append(Plan(name, parts, host))
    return found
