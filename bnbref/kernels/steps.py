"""Optimizer steps with 8-bit states: values and codes are found by look-up, and a CPU takes as many rows at a time as its cache
holds. What this gains: docs/content/reading.md, table "formulations".
"""

from typing import Any

from torch import Tensor

from bnbref.codebooks import threshold_table, value_table
from bnbref.kernels.counting import code_table, count
from bnbref.kernels.door import formulation, tracing
from bnbref.kernels.floats import look_up
from bnbref.optim.equation import Equation
from bnbref.optim.rules import Rule
from bnbref.optim.step import advance, advance_blocks, decoded

# How many rows, of 256 elements, a CPU takes at a time. What is then to be copied back stays in its cache: 6 MB for a float32
# parameter and two states.
_PIECE = 4096

# Vectors of 256 bits are the fastest (docs: How to read the code, table "vector widths").
_CPU = {"cpp.simdlen": 256}


def _values(p: Tensor, *_: Tensor | None, rule: Rule, **constants: Any) -> tuple[Tensor, ...]:
    return tuple(value_table(rule.codebook(state), p.device) for state in rule.states)


def _values_and_codes(p: Tensor, *_: Tensor | None, rule: Rule, **constants: Any) -> tuple[Tensor, ...]:
    """The values of the codebook of each state; then, again for each state, the table that `count` takes."""
    books = [rule.codebook(state) for state in rule.states]
    codes = [None if tracing() else code_table(book, p.device) for book in books]
    tables = [threshold_table(b, p.device) if t is None else t for b, t in zip(books, codes, strict=True)]
    return (*_values(p, rule=rule), *tables)


@formulation("step_blocks", tables=_values_and_codes, cpu=_CPU, piece=_PIECE)
def _(
    p: Tensor, g: Tensor, hyper: Tensor, noise: Tensor | None, *states: Tensor, tables: tuple[Tensor, ...], rule: Equation
) -> tuple[Tensor, ...]:  # fmt: skip
    of_values, of_codes = tables[: len(tables) // 2], tables[len(tables) // 2 :]
    return advance_blocks(
        rule, p, g, hyper, noise, states, lambda i, codes: look_up(of_values[i], codes), lambda i, x: count(x, of_codes[i])
    )  # fmt: skip


@formulation("direction_blocks", tables=_values, cpu=_CPU)
def _(p: Tensor, g: Tensor, hyper: Tensor, *states: Tensor, tables: tuple[Tensor, ...], rule: Equation) -> Tensor:
    floats = decoded(states, lambda i, codes: look_up(tables[i], codes))
    return advance(rule, p, g, floats, hyper)[2]
