"""The lock of a folder: it has one owner at a time, in this process or in another one, and ends with the owner's process.

Linux, macOS    `flock` on the folder itself
Windows         the first byte of a file in it, called `lock`. A folder cannot be opened there
"""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt


def lock(folder: Path) -> int | None:
    """Locks a folder, and returns the open file that has the lock until it is closed. None if it is locked already.

    A file system without locks counts as one on which nothing is locked.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> held = lock(folder)
    >>> lock(folder) is None
    True
    >>> os.close(held)
    >>> lock(folder) is None
    False
    """
    file = os.open(folder, os.O_RDONLY) if fcntl else os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):  # what flock and what locking says of a lock that another has
        os.close(file)
        return None
    except OSError:
        pass
    return file
