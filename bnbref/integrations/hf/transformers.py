"""Hugging Face transformers: quantize with bnbref, and load what bitsandbytes has written, without bitsandbytes.

    from bnbref import BnbRefConfig                               registers it with transformers
    from_pretrained(..., quantization_config=BnbRefConfig())      quantizes while it loads

    take_over_bitsandbytes()                                      from here on, until give_back_bitsandbytes():
    from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    from_pretrained("a checkpoint of bitsandbytes")

Whatever transformers can do with a bitsandbytes model it can do with these: generate, save_pretrained and load again,
dequantize(), device_map with several devices. Offloading to the CPU or the disk keeps the weights quantized.

The first form uses transformers' public registry alone, and what it writes says "bitsandbytes" (see BnbRefConfig), so that
loading it again is loading a checkpoint of bitsandbytes. Where bitsandbytes is not installed nobody else could, and
importing this module takes over by itself.
"""

import functools
import importlib.util
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import auto, register_quantization_config, register_quantizer

from bnbref.integrations.hf.config import COMPUTE_DTYPE, METHOD, BnbRefConfig, dtype_of
from bnbref.integrations.hf.layers import dequantized
from bnbref.integrations.hf.quantizer import BnbRefHfQuantizer
from bnbref.nn import Params4bit
from bnbref.nn.four_and_eight_bits import FourBitLayer
from bnbref.nn.inventory import REASONS
from bnbref.nn.parametrize import quantized_in
from bnbref.nn.quantized_layer import QuantizedLayer

__all__ = ["BnbRefConfig", "BnbRefHfQuantizer", "give_back_bitsandbytes", "take_over_bitsandbytes"]

logger = logging.getLogger(__name__)

_METHODS = ("bitsandbytes_4bit", "bitsandbytes_8bit")
_undo: list[Callable[[], None]] = []


def take_over_bitsandbytes() -> bool:
    """Let bnbref serve `BitsAndBytesConfig` and bitsandbytes' checkpoints in this process. Returns False if it did so already.

    A `BitsAndBytesConfig` is told apart by what it was given: `bnb_4bit_compute_dtype` left out is the activation's dtype
    (bitsandbytes computes in float32 then), float32 said is float32.

    bitsandbytes itself, if it is there, is untouched; models that it quantized stay its own.
    """
    if _undo:
        return False
    mapping: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    if not set(_METHODS) <= mapping.keys():
        raise RuntimeError(f"transformers does not know {_METHODS}: this version of it is not supported by bnbref")
    before = {method: mapping[method] for method in _METHODS}
    init = BitsAndBytesConfig.__init__
    mapping.update(dict.fromkeys(_METHODS, BnbRefHfQuantizer))
    BitsAndBytesConfig.__init__ = _remembering(init)

    def undo() -> None:
        mapping.update(before)
        BitsAndBytesConfig.__init__ = init

    _undo.append(undo)
    return True


def give_back_bitsandbytes() -> None:
    """Undo `take_over_bitsandbytes`. Models that are loaded stay as they are."""
    while _undo:
        _undo.pop()()


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    """BitsAndBytesConfig turns a compute dtype that is not given into float32: mark a float32 that is given."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        rest = given.get("kwargs", {})
        if "quant_method" in rest:  # from config.json
            if COMPUTE_DTYPE in rest:
                setattr(self, COMPUTE_DTYPE, rest[COMPUTE_DTYPE])
        elif given.get("bnb_4bit_compute_dtype") is not None and self.bnb_4bit_compute_dtype == torch.float32:
            setattr(self, COMPUTE_DTYPE, "float32")

    return remember


def _counting(original: Callable[..., int]) -> Callable[..., int]:
    """`PreTrainedModel.num_parameters` imports bitsandbytes for every 4-bit model, to know its parameters."""

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        # One walk through the modules: Trainer asks in every step, and a model with adapters has more than a thousand.
        parameters: dict[int, Any] = {}
        states: dict[int, Any] = {}
        left_out = set()
        for module in self.modules():
            own = {id(p): p for p in module._parameters.values() if p is not None}
            parameters |= own
            if isinstance(module, FourBitLayer):  # which knows its state even if FSDP has put another parameter there
                states[id(module.weight)] = module.quant_state
            if "parametrizations" in module._modules:
                states |= {id(steps.original): step.quant_state for _, steps, step in quantized_in(module)}
            states |= {key: p.quant_state for key, p in own.items() if isinstance(p, Params4bit) and key not in states}
            if exclude_embeddings and isinstance(module, nn.Embedding):
                left_out.add(id(module._parameters.get("weight")))
        if not any(states.values()):
            return original(self, only_trainable, exclude_embeddings)
        counted = [
            key for key, p in parameters.items() if key not in left_out and (p.requires_grad or not only_trainable)
        ]
        return sum(math.prod(states[key].shape) if states.get(key) else parameters[key].numel() for key in counted)

    return num_parameters


def _resizing(original: Callable[..., Any]) -> Callable[..., Any]:
    """`resize_token_embeddings` of a model with a quantized head: a new head in float, its old rows the values of the codes."""

    @functools.wraps(original)
    def get_resized_lm_head(self: Any, old: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(old, QuantizedLayer):
            return original(self, old, new_num_tokens, *args, **kwargs)
        if new_num_tokens in (None, old.out_features):
            return old
        name = next(name for name, module in self.named_modules() if module is old)
        getattr(self, REASONS, {})[name] = "resized"
        logger.warning("%s was quantized; resized to %d tokens it is float", name, new_num_tokens)
        plain = dequantized(name, old, dtype_of(self.config.dtype))
        return original(self, plain, new_num_tokens, *args, **kwargs)

    return get_resized_lm_head


def _not_resizing(original: Callable[..., Any]) -> Callable[..., Any]:
    """`resize_token_embeddings` of a model with a quantized embedding: refused, but for the size that it has.

    In four bits that size, too: transformers takes the rows of the weight for the number of tokens, and they are bytes.
    """

    @functools.wraps(original)
    def get_resized_embeddings(
        self: Any, old: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if isinstance(old, QuantizedLayer) and (new_num_tokens, pad_to_multiple_of) != (None, None):
            wanted: Any = old.num_embeddings if new_num_tokens is None else new_num_tokens
            step = pad_to_multiple_of or 1
            tokens = -(-wanted // step) * step
            if isinstance(old, FourBitLayer) or tokens != old.num_embeddings:
                raise ValueError(f"{old} is packed: put a float embedding in its place to resize it to {tokens} tokens")
        return original(self, old, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    return get_resized_embeddings


def _merging(original: Callable[..., Any]) -> Callable[..., Any]:
    """`from_pretrained(quantization_config=BnbRefConfig(...))` of a checkpoint that is quantized already: its settings hold, and
    bnbref reads it. transformers would refuse it, because config.json has a `BitsAndBytesConfig`."""

    @functools.wraps(original)
    def merge_quantization_configs(said: Any, given: Any) -> Any:
        fields = said if isinstance(said, dict) else said.to_dict()
        ours = fields.get("quant_method") == METHOD or fields.get("load_in_4bit") or fields.get("load_in_8bit")
        return given.of_checkpoint(fields) if ours and isinstance(given, BnbRefConfig) else original(said, given)

    return merge_quantization_configs


register_quantization_config(METHOD)(BnbRefConfig)
register_quantizer(METHOD)(BnbRefHfQuantizer)
auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(
    _merging(auto.AutoHfQuantizer.merge_quantization_configs)
)
PreTrainedModel.num_parameters = _counting(PreTrainedModel.num_parameters)
PreTrainedModel._get_resized_lm_head = _resizing(PreTrainedModel._get_resized_lm_head)
PreTrainedModel._get_resized_embeddings = _not_resizing(PreTrainedModel._get_resized_embeddings)
if importlib.util.find_spec("bitsandbytes") is None:
    take_over_bitsandbytes()
