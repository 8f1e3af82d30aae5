"""The optimizers under bitsandbytes' names whose weight decay is coupled, each with 8-bit, 32-bit and paged variants."""

# ruff: noqa: E701, the table of variants has a line for each

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from bnbref.optim import rules
from bnbref.optim.family import Family, PagedOptions, first_beta, refuse
from bnbref.optim.kinds import weight


class SGD(Family):
    """SGD with momentum, as in torch.optim.SGD.  Coupled weight decay.  Exact.

        m = momentum m + (g + wd p)            p = p - lr m

    Without momentum there is no state to save: use torch.optim.SGD.

    lr: has no default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    momentum: 0 by default, which is refused: it must be above 0 and below 1. The weight of what m was before. A group
    has it as the first of its betas.
    weight_decay: 0 by default, from 0 on. wd above: wd p is added to the gradient.
    dampening: 0 by default, nesterov: False by default, and args: None by default. Any other value is refused.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0, dampening: float = 0, weight_decay: float = 0, nesterov: bool = False,
        optim_bits: int = 32, args: None = None, min_8bit_size: int = 4096, **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        refuse(self, dampening=dampening, nesterov=nesterov, args=args)
        b1 = weight({"momentum": momentum}, "momentum")
        if b1 == 0:
            raise NotImplementedError("momentum must be above 0: without it use torch.optim.SGD, which keeps no state")
        super().__init__(
            params, rules.SGD(), {"lr": lr, "betas": (b1, 0.0), "eps": 0.0, "weight_decay": weight_decay},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, **options,
        )  # fmt: skip

    def _holds(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        return {**super()._holds(settings), "momentum": first_beta(settings)}


class LARS(Family):
    """`SGD` whose step is no longer than a part of the parameter (You et al., 1708.03888).  Coupled weight decay.

        m = momentum m + (g + wd p)            p = p - lr min(1, max_unorm |p| / |m|) m            for |p| > 0

    Exact but for the two norms, which are float sums.

    lr: has no default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    momentum: 0 by default, which is refused: it must be above 0 and below 1. The weight of what m was before. A group
    has it as the first of its betas.
    weight_decay: 0 by default, from 0 on. wd above: wd p is added to the gradient.
    dampening: 0 by default, nesterov: False by default, and args: None by default. Any other value is refused.
    max_unorm: 0.02 by default, from 0 on. The length of m, as a part of that of p, from which on m is scaled down; 0 for no
    limit.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0, dampening: float = 0, weight_decay: float = 0, nesterov: bool = False,
        optim_bits: int = 32, args: None = None, min_8bit_size: int = 4096, max_unorm: float = 0.02,
        **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        refuse(self, dampening=dampening, nesterov=nesterov, args=args)
        b1 = weight({"momentum": momentum}, "momentum")
        if b1 == 0:
            raise NotImplementedError("momentum must be above 0: LARS is momentum with clipped steps")
        super().__init__(
            params, rules.LARS(), {"lr": lr, "betas": (b1, 0.0), "eps": 0.0, "weight_decay": weight_decay},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, max_unorm=max_unorm, **options,
        )  # fmt: skip

    def _holds(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        return {**super()._holds(settings), "momentum": first_beta(settings)}


class RMSprop(Family):
    """Gradient over its root mean square (Tieleman & Hinton, 2012), as in torch.optim.RMSprop.  Coupled decay.  Exact.

        v = alpha v + (1 - alpha) g^2          p = p - lr g / (sqrt(v) + eps)            with g + wd p for g

    lr: 1e-2 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    alpha: 0.99 by default, above 0 and below 1. The weight of what v was before. A group has it as the first of its betas.
    eps: 1e-8 by default, from 0 on. It is added to the root, so that nothing is divided by 0.
    weight_decay: 0 by default, from 0 on. wd above: wd p is added to the gradient.
    momentum: 0 by default, centered: False by default, and args: None by default. Any other value is refused.
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0,
        momentum: float = 0, centered: bool = False, optim_bits: int = 32, args: None = None, min_8bit_size: int = 4096,
        **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        refuse(self, momentum=momentum, centered=centered, args=args)
        a = weight({"alpha": alpha}, "alpha")
        if a == 0:
            raise NotImplementedError("alpha must be above 0: at 0 the rule is the sign of the gradient")
        super().__init__(
            params, rules.RMSprop(), {"lr": lr, "betas": (a, 0.0), "eps": eps, "weight_decay": weight_decay},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, **options,
        )  # fmt: skip

    def _holds(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        return {**super()._holds(settings), "alpha": first_beta(settings)}


class Adagrad(Family, keeps=("optim_bits",)):
    """Gradient over the root of the sum of its squares (Duchi et al., 2011), as in torch.optim.Adagrad.  Coupled decay.  Exact.

        v = v + g^2                            p = p - lr g / (sqrt(v) + eps)            with g + wd p for g

    lr: 1e-2 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    weight_decay: 0 by default, from 0 on. wd above: wd p is added to the gradient.
    eps: 1e-10 by default, from 0 on. It is added to the root, so that nothing is divided by 0.
    lr_decay: 0 by default, initial_accumulator_value: 0 by default, and args: None by default. Any other value is refused.
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, lr_decay: float = 0, weight_decay: float = 0, initial_accumulator_value: float = 0,
        eps: float = 1e-10, optim_bits: int = 32, args: None = None, min_8bit_size: int = 4096, **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        refuse(self, lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, args=args)
        super().__init__(
            params, rules.Adagrad(), {"lr": lr, "betas": (0.0, 0.0), "eps": eps, "weight_decay": weight_decay},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, **options,
        )  # fmt: skip


# ---- variants -------------------------------------------------------------------------------------------------------
# fmt: off

class SGD8bit(SGD, bits=8): """`SGD`: states in 8 bits."""
class SGD32bit(SGD, bits=32): """`SGD`: states in 32 bits."""
class PagedSGD(SGD, paged=True): """`SGD`: states in pages."""
class PagedSGD8bit(SGD, bits=8, paged=True): """`SGD`: states in 8 bits, in pages."""
class PagedSGD32bit(SGD, bits=32, paged=True): """`SGD`: states in 32 bits, in pages."""

class LARS8bit(LARS, bits=8): """`LARS`: states in 8 bits."""
class LARS32bit(LARS, bits=32): """`LARS`: states in 32 bits."""
class PagedLARS(LARS, paged=True): """`LARS`: states in pages."""
class PagedLARS8bit(LARS, bits=8, paged=True): """`LARS`: states in 8 bits, in pages."""
class PagedLARS32bit(LARS, bits=32, paged=True): """`LARS`: states in 32 bits, in pages."""

class RMSprop8bit(RMSprop, bits=8): """`RMSprop`: states in 8 bits."""
class RMSprop32bit(RMSprop, bits=32): """`RMSprop`: states in 32 bits."""
class PagedRMSprop(RMSprop, paged=True): """`RMSprop`: states in pages."""
class PagedRMSprop8bit(RMSprop, bits=8, paged=True): """`RMSprop`: states in 8 bits, in pages."""
class PagedRMSprop32bit(RMSprop, bits=32, paged=True): """`RMSprop`: states in 32 bits, in pages."""

class Adagrad8bit(Adagrad, bits=8): """`Adagrad`: states in 8 bits."""
class Adagrad32bit(Adagrad, bits=32): """`Adagrad`: states in 32 bits."""
class PagedAdagrad(Adagrad, paged=True): """`Adagrad`: states in pages."""
class PagedAdagrad8bit(Adagrad, bits=8, paged=True): """`Adagrad`: states in 8 bits, in pages."""
class PagedAdagrad32bit(Adagrad, bits=32, paged=True): """`Adagrad`: states in 32 bits, in pages."""
