"""A linear layer of a model, the quantized one in its place, and the plain one of that: `nn.Linear`, or GPT-2's Conv1D."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bnbref import int8
from bnbref.codebooks import FOUR_BIT
from bnbref.integrations.hf.config import BnbRefConfig
from bnbref.nn import Linear4bit, Linear8bitLt
from bnbref.nn.quantized_layer import QuantizedLayer
from bnbref.quant_state import present


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be replaced: an nn.Linear, a Conv1D, or a subclass that does no more.

    torch's own subclasses are for modules that read their weight and never call them, such as nn.MultiheadAttention.
    """
    if type(module) is nn.Linear or isinstance(module, Conv1D):
        return True
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("torch.") and _only_linear(module)


def _only_linear(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear computes x W^T + b and nothing else.

    It is tried on a small weight: by integers, whose products are exact in any order, in two dtypes and both modes. What
    has other parameters, buffers, modules or hooks, what needs another shape, and what returns anything else is not.
    """
    extra = module._parameters.keys() - {"weight", "bias"}
    if extra or module._buffers or module._modules or module._forward_hooks or module._forward_pre_hooks:
        return False
    probe: Any = object.__new__(type(module))
    with torch.device("cpu"):
        for dtype, training in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            weight = torch.tensor([[1, -2, 3, 5], [-7, 4, 0, 2], [6, 1, -1, -3]], dtype=dtype)
            bias = None if module.bias is None else torch.tensor([8, -5, 3], dtype=dtype)
            x = torch.tensor([[[2, -1, 0, 3], [-4, 5, 1, 7]]], dtype=dtype)
            probe.__dict__ = module.__dict__ | {"in_features": 4, "out_features": 3, "training": training}
            probe._parameters = {"weight": weight, "bias": bias}
            want = F.linear(x, weight, bias)
            try:
                found = type(module).forward(probe, x)
            except Exception:  # a stranger's code: whatever it raises, on this weight it does not compute x W^T + b
                return False
            if not isinstance(found, Tensor) or found.dtype != dtype or not torch.equal(found, want):
                return False
    return True


def features(module: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features  # type: ignore[return-value]


def quantized_layer(linear: Any, spec: BnbRefConfig, in_8_bits: bool) -> QuantizedLayer:
    """The quantized layer in place of a linear one: no weight yet (meta), the same bias."""
    shape = (*features(linear), linear.bias is not None)
    layer: Any
    if in_8_bits:
        layer = Linear8bitLt(*shape, has_fp16_weights=False, threshold=float(spec.threshold), device="meta")
    else:
        layer = Linear4bit(
            *shape,
            spec.compute_dtype,
            compress_statistics=spec.double_quant,
            quant_type=next(iter(FOUR_BIT)) if spec.is_int8 else spec.quant_type,
            quant_storage=spec.quant_storage,
            device="meta",
        )
        layer.weight.blocksize = spec.blocksize
    layer.bias = linear.bias
    layer.source_cls = type(linear)
    return layer.train(linear.training).requires_grad_(False)  # type: ignore[no-any-return]


def plain_layer(layer: Any, weight: Tensor | None = None) -> nn.Module:
    """The layer that a quantized one replaced: the same bias, and `weight` [out, in], or none yet (meta)."""
    n, k = layer.out_features, layer.in_features
    plain: Any
    with torch.device("meta"):
        plain = Conv1D(n, k) if was_conv1d(layer) else nn.Linear(k, n)
    if weight is not None:
        plain.weight = nn.Parameter(weight.t().contiguous() if isinstance(plain, Conv1D) else weight)
    elif layer.weight.is_floating_point():
        plain = plain.to(layer.weight.dtype)
    plain.bias = layer.bias
    return plain.train(layer.training)  # type: ignore[no-any-return]


def was_conv1d(layer: nn.Module) -> bool:
    """Whether a quantized layer replaced a Conv1D, whose float weight is stored transposed."""
    return issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)


def dequantized(name: str, layer: Any, dtype: torch.dtype) -> nn.Module:
    """The plain layer of the values of a quantized one, with its hooks of accelerate."""
    weight: Tensor = layer.weight
    if weight.is_meta:
        raise ValueError(f"{name} is offloaded: load the model without offloading to dequantize it")
    if isinstance(layer, Linear4bit):
        new = plain_layer(layer, present(layer.quant_state, "quant_state").dequantize(weight, dtype))
    else:
        new = plain_layer(layer, int8.dequantize(weight, layer.state.SCB, dtype))
    hook = layer.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(layer)
        add_hook_to_module(new, hook)
    return new
