"""Cases in processes of their own: a backend that ends its process fails one case, and the others are still judged.

    parent   sends each worker its next case, and notices when a worker is gone
    worker   loads the backend by name, runs the case, and sends what became of it

Cases of one operation with the same dtypes and parameters go to one worker, because they need the same compiled kernels. Who has
nothing left to do takes half of the longest rest of another.
"""

import contextlib
import ctypes
import io
import multiprocessing
import pickle
import signal
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bnbref.conformance import backends
from bnbref.conformance.case import Case
from bnbref.conformance.judge import Failure, Result, run_case


def run(
    name: str, cases: Sequence[Case], device: torch.device, jobs: int = 1, limit: float = 600.0
) -> list[Result]:  # fmt: skip
    """The results of all cases in their order, by `jobs` workers; with a progress bar on a terminal.

    name: of the backend, as in `backends.load`. limit: seconds, after which a case has failed and its process is ended.

    Raises ValueError if jobs is below 1, RuntimeError if a worker cannot load it.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    results: dict[int, Result] = {}
    waiting = _alike(cases)
    threads = max(1, torch.get_num_threads() // jobs)
    workers = [_Worker(name, device, threads) for _ in range(min(jobs, len(cases)))]
    try:
        for worker in workers:
            worker.loaded()
        with tqdm(total=len(cases), unit=" cases", leave=False, disable=None) as bar:
            for worker in workers:
                worker.begin(waiting, cases, workers)
            while busy := {worker.connection: worker for worker in workers if worker.todo}:
                done = set(wait(list(busy), timeout=min(worker.left(limit) for worker in busy.values())))
                for connection, worker in busy.items():
                    ready = connection in done or connection.poll()  # while another process was started, say
                    if ready or worker.left(limit) == 0:
                        case = cases[worker.todo[0]]
                        results[worker.todo.popleft()] = worker.result(case, ended=not ready)
                        bar.update()
                        worker.begin(waiting, cases, workers)
    finally:
        for worker in workers:
            worker.end()
    return [results[i] for i in range(len(cases))]


def _alike(cases: Sequence[Case]) -> deque[deque[int]]:
    """The numbers of the cases, together where they are of one operation with the same dtypes and parameters."""
    groups: dict[Any, deque[int]] = {}
    for i, case in enumerate(cases):
        kind = (case.operation, sorted((k, t.dtype) for k, t in case.inputs.items()), sorted(case.params.items()))
        groups.setdefault(repr(kind), deque()).append(i)
    return deque(groups.values())


class _Pickler(pickle.Pickler):
    """Tensors as their bytes. As torch pickles them, those of all cases took a fifth of the time of a run."""

    def reducer_override(self, x: Any) -> Any:
        if type(x) is not Tensor:
            return NotImplemented
        dense = x.contiguous()
        return _tensor, (ctypes.string_at(dense.data_ptr(), dense.nbytes), x.dtype, x.shape)


def _tensor(data: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _pickled(case: Case) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream).dump(case)
    return stream.getvalue()


class _Worker:
    """A process and the numbers of the cases that it still has to run; the first one it is running."""

    def __init__(self, name: str, device: torch.device, threads: int) -> None:
        self.todo: deque[int] = deque()
        self._of = (name, str(device), threads)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, *self._of))
        self.process.start()
        other.close()  # so that its end is seen when the process is gone

    def loaded(self) -> None:
        """Wait until the backend is loaded."""
        try:
            self.connection.recv_bytes()
        except EOFError:
            raise RuntimeError(f"a worker could not load backend {self._of[0]!r}") from None

    def end(self) -> None:
        """Let the process end by itself, so that it ends the processes that it started. A busy one is killed at once."""
        self.connection.close()
        self.process.join(timeout=0 if self.todo else 10)
        self.process.kill()
        self.process.join()

    def begin(self, waiting: deque[deque[int]], cases: Sequence[Case], workers: Sequence["_Worker"]) -> None:
        """Send the next case of the group in hand, or else of the next group that waits, or of the longest that another has."""
        if not self.todo and waiting:
            self.todo = waiting.popleft()
        elif not self.todo:
            longest = max((worker.todo for worker in workers), key=len)
            self.todo = deque(longest.pop() for _ in range(len(longest) // 2))
        if self.todo:
            self.begun = time.monotonic()
            with contextlib.suppress(ConnectionError):  # it is gone since its last answer: `result` finds that out
                self.connection.send_bytes(_pickled(cases[self.todo[0]]))

    def left(self, limit: float) -> float:
        """Seconds until the case that was sent has taken the limit, or 0."""
        return max(0.0, self.begun + limit - time.monotonic())

    def result(self, case: Case, ended: bool) -> Result:
        """The outcome of the case that was sent. If the process is gone, the case has failed, and a new process is started.

        ended: it took too long, and the process is to be ended.
        """
        try:
            if ended:
                self.process.kill()
                raise EOFError
            status, failures, seconds = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):  # the latter where it has not read the case
            self.process.join()
            how = f"no answer after {time.monotonic() - self.begun:.0f} s" if ended else _how(self.process.exitcode)
            failure = Failure(case, "", "crashed", f"the process ended: {how}")
            self._start()
            self.loaded()
            return Result(case, "failed", (failure,))
        return Result(case, status, tuple(Failure(case, *rest) for rest in failures), seconds)


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        names = {each.value: each.name for each in signal.Signals}  # those for real time have numbers alone
        return names.get(-exit_code, f"signal {-exit_code}")
    return f"exit status {exit_code}"


def _serve(connection: Connection, name: str, device: str, threads: int) -> None:
    """Run cases until there are no more."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process: the parent says so, and ends its workers
    torch.set_num_threads(threads)
    backend = backends.load(name)
    connection.send_bytes(b"loaded")
    while True:
        try:
            case = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        result = run_case(backend, case, torch.device(device))
        failures = [(f.output, f.kind, f.message, f.wrong, f.got) for f in result.failures]
        connection.send_bytes(pickle.dumps((result.status, failures, result.seconds)))
