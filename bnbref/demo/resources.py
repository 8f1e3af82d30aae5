"""What a run took: wall clock and the most memory held, of each part; processor time."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Phase:
    """The resources that a part of the run took.

    `peak` is in bytes and counts this process alone; compilers run in other processes.
    """

    seconds: float = 0.0
    peak: int = 0


def peak_memory() -> int:
    """The most bytes that this process held, since `reset_peak` (on Linux) or since it began; 0 if unknown."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak() -> None:
    """Let `peak_memory` count from now, where the system can."""
    with suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")


def cpu_seconds() -> float:
    """Processor time of this process and of the compilers that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def phase() -> Iterator[Phase]:
    """Measure the block; the numbers are there when it has ended."""
    reset_peak()
    result, start = Phase(), time.perf_counter()
    try:
        yield result
    finally:
        result.seconds, result.peak = time.perf_counter() - start, peak_memory()
