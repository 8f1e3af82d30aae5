"""Optimizers of matrices with their states in 8 bits against 32, and AdamW beside them: on the demo's model and text.

    python benchmarks/muon.py [--steps 200] [--seeds 2] [--lr 1e-3] [--plot docs/content/muon.svg]

The run, the batches and what counts as unstable are those of benchmarks/ablation.py. Muon and SOAP have the hidden matrices, and
AdamW the embedding, which is the head, and vectors, in as many bits. A step of Muon has the
root mean square of AdamW's, so that one learning rate does for all but Adafactor, whose steps are relative to weights of 0.02.
"""

from collections.abc import Callable
from typing import Any

from ablation import Variants, main
from torch import nn

from bnbref import optim

GROUP: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}


def adamw(bits: int) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: optim.AdamW(model.parameters(), lr, **GROUP, optim_bits=bits)


def muon(bits: int) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: optim.Muon(
        optim.muon_groups(model), lr, adjust_lr_fn="match_rms_adamw", **GROUP, optim_bits=bits
    )


def soap(bits: int) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: optim.SOAP(optim.muon_groups(model), lr, **GROUP, optim_bits=bits)


def adafactor(bits: int) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: optim.Adafactor(model.parameters(), 50 * lr, beta1=0.9, optim_bits=bits)


VARIANTS: Variants = {
    f"{name}, {bits} bits": make(bits)
    for name, make in {"Muon": muon, "AdamW": adamw, "SOAP": soap, "Adafactor with momentum": adafactor}.items()
    for bits in (32, 8)
}

SIZES = {
    "steps": 200, "batch": 16, "windows": 256, "lr": 1e-3, "layers": 2, "hidden": 128, "ffn": 320, "compiled": True,
}  # fmt: skip

if __name__ == "__main__":
    main(VARIANTS, "muon", __doc__, **SIZES)
