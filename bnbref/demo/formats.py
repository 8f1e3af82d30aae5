"""The formats of the demo: how `from_pretrained` is asked for each, and how many bytes a layer then takes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnbref.integrations.hf.transformers import BnbRefConfig
from bnbref.nn import Int8Params, Linear4bit


class Format(NamedTuple):
    """A name, what is passed as `quantization_config`, and the bytes of an element where that is None."""

    name: str
    config: BnbRefConfig | None
    itemsize: int = 0

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a weight."""
        return self.itemsize * rows * columns if self.config is None else sum(self.config.bytes_of(rows, columns))


def plain(dtype: torch.dtype) -> Format:
    """What the others are compared with: the model as it is, in bfloat16 or float32."""
    return Format({torch.bfloat16: "bf16", torch.float32: "f32"}[dtype], None, dtype.itemsize)


FORMATS = (
    Format("int8", BnbRefConfig("int8", threshold=6.0)),
    Format("nf4", BnbRefConfig("nf4", double_quant=False)),
    Format("nf4 nested", BnbRefConfig("nf4", double_quant=True)),
    Format("fp4", BnbRefConfig("fp4", double_quant=False)),
)
"""In the order in which they are shown."""


class Mismatch(RuntimeError):
    """Something that was measured is not what it must be."""


def quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that are quantized, by name: all but the output head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def stored(layer: nn.Linear) -> list[Tensor]:
    """The tensors that hold a layer's weight, value tables aside."""
    tensors: list[Tensor | None] = [layer.weight.data]
    if isinstance(layer.weight, Int8Params):
        tensors += [layer.weight.SCB]
    if isinstance(layer, Linear4bit) and layer.quant_state is not None:
        state = layer.quant_state
        tensors += [state.absmax, state.offset, None if state.state2 is None else state.state2.absmax]
    return [tensor for tensor in tensors if tensor is not None]


class Size(NamedTuple):
    """How many weights are quantized, how many parameters they have, and how many bytes they take."""

    layers: int
    parameters: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits for each parameter."""
        return 8 * self.bytes / self.parameters


def size(model: nn.Module, kind: Format) -> Size:
    """The size of a model's quantized weights in memory. Raises `Mismatch` where a layer does not take what the format says."""
    layers = parameters = total = 0
    for name, layer in quantizable(model):
        rows, columns = layer.out_features, layer.in_features
        expected = kind.bytes_of(rows, columns)
        found = sum(t.untyped_storage().nbytes() for t in stored(layer))
        if found != expected:
            raise Mismatch(f"{name} [{rows}, {columns}] in {kind.name} takes {found} bytes, the format says {expected}")
        layers, parameters, total = layers + 1, parameters + rows * columns, total + found
    return Size(layers, parameters, total)
