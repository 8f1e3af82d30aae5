"""States in a checkpoint, in bitsandbytes' layout.

    state_dict()["state"][i] = {"step": 3, "__bnb_optimizer_quant_state__": {"state1": ..., "absmax1": ..., "qmap1": ...}}

The wrapper keeps FSDP from gathering what does not have the parameter's shape.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise
from bnbref.arguments import written
from bnbref.blockwise import block_count, check_blocksize
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, is_table_of, value_table
from bnbref.optim.kinds import in_float64
from bnbref.optim.master_weights import CORRECTIONS, checked_correction
from bnbref.optim.rule import Rule, State, absmax_key, qmap_key
from bnbref.optim.sharding import blocks_of, gather_scales, local, part_of, shard_of, sharded_like, unsharded

WRAPPED = "__bnb_optimizer_quant_state__"

BLOCKSIZE = 256
"""Elements of a block in bitsandbytes. A state whose blocks are others says so under the key "blocksize"."""

COUNTS = ("step", "blocksize")
"""The keys of a state that have an integer."""

_BESIDE = {*COUNTS, *CORRECTIONS.values(), "unorm_vec", "gnorm_vec"}
"""Keys that a saved state may have beside those of its rule. The last two are written by bitsandbytes, and mean nothing here."""


def of_blocks(blocksize: int, numel: int) -> dict[str, int]:
    """What the checkpoint of a state with so many elements says of its blocks.

    >>> of_blocks(128, 1000), of_blocks(256, 1000), of_blocks(5000, 1000)
    ({'blocksize': 128}, {}, {'blocksize': 1000})
    """
    return {} if same_blocks(blocksize, BLOCKSIZE, numel) else {"blocksize": min(blocksize, numel)}


def same_blocks(one: int, other: int, numel: int) -> bool:
    """Whether two sizes make the same blocks of so many elements."""
    return min(one, numel) == min(other, numel)


def gathered_state(rule: Rule, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a whole parameter. If p is a shard of it, the parts are gathered, which is a collective call."""
    shard = shard_of(p)
    if shard is None:
        return dict(state)
    found: dict[str, Any] = {key: _gathered(p, key, x) for key, x in _of_others(rule, state).items()}
    if "step" not in state:
        return found
    found |= {key: state[key] for key in COUNTS if key in state}
    for s in rule.states:
        found[s.key] = (unsharded(p, state[s.key]) if s.of == "elements" else state[s.key].clone()).cpu()
        if state[s.key].dtype == torch.uint8:
            blocks = check_blocksize(state.get("blocksize", BLOCKSIZE), p.numel())
            found[absmax_key(s.key)] = gather_scales(p, shard, state[absmax_key(s.key)], blocks).cpu()
    for key in state.keys() & CORRECTIONS.values():
        # As int32, because gloo knows no int16.
        found[key] = unsharded(p, state[key].to(torch.int32)).to(state[key].dtype).cpu()
    return found


def _gathered(p: Tensor, key: str, x: Any) -> Any:
    """What others keep of a sharded parameter under a key: whole and on the CPU, if it is sharded alike."""
    placements = getattr(p, "placements", None)
    if hasattr(x, "full_tensor"):
        if (x.shape, x.placements) == (p.shape, placements):
            return x.full_tensor().cpu()
    elif not isinstance(x, Tensor) or x.shape not in (p.shape, local(p).shape):
        return x
    raise ValueError(
        f"{key!r} in the state of a sharded parameter of shape {tuple(p.shape)} must be a DTensor with its placements, "
        f"{placements}, got {type(x).__name__} of shape {tuple(x.shape)}, which can be no part of a state that is whole"
    )


def wrapped_state(rule: Rule, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as it is saved: with the values of its codes, and in one tensor what the rule has stacked."""
    wrapped: dict[str, Any] = {}
    for s in rule.states:
        if s.key not in state or s.key in rule.stacked[1:]:
            continue
        keys = rule.stacked if s.key in rule.stacked else (s.key,)
        for name in (str, absmax_key):
            parts = [state[name(key)] for key in keys if name(key) in state]
            if parts:
                wrapped[name(s.key)] = parts[0] if len(parts) == 1 else torch.stack(parts)
        if state[s.key].dtype == torch.uint8:
            # A copy: torch.distributed.checkpoint loads into what is saved, and the table itself is that of all codes.
            wrapped[qmap_key(s.key)] = value_table(rule.codebook(s), torch.device("cpu")).clone()
    wrapped |= {key: state[key] for key in state.keys() & CORRECTIONS.values()}
    if rule.clipped and wrapped:
        # Room that bitsandbytes expects to find.
        wrapped["unorm_vec"] = torch.zeros(1, dtype=torch.float32, device="cpu")
    others = _of_others(rule, state)  # a whole saved state, if a wrapper has put one there since the last step
    counts = {key: state[key] for key in COUNTS if key in state}
    return {**counts, **({WRAPPED: wrapped} if wrapped or others else {}), **others}


def _names(rule: Rule) -> set[str]:
    return {name(s.key) for s in rule.states for name in (str, absmax_key, qmap_key)}


def _of_others(rule: Rule, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a state holds that is no business of its rule."""
    return {key: x for key, x in state.items() if key not in _names(rule) | _BESIDE}


def unwrapped_state(
    rule: Rule, p: Tensor, saved: Mapping[str, Any], blocksize: int, empty: Callable[..., Tensor]
) -> dict[str, Any]:
    """The state of p, read from a saved one that is wrapped or not, in memory that `empty` gives.

    Raises ValueError if the saved state does not fit p, or is that of another rule as far as that can be seen. (The states of
    Adam, AdamW and LAMB look alike.) What stands beside a wrapped state is not the rule's, and kept.
    """
    bare = {key: x for key, x in saved.items() if key != WRAPPED}
    others = _of_others(rule, bare) if WRAPPED in saved else {}
    saved = _unstacked(rule, {**{key: x for key, x in bare.items() if key not in others}, **saved.get(WRAPPED, {})})
    state: dict[str, Any] = {key: _copied(p, x) for key, x in others.items()}
    if not saved:
        return state
    if "step" not in saved:
        raise ValueError(f"the saved state has no 'step', only {sorted(saved)}")
    known = _names(rule)
    unknown = sorted(saved.keys() - known - _BESIDE)
    if unknown and known & saved.keys():
        raise ValueError(f"the saved state has {unknown}, which {rule!r} has not: it is of another rule")
    state["step"] = _count(saved, "step", 0)

    def put(key: str, every: Tensor, dtype: torch.dtype) -> None:
        state[key] = empty(key, tuple(local(p).shape), dtype).copy_(part_of(p, every))

    for s in rule.states:
        tensor, size = _saved(rule, saved, s.key), torch.Size(s.shape(p.shape))
        if tensor.numel() != size.numel():
            raise ValueError(f"saved {s.key} has {tensor.numel()} numbers, its parameter has {size.numel()} {s.of}")
        if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
            raise ValueError(f"saved {s.key} must be uint8 codes or floats, got {tensor.dtype}")
        if tensor.dtype != torch.uint8:
            _check_sign(rule, s, tensor)
        if s.of != "elements":
            state[s.key] = empty(s.key, tuple(size), torch.float32).copy_(tensor.view(size))
            continue
        if tensor.dtype != torch.uint8:
            put(s.key, tensor, torch.float32)
            continue
        each, key = check_blocksize(blocksize, p.numel()), absmax_key(s.key)
        own = BLOCKSIZE
        if "blocksize" in saved:
            own = _count(saved, "blocksize", 1)
        elif _saved(rule, saved, key).numel() != block_count(p.numel(), check_blocksize(own, p.numel())):
            own = blocksize  # bitsandbytes says none, and had blocks of 2048 until 0.43: the number of scales tells
        if not same_blocks(own, blocksize, p.numel()):
            raise ValueError(
                f"saved {s.key} is in blocks of {own}, not {blocksize}: blocksize must be that of the saved state"
            )
        state |= of_blocks(blocksize, p.numel())
        codes, scales = _reencoded(rule, s, tensor, _saved(rule, saved, key), saved.get(qmap_key(s.key)), each)
        _check_sign(rule, s, tensor, saved.get(qmap_key(s.key)))
        blocks = blocks_of(p, each)
        scales = scales[blocks.start : blocks.stop]
        put(s.key, codes, torch.uint8)
        state[key] = empty(key, tuple(scales.shape), torch.float32).copy_(scales)
    correction = checked_correction(p, saved)
    if correction is not None:
        put(CORRECTIONS[p.dtype], correction, correction.dtype)
    return state


def _copied(p: Tensor, x: Any) -> Any:
    """A copy of what others have kept of p: sharded like p, if it was saved by `_gathered`."""
    if not isinstance(x, Tensor):
        return copy.deepcopy(x)
    x = x.detach().to(p.device, copy=True)
    return x if shard_of(p) is None or x.shape != p.shape else sharded_like(p, part_of(p, x))


def _count(saved: Mapping[str, Any], key: str, least: int) -> int:
    """An integer of a saved state; as a float, too, since the steps of torch's optimizers are tensors of float32."""
    x = in_float64(saved[key])
    if x is None or not (least <= x < 2**53 and x == int(x)):
        raise ValueError(f"saved {key} must be an integer from {least} on, got {written(saved[key])}")
    return int(x)


def _saved(rule: Rule, saved: Mapping[str, Any], key: str) -> Tensor:
    if key not in saved:
        raise ValueError(
            f"the saved state has no {key!r}, only {sorted(saved)}: it is not one of {rule!r}, by bnbref or bitsandbytes"
        )
    if not isinstance(saved[key], Tensor):
        raise ValueError(
            f"saved {key} must be a tensor, got {saved[key]!r}: torch's flatten_optimizer_state_dict=True loses states that are "
            f"wrapped in a dictionary, leave it out"
        )
    tensor: Tensor = saved[key]
    if tensor.is_meta:
        raise ValueError(f"saved {key} must have numbers, got a tensor on meta of shape {tuple(tensor.shape)}")
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
    first = rule.stacked[0]
    unstacked: dict[str, Any] = {}
    for i, key in enumerate(rule.stacked):
        unstacked |= {name(key): saved[name(first)][i] for name in (str, absmax_key) if name(first) in saved}
        if qmap_key(first) in saved:
            unstacked[qmap_key(key)] = saved[qmap_key(first)]
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
    if not absmax.is_floating_point() or not bool((absmax.isfinite() & (absmax >= 0)).all()):
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
