"""A family of optimizers under bitsandbytes' names: what it takes beside its own arguments, and how a variant fixes some of them.

A family is a name, a rule and its defaults. A variant of it fixes `optim_bits`, `is_paged` or both.
Arguments that bitsandbytes accepts and ignores are refused here if they would change anything.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch

from bnbref.arguments import written
from bnbref.optim import rules
from bnbref.optim.kinds import SettingError, elements, number, weights
from bnbref.optim.optimizer import Optimizer
from bnbref.optim.settings import check_settings, says


class Options(TypedDict, total=False):
    """Keywords that every optimizer takes beside the arguments of bitsandbytes: see `bnbref.optim.Optimizer`."""

    blocksize: int
    page_directory: str | Path | None
    page_bytes: int
    stochastic_rounding: bool
    master_weight_bits: int | None
    generator: torch.Generator | None
    nonzero_squares: bool
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    percentile_clipping: int
    block_wise: bool


class PagedOptions(Options, total=False):
    """`Options` and `is_paged`, for the families that bitsandbytes does not page."""

    is_paged: bool


class Args(NamedTuple):
    """`optimizer.args`, where code for bitsandbytes looks for the settings. To be read only."""

    optim_bits: int
    min_8bit_size: int
    max_unorm: float
    is_paged: bool
    skip_zeros: bool = False
    percentile_clipping: int = 100
    block_wise: bool = True


class Family(Optimizer):
    """What every optimizer here takes beside arguments of its own.

    params: parameters of float32, float16 or bfloat16, or groups of them, which may say settings of their own.
    optim_bits: 32 by default, or 8. The bits of a number of a state. Classes whose names end in 8bit or 32bit have these.
    min_8bit_size: 4096 by default, from 0 on. Smaller parameters keep their states in 32 bits.
    is_paged: False by default. Whether the states of parameters of 100,000 elements or more are in pinned host memory, and
    brought to the GPU for a step. Classes whose names begin with Paged have them there.
    blocksize: 256 by default, from 1 on. The elements of a block, which has one scale, of a state in 8 bits.
    page_directory: None by default, or a folder. All states are in memory-mapped files there.
    page_bytes: 2**28 by default, from 1 on. At most so many bytes of paged states are on the GPU at a time, or those of two
    parameters.
    stochastic_rounding: False by default. Whether bfloat16 parameters are rounded up or down at random, so that the mean is
    right.
    generator: None by default, for the generator of the device, or a torch.Generator. It makes the random numbers of that.
    master_weight_bits: None by default, 24 or 32. Parameters of 16 bits are trained as if they had so many.
    nonzero_squares: False by default, but True in Muon, SOAP and AdamWScheduleFree. Whether an average of squares in 8 bits that
    is above 2^-149 of the largest of its block never gets the code of 0, but that of the smallest value, so that no momentum is
    divided by nothing. Files are the same. By False the bits are bitsandbytes'.
    maximize: False by default. Whether steps go with the gradient, not against it.
    foreach: None by default, and fused: None by default. Which implementation of torch is to run; there is one here, whatever
    they say.
    capturable: False by default, and differentiable: False by default. True is refused: numbers of a step are made on the host,
    and no graph of it is kept.
    percentile_clipping: 100 by default, and block_wise: True by default. bitsandbytes took them until 0.49; what they say always
    holds, and any other value is refused.

    A setting of another kind, or out of its range, raises ValueError, TypeError or NotImplementedError, which names it.
    """

    def __init__(
        self, params: Any, rule: rules.Rule | Mapping[str, rules.Rule], defaults: Mapping[str, Any], *,
        nonzero_squares: bool = False, percentile_clipping: int = 100, block_wise: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        check_settings({"nonzero_squares": nonzero_squares})
        self.nonzero_squares = nonzero_squares
        if nonzero_squares:
            self._keep_squares(list(rule.values()) if isinstance(rule, Mapping) else [rule])
        if not says(percentile_clipping, 100):
            raise ValueError(
                f"percentile_clipping of {type(self).__name__} must be 100, which clips nothing, got "
                f"{written(percentile_clipping)}: clip gradients before the step, by torch.nn.utils.clip_grad_norm_"
            )
        if not says(block_wise, True):
            raise ValueError(
                f"block_wise of {type(self).__name__} must be True, got {written(block_wise)}: states in 8 bits are blockwise"
            )
        super().__init__(params, rule, defaults, **options)

    def _keep_squares(self, own: Sequence[rules.Rule]) -> None:
        if all(s.signed or s.of != "elements" for rule in own for s in rule.states):
            raise ValueError(f"nonzero_squares must be False: {type(self).__name__} keeps no squares by element")
        for rule in own:
            signed, unsigned = rule.codebooks
            rule.codebooks = signed, unsigned.nonzero()

    def _judge(self, settings: Mapping[str, Any]) -> None:
        super()._judge(settings)
        # Also those that the rule of a group does not read, as the eps of Lion.
        for name, judge in (("betas", weights), ("eps", number)):
            if name in self.defaults:
                judge(settings, name)
        many, given = len(self.defaults.get("betas", ())), settings.get("betas", ())
        if len(elements(given) or ()) > many:
            raise SettingError(f"betas must be {many} numbers, got {written(given)}")

    def _holds(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        return {**super()._holds(settings), "nonzero_squares": (self.nonzero_squares,)}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "nonzero_squares": self.nonzero_squares}

    @property
    def args(self) -> Args:
        """The settings, as bitsandbytes has them."""
        own: Mapping[str, Any] = self._own
        return Args(own["optim_bits"], own["min_8bit_size"], own["max_unorm"], self.is_paged)

    def __init_subclass__(
        cls, *, bits: int | None = None, paged: bool = False, keeps: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        """bits, paged: fixed in a variant, and gone from its signature unless the family `keeps` it for compatibility."""
        super().__init_subclass__(**kwargs)
        if bits is None and not paged:
            cls._keeps = keeps
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{inspect.cleandoc(Family.__doc__ or '')}"
        else:
            _fix(cls, {**({"optim_bits": bits} if bits else {}), **({"is_paged": True} if paged else {})})

    _keeps: tuple[str, ...] = ()
    _placeholders: ClassVar[Mapping[str, Any]] = {}
    """Defaults that bitsandbytes' variants have in their signatures, and ignore: Adam8bit has optim_bits=32 there. A variant here
    takes these values, or its own, and no other."""


def _fix(cls: type[Family], fixed: dict[str, Any]) -> None:
    """Give a variant the signature and the docstring of its family, less what is fixed."""
    family = cls.__mro__[1]
    parameters = []
    for p in inspect.signature(family.__init__).parameters.values():  # type: ignore[misc]
        if p.name not in fixed:
            parameters.append(p)
        elif p.name in cls._keeps:
            parameters.append(p.replace(default=fixed[p.name]))
    signature = inspect.Signature(parameters)

    @functools.wraps(family.__init__)  # type: ignore[misc]
    def init(self: Family, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs).arguments
        del bound["self"]
        given = {**bound.pop("options", {}), **bound}
        for name, value in fixed.items():
            if not any(says(given.get(name, value), it) for it in (value, cls._placeholders.get(name, value))):
                raise ValueError(f"{name} of {cls.__name__} is {value}, got {written(given[name])}")
        family.__init__(self, **{**given, **fixed})  # type: ignore[misc]

    init.__signature__ = signature  # type: ignore[attr-defined]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    cls.__init__ = init  # type: ignore[method-assign]
    cls.__doc__ = f"{cls.__doc__}\n\n{family.__doc__}"


UNUSED = {
    "args": "args was an object with settings; pass them by name",
    "amsgrad": "no rule here keeps the largest v, torch.optim.Adam(amsgrad=True) does",
    "dampening": "the rule is heavy-ball momentum alone",
    "nesterov": "the rule is heavy-ball momentum alone",
    "momentum": "use torch.optim.RMSprop",
    "centered": "use torch.optim.RMSprop",
    "lr_decay": "schedule lr instead",
    "initial_accumulator_value": "states start at zero",
}
"""Arguments of bitsandbytes that some families have no use for, and what to do instead."""


def refuse(optimizer: Family, **arguments: Any) -> None:
    """Raise if one of these arguments has a value that would have to mean something."""
    for name, value in arguments.items():
        if not says(value, None):
            raise ValueError(
                f"{name} of {type(optimizer).__name__} must be left at its default, got {written(value)}: {UNUSED[name]}"
            )


def first_beta(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """The ways to say the one weight of a rule that has one, and torch another name for it: it is the first of betas."""
    return (elements(settings["betas"]) or (settings["betas"],))[:1]


def betas_of(betas: Sequence[float] | str, count: int = 2) -> tuple[float, ...]:
    """Betas as `count` numbers, of any sequence; a string like "(0.9, 0.95)" comes from a command line. ValueError if they are
    not.

    >>> betas_of("(0.9, 0.95)")
    (0.9, 0.95)
    """
    try:
        found = tuple(map(float, betas.strip("() ").split(","))) if isinstance(betas, str) else elements(betas) or ()
    except ValueError:
        found = ()
    if len(found) != count:
        raise ValueError(f"betas must be {count} numbers, got {written(betas)}")
    return weights({"betas": found})
