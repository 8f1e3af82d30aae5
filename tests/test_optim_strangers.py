# ruff: noqa: E501, the tables of messages are as long as the messages
"""Rules that somebody else writes: generated ones have the same bits compiled and eager, and broken ones are refused in a sentence."""

import numbers
import operator
import types
from typing import Any

import numpy as np
import pytest
import torch
from conftest import difference, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import RULES
from torch import nn

from bnbref import optim
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, Codebook
from bnbref.info import why_eager
from bnbref.kernels import REGISTRY
from bnbref.optim.equation import coefficients_of, write_down
from bnbref.optim.rules import Rule, State, absmax_key, qmap_key

# ---- generated rules ------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Any] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "from": lambda x, y: y - x,
    "of": lambda x, y: y / x, "negative": operator.neg, "abs": abs,
    "sign": torch.sign, "sqrt": lambda x: x.abs().sqrt(), "square": lambda x: x**2, "max": lambda x, y: torch.maximum(x, 0 * x + y), "min": lambda x, y: torch.minimum(x, y * x),
    "clamp": lambda x, low: x.clamp(min=low), "where": lambda x, y, z: torch.where(x > y, y, z),
    "both": lambda x, y: torch.where((x > y) & ~(x == 0), x, y), "count": lambda x, y: (x >= y) + 0.5 * (x != y),
    "plus": operator.pos, "zeros": lambda x, y: torch.sqrt(torch.ones_like(x)) + torch.zeros_like(x).sub(y),
    "between": lambda x, y: torch.clamp(x, min=-0.5, max=y), "as float": lambda x, y: (x <= y).float().clone() - ~(x < y),
    "branch": lambda x, y: x if isinstance(y, numbers.Real) and y > 0 else 2 * x,
}  # fmt: skip
ARITY = {"negative": 1, "abs": 1, "sign": 1, "sqrt": 1, "square": 1, "where": 3, "plus": 1}

# Codebooks by which somebody else keeps 8-bit states: few values, many, lopsided, neighbours, tiny ones, 0 twice; all keep 0.
BOOKS = (
    st.lists(st.floats(-1, 1, width=32) | st.sampled_from([2.0**-140, 1.0, 0.0]), max_size=254)
    .map(lambda values: Codebook.nearest("own", sorted([*values, -(2.0**-130), 0.0, 0.75])))
    .filter(lambda book: book.values[book.code_of_zero] == 0.0)
)  # else it is refused, see BROKEN

# Numbers of any type that Python has; among them those that are equal to another one and compute something else.
NUMBERS = st.sampled_from(
    [0, 1, True, 1.0, 0.0, -0.0, 2, -1, 0.5, 1 / 3, 1e-30, 3e38, np.float32(0.1), np.float64(0.1), np.int64(3)]
) | st.floats(-4, 4, width=32)
HOMES = ("field", "class", "closure", "module", "default")


HELD: list[Any] = []


class Stranger(Rule):
    """A random program over p, g, the states, the coefficients and numbers that live in one place or another."""

    def __init__(self, states, codebooks, lines, results, home, held):
        self.states, self.codebooks = states, codebooks
        self._lines, self._results, self._home = lines, results, home
        self.hold(held)

    def hold(self, held):
        if self._home == "field":
            self.held = held
        elif self._home == "class":
            type(self).of_the_class = held
        elif self._home == "module":
            HELD[:] = held
        elif self._home == "default":
            self.read.__func__.__defaults__ = (held,)
        else:
            self.enclosing = (lambda kept: lambda: kept)(held)

    def read(self, default=None):
        if self._home == "default":
            return default
        homes = {"field": lambda: self.held, "class": lambda: self.of_the_class, "module": lambda: HELD}
        return homes[self._home]() if self._home in homes else self.enclosing()

    def coefficients(self, t, group):
        return {"rate": group["lr"], "decay": 0.5, "x": 1 / t, "y": -0.75}

    def direction(self, p, g, *states_and_c):
        *states, c = states_and_c
        values = [p, g, *states, c.rate, c.x, c.y]
        held = self.read()
        for name, operands in self._lines:
            taken = [held[place] if kind == "number" else values[place % len(values)] for kind, place in operands]
            values.append(OPERATIONS[name](values[-1], *taken[1:]))  # an operation of numbers alone is Python's
        return tuple(values[-1 - place % 4] for place in self._results)


@st.composite
def strangers(draw):
    keys = st.sampled_from(["state1", "momentum", "absmax", "g", "sqrt", "self", "lr", "state", "é", "_"])
    states = tuple(State(*of) for of in draw(st.dictionaries(keys, st.booleans(), max_size=5)).items())
    codebooks = draw(st.just(Rule.codebooks) | st.tuples(BOOKS, BOOKS))
    operand = st.tuples(st.sampled_from(["value", "value", "number"]), st.integers(0, 3))
    lines = []
    for _ in range(draw(st.integers(4, 10))):
        name = draw(st.sampled_from(sorted(OPERATIONS)))
        count = ARITY.get(name, 2)
        lines.append((name, draw(st.lists(operand, min_size=count, max_size=count))))
    results = draw(st.lists(st.integers(0, 3), min_size=1 + len(states), max_size=1 + len(states)))
    held = st.lists(NUMBERS, min_size=4, max_size=4)
    return states, codebooks, lines, results, draw(st.sampled_from(HOMES)), draw(held), draw(held)


class Proper(Stranger):
    """One whose states are finite, and not negative where they are said not to be."""

    def direction(self, p, g, *rest):
        direction, *new = (0 * p + x for x in super().direction(p, g, *rest))
        new = [torch.where(x == x, x, 0.0).clamp(-100, 100) for x in new]
        return (direction, *(x if s.signed else abs(x) for s, x in zip(self.states, new, strict=True)))


def stepped(stranger, bits):
    """Parameter and states after two steps, between which the rule's numbers change."""
    *program, before, after = stranger
    rule = Stranger(*program, before)
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(700, generator=generator))
    optimizer = optim.Optimizer([p], rule, {"lr": 0.25}, optim_bits=bits, min_8bit_size=0)
    for t in range(2):
        p.grad = torch.randn(700, generator=generator) * 10 ** torch.linspace(-9, 9, 700)
        p.grad[::50] = 0.0
        p.grad[1::50] = -0.0
        optimizer.step()
        if t == 0:
            rule.hold(after)
    return [p.data, *(x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))]


def same_compiled(stranger, bits):
    compiled = stepped(stranger, bits)
    with running("eager"):
        eager = stepped(stranger, bits)
    assert same_bits(compiled, eager), difference(compiled, eager)


@settings(max_examples=5)
@given(strangers(), st.sampled_from([8, 32]))
def test_a_strangers_rule_has_the_same_bits_compiled(stranger, bits):
    same_compiled(stranger, bits)


@pytest.mark.slow
@settings(max_examples=60)
@given(strangers(), st.sampled_from([8, 32]))
def test_many_strangers_rules_have_the_same_bits_compiled(stranger, bits):
    same_compiled(stranger, bits)


# ---- identity -------------------------------------------------------------------------------------------------------


class Scaled(Rule):
    states = (State("momentum"),)

    def __init__(self, factor):
        self.factor = factor

    def coefficients(self, t, group):
        return {"rate": group["lr"], "decay": 1.0}

    def direction(self, p, g, m, c):
        m = m + g
        return m * self.factor, m


NAMES = ("rate", "decay")


@given(NUMBERS, NUMBERS)
@example(0.0, -0.0)
@example(1, True)
@example(0.1, np.float32(0.1))
def test_equations_are_equal_if_their_numbers_are(one, other):
    """As float32, bit for bit: what torch makes of a number."""
    same = np.float32(one).tobytes() == np.float32(other).tobytes()
    equations = write_down(Scaled(one), NAMES), write_down(Scaled(other), NAMES)
    assert (equations[0] == equations[1]) == same
    assert (hash(equations[0]) == hash(equations[1])) == same


@pytest.mark.skipif(why_eager("cpu") is not None, reason="not compiled here")
def test_equal_rules_share_a_kernel_and_others_do_not():
    def variants():
        return sum(len(kernel.variants) for kernel in REGISTRY.values())

    def step(rule):
        p = nn.Parameter(torch.ones(4096))
        p.grad = torch.ones(4096)
        optim.Optimizer([p], rule, {"lr": 1.0}).step()
        return float(p[0].detach())

    assert step(Scaled(17.0)) == -16.0
    before = variants()
    again = type(
        "Scaled",
        (Rule,),
        {**{key: Scaled.__dict__[key] for key in ("coefficients", "direction", "__init__")}, "states": Scaled.states},
    )
    assert step(Scaled(17)) == step(again(17.0)) == -16.0  # another class of that name which computes the same
    assert variants() == before
    changed = type("Scaled", (Scaled,), {"direction": lambda self, p, g, m, c: (g, m)})
    assert step(Scaled(18.0)) == -17.0
    assert step(changed(17.0)) == 0.0
    assert variants() == before + 2


def test_codebooks_belong_to_the_identity():
    equal = write_down(Scaled(1.0), NAMES)
    other = type(
        "Scaled", (Scaled,), {"codebooks": (Codebook.nearest("mine", [-1, -0.5, 0, 0.5, 1]), DYNAMIC_UNSIGNED)}
    )
    assert write_down(other(1.0), NAMES) != equal == write_down(Scaled(1.0), NAMES)
    unsigned = type("Scaled", (Scaled,), {"states": (State("momentum", signed=False),)})
    assert write_down(unsigned(1.0), NAMES) != equal


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_an_equation_computes_what_its_rule_does(rule):
    """On tensors the rule itself is the definition; torch's CPU has another square root, which `Rule.sqrt` avoids."""
    group = {
        "lr": 0.1,
        "betas": (0.9, 0.99, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "alpha": 2.0,
        "t_alpha": 3,
        "t_beta3": 3,
    }
    found = coefficients_of(rule, 2, group)
    c = types.SimpleNamespace(**{name: torch.tensor(x, dtype=torch.float32) for name, x in found.items()})
    inputs = [torch.randn(1000), torch.randn(1000), *(torch.rand(1000) for _ in rule.states)]
    assert same_bits(write_down(rule, tuple(found)).direction(*inputs, c), rule.direction(*inputs, c))


def test_what_changes_belongs_to_coefficients(eager):
    rule, p = Scaled(1.0), nn.Parameter(torch.ones(10))
    optimizer = optim.Optimizer([p], rule, {"lr": 1.0})
    p.grad = torch.ones(10)
    for _ in range(8):
        optimizer.step()
        rule.factor += 0.5
    with pytest.warns(
        UserWarning, match="direction of Scaled has computed with other numbers in more than 8 steps"
    ) as said:
        optimizer.step()
    assert said[0].filename == __file__
    rule.factor += 0.5
    optimizer.step()  # said once


def test_states_stay_what_they_were(eager):
    p = nn.Parameter(torch.ones(10))
    rule = Scaled(1.0)
    optimizer = optim.Optimizer([p], rule, {"lr": 1.0})
    p.grad = torch.ones(10)
    optimizer.step()
    rule.codebooks = (DYNAMIC, DYNAMIC)
    with pytest.raises(RuntimeError, match="states or codebooks of Scaled are not those"):
        optimizer.step()


# ---- states by any name ---------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.lists(st.from_regex(r"[a-z_]{1,7}[0-9]?", fullmatch=True), min_size=1, max_size=4, unique=True),
    st.sampled_from([8, 32]),
)
@example(["momentum", "absmax"], 8)
@example(["state", "state10", "my_state"], 8)
@example(["absmax1", "state2", "lambda"], 8)
def test_states_have_any_names(names, bits):
    """They step, are saved and loaded, in memory and in files; or two names meet in a file, and that is said."""

    class Sums(Rule):
        states = tuple(State(name, signed=i % 2 == 0) for i, name in enumerate(names))

        def coefficients(self, t, group):
            return {"rate": group["lr"], "decay": 1.0}

        def direction(self, p, g, *rest):
            new = [x + (i + 1) * g.abs() for i, x in enumerate(rest[:-1])]
            return (sum(new), *new)

    with running("eager"):
        p = nn.Parameter(torch.ones(600))
        keys = [key for name in names for key in (name, absmax_key(name), qmap_key(name))]
        if len({*keys, "step", "unorm_vec"}) < len(keys) + 2:
            with pytest.raises(ValueError, match="names of their own"):
                optim.Optimizer([p], Sums(), {"lr": 1.0}, optim_bits=bits)
            return
        optimizer = optim.Optimizer([p], Sums(), {"lr": 1.0}, optim_bits=bits, min_8bit_size=0)
        p.grad = torch.randn(600)
        optimizer.step()
        other = optim.Optimizer([nn.Parameter(torch.ones(600))], Sums(), {"lr": 1.0}, optim_bits=bits, min_8bit_size=0)
        other.load_state_dict(optimizer.state_dict())
        [mine], [theirs] = optimizer.state.values(), other.state.values()
        assert mine.keys() == theirs.keys()
        assert set(names) <= mine.keys()
        assert len(mine) == 1 + len(names) * (2 if bits == 8 else 1)
        assert all(same_bits(x, theirs[key]) for key, x in mine.items() if key != "step")


# ---- broken rules ---------------------------------------------------------------------------------------------------


def broken(**attributes):
    return type("Mine", (Scaled,), attributes)(1.0)


def going(body):
    return broken(direction=lambda self, p, g, m, c: body(p, g, m, c))


BROKEN = {
    "rule must be a Rule, got a class: write Scaled()": Scaled,
    "rule must be a Rule, got None": None,
    "must have 'rate' and 'decay', got ['decay']": broken(coefficients=lambda self, t, group: {"decay": 1.0}),
    "coefficients of Mine fail at step 1: KeyError: 'beta'": broken(
        coefficients=lambda self, t, group: {"rate": group["beta"]}
    ),
    "coefficients of Mine must be a dict of numbers by name, got [1.0]": broken(
        coefficients=lambda self, t, group: [1.0]
    ),
    "coefficient 'rate' of Mine is nan at step 1": broken(
        coefficients=lambda self, t, group: {"rate": np.nan, "decay": 1}
    ),
    "without an underscore before them, got 'ﬁ'": broken(  # Python reads `c.ﬁ` as `c.fi`
        coefficients=lambda self, t, group: {"rate": 1, "decay": 1, "ﬁ": 1}
    ),
    "got '_names'": broken(coefficients=lambda self, t, group: {"rate": 1, "decay": 1, "_names": 1}),
    "attribute, without an underscore before them, got 3": broken(
        coefficients=lambda self, t, group: {"rate": 1, "decay": 1, 3: 1}
    ),
    "codebook of Mine is a method of its own": broken(codebook=lambda self, state: DYNAMIC),
    "direction of Mine fails: TypeError: unsupported operand type(s) for ^": going(
        lambda p, g, m, c: ((g > 0) ^ (m > 0), m)
    ),
    "direction of Mine fails: TypeError: maximum()": going(lambda p, g, m, c: (torch.maximum(g, 0.0), m)),
    "direction of Mine fails: KeyError: 'beta'; a rule computes": going(lambda p, g, m, c: ({}["beta"] * g, m)),
    "direction of Mine fails: TypeError: operand 'Symbol' does not": going(lambda p, g, m, c: (np.sqrt(g), m)),
    "got 'lambda'": broken(coefficients=lambda self, t, group: {"rate": 1, "decay": 1, "lambda": 1}),
    "Rule has no direction": type(
        "Mine", (Rule,), {"states": (), "coefficients": Scaled.coefficients, "__repr__": lambda _: "Rule"}
    )(),
    "must return 2 results, direction, momentum, got 1 results": going(lambda p, g, m, c: (m,)),
    "got 3 results": going(lambda p, g, m, c: (m, m, m)),
    "got no tuple but a tensor": going(lambda p, g, m, c: m),
    "got no tuple but None": going(lambda p, g, m, c: None),
    "direction of Mine must take (p, g, momentum, c)": broken(direction=lambda self, p, g, c: (g,)),
    "direction of Mine reads 'b1', but its coefficients are ['rate', 'decay']": going(lambda p, g, m, c: (c.b1 * g, m)),
    "uses 'sum' of a tensor": going(lambda p, g, m, c: (g.sum() * g, m)),
    "uses 'numel' of a tensor": going(lambda p, g, m, c: (g / g.numel(), m)),
    "uses 'double' of a tensor": going(lambda p, g, m, c: (g.double(), m)),
    "uses 'exp' of a tensor": going(lambda p, g, m, c: (torch.exp(g), m)),
    "uses 'cat' of a tensor": going(lambda p, g, m, c: (torch.cat([g, m]), m)),
    "uses 'rand_like' of a tensor": going(lambda p, g, m, c: (torch.rand_like(g), m)),
    "uses 'mul_' of a tensor": going(lambda p, g, m, c: (m.mul_(2.0), m)),
    "uses 'add' with other arguments": going(lambda p, g, m, c: (torch.add(g, m, alpha=2), m)),
    "uses a tensor: numbers enter as float": going(lambda p, g, m, c: (torch.tensor(2.0) * g, m)),
    "uses 1j": going(lambda p, g, m, c: (1j * g, m)),
    "uses nan, which is no finite float32": going(lambda p, g, m, c: (float("nan") * g, m)),
    "uses 1e+39, which is no finite float32": going(lambda p, g, m, c: (1e39 * g, m)),
    "uses the power 3": going(lambda p, g, m, c: (g**3, m)),
    "uses one of ** // % @": going(lambda p, g, m, c: (2.0**g, m)),
    "uses a number as a condition": going(lambda p, g, m, c: (torch.where(g, m, g), m)),
    "asks for the value or the size of a tensor": going(lambda p, g, m, c: (max(g, m), m)),
    "states of Mine must be a tuple of State": broken(states=State("momentum")),
    "come twice: ['momentum', 'momentum_absmax', 'momentum_qmap']": broken(states=(State("momentum"),) * 2),
    "come twice: ['absmax1']": broken(states=(State("state1"), State("absmax1"))),
    "come twice: ['step']": broken(states=(State("step"),)),
    "letters, digits and underscores, got 'a.b'": broken(states=(State("a.b"),)),
    "stacked of Mine must be a tuple of names of its states": broken(stacked=("state1",)),
    "codebooks of Mine must be two": broken(codebooks=(DYNAMIC,)),
    "'fp4' of Mine, must keep 0.0, where states begin, and have codes in the order of its values": broken(
        codebooks=(FP4, FP4)
    ),
    # A threshold at 0, above which 0 is not: the code of 0 is that of -1.
    "'late' of Mine, must keep 0.0, where states begin": broken(
        codebooks=(Codebook("late", (-1.0, 0.0, 1.0), (0.0, 0.5)), DYNAMIC_UNSIGNED)
    ),
    "'tiny' of Mine, must keep 0.0": broken(
        codebooks=(Codebook.nearest("tiny", [-1.0, -(2.0**-149), 0.0, 1.0]), DYNAMIC_UNSIGNED)
    ),
    "'down' of Mine, has no value above 0": broken(
        states=(State("momentum", signed=False),), codebooks=(DYNAMIC, Codebook.nearest("down", [-1.0, 0.0]))
    ),
    "has values of one sign only": broken(codebooks=(DYNAMIC_UNSIGNED, DYNAMIC_UNSIGNED)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_rule_is_refused_when_the_optimizer_is_made(message):
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        optim.Optimizer([nn.Parameter(torch.ones(3))], BROKEN[message], {"lr": 1.0})
    assert message in str(caught.value)


def test_a_refusal_reads_like_this():
    with pytest.raises(TypeError) as caught:
        write_down(going(lambda p, g, m, c: (m if g > 0 else g, m)), NAMES)
    assert_expected_inline(
        str(caught.value),
        """direction of Mine asks for the value or the size of a tensor, as `if`, float(), len() and [] do; a rule computes element by element with + - * /, comparisons, & | ~, abs, sign, sqrt, square, where, minimum, maximum and clamp""",
    )


def test_what_breaks_later_changes_nothing(eager):
    """A coefficient that stops to be a number is refused before the first parameter has moved."""
    rule = type(
        "Mine", (Scaled,), {"coefficients": lambda self, t, group: {"rate": group["lr"] / (3 - t), "decay": 1.0}}
    )(1.0)
    params = [nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10))]
    optimizer = optim.Optimizer(params, rule, {"lr": 1.0})
    for p in params:
        p.grad = torch.ones(10)
    optimizer.step()
    params[1].grad = None
    optimizer.step()
    params[1].grad = torch.ones(10)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="fail at step 3: ZeroDivisionError"):
        optimizer.step()
    assert same_bits([p.data for p in params], before)
    assert [optimizer.state[p]["step"] for p in params] == [2, 1]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("places", [[0, 0], [0, 1, 2, 1]])
def test_a_parameter_is_in_its_group_once(places):
    """As a tied weight is that comes from two modules. Torch warns and steps it twice."""
    params = [nn.Parameter(torch.ones(i + 2)) for i in range(3)]
    with pytest.raises(
        ValueError, match=rf"got one of shape .* at {places.index(places[-1])} and at {len(places) - 1}"
    ):
        optim.Optimizer([params[i] for i in places], Scaled(1.0), {"lr": 1.0})


def test_a_state_that_was_said_to_have_no_sign_and_has_one(eager):
    """In 32 bits it steps; its checkpoint is refused, with a way to load it."""
    rule = broken(states=(State("momentum", signed=False),))
    p = nn.Parameter(torch.ones(3))
    p.grad = -torch.ones(3)
    optimizer = optim.Optimizer([p], rule, {"lr": 1.0})
    optimizer.step()
    with pytest.raises(ValueError, match="State\\('momentum'\\) has a sign after all"):
        optimizer.load_state_dict(optimizer.state_dict())
    mended = optim.Optimizer([p], Scaled(1.0), {"lr": 1.0})
    mended.load_state_dict(optimizer.state_dict())
    assert mended.state[p]["momentum"].tolist() == [-1.0] * 3
