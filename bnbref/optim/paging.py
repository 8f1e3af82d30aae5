"""The three places of states: with their parameter, in pinned host memory, or in memory-mapped files.

    resident        on the parameter's device
    paged           CUDA: in pinned host memory; the states of the next parameters are fetched on a side stream while the
                    current ones are updated, and written back behind them on another. Other devices: resident, said once
    page_directory  in files, one for each tensor, so that state may be larger than memory; on a CPU kernels write to them

The arithmetic is the same, and so are the bits. A directory is a checkpoint at any time but in the middle of a step.
"""

import json
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGED_FROM = 100_000
"""The state of a parameter with at least so many elements is paged, as in bitsandbytes. With a directory every state is."""

PAGE_BYTES = 2**28
"""Bytes of paged state that are on the device at a time, unless those of two parameters are more."""

Tensors = Mapping[str, Any]


class SideStreams:
    """Copies beside the computation on CUDA, a stream each way: the link carries both at once.

    Device memory belongs to the stream that fetches, which reuses it when the other one has drained it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fetching, self._writing = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def fetch(self, host: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Start to copy to the device. The copies may be used after `wait`."""
        with torch.cuda.stream(self._fetching):
            return [x.to(self._device, non_blocking=True) for x in host], self._fetching.record_event()

    def wait(self, event: Any) -> None:
        """Let the computation that follows wait for a fetch."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def write_back(self, host: Sequence[Tensor], device: Sequence[Tensor]) -> None:
        """Start to copy to the host the values that the computation so far leaves on the device."""
        self._writing.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._writing):
            for target, x in zip(host, device, strict=True):
                target.copy_(x, non_blocking=True)
        self._fetching.wait_stream(self._writing)

    def finish(self) -> None:
        """Wait until the host has everything, and the computation no longer uses the fetched copies."""
        self._writing.wait_stream(torch.cuda.current_stream(self._device))
        self._fetching.wait_stream(self._writing)
        self._writing.synchronize()


class Placement:
    """The place of the states of an optimizer. It gives memory to new ones, and brings states to the device of their parameter,
    one after another."""

    def __init__(
        self, is_paged: bool = False, directory: str | Path | None = None, page_bytes: int = PAGE_BYTES,
        copies: Callable[[torch.device], SideStreams] = SideStreams,
    ) -> None:  # fmt: skip
        if page_bytes < 1:
            raise ValueError(f"page_bytes must be at least 1, got {page_bytes}")
        self.is_paged = is_paged
        self.directory = None if directory is None else Path(directory)
        self._page_bytes = page_bytes
        self._make = copies
        self._made: dict[torch.device, SideStreams] = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def pages(self, numel: int) -> bool:
        """Whether the state of a parameter of so many elements may be in pages of host memory."""
        return self.is_paged and numel >= PAGED_FROM

    def empty(self, device: torch.device, numel: int, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for a state called `name` of a parameter with that device and number of elements."""
        if self.directory is not None:
            return _mapped(self.directory, name, shape, dtype)
        if not self.pages(numel):
            return torch.empty(shape, dtype=dtype, device=device)
        if device.type != "cuda":
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"paged state of parameters on {device.type} stays there: it is CUDA that pages to host memory. "
                    f"page_directory=... keeps it in files.",
                    stacklevel=2,
                )
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def forget(self, name: str) -> None:
        """Remove the files of a state that a parameter has no more."""
        for path in [] if self.directory is None else list(self.directory.glob(f"{name}.*.bin")):
            path.unlink()

    def stream(self, states: Sequence[tuple[torch.device, Tensors]]) -> Generator[Tensors, None, None]:
        """Yields each state with its tensors on the device. What is written to them before the next one is asked for is copied
        back.

        The next one is fetched while the current one is in use, however large they are: one at a time, a link that carries both
        ways at once would carry one way after the other. To be closed: then the host has all that was written back.
        """
        away = [[k for k, x in s.items() if isinstance(x, Tensor) and self._is_away(x, d)] for d, s in states]
        sizes = [sum(s[k].nbytes for k in keys) for keys, (_, s) in zip(away, states, strict=True)]
        fetched: deque[tuple[list[Tensor], Any]] = deque()
        used, ahead, following = 0, 0, 0
        try:
            for i, (device, state) in enumerate(states):
                while following < len(states) and (ahead < 2 or used + sizes[following] <= self._page_bytes):
                    place, tensors = states[following]
                    keys = away[following]
                    fetched.append(self._copies(place).fetch([tensors[k] for k in keys]) if keys else ([], None))
                    used += sizes[following]
                    ahead += bool(keys)
                    following += 1
                here, event = fetched.popleft()
                if not away[i]:
                    yield state
                    continue
                ahead -= 1
                self._copies(device).wait(event)
                yield {**state, **dict(zip(away[i], here, strict=True))}
                self._copies(device).write_back([state[k] for k in away[i]], here)
                used -= sizes[i]
        finally:  # after an exception, too, which leaves the current state as it was
            for copies in self._made.values():
                copies.finish()

    def begin(self) -> None:
        """Called when a step begins. From now on the directory is no checkpoint, until `end`."""
        if self.directory is not None:
            (self.directory / "steps.json").unlink(missing_ok=True)

    def end(self, counts: Mapping[int, Mapping[str, int]]) -> None:
        """Called when a step has ended. counts: the integers in the state of each parameter, by its index."""
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            unfinished = self.directory / "steps.json.new"
            unfinished.write_text(json.dumps(counts), encoding="utf-8")
            unfinished.replace(self.directory / "steps.json")

    def _is_away(self, x: Tensor, device: torch.device) -> bool:
        return x.device != device

    def _copies(self, device: torch.device) -> SideStreams:
        if device not in self._made:
            self._made[device] = self._make(device)
        return self._made[device]


# ---- a directory ----------------------------------------------------------------------------------------------------
# A file for each tensor, whose name says what it is: 0.state1.uint8.64x128.bin. steps.json has the steps of all parameters, and
# what they say of their blocks. It is there between steps alone: removed before the first update of one, written after the last.


def _mapped(directory: Path, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    numel = torch.Size(shape).numel()
    if numel == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    directory.mkdir(parents=True, exist_ok=True)
    sizes = "x".join(map(str, shape))
    path = directory / f"{name}.{str(dtype).removeprefix('torch.')}.{sizes}.bin"
    if not path.exists():
        for other in directory.glob(f"{name}.*.bin"):  # of another shape or dtype, from another run
            other.unlink()
        with path.open("wb") as file:
            file.truncate(numel * dtype.itemsize)  # a hole: it takes no room before it is written to
    return _open(path, shape, dtype)


def _open(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    numel = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype, device="cpu").view(tuple(shape))


def read_pages(directory: str | Path) -> dict[int, dict[str, Any]]:
    """The states in a page_directory, whether or not the process that wrote them is alive: `state` of a state dict.

        optimizer.load_state_dict({**optimizer.state_dict(), "state": read_pages(directory)})

    They are those after the last step that ended; parameters are not in there. Raises RuntimeError if a step was interrupted.
    """
    directory = Path(directory)
    if not (directory / "steps.json").exists():
        raise RuntimeError(
            f"{directory} has no steps.json: nothing was stepped there, or a step was interrupted half-way"
        )
    counts = json.loads((directory / "steps.json").read_text(encoding="utf-8"))
    # A directory that was written before a state said its blocksize has the step alone.
    states: dict[int, dict[str, Any]] = {
        int(i): {"step": each} if isinstance(each, int) else each for i, each in counts.items()
    }
    for path in sorted(directory.glob("*.bin")):
        index, key, dtype, sizes = path.name.removesuffix(".bin").split(".")
        shape = [int(n) for n in sizes.split("x") if n]
        if int(index) in states:
            states[int(index)][key] = _open(path, shape, getattr(torch, dtype))
    return states
