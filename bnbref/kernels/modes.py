"""The switches that decide whether a kernel is compiled. What torch does around a call decides it too: `bnbref.context`."""

import contextlib
import os
import threading
from collections.abc import Iterator

# An element for each `eager()` that is entered: appending to a list is one step for all threads, and `+= 1` is not where Python
# has no global lock. BNBREF_COMPILE=0 is one that is never left. It is read once, because looking a variable up that is not set
# costs more than the look-up of a kernel.
_entered: list[None] = [None] if os.environ.get("BNBREF_COMPILE") == "0" else []

_here = threading.local()
"""`once`: how many `once()` this thread has entered."""


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run every kernel uncompiled inside the block, in all threads of the process.

    >>> import bnbref, torch
    >>> with bnbref.eager():
    ...     packed, state = bnbref.functional.quantize_4bit(torch.ones(64))
    """
    _entered.append(None)
    try:
        yield
    finally:
        _entered.pop()


@contextlib.contextmanager
def once() -> Iterator[None]:
    """For what is computed once, as a weight is quantized when it is loaded: inside, this thread compiles nothing for GPUs.

    A GPU runs a definition in milliseconds, and to compile it takes seconds. What is compiled already is used.
    """
    _here.once = getattr(_here, "once", 0) + 1
    try:
        yield
    finally:
        _here.once -= 1


def inside_once() -> bool:
    """Whether this thread is inside `once()`."""
    return getattr(_here, "once", 0) > 0


def compile_enabled() -> bool:
    """Whether kernels are to be compiled: not inside `eager()`, and BNBREF_COMPILE was not 0 when bnbref was imported."""
    return not _entered
