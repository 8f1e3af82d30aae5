"""A checkpoint's tensors into bnbref's layers: the conversions that transformers runs on each weight that it reads.

    Quantize     a float weight                     -> a quantized one, where and when it is read
    Read         a weight with its scales beside it -> the same, as it stands in the file

What the file says about a layer holds. A layer that the config would quantize and the file does not becomes a plain layer
again, and the other way round; a layer of which the file holds half is refused. A weight of another shape than the model's
is left to transformers, which raises, or with `ignore_mismatched_sizes=True` initializes it, in float.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D

from bnbref.checkpoint import Checkpoint
from bnbref.codebooks import FOUR_BIT
from bnbref.integrations.hf.config import BnbRefConfig
from bnbref.nn import Linear4bit, Linear8bitLt, Params4bit
from bnbref.nn.layer import QuantizedLayer
from bnbref.quant_state import BLOB


def stats() -> tuple[str, ...]:
    """What a file holds beside a 4-bit weight, after its name and a dot: codebooks that were entered meanwhile, too."""
    return ("nested_absmax", "nested_quant_map", "absmax", "quant_map", *(BLOB + name for name in FOUR_BIT))


# ---- layers ---------------------------------------------------------------------------------------------------------


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
            try:
                found = type(module).forward(probe, x)
            except Exception:  # whatever a forward raises that wants more than x, or another shape
                return False
            if (
                not isinstance(found, Tensor)
                or found.dtype != dtype
                or not torch.equal(found, F.linear(x, weight, bias))
            ):
                return False
    return True


def features(module: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features  # type: ignore[return-value]


def quantized_layer(linear: Any, spec: BnbRefConfig, int8: bool) -> QuantizedLayer:
    """The quantized layer in place of a linear one: no weight yet (meta), the same bias."""
    shape = (*features(linear), linear.bias is not None)
    layer: Any
    if int8:
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
        plain = Conv1D(n, k) if was_conv1d(layer) else nn.Linear(k, n, bias=layer.bias is not None)
    if weight is not None:
        plain.weight = nn.Parameter(weight.t().contiguous() if isinstance(plain, Conv1D) else weight)
    elif layer.weight.is_floating_point():
        plain = plain.to(layer.weight.dtype)
    plain.bias = layer.bias
    return plain.train(layer.training)  # type: ignore[no-any-return]


def was_conv1d(layer: nn.Module) -> bool:
    """Whether a quantized layer replaced a Conv1D, whose float weight is stored transposed."""
    return issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)


ANOTHER_SHAPE = "another shape in the checkpoint: newly initialized"


# ---- conversions ----------------------------------------------------------------------------------------------------


class Identity(ConversionOps):  # type: ignore[misc]
    """Nothing: for conversions of which only the names matter."""

    supports_many_to_many = True

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The same."""
        return input_dict


class _Conversion(ConversionOps):  # type: ignore[misc]
    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    # transformers copies the conversions for every weight.
    def __deepcopy__(self, memo: dict[int, Any]) -> "_Conversion":
        return self


class Quantize(_Conversion):
    """Float weights by full name -> quantized ones."""

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
            value,
            blocksize=spec.blocksize,
            compress_statistics=spec.double_quant,
            quant_type=spec.quant_type,
        )
        with _naming(name):
            weight = weight.to(value.device)
        self.hf_quantizer.fused[name] = weight.quant_state
        return weight


class Read(_Conversion):
    """The tensors of one weight, by their names in the file -> the weight.

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
        """For transformers."""
        return WeightConverter(list(self.sources), self.target, [self])

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """The weight by its full name."""
        entries = {self.sources[key]: _first(value) for key, value in input_dict.items()}
        if entries.keys() == {"weight"}:
            read = self._float
        elif not self.hf_quantizer.pre_quantized:
            raise ValueError(f"{full_layer_name} is quantized already, but config.json has no quantization_config")
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
                raise ValueError(f"{value.dtype} {list(value.shape)} is half of a quantized weight: no scales")
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
                    f"quantized in the checkpoint, but of a {type(module).__name__}, not of a linear layer"
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


def _shape(entries: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of a quantized weight, from its entries in a state dict; ValueError if it is not whole."""
    # Of older files the layer knows more than one `weight_format`.
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
