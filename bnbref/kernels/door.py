"""The door: what a call of a kernel goes through, and the registry of kernels. `variants` compiles.

A kernel is a pure function of tensors. `@fused` registers it; calling it runs it compiled by Inductor, with options under
which the compiled bits are the eager bits. What `@fused` decorates is the *definition*, which a reader checks against the
paper. Where another form is faster, a file of the workshop attaches it by the kernel's name: `@formulation("name")`.

    call                                      what runs
    ----------------------------------------  -------------------------------------------------
    normally                                  the formulation, compiled, one kernel per variant
    the first time, on an NVIDIA GPU          what another process has compiled of it (`kept_launches`, `ahead`)
    inside somebody's torch.compile / export  the formulation, inlined into their graph
    `bnbref.eager()` or BNBREF_COMPILE=0      the definition
    meta and fake tensors, dispatch modes,    the definition, so that the mode sees plain operations
    `torch.func`, `torch.jit.trace`
    no C++ compiler, no triton, torch.compile the definition, after one warning
    switched off (TORCH_COMPILE_DISABLE=1),
    python -O
    inside `once()`, on a GPU, the first time the definition, some rows at a time

Whatever runs, autocast is off in it.

A kernel that updates tensors is a pure function all the same: what it returns is copied into the arguments that
`writes` names, by the compiled code itself where Inductor can do that in one pass.
"""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from bnbref.context import is_lazy, recorded_outside, traced, without_autocast
from bnbref.kernels import ahead, formulations
from bnbref.kernels.compiler import compiles, give_up, missing_compiler, remove_fragment, why_failed
from bnbref.kernels.direct import call_layout
from bnbref.kernels.formulations import Formulation
from bnbref.kernels.kept_launches import place_of
from bnbref.kernels.modes import compile_enabled, inside_once
from bnbref.kernels.parameters import Parameters
from bnbref.kernels.variants import Variants, import_compiler

P = ParamSpec("P")
R = TypeVar("R")

REGISTRY: dict[str, "Kernel[..., Any]"] = {}
"""Every kernel of the package by name: what the proofs walk."""

# Layouts of arguments whose calls a kernel keeps; when there are more it forgets them all and begins anew.
_MOST_CALLS = 1024

# Elements that a definition takes at a time inside `once()`: its intermediate tensors are some ten times as large.
_PIECE = 2**20

# One at a time: two threads cannot import torch's compiler at once, nor both exchange its `__call__` and put it back.
_first_calls = threading.RLock()


def _after_fork() -> None:
    """In a process that was forked while another thread made a first call. This thread is gone, and would hold the lock, and
    those of torch's compiler, for ever: so this process has a lock of its own, and compiles nothing.

    The fork must not wait for the thread. The thread may need a lock that somebody else's handler of forks holds by then: that of
    `filelock`, by which Inductor keeps its folder, or of a pool of threads.
    """
    global _first_calls
    if _first_calls.acquire(blocking=False):
        _first_calls.release()
    else:
        _first_calls = threading.RLock()
        give_up("this process was forked while another thread of its parent compiled a kernel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _warn_once(device_type: str, reason: str) -> None:
    warnings.warn(
        f"bnbref runs uncompiled on {device_type}: {reason}. The bits are the same, the speed is not.", stacklevel=4
    )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """For what torch warns of while it compiles, which is no user's concern. Where warnings are errors, as in many a test suite,
    it would end in one of Dynamo's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _not_imported(device_type: str) -> str | None:
    """Imports torch's compiler. Returns why that cannot be done; None if it is done.

    A handler of signals may raise meanwhile, of alarms often a TimeoutError. That is the caller's, and not caught.
    """
    try:
        with _without_warnings():
            import_compiler()
    except (ImportError, UnicodeDecodeError) as error:
        return why_failed(device_type, error)
    return None


def _sealed(value: Any) -> Any:
    """The same value, or tuple of values; tensors of 16-bit floats pass through a bit cast, which keeps their rounding.

    By default Inductor computes x.to(bfloat16).float() without the rounding. Where a kernel is part of somebody's graph, it would
    leave out the rounding of what enters the kernel, or of what leaves it, and the bits would not be those of an eager call.
    """
    if isinstance(value, tuple):
        return tuple(map(_sealed, value))
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return (value.view(torch.int16) | 0).view(value.dtype)  # without the operation the two views cancel
    return value


class Kernel(Generic[P, R]):
    """A registered function: positional arguments are tensors (or None), keyword arguments compile-time constants.

    A variant is compiled for each combination of device type, dtypes, static sizes and constants. It serves all sizes above 1 of
    the dimensions in `dynamic`. The compiled code that a call has run is kept under the layout of its arguments, so that the next
    call with that layout finds it by one look-up.

    definition: what `@fused` decorated. body: the formulation, not compiled. variants: the compiled formulations.
    """

    def __init__(
        self, definition: Callable[P, R], dynamic: Mapping[str, tuple[int, ...]], exact: bool = True,
        writes: Sequence[str] = (), by_rows: bool | Callable[..., bool] = False,
    ) -> None:  # fmt: skip
        self.name = definition.__name__
        self.definition = definition
        self.parameters = Parameters(definition, dynamic, writes)
        self._plain = Formulation(definition)
        self.exact = exact
        self._by_rows = by_rows
        self.variants = Variants(self.name, self.parameters)
        self._calls: dict[Any, Callable[[Sequence[Any]], R]] = {}
        self._ahead: set[Any] = set()
        functools.update_wrapper(self, definition)

    @property
    def formulation(self) -> Formulation:
        """What is compiled: what the workshop attached to the kernel's name, else the definition."""
        formulations.load()
        return formulations.ATTACHED.get(self.name, self._plain)

    def tables(self, *args: Any, **constants: Any) -> tuple[Tensor, ...]:
        """The tensors that the formulation needs beside the arguments of this call; none if it needs none."""
        tables = self.formulation.tables
        return () if tables is None else tables(*args, **constants)

    def body(self, *args: P.args, **constants: P.kwargs) -> R:
        """The formulation, not compiled."""
        result: R = self.formulation(args, self.tables(*args, **constants), constants)
        return result

    # ---- a call -----------------------------------------------------------------------------------------------------

    def __call__(self, *args: P.args, **constants: P.kwargs) -> R:
        if traced():
            return self._inlined(args, constants)
        if not compile_enabled() or recorded_outside():
            return self._uncompiled(args, constants)
        key = call_layout(args, constants)
        call = self._calls.get(key)
        return self._first_call(key, args, constants) if call is None else call(args)

    def ready(self, args: Sequence[Any], constants: Mapping[str, Any]) -> Callable[[Sequence[Any]], R] | None:
        """The compiled code that calls of this layout run: a function of the tensors, whose layout it does not look at.

        None before the first call, and where nothing is compiled.
        """
        return self._calls.get(call_layout(args, constants))

    def ahead(self, args: Sequence[Any], constants: Mapping[str, Any]) -> None:
        """Has the first call of this layout compiled by another process while this one is busy, where `kernels.ahead` can. It is
        asked once for each layout."""
        key = call_layout(args, constants)
        if args[0].device.type != "cuda" or not compile_enabled() or key in self._calls or key in self._ahead:
            return
        if len(self._ahead) >= _MOST_CALLS:
            self._ahead.clear()
        self._ahead.add(key)
        place = self._place(args, constants) if missing_compiler("cuda") is None else None
        if place is not None:
            ahead.begin(self.name, args, constants, place)

    def _inlined(self, args: Sequence[Any], constants: Mapping[str, Any]) -> R:
        # A formulation may ask Inductor what it can do, which without a compiler it cannot say.
        body = self.body if compiles(args[0].device.type) else self.definition
        with torch.no_grad(), without_autocast(args[0]):
            results: R = _sealed(body(*map(_sealed, args), **constants))
            return self.parameters.copied(args, results)

    def _uncompiled(self, args: Sequence[Any], constants: Mapping[str, Any]) -> R:
        with torch.no_grad(), without_autocast(args[0]):
            return self.parameters.copied(args, self.definition(*args, **constants))

    def _definition_in_pieces(self, args: Sequence[Any], constants: Mapping[str, Any]) -> R:
        """The definition; where it may, for so many rows at a time that the memory of its intermediate tensors does not count."""
        by_rows = self._by_rows(**constants) if callable(self._by_rows) else self._by_rows
        widths = [
            t.numel() // max(len(t), 1) for t, dims in self.parameters.with_dynamic(args) if t is not None and dims
        ]
        width = max(widths, default=0)
        if not by_rows or width == 0:
            return self._uncompiled(args, constants)
        pieces = self.parameters.pieces(args, max(1, _PIECE // width))
        parts = [self._uncompiled(piece, constants) for piece in pieces]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)  # type: ignore[arg-type,return-value]
        return tuple(map(torch.cat, zip(*parts, strict=True)))  # type: ignore[return-value]

    # ---- the first call of a layout ---------------------------------------------------------------------------------

    def _first_call(self, key: Any, args: Sequence[Any], constants: Mapping[str, Any]) -> R:
        device_type = next(t.device.type for t in args if t is not None)
        # Inductor would read the memory of a negative view as it is, and of zeros without memory from nowhere.
        plain = all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and not is_lazy(t)) for t in args)
        if device_type == "meta" or not plain:
            return self._uncompiled(args, constants)
        if device_type != "cpu" and inside_once():
            return self._definition_in_pieces(args, constants)
        reason = missing_compiler(device_type)
        if reason is not None:
            _warn_once(device_type, reason)
            return self._uncompiled(args, constants)
        call: Callable[[Sequence[Any]], R] | None
        with _first_calls, torch.no_grad(), without_autocast(args[0]):
            piece = self.formulation.piece if device_type == "cpu" else None
            kept = self._kept(args, constants) if device_type == "cuda" else None
            if kept is not None:
                result, call = kept(args), kept
            elif piece is None:
                result, call = self._through_dynamo(device_type, args, constants, self.parameters.any_written)
            else:
                call = functools.partial(self._in_pieces, piece, constants)
                result = call(args)
        if call is not None:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            self._calls[key] = call
        return result

    def _kept(self, args: Sequence[Any], constants: Mapping[str, Any]) -> Callable[[Sequence[Any]], R] | None:
        """The calls of this layout as an earlier process has left them on disk; None if none has."""
        place = self._place(args, constants)
        if place is None or next(t.device for t in args if t is not None).index != torch.cuda.current_device():
            return None
        ahead.wait(place)

        compiled: Callable[[Sequence[Any]], R] | None = None

        def otherwise(args: Sequence[Any]) -> R:
            nonlocal compiled
            if compiled is not None:  # what calls this is kept by others as well, as `ready` returned it
                return compiled(args)
            with _first_calls, torch.no_grad(), without_autocast(args[0]):
                result, compiled = self._through_dynamo("cuda", args, constants, self.parameters.any_written)
            return result

        return self.variants.kept(args, self.tables(*args, **constants), self.parameters.any_written, place, otherwise)

    def _place(self, args: Sequence[Any], constants: Mapping[str, Any]) -> Path | None:
        """Where the launch of calls of this layout is kept on disk; None if none is."""
        functions = self.definition, self.formulation.body, self.formulation.tables
        return place_of([f for f in functions if f is not None], args, constants)

    def _in_pieces(self, most: int, constants: Mapping[str, Any], args: Sequence[Any]) -> R:
        """A call in pieces of at most `most` rows: every argument whose first dimension is dynamic is cut along it."""
        for piece in self.parameters.pieces(args, most):
            key = ("piece", *call_layout(piece, constants))
            call = self._calls.get(key)
            with torch.no_grad():
                if call is not None:
                    results = call(piece)
                else:
                    with _first_calls:
                        results, call = self._through_dynamo("cpu", piece, constants, writes=False)
                    if call is not None:
                        self._calls[key] = call
                self.parameters.copied(piece, results)
        return tuple(self.parameters.written(args))  # type: ignore[return-value]

    def _through_dynamo(
        self, device_type: str, args: Sequence[Any], constants: Mapping[str, Any], writes: bool, again: bool = True
    ) -> tuple[R, Callable[[Sequence[Any]], R] | None]:
        """`Variants.call`. Where the compiler does not work, after all, the call is uncompiled.

        again: whether to try once more, should a half-written file be in the way.
        """
        reason = _not_imported(device_type)
        if reason is None:
            try:
                with _without_warnings():
                    tables = self.tables(*args, **constants)
                    place = self._place(args, constants) if device_type == "cuda" else None
                    return self.variants.call(device_type, self.formulation, args, tables, constants, writes, place)
            except (ImportError, OSError, RuntimeError, UnicodeDecodeError) as error:
                if again and remove_fragment(error):
                    return self._through_dynamo(device_type, args, constants, writes, again=False)
                reason = why_failed(device_type, error)
                if reason is None:
                    raise
        _warn_once(device_type, reason)
        return self._uncompiled(args, constants), None


def fused(
    *, dynamic: Mapping[str, tuple[int, ...]], exact: bool = True, writes: Sequence[str] = (),
    by_rows: bool | Callable[..., bool] = False,
) -> Callable[[Callable[P, R]], Kernel[P, R]]:  # fmt: skip
    """Register a pure function as a kernel; calling it runs it compiled.

    dynamic: by the name of an argument, its dimensions that vary between calls. exact: whether compiled and eager calls give the
    same bits; False is for kernels that add up floats, whose docstrings then state a bound. writes: names of the arguments into
    which the results are copied, in order. by_rows: whether a row of the results comes of that row of the arguments alone, or a
    function of the constants that says so; some rows can then be computed at a time. Raises ValueError for a name that no
    argument has, and for a second kernel of a name.

    >>> @fused(dynamic={"x": (0,)})
    ... def twice(x: Tensor) -> Tensor:
    ...     return x + x
    >>> twice(torch.ones(3))
    tensor([2., 2., 2.])
    >>> @fused(dynamic={"x": (0,)}, writes=("x",))
    ... def double(x: Tensor) -> tuple[Tensor]:
    ...     return (x + x,)
    >>> y = torch.ones(3)
    >>> double(y)[0] is y, y
    (True, tensor([2., 2., 2.]))
    >>> del REGISTRY["twice"], REGISTRY["double"]
    """

    def register(definition: Callable[P, R]) -> Kernel[P, R]:
        kernel = Kernel(definition, dynamic, exact, writes, by_rows)
        if kernel.name in REGISTRY:
            raise ValueError(f"a kernel named {kernel.name!r} is registered already")
        REGISTRY[kernel.name] = kernel
        return kernel

    return register
