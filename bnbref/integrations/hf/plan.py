"""How much memory a model takes, from its config.json alone or from its number of parameters: `python -m bnbref plan`.

The model is built on the meta device, without weights, and quantized as `from_pretrained` would. Weights, scales, adapters,
gradients, optimizer states and the KV cache are counted to the byte; activations are an estimate, and called so.

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
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from bnbref import optim
from bnbref.integrations.hf.config import BnbRefConfig
from bnbref.integrations.hf.quantizer import BnbRefHfQuantizer
from bnbref.nn.quantized_layer import QuantizedLayer
from bnbref.optim.paging import PAGE_BYTES, PAGED_FROM

FORMATS: dict[str, BnbRefConfig | None] = {
    "bfloat16": None,
    "int8": BnbRefConfig("int8"),
    "nf4": BnbRefConfig("nf4", double_quant=False),
    "nf4, double": BnbRefConfig("nf4"),
}
"""From the most exact to the smallest."""

DTYPE = torch.bfloat16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "out_proj", "dense")
"""Names that models have for the projections of attention. A plan for QLoRA adapts these."""


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
    """The named optimizers of `bnbref.optim` that step by element: what a rule of matrices keeps depends on more than shapes."""
    named = [getattr(optim, name) for name in optim.__all__]
    return [c for c in named if isinstance(c, type) and c.__module__ == optim.AdamW.__module__]


# ---- what is counted ------------------------------------------------------------------------------------------------


def read_config(model: str) -> Any:
    """A config from a directory, a config.json, a name on the hub or a number of parameters. OSError if there is none.

    >>> read_config("7B").num_hidden_layers
    32
    """
    path = Path(model)
    parameters = number_of_parameters(model)
    if parameters is not None:
        return llama(parameters)
    try:
        return AutoConfig.from_pretrained(path.parent if path.name == "config.json" else model)
    except (OSError, ValueError) as error:
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
    return float(found[1]) * (1e6 if found[2] in "Mm" else 1e9)


def llama(parameters: float) -> LlamaConfig:
    """A Llama of about so many parameters, in the proportions of Llama-2 7B: heads of 128, a layer for each.

    With h heads a layer has (4 + 3 * 2.6875) * (128 h)^2 parameters; there are h layers, and two matrices of the vocabulary.
    """

    def count(heads: int) -> float:
        hidden = 128 * heads
        return 12.0625 * heads * hidden**2 + 2 * 32000 * hidden

    heads = min(range(1, 512), key=lambda h: abs(count(h) - parameters))
    hidden = 128 * heads
    return LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=heads,
        num_attention_heads=heads,
    )  # fmt: skip


def on_meta(config: Any, spec: BnbRefConfig | None) -> tuple[Any, set[str]]:
    """The model without weights, quantized as `spec` says; and the parameters that are quantized by themselves."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.tie_weights()
    if spec is None:
        return model, set()
    quantizer = BnbRefHfQuantizer(spec)
    quantizer.pre_quantized = False
    model = quantizer._process_model_before_weight_loading(model)
    return model, set(quantizer.fused)


def weight_bytes(config: Any, spec: BnbRefConfig | None, floats: torch.dtype = DTYPE) -> dict[str, int]:
    """Bytes of a model: what stays float, codes, scales. floats: the dtype of what stays float."""
    model, fused = on_meta(config, spec)
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    found = {"weights": 0, "scales": 0}
    for name, p in model.named_parameters():
        if spec is not None and (name in layers or name in fused):
            rows = int(getattr(layers.get(name), "out_features", p.shape[0]))
            codes, scales = spec.bytes_of(rows, p.numel() // rows)
            found["weights"] += codes
            found["scales"] += scales
        else:
            found["weights"] += p.numel() * floats.itemsize
    return found


def undivided_bytes(config: Any) -> int:
    """Bytes of the largest part of a model that one GPU holds as a whole, in bfloat16: a layer, or the embedding."""
    model, _ = on_meta(config, None)
    parts = [
        m
        for m in model.modules()
        if type(m).__name__ in (model._no_split_modules or ()) or isinstance(m, torch.nn.Embedding)
    ]
    sizes: list[int] = [sum(p.numel() for p in part.parameters()) for part in parts or [model]]
    return max(sizes) * DTYPE.itemsize


def adapter_shapes(config: Any, rank: int) -> list[torch.Size]:
    """The shapes of the adapters that LoRA of that rank puts on the projections of attention."""
    model, _ = on_meta(config, None)
    linears = [m for name, m in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    if not linears:
        raise ValueError(f"the model has no layer called one of {PROJECTIONS}: none to adapt")
    pairs = (m.weight.shape for m in linears)
    return [torch.Size(shape) for n, k in pairs for shape in ((rank, k), (n, rank))]


def state_bytes(optimizer: type[optim.Optimizer], shapes: Iterable[torch.Size]) -> tuple[int, int]:
    """Bytes of an optimizer's states on the device, and in host memory if it is paged.

    >>> state_bytes(optim.AdamW8bit, [torch.Size([4096, 4096])]), state_bytes(optim.PagedAdamW, [torch.Size([4096, 4096])])
    ((34078720, 0), (134217728, 134217728))
    """

    def empty(key: str, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    parameters = [torch.nn.Parameter(empty("", shape, torch.float32)) for shape in shapes]
    make: Any = optimizer
    instance: optim.Optimizer = make(parameters, lr=1e-3)
    resident = paged = largest = 0
    for p in parameters:
        state = instance.new_state(p, instance.settings(p, instance.param_groups[0]), empty)
        size = sum(x.nbytes for x in state.values() if isinstance(x, torch.Tensor))
        if instance.is_paged and p.numel() >= PAGED_FROM:
            paged, largest = paged + size, max(largest, size)
        else:
            resident += size
    return resident + min(paged, max(PAGE_BYTES, largest)), paged


def cache_bytes(config: Any, batch: int, seq: int) -> int:
    """Bytes of the keys and values of `seq` tokens, bfloat16."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kv_heads * size * batch * seq * DTYPE.itemsize)


def activation_bytes(config: Any, batch: int, seq: int, train: bool) -> int:
    """An estimate: of one layer what it keeps for its gradient, the inputs of all layers if training, and the logits.

    A layer keeps its input twice, four projections, the product with the values and three tensors of the feed-forward net; the
    logits are there in bfloat16 and, for the loss, in float32 with their gradient. One weight is dequantized at a time.
    """
    text = config.get_text_config()
    hidden, tokens = text.hidden_size, batch * seq
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    layer = tokens * (7 * hidden + 3 * inner) * DTYPE.itemsize
    weight = hidden * max(hidden, inner) * DTYPE.itemsize
    if not train:
        return int(layer + weight + batch * text.vocab_size * (DTYPE.itemsize + 4))
    checkpoints = text.num_hidden_layers * tokens * hidden * DTYPE.itemsize
    logits = tokens * text.vocab_size * (DTYPE.itemsize + 4 + 4)
    return int(checkpoints + 2 * layer + weight + logits)


# ---- plans ----------------------------------------------------------------------------------------------------------


def plans(
    config: Any, train: str | None = None, optimizer: type[optim.Optimizer] = optim.PagedAdamW8bit, seq: int = 2048,
    batch: int = 1, rank: int = 16,
) -> list[Plan]:  # fmt: skip
    """A plan for each format that can be used so. train: None, "qlora" or "full"."""
    found = []
    for name, spec in FORMATS.items():
        if train == "full" and spec is not None:
            continue
        # Parameters that are not quantized, embeddings above all, are cast to float32 by peft's prepare_model_for_kbit_training.
        parts = weight_bytes(config, spec, torch.float32 if train == "qlora" and spec is not None else DTYPE)
        host = 0
        if train is None:
            parts["KV cache"] = cache_bytes(config, batch, seq)
        else:
            lora = train == "qlora"
            shapes = adapter_shapes(config, rank) if lora else [p.shape for p in on_meta(config, None)[0].parameters()]
            count = sum(shape.numel() for shape in shapes)
            itemsize = 4 if lora else DTYPE.itemsize  # peft keeps adapters of a quantized model in float32
            if lora:
                parts["adapters"] = count * itemsize
            parts["gradients"] = count * itemsize
            parts["optimizer"], host = state_bytes(optimizer, shapes)
        parts["activations"] = activation_bytes(config, batch, seq, train is not None)
        found.append(Plan(name, parts, host))
    return found
