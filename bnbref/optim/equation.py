"""The equation of a rule as a text: `direction` is run on symbols, and the operations that it asked for are a program.

The program, of which `write_down` has an example, is what runs, compiled or not, and its text is the identity of its kernel.
Whatever number a rule reads, from a field, a default, a closure, a class or a module, stands in the text; so two rules share a
kernel if and only if they compute the same. It is written anew at each step, in some microseconds, so that a number that was
changed since counts at once. And nothing but these lines reaches the compiler: what it could not compile, or not with the same
bits as uncompiled, is refused by name.
"""

import functools
import inspect
import keyword
import unicodedata
from collections.abc import Collection, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from bnbref.codebooks import Codebook
from bnbref.optim.kinds import SettingError, of_python
from bnbref.optim.master_weights import CORRECTIONS
from bnbref.optim.rule import OF, Rule, State, absmax_key, qmap_key
from bnbref.optim.symbols import LARGEST, Call, Names, Recording, Refusal, Symbol


class Equation(Rule):
    """A rule written down: compared by what it computes and by how its states are coded.

    names: those of its coefficients, in the order in which a step has them in a tensor. calls: its calls of functions of whole
    matrices, by name; if there are any, direction takes stacks of matrices. read: the names of the tensors that it uses.
    """

    def __init__(
        self, rule: Rule, source: str, names: tuple[str, ...], states: tuple[State, ...] | None = None,
        calls: Mapping[str, Call] | None = None, read: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.source, self.names, self.calls, self.read = source, names, calls or {}, read
        self.states, self.stacked, self.codebooks, self.clipped = state_layout(rule)
        self.states = self.states if states is None else states
        self._name, self._function = repr(rule), _function(source)
        if self.calls:
            scope = {**self._function.__globals__, **self.calls}
            self._function = FunctionType(self._function.__code__, scope)
        self._identity = (source, names, self.states, self.codebooks)
        self._hash = hash(self._identity)

    def direction(self, *args: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self._function(*args)
        return found

    def __repr__(self) -> str:
        return self._name

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Equation) and self._identity == other._identity)

    def __hash__(self) -> int:
        return self._hash


StateLayout = tuple[tuple[State, ...], tuple[str, ...], tuple[Codebook, Codebook], bool]


def state_layout(rule: Rule) -> StateLayout:
    """All of a rule that decides what its states look like. A state that was made by one layout cannot be read by another."""
    return rule.states, rule.stacked, rule.codebooks, rule.clipped


@functools.lru_cache(maxsize=1024)
def _function(source: str) -> FunctionType:
    scope: dict[str, Any] = {"sqrt": Rule.sqrt, "where": torch.where, "full_like": torch.full_like}
    exec(compile(source, "<direction of a rule>", "exec"), scope)
    function: FunctionType = scope["direction"]
    return function


def write_down(rule: Rule, names: tuple[str, ...]) -> Equation:
    """The equation of a rule whose coefficients have these names.

    >>> from bnbref.optim.rules import SGD
    >>> print(write_down(SGD(), ("rate", "decay", "wd", "b1")).source)
    def direction(p, g, s0, c):
        a0 = c.b1 * s0
        a1 = c.wd * p
        a2 = g + a1
        a3 = a0 + a2
        return (a3, a3,)
    """
    matrices = {f"s{i}": s.key for i, s in enumerate(rule.states) if s.of != "elements"}
    recording = Recording(repr(rule), matrices)
    inputs = ["p", "g", *(f"s{i}" for i in range(len(rule.states)))]
    symbols = [Symbol(recording, name) for name in inputs]
    try:
        results = rule.direction(*symbols, Names(recording, names))
    except Refusal:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        recording.refuse(f"fails: {type(error).__name__}: {error}")
    if not isinstance(results, (tuple, list)) or len(results) != 1 + len(rule.states):
        wanted = ", ".join(["direction", *(s.key for s in rule.states)])
        got = f"{len(results)} results" if isinstance(results, (tuple, list)) else f"no tuple but {results!r}"
        raise ValueError(f"direction of {rule!r} must return {1 + len(rule.states)} results, {wanted}, got {got}")
    if recording.calls and rule.clipped:
        recording.refuse("is clipped after steps of the whole matrix: let the last of them clip it")
    if matrices and not recording.calls:
        recording.refuse(f"has states of the whole matrix, {list(matrices.values())}, and no call of Rule.whole")
    if recording.calls:
        new = zip(rule.states, results[1:], strict=True)
        texts = [recording.named(results[0])]
        texts += [recording.named(x) if s.of == "elements" else recording.of_the_whole(s.key, x) for s, x in new]
    else:
        texts = list(map(recording.tensor, results))
    lines = [f"def direction({', '.join(inputs)}, c):", *recording.lines, f"return ({', '.join(texts)},)"]
    return Equation(rule, "\n    ".join(lines), names, calls=recording.calls, read=recording.read)


def _is_name(name: Any) -> bool:
    """Whether `c.name` is the attribute of just that name."""
    usual = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
    return usual and unicodedata.normalize("NFKC", name) == name


def coefficients_of(rule: Rule, t: int, group: Mapping[str, Any]) -> dict[str, float]:
    """The coefficients of step t for a group of parameters, in float64: ValueError if they are no finite float32."""
    group = {name: of_python(x) for name, x in group.items()}
    try:
        given: Any = rule.coefficients(t, group)
        if not isinstance(given, Mapping):
            raise SettingError(f"coefficients of {rule!r} must be a dict of numbers by name, got {given!r}")
        found = {name: float(x.item() if isinstance(x, Tensor) else x) for name, x in given.items()}
    except SettingError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"coefficients of {rule!r} fail at step {t}: {type(error).__name__}: {error}") from error
    for name, x in found.items():
        # Python reads `c.ﬁ` as `c.fi`, and names with an underscore before them may be those of Python or of `Names`.
        if not _is_name(name) or name.startswith("_"):
            raise ValueError(
                f"coefficients of {rule!r} must have names that Python takes for an attribute, without an underscore before "
                f"them, got {name!r}"
            )
        if not abs(x) <= LARGEST:
            raise ValueError(f"coefficient {name!r} of {rule!r} is {x} at step {t}: it must be a finite float32")
    if not {"rate", "decay"} <= found.keys():
        raise ValueError(f"coefficients of {rule!r} must have 'rate' and 'decay', got {list(found)}")
    return found


@_disable_dynamo  # Python, in what somebody compiles, too
def at_step(
    rule: Rule, t: int, group: Mapping[str, Any], device: torch.device | None = None
) -> tuple[Equation, Tensor]:
    """Step t for a group of parameters: the equation, and its coefficients in float32 on the device.

    >>> from bnbref.optim.rules import SGD
    >>> equation, hyper = at_step(SGD(), 1, {"lr": 0.5, "weight_decay": 0.0, "betas": (0.75,)})
    >>> equation.names, hyper
    (('rate', 'decay', 'wd', 'b1'), tensor([0.5000, 1.0000, 0.0000, 0.7500]))
    """
    found = coefficients_of(rule, t, group)
    hyper = torch.tensor(list(found.values()), dtype=torch.float32, device="cpu")  # whatever the default device is
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        # A copy from memory that is not pinned waits until the GPU has done all before it, such as the backward pass.
        hyper = hyper.pin_memory()
    return write_down(rule, tuple(found)), hyper.to(device, non_blocking=on_gpu)


def check_rule(rule: Any) -> Rule:
    """The rule, if it is one: TypeError or ValueError in a sentence about it if not."""
    if isinstance(rule, type):
        raise TypeError(f"rule must be a Rule, got a class: write {rule.__name__}()")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a Rule, got {rule!r}")
    states: Any = getattr(rule, "states", None)
    if not isinstance(states, tuple) or not all(isinstance(s, State) for s in states):
        raise TypeError(f'states of {rule!r} must be a tuple of State, as in (State("state1"),), got {states!r}')
    keys = ["step", "blocksize", "unorm_vec", *CORRECTIONS.values()]
    for s in states:
        if not isinstance(s.key, str) or not s.key.isidentifier():
            raise ValueError(f"a state of {rule!r} must have a name of letters, digits and underscores, got {s.key!r}")
        if s.of not in OF:
            raise ValueError(f"a state of {rule!r} must be of one of {OF}, got {s.of!r} for {s.key!r}")
        keys += [s.key, absmax_key(s.key), qmap_key(s.key)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(
            f"states of {rule!r} must have names of their own in a state dict, but these come twice: {twice}"
        )
    if not isinstance(rule.stacked, tuple) or not set(rule.stacked) <= {s.key for s in states}:
        raise ValueError(f"stacked of {rule!r} must be a tuple of names of its states, got {rule.stacked!r}")
    if not isinstance(rule.clipped, bool):
        raise TypeError(f"clipped of {rule!r} must be True or False, got {rule.clipped!r}")
    if not isinstance(rule.defaults, Mapping):
        raise TypeError(f"defaults of {rule!r} must be a dict of settings, got {rule.defaults!r}")
    if type(rule).codebook is not Rule.codebook:
        raise TypeError(
            f"codebook of {rule!r} is a method of its own, which no kernel calls: it names its two in codebooks"
        )
    books: Any = rule.codebooks
    if not isinstance(books, tuple) or len(books) != 2 or not all(isinstance(book, Codebook) for book in books):
        raise TypeError(f"codebooks of {rule!r} must be two, of states with a sign and of those without, got {books!r}")
    for book, kind in zip(books, ("with", "without"), strict=True):
        if book.order is not None or book.sign_bit or book.values[book.code_of_zero] != 0.0:
            raise ValueError(
                f"the codebook of states {kind} a sign, {book.name!r} of {rule!r}, must keep 0.0, where states begin, and have "
                f"codes in the order of its values"
            )
    if any(s.signed for s in states) and not books[0].values[0] < 0 < books[0].values[-1]:
        raise ValueError(
            f"the codebook of states with a sign, {books[0].name!r} of {rule!r}, has values of one sign only"
        )
    if not all(s.signed for s in states) and not books[1].values[-1] > 0:
        raise ValueError(f"the codebook of states without a sign, {books[1].name!r} of {rule!r}, has no value above 0")
    arguments = ["p", "g", *(s.key for s in states), "c"]
    try:
        inspect.signature(rule.direction).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"direction of {rule!r} must take ({', '.join(arguments)}): {error}") from error
    return rule
