"""The optimizers under bitsandbytes' names: nine families, each with 8-bit, 32-bit and paged variants."""

# ruff: noqa: E701, the table of variants has a line for each

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from bnbref.arguments import written
from bnbref.optim import rules
from bnbref.optim.family import Family, Options, PagedOptions, betas_of, first_beta, refuse
from bnbref.optim.kinds import weight
from bnbref.optim.settings import says


class Adam(Family, keeps=("optim_bits", "is_paged")):
    """Adam with decoupled weight decay, as in bitsandbytes (in torch.optim.Adam it is coupled).  Exact.

        m = b1 m + (1 - b1) g            m^ = m / (1 - b1^t)
        v = b2 v + (1 - b2) g^2          v^ = v / (1 - b2^t)
        p = (1 - lr wd) p - lr m^ / (sqrt(v^) + eps)

    Kingma & Ba (1412.6980); Loshchilov & Hutter (1711.05101). `AdamW` differs in the default of weight_decay alone.
    """

    _placeholders: ClassVar[Mapping[str, Any]] = {"optim_bits": 32, "is_paged": False}

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] | str = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, amsgrad: bool = False, optim_bits: int = 32, args: None = None, min_8bit_size: int = 4096,
        is_paged: bool = False, **options: Unpack[Options],
    ) -> None:  # fmt: skip
        refuse(self, amsgrad=amsgrad, args=args)
        super().__init__(
            params, rules.Adam(), {"lr": lr, "betas": betas_of(betas), "eps": eps, "weight_decay": weight_decay},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, is_paged=is_paged, **options,
        )  # fmt: skip


class AdamW(Adam, keeps=("optim_bits",)):
    """Adam with decoupled weight decay, by default of 0.01 (Loshchilov & Hutter, 1711.05101).  Exact.

    m = b1 m + (1 - b1) g            m^ = m / (1 - b1^t)
    v = b2 v + (1 - b2) g^2          v^ = v / (1 - b2^t)
    p = (1 - lr wd) p - lr m^ / (sqrt(v^) + eps)
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] | str = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, optim_bits: int = 32, args: None = None, min_8bit_size: int = 4096,
        is_paged: bool = False, **options: Unpack[Options],
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **options
        )


class AdEMAMix(Family):
    """Adam with a second, slow momentum (Pagliardini et al., 2409.03137).  Decoupled weight decay.  Exact.

        m1 = b1 m1 + (1 - b1) g          m2 = b3(t) m2 + (1 - b3(t)) g            v = b2 v + (1 - b2) g^2
        p  = (1 - lr wd) p - lr (m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(v^) + eps)

    alpha grows linearly over t_alpha steps, b3 from b1 over t_beta3 steps; None leaves them constant.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), alpha: float = 5.0,
        t_alpha: int | None = None, t_beta3: int | None = None, eps: float = 1e-8, weight_decay: float = 1e-2,
        optim_bits: int = 32, min_8bit_size: int = 4096, is_paged: bool = False, **options: Unpack[Options],
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas_of(betas, 3), "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, rules.AdEMAMix(), {**defaults, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, is_paged=is_paged, **options,
        )  # fmt: skip


class Lion(Family):
    """Sign of an interpolated momentum (Chen et al., 2302.06675).  Decoupled weight decay.  Exact.

    p = (1 - lr wd) p - lr sign(b1 m + (1 - b1) g)           m = b2 m + (1 - b2) g
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0,
        optim_bits: int = 32, args: None = None, min_8bit_size: int = 4096, is_paged: bool = False, **options: Unpack[Options],
    ) -> None:  # fmt: skip
        refuse(self, args=args)
        super().__init__(
            params, rules.Lion(), {"lr": lr, "betas": betas_of(betas), "eps": 0.0, "weight_decay": weight_decay},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, is_paged=is_paged, **options,
        )  # fmt: skip


class SGD(Family):
    """SGD with momentum, as in torch.optim.SGD.  Coupled weight decay.  Exact.

        m = momentum m + (g + wd p)            p = p - lr m

    Without momentum there is no state to save: use torch.optim.SGD.
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

    max_unorm 0 clips nothing. Exact but for the two norms, which are float sums.
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


class LAMB(Family):
    """`AdamW` whose step is no longer than the parameter (You et al., 1904.00962).  Decoupled weight decay.

        u = m^ / (sqrt(v^) + eps)              p = (1 - lr wd) p - lr min(1, max_unorm |p| / |u|) u            for |p| > 0

    max_unorm 0 clips nothing. Exact but for the two norms, which are float sums.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] | str = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0, amsgrad: bool = False, adam_w_mode: bool = True, optim_bits: int = 32,
        args: None = None, min_8bit_size: int = 4096, max_unorm: float = 1.0, **options: Unpack[PagedOptions],
    ) -> None:  # fmt: skip
        refuse(self, amsgrad=amsgrad, args=args)
        if not says(bias_correction, True) or not says(adam_w_mode, True):
            raise ValueError(
                f"bias_correction and adam_w_mode must be True, got {written(bias_correction)} and {written(adam_w_mode)}: "
                f"the rule has both"
            )
        super().__init__(
            params, rules.LAMB(), {"lr": lr, "betas": betas_of(betas), "eps": eps, "weight_decay": weight_decay},
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, max_unorm=max_unorm, **options,
        )  # fmt: skip

    def _holds(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        return {**super()._holds(settings), "bias_correction": (True,), "adam_w_mode": (True,)}


class RMSprop(Family):
    """Gradient over its root mean square (Tieleman & Hinton, 2012), as in torch.optim.RMSprop.  Coupled decay.  Exact.

    v = alpha v + (1 - alpha) g^2          p = p - lr g / (sqrt(v) + eps)            with g + wd p for g
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

class Adam8bit(Adam, bits=8): """`Adam`: states in 8 bits."""
class Adam32bit(Adam, bits=32): """`Adam`: states in 32 bits."""
class PagedAdam(Adam, paged=True): """`Adam`: states in pages."""
class PagedAdam8bit(Adam, bits=8, paged=True): """`Adam`: states in 8 bits, in pages."""
class PagedAdam32bit(Adam, bits=32, paged=True): """`Adam`: states in 32 bits, in pages."""

class AdamW8bit(AdamW, bits=8): """`AdamW`: states in 8 bits."""
class AdamW32bit(AdamW, bits=32): """`AdamW`: states in 32 bits."""
class PagedAdamW(AdamW, paged=True): """`AdamW`: states in pages."""
class PagedAdamW8bit(AdamW, bits=8, paged=True): """`AdamW`: states in 8 bits, in pages."""
class PagedAdamW32bit(AdamW, bits=32, paged=True): """`AdamW`: states in 32 bits, in pages."""

class AdEMAMix8bit(AdEMAMix, bits=8): """`AdEMAMix`: states in 8 bits."""
class AdEMAMix32bit(AdEMAMix, bits=32): """`AdEMAMix`: states in 32 bits."""
class PagedAdEMAMix(AdEMAMix, paged=True): """`AdEMAMix`: states in pages."""
class PagedAdEMAMix8bit(AdEMAMix, bits=8, paged=True): """`AdEMAMix`: states in 8 bits, in pages."""
class PagedAdEMAMix32bit(AdEMAMix, bits=32, paged=True): """`AdEMAMix`: states in 32 bits, in pages."""

class Lion8bit(Lion, bits=8): """`Lion`: states in 8 bits."""
class Lion32bit(Lion, bits=32): """`Lion`: states in 32 bits."""
class PagedLion(Lion, paged=True): """`Lion`: states in pages."""
class PagedLion8bit(Lion, bits=8, paged=True): """`Lion`: states in 8 bits, in pages."""
class PagedLion32bit(Lion, bits=32, paged=True): """`Lion`: states in 32 bits, in pages."""

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

class LAMB8bit(LAMB, bits=8): """`LAMB`: states in 8 bits."""
class LAMB32bit(LAMB, bits=32): """`LAMB`: states in 32 bits."""
class PagedLAMB(LAMB, paged=True): """`LAMB`: states in pages."""
class PagedLAMB8bit(LAMB, bits=8, paged=True): """`LAMB`: states in 8 bits, in pages."""
class PagedLAMB32bit(LAMB, bits=32, paged=True): """`LAMB`: states in 32 bits, in pages."""

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
