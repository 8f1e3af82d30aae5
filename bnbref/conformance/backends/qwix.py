"""qwix: NF4 in JAX, as `qwix.quantize` and `qwix.dequantize` have it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bnbref.conformance.backends import require
from bnbref.conformance.backends.blocks import code_rows, exactly, nf4_alone, pack, rows


class Qwix:
    """4-bit codes in blocks of a row. Scales have the dtype of the array, which is also that of the decoded weight."""

    packages = ("qwix", "jax")

    def __init__(self) -> None:
        self.qwix, self.jax = require("qwix"), require("jax")

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        nf4_alone(quant_type)
        array = self.qwix.quantize(self._jax(rows(x, blocksize)), "nf4", channelwise_axes=(0,))
        codes = from_dlpack(array.qvalue.astype(self.jax.numpy.uint8))
        return pack(codes), from_dlpack(array.scale).float().view(-1)

    def dequantize_4bit(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type)
        codes = code_rows(packed, blocksize, torch.Size(shape).numel())
        array = self._array(codes, exactly(absmax, dtype).view(-1, 1))
        return from_dlpack(self.qwix.dequantize(array)).reshape(shape)

    def _array(self, codes: Tensor, scale: Tensor) -> Any:
        qvalue = self._jax(codes.to(torch.uint8)).astype(self.jax.numpy.uint4)
        return self.qwix.QArray(qvalue=qvalue, scale=self._jax(scale), zero_point=None, qtype="nf4")

    def _jax(self, x: Tensor) -> Any:
        return self.jax.numpy.from_dlpack(x.contiguous())
