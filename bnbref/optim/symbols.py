"""Symbols: tensors of which nothing is known but how they are computed, and what a rule may do with them.

A `Recording` collects the lines of a program. A symbol is a name in it; each operation on symbols, of those in `operations`, adds
a line.
"""

import functools
import re
import struct
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from bnbref.optim.operations import ALLOWED, OPERATIONS

LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32

_TAKEN = re.compile(r"[apsw]\d*|[cg]|sqrt|where|full_like|whole\d+|direction")
"""Names that mean something else in a program, so that no function of whole matrices can be called so."""


class Refusal(TypeError):
    """A rule asks for what is no operation of a rule."""


class Call(NamedTuple):
    """A call of `Rule.whole` by a rule. step: the function. args: its arguments, where symbols stand for tensors that are known
    when the program runs. results: how many it returns."""

    rule: str
    step: Callable[..., Any]
    args: tuple[Any, ...]
    results: int

    def __call__(self, *given: Tensor) -> Any:
        """The results, float32, for stacks of matrices in the places of the symbols. ValueError if they are no such stacks."""
        tensors = iter(given)
        found = self.step(*(next(tensors) if isinstance(x, Symbol) else x for x in self.args))
        results = (found,) if self.results == 1 and isinstance(found, Tensor) else found
        of = f"{getattr(self.step, '__name__', repr(self.step))} of {self.rule}"
        if not isinstance(results, (tuple, list)) or len(results) != self.results:
            raise ValueError(f"{of} must return {self.results} results, got {results!r}")
        matrices = next((len(x) for x in given if x.dim()), None)
        for x in results:
            if not isinstance(x, Tensor) or (matrices is not None and x.shape[:1] != (matrices,)):
                got = tuple(x.shape) if isinstance(x, Tensor) else repr(x)
                raise ValueError(f"{of} must return tensors of a stack of {matrices} matrices, got {got}")
            if not x.is_floating_point() or x.layout != torch.strided:
                raise ValueError(f"{of} must return dense tensors of floats, got {x.dtype}, {x.layout}")
        in_float32 = [x.float() for x in results]
        return in_float32 if self.results > 1 else in_float32[0]


class Recording:
    """The lines of a program so far, and what it asked `Rule.whole` for.

    matrices: the names of states of the whole matrix, and the names that the rule has for them. calls: of `Rule.whole`, by the
    names that they have in the lines. read: the names of the tensors that are used.
    """

    def __init__(self, rule: str, matrices: Mapping[str, str] | None = None) -> None:
        self.rule, self.matrices = rule, matrices or {}
        self.lines: list[str] = []
        self.calls: dict[str, Call] = {}
        self.read: set[str] = set()

    def add(self, text: str, condition: bool = False) -> "Symbol":
        name = f"a{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return Symbol(self, name, condition)

    def refuse(self, what: str) -> NoReturn:
        raise Refusal(f"direction of {self.rule} {what}; a rule computes element by element with {ALLOWED}")

    def operand(self, x: Any) -> str:
        """A symbol's name, or a number that float32 has, as text."""
        if isinstance(x, Symbol):
            if x._recording is not self:
                self.refuse("keeps a tensor of another step: what lasts from step to step is a state")
            if x._name in self.matrices:
                self.refuse(f"uses its state {self.matrices[x._name]!r}, of the whole matrix, other than by Rule.whole")
            self.read.add(x._name)
            return (self.number(x) if x._condition else x)._name
        if isinstance(x, Real):
            number: Any = x
            if not -LARGEST <= number <= LARGEST:
                self.refuse(f"uses {x!r}, which is no finite float32")
            # The float32 that torch would round it to, whatever its type: 1, True and 1.0 are one, and -0.0 is another than 0.0.
            return repr(struct.unpack("f", struct.pack("f", number))[0])
        self.refuse(
            f"uses {'a tensor' if isinstance(x, Tensor) else repr(x)}: numbers enter as float, or by coefficients"
        )

    def tensor(self, x: Any) -> str:
        """Like `operand`, but a number becomes a tensor. It is for places where torch would round a scalar in another way, or
        take another dtype."""
        return self.operand(x) if isinstance(x, Symbol) else f"full_like(p, {self.operand(x)})"

    def call(self, step: Any, args: tuple[Any, ...], results: int) -> "tuple[Symbol, ...]":
        if not callable(step):
            self.refuse(f"calls whole with {step!r}, which is no function")
        given = [x._name if x._name in self.matrices else self.operand(x) for x in args if isinstance(x, Symbol)]
        name = getattr(step, "__name__", "")
        if not name.isidentifier() or name in self.calls or _TAKEN.fullmatch(name):
            name = f"whole{len(self.calls)}"
        first = sum(call.results for call in self.calls.values())
        names = [f"w{first + i}" for i in range(results)]
        self.calls[name] = Call(self.rule, step, args, results)
        self.lines.append(f"{', '.join(names)} = {name}({', '.join(given)})")
        return tuple(Symbol(self, name) for name in names)

    def named(self, x: Any) -> str:
        """The name of a result; a number or a coefficient becomes a tensor."""
        text = self.operand(x)
        return text if text[0] in "apgsw" and text.isalnum() else self.add(f"full_like(p, 0.0) + {text}")._name

    def of_the_whole(self, key: str, x: Any) -> str:
        """The name of the new value of a state of the whole matrix."""
        name = x._name if isinstance(x, Symbol) and x._recording is self else ""
        if not name.startswith("w") and name not in self.matrices:
            self.refuse(f"returns for its state {key!r}, of the whole matrix, what is no result of Rule.whole")
        return name

    def condition(self, x: Any) -> str:
        if not (isinstance(x, Symbol) and x._condition and x._recording is self):
            self.refuse(f"uses {'a number' if isinstance(x, (Real, Symbol)) else repr(x)} as a condition")
        return x._name

    def number(self, condition: "Symbol") -> "Symbol":
        """1 where the condition holds, else 0."""
        return self.add(f"where({condition._name}, full_like(p, 1.0), full_like(p, 0.0))")


class Names:
    """The coefficients of a rule as attributes."""

    def __init__(self, recording: Recording, names: tuple[str, ...]) -> None:
        self._recording, self._names = recording, names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._names:
            rule = self._recording.rule
            raise ValueError(f"direction of {rule} reads {name!r}, but its coefficients are {list(self._names)}")
        return Symbol(self._recording, f"c.{name}")


class Symbol:
    """A float32 tensor, or a condition, of which nothing is known but how it is computed."""

    __array_ufunc__ = None  # a NumPy number on the left leaves the operation to the symbol

    def __init__(self, recording: Recording, name: str, condition: bool = False) -> None:
        self._recording, self._name, self._condition = recording, name, condition

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in OPERATIONS:
            self._recording.refuse(f"uses {name!r} of a tensor")
        return functools.partial(_called, self._recording, name, self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        everything = [args, *args, *(kwargs or {}).values()]  # torch looks for symbols in lists too
        recording = next(
            x._recording
            for xs in everything
            for x in (xs if isinstance(xs, (list, tuple)) else [xs])
            if isinstance(x, Symbol)
        )
        return _called(recording, getattr(function, "__name__", repr(function)), *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return "a tensor"

    def __pow__(self, exponent: Any) -> Any:
        return OPERATIONS["pow"](self._recording, self, exponent)

    def _unknown(self, *_: Any) -> NoReturn:
        self._recording.refuse("asks for the value or the size of a tensor, as `if`, float(), len() and [] do")

    def _inexact(self, other: Any) -> NoReturn:
        self._recording.refuse("uses one of ** // % @")

    __rpow__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __matmul__ = __rmatmul__ = _inexact
    __bool__ = __float__ = __int__ = __index__ = __complex__ = __len__ = __iter__ = __getitem__ = __setitem__ = _unknown
    __hash__ = object.__hash__


def _called(recording: Recording, name: str, *args: Any, **kwargs: Any) -> Any:
    name = name[2:-2] if name.startswith("__") else name
    if name not in OPERATIONS:
        recording.refuse(f"uses {name!r} of a tensor")
    try:
        return OPERATIONS[name](recording, *args, **kwargs)
    except Refusal:
        raise
    except TypeError as error:
        recording.refuse(f"uses {name!r} with other arguments than are known here: {error}")


def _operator(apply: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    def method(self: Symbol, *others: Any) -> Any:
        return apply(self._recording, *others, self) if reflected else apply(self._recording, self, *others)

    return method


for _name in ("add", "sub", "mul", "div"):
    _special = _name.replace("div", "truediv")
    setattr(Symbol, f"__{_special}__", _operator(OPERATIONS[_name]))
    setattr(Symbol, f"__r{_special}__", _operator(OPERATIONS[_name], reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs"):
    setattr(Symbol, f"__{_name}__", _operator(OPERATIONS[_name]))
for _name, _logical in (("and", "logical_and"), ("or", "logical_or"), ("invert", "logical_not")):
    setattr(Symbol, f"__{_name}__", _operator(OPERATIONS[_logical]))
