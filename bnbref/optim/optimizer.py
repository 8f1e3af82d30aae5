"""One `torch.optim.Optimizer` for every rule: parameter groups, overrides, checkpoints.

A state is in 8 bits if `optim_bits` is 8 and the parameter has at least `min_8bit_size` elements; a state that was loaded
stays as it was saved.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.blockwise import check_blocksize, check_float
from bnbref.optim import paging
from bnbref.optim.equation import Equation, at_step, check, layout
from bnbref.optim.progress import Progress
from bnbref.optim.rule import Rule
from bnbref.optim.saved import gathered, packed, unpacked
from bnbref.optim.settings import ALWAYS, ANYWHERE, GlobalOptimManager, check_settings
from bnbref.optim.sharding import like, local, shard_of
from bnbref.optim.update import Tails, correction, new_state, step
from bnbref.optim.weights import CORRECTION, check_correction, correction_dtype, opened, store
from bnbref.optim.whole import Job, alike, batches, step_together

_MANY = 8  # equations of one rule: a few numbers are changed by hand, more are computed


class Optimizer(torch.optim.Optimizer):
    """Updates parameters by a `Rule`.  Exact: states and parameters have the same bits eager and compiled.

        8 bits: 2 bytes + 8/256 for two states of a parameter, against 8 in float32

    params: tensors or groups of float32, float16 or bfloat16, read as float32 and rounded once. rule: or several by name, of
    which a group says "rule", and the first is meant by one that says nothing. defaults: of the groups.
    optim_bits: 32 or 8. min_8bit_size: smaller parameters have their state in 32 bits. max_unorm: of clipped rules. is_paged:
    the state of parameters of 100,000 elements or more is kept in pinned host memory and streamed, at most page_bytes of it
    or that of two parameters on the device at a time. page_directory: it is kept in memory-mapped files there.
    stochastic_rounding: of bfloat16, by the default generator of the device or the one given: set its state to repeat a run.
    master_weight_bits: 24 or 32 keeps a correction of 8 or 16 bits beside parameters of 16 bits, which are then trained as if
    they had so many bits (see `bnbref.optim.weights`, `exact_weight`). maximize: against the gradient's sign.
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
        rules = dict(rule) if isinstance(rule, Mapping) else {"": rule}
        self._rules = {name: check(one) for name, one in rules.items()}
        self._layouts = {name: layout(one) for name, one in rules.items()}
        first = next(iter(rules), None)
        if first is None:
            raise ValueError("rule must be a Rule, or at least one by its name, got none")
        self.rule = rules[first]
        self._sources: set[str] = set()
        self.is_paged = is_paged
        self._own: dict[str, Any] = {
            "optim_bits": optim_bits, "min_8bit_size": min_8bit_size, "blocksize": blocksize,
            "max_unorm": max_unorm if any(one.clipped for one in rules.values()) else 0.0,
            "stochastic_rounding": stochastic_rounding, "master_weight_bits": master_weight_bits, "maximize": maximize,
        }  # fmt: skip
        others = {
            "is_paged": is_paged, "page_directory": page_directory, "page_bytes": page_bytes, "generator": generator,
            "foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        check_settings({**self._own, **others})
        self._generator = generator
        self._placement = paging.Placement(is_paged, page_directory, page_bytes)
        super().__init__(params, {**defaults, **({"rule": first} if first else {})})

    # ---- settings ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group of parameters with its own settings; what it does not say comes from the defaults."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            config = {**self._own, **group}
            self._check(config)
            self._at_step(1, config)
            for p in group["params"]:
                self._check_shape(p, config)
        except (TypeError, ValueError, NotImplementedError):
            self.param_groups.pop()
            raise

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Raise if a setting of a group or of one parameter is not valid, or one that only the constructor takes."""
        check_settings(settings)
        here = {*self._own, *self.defaults}
        made = [kind for kind in type(self).__mro__ if issubclass(kind, Optimizer)]
        taken = {name for kind in made for name in inspect.signature(kind.__init__).parameters}
        for name in settings.keys() & taken - here - ANYWHERE:
            if settings[name] not in (None, False, ALWAYS.get(name)):
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

    def _at_step(
        self, t: int, config: Mapping[str, Any], device: torch.device | None = None
    ) -> tuple[Equation, Tensor]:
        """What the rule computes now, and its coefficients in step t."""
        rule, made = self.rule_of(config), self._layouts[config.get("rule", "")]
        if layout(rule) != made:
            raise RuntimeError(
                f"states or codebooks of {rule!r} are not those that it had when the optimizer was made: {made}"
            )
        equation, hyper = at_step(rule, t, config, device)
        if equation.source not in self._sources and len(self._sources) == _MANY:
            warnings.warn(
                f"direction of {rule!r} has computed with other numbers in more than {_MANY} steps, and each of these is "
                f"compiled anew: numbers that change belong to its coefficients",
                stacklevel=4,
            )
        self._sources.add(equation.source)
        return equation, hyper

    def rule_of(self, config: Mapping[str, Any]) -> Rule:
        """The rule of a parameter with these settings."""
        name = config.get("rule", "")
        if name not in self._rules:
            raise ValueError(f"rule of a group must be one of {[*self._rules]}, got {name!r}")
        return self._rules[name]

    def _check_dense(self, what: str, x: Tensor) -> None:
        if x.layout != torch.strided or x.is_nested:
            kind = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
            raise ValueError(f"{what} must be dense: {type(self).__name__} makes no step of {kind}")

    def _check_shape(self, p: Tensor, config: Mapping[str, Any]) -> None:
        self._check_dense("a parameter", p)
        rule = self.rule_of(config)
        if not rule.takes(p.shape):
            others = [name for name, other in self._rules.items() if other.takes(p.shape)]
            raise ValueError(
                f"{rule!r} takes no parameter of shape {tuple(p.shape)}"
                + (f': let its group say "rule": {" or ".join(map(repr, others))}' if others else "")
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
            steps = {i: self.state[p]["step"] for i, p in enumerate(self._parameters()) if self.state.get(p)}
            self._placement.end(steps)
        return loss

    def advance(self, parameters: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> None:
        """The step of some parameters, each with its group. A `page_directory` is a checkpoint again after `step`."""
        jobs = self._jobs(parameters)
        # Before anything is changed, what might be refused: the coefficients of each group and step, and the rule.
        planned: dict[Any, tuple[Equation, Tensor]] = {}
        keys = [(id(config), self.state[p].get("step", 0) + 1, p.device) for p, _, config in jobs]
        for (p, _, config), key in zip(jobs, keys, strict=True):
            self._check_shape(p, config)
            if key not in planned:
                planned[key] = self._at_step(key[1], config, p.device)
        self._placement.begin()
        for p, _, config in jobs:
            if not self.state[p]:
                self.state[p] = self.new_state(p, config, self._memory(p))
            elif CORRECTION not in self.state[p]:  # loaded from a run without
                self.state[p].update(_new_correction(p, config, self._memory(p)))
        by_element = [job for job, key in zip(jobs, keys, strict=True) if not planned[key][0].calls]
        tails, progress = Tails(), Progress()
        try:
            with closing(self._placement.stream([(p.device, self.state[p]) for p, _, _ in by_element])) as states:
                for (p, grad, config), state in zip(by_element, states, strict=True):
                    progress.begin([p])
                    t = self.state[p]["step"] + 1
                    self._update(*planned[id(config), t, p.device], p, grad, state, config, tails)
                    # Pages are written back before the next ones come. Of a shard they may be on another rank alone.
                    if self._placement.pages(p.numel()) and shard_of(p) is not None:
                        tails.run()
                    elif state is not self.state[p]:
                        tails.run_own()
                    self.state[p]["step"] = t
                    progress.end()
            tails.run()
            self._update_together(jobs, keys, planned, progress)
        except BaseException as error:
            try:
                progress.say_interrupted(self._parameters(), [p for p, _, _ in jobs], tails)
            except Warning as said:  # where warnings are errors, what happened is still this error
                raise error from said
            raise

    def _parameters(self) -> list[Tensor]:
        """All parameters, by the indices that they have in a state dict."""
        return [p for group in self.param_groups for p in group["params"]]

    def _rules_and_blocks(self) -> list[tuple[Rule, int]]:
        """The rule and the block size of each parameter, in the order of `_parameters`."""
        settings = [self.settings(p, group) for group in self.param_groups for p in group["params"]]
        return [(self.rule_of(config), config["blocksize"]) for config in settings]

    def _jobs(
        self, parameters: Sequence[tuple[Tensor, Mapping[str, Any]]]
    ) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Those that have a gradient, the part of it that this rank has, and their settings."""
        overrides = GlobalOptimManager.get_instance().overrides()
        common = {id(group): {**self._own, **group} for _, group in parameters}
        jobs = []
        for p, group in parameters:
            if p.grad is None:
                continue
            own = overrides.get(p) if overrides else None
            config = common[id(group)] if own is None else {**common[id(group)], **own}
            if own is not None:
                self._check_known(own)
                self._check(config)
            jobs.append((p, self._checked_gradient(p, p.grad, config), config))
        return jobs

    def _checked_gradient(self, p: Tensor, grad: Tensor, config: Mapping[str, Any]) -> Tensor:
        self._check_dense("a gradient", grad)
        check_float("a parameter", p)
        check_float("a gradient", grad)
        here, shape = local(grad), local(p).shape
        if here.shape != shape:
            raise ValueError(
                f"a gradient must have the shape of its parameter, and be sharded like it: here it has shape "
                f"{tuple(here.shape)}, the parameter {tuple(shape)}"
            )
        if not self.state[p] and _partly_shared(local(p), here):
            raise ValueError(
                f"a gradient must be in memory of its own, or in just its parameter's: of shape {tuple(shape)} they begin "
                f"{here.data_ptr() - local(p).data_ptr()} bytes apart"
            )
        if CORRECTION in self.state[p]:
            check_correction(p, self.state[p][CORRECTION].dtype)
        for s in self.rule_of(config).states if self.state[p] else ():
            if self.state[p][s.key].shape != (shape if s.of == "elements" else s.shape(p.shape)):
                raise ValueError(
                    f"a parameter must keep its shape: its {s.key} has {tuple(self.state[p][s.key].shape)}, from its first step, "
                    f"the parameter now {tuple(shape)}. `del optimizer.state[p]` begins anew"
                )
        return here

    def _update(
        self, equation: Equation, hyper: Tensor, p: Tensor, grad: Tensor, state: Mapping[str, Any], config: Mapping[str, Any],
        tails: Tails,
    ) -> None:  # fmt: skip
        own, shard = local(p.detach()), shard_of(p)
        flat = own.contiguous()
        copied = flat.data_ptr() != own.data_ptr()
        step(
            equation,
            hyper,
            flat,
            -grad if config["maximize"] else grad,
            state,
            blocksize=config["blocksize"],
            noise=self._noise(p, config),
            max_norm=config["max_unorm"] if equation.clipped else 0.0,
            shard=shard,
            tails=None if copied and shard is None else tails,
        )
        if copied and shard is None:
            own.copy_(flat)
        elif copied:  # other ranks may have no copy, and all exchange their blocks at the same time
            tails.then(lambda: own.copy_(flat))

    def _update_together(
        self, jobs: Sequence[Any], keys: Sequence[Any], planned: Mapping[Any, Any], progress: Progress
    ) -> None:
        """Update the parameters whose rules see whole matrices, those of one shape together."""
        together: dict[Any, list[Any]] = {}
        for (p, grad, config), key in zip(jobs, keys, strict=True):
            if planned[key][0].calls:
                together.setdefault((key, *alike(p)), []).append((p, grad, config))
        for (key, *_), all_of_them in together.items():
            for batch in batches(all_of_them):
                progress.begin([p for p, _, _ in batch])
                found = [self._job(p, grad, config) for p, grad, config in batch]
                equation, hyper = planned[key]
                step_together(equation, hyper, found, self._placement.stream)
                for job in found:
                    self.state[job.p]["step"] += 1
                    own = local(job.p.detach())
                    if job.flat.data_ptr() != own.data_ptr():
                        own.copy_(job.flat)
                progress.end()

    def _job(self, p: Tensor, grad: Tensor, config: Mapping[str, Any]) -> Job:
        flat, g = local(p.detach()).contiguous(), (-grad if config["maximize"] else grad).contiguous()
        blocksize = check_blocksize(config["blocksize"], p.numel())
        return Job(p, flat, g, self.state[p], blocksize, self._noise(p, config), shard_of(p))

    def _noise(self, p: Tensor, config: Mapping[str, Any]) -> Tensor | None:
        """Random bits for a parameter that is to be rounded at random."""
        if not config["stochastic_rounding"] or p.dtype != torch.bfloat16:
            return None
        numel = local(p).numel()
        return torch.randint(-(2**15), 2**15, (numel,), dtype=torch.int16, device=p.device, generator=self._generator)

    def new_state(self, p: Tensor, config: Mapping[str, Any], empty: Callable[..., Tensor]) -> dict[str, Any]:
        """The state of p before its first step, by the settings of `settings`. empty: as `update.new_state` takes it."""
        bits = 8 if config["optim_bits"] == 8 and p.numel() >= config["min_8bit_size"] else 32
        blocksize = check_blocksize(config["blocksize"], p.numel())
        shard = shard_of(p)
        if shard is not None and self._placement.directory is not None:
            raise NotImplementedError(
                f"page_directory takes whole parameters: one of shape {tuple(p.shape)} is sharded, and what its ranks would "
                f"write is no checkpoint"
            )
        state = new_state(self.rule_of(config), local(p).shape, bits, blocksize, empty, shard, p.shape)
        return {"step": 0, **state, **_new_correction(p, config, empty)}

    def _memory(self, p: Tensor) -> Callable[[str, Any, torch.dtype], Tensor]:
        """A function that gives memory to a state of p, of its key, shape and dtype."""

        def empty(key: str, shape: Any, dtype: torch.dtype) -> Tensor:
            index = next(i for i, q in enumerate(self._parameters()) if q is p)
            return self._placement.empty(p.device, local(p).numel(), f"{index}.{key}", shape, dtype)

        return empty

    # ---- weights ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def exact_weight(self, p: Tensor) -> Tensor:
        """The value that p is trained with, float32: what it and its correction stand for. Of a shard, that of the shard.  Exact.

        >>> from bnbref.optim import SGD
        >>> p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> p.grad = torch.tensor([2.0**-12], dtype=torch.bfloat16)
        >>> optimizer = SGD([p], lr=1.0, momentum=0.9, master_weight_bits=32)
        >>> optimizer.step()
        >>> p.item(), optimizer.exact_weight(p).item() == 1 - 2**-12
        (1.0, True)
        """
        own = local(p.detach())
        value = opened(own.reshape(-1), [x.to(own.device) for x in correction(self.state.get(p, {}))]).view(own.shape)
        return like(p, value)

    @torch.no_grad()
    def set_exact_weight(self, p: Tensor, value: Tensor) -> None:
        """Set p, and its correction, to a float32 value of its shape, which `exact_weight` then returns."""
        own, given = local(p.detach()), local(value)
        if given.shape != own.shape or given.dtype != torch.float32:
            raise ValueError(
                f"value must be float32 of shape {tuple(own.shape)}, as the parameter, got {given.dtype} of {tuple(given.shape)}"
            )
        group = next((group for group in self.param_groups if any(q is p for q in group["params"])), None)
        if group is None:
            raise ValueError(f"p must be a parameter of this optimizer, got another one of shape {tuple(p.shape)}")
        if not self.state[p]:
            self.state[p] = self.new_state(p, self.settings(p, group), self._memory(p))
        store(own, correction(self.state[p]), given.reshape(-1))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings and states in the layout of bitsandbytes, whose optimizers load it, as does `torch.load(weights_only=True)`.

        States of sharded parameters are whole, on the CPU, and the same as without sharding, for any number of ranks to load:
        it is a collective call.
        """
        whole, parameters = super().state_dict(), self._parameters()
        own = self._rules_and_blocks()
        for i, state in whole["state"].items():
            if isinstance(i, int):
                rule, blocksize = own[i]
                whole["state"][i] = packed(rule, gathered(rule, parameters[i], state, blocksize))
        return whole

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict` of this class or of bitsandbytes' gave, wrapped or not.

        States are copied to where this optimizer keeps its own. Codes of the other dynamic map (bitsandbytes keeps squares with
        the signed one) are decoded and encoded again; a map of other values is refused. What is refused changes nothing.
        """
        if not move_to_device:
            raise ValueError("move_to_device must be True: a state is where its parameter is, or paged")
        held = {i: _Held(dict(state)) for i, state in state_dict["state"].items()}
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict({**state_dict, "state": held})
        except BaseException:
            self.__dict__.update(before)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        own = dict(zip(self._parameters(), self._rules_and_blocks(), strict=True))
        held = [(p, value.state) for p, value in self.state.items() if isinstance(value, _Held)]
        for p, saved in held:  # what is refused is refused before a page is written to
            rule, blocksize = own[p]
            unpacked(rule, p, saved, blocksize, _nowhere)
        for p, saved in held:
            rule, blocksize = own[p]
            self.state[p] = unpacked(rule, p, saved, blocksize, self._memory(p))

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "is_paged", "_own", "_rules", "_layouts", "_sources", "_generator", "_placement")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


def _new_correction(p: Tensor, config: Mapping[str, Any], empty: Callable[..., Tensor]) -> dict[str, Tensor]:
    """A correction of 0 for a parameter that is to have one."""
    dtype = correction_dtype(p.dtype, config["master_weight_bits"])
    return {} if dtype is None else {CORRECTION: empty(CORRECTION, tuple(local(p).shape), dtype).zero_()}


def _partly_shared(p: Tensor, g: Tensor) -> bool:
    """Whether a step, which writes p while it reads g, would write what it has yet to read."""
    if p.device.type == "meta" or not (p.is_contiguous() and g.is_contiguous()):
        return False  # what is not contiguous is copied first
    start, other = p.data_ptr(), g.data_ptr()
    ends = start + p.numel() * p.itemsize, other + g.numel() * g.itemsize
    return (start, p.dtype) != (other, g.dtype) and start < ends[1] and other < ends[0]


def _nowhere(key: str, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Held:
    """Keeps torch's `load_state_dict` from casting states to the parameters' dtype."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
