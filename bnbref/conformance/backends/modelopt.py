"""NVIDIA's Model Optimizer: `NF4QTensor`, on a CPU in torch. Doubly quantized, its scales are of another format."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Unsupported
from bnbref.conformance.backends.blocks import exactly, nf4_alone


class ModelOptimizer:
    """Quantization and its inverse."""

    packages = ("modelopt",)

    def __init__(self) -> None:
        self.tensor: Any = importlib.import_module("modelopt.torch.quantization.qtensor.nf4_tensor").NF4QTensor

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        nf4_alone(quant_type)
        if x.numel() == 0:
            raise Unsupported("there is nothing to quantize")
        made, scales = self.tensor.quantize(x.contiguous(), blocksize, 1)
        # Both are padded to whole blocks.
        return made._quantized_data[: -(-x.numel() // 2)], scales.view(-1).float()

    def dequantize_4bit(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type)
        whole = torch.zeros(-(-math.prod(shape) // blocksize) * blocksize // 2, dtype=torch.uint8)
        whole[: packed.numel()] = packed
        made = self.tensor(torch.Size(shape), dtype, whole)
        # Scales that are not quantized again: divided by one, plus zero.
        scale = exactly(absmax, dtype)
        y: Tensor = made.dequantize(
            dtype, scale=scale, block_sizes={-1: blocksize}, double_scale=torch.ones(1, dtype=dtype), scale_zeros=0
        )
        return y
