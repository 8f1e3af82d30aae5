"""The rules of an optimizer by name: which one a parameter has, and what it computes in a step."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.arguments import written
from bnbref.optim.equation import Equation, at_step, check_rule, state_layout
from bnbref.optim.rule import Rule

# Different equations that one rule may have before a warning: each is compiled anew. Somebody who changes a number by hand makes
# a few; more come of a number that the program computes, and that should be a coefficient.
_MANY = 8


class NamedRules:
    """The rules of an optimizer. A group names its rule as "rule"; without that it has the first."""

    def __init__(self, rule: Rule | Mapping[str, Rule]) -> None:
        self.rules = {
            name: check_rule(one) for name, one in (rule if isinstance(rule, Mapping) else {"": rule}).items()
        }
        if not self.rules:
            raise ValueError("rule must be a Rule, or at least one by its name, got none")
        self.first = next(iter(self.rules))
        self.clipped = any(one.clipped for one in self.rules.values())
        self._layouts = {name: state_layout(one) for name, one in self.rules.items()}
        self._sources: dict[str, set[str]] = {name: set() for name in self.rules}

    def of(self, config: Mapping[str, Any]) -> Rule:
        """The rule of a parameter with these settings."""
        name = config.get("rule", self.first)
        if not isinstance(name, str) or name not in self.rules:
            raise ValueError(f"rule of a group must be one of {[*self.rules]}, got {written(name)}")
        return self.rules[name]

    def check_shape(self, p: Tensor, config: Mapping[str, Any]) -> None:
        """Raise ValueError if the rule of p takes no parameter of its shape, or elements of p share their memory."""
        reach = 0  # of the sides so far, from the narrowest on
        for stride, size in () if p.is_contiguous() else sorted(zip(p.stride(), p.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise ValueError(
                    f"a parameter must have memory for each of its elements, side after side, got one of shape {tuple(p.shape)} "
                    f"that was expanded, or whose rows overlap or interleave: its strides are {p.stride()}"
                )
            reach += stride * (size - 1)
        rule = self.of(config)
        if not rule.takes(p.shape):
            others = [name for name, other in self.rules.items() if other.takes(p.shape)]
            raise ValueError(
                f"{rule!r} takes no parameter of shape {tuple(p.shape)}"
                + (f': let its group say "rule": {" or ".join(map(repr, others))}' if others else "")
            )

    def at_step(self, t: int, config: Mapping[str, Any], device: torch.device | None = None) -> tuple[Equation, Tensor]:
        """The equation that the rule is now, and its coefficients in step t."""
        name = config.get("rule", self.first)
        rule, made, sources = self.of(config), self._layouts[name], self._sources[name]
        if state_layout(rule) != made:
            raise RuntimeError(
                f"states or codebooks of {rule!r} are not those that it had when the optimizer was made: {made}"
            )
        equation, hyper = at_step(rule, t, config, device)
        if equation.source not in sources and len(sources) == _MANY:
            warnings.warn(
                f"direction of {rule!r} has computed with other numbers in more than {_MANY} steps, and each of these is "
                f"compiled anew: numbers that change belong to its coefficients",
                stacklevel=9,
            )
        sources.add(equation.source)
        return equation, hyper
