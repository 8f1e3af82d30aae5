"""Optimizer steps with 8-bit states: values and codes by look-up, and on CPUs as many rows at a time as a cache holds."""

import itertools
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import threshold_table, value_table
from bnbref.kernels.counting import code_table, count
from bnbref.kernels.door import formulation, tracing
from bnbref.kernels.floats import look_up
from bnbref.optim.rules import Rule
from bnbref.optim.state import advance_blocks, direction_of_blocks

# Rows of 256 that a CPU takes at a time: what is to be copied back, 6 MB for float32 and two states, stays in its cache.
_PIECE = 4096

# Vectors of 256 bits (table "vector widths").
_CPU = {"cpp.simdlen": 256}


def _values(p: Tensor, *_: Tensor | None, rule: Rule, **constants: Any) -> tuple[Tensor, ...]:
    return tuple(value_table(rule.codebook(state), p.device) for state in rule.states)


def _values_and_codes(p: Tensor, *_: Tensor | None, rule: Rule, **constants: Any) -> tuple[Tensor, ...]:
    """Of each state the values; then of each one what `count` takes."""
    books = [rule.codebook(state) for state in rule.states]
    codes = [None if tracing() else code_table(book, p.device) for book in books]
    tables = [threshold_table(b, p.device) if t is None else t for b, t in zip(books, codes, strict=True)]
    return (*_values(p, rule=rule), *tables)


@formulation("step_blocks", tables=_values_and_codes, cpu=_CPU, piece=_PIECE)
def _(
    p: Tensor,
    g: Tensor,
    hyper: Tensor,
    noise: Tensor | None,
    *states: Tensor,
    tables: tuple[Tensor, ...],
    rule: Rule,
    names: tuple[str, ...],
) -> tuple[Tensor, ...]:
    values, by_state = tables[: len(tables) // 2], tables[len(tables) // 2 :]
    new = advance_blocks(p, g, hyper, noise, states, rule, names, lambda i, codes: look_up(values[i], codes))
    codes = [count(x, table).to(torch.uint8) for x, table in zip(new.scaled, by_state, strict=True)]
    return new.p, *itertools.chain.from_iterable(zip(codes, new.absmax, strict=True))


@formulation("direction_blocks", tables=_values, cpu=_CPU)
def _(
    p: Tensor,
    g: Tensor,
    hyper: Tensor,
    *states: Tensor,
    tables: tuple[Tensor, ...],
    rule: Rule,
    names: tuple[str, ...],
) -> Tensor:
    return direction_of_blocks(p, g, hyper, states, rule, names, lambda i, codes: look_up(tables[i], codes))
