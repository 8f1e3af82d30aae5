"""Kernels with one configuration, where Inductor would guess one for a kernel of another kind, or compile and time many.

A configuration is how many rows and columns a program takes at a time, and how many warps it has. It changes no bit of a kernel
that is exact. What was timed: docs/content/reading.md, table "choices of the door".
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

_OPTION = "inductor_choices_class"


def configured(rows: int, warps: int, columns: int | None = None, width: int | None = None) -> dict[str, Any]:
    """Options for Inductor under which its reductions have this configuration; none if this torch cannot be told.

    columns: at a time, in a loop; None: all. width: the number of columns for which it was chosen; for others Inductor chooses.
    """
    try:
        from torch._inductor import config
        from torch._inductor.choices import InductorChoices
        from torch._inductor.codegen.triton import FixedTritonConfig  # noqa: F401
    except ImportError:
        return {}
    if not hasattr(config, _OPTION) or not hasattr(InductorChoices, "triton_kernel_kwargs"):
        return {}
    return {_OPTION: functools.partial(_choices, rows, warps, columns, width)}


def is_configured(options: Mapping[str, Any]) -> bool:
    """Whether these options have a configuration for any number of columns, so that Inductor times none."""
    choices = options.get(_OPTION)
    return choices is not None and choices.args[-1] is None


@contextlib.contextmanager
def in_effect(options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, Inductor compiles with the configuration among these options: by itself it looks for one once in a thread."""
    choices = options.get(_OPTION)
    if choices is None:
        yield
        return
    from torch._inductor.virtualized import V

    with V.set_choices_handler(choices()):
        yield


def _choices(rows: int, warps: int, columns: int | None, width: int | None) -> Any:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen.triton import FixedTritonConfig

    class Configuration(FixedTritonConfig):
        def __getitem__(self, item: Any) -> Any:
            # Of a reduction without a loop Inductor asks how many columns there are at most.
            return self.config.get(item, 2**20)

    class Choices(InductorChoices):
        def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: Any) -> Any:
            if not features.is_reduction() or width not in (None, features.reduction_numel):
                return kernel_kwargs
            blocks = {"XBLOCK": rows} if columns is None else {"XBLOCK": rows, "R0_BLOCK": columns}
            return {**kernel_kwargs, "fixed_config": Configuration({**blocks, "num_warps": warps, "num_stages": 1})}

        def uuid(self) -> str:
            return f"bnbref {rows} {warps} {columns} {width}"

    return Choices()
