"""States in 8 bits against 32 in long runs of the demo's text, where rare tokens count: the optimizers that keep squares.

    python benchmarks/squares.py [--steps 2500] [--seeds 2] [--lr 1e-3] [--plot FILE]

In 8 bits as they are, and with squares that do not round to zero. AdamW and Schedule-Free have a beta2 of 0.999; Muon and SOAP
have 0.95, their defaults, and step the embedding, which is the head, and vectors by AdamW. The run, the batches and what counts
as unstable are those of benchmarks/ablation.py.
"""

from collections.abc import Callable
from typing import Any

from ablation import Variants, main
from torch import nn

from bnbref import optim

SLOW: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.1}


def adamw(model: nn.Module, lr: float, **states: Any) -> Any:
    return optim.AdamW(model.parameters(), lr, **SLOW, **states)


def schedule_free(model: nn.Module, lr: float, **states: Any) -> Any:
    return optim.AdamWScheduleFree(model.parameters(), lr, **SLOW, warmup_steps=100, **states)


def muon(model: nn.Module, lr: float, **states: Any) -> Any:
    return optim.Muon(optim.muon_groups(model), lr, adjust_lr_fn="match_rms_adamw", **states)


def soap(model: nn.Module, lr: float, **states: Any) -> Any:
    return optim.SOAP(optim.muon_groups(model), lr, **states)


def with_states(make: Callable[..., Any], **states: Any) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: make(model, lr, **states)


STATES: dict[str, dict[str, Any]] = {
    "32 bits": {"optim_bits": 32},
    "8 bits": {"optim_bits": 8, "nonzero_squares": False},
    "8 bits, nonzero_squares": {"optim_bits": 8, "nonzero_squares": True},
}

VARIANTS: Variants = {
    f"{name}, {what}": with_states(make, **states)
    for name, make in {"AdamW": adamw, "Schedule-Free": schedule_free, "Muon": muon, "SOAP": soap}.items()
    for what, states in STATES.items()
}

SIZES = {
    "steps": 2500, "batch": 4, "windows": 256, "lr": 1e-3, "layers": 1, "hidden": 64, "ffn": 160, "compiled": True,
}  # fmt: skip

if __name__ == "__main__":
    main(VARIANTS, "squares", __doc__, **SIZES)
