"""One `torch.optim.Optimizer` for every rule: its settings, those of groups, and the step. States are in `stateful`."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from bnbref.arguments import check_one_of, check_tensors, written
from bnbref.optim import paging, stepping
from bnbref.optim.equation import Equation
from bnbref.optim.kinds import SettingError, number
from bnbref.optim.named_rules import NamedRules
from bnbref.optim.planned_steps import PlannedStep, check_apart, checked_gradient
from bnbref.optim.rule import Rule
from bnbref.optim.settings import ALWAYS, ANYWHERE, GlobalOptimManager, check_distinct, check_settings, says
from bnbref.optim.sharding import shard_of
from bnbref.optim.stateful import Stateful


class Optimizer(Stateful):
    """Updates parameters by a `Rule`.  Exact: states and parameters have the same bits eager and compiled.

        bytes for the two states of an element: 2 + 8/256 in 8 bits, 8 in float32

    params: tensors or groups of float32, float16 or bfloat16, read as float32 and rounded once. rule: a Rule, or a dict of
    several by name; a group chooses one by its key "rule", and has the first if it has no such key. defaults: the settings of
    groups that do not say their own.
    optim_bits: 32 or 8. min_8bit_size: smaller parameters have their state in 32 bits. max_unorm: of clipped rules. is_paged:
    the state of parameters of 100,000 elements or more is kept in pinned host memory and streamed, at most page_bytes of it
    or that of two parameters on the device at a time. page_directory: it is kept in memory-mapped files there.
    stochastic_rounding: of bfloat16, by the default generator of the device or the one given: set its state to repeat a run.
    master_weight_bits: 24 or 32 keeps a correction of 8 or 16 bits beside parameters of 16 bits, which are then trained as if
    they had so many bits (see `bnbref.optim.master_weights`, `exact_weight`). maximize: against the gradient's sign.
    foreach, fused: which of torch's implementations is to run; there is one here, whatever they say. capturable,
    differentiable: False, as the coefficients of a step are made on the host and no graph is kept.

    >>> class SignDescent(Rule):
    ...     states = ()
    ...     def coefficients(self, t, group):
    ...         return {"rate": group["lr"], "decay": 1.0}
    ...     def direction(self, p, g, c):
    ...         return (g.sign(),)
    >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> p.grad = torch.tensor([3.0, -4.0])
    >>> optimizer = Optimizer([p], SignDescent(), {"lr": 0.5})
    >>> optimizer.step()
    >>> p.data
    tensor([0.5000, 2.5000])
    """

    rule: Rule

    def __init__(
        self, params: Any, rule: Rule | Mapping[str, Rule], defaults: Mapping[str, Any], *, optim_bits: int = 32,
        min_8bit_size: int = 4096, blocksize: int = 256, max_unorm: float = 0.0, is_paged: bool = False,
        page_directory: str | Path | None = None, page_bytes: int = paging.PAGE_BYTES, stochastic_rounding: bool = False,
        master_weight_bits: int | None = None,
        generator: torch.Generator | None = None, maximize: bool = False, foreach: bool | None = None,
        fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        check_one_of("defaults", defaults, Mapping)
        self._rules = NamedRules(rule)
        self.rule = self._rules.rules[self._rules.first]
        self.is_paged = is_paged
        self._own = {
            "optim_bits": optim_bits, "min_8bit_size": min_8bit_size, "blocksize": blocksize,
            "max_unorm": max_unorm,
            "stochastic_rounding": stochastic_rounding, "master_weight_bits": master_weight_bits, "maximize": maximize,
        }  # fmt: skip
        others = {
            "is_paged": is_paged, "page_directory": page_directory, "page_bytes": page_bytes, "generator": generator,
            "foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        check_settings({**self._own, **others})
        self._generator = generator
        self._placement = paging.Placement(is_paged, page_directory, page_bytes)
        super().__init__(params, {**defaults, **({"rule": self._rules.first} if self._rules.first else {})})

    # ---- settings ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group of parameters with its own settings; what it does not say comes from the defaults."""
        if isinstance(param_group, dict):  # if it is none, torch says so
            for name, value in self._rules.of(param_group).defaults.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_distinct(group["params"])
            config = self._check_group(group)
            for p in group["params"]:
                check_tensors(**{"a parameter": p})
                self._rules.check_shape(p, config)
                self._check_place(p)
        except BaseException:  # whatever a rule raises when it is asked for its coefficients
            self.param_groups.pop()
            raise

    def _check_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        config = self._merged(group)
        self._judge(config)
        self._rules.at_step(1, config)
        return config

    def _judge(self, settings: Mapping[str, Any]) -> None:
        """Raise if a setting of a group or of one parameter is not valid, or one that only the constructor takes and that says
        something else here. Settings of the rule are judged where it reads them."""
        check_settings(settings)
        if number(settings, "max_unorm") > 0 and not self._rules.of(settings).clipped:
            raise SettingError(
                f"max_unorm must be 0 where no step is clipped, as those of LARS and LAMB are, got "
                f"{written(settings['max_unorm'])}"
            )
        here = {*self._own, *self.defaults}
        for name in sorted(settings.keys() & self._of_constructor() - here - ANYWHERE):
            if not self._already(name, settings):
                raise ValueError(
                    f"{name} is no setting of a group or of a parameter, got {written(settings[name])}: "
                    f"{type(self).__name__} has {sorted(here)}"
                )

    def _of_constructor(self) -> frozenset[str]:
        """The names of all that the constructor takes, or that of bitsandbytes took."""
        kind: Any = type(self)
        return _arguments(kind) | ALWAYS.keys()

    def _already(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether one of these settings, which only the constructor takes, says what holds."""
        return any(says(settings[name], way) for way in self._holds(settings).get(name, (None,)))

    def _holds(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """What holds for a group with these settings, by the names of arguments that only the constructor takes: the ways to say
        it. Of those that are not here, None does, as False and 0 do."""
        directory = self._placement.directory
        return {
            **{name: (value,) for name, value in ALWAYS.items()}, "is_paged": (self.is_paged,), "generator": (self._generator,),
            "page_directory": (None,) if directory is None else (directory.path, str(directory.path)),
            "page_bytes": (self._placement.page_bytes,),
        }  # fmt: skip

    def _check_known(self, own: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Raise if a setting of one parameter is none of this optimizer's, and so would mean nothing. config: with all others."""
        here = {*self._own, *self.defaults, *ANYWHERE}
        arguments = self._of_constructor()
        for name, value in own.items():
            if name not in here and not (name in arguments and self._already(name, config)):
                raise ValueError(
                    f"GlobalOptimManager overrides {name} by {written(value)}, which {type(self).__name__} has not: it has "
                    f"{sorted(here)}"
                )

    # ---- step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. closure: computes the loss again, which is returned.

        An exception in the middle, such as out of memory, leaves whole the parameters before the one that it met, and a warning
        says which.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.advance([(p, group) for group in self.param_groups for p in group["params"]])
        self._end_of_pages()
        return loss

    @_disable_dynamo  # its kernels are compiled without that, and tracing the Python between them takes seconds
    def advance(self, parameters: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> None:
        """The step of some parameters, each with its group. A `page_directory` is a checkpoint again after `step`."""
        steps = self._planned_steps(parameters)
        if self._placement.directory is not None:
            self._placement.directory.begin()
        self._move_to_files()
        for planned in steps:
            self._begin(planned.p, planned.config)
        stepping.take_steps(steps, self.state, self._placement, self._generator, self._parameters)

    def _planned_steps(self, parameters: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> list[PlannedStep]:
        """The steps of the parameters that have a gradient. What is to be refused is refused here, before anything is changed."""
        overrides = GlobalOptimManager.get_instance().overrides()
        common = {id(group): self._merged(group) for _, group in parameters}
        equations: dict[Any, tuple[Equation, Tensor]] = {}
        steps = []
        for p, group in parameters:
            if p.grad is None:
                continue
            own = overrides.get(p) if overrides else None
            config = common[id(group)] if own is None else self._merged({**group, **own})
            if own is not None:
                self._check_known(own, config)
            state = self._state(p)
            key = (id(config), state.get("step", 0) + 1, p.device)
            if key not in equations:
                self._judge(config)  # which may have been changed since the group was made
                equations[key] = self._rules.at_step(key[1], config, p.device)
            rule, blocksize = self._rules.of(config), config["blocksize"]
            grad = checked_gradient(p, p.grad, state, rule, blocksize)
            self._rules.check_shape(p, config)
            self._check_place(p)
            steps.append(PlannedStep(p, grad, config, *equations[key]))
        check_apart(steps)
        return steps

    def _check_place(self, p: Tensor) -> None:
        """NotImplementedError if p is sharded in a way that no step is made for, or its state is to be in files."""
        if shard_of(p) is not None and self._placement.directory is not None:
            raise NotImplementedError(
                f"page_directory takes whole parameters: one of shape {tuple(p.shape)} is sharded, and what its ranks would "
                f"write is no checkpoint"
            )

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "is_paged", "_own", "_rules", "_generator", "_placement")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


@functools.cache
def _arguments(kind: Any) -> frozenset[str]:
    """The names of what the constructors of a class and of those that it is made of take."""
    made = [base for base in kind.__mro__ if issubclass(base, Optimizer)]
    return frozenset(name for base in made for name in inspect.signature(base.__init__).parameters)
