"""Every two settings of an operation together: a dtype and a blocksize, an optimizer and a dtype, a single row and a bias.

A kernel is often compiled for each of them, so that a mistake may be in one combination alone; the stored cases change one
setting at a time. These cases are few, because each has many pairs (Cohen et al., The AETG system, 1997). They are made when the
kit runs: their expectation is that of the oracles, and they are in no version of the vectors.

Where such a case fails, settings are made plain as long as it still fails. Those that are left are its cause (Zeller and
Hildebrandt, Simplifying and isolating failure-inducing input, 2002).
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from bnbref.conformance.backends import Backend
from bnbref.conformance.case import DTYPES, Case
from bnbref.conformance.judge import Failure, run_case
from bnbref.conformance.oracles import expect
from bnbref.conformance.oracles.formula import STATES
from bnbref.conformance.pair_inputs import MAKERS

Settings = Mapping[str, Any]

_BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_BLOCKS = {"dtype": DTYPES, "blocksize": _BLOCKSIZES, "size": ("whole", "part", "odd")}
_FORMS = ("vector", "matrix", "cube", "transposed")
_TYPES = ("nf4", "fp4")
_FOUR = {**_BLOCKS, "blocksize": (*_BLOCKSIZES, 32), "quant_type": _TYPES}
_PRODUCT = {
    "dtype": DTYPES, "blocksize": (64, 32, 128, 256, 1024, 4096), "quant_type": _TYPES, "rows": (1, 2, 4, 9),
    "form": ("matrix", "cube"), "columns": (128, 96),
}  # fmt: skip
_STEP = {
    "optimizer": tuple(STATES), "dtype": DTYPES, "step": (1, 2, 1000), "weight_decay": (0.0, 0.1), "gnorm_scale": (1.0, 0.3),
    "form": ("vector", "matrix"),
}  # fmt: skip

SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "quantize_blockwise": {**_BLOCKS, "signed": (True, False), "form": _FORMS},
    "dequantize_blockwise": {**_BLOCKS, "signed": (True, False), "form": _FORMS},
    "quantize_4bit": {**_FOUR, "form": _FORMS},
    "dequantize_4bit": {**_FOUR, "form": ("matrix", "vector", "cube")},
    "quantize_4bit_nested": {"dtype": DTYPES, "blocksize": (64, 32, 128), "size": ("whole", "part", "odd"), "quant_type": _TYPES},
    "gemm_4bit": {**_PRODUCT, "bias": (False, True)},
    "gemm_4bit_backward": _PRODUCT,
    "int8_quantize": {
        "dtype": ("float16", "float32", "bfloat16"), "threshold": (0.0, 6.0, 0.75), "form": ("matrix", "cube", "transposed"),
        "columns": (64, 33),
    },
    "int8_mm_dequant": {"dtype": DTYPES, "bias": (False, True), "form": ("matrix", "cube", "transposed"), "columns": (16, 33)},
    "optimizer_32bit": {**_STEP, "size": (64, 4099)},
    "optimizer_8bit": {**_STEP, "size": (256, 257, 4352)},
}  # fmt: skip
"""The settings of each operation and their values, of which the first is the plain one."""

_RULES: dict[str, tuple[str, dict[str, str]]] = {
    "quantize_blockwise": ("Q8-3", {"size": "Q8-7"}),
    "dequantize_blockwise": ("D8-1", {"size": "D8-2", "blocksize": "D8-2"}),
    "quantize_4bit": ("Q4-3", {"size": "Q4-8"}),
    "dequantize_4bit": ("D4-1", {"form": "D4-3", "size": "D4-2", "blocksize": "D4-2"}),
    "quantize_4bit_nested": ("QN-1", {}),
    "gemm_4bit": ("G4-1", {"form": "G4-2", "rows": "G4-2"}),
    "gemm_4bit_backward": ("GB-1", {"form": "GB-2"}),
    "int8_quantize": ("I8-2", {"form": "I8-5", "threshold": "I8-3"}),
    "int8_mm_dequant": ("ID-1", {"form": "ID-3"}),
    "optimizer_32bit": ("OS-1", {"weight_decay": "OS-2", "gnorm_scale": "OS-3", "size": "OS-7", "form": "OS-7"}),
    "optimizer_8bit": ("OB-1", {"weight_decay": "OB-3", "gnorm_scale": "OB-3", "size": "OB-5"}),
}
"""The rule that the cases of an operation are about, and the rules of settings that are the cause of a failure, first come first.
Of a transpose it is G-3."""


@functools.cache
def combinations(operation: str) -> tuple[dict[str, Any], ...]:
    """The settings of the cases of an operation, in which every two values of two settings meet.

    >>> len(combinations("int8_mm_dequant"))
    9
    """
    factors = SETTINGS[operation]
    items = [[(name, value) for value in values] for name, values in factors.items()]
    left = dict.fromkeys(
        frozenset(pair) for a, b in itertools.combinations(items, 2) for pair in itertools.product(a, b)
    )
    found = []
    while left:
        chosen = dict(sorted(next(iter(left)), key=lambda item: list(factors).index(item[0])))
        for name in sorted(factors, key=lambda name: -len(factors[name])):
            if name not in chosen:
                # The value that makes the most new pairs with those that are chosen; the plainest of equals.
                new = [sum(frozenset({(name, v), other}) in left for other in chosen.items()) for v in factors[name]]
                chosen[name] = factors[name][new.index(max(new))]
        for pair in itertools.combinations(chosen.items(), 2):
            left.pop(frozenset(pair), None)
        found.append({name: chosen[name] for name in factors})
    return tuple(found)


def _id(operation: str, settings: Settings) -> str:
    return f"{operation}/pair-" + "-".join(str(value).lower() for value in settings.values())


def listed() -> dict[str, str]:
    """The rule of each case by its id."""
    return {_id(op, settings): _RULES[op][0] for op in SETTINGS for settings in combinations(op)}


def made(operation: str, settings: Settings) -> Case:
    """The case of an operation with these settings."""
    inputs, params, layout = MAKERS[operation](**settings)
    return Case(
        _id(operation, settings), operation, params, inputs, expect(operation, inputs, params), (_RULES[operation][0],),
        layout=layout, may_refuse=operation == "int8_quantize" and settings["dtype"] != "float16", quick=False,
        settings={name: value for name, value in settings.items() if value != plain(operation)[name]},
    )  # fmt: skip


def plain(operation: str) -> dict[str, Any]:
    """The plain value of each setting of an operation."""
    return {name: values[0] for name, values in SETTINGS[operation].items()}


def cases(backend: Backend, only: str = "") -> Iterator[Case]:
    """The cases of what a backend has whose id contains `only`."""
    for operation in SETTINGS:
        if operation in backend.functions:
            for settings in combinations(operation):
                if only in _id(operation, settings):
                    yield made(operation, settings)


def plainest(backend: Backend, failure: Failure, device: torch.device) -> Failure:
    """The failure with settings as plain as can be: where one more of them is plain, the case passes, or fails in another way.

    Its rule is that of the settings that are left.
    """
    best, operation, usual = failure, failure.case.operation, plain(failure.case.operation)
    left = [usual, *({name: usual[name]} for name in best.case.settings)]  # all at once: a backend may fail everywhere
    while left:
        case = made(operation, {**usual, **best.case.settings, **left.pop(0)})
        same = [f for f in run_case(backend, case, device).failures if (f.kind, f.output) == (best.kind, best.output)]
        if same:
            best = same[0]
            left = [{name: usual[name]} for name in best.case.settings]
    settings, (rule, of_settings) = best.case.settings, _RULES[operation]
    rules = [of_settings[name] for name in of_settings if name in settings]
    if settings.get("form") == "transposed":
        rules = ["G-3"]
    return replace(best, case=replace(best.case, rules=(*rules, rule)))
