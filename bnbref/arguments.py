"""The arguments of functions that users call: judged by their annotations, before anything is computed.

A list in place of a tensor, or a string in place of a number, would end in an error of torch about a name that the user has not
written, or in none: "False" is true, and nothing is smaller than NaN.
"""

import functools
import inspect
import math
import numbers
import typing
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def check_tensors(**arguments: object) -> None:
    """TypeError or ValueError that names the first of the arguments that is no dense tensor, or has lost its memory."""
    for name, x in arguments.items():
        _check_tensor(name, x)


def bytes_needed(x: Tensor) -> int:
    """How large the storage of a tensor must be for its shape, strides and place in it, in bytes.

    >>> bytes_needed(torch.ones(4, 3)[1:, :2])
    44
    """
    if x.numel() == 0:
        return 0
    last = x.numel() - 1 if x.is_contiguous() else sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return int((x.storage_offset() + last + 1) * x.itemsize)


def memory(x: Tensor) -> tuple[int, int]:
    """The address at which the memory of a tensor begins, and the one at which it ends."""
    first = x.data_ptr()
    return first, first + int(x.nbytes if x.is_contiguous() else bytes_needed(x) - x.storage_offset() * x.itemsize)


def check_memory(name: str, x: Tensor) -> None:
    """ValueError if the storage of a tensor is smaller than its shape needs: compiled code would read what is not the tensor's.

    FSDP1 frees the memory of a module's weights so, `untyped_storage().resize_(0)`, while the module is not in use.
    """
    if torch.compiler.is_dynamo_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return  # what is recorded may have no storage
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return  # nor has what `torch.func` wraps
    here, needed = x.untyped_storage().nbytes(), bytes_needed(x)
    if here < needed:
        raise ValueError(lost_memory(name, x, here, needed))


def lost_memory(name: str, x: Tensor, here: int, needed: int) -> str:
    """What is wrong with a tensor whose storage has `here` bytes and needs more."""
    return (
        f"{name} of shape {tuple(x.shape)} needs {needed} bytes, and its storage has {here}: it was freed or made smaller "
        "(`untyped_storage().resize_`), as FSDP1 frees the weights of a module outside of its forward"
    )


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_said(x)}")
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        got = "a nested tensor" if x.is_nested else x.dtype if x.is_quantized else x.layout
        raise ValueError(f"{name} must be dense, got {got}")
    check_memory(name, x)


def _check_local_tensor(name: str, x: object) -> None:
    _check_tensor(name, x)
    placements = None if type(x) is Tensor else getattr(x, "placements", None)
    if placements is not None:
        raise TypeError(
            f"{name} must be a plain tensor, got a {type(x).__name__} with placements {placements}: a part of a quantized "
            "weight would need blocks and scales of its own, so there is no tensor parallelism here. full_tensor() is plain"
        )


def check_bool(name: str, value: object) -> None:
    """TypeError unless the value is a bool, or 0 or 1: a string from a file of settings, "False", would be true."""
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name} must be a bool, got {_said(value)}")


def check_number(name: str, value: object) -> None:
    """TypeError unless the value is a real number. ValueError for NaN, which no comparison would refuse, and for an integer or a
    fraction that is larger than any float."""
    if not isinstance(value, float) and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {_said(value)}")
    try:
        nothing = math.isnan(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, got {written(value)}") from None
    if nothing:
        raise ValueError(f"{name} must be a number, got nan")


def check_integer(name: str, value: object) -> None:
    """TypeError unless the value is an integer, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {_said(value)}")


def check_one_of(name: str, value: object, *classes: type) -> None:
    """TypeError unless the value is an instance of one of the classes."""
    if not isinstance(value, classes):
        words = [
            "None" if k is NoneType else f"torch.{k.__name__}" if k.__module__ == "torch" else k.__name__
            for k in classes
        ]
        raise TypeError(f"{name} must be a {' or '.join(words)}, got {_said(value)}")


def _check_device(name: str, value: object, *classes: type) -> None:
    """TypeError for what names no device. torch takes the number of one. It would also take a dtype, or True, for a cast."""
    if type(value) is not int:
        check_one_of(name, value, *classes)


def _said(value: object) -> str:
    """A value in a message: plain ones as they are written, others by their type."""
    plain = value is None or isinstance(value, (str, bytes, int, float, complex, torch.dtype))
    kind = type(value)
    if kind.__module__ == "numpy":  # it has a bool, too
        return f"numpy.{kind.__name__}"
    return written(value) if plain else kind.__name__


def written(value: object) -> str:
    """`repr(value)`, of which Python makes none if there is an integer of more than 4300 digits in it: then its type alone.

    >>> written((1, "a")), written(10**5000)
    ("(1, 'a')", 'int of too many digits')
    """
    try:
        return repr(value)
    except ValueError:
        return f"{type(value).__name__} of too many digits"


def dtype_name(dtype: torch.dtype | None) -> str:
    """A dtype as files, reports and messages have it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


_JUDGES: dict[Any, Callable[[str, Any], None]] = {
    Tensor: _check_local_tensor,
    bool: check_bool,
    int: check_integer,
    float: check_number,
}
"""What is asked of an argument whose annotation is this class. Of other classes: an instance."""


def _judge_of(annotation: Any) -> Callable[[str, Any], None] | None:
    """The function that judges a value with this annotation, if it is not a None that is allowed; None where any may be right."""
    if annotation in (inspect.Parameter.empty, Any):  # self; Any is a class since Python 3.11
        return None
    listed = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    classes: tuple[Any, ...] = tuple(typing.get_origin(kind) or kind for kind in listed)
    if not all(isinstance(kind, type) for kind in classes):
        return None
    others = tuple(kind for kind in classes if kind is not NoneType)
    if len(others) == 1 and others[0] in _JUDGES:
        return _JUDGES[others[0]]
    if torch.device in classes:
        return lambda name, value: _check_device(name, value, *classes)
    return lambda name, value: check_one_of(name, value, *classes)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that users call: an argument that is not what its annotation says is a TypeError or ValueError.

    The error names the argument. A tensor must be dense and no DTensor, a number no NaN; 0 and 1 are bools. The elements of a
    collection are not judged, nor is a call that Dynamo traces.

    >>> @checked
    ... def halves(x: Tensor, count: int = 2) -> Tensor:
    ...     return x / 2**count
    >>> halves([1.0])
    Traceback (most recent call last):
    TypeError: x must be a torch.Tensor, got list
    """
    parameters = inspect.signature(function).parameters.values()
    judges = [(p.name, NoneType in typing.get_args(p.annotation), _judge_of(p.annotation)) for p in parameters]
    by_name = {rule[0]: rule for rule in judges}
    unknown = ("", True, None)  # the function says so

    @functools.wraps(function)
    def judged(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_dynamo_compiling():
            with torch._C.DisableTorchFunctionSubclass():  # of a parameter, which watches what it is asked
                for (name, optional, judge), value in zip(judges, args, strict=False):
                    if judge is not None and not (optional and value is None):
                        judge(name, value)
                for name, value in kwargs.items():
                    _, optional, judge = by_name.get(name, unknown)
                    if judge is not None and not (optional and value is None):
                        judge(name, value)
        return function(*args, **kwargs)

    return judged


def is_shape(sizes: Sequence[int]) -> bool:
    """Whether an index holds the product of these sizes. Torch multiplies them, for strides, also where one of them is 0.

    >>> is_shape([0, 2**62]), is_shape([0, 2**62, 2])
    (True, False)
    """
    return math.prod(max(n, 1) for n in sizes) < 2**63
