"""The formats of the demo: how `from_pretrained` is asked for each, and how many bytes a layer then takes.

    bf16, f32         2 n, 4 n                             n = rows * columns, the elements of a weight
    int8              n + 4 rows                           a float32 scale for each row
    nf4, fp4          n / 2 + 4 b                          b = n / 64 blocks, a float32 scale for each
    nf4, nested       n / 2 + b + 4 (b / 256) + 4          8 bits a scale, 256 of which share a float32; their mean

Counts are rounded up. The value tables (64 bytes for codes, 1,024 for nested scales) serve all layers: left out.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnbref.integrations.hf.transformers import BnbRefConfig
from bnbref.nn import Int8Params, Linear4bit

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256


class Format(NamedTuple):
    """A name, what is passed as `quantization_config`, and the bytes of a weight `[rows, columns]`."""

    name: str
    config: Callable[[], BnbRefConfig | None]
    bytes_of: Callable[[int, int], int]


def blocks(n: int, size: int) -> int:
    """How many blocks n elements take; the last block may be a part of one."""
    return -(-n // size)


def four_bit(rows: int, columns: int) -> int:
    """Bytes of a weight in NF4 or FP4.

    >>> 8 * four_bit(4096, 4096) / 4096**2
    4.5
    """
    n = rows * columns
    return blocks(n, 2) + 4 * blocks(n, BLOCKSIZE)


def four_bit_nested(rows: int, columns: int) -> int:
    """Bytes of a weight in NF4 with double quantization.

    >>> round(8 * four_bit_nested(4096, 4096) / 4096**2, 4)
    4.127
    """
    n = rows * columns
    scales = blocks(n, BLOCKSIZE)
    return blocks(n, 2) + scales + 4 * blocks(scales, NESTED_BLOCKSIZE) + 4


def plain(dtype: torch.dtype) -> Format:
    """What the others are compared with: the model as it is, in bfloat16 or float32."""
    name = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    return Format(name, lambda: None, lambda rows, columns: dtype.itemsize * rows * columns)


FORMATS = (
    Format("int8", lambda: BnbRefConfig("int8", threshold=6.0), lambda rows, columns: rows * columns + 4 * rows),
    Format("nf4", lambda: BnbRefConfig("nf4", double_quant=False), four_bit),
    Format("nf4 nested", lambda: BnbRefConfig("nf4", double_quant=True), four_bit_nested),
    Format("fp4", lambda: BnbRefConfig("fp4", double_quant=False), four_bit),
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
