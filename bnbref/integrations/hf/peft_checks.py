"""Which of peft's tuners can work on packed weights. The others are refused, with the name of the layer, before anything is
trained or merged.

A tuner of peft takes any subclass of `nn.Linear`. If it computes with the layer's output alone, it trains as over a float layer.
If it reads `layer.weight` it finds codes: most then fail inside of torch, some compute with int8 codes as if they were numbers.
`tests/test_peft_tuners.py` goes through all tuners there are: one that is not listed here is refused.
"""

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from peft.tuners import tuners_utils
from torch import nn

from bnbref.integrations.bitsandbytes import finder
from bnbref.integrations.hf.experts import quantized_parameters
from bnbref.nn import Linear4bit, Linear8bitLt
from bnbref.nn.quantized_layer import QuantizedLayer

TRAIN = frozenset(
    ("BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "LILY", "LORA", "MISS", "OFT", "ROAD", "VBLORA", "VERA", "WAVEFT")
)
"""Tuners that read the output of a layer and not its weight."""

TRAIN_UNDER_THE_ALIAS = TRAIN | {"ADALORA", "HIRA", "IA3", "PVERA", "RANDLORA", "SHIRA"}
"""And those for which peft has layers of their own over bitsandbytes'."""

MERGE_UNDER_THE_ALIAS = frozenset(("BOFT", "HIRA", "LORA", "MISS", "OFT", "ROAD", "SHIRA", "VERA"))
"""Tuners that dequantize a weight of bitsandbytes', add to it, and quantize it."""

WITHOUT_THE_WEIGHT = (True, False, "gaussian", "eva")
"""Values of `init_lora_weights` that do not read the weight of a layer."""

VARIANTS = frozenset(("alora_invocation_tokens", "arrow_config", "monteclora_config"))
"""Options of a `LoraConfig` that make another algorithm of it, which peft calls a variant, and do not read the weight. The others
make tensors of its dtype, which is that of codes, or take its values apart."""

VARIANTS_UNDER_THE_ALIAS = frozenset(("alora_invocation_tokens", "arrow_config", "use_dora"))
"""Those that peft's layers over bitsandbytes' know. They take no notice of others."""


def _alias() -> bool:
    return finder.current() is not None


def _names(layers: Iterable[str]) -> str:
    names = list(layers)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def ends_with(path: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the end of a path, in whole parts, as peft matches them."""
    return any(f".{path}".endswith(f".{name}") for name in names)


def check_targets(tuner: Any, model: nn.Module, config: Any) -> None:
    """ValueError if an adapter of this config would read the weight of a quantized layer, or train it."""
    layers = {path.replace(".base_layer", ""): m for path, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    holders = {name.rpartition(".")[0].replace(".base_layer", "") for name, *_ in quantized_parameters(model)}
    saved = getattr(config, "modules_to_save", None) or ()  # X-LoRA's config has none
    trained = [path for path in (*layers, *sorted(holders)) if ends_with(path, saved)]
    if trained:
        raise ValueError(
            f"modules_to_save: {_names(trained)} is quantized: load the model with it in skip_modules to train it"
        )
    tokens = getattr(config, "trainable_token_indices", None)
    if tokens:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        found = [p for p, m in layers.items() if (ends_with(p, tokens) if isinstance(tokens, dict) else m is embedding)]
        if found:
            raise ValueError(f"trainable_token_indices: {_names(found)} is quantized: its rows are packed")
    kind, option = config.peft_type.value, _reading(config)
    allowed = TRAIN_UNDER_THE_ALIAS if _alias() else TRAIN
    if not layers or (kind in allowed and option is None) or not hasattr(config, "target_modules"):
        return
    config = copy.copy(config)
    if config.target_modules is None:  # peft then chooses the layers, by the kind of the model
        config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
    config = tuners_utils._maybe_include_all_linear_layers(config, model)
    found = [path for path in layers if tuner._check_target_module_exists(config, path)]
    if found:
        what = f"{kind} with {option}" if option and kind in allowed else kind
        raise ValueError(
            f"{what} reads the weight of {_names(found)}, which is packed{_unknown(option)}. Over bnbref's layers a tuner must "
            f"be one of {', '.join(sorted(allowed))} (LORA without such options); or dequantize the model first"
        )


def _unknown(option: str | None) -> str:
    """What else is wrong with an option that is refused under the alias alone."""
    return ", or is unknown to peft's layers over bitsandbytes'" if option in VARIANTS else ""


def _reading(config: Any) -> str | None:
    """The option by which a tuner reads weights that otherwise reads none; None if the config has no such option."""
    init: Any = getattr(config, "init_lora_weights", True)
    known = (*WITHOUT_THE_WEIGHT, *(("olora",) if _alias() else ()))
    if init not in known:
        return f"init_lora_weights={init!r}"
    variants = [each.name for each in dataclasses.fields(config) if each.metadata.get("is_lora_variant")]
    for name in variants:
        if getattr(config, name) and name not in (VARIANTS_UNDER_THE_ALIAS if _alias() else VARIANTS):
            return "use_dora=True" if name == "use_dora" else name
    if config.peft_type.value == "MISS" and config.init_weights == "bat" and not _alias():
        return "init_weights='bat'"
    return None


def check_merge(tuner: Any) -> None:
    """ValueError if an adapter would be merged into a quantized layer by code that does not know it."""
    kinds = {config.peft_type.value for config in tuner.peft_config.values()}
    known = _alias() and kinds <= MERGE_UNDER_THE_ALIAS
    layers = [
        path
        for path, m in tuner.model.named_modules()
        if isinstance(m, tuners_utils.BaseTunerLayer)
        and isinstance(m.get_base_layer(), QuantizedLayer)
        and not getattr(m, "merges_quantized", False)
        and not (known and isinstance(m.get_base_layer(), (Linear4bit, Linear8bitLt)))
    ]
    if layers:
        raise ValueError(
            f"{', '.join(sorted(kinds))} cannot be merged into {_names(layers)}, whose weights are packed: keep the adapter "
            "beside them, dequantize the model first, or, for LoRA, import bnbref.register_lora before the adapter is made"
        )
