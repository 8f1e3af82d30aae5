"""accelerate's `load_checkpoint_and_dispatch` with a device_map, which sets one tensor of a file at a time.

A quantized weight is several tensors. So accelerate would cast the floats of a file to codes, keep the old scales beside new
codes, or fail at the name of the scales. It is refused here before a quantized weight is changed. Without a device_map
accelerate calls `load_state_dict`, which reads a quantized weight whole.
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


@functools.cache
def adapt_accelerate() -> None:
    """Let accelerate refuse to set a part of a quantized weight when it loads a checkpoint. Once."""
    # accelerate.hooks, which moves weights that are offloaded, has its own reference to the function, which stays as it is.
    from accelerate.utils import modeling

    modeling.set_module_tensor_to_device = whole(modeling.set_module_tensor_to_device)
