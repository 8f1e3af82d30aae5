"""Whose convention a wrong result follows.

The result is compared with what each convention alone predicts, and then with those of a dialect together, so that an
explanation is as narrow as it can be.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.case import Case
from bnbref.conformance.dialects import CHOICES, DIALECTS, REFERENCE, TEXT, Dialect, in_words
from bnbref.conformance.expected import Expected, same, wrong_elements
from bnbref.conformance.judge import Failure
from bnbref.conformance.operations import arguments
from bnbref.conformance.oracles.formula import CLIPPED, Conventions
from bnbref.conformance.oracles.sums import product_interval
from bnbref.conformance.predictions import decayed_within, predict, step_within, weight
from bnbref.conformance.vectors import from_bytes, raw
from bnbref.kernels import eager

_OF_OPTIMIZERS = {f.name for f in fields(Conventions)}
_PRODUCTS = ("gemm_4bit", "gemm_4bit_backward")
_OF_DECAY = {"adafactor": {"scaled_decay"}, "soap": {"decay_after"}, "soap_refresh": {"decay_after"}}
_STEPS = ("optimizer_32bit", "optimizer_8bit", *_OF_DECAY)


def _concern(case: Case) -> set[str]:
    """The fields of a dialect that can change the results of a case."""
    if case.operation in _PRODUCTS:
        return {"row_scales", "nf4", "fp4", "float16_weight", "low_first"}
    if case.operation not in _STEPS:
        return set(TEXT) - _OF_OPTIMIZERS
    k = case.params
    if case.operation in _OF_DECAY:
        return _OF_DECAY[case.operation] if k["weight_decay"] > 0 else set()
    eight = case.operation == "optimizer_8bit"
    clipped = k["optimizer"] in CLIPPED and k["max_unorm"] > 0
    when = {
        "decay_after": k["weight_decay"] > 0,
        "coupled": k["weight_decay"] > 0,
        "raw_gradient": eight and k["optimizer"] in ("rmsprop", "adagrad"),
        "norm": clipped,
        "norm_eps": clipped,
        "clip_8bit": clipped and eight,
        "bad_gradient": not bool(case.inputs["g"].isfinite().all()),
        "scaled_in_16": case.inputs["g"].element_size() == 2 and k["gnorm_scale"] != 1,
        "ties": eight,
        "floor": eight,
    }
    return {name for name, can in when.items() if can}


def _conventions(dialect: Dialect, failure: Failure) -> dict[str, Any]:
    """The fewest fields of the dialect that predict the failure: one; or else all but those that make no difference."""
    concern = _concern(failure.case)
    different = {name: getattr(dialect, name) for name in TEXT if name in concern}
    different = {name: value for name, value in different.items() if value != getattr(REFERENCE, name)}

    def predict_it(changed: dict[str, Any]) -> bool:
        return _matches(failure, replace(REFERENCE, **changed))

    for name, value in different.items():
        if predict_it({name: value}):
            return {name: value}
    if len(different) < 2 or not predict_it(different):
        return {}
    for name in list(different):
        fewer = {other: value for other, value in different.items() if other != name}
        if predict_it(fewer):
            different = fewer
    return different


@functools.lru_cache(maxsize=32)  # asked again for each result of a case, and for each dialect that has the convention
def _step_allowed(dialect: Dialect, case: Case) -> dict[str, Expected]:
    if case.operation in _OF_DECAY:
        return decayed_within(dialect, case)
    with eager():
        return step_within(dialect, case.operation, **case.inputs, **arguments(case.params))


def _matches(failure: Failure, dialect: Dialect) -> bool:
    got, case = failure.got, failure.case
    if got is None:
        return False
    if case.operation in _PRODUCTS:
        k = {**case.inputs, **arguments(case.params)}
        matrix = weight(dialect, k["packed"], k["absmax"], k["blocksize"], k["quant_type"], k["shape"], got.dtype)
        left, right = (k["a"], matrix) if case.operation == "gemm_4bit" else (k["grad"], matrix.t())
        return wrong_elements(got, product_interval(left, right, k.get("bias"))).numel() == 0
    if case.operation in _STEPS:
        allowed = _step_allowed(dialect, case)
        return failure.kind == "value" and wrong_elements(got, allowed[failure.output]).numel() == 0
    y = predict(dialect, case).get(failure.output)
    if y is None or y.dtype != got.dtype or y.shape != got.shape:
        return False
    if failure.kind == "shape":
        return True
    return bool(same(y.reshape(-1)[failure.wrong], got.reshape(-1)[failure.wrong]).all())


def explain(failure: Failure) -> list[str]:
    """Whose rule a wrong result follows: "bnb-cpu: codes from a table of 65,536 bins". Empty if nobody's is known.

    Where it takes several conventions of a dialect, they stand between semicolons.
    """
    found: dict[str, list[str]] = {}
    # Where the reference is said to do the same, no convention makes the difference.
    for dialect in () if _matches(failure, REFERENCE) else DIALECTS:
        conventions = _conventions(dialect, failure)
        if conventions:
            found.setdefault("; ".join(itertools.starmap(in_words, conventions.items())), []).append(dialect.name)
    if not found and failure.case.operation in _PRODUCTS and failure.got is not None:
        found = {
            f"all elements are numbers of {kind}, as sums in it are": ["no backend"] for kind in _narrow(failure.got)
        }
    if not found and _other_order(failure):
        found = {"the bytes of each element are in the other order": ["no backend"]}
    return [f"{', '.join(names)}: {text}" for text, names in found.items()]


def _other_order(failure: Failure) -> bool:
    """Whether all elements are right once the bytes of each are reversed; and zero would not be right in place of them all."""
    got = failure.got
    if got is None or failure.kind != "value" or got.element_size() == 1:
        return False
    expected = failure.case.expected[failure.output]
    swapped = from_bytes(b"".join(raw(x)[::-1] for x in got.reshape(-1)), got.dtype, got.shape)
    zeros = wrong_elements(torch.zeros_like(got), expected)
    return wrong_elements(swapped, expected).numel() == 0 and bool(torch.isin(failure.wrong, zeros).any())


def _narrow(y: Tensor) -> list[str]:
    """The dtypes of 16 bits that hold all elements of a float32 tensor, if there are several and they are not zero."""
    if y.dtype != torch.float32 or y.numel() < 2 or not bool(y.all()):
        return []
    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return [name for name, dtype in kinds.items() if bool((y.to(dtype).float() == y).all())]


def verdict(follows: Sequence[str]) -> str:
    """Whether what `explain` says of a wrong result is a "dialect" or a "defect".

    A dialect is a choice of `dialects.CHOICES` and nothing else. What no known convention explains is a defect.

    >>> verdict(["bnb-triton, torchao: x / absmax"]), verdict(["bnb-cpu: codes from a table of 65,536 bins"]), verdict([])
    ('dialect', 'defect', 'defect')
    """
    texts = {text for line in follows for text in line.partition(": ")[2].split("; ")}
    return "dialect" if texts and texts <= CHOICES else "defect"
