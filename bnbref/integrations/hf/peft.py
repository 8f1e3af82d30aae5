"""peft on quantized layers: LoRA that trains, merges and unmerges, without bitsandbytes.

    model = get_peft_model(model, LoraConfig(...))                            train, save_pretrained(path)
    PeftModel.from_pretrained(model, path)

It is enough that bnbref's quantizer has loaded the model, or that this module was imported before the adapter was made. An
adapter that was made before trains the same on the same layer; it cannot be merged, and says so.

Merging is one rounding: the float32 sum of the dequantized weight and the adapters' B A is quantized as the weight was.
The error is that of quantizing any weight; a delta that is smaller than the steps of the grid is lost, so that a merged model
is worse than the same model with its adapter beside it. Unmerging is exact: the weight that was there comes back.

peft's `prepare_model_for_kbit_training` works as it is.
"""

import copy
import functools
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners import lora, tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from bnbref.integrations.hf.peft_checks import WITHOUT_THE_WEIGHT, check_merge, check_targets, ends_with
from bnbref.integrations.hf.peft_parameters import ParamWrapper, added, quantized
from bnbref.nn import Linear4bit, Linear8bitLt
from bnbref.nn.quantized_layer import QuantizedLayer

__all__ = ["LoraLinear", "adapt_peft", "register_lora"]


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
                f"{what} reads weights through bitsandbytes: call bnbref.install_as_bitsandbytes() at the start of the "
                f"program, or dequantize the model first"
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
        base.weight = added(weight, [self._change(name) for name in adapters])
        if biases:
            base.bias.data = bias + torch.stack(biases).sum(0).detach()
        self._before = (weight, bias)
        self.merged_adapters.extend(new)

    def _change(self, adapter_name: str) -> torch.Tensor:
        """What an adapter adds to the weight. ValueError if it adds something else to every input."""
        variant = self.lora_variant.get(adapter_name)
        if variant is None:
            return self.get_delta_weight(adapter_name)  # type: ignore[no-any-return]
        nothing = torch.zeros(self.out_features, self.in_features, device=self.lora_A[adapter_name].weight.device)
        try:
            return variant.merge_safe(self, adapter_name, nothing)  # type: ignore[no-any-return]
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:  # what peft raises where a variant cannot be merged
            raise ValueError(f"{adapter_name!r} cannot be merged into {self.get_base_layer()}: {error}") from error

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
    """Makes peft know the layers of bnbref, and returns the config unchanged. TypeError for the config of another tuner.

    To import this function is enough: peft then wraps bnbref's layers in `LoraLinear`. Where bnbref's quantizer has loaded the
    model, peft does so without it.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"config must be a peft.LoraConfig, got {type(config).__name__}: for other tuners call "
            "bnbref.install_as_bitsandbytes() at the start of the program"
        )
    return config


# ---- what is changed in peft ----------------------------------------------------------------------------------------


@functools.cache
def adapt_peft() -> None:
    """Let peft's LoRA wrap bnbref's layers and the parameters that are quantized by themselves; refuse what reads codes. Once."""
    base = tuners_utils.BaseTuner
    base.inject_adapter, base._check_merge_allowed = _checking(base.inject_adapter, base._check_merge_allowed)
    tuners_utils.BaseTuner._inject_parameters = _finding(tuners_utils.BaseTuner._inject_parameters)
    lora_model.dispatch_default = _wrapping(lora_model.dispatch_default)


def _checking(inject: Any, merge_allowed: Any) -> tuple[Any, Any]:
    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_targets(self, model, self.peft_config[adapter_name])
        inject(self, model, adapter_name, *args, **kwargs)

    @functools.wraps(merge_allowed)
    def check_merge_allowed(self: Any) -> None:
        merge_allowed(self)
        check_merge(self)

    return inject_adapter, check_merge_allowed


def _wrapping(original: Any) -> Any:
    @functools.wraps(original)
    def dispatch(target: Any, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if isinstance(base, QuantizedLayer) and parameter_name == "weight":
            name = kwargs.get("target_name")
            raise ValueError(
                f"target_parameters: {name} is the packed weight of {base}: name the layer in target_modules"
            )
        if parameter_name is None and isinstance(base, (Linear4bit, Linear8bitLt)):
            return LoraLinear(target, adapter_name, config=config, **kwargs)
        wrap = ParamWrapper if parameter_name in quantized(base) else original
        return wrap(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)

    return dispatch


def _finding(original: Any) -> Any:
    """`BaseTuner._inject_parameters` that finds quantized parameters, too."""

    @functools.wraps(original)
    def inject(self: Any, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> list[str]:
        """Parameters of modules of which one is quantized, in the order of their wrappers; then all others."""
        targets = set(peft_config.target_parameters)
        modules = {path: module for path, module in model.named_modules() if quantized(module)}
        found: list[tuple[str, str, str]] = []
        for path, module in modules.items():
            own = [*module.parametrizations, *(name for name, _ in module.named_parameters(recurse=False))]
            found += [(path, name, f"{path.replace('.base_layer', '')}.{name}") for name in own]
        found = [(path, name, key) for path, name, key in found if ends_with(key, targets)]
        for path, name, key in found:
            parent, target, target_name = tuners_utils._get_submodules(model, path)
            wrapped = model.get_submodule(key.removesuffix(f".{name}"))
            while isinstance(wrapped, lora.ParamWrapper) and wrapped.parameter_name != name:
                wrapped = wrapped.base_layer
            self._check_target_module_compatiblity(peft_config, model, target_name)
            target = wrapped if isinstance(wrapped, lora.ParamWrapper) else target
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config, adapter_name, target, target_name, parent, current_key=key, parameter_name=name
                )
        others = copy.copy(peft_config)
        others.target_parameters = sorted(targets - {f"{path}.{name}" for path, name, _ in found})
        names = [key for _, _, key in found]
        names += original(
            self, peft_config=others, model=model, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        return names

    return inject


adapt_peft()
