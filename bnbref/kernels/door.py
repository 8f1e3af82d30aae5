"""The one door to torch.compile, and the registry of kernels.

A kernel is a pure function of tensors. `@fused` registers it; calling it runs it compiled by Inductor, with options under
which the compiled bits are the eager bits. What `@fused` decorates is the *definition*, which a reader checks against the
paper. Where another form is faster, a file of the workshop attaches it by the kernel's name: `@formulation("name")`.

    call                                      what runs
    ----------------------------------------  -------------------------------------------------
    normally                                  the formulation, compiled, one kernel per variant
    inside somebody's torch.compile / export  the formulation, inlined into their graph
    `bnbref.eager()` or BNBREF_COMPILE=0      the definition
    meta and fake tensors, dispatch modes,    the definition, so that the mode sees plain operations
    `torch.func`, `torch.jit.trace`
    no C++ compiler, no triton                the definition, after one warning
    inside `once()`, on a GPU, the first time the definition, some rows at a time
    TORCH_COMPILE_DISABLE=1                   the same

Whatever runs, autocast is off in it.

A kernel that updates tensors is a pure function all the same: what it returns is copied into the arguments that
`writes` names, by the compiled code itself where Inductor can do that in one pass.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bnbref.context import exporting, jit_tracing, transforming, without_autocast
from bnbref.kernels.compiler import compiles, missing_compiler, options_for, why_failed
from bnbref.kernels.configured import in_effect
from bnbref.kernels.launch import Call, launch_alone, launches, recorded

P = ParamSpec("P")
R = TypeVar("R")
Options = Mapping[str, Any] | Callable[..., Mapping[str, Any]]

REGISTRY: dict[str, "Kernel[..., Any]"] = {}
"""Every kernel of the package by name: what the proofs walk."""

# On a GPU, Inductor chooses the block sizes of a kernel by timing its first call. A tensor of a few thousand elements must not
# choose them for one of millions, so each variant exists twice there: for tensors below this many elements, and for the others
# (docs: How to read the code, table "choices of the door").
_LARGE = 2**22

# Layouts of arguments whose calls a kernel keeps; when there are more it forgets them all and begins anew.
_MOST_CALLS = 1024

_NO_LIMIT = 2**31

# Inductor decides by the size that it expects of a dynamic dimension how loops are fused and work is split, and keeps that code
# on disk for all sizes. On a CPU it is told this size, so that a small first tensor does not decide for large ones (table
# "choices of the door"). On a GPU it is not: there Inductor guards what it has decided by size, and a guard that holds for
# this size but not for the actual one is an error.
_TYPICAL_SIZE = 2**16

# How many `eager()` are entered. BNBREF_COMPILE=0 is one that is never left. It is read once, because looking a variable up that
# is not set costs more than the look-up of a kernel.
_eager_depth = 1 if os.environ.get("BNBREF_COMPILE") == "0" else 0

# Elements that a definition takes at a time inside `once()`: its intermediate tensors are some ten times as large.
_PIECE = 2**20

_here = threading.local()
"""`once`: how many `once()` this thread has entered."""

# One at a time: two threads cannot import torch's compiler at once, nor both exchange its `__call__` and put it back.
_first_calls = threading.RLock()


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run every kernel uncompiled inside the block, in all threads of the process.

    >>> import bnbref
    >>> with bnbref.eager():
    ...     packed, state = bnbref.functional.quantize_4bit(torch.ones(64))
    """
    global _eager_depth
    _eager_depth += 1
    try:
        yield
    finally:
        _eager_depth -= 1


@contextlib.contextmanager
def once() -> Iterator[None]:
    """For what is computed once, as a weight is quantized when it is loaded: inside, this thread compiles nothing for GPUs.

    A GPU runs a definition in milliseconds, and to compile it takes seconds. What is compiled already is used.
    """
    _here.once = getattr(_here, "once", 0) + 1
    try:
        yield
    finally:
        _here.once -= 1


def compile_enabled() -> bool:
    """Whether kernels are to be compiled: not inside `eager()`, and BNBREF_COMPILE was not 0 when bnbref was imported."""
    return _eager_depth == 0


def tracing() -> bool:
    """Whether somebody records operations (a trace, a dispatch mode). A tensor that is made now is then part of the recording,
    and must not be kept in a cache."""
    return traced() or _recorded_outside()


def traced() -> bool:
    """Whether Dynamo or an export traces. (`is_compiling()` is also true for other code that runs meanwhile, in any thread.)"""
    return torch.compiler.is_dynamo_compiling() or exporting()


def _recorded_outside() -> bool:
    return _get_current_dispatch_mode() is not None or jit_tracing() or transforming()


@functools.cache
def _warn_once(device_type: str, reason: str) -> None:
    warnings.warn(
        f"bnbref runs uncompiled on {device_type}: {reason}. The bits are the same, the speed is not.", stacklevel=4
    )


# ---- formulations ---------------------------------------------------------------------------------------------------


class Formulation:
    """What is compiled in place of a definition, with the options of its compilation.

    body: a function of the kernel's tensors, of `tables` where the formulation has them, and of those constants of the kernel
    that it names as keywords. Two calls that differ only in constants that it does not name share a compiled variant.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        tables: Callable[..., tuple[Tensor, ...]] | None = None,
        cpu: Options | None = None,
        gpu: Options | None = None,
        piece: int | None = None,
    ) -> None:
        self.body, self.tables, self.piece = body, tables, piece
        self._options = cpu or {}, gpu or {}
        parameters = inspect.signature(body).parameters.values()
        self.constants = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "tables")

    def __call__(self, tensors: Sequence[Any], tables: tuple[Tensor, ...], constants: Mapping[str, Any]) -> Any:
        own = {name: constants[name] for name in self.constants if name in constants}
        return self.body(*tensors, **own) if self.tables is None else self.body(*tensors, tables=tables, **own)

    def options(self, device_type: str, dtypes: Sequence[Any], constants: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options for Inductor that this formulation has of its own for a device type."""
        own = self._options[device_type != "cpu"]
        return own(*dtypes, **constants) if callable(own) else own


_FORMULATIONS: dict[str, Formulation] = {}


def _load_formulations() -> None:
    importlib.import_module("bnbref.kernels.formulations")


# As torch.compiler.assume_constant_result does, without importing torch._dynamo: an import is nothing to be traced.
_load_formulations._dynamo_marked_constant = True  # type: ignore[attr-defined]


def formulation(
    name: str,
    *,
    tables: Callable[..., tuple[Tensor, ...]] | None = None,
    cpu: Options | None = None,
    gpu: Options | None = None,
    piece: int | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: the function is compiled in place of the definition of the kernel called `name`, whose bits it has.

    tables: a function of the tensors and the constants of a call. It returns the tensors that the decorated function needs beside
    them, which receives them as `tables`. They are kept as long as the call of that layout is.
    cpu: Inductor's options on CPUs, or a function that returns them, given the dtypes of the tensors and the constants.
    gpu: the same on GPUs.
    piece: how many rows a CPU computes at a time of a kernel that writes into its arguments. Inductor fuses a reduction with
    what follows it only if nothing is written in place. So the results are computed apart and copied, few enough to stay in the
    cache.
    """

    def attach(body: Callable[P, R]) -> Callable[P, R]:
        _FORMULATIONS[name] = Formulation(body, tables, cpu, gpu, piece)
        return body

    return attach


# ---- kernels --------------------------------------------------------------------------------------------------------


def _signature(tensor: Tensor | None, dynamic: tuple[int, ...]) -> Any:
    """What a variant is specialised on: the dtype, the sizes that are not dynamic, and of dynamic sizes whether they are 0 or 1,
    which Dynamo always specialises."""
    if tensor is None:
        return None
    return tensor.dtype, tuple(min(n, 2) if dim in dynamic else n for dim, n in enumerate(tensor.shape))


def _layout(args: Sequence[Any], constants: Mapping[str, Any]) -> Any:
    """All of a call that Dynamo and Inductor look at. Calls with equal layouts run the same compiled code."""
    tensors = [None if t is None else (type(t), t.device, t.dtype, t.shape, t.stride(), t.is_neg()) for t in args]
    kinds = map(type, constants.values())  # 1 is equal to 1.0 and to True
    return torch.get_num_threads(), *tensors, *constants.items(), *kinds


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
        self,
        definition: Callable[P, R],
        dynamic: Mapping[str, tuple[int, ...]],
        exact: bool = True,
        writes: Sequence[str] = (),
        by_rows: bool | Callable[..., bool] = False,
    ) -> None:
        self.name = definition.__name__
        self.definition = definition
        self._plain = Formulation(definition)
        self.exact = exact
        self._by_rows = by_rows
        self.variants: dict[Any, Callable[..., R]] = {}
        self._calls: dict[Any, Callable[[Sequence[Any]], R]] = {}
        parameters = inspect.signature(definition).parameters
        for label, names in (("dynamic", dynamic), ("writes", writes)):
            unknown = set(names) - set(parameters)
            if unknown:
                raise ValueError(f"{label} names no argument of kernel {self.name!r}: {sorted(unknown)}")
        positional = [p for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        self._dynamic = tuple(dynamic.get(p.name, ()) for p in positional)
        self._written = tuple(p.name in writes for p in positional)
        self._variadic = bool(positional) and positional[-1].kind is inspect.Parameter.VAR_POSITIONAL
        functools.update_wrapper(self, definition)

    @property
    def formulation(self) -> Formulation:
        """What is compiled: what the workshop attached to the kernel's name, else the definition."""
        _load_formulations()
        return _FORMULATIONS.get(self.name, self._plain)

    def tables(self, *args: Any, **constants: Any) -> tuple[Tensor, ...]:
        """The tensors that the formulation needs beside the arguments of this call; none if it needs none."""
        tables = self.formulation.tables
        return () if tables is None else tables(*args, **constants)

    def body(self, *args: P.args, **constants: P.kwargs) -> R:
        """The formulation, not compiled."""
        result: R = self.formulation(args, self.tables(*args, **constants), constants)
        return result

    def written(self, args: Sequence[Any]) -> list[Any]:
        """Those of the arguments that a call writes to, in their order."""
        return list(itertools.compress(args, self._for_each(self._written, len(args))))

    def _for_each(self, values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
        """One value for each of `count` arguments, from one for each parameter; that of a last parameter `*rest` is repeated."""
        return values[:-1] + values[-1:] * (count - len(values) + 1) if self._variadic else values[:count]

    # ---- a call -----------------------------------------------------------------------------------------------------

    def __call__(self, *args: P.args, **constants: P.kwargs) -> R:
        if traced():
            return self._inlined(args, constants)
        if not compile_enabled() or _recorded_outside():
            return self._uncompiled(args, constants)
        key = _layout(args, constants)
        call = self._calls.get(key)
        return self._first_call(key, args, constants) if call is None else call(args)

    def ready(self, args: Sequence[Any], constants: Mapping[str, Any]) -> Callable[[Sequence[Any]], R] | None:
        """The compiled code that calls of this layout run: a function of the tensors, whose layout it does not look at.

        None before the first call, and where nothing is compiled.
        """
        return self._calls.get(_layout(args, constants))

    def _inlined(self, args: Sequence[Any], constants: Mapping[str, Any]) -> R:
        # A formulation may ask Inductor what it can do, which without a compiler it cannot say.
        body = self.body if compiles(args[0].device.type) else self.definition
        with torch.no_grad(), without_autocast(args[0]):
            return self._copied(args, _sealed(body(*map(_sealed, args), **constants)))

    def _uncompiled(self, args: Sequence[Any], constants: Mapping[str, Any]) -> R:
        with torch.no_grad(), without_autocast(args[0]):
            return self._copied(args, self.definition(*args, **constants))

    def _copied(self, args: Sequence[Any], results: R) -> R:
        """What a call returns: the results, or the arguments that now hold them."""
        if not any(self._written):
            return results
        targets = self.written(args)
        torch._foreach_copy_(targets, list(results))  # type: ignore[call-overload]
        return tuple(targets)  # type: ignore[return-value]

    def _first_call(self, key: Any, args: Sequence[Any], constants: Mapping[str, Any]) -> R:
        device_type = next(t.device.type for t in args if t is not None)
        # Inductor would read the memory of a negative view as it is.
        plain = all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()) for t in args)
        if device_type == "meta" or not plain:
            return self._uncompiled(args, constants)
        if device_type != "cpu" and getattr(_here, "once", 0):
            return self._definition_in_pieces(args, constants)
        reason = missing_compiler(device_type)
        if reason is not None:
            _warn_once(device_type, reason)
            return self._uncompiled(args, constants)
        call: Callable[[Sequence[Any]], R] | None
        with _first_calls, torch.no_grad(), without_autocast(args[0]):
            piece = self.formulation.piece if device_type == "cpu" else None
            if piece is None:
                result, call = self._through_dynamo(device_type, args, constants, writes=any(self._written))
            else:
                call = functools.partial(self._in_pieces, piece, constants)
                result = call(args)
        if call is not None:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            self._calls[key] = call
        return result

    def _pieces(self, args: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
        """The arguments, again and again, with at most `most` of their rows: of those whose first dimension is dynamic."""
        by_rows = [t is not None and 0 in dims for t, dims in self._with_dynamic(args)]
        rows = next(len(t) for t, sliced in zip(args, by_rows, strict=True) if sliced)
        count = max(1, -(-rows // most))
        for i in range(count):
            part = slice(rows * i // count, rows * (i + 1) // count)
            yield args if count == 1 else [t[part] if s else t for t, s in zip(args, by_rows, strict=True)]

    def _definition_in_pieces(self, args: Sequence[Any], constants: Mapping[str, Any]) -> R:
        """The definition; where it may, for so many rows at a time that the memory of its intermediate tensors does not count."""
        by_rows = self._by_rows(**constants) if callable(self._by_rows) else self._by_rows
        widths = [t.numel() // max(len(t), 1) for t, dims in self._with_dynamic(args) if t is not None and dims]
        width = max(widths, default=0)
        if not by_rows or width == 0:
            return self._uncompiled(args, constants)
        parts = [self._uncompiled(piece, constants) for piece in self._pieces(args, max(1, _PIECE // width))]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)  # type: ignore[arg-type,return-value]
        return tuple(map(torch.cat, zip(*parts, strict=True)))  # type: ignore[return-value]

    def _in_pieces(self, most: int, constants: Mapping[str, Any], args: Sequence[Any]) -> R:
        """A call in pieces of at most `most` rows: every argument whose first dimension is dynamic is cut along it."""
        for piece in self._pieces(args, most):
            key = ("piece", *_layout(piece, constants))
            call = self._calls.get(key)
            with torch.no_grad():
                if call is not None:
                    results = call(piece)
                else:
                    with _first_calls:
                        results, call = self._through_dynamo("cpu", piece, constants, writes=False)
                    if call is not None:
                        self._calls[key] = call
                self._copied(piece, results)
        return tuple(self.written(args))  # type: ignore[return-value]

    # ---- the first call of a layout ---------------------------------------------------------------------------------

    def _with_dynamic(self, tensors: Sequence[Any]) -> list[tuple[Tensor | None, tuple[int, ...]]]:
        return list(zip(tensors, self._for_each(self._dynamic, len(tensors)), strict=True))

    def _through_dynamo(
        self, device_type: str, args: Sequence[Any], constants: Mapping[str, Any], writes: bool
    ) -> tuple[R, Callable[[Sequence[Any]], R] | None]:
        """A call by way of Dynamo, which finds or compiles the code for these sizes.

        Returns the result, and the function that makes the next call of this layout without Dynamo, or None if there can be none.
        Where the compiler does not work, after all, the call is uncompiled.
        """
        try:
            with warnings.catch_warnings():
                # What torch warns of while it compiles is no user's concern, and where warnings are errors, as in many a test
                # suite, it would end in one of Dynamo's.
                warnings.simplefilter("ignore")
                return self._compiled_call(device_type, args, constants, writes)
        except (OSError, RuntimeError) as error:
            reason = why_failed(device_type, error)
            if reason is None:
                raise
        _warn_once(device_type, reason)
        return self._uncompiled(args, constants), None

    def _apart(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The arguments, those copied that are in the memory of one that is written to, as a gradient may be in its parameter's:
        Inductor fails to compile for these."""
        memory = {t.untyped_storage().data_ptr() for t in self.written(tensors)}
        places = self._for_each(self._written, len(tensors))
        return [
            t if t is None or written or t.untyped_storage().data_ptr() not in memory else t.clone()
            for t, written in zip(tensors, places, strict=True)
        ]

    def _compiled_call(
        self, device_type: str, args: Sequence[Any], constants: Mapping[str, Any], writes: bool
    ) -> tuple[R, Callable[[Sequence[Any]], R] | None]:
        # Before torch._inductor: the order in which another thread may be importing them for its own torch.compile.
        importlib.import_module("torch._dynamo")
        formulation, tables = self.formulation, self.tables(*args, **constants)
        # Aliases of the arguments, because Dynamo marks dynamic sizes on the tensor itself, and the argument is the caller's. The
        # alias of a parameter is a plain tensor too, so that parameters and tensors share a variant.
        tensors = [None if t is None else t.detach() for t in args]
        if writes:
            tensors = self._apart(tensors)
        dynamic = self._with_dynamic(tensors)
        named = {name: constants[name] for name in formulation.constants if name in constants}
        key = (device_type, *(_signature(t, dims) for t, dims in dynamic), *named.items(), *map(type, named.values()))
        key = (*key, *(_signature(t, ()) for t in tables), writes)
        large = device_type != "cpu" and max(t.numel() for t in tensors if t is not None) >= _LARGE
        if large:
            key = (*key, "large")
        variant = self.variants.get(key)
        if variant is None:
            dtypes = [None if t is None else t.dtype for t in tensors]
            options = options_for(device_type, formulation.options(device_type, dtypes, constants), large)
            into = self.written(range(len(dtypes))) if writes else []
            variant = self.variants[key] = _compiled(self.name, formulation, len(tensors), into, constants, options)
        hint = _TYPICAL_SIZE if device_type == "cpu" else None
        for tensor, dims in dynamic:
            if tensor is not None:
                for dim in dims:
                    if tensor.shape[dim] > 1:  # Dynamo always specialises sizes 0 and 1
                        torch._dynamo.mark_dynamic(tensor, dim, hint_override=hint)
        everything = [*tensors, *tables]
        # A device, a number of threads, a default dtype are compiled for anew, as often as somebody asks.
        unlimited = torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT)
        from torch._inductor.output_code import CompiledFxGraph

        alone = launches() if device_type == "cuda" else contextlib.nullcontext(list[Call]())
        with recorded(CompiledFxGraph, "__call__") as ran, alone as launched, unlimited:
            result = variant(*everything)
        targets = self._for_each(self._written, len(args)) if writes else ()
        call = _direct(ran, launched, everything, len(args), result, tuple(i for i, w in enumerate(targets) if w))
        return (tuple(self.written(args)) if writes else result), call  # type: ignore[return-value]


def _compiled(
    name: str,
    formulation: Formulation,
    count: int,
    into: Sequence[int],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Callable[..., Any]:
    """A compiled function of `count` tensors followed by tables, which runs the formulation.

    into: the places of the arguments into which the results are copied; if it is empty, the results are returned.
    """

    def call(*tensors: Any) -> Any:
        results = formulation(tensors[:count], tensors[count:], constants)
        if not into:
            return results
        for place, value in zip(into, results, strict=True):
            tensors[place].copy_(value)
        return ()

    def inductor(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with in_effect(options):
            return compile_fx(graph, example_inputs, config_patches=dict(options))

    # Dynamo counts recompilations per code object and gives up at eight: each variant gets a code object to itself.
    code = call.__code__.replace(co_name=name)
    own = types.FunctionType(code, call.__globals__, name, call.__defaults__, call.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=inductor)


# ---- every later call -----------------------------------------------------------------------------------------------


def _direct(
    ran: Sequence[Call],
    launched: Sequence[Call],
    tensors: Sequence[Any],
    count: int,
    result: Any,
    written: tuple[int, ...],
) -> Callable[[Sequence[Any]], Any] | None:
    """Inductor's code itself, for calls whose tensors have just these sizes, strides, dtypes and devices.

    This skips Dynamo's guards and AOTAutograd's wrapper, which take longer than many a kernel (table "choices of the door").
    It may, because everything that they look at is in the layout. Returns None if the code has an input that is no argument and
    no table of the function, or if a result of the function is no output of the code.
    """
    if len(ran) != 1:
        return None
    graph, (inputs,), _, outputs = ran[0]
    place = {id(t): i for i, t in enumerate(tensors) if t is not None}
    if any(isinstance(value, Tensor) and id(value) not in place for value in inputs):
        return None
    # Of each input of the code: the place of the argument that it was; or, of a table or a size, the value itself.
    template = [(place[id(v)], None) if place.get(id(v), count) < count else (None, v) for v in inputs]
    code = graph.current_callable
    if written:

        def update(args: Sequence[Any]) -> Any:
            code([value if i is None else args[i] for i, value in template])
            targets = tuple(args[i] for i in written)
            torch.autograd.graph.increment_version(targets)
            return targets

        return update
    produced = {id(value): i for i, value in enumerate(outputs)}
    several = isinstance(result, tuple)
    wanted = result if several else (result,)
    if any(id(value) not in produced for value in wanted):
        return None
    order = [produced[id(value)] for value in wanted]

    def call(args: Sequence[Any]) -> Any:
        values = code([value if i is None else args[i] for i, value in template])
        return tuple([values[i] for i in order]) if several else values[order[0]]

    launch = launch_alone(launched, tensors, count, wanted)
    if launch is None:
        return call

    def call_alone(args: Sequence[Any]) -> Any:
        values = launch(args)
        return call(args) if values is None else tuple(values) if several else values[0]

    return call_alone


def fused(
    *,
    dynamic: Mapping[str, tuple[int, ...]],
    exact: bool = True,
    writes: Sequence[str] = (),
    by_rows: bool | Callable[..., bool] = False,
) -> Callable[[Callable[P, R]], Kernel[P, R]]:
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
