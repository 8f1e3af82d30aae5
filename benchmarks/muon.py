"""Muon with its momentum in 8 bits against Muon in 32, and AdamW beside them, on the demo's model and text.

    python benchmarks/muon.py [--steps 80] [--seeds 2] [--device cpu] [--plot docs/content/muon.svg]

The run, its arguments and what is unstable are those of benchmarks/ablation.py. Embeddings, head and vectors are by AdamW, in
as many bits; the step of a matrix has the root mean square of AdamW's, so that one learning rate does for all.
"""

from collections.abc import Callable
from typing import Any

from ablation import adam, main
from torch import nn

from bnbref import optim
from bnbref.optim.rules import Adam


def muon(bits: int) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: optim.Muon(
        optim.muon_groups(model), lr=lr, adjust_lr_fn="match_rms_adamw", optim_bits=bits
    )


if __name__ == "__main__":
    variants = {
        "Muon, 32 bits": muon(32),
        "Muon, 8 bits": muon(8),
        "AdamW, 32 bits": adam(Adam(), optim_bits=32),
        "AdamW, 8 bits": adam(Adam(), optim_bits=8),
    }
    main(variants, "muon", __doc__)
