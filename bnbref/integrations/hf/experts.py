"""Mixtures of experts: one three-dimensional parameter holds the matrices of all experts.

No linear layer could replace it, so it is quantized as a parameter (`bnbref.nn.parametrize`): in blocks along its elements in
memory, and dequantized while its module runs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnbref.nn.parametrize import Bnb4bitParametrization, quantized_in, replace_parameter_4bit_prequantized
from bnbref.quant_state import QuantState


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the fused matrices of experts. transformers calls all such classes `...Experts`."""
    return "Experts" in type(module).__name__ and any(p.dim() == 3 for p in module.parameters(recurse=False))


def quantized_parameters(model: nn.Module) -> Iterator[tuple[str, Any, str, Bnb4bitParametrization]]:
    """(full name, module, name, parametrization) of every parameter that is quantized by itself."""
    for path, module in list(model.named_modules()):
        for name, _, step in list(quantized_in(module)):
            yield f"{path}.{name}" if path else name, module, name, step


def parametrize_experts(model: nn.Module, full_name: str, state: QuantState, dtype: torch.dtype) -> None:
    """Let a parameter that holds packed codes, or is offloaded, be read as its values in a dtype."""
    path, _, name = full_name.rpartition(".")
    module: Any = model.get_submodule(path)
    packed = getattr(module, name)
    if packed.is_meta:
        packed = torch.empty(state.code_bytes, 1, dtype=torch.uint8, device="meta")
    setattr(module, name, nn.Parameter(packed.detach(), requires_grad=False))
    replace_parameter_4bit_prequantized(module, name, state.as_dict(packed=True), device=packed.device)
    steps: Any = module.parametrizations[name]
    steps[0].quant_state, steps[0].dtype = state, dtype
    hook = getattr(module, "_hf_hook", None)
    if packed.is_meta and hook is not None:
        _offload(steps, name, hook)


def _offload(steps: nn.Module, name: str, hook: Any) -> None:
    """Let accelerate load the codes when they are read: they are not the module's own parameter any more."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hooks = getattr(hook, "hooks", [hook])
    old = next(hook for hook in hooks if getattr(hook, "weights_map", None) is not None)
    new = AlignDevicesHook(old.execution_device, offload=True, weights_map=_Renamed(old.weights_map, name))
    add_hook_to_module(steps, new)


def load_offloaded(model: nn.Module) -> dict[str, Tensor]:
    """The codes of the parameters that are offloaded, by full name."""
    found = {}
    for full_name, module, name, _ in quantized_parameters(model):
        steps: Any = module.parametrizations[name]
        if steps.original.is_meta:
            found[full_name] = steps._hf_hook.weights_map["original"]
    return found


class _Renamed(Mapping[str, Tensor]):
    """The map of offloaded weights that accelerate needs for a ParametrizationList, whose one weight is called `original`.

    weights: the map of the module that has the parametrization, where the weight is called `name`.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self.weights, self.name = weights, name

    def __getitem__(self, key: str) -> Tensor:
        if key != "original":
            raise KeyError(key)
        return self.weights[self.name]

    def __iter__(self) -> Iterator[str]:
        return iter(("original",))

    def __len__(self) -> int:
        return 1


def dequantize_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Make plain parameters of those that are quantized by themselves."""
    for full_name, module, name, step in quantized_parameters(model):
        if module.parametrizations[name].original.is_meta:
            raise ValueError(f"{full_name} is offloaded: load the model without offloading to dequantize it")
        step.dtype = dtype
        values = getattr(module, name).detach()
        # What torch takes away is a property of the class, which a deep copy of the model shares.
        cls = type(module)
        module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, nn.Parameter(values))
