"""A state as it is saved, in bitsandbytes' layout. How it is loaded is in `bnbref.optim.saved_state`.

    state_dict()["state"][i] = {"step": 3, "__bnb_optimizer_quant_state__": {"state1": ..., "absmax1": ..., "qmap1": ...}}

The wrapper keeps FSDP from gathering what does not have the parameter's shape.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.blockwise import check_blocksize
from bnbref.codebooks import value_table
from bnbref.optim.master_weights import CORRECTIONS
from bnbref.optim.rule import Rule, absmax_key, qmap_key
from bnbref.optim.sharding import gather_scales, local, shard_of, unsharded

WRAPPED = "__bnb_optimizer_quant_state__"

BLOCKSIZE = 256
"""Elements of a block in bitsandbytes. A state whose blocks are others says so under the key "blocksize"."""

COUNTS = ("step", "blocksize")
"""The keys of a state that have an integer."""

BESIDE = {*COUNTS, *CORRECTIONS.values(), "unorm_vec", "gnorm_vec"}
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
    found: dict[str, Any] = {key: _gathered(p, key, x) for key, x in of_others(rule, state).items()}
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
    others = of_others(rule, state)  # a whole saved state, if a wrapper has put one there since the last step
    counts = {key: state[key] for key in COUNTS if key in state}
    return {**counts, **({WRAPPED: wrapped} if wrapped or others else {}), **others}


def names_of(rule: Rule) -> set[str]:
    """The keys that a saved state may have for the states of a rule: their own, and those of scales and maps."""
    return {name(s.key) for s in rule.states for name in (str, absmax_key, qmap_key)}


def of_others(rule: Rule, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a state holds that is no business of its rule."""
    return {key: x for key, x in state.items() if key not in names_of(rule) | BESIDE}
