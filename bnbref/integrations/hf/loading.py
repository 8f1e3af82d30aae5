"""A checkpoint's tensors into bnbref's layers: the conversions that transformers runs on each weight that it reads.

    Quantize     a float weight                     -> a quantized one, where and when it is read
    Read         a weight with its scales beside it -> the same, as it stands in the file

What the file says about a layer holds. A layer that the config would quantize and the file does not becomes a plain layer
again, and the other way round; a layer of which the file holds half is refused. A weight of another shape than the model's
is left to transformers, which raises, or with `ignore_mismatched_sizes=True` initializes it, in float.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from bnbref.checkpoint_weights import Checkpoint
from bnbref.codebooks import FOUR_BIT
from bnbref.integrations.hf.config import BnbRefConfig
from bnbref.integrations.hf.layers import is_linear, plain_layer, quantized_layer, was_conv1d
from bnbref.nn import Linear4bit, Linear8bitLt, Params4bit
from bnbref.nn.quantized_layer import QuantizedLayer
from bnbref.state_fields import BLOB, TENSORS

ANOTHER_SHAPE = "another shape in the checkpoint: newly initialized"


def stats() -> tuple[str, ...]:
    """The names of the tensors that a file has beside a 4-bit weight, for every codebook that is in FOUR_BIT when this is
    called."""
    return (*TENSORS, *(BLOB + name for name in FOUR_BIT))


class Identity(ConversionOps):  # type: ignore[misc]
    """An operation that changes nothing, for conversions of which only the names matter."""

    supports_many_to_many = True

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The tensors, as they are."""
        return input_dict


class _Conversion(ConversionOps):  # type: ignore[misc]
    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    # transformers copies the conversions for every weight.
    def __deepcopy__(self, memo: dict[int, Any]) -> "_Conversion":
        return self


class Quantize(_Conversion):
    """Quantizes float weights, given by their full names."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Quantize those that the quantizer wants quantized."""
        return {name: self._one(model, name, _first(value)) for name, value in input_dict.items()}

    def _one(self, model: Any, name: str, value: Tensor) -> Any:
        if name in self.hf_quantizer.fused:
            return self._fused(model, name, value)
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if not isinstance(layer, QuantizedLayer) or leaf != "weight":
            return value
        weight = value.t() if was_conv1d(layer) else value
        if weight.shape != layer._shape():
            self.hf_quantizer.leave(model, name, ANOTHER_SHAPE)
            return value
        return _fill(layer, name, {"weight": weight.contiguous()})

    def _fused(self, model: Any, name: str, value: Tensor) -> Tensor:
        if value.shape != model.get_parameter(name).shape:
            self.hf_quantizer.leave(model, name, ANOTHER_SHAPE)
            return value
        spec: BnbRefConfig = self.hf_quantizer.spec
        weight = Params4bit(
            value, blocksize=spec.blocksize, compress_statistics=spec.double_quant, quant_type=spec.quant_type
        )
        with _naming(name):
            weight = weight.to(value.device)
        self.hf_quantizer.fused[name] = weight.quant_state
        return weight


class Read(_Conversion):
    """Makes a quantized weight of its tensors, given by their names in the file.

    target: "weight", of any module, or the end of the name of a parameter that is quantized by itself.

    On the fly it sees float weights alone and lets them pass. It is there because transformers writes to disk anew, when it
    offloads, only what went through such a conversion.
    """

    def __init__(self, hf_quantizer: Any, target: str = "weight") -> None:
        super().__init__(hf_quantizer)
        self.target = target
        names = {target: "weight"} | {f"{target}.{stat}": f"weight.{stat}" for stat in stats()}
        if target == "weight":
            names |= {"SCB": "SCB", "weight_format": "weight_format"}
        # Patterns of transformers match anywhere in a name: these match whole names alone, so not `in_proj_weight`.
        self.sources = {rf"\b{re.escape(name)}$": entry for name, entry in names.items()}
        """Patterns for the names in a file; the names beside a weight as layers call them."""

    def converter(self) -> WeightConverter:
        """This operation as transformers takes it: with the patterns of the names that it reads, and the name that it makes."""
        return WeightConverter(list(self.sources), self.target, [self])

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """The weight by its full name."""
        self.hf_quantizer.check_whole(model)
        entries = {self.sources[key]: _first(value) for key, value in input_dict.items()}
        if entries.keys() == {"weight"}:
            read = self._float
        elif not self.hf_quantizer.pre_quantized:
            raise ValueError(
                f"{full_layer_name} is quantized already, but config.json has no quantization_config: take config.json from the "
                f"folder that save_pretrained wrote"
            )
        else:
            read = self._fused if full_layer_name in self.hf_quantizer.fused else self._layer
        with _naming(full_layer_name):
            return {full_layer_name: read(model, full_layer_name, entries)}

    def _float(self, model: Any, name: str, entries: dict[str, Tensor]) -> Any:
        value = entries["weight"]
        if not self.hf_quantizer.pre_quantized:
            return value
        if self.hf_quantizer.param_needs_quantization(model, name):
            if not value.is_floating_point() or value.shape[1:] == (1,):
                raise ValueError(
                    f"{value.dtype} {list(value.shape)} are the codes of a quantized weight, whose scales are not in the file"
                )
            self.hf_quantizer.leave(model, name, "float in the checkpoint")
        return self.hf_quantizer.cast(model, name, value)

    def _layer(self, model: Any, name: str, entries: dict[str, Tensor]) -> Any:
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        int8 = "SCB" in entries
        if not isinstance(module, Linear8bitLt if int8 else Linear4bit):
            linear = plain_layer(module) if isinstance(module, QuantizedLayer) else module
            if not is_linear(linear):
                raise ValueError(
                    f"it is quantized in the checkpoint, but in the model it belongs to a {type(module).__name__}, which is no "
                    f"linear layer: the checkpoint is of another model"
                )
            module = quantized_layer(linear, self.hf_quantizer.spec, int8)
            model.set_submodule(path, module)
        found = _shape(entries)
        if found == module._shape():
            return _fill(module, name, entries)
        self.hf_quantizer.leave(model, name, ANOTHER_SHAPE)
        return torch.empty(found[::-1] if was_conv1d(module) else found, device="meta")

    def _fused(self, model: Any, name: str, entries: dict[str, Tensor]) -> Any:
        found = _shape(entries)
        if found != model.get_parameter(name).shape:
            self.hf_quantizer.leave(model, name, ANOTHER_SHAPE)
            return torch.empty(found, device="meta")
        weight = Params4bit.from_prequantized(entries.pop("weight"), entries)
        self.hf_quantizer.fused[name] = weight.quant_state
        return weight


def takes_codes(conversion: Any, names: Iterable[str]) -> bool:
    """Whether a conversion of the model's own would be made of one of these quantized weights, as if it was a float one.

    That of Qwen3-VL's experts transposes them where an old file has them transposed. The names of its results are those of its
    sources, and so those by which the model, and a file with its codes, has the experts.
    """
    if not isinstance(conversion, WeightConverter):
        return False
    renamed = ((name, *conversion.rename_source_key(name)) for name in names)
    return any(pattern is not None and new == name for name, new, pattern in renamed)


def _shape(entries: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of a quantized weight, from its entries in a state dict; ValueError if it is not whole."""
    # Without weight_format, because a layer takes more forms of it than `Checkpoint`: those of older files.
    return (
        Checkpoint({name: value for name, value in entries.items() if name != "weight_format"}).entries["weight"].shape
    )


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value  # type: ignore[no-any-return]


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: {error}") from error


def _fill(layer: Any, name: str, entries: Mapping[str, Tensor]) -> Any:
    """The quantized weight of a layer from its entries in a state dict. The layer itself keeps the scales, on meta.

    transformers then sets the weight, or writes it to disk and leaves the layer so.
    """
    with _naming(name):
        layer.load_state_dict(dict(entries), strict=False, assign=True)
        weight = layer.weight.to(entries["weight"].device)
    layer.weight = weight.to("meta")
    layer.weight._is_hf_initialized = True
    return weight
