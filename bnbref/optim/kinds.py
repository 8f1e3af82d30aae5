"""Kinds of settings. A rule reads a setting of a group by one of these functions, which refuses what is not allowed.

So the constructor, a group, a loaded state dict and a step, which all ask for the coefficients, judge it alike and by its name.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bnbref.arguments import written

_LARGEST = torch.finfo(torch.float32).max

_MOST = 2**63 - 1
"""The largest count. Python's integers have no end, but where one is divided or multiplied by a float it must be one."""


class SettingError(ValueError, TypeError):
    """A setting has a value, or a type, that nothing can be computed with.

    The functions that read one raise it, and so may a rule. It reaches the user as it is; whatever else a rule raises is named as
    a failure of the rule.
    """


def number(group: Mapping[str, Any], name: str, least: float = 0.0, most: float = _LARGEST) -> float:
    """A setting that is a number between two others, of any type but bool: `SettingError` if it is none.

    >>> number({"eps": torch.tensor(0.25)}, "eps"), number({"beta2_decay": -1}, "beta2_decay", least=-10, most=0)
    (0.25, -1.0)
    >>> number({"lr": True}, "lr")
    Traceback (most recent call last):
    bnbref.optim.kinds.SettingError: lr must not be negative, but a finite number, got True
    """
    x = in_float64(group[name])
    if x is None or not (least <= x <= most and math.isfinite(x)):
        usual = "not be negative, but a finite number"
        allowed = usual if abs(least) < 1e-9 and most == _LARGEST else f"be a finite number from {least:g} to {most:g}"
        raise SettingError(f"{name} must {allowed}, got {written(group[name])}")
    return x


def of_python(x: Any) -> Any:
    """A number of torch or of numpy as one of Python: what is computed with it on the host is computed in float64."""
    one = isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta
    numpy = type(x).__module__ == "numpy" and getattr(x, "ndim", None) == 0  # its bool is no Real
    return x.item() if one or numpy else x


def in_float64(x: Any) -> float | None:
    """A number of any type as float; None if it is none, or none that float has."""
    x = of_python(x)
    if isinstance(x, bool) or not isinstance(x, Real):
        return None
    try:
        return float(x)
    except OverflowError:
        return None


def elements(x: Any) -> tuple[Any, ...] | None:
    """The elements of a sequence, or of a vector of torch or numpy; None if x is neither: a string, a set, a single number.

    >>> elements([0.5, 0]), elements("0.5"), elements(0.5)
    ((0.5, 0), None, None)
    """
    if isinstance(x, Sequence) and not isinstance(x, (str, bytes, bytearray)):
        return tuple(x)
    vector = type(x).__module__ == "numpy" or (isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta)
    return tuple(x.tolist()) if vector and getattr(x, "ndim", None) == 1 else None


def weight(group: Mapping[str, Any], name: str) -> float:
    """A setting that is the weight of an average, in [0, 1): `SettingError` if it is none.

    >>> weight({"momentum": 0.5}, "momentum")
    0.5
    """
    x = in_float64(group[name])
    if x is None or not 0 <= x < 1:
        raise SettingError(f"{name} must lie in [0, 1), got {written(group[name])}")
    return x


def weights(group: Mapping[str, Any], name: str = "betas", many: int | None = None) -> tuple[float, ...]:
    """The weights of averages in a setting that has one or several: `SettingError` if one is none, or there are too few.

    many: how many of them to return, the first ones. None: all. They may be in any sequence that is no string.

    >>> weights({"betas": (0.5, 0)}), weights({"betas": [0.5, 0.75]}, many=1)
    ((0.5, 0.0), (0.5,))
    """
    given = group[name]
    found = elements(given)
    each = (given,) if found is None else found
    if many is not None and len(each) < many:
        raise SettingError(f"{name} must be {many} numbers, got {written(given)}")
    try:
        return tuple(weight({name: x}, name) for x in each)[:many]
    except SettingError:
        raise SettingError(f"{name} must lie in [0, 1), got {written(given)}") from None


def count(group: Mapping[str, Any], name: str, least: int = 0, most: int = _MOST) -> int:
    """A setting that counts, from `least` to `most`: `SettingError` if it is no such integer.

    >>> count({"frequency": 10}, "frequency", least=1)
    10
    """
    x = group[name]
    whole = int(x) if isinstance(x, Integral) and not isinstance(x, bool) else None
    if whole is None or not least <= whole <= most:
        bounded = most < _MOST or (whole is not None and whole > most)
        last = f"to {most}" if bounded else "on"
        raise SettingError(f"{name} must be an integer from {least} {last}, got {written(x)}")
    return whole


def flag(group: Mapping[str, Any], name: str) -> bool:
    """A setting that is True or False: `SettingError` if it is neither, as "False" of a command line.

    >>> flag({"nesterov": False}, "nesterov")
    False
    """
    x = group[name]
    if not isinstance(x, bool):
        raise SettingError(f"{name} must be True or False, got {written(x)}")
    return x


def one_of(group: Mapping[str, Any], name: str, allowed: Sequence[Any]) -> Any:
    """A setting that is one of these integers, words or None: `SettingError` if it is none of them.

    >>> one_of({"optim_bits": 8}, "optim_bits", (8, 32))
    8
    """
    x = group[name]
    if isinstance(x, bool) or not isinstance(x, (Integral, str, type(None))) or x not in allowed:
        *others, last = map(repr, allowed)
        raise SettingError(f"{name} must be {', '.join(others)} or {last}, got {written(x)}")
    return x


def one_of_kinds(group: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
    """A setting of one of these types: `SettingError` if it is of none of them.

    >>> one_of_kinds({"foreach": None}, "foreach", (bool, type(None)))
    """
    x = group[name]
    if not isinstance(x, kinds):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise SettingError(f"{name} must be {names}, got {written(x)}")
    return x
