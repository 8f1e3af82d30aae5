"""What a kernel says of its arguments: which of their sizes vary between calls, and which of them it writes to."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Parameters:
    """The positional parameters of a kernel. Those of a last parameter `*rest` are all like it.

    dynamic: by the name of a parameter, its dimensions that vary between calls. writes: the names of those into which the results
    of a call are copied, in order.
    """

    def __init__(
        self, definition: Callable[..., Any], dynamic: Mapping[str, tuple[int, ...]], writes: Sequence[str]
    ) -> None:
        parameters = inspect.signature(definition).parameters
        for label, names in (("dynamic", dynamic), ("writes", writes)):
            unknown = set(names) - set(parameters)
            if unknown:
                raise ValueError(f"{label} names no argument of kernel {definition.__name__!r}: {sorted(unknown)}")
        positional = [p for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        self._dynamic = tuple(dynamic.get(p.name, ()) for p in positional)
        self._written = tuple(p.name in writes for p in positional)
        self._variadic = bool(positional) and positional[-1].kind is inspect.Parameter.VAR_POSITIONAL
        self.any_written = any(self._written)

    def _for_each(self, values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
        """One value for each of `count` arguments, from one for each parameter: `*rest` may stand for several."""
        return values[:-1] + values[-1:] * (count - len(values) + 1) if self._variadic else values[:count]

    def with_dynamic(self, args: Sequence[Any]) -> list[tuple[Tensor | None, tuple[int, ...]]]:
        """Each argument with those of its dimensions that vary."""
        return list(zip(args, self._for_each(self._dynamic, len(args)), strict=True))

    def written(self, args: Sequence[Any]) -> list[Any]:
        """Those of the arguments that a call writes to, in their order."""
        return list(itertools.compress(args, self._for_each(self._written, len(args))))

    def copied(self, args: Sequence[Any], results: R) -> R:
        """What a call returns: the results, or the arguments that now hold them."""
        if not self.any_written:
            return results
        targets = self.written(args)
        torch._foreach_copy_(targets, list(results))  # type: ignore[call-overload]
        return tuple(targets)  # type: ignore[return-value]

    def apart(self, args: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The arguments, with a copy in the place of each that shares memory with one that is written to, as a gradient may lie
        in its parameter's: Inductor fails to compile for these."""
        memory = {t.untyped_storage().data_ptr() for t in self.written(args)}
        places = self._for_each(self._written, len(args))
        return [
            t if t is None or written or t.untyped_storage().data_ptr() not in memory else t.clone()
            for t, written in zip(args, places, strict=True)
        ]

    def pieces(self, args: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
        """The arguments of several calls, which together do what this one does. Each has at most `most` rows of those arguments
        whose first dimension is dynamic, and the others whole."""
        by_rows = [t is not None and 0 in dims for t, dims in self.with_dynamic(args)]
        rows = next(len(t) for t, sliced in zip(args, by_rows, strict=True) if sliced)
        count = max(1, -(-rows // most))
        for i in range(count):
            part = slice(rows * i // count, rows * (i + 1) // count)
            yield args if count == 1 else [t[part] if s else t for t, s in zip(args, by_rows, strict=True)]
