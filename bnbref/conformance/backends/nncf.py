"""OpenVINO: NF4 weights as NNCF makes them, decoded and multiplied by the runtime's CPU plugin."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import NF4
from bnbref.conformance.backends import Unsupported, require
from bnbref.conformance.backends.blocks import code_rows, nf4_alone, pack, rows


class OpenVINO:
    """Quantization by NNCF's function for one weight. OpenVINO has the first of two elements in the low nibble: the adapter
    exchanges them, as these bytes are not meant to be bitsandbytes'."""

    packages = ("nncf", "openvino")

    def __init__(self) -> None:
        self.nncf, self.ov = require("nncf"), require("openvino")
        folder = "nncf.quantization.algorithms.weight_compression"
        self.lowering: Any = importlib.import_module(f"{folder}.weight_lowering")
        self.config: Any = importlib.import_module(f"{folder}.config").WeightCompressionConfig
        self.tensor: Any = importlib.import_module("nncf.tensor").Tensor

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        nf4_alone(quant_type)
        if x.dtype == torch.bfloat16:
            raise Unsupported("numpy has no bfloat16")
        blocks = rows(x, blocksize).contiguous()
        config = self.config(self.nncf.CompressWeightsMode.NF4, blocksize)
        weight = self.tensor(self.ov.Tensor(blocks.numpy()))
        made = self.lowering.do_float_quantization(weight, config, reduction_axes=1)
        found = torch.from_numpy(made.tensor.as_numpy_tensor().data.astype("float32")).view(-1, 1)
        codes = (found - torch.tensor(NF4.values)).abs().argmin(-1)
        return pack(codes), torch.from_numpy(made.scale.as_numpy_tensor().data.astype("float32")).view(-1)

    def dequantize_4bit(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type)
        if dtype != torch.float32:
            raise Unsupported("NNCF's decompression is judged in float32")
        codes = code_rows(packed, blocksize, torch.Size(shape).numel())
        return self._compiled(self._weight(codes, absmax.view(-1, 1)), [])([]).reshape(shape)

    def gemm_4bit(
        self, a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int, quant_type: str,
        shape: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type)
        if a.dtype != torch.float32 or bias is not None or shape[1] % blocksize:
            raise Unsupported("judged are products in float32 of blocks of a row, without a bias")
        codes = code_rows(packed, blocksize, torch.Size(shape).numel()).view(shape[0], -1, blocksize)
        return self._product(codes, absmax.view(shape[0], -1, 1), list(a.shape))(a)

    def product_of_ones(self, n: int, k: int) -> Any:
        """A product with a weight of ones that is compiled once for each number of rows."""
        blocks = (n, k // 64, 64)
        made = functools.cache(
            lambda rows: self._product(torch.full(blocks, 15), torch.ones(*blocks[:2], 1), [rows, k])
        )

        def multiply(a: Tensor) -> Tensor:
            if a.dtype != torch.float32:
                raise Unsupported("judged are products in float32")
            return made(len(a))(a)

        return multiply

    def _product(self, codes: Tensor, scale: Tensor, shape: list[int]) -> Callable[[Tensor], Tensor]:
        """The product of activations of a shape with a weight, from its codes `[rows, blocks, blocksize]`."""
        weight = self.ov.opset13.reshape(self._weight(codes, scale), [len(codes), shape[-1]], False)
        given = self.ov.opset13.parameter(shape, self.ov.Type.f32)
        run = self._compiled(self.ov.opset13.matmul(given, weight, False, True), [given])
        return lambda a: run([a.contiguous().numpy()])

    def _weight(self, codes: Tensor, scale: Tensor) -> Any:
        """The nodes of a compressed weight: a constant of type nf4, converted, times its scales."""
        exchanged = pack(codes.view(-1, 2).flip(-1))
        constant = self.ov.op.Constant(
            self.ov.Tensor(exchanged.numpy(), list(codes.shape), self.ov.Type.nf4), shared_memory=False
        )
        ops = self.ov.opset13
        return ops.multiply(ops.convert(constant, "f32"), ops.constant(scale.numpy()))

    def _compiled(self, node: Any, parameters: list[Any]) -> Callable[[list[Any]], Tensor]:
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = _core().compile_model(self.ov.Model([node], parameters, "weight"), "CPU", hints)
        return lambda inputs: torch.from_numpy(compiled(inputs)[compiled.output(0)].copy())


@functools.cache
def _core() -> Any:
    return require("openvino").Core()
