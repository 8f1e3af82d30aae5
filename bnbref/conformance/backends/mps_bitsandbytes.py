"""mps-bitsandbytes: bitsandbytes' names for Apple's GPUs; on a CPU what it falls back to, which is torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Unsupported, require


class MpsBitsAndBytes:
    """4 bits and int8 rows. Blocks of 8 bits are left out: their codes are linear, whatever map they are given."""

    packages = ("mps_bitsandbytes",)

    def __init__(self) -> None:
        self.package = require("mps_bitsandbytes")

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        packed, state = self.package.functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        return packed.view(-1), state.absmax

    def dequantize_4bit(self, packed: Tensor, absmax: Tensor, dtype: torch.dtype, **weight: Any) -> Tensor:
        y: Tensor = self.package.functional.dequantize_4bit(packed, self._state(absmax, dtype=dtype, **weight))
        return y

    def gemm_4bit(
        self, a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, shape: Sequence[int], **weight: Any
    ) -> Tensor:
        state = self._state(absmax, shape=shape, dtype=a.dtype, **weight)
        y: Tensor = self.package.functional.matmul_4bit(a, packed, state, bias)
        return y

    def int8_quantize(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        if threshold > 0:
            raise Unsupported("mps-bitsandbytes has no threshold for outliers")
        codes, absmax = self.package.functional.quantize_rowwise(x)
        return codes, absmax, torch.empty(0, dtype=torch.int64)

    def int8_dequantize(self, codes: Tensor, absmax: Tensor) -> Tensor:
        y: Tensor = self.package.functional.dequantize_rowwise(codes, absmax, torch.float32)
        return y

    def _state(self, absmax: Tensor, shape: Sequence[int], **rest: Any) -> Any:
        return self.package.functional.QuantState(absmax=absmax, shape=torch.Size(shape), **rest)
