"""The one door to torch.compile, and the registry of kernels.

A kernel is a pure function of tensors. `@fused` registers it; calling it runs it compiled by Inductor, with options
under which the compiled bits are the eager bits. Where the fast form is not the obvious one, the obvious one is the
*definition* and runs eagerly, `@kernel.formulation` is what gets compiled, and the tests prove the two equal.

    call                                      what runs
    ----------------------------------------  -------------------------------------------------
    normally                                  the formulation, compiled, one kernel per variant; autocast is off
    inside somebody's torch.compile / export  the formulation, inlined into their graph
    `bnbref.eager()` or BNBREF_COMPILE=0      the definition
    meta and fake tensors, dispatch modes,    the definition, so that the mode sees plain operations
    `torch.func`, `torch.jit.trace`
    no C++ compiler, no triton                the definition, after one warning

A kernel that updates tensors is a pure function all the same: what it returns is copied into the arguments that
`writes` names, by the compiled code itself where Inductor can do that in one pass.
"""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bnbref.context import transforming, without_autocast

P = ParamSpec("P")
R = TypeVar("R")

REGISTRY: dict[str, "Kernel[..., Any]"] = {}
"""Every kernel of the package by name: what the proofs walk."""

# Triton contracts a*b+c into one rounding, divides with 2 ulp and rounds through fused casts unless told not to. On CPU
# contraction is off by default, and kernels here widen once and round once, so that nothing is left to choose.
_GPU_OPTIONS = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
    "assert_indirect_indexing": False,
}

# A GPU kernel's block sizes are chosen by timing its first call: a tensor of a few thousand elements must not choose them
# for one of millions (on an H100 half of the bandwidth). So each variant exists twice there, for small and for large.
_LARGE = 2**22

_MOST_SHORTCUTS = 1024

# Inductor fuses loops and splits work for the size that it expects of a dynamic dimension, and keeps the code on disk for
# all sizes. On CPU it is told one, lest a small first tensor decide for a large one: 19 ms instead of 9 for 16.7M to NF4.
# On GPUs it guards what it decides by size, and a guard that holds for the typical size alone is an error.
_TYPICAL_SIZE = 2**16

_eager_depth = 0


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


def compile_enabled() -> bool:
    """Whether kernels are to be compiled: not inside `eager()`, and BNBREF_COMPILE is not 0."""
    return _eager_depth == 0 and os.environ.get("BNBREF_COMPILE", "1") != "0"


def tracing() -> bool:
    """Whether operations are being recorded by somebody: then no tensor made now may outlive the call (no caches)."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch.jit.is_tracing()
        or transforming()
    )


def _cxx() -> str:
    """The C++ compiler that Inductor will use."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@functools.cache
def missing_compiler(device_type: str) -> str | None:
    """What Inductor lacks on this machine to compile for a device type; None if nothing."""
    if device_type == "cpu":
        if shutil.which(_cxx()) is None:
            return f"no C++ compiler ({_cxx()!r} is not on the PATH; set CXX or install g++)"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return "no Python.h (install Python's development headers)"
        return None
    if device_type in ("cuda", "xpu"):
        return None if importlib.util.find_spec("triton") else "no triton (pip install triton)"
    return f"no Inductor backend that was ever tried with bnbref on device type {device_type!r}"


@functools.cache
def _prepare_cpu() -> dict[str, Any]:
    """Options common to all kernels on CPU, and what is done once per process before the first compilation."""
    from torch._inductor import config

    from bnbref import lut16

    # To learn which vector instructions compiler and CPU share, Inductor builds and loads three libraries: 9 s of a
    # first use, 1 s of every later one. torch asks the CPU itself, and compilers of this age know them all.
    version = subprocess.run([_cxx(), "-dumpversion"], capture_output=True, text=True, check=True).stdout
    major = version.strip().partition(".")[0]
    known = config.cpp.vec_isa_ok is None and int(major) >= 11 and not torch.cpu._is_amx_fp16_supported()
    options: dict[str, Any] = {"cpp.vec_isa_ok": True} if known else {}
    with config.patch(options):
        lut16.enable()
    return {"assert_indirect_indexing": False, **options}


@functools.cache
def _warn_once(device_type: str, reason: str) -> None:
    warnings.warn(
        f"bnbref runs uncompiled on {device_type}: {reason}. The bits are the same, the speed is not.", stacklevel=4
    )


def _can_compile(tensors: list[Tensor | None]) -> bool:
    if not compile_enabled() or tracing():
        return False
    device_type = next(t.device.type for t in tensors if t is not None)
    if device_type == "meta" or any(t is not None and type(t) is not Tensor for t in tensors):
        return False
    reason = missing_compiler(device_type)
    if reason is not None:
        _warn_once(device_type, reason)
    return reason is None


def _signature(tensor: Tensor | None, dynamic: tuple[int, ...]) -> Any:
    """What a variant is specialised on: Dynamo always does so on sizes 0 and 1."""
    if tensor is None:
        return None
    return tensor.dtype, tuple(min(n, 2) if dim in dynamic else n for dim, n in enumerate(tensor.shape))


def _sealed(value: Any) -> Any:
    """The same 16-bit floats with a bit cast on the way: part of somebody's graph, that is no rounding to leave out.

    By default Inductor drops the rounding of x.to(bfloat16).float(); so what their graph rounded before a kernel, or a
    kernel rounded before their graph goes on in float32, would have other bits than eagerly.
    """
    if isinstance(value, tuple):
        return tuple(map(_sealed, value))
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return (value.view(torch.int16) | 0).view(value.dtype)  # without the operation the two views cancel
    return value


class Kernel(Generic[P, R]):
    """A registered function: positional arguments are tensors (or None), keyword arguments compile-time constants.

    A variant is compiled for each (device type, dtypes, static sizes, constants), and serves all sizes above 1 of the
    dimensions in `dynamic`.
    """

    def __init__(
        self,
        definition: Callable[P, R],
        dynamic: Mapping[str, tuple[int, ...]],
        cpu: Callable[..., Mapping[str, Any]],
        exact: bool,
        gpu: Callable[..., Mapping[str, Any]] = lambda *dtypes, **constants: {},
        writes: Sequence[str] = (),
        piece: int | None = None,
    ) -> None:
        self.name = definition.__name__
        self.definition = definition
        self.body = definition
        self.variants: dict[Any, Callable[..., R]] = {}
        self._shortcuts: dict[Any, Callable[[list[Tensor | None]], R]] = {}
        self._ran: tuple[Any, Any, Any] | None = None
        self.exact = exact
        self._cpu, self._gpu = cpu, gpu
        parameters = inspect.signature(definition).parameters
        for label, names in (("dynamic", dynamic), ("writes", writes)):
            unknown = set(names) - set(parameters)
            if unknown:
                raise ValueError(f"{label} names no argument of kernel {self.name!r}: {sorted(unknown)}")
        positional = [p for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        self._dynamic = tuple(dynamic.get(p.name, ()) for p in positional)
        self._written = tuple(p.name in writes for p in positional)
        self._variadic = bool(positional) and positional[-1].kind is inspect.Parameter.VAR_POSITIONAL
        self._piece = piece
        functools.update_wrapper(self, definition)

    def formulation(self, body: Callable[P, R]) -> Callable[P, R]:
        """Decorator: what is compiled in place of the definition. Same arguments, same bits."""
        self.body = body
        return body

    def written(self, args: Sequence[Any]) -> list[Any]:
        """The arguments that a call writes to, in their order."""
        return list(itertools.compress(args, self._for_each(self._written, len(args))))

    def _for_each(self, values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
        """One value for each of `count` arguments: that of `*rest` for all that it takes."""
        return values[:-1] + values[-1:] * (count - len(values) + 1) if self._variadic else values[:count]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), without_autocast(args[0]):  # type: ignore[arg-type]
            if torch.compiler.is_compiling():
                inlined: R = _sealed(self.body(*map(_sealed, args), **kwargs))
                return self._written_into(args, inlined)
            # A parameter is a plain tensor to the compiled code.
            tensors = [
                t if type(t) is Tensor and not t.requires_grad else t.detach() if isinstance(t, Tensor) else None
                for t in args
            ]
            compiled = _can_compile(tensors)
            if self._in_pieces(tensors):
                for piece in self._pieces(tensors):
                    results = self._run(piece, kwargs) if compiled else self.definition(*piece, **kwargs)  # type: ignore[arg-type]
                    self._written_into(piece, results)
                return tuple(self.written(args))  # type: ignore[return-value]
            if not compiled:
                return self._written_into(args, self.definition(*args, **kwargs))
            result = self._run(tensors, kwargs)
            return tuple(self.written(args)) if any(self._written) else result  # type: ignore[return-value]

    def _written_into(self, args: Sequence[Any], results: R) -> R:
        """What a call returns: the results, or the arguments that now hold them."""
        if not any(self._written):
            return results
        targets = self.written(args)
        torch._foreach_copy_(targets, list(results))  # type: ignore[call-overload]
        return tuple(targets)  # type: ignore[return-value]

    def _in_pieces(self, tensors: list[Tensor | None]) -> bool:
        return self._piece is not None and next(t.device.type for t in tensors if t is not None) == "cpu"

    def _pieces(self, tensors: list[Tensor | None]) -> Iterator[list[Tensor | None]]:
        """Views of equal numbers of rows of all arguments whose first dimension is dynamic."""
        by_rows = [t is not None and 0 in dims for t, dims in self._with_dynamic(tensors)]
        rows = next(t.shape[0] for t, sliced in zip(tensors, by_rows, strict=True) if sliced and t is not None)
        count = max(1, -(-rows // (self._piece or rows)))
        if count == 1:
            yield tensors
            return
        for i in range(count):
            part = slice(rows * i // count, rows * (i + 1) // count)
            yield [t[part] if sliced and t is not None else t for t, sliced in zip(tensors, by_rows, strict=True)]

    def _with_dynamic(self, tensors: list[Tensor | None]) -> list[tuple[Tensor | None, tuple[int, ...]]]:
        return list(zip(tensors, self._for_each(self._dynamic, len(tensors)), strict=True))

    def _run(self, tensors: list[Tensor | None], constants: Mapping[str, Any]) -> R:
        layout = tuple(None if t is None else (t.device, t.dtype, t.shape, t.stride()) for t in tensors)
        call = (torch.get_num_threads(), layout, *constants.items())
        shortcut = self._shortcuts.get(call)
        return shortcut(tensors) if shortcut is not None else self._first_call(call, tensors, constants)

    def _first_call(self, call: Any, tensors: list[Tensor | None], constants: Mapping[str, Any]) -> R:
        """By way of Dynamo, which finds or compiles the code for these sizes; what it runs is the shortcut from now on."""
        # Fresh aliases: Dynamo's mark of a dynamic size stays on the tensor that bears it, which is the caller's.
        tensors = [None if t is None else t.detach() for t in tensors]
        device_type = next(t.device.type for t in tensors if t is not None)
        dynamic = self._with_dynamic(tensors)
        key = (device_type, *(_signature(t, dims) for t, dims in dynamic), *constants.items())
        large = device_type != "cpu" and max(t.numel() for t in tensors if t is not None) >= _LARGE
        if large:
            key = (*key, "large")
        variant = self.variants.get(key)
        if variant is None:
            dtypes = [None if t is None else t.dtype for t in tensors]
            writes = any(self._written) and not self._in_pieces(tensors)
            variant = self.variants[key] = self._compile(device_type, dtypes, constants, large, writes)
        hint = _TYPICAL_SIZE if device_type == "cpu" else None
        for tensor, dims in dynamic:
            if tensor is not None:
                for dim in dims:
                    if tensor.shape[dim] > 1:  # Dynamo always specialises sizes 0 and 1
                        torch._dynamo.mark_dynamic(tensor, dim, hint_override=hint)
        self._ran = None
        result = variant(*tensors)
        shortcut = _shortcut(self._ran, tensors, result)
        self._ran = None  # it holds tensors
        if shortcut is not None:
            if len(self._shortcuts) >= _MOST_SHORTCUTS:
                self._shortcuts.clear()
            self._shortcuts[call] = shortcut
        return result

    def _compile(
        self,
        device_type: str,
        dtypes: list[torch.dtype | None],
        constants: Mapping[str, Any],
        large: bool,
        writes: bool,
    ) -> Callable[..., R]:
        options: dict[str, Any]
        if device_type == "cpu":
            options = {**_prepare_cpu(), **self._cpu(*dtypes, **constants)}
            widest = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())
            # A narrower width is chosen below AVX512 only; elsewhere Inductor would take an unknown one to mean scalar code. And
            # its cache does not ask for what instructions code was made (ATEN_CPU_CAPABILITY, a home that machines share): it
            # does ask for options, so the width is always one of them.
            if options.get("cpp.simdlen") != 1 and (widest != 512 or "cpp.simdlen" not in options):
                options["cpp.simdlen"] = widest
        else:
            options = {**_GPU_OPTIONS, **self._gpu(*dtypes, **constants)}
            if not large:  # seconds of a first call that a small tensor never earns back
                options.pop("coordinate_descent_tuning", None)
        body, into = self.body, self.written(range(len(dtypes))) if writes else []

        def call(*tensors: Any) -> R:
            results = body(*tensors, **constants)
            if not into:
                return results
            for place, value in zip(into, results, strict=True):  # type: ignore[call-overload]
                tensors[place].copy_(value)
            return ()  # type: ignore[return-value]

        def inductor(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            from torch._inductor.compile_fx import compile_fx

            compiled: Any = compile_fx(graph, example_inputs, config_patches=options)

            def run(*inputs: Any) -> Any:
                outputs = compiled(*inputs)
                self._ran = (compiled, inputs, outputs)
                return outputs

            return run

        # Dynamo counts recompilations per code object and gives up at eight: each variant gets a code object to itself.
        code = call.__code__.replace(co_name=self.name)
        own = types.FunctionType(code, call.__globals__, self.name, call.__defaults__, call.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False, backend=inductor)


def _shortcut(ran: tuple[Any, Any, Any] | None, tensors: list[Tensor | None], result: Any) -> Callable[..., Any] | None:
    """The compiled code itself, for calls with tensors of just these sizes, strides, dtypes and device.

    Dynamo's guards cost 30 to 60 us a call (0.3 ms when Python's own code has left the caches), more than many a kernel.
    They hold again when everything they look at is the same. None if an input or output is not one of the function's.
    """
    if ran is None:
        return None
    compiled, inputs, outputs = ran
    place = {id(t): i for i, t in enumerate(tensors) if t is not None}
    if any(isinstance(value, Tensor) and id(value) not in place for value in inputs):
        return None
    template = [place[id(value)] if isinstance(value, Tensor) else None for value in inputs]
    sizes = [None if isinstance(value, Tensor) else value for value in inputs]
    produced = {id(value): i for i, value in enumerate(outputs)}
    wanted = result if isinstance(result, tuple) else (result,)
    if any(id(value) not in produced for value in wanted):
        return None
    order = [produced[id(value)] for value in wanted]

    several = isinstance(result, tuple)

    def shortcut(own: list[Tensor | None]) -> Any:
        values = compiled(*[size if i is None else own[i] for i, size in zip(template, sizes, strict=True)])
        return tuple(values[i] for i in order) if several else values[order[0]]

    return shortcut


def _no_options(*dtypes: torch.dtype | None, **constants: Any) -> Mapping[str, Any]:
    return {}


def fused(
    *,
    dynamic: Mapping[str, tuple[int, ...]],
    cpu: Callable[..., Mapping[str, Any]] = _no_options,
    gpu: Callable[..., Mapping[str, Any]] = _no_options,
    exact: bool = True,
    writes: Sequence[str] = (),
    piece: int | None = None,
) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Register a pure function as a kernel; calling it runs it compiled.

    dynamic: for each tensor argument the dimensions that vary between calls. cpu: Inductor's options for a variant on
    CPU, given the dtypes of the tensors and the constants, with the measurement that chose them beside it; gpu: likewise on
    GPUs. exact: whether compiled and eager give the same bits; only a kernel that adds up floats may say no, and it says by
    how much. writes: arguments that take the results, in order. piece: on CPU that many rows at a time are computed and
    copied: Inductor fuses a reduction with what follows only if nothing is written in place, and the copy stays in the cache.

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
        kernel = Kernel(definition, dynamic, cpu, exact, gpu, writes, piece)
        if kernel.name in REGISTRY:
            raise ValueError(f"a kernel named {kernel.name!r} is registered already")
        REGISTRY[kernel.name] = kernel
        return kernel

    return register
