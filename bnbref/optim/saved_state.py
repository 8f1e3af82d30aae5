"""A state that is loaded: read from a saved one of bnbref or of bitsandbytes, and refused if it does not fit.

Every number in it is asked for, because it comes from a file: its type, how many there are, signs, scales, the map of codes.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise
from bnbref.arguments import written
from bnbref.blockwise import FLOATS, block_count, check_blocksize
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, is_table_of
from bnbref.optim.kinds import in_float64
from bnbref.optim.master_weights import CORRECTIONS, checked_correction
from bnbref.optim.rule import Rule, State, absmax_key, qmap_key
from bnbref.optim.sharding import blocks_of, local, part_of, shard_of, sharded_like
from bnbref.optim.state_dict import BESIDE, BLOCKSIZE, WRAPPED, names_of, of_blocks, of_others, same_blocks

_NUMBERS = (torch.float64, *FLOATS)
"""The dtypes that saved numbers may have. Of floats of 8 bits torch does not say whether they are finite."""


class Held:
    """Wraps a saved state while torch's `load_state_dict` runs, which casts the tensors of a dict to the parameter's dtype."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def held(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of an optimizer, with each state of a parameter in a `Held`. ValueError if it is none.

    What others keep in `optimizer.state` under a key that is no parameter's, such as a count of their own, stays as it is.
    """
    states, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(states, Mapping) or groups is None:
        raise ValueError(
            f"state_dict must have 'state', a dict, and 'param_groups', got one with {sorted(map(str, state_dict))}"
        )
    known = {i for group in groups if isinstance(group, Mapping) for i in group.get("params", ())}
    others = {key: x for key, x in states.items() if key not in known}
    texts = {str(i) for i in known}  # by which JSON writes the numbers that are keys, and reads them as texts
    lost = [
        key
        for key, x in others.items()
        if isinstance(key, int) or key in texts or (isinstance(x, Mapping) and WRAPPED in x)
    ]
    if lost:
        raise ValueError(f"state_dict has states of parameters that are in none of its param_groups: {written(lost)}")
    for i, state in states.items():
        if i in others:
            continue
        if not isinstance(state, Mapping) or not isinstance(state.get(WRAPPED, {}), Mapping):
            zero = ": torch's ZeroRedundancyOptimizer puts None into what it is given to load, so give it a copy"
            raise ValueError(
                f"the saved state of parameter {i} must be a dict, and so must what it wraps, got {written(state)}"
                + (zero if state is None else "")
            )
    return {**state_dict, "state": {i: x if i in others else Held(dict(x)) for i, x in states.items()}}


def unwrapped_state(
    rule: Rule, p: Tensor, saved: Mapping[str, Any], blocksize: int, empty: Callable[..., Tensor]
) -> dict[str, Any]:
    """The state of p, read from a saved one that is wrapped or not, in memory that `empty` gives.

    Raises ValueError if the saved state does not fit p, or is that of another rule as far as that can be seen. (The states of
    Adam, AdamW and LAMB look alike.) What stands beside a wrapped state is not the rule's, and kept.
    """
    bare = {key: x for key, x in saved.items() if key != WRAPPED}
    others = of_others(rule, bare) if WRAPPED in saved else {}
    saved = _unstacked(rule, {**{key: x for key, x in bare.items() if key not in others}, **saved.get(WRAPPED, {})})
    state: dict[str, Any] = {key: _copied(p, x) for key, x in others.items()}
    if not saved:
        return state
    if "step" not in saved:
        raise ValueError(f"the saved state has no 'step', only {sorted(saved)}")
    known = names_of(rule)
    unknown = sorted(saved.keys() - known - BESIDE)
    if unknown and known & saved.keys():
        raise ValueError(f"the saved state has {unknown}, which {rule!r} has not: it is of another rule")
    state["step"] = _count(saved, "step", 0)

    def put(key: str, x: Tensor, shape: Any, dtype: torch.dtype) -> None:
        state[key] = empty(key, tuple(shape), dtype).copy_(x.view(shape))

    here = local(p).shape
    for s in rule.states:
        tensor, shape = _numbers(rule, p, saved, s), s.shape(p.shape)
        if s.of != "elements":
            put(s.key, tensor, shape, torch.float32)
        elif tensor.dtype != torch.uint8:
            put(s.key, part_of(p, tensor), here, torch.float32)
        else:
            state |= of_blocks(blocksize, p.numel())
            codes, scales = _codes(rule, p, saved, s, tensor, blocksize)
            put(s.key, codes, here, torch.uint8)
            put(absmax_key(s.key), scales, scales.shape, torch.float32)
    by_element = [s.key for s in rule.states if s.of == "elements"]
    coded = [key for key in by_element if state[key].dtype == torch.uint8]
    if coded and coded != by_element:
        raise ValueError(
            f"saved {', '.join(coded)} must be floats, or {', '.join(by_element)} all codes: a step takes either"
        )
    correction = checked_correction(p, saved)
    if correction is not None:
        put(CORRECTIONS[p.dtype], part_of(p, correction), here, correction.dtype)
    return state


def _numbers(rule: Rule, p: Tensor, saved: Mapping[str, Any], s: State) -> Tensor:
    """The tensor of a saved state s: as many floats or codes as p needs, and of signs that s can have."""
    tensor, numel = _saved(rule, saved, s.key), torch.Size(s.shape(p.shape)).numel()
    if tensor.numel() != numel:
        raise ValueError(f"saved {s.key} has {tensor.numel()} numbers, its parameter has {numel} {s.of}")
    if tensor.dtype not in (torch.uint8, *_NUMBERS):
        raise ValueError(f"saved {s.key} must be uint8 codes or floats of 16 bits or more, got {tensor.dtype}")
    _check_sign(rule, s, tensor)
    return tensor


def _codes(
    rule: Rule, p: Tensor, saved: Mapping[str, Any], s: State, codes: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """This rank's codes of a saved state s and their scales, in blocks of blocksize and by the rule's codebook."""
    absmax, qmap = _saved(rule, saved, absmax_key(s.key)), qmap_key(s.key)
    values = None if saved.get(qmap) is None else _saved(rule, saved, qmap)
    own = BLOCKSIZE
    if "blocksize" in saved:
        own = _count(saved, "blocksize", 1)
    elif absmax.numel() != block_count(p.numel(), check_blocksize(own, p.numel())):
        own = blocksize  # bitsandbytes says none, and had blocks of 2048 until 0.43: the number of scales tells
    if not same_blocks(own, blocksize, p.numel()):
        raise ValueError(
            f"saved {s.key} is in blocks of {own}, not {blocksize}: blocksize must be that of the saved state"
        )
    each = check_blocksize(blocksize, p.numel())
    new, scales = _reencoded(rule, s, codes, absmax, values, each)
    _check_sign(rule, s, codes, values)
    blocks = blocks_of(p, each)
    return part_of(p, new), scales[blocks.start : blocks.stop]


def _copied(p: Tensor, x: Any) -> Any:
    """A copy of what others have kept of p: sharded like p, if it was saved by `_gathered`."""
    if not isinstance(x, Tensor):
        return copy.deepcopy(x)
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach().to(p.device, copy=True)
    return x if shard_of(p) is None or x.shape != p.shape else sharded_like(p, part_of(p, x))


def _count(saved: Mapping[str, Any], key: str, least: int) -> int:
    """An integer of a saved state; as a float, too, since the steps of torch's optimizers are tensors of float32."""
    x = in_float64(saved[key])
    if x is None or not (least <= x < 2**53 and x == int(x)):
        raise ValueError(f"saved {key} must be an integer from {least} on, got {written(saved[key])}")
    return int(x)


def _saved(rule: Rule, saved: Mapping[str, Any], key: str) -> Tensor:
    flat = "torch's flatten_optimizer_state_dict=True and torchtitan lose states that are wrapped in a dictionary"
    if key not in saved:
        why = flat if saved.keys() <= BESIDE else f"it is not one of {rule!r}, by bnbref or bitsandbytes"
        raise ValueError(f"the saved state has no {key!r}, only {sorted(saved)}: {why}")
    if not isinstance(saved[key], Tensor):
        raise ValueError(f"saved {key} must be a tensor, got {saved[key]!r}: {flat}")
    tensor: Tensor = saved[key]
    if tensor.is_meta or tensor.layout != torch.strided:
        where = "meta" if tensor.is_meta else tensor.layout
        raise ValueError(f"saved {key} must have numbers, got a tensor on {where} of shape {tuple(tensor.shape)}")
    return tensor


def _check_sign(rule: Rule, s: State, tensor: Tensor, values: Tensor | None = None) -> None:
    """ValueError if the numbers of a saved state have signs that state s cannot have, so that it is another state.

    bitsandbytes calls all states state1 and state2: only their signs tell a momentum from an average of squares. values: what
    codes stand for. Without them nothing is known of codes.
    """
    lowest = tensor
    if tensor.dtype == torch.uint8:
        if values is None:
            return
        if s.signed and bool((values >= 0).all()):
            raise ValueError(
                f"saved {s.key} is coded without a sign, but {rule!r} keeps it with one: it is of another rule"
            )
        lowest = values.to(tensor.device)[tensor.int()]
    if not s.signed and bool((lowest < 0).any()):
        raise ValueError(
            f"saved {s.key} has negative numbers, but that of {rule!r} has none: it is of another rule, or State({s.key!r}) "
            f"has a sign after all"
        )


def _unstacked(rule: Rule, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state with a tensor for each of the states that bitsandbytes has stacked in one."""
    if not rule.stacked or rule.stacked[-1] in saved:
        return saved
    first, many = rule.stacked[0], len(rule.stacked)
    unstacked: dict[str, Any] = {}
    for name in (str, absmax_key):
        if name(first) not in saved:
            continue
        tensor = _saved(rule, saved, name(first))
        if tensor.shape[:1] != (many,):
            raise ValueError(
                f"saved {name(first)} must have {many} states, one after another, got shape {tuple(tensor.shape)}: it is of "
                f"another rule than {rule!r}"
            )
        unstacked |= {name(key): x for key, x in zip(rule.stacked, tensor, strict=True)}
    if qmap_key(first) in saved:
        unstacked |= {qmap_key(key): saved[qmap_key(first)] for key in rule.stacked}
    return {**saved, **unstacked}


def _reencoded(
    rule: Rule, state: State, codes: Tensor, absmax: Tensor, values: Tensor | None, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rule's codebook, of codes whose values are `values`."""
    absmax = absmax.reshape(-1)
    if absmax.numel() != block_count(codes.numel(), blocksize):
        raise ValueError(
            f"saved absmax has {absmax.numel()} scales for {codes.numel()} codes: not blocks of {blocksize}; "
            f"blocksize=... must be that of the optimizer that saved it"
        )
    if absmax.dtype not in _NUMBERS or not bool((absmax.isfinite() & (absmax >= 0)).all()):
        raise ValueError(f"saved {absmax_key(state.key)} has scales that are no floats, NaN, infinite or negative")
    book = rule.codebook(state)
    if values is None or is_table_of(values, book):
        return codes, absmax
    if not any(is_table_of(values, known) for known in (*rule.codebooks, DYNAMIC, DYNAMIC_UNSIGNED)):
        raise ValueError(
            f"saved {qmap_key(state.key)} is no map of {rule!r}, nor a dynamic map: its codes mean nothing"
        )
    decoded = blockwise.dequantize(codes, absmax, values.to(codes.device, torch.float32), blocksize, torch.float32)
    return blockwise.quantize(decoded, book, blocksize)
