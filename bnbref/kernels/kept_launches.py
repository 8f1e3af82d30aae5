"""Launches kept on disk, beside what Inductor keeps there: a process makes at once those that an earlier one has compiled.

On a GPU the first call of a kernel imports torch's compiler, for some seconds, and finds the kernel among what is on disk, for
one more. What it ends in is a file of machine code and how that is launched:

    FOLDER/bnbref/DIGEST.json       the launch of a call, by the digest of all that decides what it runs
    FOLDER/bnbref/SHA256.cubin      its machine code

FOLDER is Inductor's. Nothing there is a program of Python, and what is not whole is as if it were not there.
"""

import getpass
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bnbref.kernels.launch import Launch, loaded
from bnbref.kernels.what_runs import digest

# Whoever sets one of these wants to see how kernels are compiled, or that they are. So does whoever sets `force_disable_caches`,
# by a variable or in a program: torch.compiler.config knows of both, and is there before Inductor.
_WATCHED = ("TORCH_LOGS", "TORCH_TRACE", "TORCH_COMPILE_DEBUG", "TRITON_ALWAYS_COMPILE")

# Files that the folder may hold, one for each layout; when there are more they are all removed, and it is filled anew. A program
# whose texts have every length has thousands of layouts.
_MOST_FILES = 4096

_NO_NAME = r'[\\/:*?"<>|]'
"""Characters of a user's name that Inductor replaces in the name of its folder."""

_functions: dict[tuple[str, int], int] = {}
"""The addresses of machine code that is loaded, by its file and the number of the GPU."""


def place_of(functions: Sequence[Callable[..., Any]], args: Sequence[Any], constants: Mapping[str, Any]) -> Path | None:
    """The file in which the launch of a call is kept; None if none is kept."""
    if any(os.environ.get(name) for name in _WATCHED) or torch.compiler.config.force_disable_caches:
        return None
    if not all(str(f.__module__).startswith("bnbref.") for f in functions):
        return None
    name = digest(functions, args, constants)
    return None if name is None else _folder() / f"{name}.json"


def _folder() -> Path:
    """A folder within that of Inductor's caches, which is found here by Inductor's rule: it may not be imported yet."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # Inductor sets it when it is first used
    if given is not None:
        return Path(given) / "bnbref"
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # a user whom the system does not know, as in many a container
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(tempfile.gettempdir()) / f"torchinductor_{re.sub(_NO_NAME, '_', user)}" / "bnbref"


def keep(place: Path, launch: Launch, kernel: Any, index: int) -> None:
    """Keeps a launch, with the machine code that Triton wrote for Inductor's kernel. Without room on the disk it is not kept."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.runtime.runtime_utils import triton_hash_to_path_key

    try:
        code = Path(triton_cache_dir(index), triton_hash_to_path_key(kernel.hash), f"{kernel.name}.cubin").read_bytes()
        file = place.with_name(f"{hashlib.sha256(code).hexdigest()}.cubin")
        place.parent.mkdir(parents=True, exist_ok=True)
        files = list(place.parent.iterdir())
        if len(files) >= _MOST_FILES:
            for old in files:
                old.unlink(missing_ok=True)
        _write(file, code)  # also where it is: it may have been cut off
        fields = {**launch._asdict(), "results": [[*layout[:2], str(layout[2])] for layout in launch.results]}
        _write(place, json.dumps({"launch": fields, "cubin": file.name}).encode())
    except OSError:
        return


def _write(file: Path, content: bytes) -> None:
    """A file is there as a whole or not at all, also for other processes; and for other users, if Inductor's files are."""
    part = file.with_name(f"{uuid.uuid4().hex}.part")  # `tempfile` makes files that nobody else may read
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def find(place: Path, index: int) -> tuple[Launch, int] | None:
    """The launch that is kept there and the address of its machine code on the GPU of this index, which is the current one.
    None if there is none."""
    try:
        kept = json.loads(place.read_bytes())
        file = place.with_name(kept["cubin"])
        code = file.read_bytes()
        launch = _launch(**kept["launch"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no file, no JSON, or that of something else
        return None
    if file.name != f"{hashlib.sha256(code).hexdigest()}.cubin":
        return None
    if (file.name, index) not in _functions:
        try:
            _functions[file.name, index] = loaded(str(file), launch, index)
        except RuntimeError:  # of a folder that machines share: this one's driver is too old for it
            return None
    return launch, _functions[file.name, index]


def _launch(grid: Any, arguments: Any, results: Any, **fields: Any) -> Launch:
    """A launch, of what JSON has of it."""
    layouts = tuple((tuple(s), tuple(t), getattr(torch, d.removeprefix("torch."))) for s, t, d in results)
    sources = tuple((place, value) for place, value in arguments)
    return Launch(grid=tuple(grid), arguments=sources, results=layouts, **fields)
