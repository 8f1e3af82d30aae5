"""ONNX Runtime on a CPU: the quantizer `MatMulBnb4Quantizer`, and the operator `MatMulBnb4` of the domain com.microsoft."""

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Unsupported, require

_TYPES = {"fp4": 0, "nf4": 1}
_BLOCKSIZES = (16, 32, 64, 128, 256)


class OnnxRuntime:
    """Quantization by the quantizer's function; a weight is dequantized by the product with an identity, which rounds nothing."""

    packages = ("onnxruntime",)

    def __init__(self) -> None:
        self.quantizer: Any = importlib.import_module(
            "onnxruntime.quantization.matmul_bnb4_quantizer"
        ).MatMulBnb4Quantizer

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        _offered(x.dtype, blocksize)
        quantizer = self.quantizer(require("onnx").ModelProto(), _TYPES[quant_type], blocksize)
        # The quantizer is given weights as products have them, and transposes.
        packed, absmax = quantizer.bnb4_block_quant(x.reshape(1, -1).t().numpy())
        return torch.from_numpy(packed), torch.from_numpy(absmax).float()

    def dequantize_4bit(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        n, k = math.prod(shape[:-1]), shape[-1]
        _offered(dtype, blocksize)
        return self._multiply(torch.eye(k, dtype=dtype), packed, absmax, n, k, blocksize, quant_type).t().reshape(shape)

    def gemm_4bit(
        self, a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int, quant_type: str,
        shape: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        _offered(a.dtype, blocksize)
        if bias is not None:
            raise Unsupported("MatMulBnb4 has no bias")
        return self._multiply(a, packed, absmax, *shape, blocksize, quant_type)

    def _multiply(
        self, a: Tensor, packed: Tensor, absmax: Tensor, n: int, k: int, blocksize: int, quant_type: str
    ) -> Tensor:
        if a.dtype != torch.float32:
            raise Unsupported("MatMulBnb4 of a CPU takes float32")
        session = _session(n, k, blocksize, _TYPES[quant_type])
        given = {"a": a.contiguous().numpy(), "packed": packed.numpy(), "absmax": absmax.numpy()}
        return torch.from_numpy(session.run(None, given)[0])


def _offered(dtype: torch.dtype, blocksize: int) -> None:
    if dtype == torch.bfloat16:
        raise Unsupported("numpy, and so the quantizer, has no bfloat16")
    if blocksize not in _BLOCKSIZES:
        raise Unsupported(f"ONNX Runtime has blocksizes {_BLOCKSIZES}, got {blocksize}")


@functools.lru_cache(maxsize=64)
def _session(n: int, k: int, block_size: int, quant_type: int) -> Any:
    """A model of one node."""
    onnx, runtime = require("onnx"), require("onnxruntime")
    kind, make = onnx.TensorProto, onnx.helper
    node = make.make_node("MatMulBnb4", ["a", "packed", "absmax"], ["y"], domain="com.microsoft",
                          K=k, N=n, block_size=block_size, quant_type=quant_type)  # fmt: skip
    inputs = [
        ("a", kind.FLOAT, None),
        ("packed", kind.UINT8, [(n * k + 1) // 2]),
        ("absmax", kind.FLOAT, [-(-n * k // block_size)]),
    ]
    infos = [make.make_tensor_value_info(*info) for info in inputs]
    graph = make.make_graph([node], "product", infos, [make.make_tensor_value_info("y", kind.FLOAT, None)])
    opsets = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
