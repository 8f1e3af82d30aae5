"""The quantizer that transformers drives: which layers to replace before loading, how to load, what is left to do after.

Linear layers (and GPT-2's Conv1D) are replaced by bnbref's layers. The experts of a mixture are three-dimensional parameters
of one module; they are quantized as parameters, behind a parametrization. Everything else stays as it is, with a reason:
`bnbref.report(model)`.
"""

import copy
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION, HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import is_accelerate_available, is_peft_available

from bnbref.checkpoint import keys
from bnbref.integrations.hf.config import METHOD, BnbRefConfig, dtype_of
from bnbref.integrations.hf.experts import is_experts, load_offloaded, parametrize_experts
from bnbref.integrations.hf.layers import is_linear, plain_layer, quantized_layer
from bnbref.integrations.hf.loaded import dequantize, log_report, plain_if_new, set_flags, undone_on_saving
from bnbref.integrations.hf.loading import ANOTHER_SHAPE, Quantize, Read, takes_codes
from bnbref.integrations.hf.readers import read_by_others
from bnbref.nn.inventory import REASONS, merged, report
from bnbref.nn.quantized_layer import QuantizedLayer
from bnbref.quant_state import QuantState

logger = logging.getLogger(__name__)


class BnbRefHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantization by bnbref, as a `BnbRefConfig` or a `BitsAndBytesConfig` asks for it."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if isinstance(quantization_config, BnbRefConfig):
            # A copy: it will say what became of this model, and its owner may load another model with it.
            quantization_config = self.spec = copy.copy(quantization_config)
        else:
            self.spec = BnbRefConfig.of_bitsandbytes(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.fused: dict[str, QuantState | None] = {}
        """The parameters that are quantized by themselves; their scales once they are."""
        self.weights: list[str] = []
        """The weights of the layers that were replaced."""
        self.reasons: dict[str, str] = {}
        """Why a module or parameter was left as it is."""
        self.conversions: list[Any] = []
        """The conversions that transformers has made of the tensors of the checkpoint."""
        self.files: Sequence[str] = ()
        """The files of the checkpoint."""

    # ---- before loading ---------------------------------------------------------------------------------------------

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element, scales included, for `device_map="auto"`."""
        return self.spec.bits / 8 if self.param_needs_quantization(model, param_name) else param.element_size()

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Room for the one weight that is dequantized at a time."""
        return {device: size * 0.9 for device, size in max_memory.items()}

    def update_device_map(self, device_map: Any) -> Any:
        """Without a device map, the accelerator if there is one."""
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if device_map is not None or accelerator is None:
            return device_map
        if accelerator.type == "mps":
            return {"": "mps"}
        return {"": torch.device(accelerator.type, torch.accelerator.current_device_index())}

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Exchange the modules of a model, before its weights are read."""
        self.check_whole(model)
        self.files = kwargs.get("checkpoint_files") or ()
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _convert_model_for_quantization(self, model: Any) -> None:
        """transformers exchanges modules of some models before it loads a file of bitsandbytes, so that each expert has layers of
        its own. Here that is done only if the file has such layers."""
        if _exchanged(model) and any(re.search(r"\bexperts\.\d+\.", key) for path in self.files for key in keys(path)):
            super()._convert_model_for_quantization(model)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.spec.model_dtype = model.config.dtype
        skip = self.spec.skip_modules or []
        patterns = self.get_modules_to_not_convert(model, self.spec.skip_modules, model._keep_in_fp32_modules)
        candidates = {name: m for name, m in model.named_modules() if is_linear(m) or is_experts(m)}
        tied = {key.removesuffix(".weight"): other for key, other in model.all_tied_weights_keys.items()}
        readers = read_by_others(model)
        surprising: dict[str, list[str]] = {}
        for name, module in candidates.items():
            reason = f"tied to {tied[name]}" if name in tied else _skipped(name, patterns, skip)
            if reason is None and name in readers and not self.pre_quantized:
                reason = f"{readers[name]} reads its weight by itself"
                surprising.setdefault(reason, []).append(name)
            if reason is None and not is_linear(module) and self.spec.is_int8 and not self.pre_quantized:
                reason = "experts: LLM.int8() is a product with a matrix; nf4 and fp4 are for any parameter"
                surprising.setdefault(reason, []).append(name)
            if reason is not None:
                self.reasons[name] = reason
            elif is_linear(module):
                model.set_submodule(name, quantized_layer(module, self.spec, self.spec.is_int8))
                self.weights.append(f"{name}.weight")
            else:
                parameters = module.named_parameters(prefix=name, recurse=False)
                self.fused.update({n: None for n, p in parameters if p.dim() == 3})
        for reason, names in surprising.items():
            logger.warning("not quantized: %s. %s", ", ".join(merged(names)), reason)
        for pattern in skip:
            if all(should_convert_module(name, [pattern]) for name in candidates):
                below = f".*{pattern}"
                logger.warning("skip_modules: %r skips nothing; %r would skip all that is below", pattern, below)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it is the weight of a quantized layer, or quantized by itself."""
        self.check_whole(model)
        if param_name in self.fused:
            return True
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedLayer) and name == "weight"

    # ---- loading ----------------------------------------------------------------------------------------------------

    def get_quantize_ops(self) -> Quantize:
        """The operation that transformers runs on each float weight that it reads."""
        return Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        """The operation that reads the weights of a checkpoint that is quantized already."""
        return {"deserialize": Read}

    def get_weight_conversions(self) -> list[Any]:
        """A conversion by `Read` for the weights of layers, and one for each kind of parameter that is quantized by itself."""
        targets = {".".join(name.split(".")[-2:]) for name in self.fused if not name.endswith(".weight")}
        return [Read(self, target).converter() for target in ("weight", *sorted(targets))]

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """The conversions of the model, and then those of this class. transformers makes the first that matches a name. So those
        of the model that would be made of codes are left out.

        Where a conversion splits a weight, transformers would quantize all of its parts or none, as the first part is to be.
        `Quantize` decides for each part."""
        if not self.pre_quantized:
            for conversion in weight_conversions:
                if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
                    conversion.quantization_operation = Quantize(self)
        if self.pre_quantized and any(isinstance(c, WeightConverter) for c in weight_conversions):
            found = [key for path in self.files for key in keys(path)]
            coded = [key.removesuffix(".absmax") for key in found if key.endswith(".absmax")]
            coded += [key.removesuffix("SCB") + "weight" for key in found if key.endswith(".SCB")]
            # transformers does not show a state dict that it was given. What the config would quantize is codes in it.
            if not self.files:
                coded = self.weights if self.spec.is_int8 else [*self.weights, *self.fused]
            weight_conversions = [c for c in weight_conversions if not takes_codes(c, coded)]
        return super().update_weight_conversions(weight_conversions, *args)  # type: ignore[no-any-return]

    def check_whole(self, model: Any) -> None:
        """Raise if transformers has spread the model over ranks, each of which would read a part of a weight.

        It does so after it has asked this class what to load, and before it loads. Newer versions say it in the config from the
        start, which is early enough for codes: transformers cuts them before it gives them to this class. The config of a model
        that was spread keeps saying it where there are no ranks, and transformers then loads another model of this config whole.
        """
        sizes = getattr(getattr(model.config, "distributed_config", None), "__dict__", {})
        several = any(isinstance(n, int) and n > 1 for name, n in sizes.items() if name.endswith("_size"))
        ranks = dist.is_available() and dist.is_initialized()
        if (several and ranks) or getattr(model, "_device_mesh", None) is not None:
            raise NotImplementedError(
                "tp_plan and distributed_config are not for quantized models: a part of a weight would need blocks and scales of "
                "its own. Load the whole model on each rank and shard it with fully_shard or `accelerate launch`, or spread its "
                "layers with device_map"
            )

    def leave(self, model: Any, name: str, reason: str) -> None:
        """Makes a parameter that was to be quantized a float one, and its layer a plain one. reason: why, for the report."""
        if reason == ANOTHER_SHAPE and not hasattr(HfQuantizer, "get_new_dtype"):
            # Beside a quantizer, older versions of transformers take any shape.
            shape = list(model.get_parameter(name).shape)
            raise ValueError(f"{name} must have the shape {shape} of the model, but has another one in the checkpoint")
        path = name.rpartition(".")[0]
        if name in self.fused:
            del self.fused[name]
            self.reasons[name] = reason
        else:
            self.reasons[path] = reason
            model.set_submodule(path, plain_layer(model.get_submodule(path)))

    def cast(self, model: Any, name: str, value: Tensor) -> Tensor:
        """A float tensor of the checkpoint in the dtype in which transformers would load it."""
        if not value.is_floating_point():
            return value
        plan = model._get_dtype_plan(model.config.dtype).items()
        kept = next((dtype for pattern, dtype in plan if re.search(pattern.replace("*", ".*"), name)), None)
        return value.to(kept or model.get_parameter_or_buffer(name).dtype)

    # ---- after loading ----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.reasons |= plain_if_new(model)
        quantized = {name: state for name, state in self.fused.items() if state is not None}
        self.reasons |= dict.fromkeys(self.fused.keys() - quantized.keys(), "float in the checkpoint")
        for name, state in quantized.items():
            parametrize_experts(model, name, state, model.config.dtype)
        if quantized or _exchanged(model):
            self.spec.checkpoint_format = METHOD
            self.quantization_config = model.config.quantization_config = self.spec
        # Without `Read`: codes and scales are saved as they are in the state dict, there is nothing to undo.
        conversions = getattr(model, "_weight_conversions", None) or []
        self.conversions = [c for c in conversions if not isinstance(getattr(c, "operations", [None])[0], Read)]
        for conversion in self.conversions:
            conversion.quantization_operation = None  # what is left of them is undone on saving, which has none
        layers = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
        model._weight_conversions = [c for c in self.conversions if not undone_on_saving(c, [*quantized, *layers])]
        set_flags(model)
        if is_accelerate_available():
            from bnbref.integrations.hf.accelerate import adapt_accelerate

            adapt_accelerate()
        if is_peft_available():
            from bnbref.integrations.hf.peft import adapt_peft

            adapt_peft()
        setattr(model, REASONS, self.reasons)
        log_report(report(model), self.reasons)
        return model

    # ---- the loaded model -------------------------------------------------------------------------------------------

    @property
    def is_trainable(self) -> bool:
        """True: adapters beside a quantized model are trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: `torch.compile` makes one graph of a quantized model, without breaks."""
        return True

    def is_serializable(self) -> bool:
        """True: save_pretrained writes the bytes that bitsandbytes writes."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors for save_pretrained.

        None stands for the model's own state dict, which lacks only codes that are offloaded.
        """
        offloaded = load_offloaded(model)
        return ({**model.state_dict(), **offloaded} if offloaded else None), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dequantize(model, dtype_of(dtype))
        model._weight_conversions = self.conversions
        return model


def _skipped(name: str, patterns: list[str], skip: list[str]) -> str | None:
    """Why a module is not to be quantized. None if it is to be."""
    matching = sorted(pattern for pattern in patterns if not should_convert_module(name, [pattern]))
    if not matching:
        return None
    for pattern in matching:
        if pattern in skip:
            return f"skip_modules: {pattern!r}"
    return "kept by default: output head, tied weights, last layer, or kept in float32 by the model"


def _exchanged(model: nn.Module) -> bool:
    """Whether transformers exchanges modules of this model if a file says "bitsandbytes", and then looks for other names."""
    return any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in model.modules())
