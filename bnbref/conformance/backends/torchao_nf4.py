"""torchao's NF4 tensor, which left the package with 0.18: its codes. Scales it has doubly quantized alone, in another format."""

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from bnbref.conformance.backends import Backend, require
from bnbref.conformance.backends.blocks import nf4_alone, rows

_MODULE = "torchao.dtypes.nf4tensor"


class TorchAONF4:
    """Codes, and the scales before they are quantized."""

    def __init__(self) -> None:
        require("torchao")
        if importlib.util.find_spec(_MODULE) is None:
            raise ValueError(f"backend 'torchao-nf4' needs {_MODULE}: torchao 0.17 or earlier")
        self.module: Any = importlib.import_module(_MODULE)

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        nf4_alone(quant_type, "torchao")
        blocks = rows(x.contiguous(), blocksize, "torchao")
        made = self.module.NF4Tensor.from_tensor(blocks, blocksize, 1)
        return made.quantized_data, self.module.get_block_absmax(blocks.flatten(), blocksize).float()


def backend(name: str) -> Backend:
    """torchao. Raises ValueError where it is not installed, or has no NF4 tensor."""
    return Backend(name, TorchAONF4(), ("torchao",))
