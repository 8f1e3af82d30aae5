"""The optimizers under bitsandbytes' names whose weight decay is decoupled, each with 8-bit, 32-bit and paged variants."""

# ruff: noqa: E701, the table of variants has a line for each

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from bnbref.arguments import written
from bnbref.optim import rules
from bnbref.optim.family import Family, Options, PagedOptions, betas_of, refuse
from bnbref.optim.settings import says


class Adam(Family, keeps=("optim_bits", "is_paged")):
    """Adam with decoupled weight decay, as in bitsandbytes (in torch.optim.Adam it is coupled).  Exact.

        m = b1 m + (1 - b1) g            m^ = m / (1 - b1^t)
        v = b2 v + (1 - b2) g^2          v^ = v / (1 - b2^t)
        p = (1 - lr wd) p - lr m^ / (sqrt(v^) + eps)

    Kingma & Ba (1412.6980); Loshchilov & Hutter (1711.05101). `AdamW` differs in the default of weight_decay alone.

    lr: 1e-3 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    betas: (0.9, 0.999) by default, two numbers in [0, 1). b1 and b2 above, the weights of what m and v were before. A text like
    "(0.9, 0.95)", of a command line, is two numbers.
    eps: 1e-8 by default, from 0 on. It is added to the root, so that nothing is divided by 0.
    weight_decay: 0 by default, from 0 on. wd above: each step takes lr wd p from p, apart from the gradient.
    amsgrad: False by default, and args: None by default. Any other value is refused.
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

    lr: 1e-3 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    betas: (0.9, 0.999) by default, two numbers in [0, 1). b1 and b2 above, the weights of what m and v were before. A text like
    "(0.9, 0.95)", of a command line, is two numbers.
    eps: 1e-8 by default, from 0 on. It is added to the root, so that nothing is divided by 0.
    weight_decay: 1e-2 by default, from 0 on. wd above: each step takes lr wd p from p, apart from the gradient.
    amsgrad: False by default, and args: None by default. Any other value is refused.
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

    alpha(t) grows linearly to alpha over t_alpha steps, and b3(t) from b1 to b3 over t_beta3 steps.

    lr: 1e-3 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    betas: (0.9, 0.999, 0.9999) by default, three numbers in [0, 1). b1, b2 and b3 above, the weights of what m1, v and m2 were
    before. With t_beta3 the first and the last of them are above 0.
    alpha: 5.0 by default, from 0 on. The weight of the slow momentum in a step.
    t_alpha: None by default, or the steps over which alpha grows. By None it is constant.
    t_beta3: None by default, or the steps over which b3 grows. By None it is constant.
    eps: 1e-8 by default, from 0 on. It is added to the root, so that nothing is divided by 0.
    weight_decay: 1e-2 by default, from 0 on. wd above: each step takes lr wd p from p, apart from the gradient.
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

    lr: 1e-4 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    betas: (0.9, 0.99) by default, two numbers in [0, 1). b1 and b2 above: the weight of m in a step, and in the next m.
    weight_decay: 0 by default, from 0 on. wd above: each step takes lr wd p from p, apart from the gradient.
    args: None by default. Any other value is refused.
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


class LAMB(Family):
    """`AdamW` whose step is no longer than the parameter (You et al., 1904.00962).  Decoupled weight decay.

        u = m^ / (sqrt(v^) + eps)              p = (1 - lr wd) p - lr min(1, max_unorm |p| / |u|) u            for |p| > 0

    m^ and v^ are those of `Adam`. Exact but for the two norms, which are float sums.

    lr: 1e-3 by default, from 0 on. The learning rate; a tensor of one element, too, as a schedule may write it.
    bias_correction: True by default, and adam_w_mode: True by default. Any other value is refused.
    betas: (0.9, 0.999) by default, two numbers in [0, 1). b1 and b2 above, the weights of what m and v were before. A text like
    "(0.9, 0.95)", of a command line, is two numbers.
    eps: 1e-8 by default, from 0 on. It is added to the root, so that nothing is divided by 0.
    weight_decay: 0 by default, from 0 on. wd above: each step takes lr wd p from p, apart from the gradient.
    amsgrad: False by default, and args: None by default. Any other value is refused.
    max_unorm: 1.0 by default, from 0 on. The length of u, as a part of that of p, from which on u is scaled down; 0 for no
    limit.
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

class LAMB8bit(LAMB, bits=8): """`LAMB`: states in 8 bits."""
class LAMB32bit(LAMB, bits=32): """`LAMB`: states in 32 bits."""
class PagedLAMB(LAMB, paged=True): """`LAMB`: states in pages."""
class PagedLAMB8bit(LAMB, bits=8, paged=True): """`LAMB`: states in 8 bits, in pages."""
class PagedLAMB32bit(LAMB, bits=32, paged=True): """`LAMB`: states in 32 bits, in pages."""
