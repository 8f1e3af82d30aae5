"""A model whose weights transformers has read: what is still to be done with it, and what undoes its quantization."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter

from bnbref.integrations.hf.config import METHOD, dtype_of
from bnbref.integrations.hf.experts import dequantize_experts
from bnbref.integrations.hf.layers import dequantized, plain_layer
from bnbref.integrations.hf.loading import Identity
from bnbref.nn import Linear8bitLt
from bnbref.nn.inventory import ON_META, REASONS, Report
from bnbref.nn.quantized_layer import QuantizedLayer
from bnbref.nn.quantized_parameter import QuantizedParameter

logger = logging.getLogger(__name__)


def plain_if_new(model: nn.Module) -> dict[str, str]:
    """Makes plain layers of those whose weight was not in the checkpoint and has been initialized. Returns their names, with that
    as the reason."""
    reasons: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLayer) or module.weight.is_meta or _is_quantized(module):
            continue
        if module.weight.shape != module._shape():
            raise ValueError(
                f"{name}.weight has no scales: transformers renames them when it loads this model, and does not rename their "
                f"weight. Load the float checkpoint with BnbRefConfig, or name the layer in skip_modules"
            )
        reasons[name] = "not in the checkpoint: newly initialized"
        model.set_submodule(name, plain_layer(module, module.weight.data))
    return reasons


def _is_quantized(layer: QuantizedLayer) -> bool:
    weight: Any = layer.weight
    return hasattr(weight, "holds_codes") and weight.holds_codes()


def undone_on_saving(conversion: Any, names: list[str]) -> bool:
    """Whether saving would undo to some of these weights what loading did to them: split merged weights, for example.

    Codes cannot be split so. They are saved under the model's own names, under which transformers loads them, too.
    """
    if not isinstance(conversion, WeightConverter):
        return False
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    backwards = WeightConverter(targets, sources, operations=[Identity()])
    for scope in ("scope_prefix", "base_model_prefix"):
        setattr(backwards, scope, getattr(conversion, scope))
    return any(backwards.rename_source_key(name)[1] is not None for name in names)


def set_flags(model: Any) -> None:
    """The flags by which Hugging Face's libraries know a quantized model.

    An 8-bit model does not call its method "bitsandbytes", because then `model.to(device)` would ask for that package.
    """
    if any(isinstance(module, Linear8bitLt) for module in model.modules()):
        model.is_loaded_in_8bit = True
        model.quantization_method = METHOD
    else:
        model.is_loaded_in_4bit = True
        model.quantization_method = "bitsandbytes"


def log_report(found: Report, reasons: Mapping[str, str]) -> None:
    """Logs what became of the parameters of a model; a warning if nothing was quantized, or much could not be."""
    logger.info("%s", found)
    if not found.quantized:
        logger.warning("nothing in this model was quantized:\n%s", found)
        return
    expected = ("embedding", *reasons.values())
    left = tuple(
        p for p in found.skipped if len(p.shape) > 1 and p.elements and p.reason.removesuffix(ON_META) not in expected
    )
    share = sum(p.elements for p in left) / sum(p.elements for p in found.parameters)
    if share > 0.05:
        logger.warning(
            "%.0f %% of this model is in parameters that cannot be quantized:\n%s", 100 * share, Report(left)
        )


def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Makes plain layers and parameters of the quantized ones, in that dtype."""
    old = dtype_of(model.config.dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLayer) and not isinstance(module, nn.Embedding):
            model.set_submodule(name, dequantized(name, module, dtype))
    dequantize_experts(model, dtype)
    # A parameter that was not quantized has the dtype of the model, or float32 if the model wants it so: that one stays.
    for parameter in model.parameters():
        if parameter.dtype == old and not isinstance(parameter, QuantizedParameter):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", REASONS):
        model.__dict__.pop(flag, None)
