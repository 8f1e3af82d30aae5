"""The base class of rules. Optimizers are equations: a rule is a direction, and every step is

    p = decay * p - rate * direction

in float32, one rounding for each operation in the order of the formula. A rule knows nothing of 8 bits, paging or compilation.

`coefficients` computes on the host, in float64, whatever does not depend on an element: bias corrections, 1 - beta, schedules.
They reach the kernel as float32 numbers in a tensor, so that no schedule compiles anything twice. What needs a
whole matrix at once (a product, a norm, a mean by row) is a call of `Rule.whole` in a direction. Weight decay is *decoupled*
(`decay = 1 - lr wd`, before the step: Loshchilov & Hutter, 1711.05101) or *coupled* (`g + wd p` takes the gradient's place);
each rule says which.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, Codebook
from bnbref.optim.kinds import number

OF = ("elements", "rows", "columns", "rows x rows", "columns x columns")
"""The values of `State.of`: a state has one number for each element, for each row, and so on."""


@dataclass(frozen=True)
class State:
    """A state tensor: its name in `state_dict`, and whether it can be negative, which chooses its 8-bit codebook.

    of: whether it has a number for each element, row or column, or is a square matrix; one of `OF`. Any but "elements" is a state
    of the whole matrix: it is in float32, and only `Rule.whole` may use it.
    """

    key: str
    signed: bool = True
    of: str = "elements"

    def shape(self, parameter: torch.Size) -> tuple[int, ...]:
        """The shape of this state for a parameter of that shape.

        >>> State("row", of="rows").shape(torch.Size([3, 5])), State("column", of="columns").shape(torch.Size([5]))
        ((3,), (5,))
        """
        if self.of == "elements":
            return tuple(parameter)
        *stack, rows, columns = matrix_shape(parameter)
        sizes = {"rows": rows, "columns": columns}
        return (*stack, *(sizes[side] for side in self.of.split(" x ")))


def matrix_shape(parameter: torch.Size) -> tuple[int, ...]:
    """The shape in which `Rule.whole` sees a parameter: a vector is one row, and what has more sides a stack of matrices.

    >>> matrix_shape(torch.Size([5])), matrix_shape(torch.Size([8, 3, 5]))
    ((1, 5), (8, 3, 5))
    """
    return (1,) * (2 - len(parameter)) + tuple(parameter)


def absmax_key(key: str) -> str:
    """The key under which the scales of an 8-bit state are kept.

    >>> absmax_key("state1"), absmax_key("momentum")
    ('absmax1', 'momentum_absmax')
    """
    return _beside(key, "absmax")


def qmap_key(key: str) -> str:
    """The key under which a `state_dict` has the values of the codes of an 8-bit state."""
    return _beside(key, "qmap")


@functools.cache
def _beside(key: str, what: str) -> str:
    number = key.removeprefix("state")
    return f"{what}{number}" if number.isdigit() and number != key else f"{key}_{what}"


class Coefficients:
    """The numbers of a step by name: 0-dimensional float32 tensors as attributes."""

    rate: Tensor
    decay: Tensor

    def __init__(self, names: tuple[str, ...], values: Tensor) -> None:
        for name, value in zip(names, values.unbind(), strict=True):
            setattr(self, name, value)


class Rule:
    """The equation of an optimizer. A subclass names its states, its coefficients and its direction.

    It may hold numbers, in fields or wherever. Each step uses those that it finds at that time, see `bnbref.optim.equation`.

    states: by any names, "state1" and so on in bitsandbytes' files; they start at zero. stacked: states that `state_dict` has
    as one tensor, under the name of the first. codebooks: of 8-bit states with a sign, and of those without. clipped: whether
    the step's length is bounded by the parameter's, `rate *= min(1, max_unorm |p| / |direction|)`, as in LARS and LAMB.
    defaults: settings of its groups that do not say them, where they are others than those of the optimizer.
    """

    states: tuple[State, ...]
    stacked: tuple[str, ...] = ()
    codebooks: tuple[Codebook, Codebook] = (DYNAMIC, DYNAMIC_UNSIGNED)
    clipped: bool = False
    defaults: Mapping[str, Any] = {}

    def codebook(self, state: State) -> Codebook:
        """The codebook of a state in 8 bits."""
        return self.codebooks[0 if state.signed else 1]

    def with_codebooks(self, signed: Codebook, unsigned: Codebook) -> "Rule":
        """The same rule with other codebooks of states in 8 bits."""
        changed = copy.copy(self)
        changed.codebooks = signed, unsigned
        return changed

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Numbers of step t for a parameter group, `rate` and `decay` among them; the rest is what `direction` takes."""
        raise NotImplementedError(f"{self!r} has no coefficients: a rule says what its rate and decay are")

    def direction(self, *args: Any) -> tuple[Tensor, ...]:
        """The direction of a step and the new states, element by element, by `+ - * /`, `sqrt` and comparisons alone.

        A subclass takes `(p, g, *states, c)`: parameter, gradient and states in float32, and the `Coefficients` of this step.
        """
        raise NotImplementedError(f"{self!r} has no direction: a rule says where a parameter goes")

    @staticmethod
    def whole(step: Callable[..., Any], *args: Any, results: int = 1) -> Any:
        """`step(*args)`, of whole matrices: between two parts of a direction that act element by element.

        step: a function of float32 tensors `[..., rows, columns]` (parameter, gradient, states and what was computed of them),
        of states of the whole matrix, of coefficients and of whatever else is given. It treats each matrix of a stack alike and
        alone, and returns as many tensors as `results` says. It is run by torch as it stands, never compiled by us: so its
        bits are the same eager and compiled, and how near they are to the real numbers (*bounded*) is for it to say.
        """
        if has_torch_function(args):
            return handle_torch_function(Rule.whole, args, step, *args, results=results)
        return step(*args)

    def takes(self, parameter: torch.Size) -> bool:
        """Whether a parameter of that shape has a step by this rule."""
        return True

    @staticmethod
    def sqrt(x: Tensor) -> Tensor:
        """Correctly rounded square root. On CPU `torch.sqrt` is MKL's when not compiled, 1 ulp off for one value in 150."""
        return x.double().sqrt().float() if isinstance(x, Tensor) and x.device.type == "cpu" else x.sqrt()

    def __repr__(self) -> str:
        return type(self).__name__


def learning_rate(group: Mapping[str, Any]) -> float:
    """The setting lr. A schedule that ends at 0, as torch's LinearLR, may end at -1e-20 by its roundings."""
    return number(group, "lr", least=-1e-12)


def averages(**betas: float) -> dict[str, float]:
    """Weights of running averages: b1=0.9 gives b1 and not_b1 = 1 - b1, exact but for the last rounding to float32.

    >>> averages(b1=0.75)
    {'b1': 0.75, 'not_b1': 0.25}
    """
    return {name: value for b, beta in betas.items() for name, value in ((b, beta), (f"not_{b}", 1 - beta))}


def decoupled(group: Mapping[str, Any]) -> dict[str, float]:
    """Coefficients for decoupled weight decay: the rate is lr, and the parameter itself decays, before the step."""
    lr = learning_rate(group)
    return {"rate": lr, "decay": 1 - lr * number(group, "weight_decay")}


def coupled(group: Mapping[str, Any]) -> dict[str, float]:
    """Coefficients for coupled weight decay: the rate is lr, and the direction adds wd times the parameter to the gradient."""
    return {"rate": learning_rate(group), "decay": 1.0, "wd": number(group, "weight_decay")}
