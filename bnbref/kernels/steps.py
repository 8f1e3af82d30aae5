"""Optimizer steps with 8-bit states: values and codes are found by look-up, and a CPU takes as many rows at a time as its cache
holds. On NVIDIA GPUs every look-up is by address: Triton would give a gathered load a layout of its own, and pass what it reads
and what it returns through shared memory. What this gains: docs/content/reading.md, table "formulations".
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bnbref.codebooks import Codebook, value_table
from bnbref.context import cached
from bnbref.kernels import by_address, floats, formulation, tracing
from bnbref.kernels.compiler import is_gpu, is_nvidia
from bnbref.kernels.configured import configured
from bnbref.kernels.counting import count, table_of
from bnbref.kernels.uniform import uniform
from bnbref.optim.equation import Equation
from bnbref.optim.rules import Rule
from bnbref.optim.step import advance, advance_blocks, decoded, largest

# How many rows, of 256 elements, a CPU takes at a time. What is then to be copied back stays in its cache: 6 MB for a float32
# parameter and two states.
_PIECE = 4096

# Vectors of 256 bits are the fastest (docs: How to read the code, table "vector widths").
_CPU = {"cpp.simdlen": 256}


def _gpu(*_: Any, **constants: Any) -> dict[str, Any]:
    return {**configured(rows=2, warps=2, width=256), **by_address.REAL_INPUTS}


@cached()
def _addressed_values(codebook: Codebook, device: torch.device) -> Tensor:
    return by_address.addressed(value_table(codebook, torch.device("cpu")).view(torch.int32).long(), device)


def _values(p: Tensor, *_: Tensor | None, rule: Rule, **constants: Any) -> tuple[Tensor, ...]:
    """The values of the codebook of each state: float32, or their bits as int64, which are looked up by address."""
    table = _addressed_values if is_nvidia(p) and not tracing() else value_table
    return tuple(table(rule.codebook(state), p.device) for state in rule.states)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    if table.dtype == torch.float32:
        return floats.look_up(table, codes)
    return by_address.look_up(table, codes.to(torch.int32)).to(torch.int32).view(torch.float32)


def _values_and_codes(p: Tensor, *_: Tensor | None, rule: Rule, **constants: Any) -> tuple[Tensor, ...]:
    """The values of the codebook of each state; then, again for each state, the table of its codes."""
    return (*_values(p, rule=rule), *(table_of(rule.codebook(s), p.device, is_nvidia(p)) for s in rule.states))


def _largest_by_bits(finite: Tensor, size: Tensor, before: Tensor) -> Tensor:
    """`largest` as a maximum of integers, one instruction instead of three: floats that are not negative are in the order of
    their bits, and a NaN without its sign is above them."""
    before = torch.where(before == before, before, torch.nan)
    return torch.where(finite, size, rearrange(before, "b -> b 1")).view(torch.int32).amax(-1).view(torch.float32)


@formulation("step_blocks", tables=_values_and_codes, cpu=_CPU, gpu=_gpu, piece=_PIECE)
def _(
    p: Tensor, g: Tensor, hyper: Tensor, noise: Tensor | None, *states: Tensor, tables: tuple[Tensor, ...], rule: Equation
) -> tuple[Tensor, ...]:  # fmt: skip
    hyper = uniform(hyper, p)
    tables = tuple(uniform(table, p) if table.dtype == torch.int64 else table for table in tables)  # for their address
    of_values, of_codes = tables[: len(tables) // 2], tables[len(tables) // 2 :]
    return advance_blocks(
        rule, p, g, hyper, noise, states, lambda i, codes: _look_up(of_values[i], codes), lambda i, x: count(x, of_codes[i]),
        _largest_by_bits if is_gpu(p) else largest,
    )  # fmt: skip


@formulation("direction_blocks", tables=_values, cpu=_CPU, gpu=by_address.REAL_INPUTS)
def _(p: Tensor, g: Tensor, hyper: Tensor, *states: Tensor, tables: tuple[Tensor, ...], rule: Equation) -> Tensor:
    states32 = decoded(states, lambda i, codes: _look_up(tables[i], codes))
    return advance(rule, p, g, states32, hyper)[2]
