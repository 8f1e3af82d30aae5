"""AdamW with a beta2 of 0.999 and its states in 8 bits against 32: long runs of the demo's text, where rare tokens count.

    python benchmarks/squares.py [--steps 2500] [--seeds 2] [--lr 1e-3] [--plot FILE]

In 8 bits as they are, and with squares that do not round to zero. The run, the batches and what counts as unstable are those of
benchmarks/ablation.py.
"""

from collections.abc import Callable
from typing import Any

from ablation import Variants, main
from torch import nn

from bnbref import optim


def adamw(bits: int, **options: Any) -> Callable[[nn.Module, float], Any]:
    group = {"betas": (0.9, 0.999), "weight_decay": 0.1}
    return lambda model, lr: optim.AdamW(model.parameters(), lr, **group, optim_bits=bits, **options)


VARIANTS: Variants = {
    "32 bits": adamw(32),
    "8 bits": adamw(8),
    "8 bits, nonzero_squares": adamw(8, nonzero_squares=True),
}

SIZES = {
    "steps": 2500, "batch": 4, "windows": 256, "lr": 1e-3, "layers": 1, "hidden": 64, "ffn": 160, "compiled": True,
}  # fmt: skip

if __name__ == "__main__":
    main(VARIANTS, "squares", __doc__, **SIZES)
