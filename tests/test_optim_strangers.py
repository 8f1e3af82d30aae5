# ruff: noqa: E501, the tables of messages are as long as the messages
"""Rules that somebody else writes: generated ones have the same bits compiled and eager, and broken ones are refused in a sentence."""

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
from bnbref.fused import REGISTRY
from bnbref.optim.equation import numbers, write_down
from bnbref.optim.rules import Rule, State

# ---- generated rules ------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Any] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "negative": operator.neg, "abs": abs,
    "sign": torch.sign, "sqrt": lambda x: x.abs().sqrt(), "square": lambda x: x**2, "max": torch.maximum, "min": torch.minimum,
    "clamp": lambda x, low: x.clamp(min=low), "where": lambda x, y, z: torch.where(x > y, y, z),
    "both": lambda x, y: torch.where((x > y) & ~(x == 0), x, y), "count": lambda x, y: (x >= y) + 0.5 * (x != y),
}  # fmt: skip
ARITY = {"negative": 1, "abs": 1, "sign": 1, "sqrt": 1, "square": 1, "where": 3}

# Numbers of any type that Python has; among them those that are equal to another one and compute something else.
NUMBERS = st.sampled_from([0, 1, True, 1.0, 0.0, -0.0, 2, -1, 0.5, 1 / 3, 1e-30, 3e38, np.float32(0.1), np.float64(0.1), np.int64(3)]) | st.floats(
    -4, 4, width=32
)
HOMES = ("field", "class", "closure", "module", "default")


class Stranger(Rule):
    """A random program over p, g, the states, the coefficients and numbers that live in one place or another."""

    def __init__(self, states, lines, results, home, held):
        self.states = states
        self._lines, self._results, self._home = lines, results, home
        self.hold(held)

    def hold(self, held):
        if self._home == "field":
            self.held = held
        elif self._home == "class":
            type(self).held_by_class = held
        elif self._home == "closure":
            self._read = (lambda kept: lambda: kept)(list(held))
        elif self._home == "module":
            globals()["HELD"] = held
        else:
            self._read = types.FunctionType((lambda kept=None: kept).__code__, globals(), argdefs=(list(held),))

    def read(self):
        return {"field": lambda: self.held, "class": lambda: self.held_by_class, "module": lambda: HELD}.get(self._home, lambda: self._read())()

    def coefficients(self, t, group):
        return {"rate": group["lr"], "decay": 0.5, "x": 1 / t, "y": -0.75}

    def direction(self, p, g, *states_and_c):
        *states, c = states_and_c
        values = [p, g, *states, c.rate, c.x, c.y]
        held = self.read()
        for name, operands in self._lines:
            taken = [held[place] if kind == "number" else values[place % len(values)] for kind, place in operands]
            if all(kind == "number" for kind, _ in operands) or (ARITY.get(name, 2) == 1 or name in ("max", "min", "clamp", "where", "both", "count")) and operands[0][0] == "number":
                taken[0] = g
            if name in ("max", "min"):
                taken[1] = taken[1] if operands[1][0] == "value" else c.y
            values.append(OPERATIONS[name](*taken))
        return tuple(values[-1 - place % 4] for place in self._results)


@st.composite
def strangers(draw):
    states = tuple(State(key, signed) for key, signed in draw(st.dictionaries(st.sampled_from(["state1", "momentum", "absmax", "g", "sqrt"]), st.booleans(), min_size=1, max_size=3)).items())
    operand = st.tuples(st.sampled_from(["value", "value", "number"]), st.integers(0, 3))
    lines = []
    for _ in range(draw(st.integers(4, 10))):
        name = draw(st.sampled_from(sorted(OPERATIONS)))
        count = ARITY.get(name, 2)
        lines.append((name, draw(st.lists(operand, min_size=count, max_size=count))))
    results = draw(st.lists(st.integers(0, 3), min_size=1 + len(states), max_size=1 + len(states)))
    held = st.lists(NUMBERS, min_size=4, max_size=4)
    return states, lines, results, draw(st.sampled_from(HOMES)), draw(held), draw(held)


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
@settings(max_examples=100)
@given(strangers(), st.sampled_from([8, 32]))
def test_many_strangers_rules_have_the_same_bits_compiled(stranger, bits):
    same_compiled(stranger, bits)
