"""tinygrad's NF4, a function of its example `examples/llama3.py`, which the package on PyPI does not have.

The environment variable TINYGRAD names a folder with tinygrad's repository; the function `NF4Linear` of the example is run as it
stands there, without the rest of the file, which needs a tokenizer.
"""

import ast
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Unsupported, require
from bnbref.conformance.backends.blocks import nf4_alone, rows


class TinyGrad:
    """Codes and scales, and products. Weights and scales are float16, which is what the layer makes of everything."""

    packages = ("tinygrad",)

    def __init__(self) -> None:
        self.tinygrad = require("tinygrad")
        example = Path(os.environ.get("TINYGRAD", "")) / "examples" / "llama3.py"
        if not example.is_file():
            raise ValueError(f"backend 'tinygrad' needs the environment variable TINYGRAD, a folder with {example}")
        tree = ast.parse(example.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "NF4Linear"]
        names: dict[str, Any] = {"Tensor": self.tinygrad.Tensor, "dtypes": self.tinygrad.dtypes}
        exec(compile(tree, str(example), "exec"), names)
        self.linear = names["NF4Linear"]

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        nf4_alone(quant_type)
        weight = self._tinygrad(rows(x, blocksize))
        made = self.linear(blocksize).quantize({"output.feed_forward.weight": weight}, None, scale_dtype=weight.dtype)
        packed, scale = (made[f"output.feed_forward.{name}"].numpy() for name in ("weight", "scale"))
        return torch.from_numpy(packed.copy()), torch.from_numpy(scale.astype("float32")).view(-1)

    def gemm_4bit(
        self, a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int, quant_type: str,
        shape: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        nf4_alone(quant_type)
        n, k = shape
        if bias is not None or n * k % blocksize:
            raise Unsupported("tinygrad's layer has no bias, and whole blocks")
        layer = self.linear(blocksize)(k, n)
        layer.weight, layer.scale = self._tinygrad(packed), self._tinygrad(absmax.half().view(-1, 1))
        y = layer(self._tinygrad(a)).cast(self.tinygrad.dtypes.float32).numpy()
        return torch.from_numpy(y.copy()).to(a.dtype)

    def _tinygrad(self, x: Tensor) -> Any:
        if x.dtype == torch.bfloat16:
            raise Unsupported("numpy has no bfloat16")
        return self.tinygrad.Tensor(x.contiguous().numpy())
