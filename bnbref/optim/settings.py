"""Settings of an optimizer, of a group of parameters, of a single parameter. One that is not valid is refused by name."""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from bnbref.arguments import check_one_of, checked, written
from bnbref.blockwise import check_blocksize
from bnbref.optim.kinds import count, elements, flag, number, of_python, one_of, one_of_kinds

_CHECKS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    "optim_bits": partial(one_of, allowed=(8, 32)), "master_weight_bits": partial(one_of, allowed=(24, 32, None)),
    "min_8bit_size": count, "page_bytes": partial(count, least=1), "max_unorm": number,
    **dict.fromkeys(("is_paged", "stochastic_rounding", "nonzero_squares", "maximize", "capturable", "differentiable"), flag),
    **dict.fromkeys(("foreach", "fused"), partial(one_of_kinds, kinds=(bool, type(None)))),
    "generator": partial(one_of_kinds, kinds=(torch.Generator, type(None))),
    "page_directory": partial(one_of_kinds, kinds=(str, Path, type(None))),
}  # fmt: skip

_REFUSED = {
    "capturable": "the coefficients of a step are computed on the host, and a captured graph would keep those of one step",
    "differentiable": "a step is made in place, and keeps nothing for a gradient",
}

ALWAYS = {"percentile_clipping": 100, "block_wise": True, "skip_zeros": False}
"""Settings of older versions of bitsandbytes, each with the only value that it may have here."""


def says(value: Any, only: Any) -> bool:
    """Whether a value equals the only one that is possible. A number may be of any type, and None stands for "not given".

    >>> says(100.0, 100), says(0, False), says(None, False), says("", False), says(torch.ones(2), 1)
    (True, True, True, False, False)
    >>> says([0.5, 1], (0.5, 1.0)), says("original", "original"), says(torch.ones(2), (1, 1, 1))
    (True, True, False)
    """
    if isinstance(only, tuple):
        each = elements(value)
        return each is not None and len(each) == len(only) and all(map(says, each, only))
    value = of_python(value)
    if value is None or isinstance(value, Real):
        return (value or 0) == (only or 0)
    return value is only or (isinstance(value, (str, Path)) and value == only)


ANYWHERE = {"params", "foreach", "fused", *_REFUSED}
"""Names that a group may have although they are no settings of a group. They mean the same in every group, or nothing."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise TypeError, ValueError or NotImplementedError, naming the setting, if one that every optimizer has is not valid.

    Any other name (lr, betas, frequency) means what the rule takes it for, which checks it when it makes its coefficients of it.

    >>> check_settings({"optim_bits": 8, "foreach": None, "frequency": "whatever"})
    """
    for name, check in _CHECKS.items():
        if name in settings:
            check(settings, name)
    bits = settings.get("master_weight_bits")
    if bits is not None and settings.get("stochastic_rounding"):
        raise ValueError(
            f"stochastic_rounding must be False where master_weight_bits is {bits}: the correction keeps what rounding takes away"
        )
    check_blocksize(settings.get("blocksize", 1), 1)
    for name, reason in _REFUSED.items():
        if settings.get(name):
            raise NotImplementedError(f"{name} must be False, got {written(settings[name])}: {reason}")


class GlobalOptimManager:
    """Settings of single parameters, which override those of their optimizer. There is one instance: `get_instance()`.

    >>> import bnbref
    >>> layer = torch.nn.Linear(64, 64)
    >>> manager = GlobalOptimManager.get_instance()
    >>> manager.override_config(layer.weight, "optim_bits", 32)
    >>> optimizer = bnbref.optim.Adam8bit(layer.parameters())
    >>> optimizer.settings(layer.weight, optimizer.param_groups[0])["optim_bits"]
    32
    """

    _instance: ClassVar["GlobalOptimManager | None"] = None
    # A thread may make a layer with settings of its own while another one makes a step, or the first one of the process.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager has one instance: call GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> "GlobalOptimManager":
        """The manager of this process."""
        with cls._lock:
            if cls._instance is None:
                made = cls.__new__(cls)
                made.initialize()
                cls._instance = made
            return cls._instance

    def initialize(self) -> None:
        """Forget all settings."""
        self._of_parameter = WeakIdKeyDictionary()
        self._of_module = weakref.WeakKeyDictionary()

    _of_parameter: WeakIdKeyDictionary
    _of_module: "weakref.WeakKeyDictionary[nn.Module, dict[str, dict[str, Any]]]"

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Nothing to do: an override belongs to its parameter, before and after the optimizer is made."""

    @checked
    def override_config(
        self, parameters: Tensor | Iterable[Tensor], key: str | None = None, value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Override the setting `key` of these parameters, or several: lr, betas, optim_bits, min_8bit_size and so on.

        ValueError unless either key or key_value_dict is given, TypeError for what is no parameter. What a setting says is judged
        by the optimizers of the parameter, when they step it.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError(
                f"override_config takes key and value, or key_value_dict, got {written(key)} and {key_value_dict!r}"
            )
        config = dict(key_value_dict) if key_value_dict is not None else {key: value}
        every = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for p in every:
            check_one_of("each of parameters", p, Tensor)
        with self._lock:
            for p in every:
                self._of_parameter.setdefault(p, {}).update(config)

    @checked
    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Overrides settings of the parameter that the module has under that name at the time of a step."""
        with self._lock:
            self._of_module.setdefault(module, {}).setdefault(param_name, {}).update(config)

    def overrides(self) -> WeakIdKeyDictionary:
        """All settings by parameter."""
        found = WeakIdKeyDictionary()
        with self._lock:
            for module, by_name in self._of_module.items():
                for name, config in by_name.items():
                    p = getattr(module, name, None)
                    if isinstance(p, Tensor):
                        found[p] = dict(config)
            for p, config in self._of_parameter.items():
                found[p] = {**found.get(p, {}), **config}
        return found


def check_distinct(params: Sequence[Tensor]) -> None:
    """ValueError if a parameter is in the list twice, as a tied weight may be: torch warns of it, and steps it twice."""
    first: dict[int, int] = {}
    for i, p in enumerate(params):
        before = first.setdefault(id(p), i)
        if before != i:
            raise ValueError(
                f"params must have each parameter once, got one of shape {tuple(p.shape)} at {before} and at {i}: leave one out"
            )
