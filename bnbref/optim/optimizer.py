"""One `torch.optim.Optimizer` for every rule: parameter groups, overrides, checkpoints.

A state is in 8 bits if `optim_bits` is 8 and the parameter has at least `min_8bit_size` elements; a state that was loaded
stays as it was saved.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from bnbref.arguments import check_tensors
from bnbref.blockwise import check_blocksize
from bnbref.optim import paging, planned_steps
from bnbref.optim.equation import Equation
from bnbref.optim.master_weights import CORRECTIONS, correction_dtype, corrections, set_value, value_of
from bnbref.optim.named_rules import NamedRules
from bnbref.optim.rule import Rule
from bnbref.optim.settings import ALWAYS, ANYWHERE, GlobalOptimManager, check_distinct, check_settings
from bnbref.optim.sharding import local, shard_of, sharded_like
from bnbref.optim.state_dict import COUNTS, WRAPPED, gathered_state, of_blocks, unwrapped_state, wrapped_state
from bnbref.optim.update import new_state


class Optimizer(torch.optim.Optimizer):
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
        self._rules = NamedRules(rule)
        self.rule = self._rules.rules[self._rules.first]
        self.is_paged = is_paged
        self._own: dict[str, Any] = {
            "optim_bits": optim_bits, "min_8bit_size": min_8bit_size, "blocksize": blocksize,
            "max_unorm": max_unorm if any(one.clipped for one in self._rules.rules.values()) else 0.0,
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
            config = {**self._own, **group}
            self._check(config)
            self._rules.at_step(1, config)
            for p in group["params"]:
                check_tensors(**{"a parameter": p})
                self._rules.check_shape(p, config)
                self._check_place(p)
        except BaseException:  # whatever a rule raises when it is asked for its coefficients
            self.param_groups.pop()
            raise

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Raise if a setting of a group or of one parameter is not valid, or one that only the constructor takes."""
        check_settings(settings)
        here = {*self._own, *self.defaults}
        made = [kind for kind in type(self).__mro__ if issubclass(kind, Optimizer)]
        taken = {name for kind in made for name in inspect.signature(kind.__init__).parameters}
        for name in sorted(settings.keys() & taken - here - ANYWHERE):
            holds = ALWAYS[name] if name in ALWAYS else getattr(self, name, False)
            if settings[name] != holds and (settings[name] is not None or name in ALWAYS):
                raise ValueError(
                    f"{name} is no setting of a group or of a parameter, got {settings[name]!r}: {type(self).__name__} has "
                    f"{sorted(here)}"
                )

    def _check_known(self, own: Mapping[str, Any]) -> None:
        """Raise if a setting of one parameter is none of this optimizer's, and so would mean nothing."""
        here = {*self._own, *self.defaults, *ANYWHERE}
        for name, value in own.items():
            if name not in here and ALWAYS.get(name) != value:
                raise ValueError(
                    f"GlobalOptimManager overrides {name} by {value!r}, which {type(self).__name__} has not: it has "
                    f"{sorted(here)}"
                )

    def settings(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a parameter: those of `GlobalOptimManager`, then those of its group, then the optimizer's."""
        return {**self._own, **group, **GlobalOptimManager.get_instance().overrides().get(p, {})}

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
        if self._placement.directory is not None:
            states = [self._state(p) for p in self._parameters()]
            counts = [{key: state[key] for key in COUNTS if key in state} for state in states]
            self._placement.end({i: each for i, each in enumerate(counts) if "step" in each})
        return loss

    @_disable_dynamo  # its kernels are compiled without that, and tracing the Python between them takes seconds
    def advance(self, parameters: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> None:
        """The step of some parameters, each with its group. A `page_directory` is a checkpoint again after `step`."""
        steps = self._planned_steps(parameters)
        self._placement.begin()
        for planned in steps:
            self._begin(planned.p, planned.config)
        planned_steps.take_steps(steps, self.state, self._placement, self._generator, self._parameters)

    def _planned_steps(self, parameters: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> list[planned_steps.PlannedStep]:
        """The steps of the parameters that have a gradient. What is to be refused is refused here, before anything is changed."""
        overrides = GlobalOptimManager.get_instance().overrides()
        common = {id(group): {**self._own, **group} for _, group in parameters}
        equations: dict[Any, tuple[Equation, Tensor]] = {}
        steps = []
        for p, group in parameters:
            if p.grad is None:
                continue
            own = overrides.get(p) if overrides else None
            config = common[id(group)] if own is None else {**common[id(group)], **own}
            if own is not None:
                self._check_known(own)
                self._check(config)
            state = self._state(p)
            key = (id(config), state.get("step", 0) + 1, p.device)
            if key not in equations:
                check_settings(config)  # which may have been changed since the group was made
                equations[key] = self._rules.at_step(key[1], config, p.device)
            rule, blocksize = self._rules.of(config), config["blocksize"]
            grad = planned_steps.checked_gradient(p, p.grad, state, rule, blocksize)
            self._rules.check_shape(p, config)
            self._check_place(p)
            steps.append(planned_steps.PlannedStep(p, grad, config, *equations[key]))
        return steps

    def _state(self, p: Tensor) -> dict[str, Any]:
        """The state of p, empty if it has none. Whoever steps parameters in a class of their own may have put a saved one there,
        as torch's ZeroRedundancyOptimizer does."""
        if WRAPPED in self.state.get(p, {}):
            self._read({q: self.state[q] for q in self._parameters() if WRAPPED in self.state.get(q, {})})
        found: dict[str, Any] = self.state.get(p, {})
        return found

    def _parameters(self) -> list[Tensor]:
        """All parameters, by the indices that they have in a state dict."""
        return [p for group in self.param_groups for p in group["params"]]

    def _rules_and_blocks(self) -> list[tuple[Rule, int]]:
        """The rule and the block size of each parameter, in the order of `_parameters`."""
        settings = [self.settings(p, group) for group in self.param_groups for p in group["params"]]
        return [(self._rules.of(config), config["blocksize"]) for config in settings]

    def _begin(self, p: Tensor, config: Mapping[str, Any]) -> None:
        """Gives p its first state; or, if its state was loaded without the correction that p is to have, that correction."""
        state = self._state(p)
        if "step" not in state:
            new = self.new_state(p, config, self._memory(p))
            self.state[p].update(new)
        elif not corrections(p, state):
            state.update(_new_correction(p, config, self._memory(p)))

    def new_state(self, p: Tensor, config: Mapping[str, Any], empty: Callable[..., Tensor]) -> dict[str, Any]:
        """The state of p before its first step, by the settings of `settings`. empty: as `update.new_state` takes it."""
        bits = 8 if config["optim_bits"] == 8 and p.numel() >= config["min_8bit_size"] else 32
        blocksize = check_blocksize(config["blocksize"], p.numel())
        state = new_state(self._rules.of(config), local(p).shape, bits, blocksize, empty, shard_of(p), p.shape)
        blocks = of_blocks(blocksize, p.numel()) if any(x.dtype == torch.uint8 for x in state.values()) else {}
        return {"step": 0, **blocks, **state, **_new_correction(p, config, empty)}

    def _check_place(self, p: Tensor) -> None:
        """NotImplementedError if p is sharded in a way that no step is made for, or its state is to be in files."""
        if shard_of(p) is not None and self._placement.directory is not None:
            raise NotImplementedError(
                f"page_directory takes whole parameters: one of shape {tuple(p.shape)} is sharded, and what its ranks would "
                f"write is no checkpoint"
            )

    def _memory(self, p: Tensor) -> Callable[[str, Any, torch.dtype], Tensor]:
        """A function that gives memory to a state of p, of its key, shape and dtype."""

        def empty(key: str, shape: Any, dtype: torch.dtype) -> Tensor:
            return self._placement.empty(p.device, local(p).numel(), self._name(p, key), shape, dtype)

        return empty

    def _name(self, p: Tensor, key: str) -> str:
        """The name that the files of a state of p begin with."""
        return f"{next(i for i, q in enumerate(self._parameters()) if q is p)}.{key}"

    # ---- weights ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def exact_weight(self, p: Tensor) -> Tensor:
        """The value that p is trained with, float32: what it and its correction stand for. Of a shard, that of the shard.  Exact.

        It is in memory of its own, and so stays what it is when p is stepped.

        >>> from bnbref.optim import SGD
        >>> p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> p.grad = torch.tensor([2.0**-12], dtype=torch.bfloat16)
        >>> optimizer = SGD([p], lr=1.0, momentum=0.9, master_weight_bits=32)
        >>> optimizer.step()
        >>> p.item(), optimizer.exact_weight(p).item() == 1 - 2**-12
        (1.0, True)
        """
        own = local(p.detach())
        rest = corrections(p, self._state(p))
        value = value_of(own.reshape(-1), [x.to(own.device) for x in rest])
        return sharded_like(p, (value.clone() if value.data_ptr() == own.data_ptr() else value).view(own.shape))

    @torch.no_grad()
    def set_exact_weight(self, p: Tensor, value: Tensor) -> None:
        """Set p, and its correction, to a float32 value of its shape, which `exact_weight` then returns.

        p may have been cast since its last step: it gets a correction of its new dtype.
        """
        own, given = local(p.detach()), local(value)
        if given.shape != own.shape or given.dtype != torch.float32:
            raise ValueError(
                f"value must be float32 of shape {tuple(own.shape)}, as the parameter, got {given.dtype} of {tuple(given.shape)}"
            )
        group = next((group for group in self.param_groups if any(q is p for q in group["params"])), None)
        if group is None:
            raise ValueError(f"p must be a parameter of this optimizer, got another one of shape {tuple(p.shape)}")
        for dtype, key in CORRECTIONS.items():
            if dtype != p.dtype and self._state(p).pop(key, None) is not None:
                self._placement.forget(self._name(p, key))
        self._begin(p, self.settings(p, group))
        set_value(own, corrections(p, self.state[p]), given.reshape(-1))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings and states in the layout of bitsandbytes, whose optimizers load it, as does `torch.load(weights_only=True)`.

        What others keep in `optimizer.state[p]`, as Lookahead does, is saved beside the rule's states under its own name.
        States of sharded parameters are whole, on the CPU, and the same as without sharding, for any number of ranks to load: it
        is a collective call. What others keep of them must be sharded like the parameter.
        """
        for p in self._parameters():
            self._state(p)
        saved = self.register_state_dict_post_hook(
            lambda _, whole: self._save(whole), prepend=True
        )  # before those of others
        try:
            return super().state_dict()
        finally:
            saved.remove()

    def _save(self, whole: dict[str, Any]) -> None:
        """Put states as they are saved in the place of those that torch has collected."""
        own, parameters = self._rules_and_blocks(), self._parameters()
        for i, state in whole["state"].items():
            if isinstance(i, int):
                rule, _ = own[i]
                whole["state"][i] = wrapped_state(rule, gathered_state(rule, parameters[i], state))

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict` of this class or of bitsandbytes' gave, wrapped or not.

        States are copied to where this optimizer keeps its own. Codes of the other dynamic map (bitsandbytes keeps squares with
        the signed one) are decoded and encoded again; a map of other values is refused. What is refused changes nothing.
        """
        if not move_to_device:
            raise ValueError("move_to_device must be True: a state is where its parameter is, or paged")
        before = {"state": self.state, "param_groups": self.param_groups}
        held = self.register_load_state_dict_pre_hook(lambda _, given: _held(given))  # after those of others
        try:
            super().load_state_dict(dict(state_dict))
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            held.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in {**self.defaults, **self._rules.of(group).defaults}.items():
                group.setdefault(name, value)
        self._read({p: value.state for p, value in self.state.items() if isinstance(value, _Held)})

    def _read(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Give these parameters the states that `state_dict` made of theirs."""
        own = dict(zip(self._parameters(), self._rules_and_blocks(), strict=True))
        for p, state in saved.items():  # what is refused is refused before a page is written to
            rule, blocksize = own[p]
            unwrapped_state(rule, p, state, blocksize, _nowhere)
        for p, state in saved.items():
            rule, blocksize = own[p]
            self.state[p] = unwrapped_state(rule, p, state, blocksize, self._memory(p))

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "is_paged", "_own", "_rules", "_generator", "_placement")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


def _new_correction(p: Tensor, config: Mapping[str, Any], empty: Callable[..., Tensor]) -> dict[str, Tensor]:
    """A correction of 0 for a parameter that is to have one."""
    dtype = correction_dtype(p.dtype, config["master_weight_bits"])
    if dtype is None:
        return {}
    key = CORRECTIONS[p.dtype]
    return {key: empty(key, tuple(local(p).shape), dtype).zero_()}


def _nowhere(key: str, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _held(given: Mapping[str, Any]) -> dict[str, Any]:
    return {**given, "state": {i: _Held(dict(state)) for i, state in given["state"].items()}}


class _Held:
    """Wraps a state that is loaded. torch's `load_state_dict` would cast the tensors of a dict to the parameter's dtype."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
