"""Weights of 16 bits that are trained as if they had 24 or 32. An integer beside each keeps what rounding took away.

    exact value, float32        s eeeeeeee mmmmmmm mmmmmmmm mmmmmmmm
    parameter, bfloat16         s eeeeeeee mmmmmmm                      the nearest one, a tie away from zero
    correction, 16 bits                            ±mmmmmmm mmmmmmmm    exact - parameter, counted in float32s
    correction, 8 bits                             ±mmmmmmm             the same, in steps of 256 float32s: 24 bits in all

The float32s of one sign are numbered by their bits, so that "the float32 that lies c further" is an integer addition. Rounding to
bfloat16 keeps every 65,536th of them, and with ties away from zero the distance to the nearest one is in [-2^15, 2^15): an int16
for every float32, and no value of it too many. (With ties to even there would be 65,537 distances to an even number.)

float16 keeps every 8192nd float32, if its numbers are multiplied by 2^-112, which makes their exponents those of float32.

The idea is that of FlashOptim (2602.23349). Kahan's compensation, a bfloat16 beside a bfloat16, takes as many bytes as the
exact 16 bits, and keeps 8 of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CORRECTIONS = {torch.bfloat16: "correction", torch.float16: "correction_float16"}
"""The key of a parameter's correction in its state, by the dtype of the parameter, in whose steps it counts."""


class _Line(NamedTuple):
    """The numbers of a dtype among the float32s: every 2^shift-th one, after a product with scale, below limit."""

    shift: int
    scale: float
    limit: float


# From 65,520 on float16 has infinity alone, whose correction is 0.
_LINES = {torch.bfloat16: _Line(16, 1.0, torch.inf), torch.float16: _Line(13, 2.0**-112, 65520.0)}
_DTYPES = {24: torch.int8, 32: torch.int16}


def correction_dtype(dtype: torch.dtype, bits: int | None) -> torch.dtype | None:
    """The dtype of the correction that gives weights of a dtype that many bits, 24 or 32; None if they need none.

    >>> correction_dtype(torch.bfloat16, 24), correction_dtype(torch.float32, 24), correction_dtype(torch.bfloat16, None)
    (torch.int8, None, None)
    """
    return _DTYPES[bits] if bits is not None and dtype in _LINES else None


def joined(p: Tensor, correction: Tensor) -> Tensor:
    """The float32 that a parameter and its correction stand for, of any shape.  Exact.

        the float32 that lies `correction` further from 0 than p

    A parameter that somebody else has set to 0 never becomes less than 0: it has no negative corrections of its own.

    >>> one = torch.ones(2, dtype=torch.bfloat16)
    >>> joined(one, torch.tensor([-1, 64], dtype=torch.int8)).tolist() == [1 - 2**-16, 1 + 2**-9]
    True
    """
    line = _LINES[p.dtype]
    steps = correction.to(torch.int32) << _coarse(line, correction.dtype)
    steps = torch.where(p == 0, steps.clamp(min=0), steps)
    return ((p.float() * line.scale).view(torch.int32) + steps).view(torch.float32) * (1 / line.scale)


def split(x: Tensor, dtype: torch.dtype, correction: torch.dtype) -> tuple[Tensor, Tensor]:
    """The parameter nearest to x, a tie away from zero, and its correction: what `joined` takes.  Exact.

    int16   joined(*split(x)) is x: for bfloat16 always, for float16 from 2^-14 on to 65,520; below it errs by 2^-38 at most
    int8    x is first rounded to 16 bits (float16: 19) of significand, to the nearest, a tie to even
    """
    line = _LINES[dtype]
    scaled = x * line.scale
    bits, coarse = scaled.view(torch.int32), _coarse(line, correction)
    if coarse:
        bits = (bits + ((1 << (coarse - 1)) - 1) + ((bits >> coarse) & 1)) & -(1 << coarse)
    rounded = torch.where(x.abs() < torch.inf, bits.view(torch.float32), scaled)
    fits = rounded.abs() < line.limit * line.scale
    nearest = (bits + (1 << (line.shift - 1))) & -(1 << line.shift)
    p = torch.where(fits, nearest.view(torch.float32), rounded) * (1 / line.scale)
    return p.to(dtype), torch.where(fits, (bits - nearest) >> coarse, 0).to(correction)


def _coarse(line: _Line, correction: torch.dtype) -> int:
    """The number of bits of a float32 that an 8-bit correction leaves out."""
    return line.shift - 8 if correction == torch.int8 else 0


def value_of(p: Tensor, corrections: Sequence[Tensor]) -> Tensor:
    """The float32 value of a parameter that has one correction or none."""
    return joined(p, *corrections) if corrections else p.float()


def set_value(p: Tensor, corrections: Sequence[Tensor], value: Tensor) -> None:
    """Set a parameter, of any strides, and its correction, if it has one, to a value: float32, its elements in a row."""
    if corrections:
        p_new, rest = split(value, p.dtype, corrections[0].dtype)
        corrections[0].copy_(rest)
    p.copy_((p_new if corrections else value).view(p.shape))


def corrections(p: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
    """The correction of p that a state has, its elements in a row, or none.

    Raises ValueError if it is that of another dtype, as of a parameter that was cast since: it counts in other steps.
    """
    for dtype, key in CORRECTIONS.items():
        if key in state and p.dtype != dtype:
            raise ValueError(
                f"{key} of this state belongs to a parameter of {dtype}, but p is {p.dtype}: `value = optimizer.exact_weight(p)` "
                f"before a cast and `optimizer.set_exact_weight(p, value)` after it keep what p stands for"
            )
        if key in state:
            return [state[key].view(-1)]
    return []


def checked_correction(p: Tensor, state: Mapping[str, Any]) -> Tensor | None:
    """The correction that a saved state has, if any: ValueError if it is none that p can have."""
    found = corrections(p, state)
    if not found:
        return None
    [saved], key = found, CORRECTIONS[p.dtype]
    if saved.dtype not in _DTYPES.values():
        raise ValueError(f"saved {key} must be int8 or int16, got {saved.dtype}")
    if saved.numel() != p.numel():
        raise ValueError(f"saved {key} has {saved.numel()} elements, its parameter has {p.numel()}")
    most = 1 << (_LINES[p.dtype].shift - 1)
    if saved.numel() and not -most <= int(saved.min()) <= int(saved.max()) <= most:
        raise ValueError(f"saved {key} goes beyond {most}, half a step of {p.dtype}: it is of another dtype")
    return saved
