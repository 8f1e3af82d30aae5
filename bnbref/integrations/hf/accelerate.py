"""What accelerate does with a part of a quantized weight: refused when it is loaded, left out when adapters are saved.

`load_checkpoint_and_dispatch` with a device_map sets one tensor of a file at a time.
A quantized weight is several tensors. So accelerate would cast the floats of a file to codes, keep the old scales beside new
codes, or fail at the name of the scales. It is refused here before a quantized weight is changed. Without a device_map
accelerate calls `load_state_dict`, which reads a quantized weight whole.

Under FSDP2 a full state dict of adapters lacks the frozen weights, and has their scales, which are no parameters. torch cannot
load it: it looks for the scales among parameters. So they are left out, too.
"""

import functools
from typing import Any

from torch import Tensor, nn

from bnbref.nn.quantized_layer import QuantizedLayer
from bnbref.nn.quantized_parameter import QuantizedParameter


def layer_of(model: nn.Module, name: str) -> Any:
    """The quantized layer whose weight, or what is beside it, has this name in a state dict. None if there is none.

    >>> from bnbref.nn import Linear4bit
    >>> type(layer_of(nn.Sequential(Linear4bit(8, 8)), "0.weight.absmax")).__name__
    'Linear4bit'
    """
    module: Any = model
    rest = name
    while "." in rest and not isinstance(module, QuantizedLayer):
        part, _, rest = rest.partition(".")
        module = getattr(module, part, None)
    return module if isinstance(module, QuantizedLayer) and module._is_of_weight(rest) else None


def whole(original: Any) -> Any:
    """accelerate's `set_module_tensor_to_device`, which raises ValueError where it would set a part of a quantized weight."""

    @functools.wraps(original)
    def set_module_tensor_to_device(
        module: nn.Module, tensor_name: str, device: Any, value: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        layer = None if value is None else layer_of(module, tensor_name)  # without a value the whole weight is moved
        if layer is not None and isinstance(layer.weight, QuantizedParameter):
            # accelerate passes the scales of int8 codes with them, if its file has them.
            codes = isinstance(value, Tensor) and not value.is_floating_point()
            alone = codes and kwargs.get("fp16_statistics") is None
            held = layer.weight.holds_codes()
            if held or alone:
                what = "a part of a quantized weight" if held else "codes whose scales accelerate has not found"
                raise ValueError(
                    f"{tensor_name} is {what}, which cannot be set by itself: call load_checkpoint_and_dispatch without "
                    f"device_map, or from_pretrained with it"
                )
        original(module, tensor_name, device, value, *args, **kwargs)

    return set_module_tensor_to_device


def without_scales(original: Any) -> Any:
    """accelerate's `_get_model_state_dict`. If adapters are asked for, the scales of weights that it leaves out are left out."""

    @functools.wraps(original)
    def get_model_state_dict(model: nn.Module, adapter_only: bool = False, **kwargs: Any) -> Any:
        state = original(model, adapter_only=adapter_only, **kwargs)
        if not adapter_only:
            return state
        layers = {name: layer_of(model, name) for name in state}
        whole = {id(layer) for name, layer in layers.items() if name.rpartition(".")[2] == "weight"}
        return {name: value for name, value in state.items() if layers[name] is None or id(layers[name]) in whole}

    return get_model_state_dict


@functools.cache
def adapt_accelerate() -> None:
    """Let accelerate treat quantized weights as wholes when it loads a checkpoint, and when it saves adapters. Once."""
    # accelerate.hooks, which moves weights that are offloaded, has its own reference to the function, which stays as it is.
    from accelerate.utils import fsdp_utils, modeling

    # Not a public function: where an accelerate has none, such a state dict is refused by torch when it is loaded, as it was.
    if hasattr(fsdp_utils, "_get_model_state_dict"):
        fsdp_utils._get_model_state_dict = without_scales(fsdp_utils._get_model_state_dict)
    modeling.set_module_tensor_to_device = whole(modeling.set_module_tensor_to_device)
