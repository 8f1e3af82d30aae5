"""The formats of the demo: how `from_pretrained` is asked for each, and how many bytes a layer then takes."""

from typing import NamedTuple

import torch
from torch import nn

from bnbref.integrations.hf.transformers import BnbRefConfig
from bnbref.nn.inventory import Report, report


class Format(NamedTuple):
    """A name, what is passed as `quantization_config`, and the bytes of an element where that is None."""

    name: str
    config: BnbRefConfig | None
    itemsize: int = 0

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a weight."""
        return self.itemsize * rows * columns if self.config is None else sum(self.config.bytes_of(rows, columns))


def plain(dtype: torch.dtype) -> Format:
    """The format that the others are compared with: the model as it is, in bfloat16 or float32."""
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


def weights(model: nn.Module, kind: Format) -> Report:
    """The weights that a format quantizes: of all linear layers but the output head.

    Raises `Mismatch` where one does not take the bytes that the format says.
    """
    names = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    found = Report(tuple(p for p in report(model).parameters if p.name in names))
    for p in found.parameters:
        rows, columns = p.shape
        if p.bytes != kind.bytes_of(rows, columns):
            raise Mismatch(f"{p.name} takes {p.bytes} bytes, {kind.name} says {kind.bytes_of(rows, columns)}")
    return found
