"""The kernels in torch that bitsandbytes falls back to, where the device has others too."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from bnbref.conformance.backends import Unsupported
from bnbref.conformance.backends.bitsandbytes import BitsAndBytes


def _default_kernels() -> dict[str, Callable[..., Any]]:
    """Runs the module of the default kernels anew and keeps what it would register: on a CPU others shadow them."""
    registry: Any = importlib.import_module("bitsandbytes._ops")
    name = "bitsandbytes.backends.default.ops"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ValueError(f"this bitsandbytes has no {name}: backend 'bitsandbytes-default' is for 0.46 and later")
    kernels: dict[str, Callable[..., Any]] = {}

    def record(name: str, key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def keep(kernel: Callable[..., Any]) -> Callable[..., Any]:
            kernels[name.partition("::")[2]] = kernel
            return kernel

        return keep

    register, registry.register_kernel = registry.register_kernel, record
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    finally:
        registry.register_kernel = register
    return kernels


class BitsAndBytesDefault(BitsAndBytes):
    """The operations whose default kernels reach no other operator: those give the device's own kernels."""

    gemm_4bit = quantize_4bit_nested = dequantize_4bit_nested = save_4bit = load_4bit = None  # type: ignore[assignment]
    gemm_4bit_backward = int8_backward = evaluate_then_train = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.kernels = _default_kernels()

    def op(self, name: str, *args: Any) -> Any:
        if name not in self.kernels:
            raise Unsupported(f"bitsandbytes has no default kernel {name}")
        return self.kernels[name](*args)
