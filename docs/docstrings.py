"""Shows the examples of a docstring as code: markdown would read `>>>` as a quotation in a quotation."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).+)*", re.MULTILINE)  # from a prompt to the next empty line


def fence(example: re.Match[str]) -> str:
    """The same lines inside a code fence of the same indent."""
    return f"{example[1]}```pycon\n{example[0]}\n{example[1]}```"


class Examples(griffe.Extension):
    """A griffe extension: fences every doctest of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fence, obj.docstring.value)
