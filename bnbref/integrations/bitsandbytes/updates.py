"""One step of an optimizer on bare tensors, as bitsandbytes' functional module and its operators have it.

Sources of the numbers: `bnbref.optim.rules`. The names and the order of arguments are bitsandbytes'.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.blockwise import block_count, check_blocksize
from bnbref.codebooks import value_table
from bnbref.optim import rules
from bnbref.optim.equation import at_step
from bnbref.optim.rules import absmax_key
from bnbref.optim.state_dict import BLOCKSIZE
from bnbref.optim.update import step


def optimizer_update_32bit(
    optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, beta1: float, eps: float, step: int, lr: float,
    state2: Tensor | None = None, beta2: float = 0.0, beta3: float = 0.0, alpha: float = 0.0, weight_decay: float = 0.0,
    gnorm_scale: float = 1.0, unorm_vec: Tensor | None = None, max_unorm: float = 0.0, skip_zeros: bool = False,
) -> None:  # fmt: skip
    """One step in place of p, state1 and state2, float32, by the rule of that name: see `bnbref.optim.rules`.  Exact.

    g is multiplied by gnorm_scale in float32. unorm_vec is not written. skip_zeros must be False.
    """
    numbers = {"lr": lr, "betas": (beta1, beta2, beta3), "eps": eps, "weight_decay": weight_decay, "alpha": alpha}
    _update(optimizer_name, g, p, (state1, state2), None, numbers, step, gnorm_scale, max_unorm, skip_zeros)


def optimizer_update_8bit_blockwise(
    optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, beta1: float, beta2: float,
    beta3: float, alpha: float, eps: float, step: int, lr: float, qmap1: Tensor, qmap2: Tensor | None, absmax1: Tensor,
    absmax2: Tensor | None, weight_decay: float = 0.0, gnorm_scale: float = 1.0, skip_zeros: bool = False,
) -> None:  # fmt: skip
    """One step in place of p and of the uint8 codes and float32 absmax of its states, blocks of 256.  Exact.

    qmap1 and qmap2 must be the dynamic maps, with a sign where the state has one: ValueError if not. The one state of adagrad
    and rmsprop has none; bitsandbytes' classes give them the map with a sign all the same, so that is taken too.
    """
    numbers = {"lr": lr, "betas": (beta1, beta2, beta3), "eps": eps, "weight_decay": weight_decay, "alpha": alpha}
    scales = ((absmax1, qmap1), (absmax2, qmap2))
    _update(optimizer_name, g, p, (state1, state2), scales, numbers, step, gnorm_scale, 0.0, skip_zeros)


def _update(
    name: str, g: Tensor, p: Tensor, states: tuple[Tensor, Tensor | None],
    scales: tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]] | None, numbers: Mapping[str, Any],
    t: int, gnorm_scale: float, max_norm: float, skip_zeros: bool,
) -> None:  # fmt: skip
    """The step of both functions. states, scales: of bitsandbytes' first and second state; without scales states are float32."""
    if name not in rules.RULES:
        raise ValueError(f"optimizer_name must be one of {sorted(rules.RULES)}, got {name!r}")
    if skip_zeros:
        raise NotImplementedError("skip_zeros must be False: a zero gradient is a gradient, here as in bitsandbytes")
    if g.shape != p.shape or g.device != p.device:
        raise ValueError(f"g must be like p, {tuple(p.shape)} on {p.device}, got {tuple(g.shape)} on {g.device}")
    if not p.is_contiguous():
        raise ValueError(f"p must be contiguous, as it is updated in place, got strides {p.stride()}")
    if p.numel() == 0:
        return
    rule = rules.RULES[name]
    if (
        scales is not None
        and name in rules.SIGNED_RULES
        and _is_map(scales[0][1], rules.SIGNED_RULES[name], rule.states[0])
    ):
        rule = rules.SIGNED_RULES[name]
    state: dict[str, Tensor] = {}
    for s in rule.states:
        stacked = s.key in rule.stacked
        own = int(not stacked and s.key == "state2")
        dtype = torch.float32 if scales is None else torch.uint8
        state[s.key] = _part(rule, s.key, states[own], f"state{own + 1}", p.numel(), dtype)
        if scales is not None:
            absmax, qmap = scales[own]
            _check_map(f"qmap{own + 1}", qmap, rule, s)
            blocks = block_count(p.numel(), check_blocksize(BLOCKSIZE, p.numel()))
            state[absmax_key(s.key)] = _part(rule, s.key, absmax, f"absmax{own + 1}", blocks, torch.float32)
    if gnorm_scale != 1.0:
        g = g.float() * gnorm_scale
    planned = at_step(rule, t, {"t_alpha": None, "t_beta3": None, **numbers}, p.device)
    step(*planned, p.detach(), g, state, blocksize=BLOCKSIZE, max_norm=max_norm if rule.clipped else 0.0)


def _part(rule: rules.Rule, key: str, tensor: Tensor | None, name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """A state, or its place among those that are stacked in one tensor."""
    stacked = key in rule.stacked
    expected = numel * (len(rule.stacked) if stacked else 1)
    if tensor is None or tensor.dtype != dtype or tensor.numel() != expected or not tensor.is_contiguous():
        found = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be contiguous {dtype} of {expected} elements for {rule!r}, got {found}")
    return tensor.view(-1, numel)[rule.stacked.index(key) if stacked else 0]


def _is_map(qmap: Tensor | None, rule: rules.Rule, state: rules.State) -> bool:
    return qmap is not None and torch.equal(qmap.float(), value_table(rule.codebook(state), qmap.device))


def _check_map(name: str, qmap: Tensor | None, rule: rules.Rule, state: rules.State) -> None:
    if not _is_map(qmap, rule, state):
        raise ValueError(
            f"{name} must be create_dynamic_map(signed={state.signed}), got {None if qmap is None else 'another map'}"
        )
