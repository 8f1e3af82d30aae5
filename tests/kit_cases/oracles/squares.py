"""States in 8 bits whose squares never become 0 where they were not: quantizations and steps."""

from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise
from bnbref.codebooks import Codebook
from bnbref.conformance.expected import Expected
from bnbref.conformance.oracles.codes import in_8_bits, nearest_even
from bnbref.conformance.oracles.intervals import Interval
from bnbref.conformance.oracles.steps import BLOCKSIZE, encoded, optimizer_8bit
from bnbref.conformance.oracles.values import each
from kit_cases.oracles.soap import Inputs, one_step


def book_of_squares(values: Tensor) -> Codebook:
    """The codebook of 8-bit values; if none is negative, a number above 0 never has the code of 0."""
    book = nearest_even(tuple(values.tolist()))
    return book if bool((values < 0).any()) else book.nonzero()


def encode_squares(scaled: Tensor, values: Tensor) -> Tensor:
    """The 8-bit codes of scaled elements, of which none above 0 has the code of 0 if the values are those of squares."""
    return blockwise.encode(scaled, book_of_squares(values))


def quantize_squares(x: Tensor, values: Tensor, blocksize: int) -> dict[str, Expected]:
    """Rules QS."""
    return in_8_bits(x, book_of_squares(values), blocksize)


def optimizer_8bit_nonzero(
    p: Tensor, g: Tensor, state1: Tensor, absmax1: Tensor, values1: Tensor, state2: Tensor | None = None,
    absmax2: Tensor | None = None, values2: Tensor | None = None, state3: Tensor | None = None, absmax3: Tensor | None = None,
    **k: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules ON."""
    states = (state1, absmax1, values1, state2, absmax2, values2, state3, absmax3)
    return optimizer_8bit(p, g, *states, encode=encode_squares, **k)


def decoded(codes: Tensor, absmax: Tensor, values: Tensor) -> Interval:
    """A state that is kept in 8 bits, of the shape of its codes."""
    scale = each(absmax, BLOCKSIZE, codes.numel()).view(codes.shape)
    return Interval.point(values[codes.long()]) * Interval.point(scale)


def recoded(new: Expected, before: Tensor, values: Tensor) -> tuple[Expected, Expected]:
    """The codes and scales of a new state that has bounds, all of whose gradients are finite. before: the old scales."""
    bounds, nothing = Interval.within(new), torch.zeros(new.value.numel())
    flat = Interval(bounds.low.reshape(-1), bounds.high.reshape(-1))
    x = new.value.reshape(-1)
    codes, scales = encoded(x, flat, nothing.bool(), nothing, before, values, encode_squares, floor=0.0)
    return Expected(codes.value.view(new.value.shape), also=codes.also, free=codes.free), scales


def soap_8bit(
    p: Tensor, g: Tensor, momentum: Tensor, absmax1: Tensor, values1: Tensor, squares: Tensor, absmax2: Tensor, values2: Tensor,
    left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, **numbers: Any,
) -> dict[str, Expected]:  # fmt: skip
    """Rules SE."""
    tensors: Inputs = {
        "p": p, "g": g, "momentum": decoded(momentum, absmax1, values1), "squares": decoded(squares, absmax2, values2),
        "left": left, "right": right, "of_left": of_left, "of_right": of_right,
    }  # fmt: skip
    made = one_step(tensors, **numbers)
    made["momentum"], made["absmax1"] = recoded(made["momentum"], absmax1, values1)
    made["squares"], made["absmax2"] = recoded(made["squares"], absmax2, values2)
    return made
