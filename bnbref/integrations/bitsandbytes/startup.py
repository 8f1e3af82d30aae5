"""The start-up hook: a file that every Python of this environment reads, so that processes that are spawned have the alias, too.

It does nothing but where BNBREF_AS_BITSANDBYTES is in the environment: see `finder.at_startup`.
"""

import os
import sysconfig
from pathlib import Path

from bnbref.integrations.bitsandbytes import finder
from bnbref.integrations.bitsandbytes.finder import SWITCH


def hook_file() -> Path:
    """The file of the start-up hook, which Python reads when it starts."""
    return Path(sysconfig.get_path("purelib")) / "bnbref_alias.pth"


def enable_hook() -> Path:
    """Write the start-up hook. OSError if that directory cannot be written."""
    source = str(Path(finder.__file__).resolve())
    # One line that begins with "import" is what site.py executes; the file is read only where the variable is set.
    line = (
        f"import os; os.environ.get({SWITCH!r}, '') in ('', '0') or (lambda g: "
        f"(exec(compile(open({source!r}, encoding='utf-8').read(), {source!r}, 'exec'), g), g['at_startup']()))"
        f"({{'__name__': 'bnbref_finder', '__file__': {source!r}}})\n"
    )
    path = hook_file()
    path.write_text(line, encoding="utf-8")
    return path


def disable_hook() -> bool:
    """Removes the start-up hook. Returns whether there was one."""
    path = hook_file()
    was_there = path.exists()
    path.unlink(missing_ok=True)
    return was_there


def status() -> str:
    """Whether the hook is there, whether it is on, and what `import bitsandbytes` means in this process."""
    path = hook_file()
    here = "installed" if path.exists() else "not installed"
    value = os.environ.get(SWITCH)
    means = "bnbref" if finder.current() is not None else "bitsandbytes" if finder.is_installed() else "nothing"
    return f"hook {here} ({path})\n{SWITCH} is {value or 'not set'}\nimport bitsandbytes means {means}"
