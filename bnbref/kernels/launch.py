"""A compiled kernel launched without the Python that Inductor writes around it.

Around the launch, Inductor's code for a GPU makes views, enters guards for the device, checks how every input is aligned, and
looks whether tuning is done: 25 us, of which a launch is 5. Where this code is one launch of a Triton kernel whose pointers are
the arguments and the results of the call, the next call of that layout allocates the results and launches.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """A call of a method: of what object, with what, and what it returned."""

    of: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


_ALIGNED = 16
"""Bytes that divide the addresses for which Inductor compiles."""


@contextlib.contextmanager
def recorded(owner: type, method: str) -> Iterator[list[Call]]:
    """A list that grows by a call whenever this thread runs the method of that class inside the block.

    Of the class and not of an object, because the objects are made inside the block. One such block at a time.
    """
    calls: list[Call] = []
    original, thread = getattr(owner, method), threading.get_ident()

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = tuple(list(x) if isinstance(x, list) else x for x in args)  # Inductor's code empties its list
        result = original(self, *args, **kwargs)
        if threading.get_ident() == thread:
            calls.append(Call(self, given, kwargs, result))
        return result

    setattr(owner, method, record)
    try:
        yield calls
    finally:
        setattr(owner, method, original)


def launches() -> contextlib.AbstractContextManager[list[Call]]:
    """`recorded` for Triton kernels of Inductor."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    return recorded(CachingAutotuner, "run")


def launch_alone(
    launched: Sequence[Call], tensors: Sequence[Any], count: int, results: Sequence[Tensor]
) -> Callable[[Sequence[Any]], list[Tensor] | None] | None:
    """A function that does what was recorded while `results` were computed of `tensors`, for other tensors of the same layout.

    tensors: the arguments of the call, of which there are `count`, and tables, which stay. The function takes the arguments and
    returns the results; or None, if what was compiled does not hold for them: another device is the current one, or an address is
    not aligned. Returns None if more was done than one launch, or if it is not known from what each of its arguments came.
    """
    if len(launched) != 1 or not results:
        return None
    kernel, given, options, _ = launched[0]
    if set(options) != {"stream"} or len(kernel.launchers) != 1:
        return None
    inputs = {t.data_ptr(): i for i, t in enumerate(tensors) if t is not None}
    outputs = {t.data_ptr(): i for i, t in enumerate(results)}
    whole = all(t.untyped_storage().nbytes() == t.nbytes > 0 for t in results)
    distinct = len(inputs) + len(outputs) == sum(t is not None for t in tensors) + len(results)
    if not whole or not distinct or 0 in inputs or inputs.keys() & outputs.keys():
        return None
    # Of each argument of the launch: its place among the call's arguments and results, and how many bytes behind its beginning it
    # lies; or itself, if all calls have the same.
    sources: list[tuple[int | None, Any]] = []
    for value in given:
        if not isinstance(value, Tensor):
            sources.append((None, value))
        elif value.data_ptr() in inputs:
            place = inputs[value.data_ptr()]
            sources.append((place, 0) if place < count else (None, value))
        elif (part := _part(value, results)) is not None:
            sources.append((count + part[0], part[1]))
        else:
            return None
    places = {place for place, _ in sources if place is not None}
    if not places.issuperset(range(count, count + len(results))):
        return None
    (launcher,) = kernel.launchers
    index = results[0].device.index
    layouts = [(tuple(t.shape), t.stride(), t.dtype) for t in results]
    checked = sorted(place for place in places if place < count)
    current_device, stream_of, allocate = _runtime()

    def launch(args: Sequence[Any]) -> list[Tensor] | None:
        if current_device() != index:
            return None
        for place in checked:
            if args[place].data_ptr() % _ALIGNED:
                return None
        made = [allocate(*layout) for layout in layouts]
        pool = (*args, *made)
        launcher(
            *[
                value if place is None else pool[place].data_ptr() + value if value else pool[place]
                for place, value in sources
            ],
            stream=stream_of(index),
        )
        return made

    return launch


def _part(value: Tensor, results: Sequence[Tensor]) -> tuple[int, int] | None:
    """The place of the result in whose memory a tensor lies, and how many bytes behind its beginning; None if it lies in none.

    Several sums of a kernel may be parts of one result.
    """
    for place, result in enumerate(results):
        offset = value.data_ptr() - result.data_ptr()
        if 0 <= offset <= result.nbytes - value.nbytes:
            return place, offset
    return None


def _runtime() -> tuple[Callable[[], int], Callable[[int], int], Callable[..., Tensor]]:
    """The functions that Inductor's code calls: the number of the current device, its stream, a new tensor there."""
    guards: Any = torch._C._dynamo.guards
    return torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream, guards._empty_strided_cuda
