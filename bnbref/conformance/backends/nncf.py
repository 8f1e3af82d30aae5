"""OpenVINO: NF4 weights as NNCF makes them, decoded and multiplied by the runtime's CPU plugin."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import NF4
from bnbref.conformance.backends import Backend, Unsupported, require
from bnbref.conformance.backends.blocks import code_rows, nf4_alone, pack, rows

_NAME = "nncf"


class OpenVINO:
    """Quantization by NNCF's function for one weight. OpenVINO has the first of two elements in the low nibble: the adapter
    exchanges them, as these bytes are not meant to be bitsandbytes'."""

    def __init__(self) -> None:
        self.nncf, self.ov = require("nncf"), require("openvino")
        folder = "nncf.quantization.algorithms.weight_compression"
        self.lowering: Any = importlib.import_module(f"{folder}.weight_lowering")
        self.config: Any = importlib.import_module(f"{folder}.config").WeightCompressionConfig
        self.tensor: Any = importlib.import_module("nncf.tensor").Tensor

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        nf4_alone(quant_type, _NAME)
        if x.dtype == torch.bfloat16:
            raise Unsupported("numpy has no bfloat16")
        blocks = rows(x, blocksize, _NAME).contiguous()
        config = self.config(self.nncf.CompressWeightsMode.NF4, blocksize)
        weight = self.tensor(self.ov.Tensor(blocks.numpy()))
        made = self.lowering.do_float_quantization(weight, config, reduction_axes=1)
        found = torch.from_numpy(made.tensor.as_numpy_tensor().data.astype("float32")).view(-1, 1)
        codes = (found - torch.tensor(NF4.values)).abs().argmin(-1)
        return pack(codes), torch.from_numpy(made.scale.as_numpy_tensor().data.astype("float32")).view(-1)

    def dequantize_4bit(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type, _NAME)
        if dtype != torch.float32:
            raise Unsupported("NNCF's decompression is judged in float32")
        codes = code_rows(packed, blocksize, torch.Size(shape).numel(), _NAME)
        y = self._run(self._weight(codes, absmax.view(-1, 1)))
        return y.reshape(shape)

    def gemm_4bit(
        self, a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int, quant_type: str,
        shape: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type, _NAME)
        if a.dtype != torch.float32 or bias is not None or shape[1] % blocksize:
            raise Unsupported("judged are products in float32 of blocks of a row, without a bias")
        codes = code_rows(packed, blocksize, torch.Size(shape).numel(), _NAME).view(shape[0], -1, blocksize)
        weight = self.ov.opset13.reshape(self._weight(codes, absmax.view(shape[0], -1, 1)), list(shape), False)
        given = self.ov.opset13.parameter(list(a.shape), self.ov.Type.f32)
        return self._run(self.ov.opset13.matmul(given, weight, False, True), given, a)

    def _weight(self, codes: Tensor, scale: Tensor) -> Any:
        """The nodes of a compressed weight: a constant of type nf4, converted, times its scales."""
        exchanged = pack(codes.view(-1, 2).flip(-1))
        constant = self.ov.op.Constant(
            self.ov.Tensor(exchanged.numpy(), list(codes.shape), self.ov.Type.nf4), shared_memory=False
        )
        ops = self.ov.opset13
        return ops.multiply(ops.convert(constant, "f32"), ops.constant(scale.numpy()))

    def _run(self, node: Any, parameter: Any = None, a: Tensor | None = None) -> Tensor:
        model = self.ov.Model([node], [] if parameter is None else [parameter], "weight")
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = _core().compile_model(model, "CPU", hints)
        found = compiled([] if a is None else [a.contiguous().numpy()])
        return torch.from_numpy(found[compiled.output(0)].copy())


@functools.cache
def _core() -> Any:
    return require("openvino").Core()


def backend(name: str) -> Backend:
    """NNCF and OpenVINO. Raises ValueError where one of them is not installed."""
    return Backend(name, OpenVINO(), ("nncf", "openvino"))
