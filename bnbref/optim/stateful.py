"""The states of an optimizer: where they are kept, how they are saved and loaded, and the weights that they stand for.

A state is in 8 bits if `optim_bits` is 8 and the parameter has at least `min_8bit_size` elements; a state that was loaded
stays as it was saved.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.arguments import check_one_of, check_tensors
from bnbref.blockwise import check_blocksize
from bnbref.optim import paging
from bnbref.optim.master_weights import CORRECTIONS, correction_dtype, corrections, set_value, value_of
from bnbref.optim.named_rules import NamedRules
from bnbref.optim.page_directory import Directory
from bnbref.optim.rule import Rule
from bnbref.optim.saved_state import Held, held, unwrapped_state
from bnbref.optim.settings import GlobalOptimManager
from bnbref.optim.sharding import check_not_fsdp1, local, shard_of, sharded_like
from bnbref.optim.state_dict import BESIDE, COUNTS, WRAPPED, gathered_state, names_of, of_blocks, wrapped_state
from bnbref.optim.update import new_state


class Stateful(torch.optim.Optimizer):
    """The half of `Optimizer` that keeps states. The other half gives it rules, settings of its own and a place for states."""

    _rules: NamedRules
    _own: dict[str, Any]
    _placement: paging.Placement

    def settings(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a parameter: those of `GlobalOptimManager`, then those of its group, then the optimizer's."""
        return self._merged({**group, **GlobalOptimManager.get_instance().overrides().get(p, {})})

    def _merged(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a group, and those of the optimizer for what it does not say. Where one rule of several is clipped,
        the optimizer's max_unorm is that rule's: the groups of others have 0, unless they say otherwise, which is refused."""
        others = {"max_unorm": 0.0} if self._rules.clipped and not self._rules.of(group).clipped else {}
        return {**self._own, **others, **group}

    def _check_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a group with those of the optimizer. Raises if one of them is not valid."""
        raise NotImplementedError

    def _state(self, p: Tensor) -> dict[str, Any]:
        """The state of p, empty if it has none. Whoever steps parameters in a class of their own may have put a saved one there,
        as torch's ZeroRedundancyOptimizer does."""
        found: dict[str, Any] = self.state.get(p, {})
        if WRAPPED in found:
            self._read({q: self.state[q] for q in self._parameters() if WRAPPED in self.state.get(q, {})})
            found = self.state[p]
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
        check_tensors(p=p)
        own = local(p.detach())
        rest = corrections(p, self._state(p))
        value = value_of(own.reshape(-1), [x.to(own.device) for x in rest])
        return sharded_like(p, (value.clone() if value.data_ptr() == own.data_ptr() else value).view(own.shape))

    @torch.no_grad()
    def set_exact_weight(self, p: Tensor, value: Tensor) -> None:
        """Set p, and its correction, to a float32 value of its shape, which `exact_weight` then returns.

        p may have been cast since its last step: it gets a correction of its new dtype. ValueError for a value of another dtype
        or shape or without numbers, and for a p that is no parameter of this optimizer.
        """
        check_tensors(p=p, value=value)
        own, given = local(p.detach()), local(value)
        if given.shape != own.shape or given.dtype != torch.float32 or given.is_meta:
            raise ValueError(
                f"value must be float32 of shape {tuple(own.shape)}, as the parameter, got {given.dtype} of {tuple(given.shape)} "
                f"on {given.device}"
            )
        group = next((group for group in self.param_groups if any(q is p for q in group["params"])), None)
        if group is None:
            raise ValueError(f"p must be a parameter of this optimizer, got another one of shape {tuple(p.shape)}")
        directory, state = self._placement.directory, self._state(p)
        gone = [key for dtype, key in CORRECTIONS.items() if dtype != p.dtype and state.pop(key, None) is not None]
        if directory is not None:  # files are named by an index, which another parameter may have had
            directory.begin()
            self._move_to_files([p])  # others may have been cast, too, and wait for their value
            for key in gone:
                directory.forget(self._name(p, key))
        self._begin(p, self.settings(p, group))
        set_value(own, corrections(p, self.state[p]), given.reshape(-1))
        self._end_of_pages()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings and states in the layout of bitsandbytes, whose optimizers load it, as does `torch.load(weights_only=True)`.

        What others keep in `optimizer.state[p]`, as Lookahead does, is saved beside the rule's states under its own name.
        States of sharded parameters are whole, on the CPU, and the same as without sharding, for any number of ranks to load: it
        is a collective call. What others keep of them must be sharded like the parameter. NotImplementedError if FSDP1 asks for
        the states of flat pieces, as `FSDP.optim_state_dict` does.
        """
        check_not_fsdp1()
        for p in self._parameters():
            self._state(p)
        # Called before the hooks of others, which so see what is saved.
        saved = self.register_state_dict_post_hook(lambda _, whole: self._save(whole), prepend=True)
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
        check_one_of("state_dict", state_dict, Mapping)
        if not move_to_device:
            raise ValueError("move_to_device must be True: a state is where its parameter is, or paged")
        before = {"state": self.state, "param_groups": self.param_groups}
        hook = self.register_load_state_dict_pre_hook(lambda _, given: held(given))  # after those of others
        try:
            super().load_state_dict(dict(state_dict))
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            hook.remove()
        if any(isinstance(p, Tensor) for p in self.state):
            self._end_of_pages()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in {**self.defaults, **self._rules.of(group).defaults}.items():
                group.setdefault(name, value)
        self._read({p: value.state for p, value in self.state.items() if isinstance(value, Held)})

    def _read(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Give these parameters the states that `state_dict` made of theirs."""
        own = dict(zip(self._parameters(), self._rules_and_blocks(), strict=True))
        for p, state in saved.items():  # what is refused is refused before a page is written to
            rule, blocksize = own[p]
            unwrapped_state(rule, p, state, blocksize, _nowhere)
        for group in self.param_groups:
            self._check_group(group)
        directory = self._placement.directory
        if directory is not None and saved:
            directory.begin()
            directory.arrange(self._parameters())
            index = {p: i for i, p in enumerate(own)}
            saved = {p: directory.apart(index[p], state) for p, state in saved.items()}
        for p, state in saved.items():
            rule, blocksize = own[p]
            self.state[p] = unwrapped_state(rule, p, state, blocksize, self._memory(p))

    def _move_to_files(self, only: Sequence[Tensor] | None = None) -> None:
        """Moves states that are in memory into the files of the `page_directory`: those of a copy of an optimizer, and that of a
        parameter which was in no group for a while. only: of these parameters; None for all."""
        directory = self._placement.directory
        if directory is None:
            return
        directory.arrange(self._parameters())
        homeless = self._homeless(directory)
        if only is not None:
            homeless &= {*only}
        if homeless:  # what follows looks at all parameters, and `advance` may be called for each of them
            rules = zip(self._parameters(), self._rules_and_blocks(), strict=True)
            self._read({p: wrapped_state(rule, self.state[p]) for p, (rule, _) in rules if p in homeless})

    def _homeless(self, directory: Directory) -> set[Tensor]:
        """The parameters whose states are in memory, and belong into files. The directory is arranged."""
        indexed = enumerate(self._parameters())
        found = {p for i, p in indexed if not directory.has(i) and _has_tensors(self.state.get(p, {}))}
        if not found:
            return found
        rules = zip(self._parameters(), self._rules_and_blocks(), strict=True)
        # What others keep there stays in memory, and may be all that there is.
        return {
            p for p, (rule, _) in rules if p in found and self.state[p].keys() & (names_of(rule) | BESIDE - {*COUNTS})
        }

    def _end_of_pages(self) -> None:
        """Says in the `page_directory` that it is a checkpoint of the states as they are, if all of them are there."""
        directory = self._placement.directory
        if directory is not None and not self._homeless(directory):
            states = [self._state(p) for p in self._parameters()]
            counts = [{key: state[key] for key in COUNTS if key in state} for state in states]
            directory.end({i: each for i, each in enumerate(counts) if "step" in each})


def _new_correction(p: Tensor, config: Mapping[str, Any], empty: Callable[..., Tensor]) -> dict[str, Tensor]:
    """A correction of 0 for a parameter that is to have one."""
    dtype = correction_dtype(p.dtype, config["master_weight_bits"])
    if dtype is None:
        return {}
    key = CORRECTIONS[p.dtype]
    return {key: empty(key, tuple(local(p).shape), dtype).zero_()}


def _nowhere(key: str, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _has_tensors(state: Mapping[str, Any]) -> bool:
    """Whether a state belongs into files: that of an empty parameter, too, which has no bytes, but names and shapes."""
    return any(isinstance(x, Tensor) for x in state.values())
