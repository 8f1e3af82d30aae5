"""The real bitsandbytes: its operators, whatever kernel the device has for them, and its public functions and layers."""

import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import require
from bnbref.conformance.backends.public_names import PublicNames


class BitsAndBytes(PublicNames):
    """Every operation, by torch.ops.bitsandbytes where there is an operator."""

    packages = ("bitsandbytes",)

    @staticmethod
    def within() -> Any:
        """Where a kernel falls back to torch code, bitsandbytes compiles it anew for every shape: minutes, the same results."""
        return torch.compiler.set_stance("force_eager")

    def __init__(self) -> None:
        super().__init__(require("bitsandbytes"))

    def op(self, name: str, *args: Any) -> Any:
        return getattr(torch.ops.bitsandbytes, name).default(*args)

    def quantize_blockwise(self, x: Tensor, values: Tensor, blocksize: int) -> Any:
        return self.op("quantize_blockwise", x, values, blocksize)

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Any:
        return self.op("dequantize_blockwise", codes, absmax, values, blocksize, dtype)

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> Any:
        packed, absmax = self.op("quantize_4bit", x, blocksize, quant_type, torch.uint8)
        return packed.view(-1), absmax

    def dequantize_4bit(self, packed: Tensor, absmax: Tensor, **k: Any) -> Any:
        names = ("blocksize", "quant_type", "shape", "dtype")
        return self.op("dequantize_4bit", packed.view(-1, 1), absmax, *(k[name] for name in names))

    def gemm_4bit(self, a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, **k: Any) -> Any:
        return self.op("gemm_4bit", a, packed.view(-1, 1), k["shape"], absmax, k["blocksize"], k["quant_type"], bias)

    def int8_quantize(self, x: Tensor, threshold: float) -> Any:
        codes, absmax, columns = self.op("int8_vectorwise_quant", x, threshold)
        return codes, absmax, torch.empty(0, dtype=torch.int64) if columns is None else columns

    def int8_matmul(self, a: Tensor, b: Tensor) -> Any:
        return self.op("int8_linear_matmul", a, b)

    def int8_mm_dequant(
        self, product: Tensor, row: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Any:
        return self.op("int8_mm_dequant", product, row, column, dtype, bias)

    def int8_dequantize(self, codes: Tensor, absmax: Tensor) -> Any:
        return self.op("int8_vectorwise_dequant", codes, absmax)

    def optimizer_32bit(self, p: Tensor, g: Tensor, optimizer: str, max_unorm: float, **k: Any) -> dict[str, Any]:
        # As its classes do, here and below: what is not contiguous is made so.
        p, g = p.clone(memory_format=torch.contiguous_format), g.contiguous()
        first, second = _stacked(k["state1"], k["state3"]), _copy(k["state2"])
        norm = float(p.float().norm()) if max_unorm > 0 else 0.0
        room = torch.zeros(1, device=p.device) if max_unorm > 0 else None
        self.op("optimizer_update_32bit", optimizer, g, p, first, second, room, max_unorm, norm, k["beta1"], k["beta2"],
                k["beta3"], k["alpha"], k["eps"], k["weight_decay"], k["step"], k["lr"], k["gnorm_scale"], False)  # fmt: skip
        return {"p": p, **_unstacked(first, second, k["state3"], "state")}

    def optimizer_8bit(self, p: Tensor, g: Tensor, optimizer: str, **k: Any) -> dict[str, Any]:
        # LAMB8bit and LARS8bit leave max_unorm out, for which the operator has no argument.
        p, g = p.clone(memory_format=torch.contiguous_format), g.contiguous()
        first, scale1 = _stacked(k["state1"], k["state3"]), _stacked(k["absmax1"], k["absmax3"])
        second, scale2 = _copy(k["state2"]), _copy(k["absmax2"])
        self.op("optimizer_update_8bit_blockwise", optimizer, g, p, first, second, k["beta1"], k["beta2"], k["beta3"],
                k["alpha"], k["eps"], k["step"], k["lr"], k["values1"], k["values2"], scale1, scale2, k["weight_decay"],
                k["gnorm_scale"], False)  # fmt: skip
        states = _unstacked(first, second, k["state3"], "state")
        return {"p": p, **states, **_unstacked(scale1, scale2, k["absmax3"], "absmax")}


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _stacked(first: Tensor, third: Tensor | None) -> Tensor:
    """A copy; bitsandbytes has AdEMAMix' two averages in one tensor."""
    return first.clone() if third is None else torch.stack((first, third))


def _unstacked(first: Tensor, second: Tensor | None, third: Tensor | None, name: str) -> dict[str, Tensor]:
    made = {f"{name}1": first if third is None else first[0]}
    made |= {} if second is None else {f"{name}2": second}
    return made | ({} if third is None else {f"{name}3": first[1]})


class Fork(BitsAndBytes):
    """The package bitsandbytes-cpu-fork, which is imported as `bitsandbytes`, too."""

    def __init__(self) -> None:
        if "bitsandbytes-cpu-fork" not in importlib.metadata.packages_distributions().get("bitsandbytes", ()):
            raise ValueError("backend 'bitsandbytes-cpu-fork' needs the package of that name, which is not installed")
        super().__init__()
