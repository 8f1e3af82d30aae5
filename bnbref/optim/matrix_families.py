"""Optimizers of matrices: Muon and SOAP, which step all other parameters by AdamW, and Adafactor. In 8 bits and in pages."""

# ruff: noqa: E701, the table of variants has a line for each

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from typing_extensions import Unpack

from bnbref.arguments import checked, written
from bnbref.optim import matrices, rules
from bnbref.optim.family import Family, PagedOptions, betas_of
from bnbref.optim.kinds import count, elements, flag, number, one_of, weight

_EPS1 = 2.0**-23
"""What None says for the first eps of `Adafactor`."""


class Muon(Family):
    """Orthogonalised momentum for hidden matrices, as torch.optim.Muon (Jordan et al., 2024), else AdamW.  Decoupled decay.

        m = b m + (1 - b) g              u = newton_schulz(b m + (1 - b) g)           with nesterov, else of m
        p = (1 - lr wd) p - lr s u       s = sqrt(max(1, rows / columns))             or 0.2 sqrt(max(rows, columns))

    A group of embeddings, heads and vectors says `"rule": "adamw"` and has a learning rate of its own, betas and eps:
    `muon_groups` makes the groups of a model. *Exact* but for newton_schulz, whose products are bfloat16.

    lr: 1e-3 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    weight_decay: 0.1 by default, from 0 on. wd above: each step takes lr wd p from p, apart from the gradient.
    momentum: 0.95 by default, in [0, 1). b above, the weight of what m was before.
    nesterov: True by default. Whether the gradient is looked at twice, as above.
    ns_coefficients: (3.4445, -4.775, 2.0315) by default, three finite numbers. Those of the polynomial of newton_schulz.
    eps: 1e-7 by default, from 0 on. The least norm by which newton_schulz divides. In a group eps is that of its rule.
    ns_steps: 5 by default, from 1 to 99. How often newton_schulz applies its polynomial.
    adjust_lr_fn: None by default, which is "original", for the first s above; "match_rms_adamw" for the second, by which a
    learning rate of AdamW's will do.
    betas: (0.9, 0.95) by default, two numbers in [0, 1). Those of the groups of AdamW.
    adamw_eps: 1e-8 by default, from 0 on. The eps of the groups of AdamW.
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


@checked
def muon_groups(model: nn.Module, head: str | Iterable[str] | None = None, **adamw: Any) -> list[dict[str, Any]]:
    """The groups of a model for `Muon`: hidden matrices, and what AdamW steps: embeddings, heads, all without two dimensions.

    head: the names of the modules whose outputs are the model's, () for none. It need not be said of models that have
    `get_output_embeddings`, as those of transformers. adamw: settings of the second group, its learning rate first of all.
    ValueError if head is not said of another model, or names no module of it.

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
        heads = [_module(model, name) for name in ([head] if isinstance(head, str) else head)]
    apart = {id(p) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    apart |= {id(p) for module in heads for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trained if p.dim() == 2 and id(p) not in apart]
    known = {id(p) for p in hidden}
    others = [p for p in trained if id(p) not in known]
    groups = [{"params": hidden}, {"params": others, "rule": "adamw", **adamw}]
    return [group for group in groups if group["params"]]


def _module(model: nn.Module, name: Any) -> nn.Module:
    try:
        if isinstance(name, str) and name:
            return model.get_submodule(name)
    except AttributeError:
        pass
    raise ValueError(
        f"head must name modules of {type(model).__name__}, as its named_modules() do, got {written(name)}"
    )


class Adafactor(Family):
    """Adam whose squares are kept by row and by column (Shazeer & Stern, 1804.04235), as torch.optim.Adafactor.  Decoupled decay.

        r = b r + (1 - b) mean of g^2 by row           q = b q + (1 - b) mean of g^2 by column          1 - b = t^beta2_decay
        u = g / max(sqrt(r q^T / mean(r)), eps1)       u = max(eps2, rms(p)) u / max(1, rms(u) / d)
        p = (1 - lr wd) p - min(lr, 1 / sqrt(t)) u

    Of a stack of matrices each is alone, its roots of mean squares too. *Exact* but for what sees the whole matrix: five means,
    products of a row and a column, and torch's `rsqrt`.

    lr: 1e-2 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    beta2_decay: -0.8 by default, 0 at most. How fast the weight of a new square falls with the steps.
    eps: (None, 1e-3) by default, two numbers from 0 on: eps1 and eps2 above. None for eps1 is 2^-23, whatever the parameter's
    dtype, as it is read as float32.
    d: 1.0 by default, from 1 on. The root mean square of u from which on u is scaled down.
    weight_decay: 0.0 by default, from 0 on. wd above: each step takes lr wd p from p, apart from the gradient.
    beta1: 0.0 by default, in [0, 1). Above 0 it averages u, in a state of 8 bits or 32; without it there is no state by
    element.
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, beta2_decay: float = -0.8, eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0, weight_decay: float = 0.0, beta1: float = 0.0, optim_bits: int = 32, min_8bit_size: int = 4096,
        **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        two = elements(eps) or ()
        if len(two) != 2:
            raise ValueError(f"eps must be two numbers, of which the first may be None, got {written(eps)}")
        first = _EPS1 if two[0] is None else two[0]
        eps1 = number({"eps": first}, "eps", most=2.0**63)  # whose square is a float32, too
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
    """Adam in the eigenbases of Shampoo's statistics (Vyas et al., 2409.11321); AdamW for what is no matrix.  Decoupled decay.

        m = b1 m + (1 - b1) G            v = b2 v + (1 - b2) (P^T G Q)^2
        p = (1 - lr wd) p - lr P ((P^T m^ Q) / (sqrt(v^) + eps)) Q^T
        L = b L + (1 - b) G G^T          R = b R + (1 - b) G^T G          every `frequency` steps P, Q = qr(L P), qr(R Q)

    The first gradient makes L, R, P and Q, and no step. They are float32, and more than the states in 8 bits: of a square matrix
    16 bytes a parameter. *Exact* but for the products and decompositions, which are torch's.

    lr: 3e-3 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    betas: (0.95, 0.95) by default, two numbers in [0, 1). b1 and b2 above, the weights of what m and v were before.
    shampoo_beta: 0.95 by default, in [0, 1). b above, the weight of what L and R were before.
    eps: 1e-8 by default, from 0 on. It is added to the root, so that nothing is divided by 0.
    weight_decay: 0.01 by default, from 0 on. wd above: each step takes lr wd p from p, apart from the gradient.
    frequency: 10 by default, from 1 on. How many steps are made in the same bases.
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
