"""Subnormal floats, which lie between 0 and the smallest normal one, and a processor that takes them for 0.

A thread may be told to do so: by `torch.set_flush_denormal(True)`, or by a library that was linked with -ffast-math, when it is
loaded. Then bits differ from those that are defined here. The self-check says so; the kit says so, too, and judges with
subnormals.
"""

import contextlib
from collections.abc import Iterator

import torch

FLUSHED = (
    "this process flushes subnormal floats to zero (torch.set_flush_denormal, or a library linked with -ffast-math)"
)


def flushes_subnormals() -> bool:
    """Whether this thread takes floats below the normal ones for zeros.

    >>> flushes_subnormals()
    False
    """
    return not (torch.full((1,), 2.0**-149, dtype=torch.float32, device="cpu") * 1).view(torch.int32).item()


@contextlib.contextmanager
def with_subnormals() -> Iterator[None]:
    """Inside, this thread computes with subnormal floats, as IEEE 754 says, whoever has switched them off."""
    if not flushes_subnormals():
        yield
        return
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
