"""A directory of states in memory-mapped files. It is a valid checkpoint at any time except in the middle of a step.

    0.state1.uint8.64x128.bin    a file for each tensor, whose name says what it is
    steps.json                   the steps of all parameters, and what they say of their blocks

steps.json is there between steps alone: removed before the first update of one, and written after the last.
"""

import contextlib
import gc
import json
import os
import re
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.optim.folder_lock import lock

_NAME = re.compile(r"(\d+)\.(\w+)\.(u?int\d+|float\d+)\.((?:\d+(?:x\d+)*)?)")
"""The name of a file without its suffix: the index of the parameter, the key of the tensor, its dtype and its sizes."""


class Directory:
    """The files of one optimizer. No other optimizer may write to them: not that of another rank, and not a copy of this one."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"page_directory must be a folder, got {str(path)!r}, which is a file")
        self.path = path
        # The files of each parameter with their inodes: others may stand in their place.
        self._files: defaultdict[int, dict[str, int]] = defaultdict(dict)
        self._order: list[weakref.ref[Tensor]] = []
        _ALL.add(self)

    _held: int | None = None

    def let_go(self, close: Callable[[int], None] = os.close) -> None:  # bound: the end of a process empties modules
        """Ends the lock, if this object has it."""
        if self._held is not None:
            close(self._held)
            self._held = None

    __del__ = let_go

    def has(self, index: int) -> bool:
        """Whether this object has mapped a state of the parameter with that index."""
        return bool(self._files.get(index))

    def _hold(self) -> None:
        """Makes the folder, and locks it for as long as this object or its process lives: RuntimeError if another one has it."""
        if self._held is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = lock(self.path)
        if self._held is None:
            gc.collect()  # an optimizer and its scheduler are a cycle, and may be there when their names are not
            self._held = lock(self.path)
        if self._held is None:
            raise RuntimeError(
                f"page_directory {str(self.path)!r} is in use by another optimizer, of this process or of another one, such "
                f"as another rank: give each a folder of its own, or end the other one (in a notebook: `del optimizer`)"
            )

    def mapped(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The memory of a state called `name`, with what its file has if it is there.

        Its room on the disk is reserved, because a page that finds none would end the process.
        """
        self._hold()
        sizes = "x".join(map(str, shape))
        path = self.path / f"{name}.{str(dtype).removeprefix('torch.')}.{sizes}.bin"
        if not path.exists():
            self.forget(name)  # of another shape or dtype, from another run
            self._reserve(path, torch.Size(shape).numel() * dtype.itemsize)
        self._files[_index(path.name)][path.name] = path.stat().st_ino
        return _open(path, shape, dtype)

    def _reserve(self, path: Path, size: int) -> None:
        with path.open("wb") as file:
            try:
                if hasattr(os, "posix_fallocate") and size > 0:  # it refuses 0, of an empty parameter
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
            except OSError as error:
                path.unlink()
                raise OSError(
                    error.errno, f"page_directory has no room for {path.name}, of {size} bytes: {error.strerror}"
                ) from error

    def forget(self, name: str) -> None:
        """Remove the files of a state."""
        for path in list(self.path.glob(f"{name}.*.bin")):
            self._files[_index(path.name)].pop(path.name, None)
            path.unlink()

    def arrange(self, parameters: Sequence[Tensor]) -> None:
        """Renames the files of parameters that have another index than before, since a group has lost one; files of parameters
        that are gone are removed. Between `begin` and `end`. parameters: all of the optimizer, by their index."""
        if len(self._order) == len(parameters) and all(
            ref() is p for ref, p in zip(self._order, parameters, strict=True)
        ):
            return
        places = {id(p): i for i, p in enumerate(parameters)}
        before, self._order = self._order, [weakref.ref(p) for p in parameters]
        try:
            self._rename([places.get(id(ref())) for ref in before])
        except BaseException:  # the states are still in memory: the next step writes them into files anew
            for path, _ in (*_state_files(self.path), *_state_files(self.path, ".moved")):
                path.unlink()
            self._files.clear()
            raise

    def _rename(self, places: Sequence[int | None]) -> None:
        """Gives the files of each parameter its new index, or removes them, where that is None. A file that somebody has removed
        gets its new name, too, by which `end` then misses it."""
        moved = []
        for i, place in enumerate(places):
            for name, inode in self._files.pop(i, {}).items() if place != i else ():
                path = self.path / name
                if place is None:
                    path.unlink(missing_ok=True)
                    continue
                waiting = path.with_suffix(".moved")  # since the place of each may be that of another one
                if path.exists():
                    path.rename(waiting)
                moved.append((waiting, place, f"{place}.{name.partition('.')[2]}", inode))
        for waiting, place, name, inode in moved:
            if waiting.exists():
                waiting.replace(self.path / name)
            self._files[place][name] = inode

    def apart(self, index: int, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A saved state that is to be written into the files of the parameter with that index. What lies in other files here, as
        `read_pages` and `state_dict` give it, is copied into memory: the state of another parameter may be written there first.
        """
        here = {_file_id(path): path.name for path, _ in _state_files(self.path)}

        def one(key: str, x: Any) -> Any:
            if isinstance(x, Mapping):
                return {name: one(name, each) for name, each in x.items()}
            file = _mapped_file(x) if isinstance(x, Tensor) and x.layout == torch.strided else None
            name = None if file is None else here.get(file)
            return x if name is None or name.startswith(f"{index}.{key}.") else x.clone()

        return {key: one(key, x) for key, x in saved.items()}

    def begin(self) -> None:
        """A step begins: until `end` the folder is no valid checkpoint."""
        self._hold()
        (self.path / "steps.json").unlink(missing_ok=True)

    def end(self, counts: Mapping[int, Mapping[str, int]]) -> None:
        """A step has ended: the folder is a checkpoint with these step counts, unless somebody has removed files.

        What an earlier run has left there goes: `read_pages` would take it for states of this one.
        """
        here = {path.name: path.stat().st_ino for path, _ in _state_files(self.path)}
        own = {name: inode for files in self._files.values() for name, inode in files.items()}
        gone = sorted(name for name, inode in own.items() if here.get(name) != inode)
        if gone:
            warnings.warn(
                f"page_directory {str(self.path)!r} lacks {len(gone)} files that were removed, {gone[0]} first: the run may go "
                f"on, but what is there is no checkpoint. state_dict() is one",
                stacklevel=3,
            )
            return
        for name in here.keys() - own.keys():
            # Windows keeps a file that somebody has mapped. A later step then removes it.
            with contextlib.suppress(PermissionError):
                (self.path / name).unlink()
        unfinished = self.path / "steps.json.new"
        unfinished.write_text(json.dumps(counts), encoding="utf-8")
        unfinished.replace(self.path / "steps.json")


_ALL: "weakref.WeakSet[Directory]" = weakref.WeakSet()


def _let_go() -> None:
    """A fork has its parent's lock, as long as it lives, and must have none: it would step the parent's states unseen."""
    for directory in list(_ALL):
        directory.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _state_files(folder: Path, suffix: str = ".bin") -> list[tuple[Path, re.Match[str]]]:
    """The files of states in a folder, in which there may be others, such as pytorch_model.bin, and the parts of their names."""
    found = [(path, _NAME.fullmatch(path.name.removesuffix(suffix))) for path in folder.glob(f"*{suffix}")]
    return [(path, parts) for path, parts in sorted(found, key=lambda one: one[0]) if parts is not None]


def _index(name: str) -> int:
    """The index of the parameter that a file belongs to, with which its name begins."""
    return int(name.partition(".")[0])


_mapped: dict[int, tuple[str, tuple[int, int]]] = {}
"""Of the file that was last mapped at an address: the path that it had, and its `_file_id`, which it keeps when it is renamed."""


def _file_id(path: Path) -> tuple[int, int]:
    """What a file is known by, whatever its name: its device and its inode."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _mapped_file(x: Tensor) -> tuple[int, int] | None:
    """The `_file_id` of the file that a tensor is mapped from; None if it is in memory, or was mapped by others."""
    storage = x.untyped_storage()
    if storage.filename is None:
        return None
    name, file = _mapped.get(storage.data_ptr(), (None, None))
    return file if name == storage.filename else None


def _open(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    numel, name = torch.Size(shape).numel(), str(path.absolute())
    x = torch.from_file(name, shared=True, size=numel, dtype=dtype, device="cpu").view(tuple(shape))
    if numel > 0:
        _mapped[x.data_ptr()] = name, _file_id(path)
    return x


def read_pages(directory: str | Path) -> dict[int, dict[str, Any]]:
    """The states in a page_directory, whether or not the process that wrote them is alive: `state` of a state dict.

        optimizer.load_state_dict({**optimizer.state_dict(), "state": read_pages(directory)})

    They are those after the last step that ended; parameters are not in there. Raises RuntimeError if a step was interrupted, or
    a file was cut off.
    """
    directory = Path(directory)
    if not (directory / "steps.json").exists():
        raise RuntimeError(
            f"{directory} has no steps.json: no step was made there, or one was interrupted half-way, which leaves states of two "
            f"steps. Begin from a copy of the folder, or from another checkpoint"
        )
    counts = json.loads((directory / "steps.json").read_text(encoding="utf-8"))
    states: dict[int, dict[str, Any]] = {int(i): each for i, each in counts.items()}
    for path, parts in _state_files(directory):
        index, key, dtype, sizes = parts.groups()
        shape = [int(n) for n in sizes.split("x") if n]
        if int(index) in states:
            kind = getattr(torch, dtype)
            needed, size = torch.Size(shape).numel() * kind.itemsize, path.stat().st_size
            if size != needed:  # torch would make it longer, by zeros
                raise RuntimeError(
                    f"{path} must have the {needed} bytes that its name says, got {size}: the folder was copied in part"
                )
            states[int(index)][key] = _open(path, shape, kind)
    return states
