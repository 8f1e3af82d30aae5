"""peft on quantized layers: LoRA that trains, merges and unmerges, without bitsandbytes.

    config = register_lora(LoraConfig(...))
    model = get_peft_model(model, config)                                     train, save_pretrained(path)
    PeftModel.from_pretrained(model, path, config=register_lora(LoraConfig.from_pretrained(path)))

peft does not save what is registered, so a config that is loaded is registered again. A config that is not registered trains
the same adapter on the same layer; it cannot merge it, and says so.

Merging is one rounding: the float32 sum of the dequantized weight and the adapters' B A is quantized as the weight was.
The error is that of quantizing any weight; a delta that is smaller than the steps of the grid is lost, so that a merged model
is worse than the same model with its adapter beside it. Unmerging is exact: the weight that was there comes back.

peft's `prepare_model_for_kbit_training` works as it is.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from bnbref.integrations.hf.peft_checks import WITHOUT_THE_WEIGHT
from bnbref.integrations.hf.peft_parameters import adapt_peft, added
from bnbref.nn import Linear4bit, Linear8bitLt
from bnbref.nn.quantized_layer import QuantizedLayer

__all__ = ["LoraLinear", "register_lora"]


class LoraLinear(lora.Linear):  # type: ignore[misc]
    """peft's LoRA of a linear layer, on a layer of bnbref's: see the head of this file."""

    merges_quantized = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # a quantized Conv1D of GPT-2 is an ordinary linear layer
        self._before: tuple[Any, Any] | None = None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter."""
        if config.use_dora or config.init_lora_weights not in WITHOUT_THE_WEIGHT:
            what = "use_dora=True" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
            raise ValueError(
                f"{what} reads weights through bitsandbytes: on bnbref's layers it needs the alias for that"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight, and quantize the sum. ValueError if it is not finite, whatever `safe_merge`."""
        if not isinstance(self.get_base_layer(), QuantizedLayer):  # dequantized meanwhile
            super().merge(safe_merge, adapter_names)
            return
        base: Any = self.get_base_layer()
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not new:
            return
        if base.weight.is_meta:
            raise ValueError(f"{base} is offloaded: merge adapters into a model that was loaded without offloading")
        adapters = [*self.merged_adapters, *new]
        biases = [self.lora_B[name].bias * self.scaling[name] for name in adapters if self.lora_bias[name]]
        if biases and base.bias is None:
            raise ValueError(f"lora_bias=True, but {base} has no bias to merge the adapter's into")
        bias: Any = None if base.bias is None else base.bias.detach().clone()
        weight, bias = self._before or (base.weight, bias)
        base.weight = added(weight, [self.get_delta_weight(name) for name in adapters])
        if biases:
            base.bias.data = bias + torch.stack(biases).sum(0).detach()
        self._before = (weight, bias)
        self.merged_adapters.extend(new)

    def unmerge(self) -> None:
        """The weight as it was before merging, bit for bit."""
        if not isinstance(self.get_base_layer(), QuantizedLayer) or self._before is None:
            super().unmerge()
            return
        base: Any = self.get_base_layer()
        weight, bias = self._before
        base.weight = weight.to(base.weight.device)
        if bias is not None:
            base.bias.data = bias.to(base.weight.device)
        self._before = None
        self.merged_adapters.clear()


def register_lora(config: LoraConfig) -> LoraConfig:
    """Let LoRA of this config treat bnbref's layers as what they are; returns the config.

    Through peft's hook for custom layers, which it calls experimental.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}: other tuners need the alias")
    config._register_custom_module({Linear4bit: LoraLinear, Linear8bitLt: LoraLinear})
    return config


adapt_peft()
