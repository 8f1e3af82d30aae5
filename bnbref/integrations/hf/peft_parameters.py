"""LoRA on parameters that are quantized by themselves: peft's `target_parameters` on the experts of a mixture.

    LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])        as for a float model

Such a parameter is behind a parametrization (`bnbref.nn.parametrize`). In modules with parametrizations peft finds no parameter
by the end of its name, takes the values without the adapter from torch's cache, and merges into a temporary tensor. `adapt_peft`
of `bnbref.integrations.hf.peft` lets it find them, and gives them this wrapper. Merging is as it is for layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora, tuners_utils
from peft.tuners.lora import layer as lora_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnbref import int8
from bnbref.integrations.hf.peft_checks import WITHOUT_THE_WEIGHT
from bnbref.nn import Params4bit
from bnbref.nn.parametrize import quantized_in
from bnbref.nn.quantized_parameter import QuantizedParameter
from bnbref.quant_state import QuantState

__all__ = ["ParamWrapper", "added", "quantized"]


def added(weight: Any, deltas: list[Tensor]) -> QuantizedParameter:
    """A quantized weight and float tensors of its shape: one float32 sum, quantized like the weight.  Exact."""
    four_bit = isinstance(weight, Params4bit)
    state = weight.quant_state if four_bit else weight.SCB
    codes = weight.data
    total = state.dequantize(codes, torch.float32) if four_bit else int8.dequantize(codes, state, torch.float32)
    for delta in deltas:
        total = total + delta.detach().to(total)
    merged: Any = weight.unquantized(total).to(weight.device)
    if four_bit:
        merged.quant_state.dtype = state.dtype  # what the weight was before it was first quantized, as files record it
    return merged  # type: ignore[no-any-return]


class ParamWrapper(lora.ParamWrapper):  # type: ignore[misc]
    """peft's LoRA of one parameter of a module, where that parameter is quantized. peft asks for it by this name."""

    _before: tuple[Tensor, QuantState] | None = None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        if config.init_lora_weights not in WITHOUT_THE_WEIGHT:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} reads the weight of a layer: for {self.parameter_name!r} of "
                f"{type(self.get_base_layer()).__name__} it must be True, False, 'gaussian' or 'eva'"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def _steps(self) -> Any:
        """The ParametrizationList that runs when the parameter is read. None if the parameter was dequantized meanwhile."""
        return quantized(self.get_base_layer()).get(self.parameter_name)

    def get_param(self) -> Tensor:
        """The values without adapters: not from torch's cache, which the wrapper of another parameter has switched on."""
        steps = self._steps()
        return super().get_param() if steps is None else steps[0](steps.original)  # type: ignore[no-any-return]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        steps, adapters = self._steps(), [name for name in active_adapters if name in self.lora_A]
        if steps is None or not adapters:
            with super()._activate_lora(active_adapters):
                yield
            return
        if len(adapters) == 1 and self.num_experts > 1:
            step: nn.Module = lora_layer._LoraFactorsProxy(*self.get_delta_factors(adapters[0]))
        else:
            step = lora_layer._LoraParameterProxy(sum(map(self.get_delta_weight, adapters)))
        steps.append(step)
        try:
            with parametrize.cached():
                yield
        finally:
            del steps[-1]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the values, and quantize the sum. ValueError if it is not finite, whatever `safe_merge`."""
        steps = self._steps()
        if steps is None:
            super().merge(safe_merge, adapter_names)
            return
        new = [n for n in tuners_utils.check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not new:
            return
        if steps.original.is_meta:
            raise ValueError(
                f"{self.parameter_name!r} is offloaded: merge into a model that was loaded without offloading"
            )
        packed, state = before = self._before or (steps.original.data, steps[0].quant_state)
        deltas = [self.get_delta_weight(name) for name in [*self.merged_adapters, *new]]
        merged: Any = added(Params4bit.of_codes(packed, state), deltas)
        self._put(merged.data, merged.quant_state)
        self._before = before
        self.merged_adapters.extend(new)

    def unmerge(self) -> None:
        """The values as they were before merging, bit for bit."""
        if self._steps() is None or self._before is None:
            super().unmerge()
            return
        self._put(*self._before)
        self._before = None
        self.merged_adapters.clear()

    def _put(self, packed: Tensor, state: QuantState) -> None:
        steps = self._steps()
        device = steps.original.device
        steps.original.data = packed.to(device)
        steps[0].quant_state = state.map(lambda t: t.to(device))


def quantized(module: nn.Module) -> dict[str, Any]:
    """The parametrizations of a module's own parameters that are quantized, by name."""
    return {name: steps for name, steps, _ in quantized_in(module)}
