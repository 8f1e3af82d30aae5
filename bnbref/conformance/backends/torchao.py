"""torchao's optimizers: the blockwise 8 bits, and AdamW with them. (Its NF4 tensor left the package before 0.18.)"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Unsupported
from bnbref.conformance.backends.blocks import rows
from bnbref.conformance.oracles.steps import BLOCKSIZE


class TorchAO:
    """The operations that torchao has: codes in blocks, and AdamW with states in 32 and in 8 bits."""

    packages = ("torchao",)

    def __init__(self) -> None:
        self.quant: Any = importlib.import_module("torchao.optim.quant_utils")
        self.adam: Any = importlib.import_module("torchao.optim.adam")
        self.state: Any = importlib.import_module("torchao.optim.subclass_8bit")

    def quantize_blockwise(self, x: Tensor, values: Tensor, blocksize: int) -> Any:
        rows(x, blocksize)
        # Optimizer states are float32, and contiguous.
        scaled, absmax = self.quant.scale_tensor(x.float().contiguous(), blocksize)
        return self.quant.quantize_8bit_with_qmap(scaled, values), absmax

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Any:
        rows(codes, blocksize)
        return self.quant.dequant_with_qmap(codes, values, absmax).to(dtype)

    def optimizer_32bit(self, p: Tensor, g: Tensor, **k: Any) -> dict[str, Any]:
        made = {"p": p.clone(), "state1": k["state1"].clone(), "state2": _second(k, "state2")}
        self._adamw(made["p"], g, made["state1"], made["state2"], k)
        return made

    def optimizer_8bit(self, p: Tensor, g: Tensor, **k: Any) -> dict[str, Any]:
        rows(p, BLOCKSIZE)
        p, codes2, absmax2 = p.clone(), _second(k, "state2"), _second(k, "absmax2")
        first = self.state.OptimState8bit(k["state1"].clone(), k["absmax1"].clone(), k["values1"], True)
        second = self.state.OptimState8bit(codes2, absmax2, k["values2"], False)
        self._adamw(p, g, first, second, k)
        return {"p": p, "state1": first.codes, "absmax1": first.scale, "state2": second.codes, "absmax2": second.scale}

    def _adamw(self, p: Tensor, g: Tensor, first: Tensor, second: Tensor, k: Mapping[str, Any]) -> None:
        if k["gnorm_scale"] != 1:
            raise Unsupported("torchao's step does not scale the gradient")
        step, lr = (torch.tensor(float(k[name]), device=p.device) for name in ("step", "lr"))
        self.adam.single_param_adam(p, g, step, first, second, None, lr, k["beta1"], k["beta2"], k["weight_decay"], k["eps"],
                                    IS_ADAMW=True, BF16_STOCHASTIC_ROUND=False)  # fmt: skip


def _second(k: Mapping[str, Any], name: str) -> Tensor:
    """A copy of Adam's second state, or of its scales. Raises Unsupported for another optimizer."""
    if k["optimizer"] != "adam":
        raise Unsupported("torchao has Adam")
    copy: Tensor = k[name].clone()
    return copy
