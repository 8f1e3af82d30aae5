"""torchao's NF4 tensor, which left the package with 0.18: its codes. Scales it has doubly quantized alone, in another format."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends.blocks import nf4_alone, rows

_DTYPES = (torch.float32, torch.bfloat16)
_MODULE = "torchao.dtypes.nf4tensor"


class TorchAONF4:
    """Codes, and the scales before they are quantized."""

    packages = ("torchao",)

    def __init__(self) -> None:
        if importlib.util.find_spec(_MODULE) is None:
            raise ValueError(f"backend 'torchao-nf4' needs {_MODULE}: torchao 0.17 or earlier")
        self.module: Any = importlib.import_module(_MODULE)

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        nf4_alone(quant_type)
        blocks = rows(x.contiguous(), blocksize)
        made = self.module.NF4Tensor.from_tensor(blocks, blocksize, 1)
        return made.quantized_data, self.module.get_block_absmax(blocks.flatten(), blocksize).float()

    def product_of_ones(self, n: int, k: int) -> Any:
        """A function of activations: the product with a weight that is constant along each row."""
        weight = torch.ones(n, k)
        weight[-1] = 2  # a weight that is constant as a whole has scales that are NaN
        made = {dtype: self.module.NF4Tensor.from_tensor(weight.to(dtype), 64, k // 64) for dtype in _DTYPES}
        return lambda a: self.module.linear_nf4(a, made[a.dtype])
