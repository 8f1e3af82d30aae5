"""The three places of states: with their parameter, in pinned host memory, or in memory-mapped files.

    resident        on the parameter's device
    paged           CUDA: in pinned host memory; the states of the next parameters are fetched on a side stream while the
                    current ones are updated, and written back behind them on another. Other devices: resident, said once
    page_directory  in files, one for each tensor, so that state may be larger than memory; on a CPU kernels write to them

The arithmetic is the same, and so are the bits. A directory is a checkpoint at any time but in the middle of a step.
"""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.optim.page_directory import Directory

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
        self.is_paged = is_paged
        if directory is not None and not str(directory):
            raise ValueError("page_directory must be a folder, got ''")
        # Not relative to wherever the program may be later.
        self.directory = None if directory is None else Directory(Path(directory).absolute())
        self.page_bytes = page_bytes
        self._make = copies
        self._made: dict[torch.device, SideStreams] = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        directory = None if self.directory is None else Directory(self.directory.path)
        return {**self.__dict__, "_made": {}, "directory": directory}

    def pages(self, numel: int) -> bool:
        """Whether the state of a parameter of so many elements may be in pages of host memory."""
        return self.is_paged and numel >= PAGED_FROM

    # A tensor that is made in inference mode cannot be changed outside of it, as the next step does.
    @torch.inference_mode(False)
    def empty(self, device: torch.device, numel: int, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for a state called `name` of a parameter with that device and number of elements."""
        if self.directory is not None:
            return self.directory.mapped(name, shape, dtype)
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
                while following < len(states) and (ahead < 2 or used + sizes[following] <= self.page_bytes):
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

    def _is_away(self, x: Tensor, device: torch.device) -> bool:
        return x.device != device

    def _copies(self, device: torch.device) -> SideStreams:
        if device not in self._made:
            self._made[device] = self._make(device)
        return self._made[device]
