"""A digest of all that decides what a call of a kernel runs on a GPU: what two processes share if they may share machine code.

    what may differ                            how the digest sees it
    -----------------------------------------  ----------------------------------------------------------------
    torch, triton, the kind of GPU             by version and name
    the workshop                               by the compiled Python code of all its files
    the formula                                by the code of each function of bnbref that it reaches, as it is
                                               in this process: somebody may have replaced one
    the call                                   dtype, sizes and strides of each tensor, and the constants by
                                               what is their identity, a stranger's codebook or rule as well

Where something has no identity that another process could compare, there is no digest.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import operator
import pkgutil
import types
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_PACKAGE = "bnbref."
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None), type(...))


class Unknown(Exception):
    """A value whose identity is not known."""


def digest(functions: Sequence[Callable[..., Any]], args: Sequence[Any], constants: Mapping[str, Any]) -> str | None:
    """The digest of a call of a kernel whose definition, formulation and tables are these functions; None if something in it has
    no identity that another process could compare."""
    device = next(t.device for t in args if t is not None)
    seen: dict[int, int] = {}
    try:
        lines = [*_machine(device), *(line for f in functions for line in _function(f, seen)), *map(_layout, args)]
        lines += [f"{name} {line}" for name, value in constants.items() for line in _value(value, seen)]
    except Unknown:
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _layout(t: Tensor | None) -> str:
    """What is compiled does not depend on the strides of dimensions of size 1, see `variants`."""
    if t is None:
        return "none"
    return f"{t.dtype} {tuple(t.shape)} {[stride for n, stride in zip(t.shape, t.stride(), strict=True) if n != 1]}"


@functools.cache
def _machine(device: torch.device) -> tuple[str, ...]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise Unknown("triton") from None
    gpu = torch.cuda.get_device_properties(device)
    versions = f"torch {torch.__version__} {torch.version.git_version} triton {triton}"
    return versions, f"{gpu.name} {gpu.major}.{gpu.minor} {gpu.multi_processor_count}", _workshop()


@functools.cache
def _workshop() -> str:
    """A digest of the files beside this one, as Python compiled them: a package in a zip file has them as well."""
    package, text = importlib.import_module(__package__ or ""), hashlib.sha256()
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")):
        loader: Any = getattr(importlib.util.find_spec(name), "loader", None)
        code = loader.get_code(name) if hasattr(loader, "get_code") else None
        if code is None:
            raise Unknown(name)
        text.update(_code(code).encode())
    return text.hexdigest()


@functools.cache
def _code(code: types.CodeType) -> str:
    """What a code object does. Not where it stands, nor `marshal`'s bytes, which differ from process to process."""
    constants = [_constant(constant) for constant in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return hashlib.sha256(repr((code.co_code, constants, names, counts)).encode()).hexdigest()


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    if isinstance(value, frozenset):  # the order of strings in it is another one in each process
        return f"{{{', '.join(sorted(map(_constant, value)))}}}"
    return f"{type(value).__name__} {value!r}"


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _function(function: Any, seen: dict[int, int]) -> Iterator[str]:
    """The code of a function, its defaults, what it closes over, and what it reaches by name, if that is bnbref's or a number."""
    if _wrapped(function) is not None:
        yield from _once(_wrapped(function), seen)
    if not isinstance(function, types.FunctionType):
        return
    yield _code(function.__code__)
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield from _reached(value, seen)
    for cell in function.__closure__ or ():
        yield from _reached(_contents(cell), seen)
    names = list(dict.fromkeys(_names(function.__code__)))
    for name in names:
        value = function.__globals__.get(name)
        yield name
        yield from _reached(value, seen)
        if isinstance(value, types.ModuleType) and value.__name__.startswith(_PACKAGE):
            for attribute in names:
                yield from _reached(vars(value).get(attribute), seen)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that nothing was assigned to yet
        return ...


def _wrapped(value: Any) -> Any:
    """The function behind a decorator's, or behind a kernel; None if there is none. `torch.ops` answers to every name."""
    return getattr(value, "__dict__", {}).get("__wrapped__")


def _once(value: Any, seen: dict[int, int]) -> Iterator[str]:
    if (yield from _number(value, seen)):
        yield from _function(value, seen)


def _number(value: Any, seen: dict[int, int]) -> Generator[str, None, bool]:
    """The number of a function or class, by which it is known where it is met again. Returns whether this is the first time."""
    new = id(value) not in seen
    yield f"number {seen.setdefault(id(value), len(seen))}"
    return new


def _class(kind: type, seen: dict[int, int]) -> Iterator[str]:
    if not (yield from _number(kind, seen)):
        return
    for base in kind.__bases__:
        yield from _reached(base, seen)
    for name, value in vars(kind).items():
        for function in (
            value,
            getattr(value, "fget", None),
            getattr(value, "__func__", None),
            getattr(value, "func", None),
        ):
            if isinstance(function, types.FunctionType):
                yield name
                yield from _once(function, seen)
        data = (*_PLAIN, tuple, list, dict, types.BuiltinFunctionType)
        if isinstance(value, data) and not name.startswith("__"):  # Python's own names begin so
            yield name
            yield from _reached(value, seen)


def _reached(value: Any, seen: dict[int, int]) -> Iterator[str]:
    """Of what a function reaches: functions and classes of bnbref, numbers, and values that have an identity."""
    if isinstance(value, type):
        if value.__module__.startswith(_PACKAGE):
            yield from _class(value, seen)
    elif isinstance(value, types.FunctionType) or _wrapped(value) is not None:
        # A stranger's function that was put in the place of one of ours is reached as well.
        if not str(value.__module__).startswith(("torch.", "einops.")):
            yield from _once(value, seen)
    else:
        try:
            yield from _value(value, seen)
        except Unknown:
            if callable(value) and not isinstance(value, types.GenericAlias):
                raise  # it may be in the place of a function: a partial one, a method, a mock
            return  # torch, a lock, a memory of what was made


def _is_method(function: types.BuiltinFunctionType) -> bool:
    """Whether it belongs to a value, of which its name says nothing: the `append` of a list."""
    owner = function.__self__
    return owner is not None and not isinstance(owner, (types.ModuleType, type))


def _value(value: Any, seen: dict[int, int]) -> Iterator[str]:
    """The identity of a value. Raises Unknown if it is not known."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, (tuple, list)):
        yield f"{type(value).__name__} {len(value)}"
        for item in value:
            yield from _value(item, seen)
    elif isinstance(value, dict):
        yield f"dict {len(value)}"
        entries = [("\n".join(_value(key, seen)), item) for key, item in value.items()]
        for key, item in sorted(entries, key=operator.itemgetter(0)):  # they may be in the order of imports
            yield key
            yield from _value(item, seen)
    elif isinstance(value, types.FunctionType):
        yield from _once(value, seen)
    elif isinstance(value, types.BuiltinFunctionType) and not _is_method(value):
        yield f"{value.__module__} {value.__qualname__}"
    elif type(value).__module__.startswith(_PACKAGE) and hasattr(value, "_identity"):  # a codebook, an equation
        yield type(value).__qualname__
        yield from _class(type(value), seen)
        yield from _value(value._identity, seen)
    elif type(value).__module__.startswith(_PACKAGE) and dataclasses.is_dataclass(value):
        yield type(value).__qualname__
        for field in dataclasses.fields(value):
            yield from _value(getattr(value, field.name), seen)
    else:
        raise Unknown(type(value).__qualname__)
