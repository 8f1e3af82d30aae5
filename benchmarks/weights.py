"""What 16-bit weights cost, what a correction beside them gives back, and Schedule-Free against a schedule: on the demo model.

    python benchmarks/weights.py [--steps 200] [--seeds 2] [--lr 1e-3] [--plot docs/content/weights.svg]

AdamW8bit in all runs but the last two. Weights in float32; in bfloat16, rounded to the nearest and at random; in bfloat16 with
a correction of 8 bits (24 in all) and of 16 (32 in all). Then Schedule-Free AdamW with states in 32 and in 8 bits. The text, the
batches and what counts as unstable are those of ablation.py. With weights in bfloat16 the model computes in bfloat16.
"""

from collections.abc import Callable
from typing import Any

import torch
from ablation import Variants, main
from torch import nn

from bnbref import optim

GROUP: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}


def adamw(dtype: torch.dtype, **options: Any) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: optim.AdamW8bit(model.to(dtype).parameters(), lr, **GROUP, **options)


def at_random(model: nn.Module, lr: float) -> optim.Optimizer:
    """Random bits of its own, so that batches are drawn as in the other runs."""
    generator = torch.Generator().manual_seed(0)
    return optim.AdamW8bit(model.bfloat16().parameters(), lr, **GROUP, stochastic_rounding=True, generator=generator)


def schedule_free(bits: int) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: optim.AdamWScheduleFree(model.parameters(), lr, **GROUP, warmup_steps=10, optim_bits=bits)


VARIANTS: Variants = {
    "float32": adamw(torch.float32),
    "bfloat16": adamw(torch.bfloat16),
    "bfloat16, rounded at random": at_random,
    "bfloat16, 24 bits": adamw(torch.bfloat16, master_weight_bits=24),
    "bfloat16, 32 bits": adamw(torch.bfloat16, master_weight_bits=32),
    "Schedule-Free, 32-bit states": schedule_free(32),
    "Schedule-Free, 8-bit states": schedule_free(8),
}
"""Another optimizer is another line: "Muon8bit": lambda model, lr: optim.Muon8bit(optim.muon_groups(model), lr)."""

SIZES = {"steps": 200, "batch": 16, "windows": 256, "lr": 1e-3, "layers": 2, "hidden": 64, "ffn": 160, "compiled": True}

if __name__ == "__main__":
    main(VARIANTS, "weights", __doc__, **SIZES)
