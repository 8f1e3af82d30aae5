"""The numbers that cases are made of: hashes of the index, neighbours of thresholds, blocks with a known absmax."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, Codebook
from bnbref.conformance.case import Case
from kit_cases.oracles import make


def integers(count: int, seed: int, bits: int) -> Tensor:
    """Pseudo-random int64 in [0, 2^bits), bits <= 31: a multiplicative hash of the index, the same everywhere.

    >>> integers(3, seed=1, bits=8).tolist()
    [62, 254, 230]
    """
    x: Tensor = torch.arange(count, dtype=torch.int64) + seed * 1_000_003
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * multiplier) & 0x7FFFFFFF
    mixed: Tensor = (x ^ (x >> 15)) & (2**bits - 1)
    return mixed


def noise(count: int, seed: int) -> Tensor:
    """float32, roughly normal with a standard deviation of 0.29: a sum of four uniform integers of 20 bits, scaled by 2^-21.

    >>> noise(10000, seed=0).abs().max() < 1
    tensor(True)
    """
    total = sum(integers(count, 4 * seed + i, 20) - 2**19 for i in range(4))
    return torch.as_tensor(total).float() * 2.0**-21


def matrix(shape: Sequence[int], seed: int) -> Tensor:
    """`noise` of that shape."""
    return noise(math.prod(shape), seed).view(*shape)


def squares(shape: Sequence[int], seed: int) -> Tensor:
    """float32 of that shape: squares, none of which is next to nothing."""
    x = matrix(shape, seed) / 2
    return x * x + 0.015625


def spread(count: int, seed: int, low: int, high: int) -> Tensor:
    """float32 whose exponents are uniform in [low, high), with 8 random bits of mantissa and a random sign."""
    exponent = integers(count, seed, 16) % (high - low) + low
    mantissa = 1 + integers(count, seed + 1, 8).float() / 256
    sign = 1 - 2 * integers(count, seed + 2, 1).float()
    return sign * mantissa * torch.exp2(exponent.double()).float()


def beside(points: Sequence[float], ulps: Sequence[int]) -> Tensor:
    """float32: each point, moved by each number of representable steps away from (negative: towards) zero."""
    bits = torch.tensor(points, dtype=torch.float32).view(torch.int32)
    moved = [torch.where(bits & 0x7FFFFFFF == 0, bits, bits + step) for step in ulps]
    return torch.stack(moved, 1).view(-1).view(torch.float32)


def in_blocks(points: Tensor, blocksize: int, scale: float = 1.0) -> Tensor:
    """The points, times a power of two, in blocks whose first element is the scale itself: the absmax of each."""
    rows = torch.nn.functional.pad(points, (0, -points.numel() % (blocksize - 1)), value=0.4).view(-1, blocksize - 1)
    return (torch.cat((torch.ones(rows.shape[0], 1), rows), 1) * scale).view(-1)


def clear(x: Tensor, book: Codebook, blocksize: int = 64) -> Tensor:
    """`x` with what lies near a threshold, or near zero, replaced by 0.4 of the absmax of its block.

    What is left has one code by any rule of rounding, so that a case on sizes or strides fails for its own reason alone.
    """
    blocks = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(-1, keepdim=True)
    scaled = torch.where(absmax > 0, blocks / absmax, 0.0)
    bounds = torch.tensor(book.thresholds)
    size = scaled.abs() if book.sign_bit else scaled
    above = torch.bucketize(size, bounds).clamp(max=len(bounds) - 1)
    distance = torch.minimum((bounds[above] - size).abs(), (size - bounds[(above - 1).clamp(min=0)]).abs())
    sign = torch.where(scaled < 0, -1.0, 1.0)
    kept = torch.where((distance < 2e-4) | (scaled.abs() < 0.02), 0.4 * absmax * sign, blocks)
    return kept.view(-1)[: x.numel()].view(x.shape)


def cast(x: Tensor, dtype: str) -> Tensor:
    """The tensor in the dtype of that name."""
    return x.to(getattr(torch, dtype))


def neighbours(points: Sequence[float], dtype: str) -> Tensor:
    """The numbers of a 16-bit dtype that are nearest to each point, and the two beside each, as float32."""
    near = cast(torch.tensor(points), dtype)
    bits = near.view(torch.int16)
    moved = [torch.where(near == 0, bits, bits + step) for step in (-1, 0, 1)]
    return torch.stack(moved, 1).view(-1).view(near.dtype).float()


# Scales over two decades, none of which is a float16: a wrong index or one more rounding shows in every element.
SCALES = (1.0001, 100.003, 0.050001, 7.00007, 31.0003, 0.30001, 55.0007, 2.00003)


def scales(count: int) -> Tensor:
    """float32 `[count]` taken from SCALES in turn, and slightly larger each time."""
    i = torch.arange(count)
    return torch.tensor(SCALES)[i % len(SCALES)] * (1 + (i // len(SCALES)).float() / 64)


def random_bytes(count: int, seed: int) -> Tensor:
    """Pseudo-random uint8 `[count]`."""
    return integers(count, seed, 8).to(torch.uint8)


def random_int8(shape: tuple[int, ...], seed: int) -> Tensor:
    """int8 of that shape, from -128 to 127."""
    return (integers(math.prod(shape), seed, 8) - 128).to(torch.int8).view(shape)


def nested_weight(book: Codebook, blocks: int, zero_block: bool) -> Tensor:
    """Blocks of 64 whose absmax are 2 - s and 2 + s, s a multiple of 1/64 up to 1: their mean is exact, and so is scaling."""
    step = torch.where(torch.arange(blocks // 2) % 128 == 0, 1.0, (1 + integers(blocks // 2, 31, 6).float()) / 64)
    step = clear(step, DYNAMIC, 128)
    if zero_block:
        step = torch.where(torch.arange(blocks // 2) == 1, 2.0, 0.75)
    absmax = torch.stack((2 - step, 2 + step), 1).view(-1)
    x = in_blocks(clear(noise(63 * blocks, 33), book, 63) * 0.99, 64).view(blocks, 64)
    return x * absmax[:, None]


def changed(
    case: Case, label: str, rules: str, flags: str = "", layout: tuple[str, ...] = (), inputs: Mapping[str, Tensor] | None = None,
    **params: Any,
) -> Case:  # fmt: skip
    """Another case of a case's operation, with its other inputs and parameters."""
    given = {**case.inputs, **(inputs or {})}
    return make(label, case.operation, given, rules, flags, layout=layout, may_refuse=case.may_refuse,
                **{**case.params, **params})  # fmt: skip
