"""Intel's neural-compressor: NF4 of its weight-only quantization, and the layer that packs it.

Its FP4 has values up to 12 and scales of absmax / 12: another format. Its bytes hold other nibbles than bitsandbytes' (those of
-1 and 0 are exchanged, eight in an int32), so that what is compared are values.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Unsupported
from bnbref.conformance.backends.blocks import code_rows, nf4_alone, pack, rows


class NeuralCompressor:
    """Codes by `quantize_4bit`, weights and products by `INCWeightOnlyLinear`."""

    packages = ("neural_compressor",)

    def __init__(self) -> None:
        folder = "neural_compressor.torch.algorithms.weight_only"
        self.utility: Any = importlib.import_module(f"{folder}.utility")
        self.layer: Any = importlib.import_module(f"{folder}.modules").INCWeightOnlyLinear
        self.nibbles = torch.tensor(self.utility.INT_MAPPING["nf4"])

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        nf4_alone(quant_type)
        blocks = rows(x, blocksize).clone()  # it quantizes in place
        nibbles, scale, _ = self.utility.quantize_4bit(blocks, dtype="nf4", return_int=True)
        codes = (nibbles.reshape(-1, 1) == self.nibbles).int().argmax(-1)
        return pack(codes), scale.float().view(-1)

    def dequantize_4bit(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type)
        if dtype != torch.float32:
            raise Unsupported("neural-compressor recovers float32")
        codes = code_rows(packed, blocksize, torch.Size(shape).numel())
        weight: Tensor = self._layer(codes, absmax, blocksize, None).recover()
        return weight.reshape(shape)

    def gemm_4bit(
        self, a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int, quant_type: str,
        shape: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type)
        n, k = shape
        if k % blocksize or a.dtype != torch.float32:
            raise Unsupported("neural-compressor has blocks of a row, and products in float32")
        codes = code_rows(packed, blocksize, n * k).view(n, k)
        y: Tensor = self._layer(codes, absmax, blocksize, bias)(a)
        return y

    def _layer(self, codes: Tensor, absmax: Tensor, blocksize: int, bias: Tensor | None) -> Any:
        n, k = codes.shape
        made = self.layer(k, n, dtype="nf4", bits=4, group_size=blocksize, bias=bias is not None)
        made.pack(self.nibbles[codes].to(torch.int32), absmax.view(n, -1), None, bias)
        return made.eval()
