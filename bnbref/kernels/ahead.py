"""Calls that are likely to come, compiled by another process while this one is busy: the first products of one row on a GPU.

A text begins with products of many rows, and goes on with one row at a time. The first of each takes seconds to compile. So, as
soon as this process meets the former, another one compiles the latter, while this one compiles the former and whatever
torch.compile makes of the model. What the other process leaves on disk (`kept_launches`) is what the first call of one row
launches. If there is nothing by then, this process waits. But a process that has not begun to compile by then is not ahead: it
still imports what this one has imported, and is ended.

The other process runs `work`. It reads jobs from its standard input, writes to its standard output when it begins to compile, and
ends after a while without a job, or at once when this one has ended. It has tensors of its own, of the layouts of the calls, and
so needs memory of the GPU, for them and for CUDA. Where that is scarce, it is not started.
"""

import atexit
import contextlib
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist

_FREE = 4 * 2**30
"""Bytes of the GPU's memory that must be free: CUDA takes half a GiB in each process, and a large weight as much."""
_CORES = 4
"""Processors that there must be. The other process keeps one busy, and this one more than one where it compiles itself."""
_MOST = 32
"""Jobs for a process. All of them fit into a pipe, which is not read before torch is imported. Into one that is smaller, because
the user has many, as many are written as fit."""
_IDLE = 20.0
"""Seconds after the last job in which the process waits for another: between two, this one compiles."""
_LONGEST = 120.0
"""Seconds that a call waits, ten times what the slowest one takes."""

# Modules are looked for where this process looks for them, and nowhere else: of itself `python -c` begins with the working
# directory, where anybody's torch.py may be. Python does not end of itself while a thread reads its standard input: it aborts.
_PROGRAM = """
import sys
sys.path[:], sys.argv[1:] = sys.argv[1:], []
import os
try:
    from bnbref.kernels.ahead import work
    work()
finally:
    os._exit(0)
"""


_NO_PICKLE = (pickle.PicklingError, TypeError, AttributeError)
"""What `pickle` raises for what it cannot write, as for a codebook of a class that is defined in a function."""


class Job(NamedTuple):
    """A call of a kernel. tensors: of each argument the dtype, shape and stride, or None. place: where its launch is to be."""

    kernel: str
    tensors: tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]] | None, ...]
    constants: dict[str, Any]
    place: Path


class _Worker:
    """Another process, which compiles on the GPU of this index."""

    def __init__(self, index: int) -> None:
        paths = [path for path in sys.path if isinstance(path, str)]  # imports pass over what else is there
        # Inductor's own pool of processes takes longer to start than a kernel to compile.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with contextlib.ExitStack() as on_failure:
            self._begun = on_failure.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *paths], bufsize=0,
                stdin=subprocess.PIPE, stdout=self._begun, stderr=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
            on_failure.pop_all()
        self._jobs: IO[bytes] = self._process.stdin  # type: ignore[assignment]  # which is a pipe
        if hasattr(os, "set_blocking"):
            os.set_blocking(self._jobs.fileno(), False)  # this process waits for nothing but a launch
        self._given = set[Path]()
        self._owner = os.getpid()
        # Held by the thread that gives a job, looks whether one is done, or ends the process.
        self._lock = threading.RLock()
        self._write(index)
        atexit.register(self.end)

    def lives(self) -> bool:
        return self._process.poll() is None

    def give(self, job: Job) -> None:
        """Has it compile a call."""
        with self._lock:
            new = job.place not in self._given and len(self._given) < _MOST
            if new and self.lives() and self._write(job):
                self._given.add(job.place)

    def _write(self, value: Any) -> bool:
        """Whether a value was written. If a part of it was, nothing can be read behind it, and the process is ended."""
        try:
            content = pickle.dumps(value)
            written = self._jobs.write(content)  # None: the pipe is full
        except (*_NO_PICKLE, OSError):  # the latter: it has ended
            return False
        if written is not None and written < len(content):
            self.end()
        return written == len(content)

    def wait(self, place: Path) -> None:
        """Returns once the launch is there, or it is known that it will not be. Ends a process that has not begun to compile."""
        until = time.monotonic() + _LONGEST
        while True:
            with self._lock:
                if place not in self._given or place.exists() or not self.lives():
                    return
                if os.fstat(self._begun.fileno()).st_size == 0 or time.monotonic() > until:
                    self.end()
                    return
            time.sleep(0.002)

    def end(self) -> None:
        """Ends the process, also in the middle of its work. A fork of this process, which has a copy of this object, does not."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            atexit.unregister(self.end)
            self._process.kill()
            self._process.wait()
            self._jobs.close()
            self._begun.close()


_worker: _Worker | None = None
_lock = threading.Lock()


def begin(kernel: str, args: Sequence[Any], constants: Mapping[str, Any], place: Path) -> None:
    """Has another process compile a call of a kernel, unless its launch is at its place already, or no process may be started.

    All GPUs are taken to be alike. If they are not, this call has another place, and the process ends.
    """
    index = next(t.device.index for t in args if t is not None)
    tensors = [None if t is None else (t.dtype, tuple(t.shape), t.stride()) for t in args]
    # A folder that may not be read, no more processes, or a path that the system cannot take.
    with _lock, contextlib.suppress(OSError, ValueError):
        worker = None if place.exists() else _found_or_started(index)
        if worker is not None:
            worker.give(Job(kernel, tuple(tensors), dict(constants), place))


def _found_or_started(index: int) -> _Worker | None:
    global _worker
    if _worker is None or not _worker.lives():
        if not _may_start(index):
            return None
        if _worker is not None:
            _worker.end()  # closes its files
        _worker = _Worker(index)
    return _worker


def wait(place: Path) -> None:
    """Returns once the launch is there that another process was asked for; at once if none was, or it will not be there."""
    worker = _worker
    if worker is not None:
        worker.wait(place)


def _may_start(index: int) -> bool:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    # By the latter somebody tells Inductor that he wants no other processes.
    wanted = os.environ.get("BNBREF_AHEAD") != "0" and os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") != "1"
    # In a program that has Python within it, this is the program.
    python = Path(sys.executable or "").name.lower().startswith("python") and not getattr(sys, "frozen", False)
    if cores < _CORES or not (_is_first_rank() and wanted and python) or torch.version.hip is not None:
        return False
    free, _ = torch.cuda.mem_get_info(index)
    return free >= _FREE


def _is_first_rank() -> bool:
    """Whether this process is the first of several that need the same kernels. A launcher numbers those of this machine in
    LOCAL_RANK. Without a launcher, as with `torch.multiprocessing.spawn`, the rank among all processes counts."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None and dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return rank in (None, "0")


# ---- in the other process -------------------------------------------------------------------------------------------


def work() -> None:
    """Compiles what comes through standard input: the index of a GPU, and jobs. Ends after a while without a job, at a job that
    leaves nothing at its place, so that nobody waits for it, and with the input."""
    from bnbref.kernels.door import REGISTRY
    from bnbref.kernels.variants import import_compiler

    torch.cuda.set_device(pickle.load(sys.stdin.buffer))
    jobs: _Jobs = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    import_compiler()
    os.write(1, b"begun")
    while (job := _next(jobs)) is not None:
        REGISTRY[job.kernel](*map(_zeros, job.tensors), **job.constants)
        torch.cuda.empty_cache()
        if not job.place.exists():
            return


_Jobs = queue.SimpleQueue[Job]


def _read(jobs: _Jobs) -> None:
    """Ends this process when nothing more can be read: who gave the jobs has ended, and needs none of them."""
    try:
        while True:
            jobs.put(pickle.load(sys.stdin.buffer))
    finally:
        os._exit(0)


def _next(jobs: _Jobs) -> Job | None:
    try:
        return jobs.get(timeout=_IDLE)
    except queue.Empty:
        return None


def _zeros(layout: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]] | None) -> torch.Tensor | None:
    if layout is None:
        return None
    dtype, shape, stride = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda").zero_()
