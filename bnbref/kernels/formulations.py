"""What is compiled in place of a definition: a function attached to the kernel's name by `@formulation`."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from bnbref.context import constant_of_graphs

P = ParamSpec("P")
R = TypeVar("R")
Options = Mapping[str, Any] | Callable[..., Mapping[str, Any]]

_FILES = ("counting", "decoding", "encoding", "multiplying", "steps")
"""The files of this folder that have formulations."""

ATTACHED: dict[str, "Formulation"] = {}
"""The formulations by the name of their kernel, once `load` has run."""


class Formulation:
    """What is compiled in place of a definition, with the options of its compilation.

    body: a function of the kernel's tensors, of `tables` where the formulation has them, and of those constants of the kernel
    that it names as keywords. Two calls that differ only in constants that it does not name share a compiled variant.
    """

    def __init__(
        self, body: Callable[..., Any], tables: Callable[..., tuple[Tensor, ...]] | None = None, cpu: Options | None = None,
        gpu: Options | None = None, piece: int | None = None,
    ) -> None:  # fmt: skip
        self.body, self.tables, self.piece = body, tables, piece
        self._options = cpu or {}, gpu or {}
        parameters = inspect.signature(body).parameters.values()
        self.constants = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "tables")

    def __call__(self, tensors: Sequence[Any], tables: tuple[Tensor, ...], constants: Mapping[str, Any]) -> Any:
        own = {name: constants[name] for name in self.constants if name in constants}
        return self.body(*tensors, **own) if self.tables is None else self.body(*tensors, tables=tables, **own)

    def options(self, device_type: str, tensors: Sequence[Any], constants: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options for Inductor that this formulation has of its own for a device type."""
        own = self._options[device_type != "cpu"]
        return own(*tensors, **constants) if callable(own) else own


@constant_of_graphs
def load() -> None:
    """Imports every file that attaches a formulation. The door does so when it first needs one."""
    for name in _FILES:
        importlib.import_module(f"bnbref.kernels.{name}")


def formulation(
    name: str, *, tables: Callable[..., tuple[Tensor, ...]] | None = None, cpu: Options | None = None,
    gpu: Options | None = None, piece: int | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:  # fmt: skip
    """Decorator: the function is compiled in place of the definition of the kernel called `name`, whose bits it has.

    tables: a function of the tensors and the constants of a call. It returns the tensors that the decorated function needs beside
    them, which receives them as `tables`. They are kept as long as the call of that layout is.
    cpu: Inductor's options on CPUs, or a function of the tensors and the constants that returns them. Of the tensors it may ask
    what a variant is compiled for: dtypes, and sizes that do not vary.
    gpu: the same on GPUs.
    piece: how many rows a CPU computes at a time of a kernel that writes into its arguments. Inductor fuses a reduction with
    what follows it only if nothing is written in place. So the results are computed apart and copied, few enough to stay in the
    cache.
    """

    def attach(body: Callable[P, R]) -> Callable[P, R]:
        ATTACHED[name] = Formulation(body, tables, cpu, gpu, piece)
        return body

    return attach
