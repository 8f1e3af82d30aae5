"""Optimizers of matrices under their names: Muon and SOAP, with AdamW for what is none, and Adafactor; in 8 bits and in pages."""

# ruff: noqa: E701, the table of variants has a line for each

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from typing_extensions import Unpack

from bnbref.arguments import written
from bnbref.optim import matrices, rules
from bnbref.optim.family import Family, PagedOptions, betas_of
from bnbref.optim.kinds import count, elements, flag, number, one_of, weight

_EPS1 = 2.0**-23
"""What None says for the first eps of `Adafactor`."""


class Muon(Family):
    """Momentum, orthogonalised, as torch.optim.Muon; by AdamW what is no hidden matrix (Jordan et al., 2024).  Decoupled decay.

        m = b m + (1 - b) g              u = newton_schulz(b m + (1 - b) g)           with nesterov, else of m
        p = (1 - lr wd) p - lr s u       s = sqrt(max(1, rows / columns))             or 0.2 sqrt(max(rows, columns))

    A group of embeddings, heads and vectors says `"rule": "adamw"` and has a learning rate of its own, betas and eps:
    `muon_groups` makes the groups of a model. eps: of newton_schulz; adamw_eps: of AdamW; in a group eps is that of its rule.
    adjust_lr_fn: "match_rms_adamw" for the second s, by which a learning rate of AdamW's will do. *Exact* but for newton_schulz,
    whose products are bfloat16.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95, nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = matrices.QUINTIC, eps: float = 1e-7, ns_steps: int = 5,
        adjust_lr_fn: str | None = None, betas: tuple[float, float] = (0.9, 0.95), adamw_eps: float = 1e-8,
        optim_bits: int = 32, min_8bit_size: int = 4096, **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        own = {"nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn, "ns_steps": ns_steps, "eps": eps}
        adjust = one_of(own, "adjust_lr_fn", ("original", "match_rms_adamw", None)) or "original"
        three = elements(ns_coefficients) or ()
        if len(three) != 3:
            raise ValueError(f"ns_coefficients must be three finite numbers, got {written(ns_coefficients)}")
        a, b, c = (number({"ns_coefficients": x}, "ns_coefficients", least=-math.inf) for x in three)
        steps = count(own, "ns_steps", 1, 99)
        muon = matrices.Muon(flag(own, "nesterov"), (a, b, c), steps, number(own, "eps"), adjust)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas_of(betas),
            "eps": number({"adamw_eps": adamw_eps}, "adamw_eps"),
        }
        options.setdefault("nonzero_squares", True)
        super().__init__(
            params, {"muon": muon, "adamw": rules.Adam()}, defaults, optim_bits=optim_bits, min_8bit_size=min_8bit_size, **options
        )  # fmt: skip

    def _holds(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        muon: Any = self.rule
        adjust = ("original", None) if muon.adjust == "original" else (muon.adjust,)
        adamw = settings if settings["rule"] == "adamw" else self.defaults
        return {
            **super()._holds(settings), "nesterov": (muon.nesterov,), "ns_coefficients": (muon.ns_coefficients,),
            "ns_steps": (muon.steps,), "adjust_lr_fn": adjust, "adamw_eps": (adamw["eps"],),
        }  # fmt: skip


def muon_groups(model: nn.Module, head: str | Iterable[str] | None = None, **adamw: Any) -> list[dict[str, Any]]:
    """The groups of a model for `Muon`: hidden matrices; and by AdamW embeddings, heads and whatever has not two dimensions.

    head: the names of the modules whose outputs are the model's, () for none. It need not be said of models that have
    `get_output_embeddings`, as those of transformers. adamw: settings of the second group, its learning rate first of all.

    >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16), nn.Linear(16, 100))
    >>> groups = muon_groups(model, head="2", lr=3e-4)
    >>> [[tuple(p.shape) for p in group["params"]] for group in groups]
    [[(16, 16)], [(100, 16), (16,), (100, 16), (100,)]]
    >>> [(group["rule"], group["lr"]) for group in Muon8bit(groups, lr=0.02).param_groups]
    [('muon', 0.02), ('adamw', 0.0003)]
    """
    if head is None:
        find = getattr(model, "get_output_embeddings", None)
        if find is None:
            raise ValueError(
                f"head must name the modules of {type(model).__name__} whose outputs are the model's, or be () for none"
            )
        heads = [module for module in [find()] if module is not None]
    else:
        heads = [model.get_submodule(name) for name in ([head] if isinstance(head, str) else head)]
    apart = {id(p) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    apart |= {id(p) for module in heads for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trained if p.dim() == 2 and id(p) not in apart]
    known = {id(p) for p in hidden}
    others = [p for p in trained if id(p) not in known]
    groups = [{"params": hidden}, {"params": others, "rule": "adamw", **adamw}]
    return [group for group in groups if group["params"]]


class Adafactor(Family):
    """Squares by row and by column alone (Shazeer & Stern, 1804.04235), as torch.optim.Adafactor.  Decoupled decay.

        r = b r + (1 - b) mean of g^2 by row           q = b q + (1 - b) mean of g^2 by column          1 - b = t^beta2_decay
        u = g / max(sqrt(r q^T / mean(r)), eps1)       u = max(eps2, rms(p)) u / max(1, rms(u) / d)
        p = (1 - lr wd) p - min(lr, 1 / sqrt(t)) u

    beta1 > 0 averages u, in 8 bits or 32; without it there is no state by element. Of a stack of matrices each is alone, its
    roots of mean squares too. eps: None for eps1 is 2^-23, whatever the parameter's dtype, as it is read as float32.
    *Exact* but for what sees the whole matrix: five means, products of a row and a column, and torch's `rsqrt`.
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, beta2_decay: float = -0.8, eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0, weight_decay: float = 0.0, beta1: float = 0.0, optim_bits: int = 32, min_8bit_size: int = 4096,
        **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        two = elements(eps) or ()
        if len(two) != 2:
            raise ValueError(f"eps must be two numbers, of which the first may be None, got {written(eps)}")
        eps1 = number(
            {"eps": _EPS1 if two[0] is None else two[0]}, "eps", most=2.0**63
        )  # whose square is a float32, too
        eps2 = number({"eps": two[1]}, "eps")
        momentum = weight({"beta1": beta1}, "beta1") > 0
        rule = matrices.Adafactor(momentum, (eps1, eps2), number({"d": d}, "d", least=1.0))
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "beta1": beta1, "weight_decay": weight_decay}
        super().__init__(params, rule, defaults, optim_bits=optim_bits, min_8bit_size=min_8bit_size, **options)

    def _holds(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        rule: Any = self.rule
        eps1, eps2 = rule.eps
        ways = ((eps1, eps2), *([(None, eps2)] if eps1 == _EPS1 else []))
        return {**super()._holds(settings), "d": (rule.d,), "eps": ways}


class SOAP(Family):
    """Adam in the eigenbases of Shampoo's statistics (Vyas et al., 2409.11321); by AdamW what is no matrix.  Decoupled decay.

        m = b1 m + (1 - b1) G            v = b2 v + (1 - b2) (P^T G Q)^2
        p = (1 - lr wd) p - lr P ((P^T m^ Q) / (sqrt(v^) + eps)) Q^T
        L = b L + (1 - b) G G^T          R = b R + (1 - b) G^T G          every `frequency` steps P, Q = qr(L P), qr(R Q)

    The first gradient makes L, R, P and Q, and no step. They are float32, and more than the states in 8 bits: of a square matrix
    16 bytes a parameter. *Exact* but for the products and decompositions, which are torch's.
    """

    def __init__(
        self, params: Any, lr: float = 3e-3, betas: tuple[float, float] = (0.95, 0.95), shampoo_beta: float = 0.95,
        eps: float = 1e-8, weight_decay: float = 0.01, frequency: int = 10, optim_bits: int = 32, min_8bit_size: int = 4096,
        **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr,
            "betas": betas_of(betas),
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        options.setdefault("nonzero_squares", True)
        super().__init__(
            params, {"soap": matrices.SOAP(), "adamw": rules.Adam()}, {**defaults, "frequency": frequency},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, **options,
        )  # fmt: skip


# ---- variants -------------------------------------------------------------------------------------------------------
# fmt: off

class Muon8bit(Muon, bits=8): """`Muon`: states in 8 bits."""
class Muon32bit(Muon, bits=32): """`Muon`: states in 32 bits."""
class PagedMuon(Muon, paged=True): """`Muon`: states in pages."""
class PagedMuon8bit(Muon, bits=8, paged=True): """`Muon`: states in 8 bits, in pages."""
class PagedMuon32bit(Muon, bits=32, paged=True): """`Muon`: states in 32 bits, in pages."""

class Adafactor8bit(Adafactor, bits=8): """`Adafactor`: momentum in 8 bits."""
class Adafactor32bit(Adafactor, bits=32): """`Adafactor`: momentum in 32 bits."""
class PagedAdafactor(Adafactor, paged=True): """`Adafactor`: states in pages."""
class PagedAdafactor8bit(Adafactor, bits=8, paged=True): """`Adafactor`: momentum in 8 bits, in pages."""
class PagedAdafactor32bit(Adafactor, bits=32, paged=True): """`Adafactor`: momentum in 32 bits, in pages."""

class SOAP8bit(SOAP, bits=8): """`SOAP`: states by element in 8 bits."""
class SOAP32bit(SOAP, bits=32): """`SOAP`: states by element in 32 bits."""
class PagedSOAP(SOAP, paged=True): """`SOAP`: states in pages."""
class PagedSOAP8bit(SOAP, bits=8, paged=True): """`SOAP`: states by element in 8 bits, in pages."""
class PagedSOAP32bit(SOAP, bits=32, paged=True): """`SOAP`: states by element in 32 bits, in pages."""
