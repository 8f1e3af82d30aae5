"""What 16-bit weights cost, what a correction beside them gives back, and Schedule-Free against a schedule: on the demo model.

    python benchmarks/weights.py [--steps 200] [--seeds 2] [--lr 1e-3] [--plot docs/content/weights.svg]

AdamW8bit in all runs but the last two. Weights in float32; in bfloat16, rounded to the nearest and at random; in bfloat16 with
a correction of 8 bits (24 in all) and of 16 (32 in all). Then Schedule-Free AdamW with states in 32 and in 8 bits. The text, the
batches and what counts as unstable are those of ablation.py. With weights in bfloat16 the model computes in bfloat16.
"""

import functools
from typing import Any

import ablation
import torch
from ablation import Variant

from bnbref import optim

AdamW = functools.partial(optim.AdamW8bit, betas=(0.9, 0.95), weight_decay=0.1)


def stochastic(params: Any, lr: float) -> optim.Optimizer:
    """Random bits of its own, so that batches are drawn as in the other runs."""
    return AdamW(params, lr, stochastic_rounding=True, generator=torch.Generator().manual_seed(0))


def schedule_free(params: Any, lr: float, **options: Any) -> optim.Optimizer:
    return optim.AdamWScheduleFree(params, lr, betas=(0.9, 0.95), weight_decay=0.1, warmup_steps=5, **options)


VARIANTS = {
    "float32": Variant(AdamW),
    "bfloat16": Variant(AdamW, torch.bfloat16),
    "bfloat16, stochastic": Variant(stochastic, torch.bfloat16),
    "bfloat16, 24 bits": Variant(functools.partial(AdamW, master_weight_bits=24), torch.bfloat16),
    "bfloat16, 32 bits": Variant(functools.partial(AdamW, master_weight_bits=32), torch.bfloat16),
    "Schedule-Free, 32-bit states": Variant(schedule_free, scheduled=False),
    "Schedule-Free, 8-bit states": Variant(functools.partial(schedule_free, optim_bits=8), scheduled=False),
}
"""Another optimizer is another line: "Muon8bit": Variant(optim.Muon8bit)."""

SIZES = {"steps": 200, "batch": 16, "windows": 256, "lr": 1e-3, "layers": 2, "hidden": 64, "ffn": 160}

if __name__ == "__main__":
    ablation.main(VARIANTS, "weights", "weights", __doc__, **SIZES)
