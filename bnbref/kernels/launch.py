"""A compiled kernel launched without the Python that Inductor writes around it.

Around the launch, Inductor's code for a GPU makes views, enters guards for the device, checks how every input is aligned, and
looks whether tuning is done: 25 us, of which a launch is 5. Where this code is one launch of a Triton kernel whose pointers are
the arguments and the results of the call, the next call of that layout allocates the results and launches.
"""

import contextlib
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnbref.arguments import check_memory


class Call(NamedTuple):
    """A call of a method: of what object, with what, and what it returned."""

    of: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class Launch(NamedTuple):
    """One launch of machine code, for all calls of a layout.

    symbol: the name of the function in the machine code. grid, warps, shared: how many programs it runs, of how many warps, with
    how many bytes of shared memory. kinds: a letter for the type of each of its arguments. arguments: of each the place of its
    tensor, and how many bytes behind its beginning it lies; or None, and the number itself. Places count the arguments of the
    call, then its tables, then its results. results: shape, strides and dtype of each. several: whether the call returns a tuple.
    """

    symbol: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    kinds: str
    arguments: tuple[tuple[int | None, Any], ...]
    results: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    several: bool


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


def launched_alone(
    launched: Sequence[Call], args: Sequence[Any], tables: Sequence[Tensor], result: Any
) -> tuple[Launch, Any] | None:
    """The one launch that was recorded while the result was computed of a call's arguments and tables, and Inductor's kernel
    that made it.

    result: a tensor, or several; none if it was written into the arguments. Returns None if more was done than one launch, or
    if it is not known from what each of its arguments came. Of tables several may be one.
    """
    if len(launched) != 1:
        return None
    inductors, given, options, _ = launched[0]
    if set(options) != {"stream"} or len(inductors.launchers) != 1:
        return None
    several = isinstance(result, tuple)
    results = result if several else (result,)
    run = _last_step(inductors.launchers[0], given)
    tensors = [*args, *tables]
    inputs = {t.data_ptr(): i for i, t in enumerate(tensors) if t is not None}
    outputs = {t.data_ptr(): i for i, t in enumerate(results)}
    whole = all(t.untyped_storage().nbytes() == t.nbytes > 0 for t in results)
    different = len(inputs) + len(outputs)
    distinct = different == sum(t is not None for t in args) + len({id(table) for table in tables}) + len(results)
    if run is None or not whole or not distinct or 0 in inputs or inputs.keys() & outputs.keys():
        return None
    kernel, grid, values = run
    arguments: list[tuple[int | None, Any]] = []
    for value in values:
        if not isinstance(value, Tensor):
            arguments.append((None, value))
        elif value.data_ptr() in inputs:
            arguments.append((inputs[value.data_ptr()], 0))
        elif (part := _part(value, results)) is not None:
            arguments.append((len(tensors) + part[0], part[1]))
        else:
            return None
    places = {place for place, _ in arguments}
    if not places.issuperset(range(len(tensors), len(tensors) + len(results))):
        return None
    scratch = kernel.has_global_scratch + kernel.has_profile_scratch  # memory that no kernel of Inductor asks for
    arguments += [(None, None)] * scratch
    layouts = tuple((tuple(t.shape), t.stride(), t.dtype) for t in results)
    kinds = kernel.arg_tys + "O" * scratch
    return Launch(kernel.name, grid, kernel.num_warps, kernel.shared, kinds, tuple(arguments), layouts, several), kernel


def _last_step(launcher: Any, given: Sequence[Any]) -> tuple[Any, tuple[int, int, int], tuple[Any, ...]] | None:
    """What Inductor's function that launches hands on to torch's own launcher: the kernel, the grid, the arguments. None where
    Inductor launches by way of Triton."""
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    kernel = getattr(launcher.__globals__.get("runner"), "__self__", None)
    if not isinstance(kernel, StaticallyLaunchedCudaKernel) or kernel.function is None or torch.version.hip is not None:
        return None
    handed: list[Any] = []
    # The same code, with a list in the place of torch's launcher.
    scope = {**launcher.__globals__, "runner": lambda *values: handed.extend(values)}
    types.FunctionType(launcher.__code__, scope)(*given, stream=0)
    x, y, z, _, *values = handed
    return kernel, (x, y, z), tuple(values)


def _part(value: Tensor, results: Sequence[Tensor]) -> tuple[int, int] | None:
    """The place of the result in whose memory a tensor lies, and how many bytes behind its beginning; None if it lies in none.

    Several sums of a kernel may be parts of one result.
    """
    for place, result in enumerate(results):
        offset = value.data_ptr() - result.data_ptr()
        if 0 <= offset <= result.nbytes - value.nbytes:
            return place, offset
    return None


def bound(
    launch: Launch, function: int, tables: Sequence[Tensor], count: int, index: int
) -> Callable[[Sequence[Any]], list[Tensor] | None]:
    """A function that makes the launch with other tensors of its layout, of which there are `count`, and these tables.

    function: the address of the machine code on the GPU of this index. What is returned takes the arguments and returns the
    results; or None, if the machine code is not for them: another device is the current one, or an address is not aligned. It
    raises ValueError for a tensor that has lost its memory.
    """
    _, (x, y, z), warps, shared, kinds, arguments, layouts, _ = launch
    behind = count + len(tables)
    template = [value for _, value in arguments]
    of_args, of_results = [], []
    for i, (place, offset) in enumerate(arguments):
        if place is None:
            continue
        if place < count:
            of_args.append((i, place))
        elif place < behind:
            template[i] = tables[place - count].data_ptr()
        else:
            of_results.append((i, place - behind, offset))
    current_device, stream_of, allocate, run = _runtime()

    def call(args: Sequence[Any]) -> list[Tensor] | None:
        if current_device() != index:
            return None
        values = template.copy()
        for i, place in of_args:
            values[i] = address = args[place].data_ptr()
            if address % _ALIGNED or not address:
                check_memory("a tensor", args[place])
                return None
        made = [allocate(*layout) for layout in layouts]
        for i, place, offset in of_results:
            values[i] = made[place].data_ptr() + offset
        run(function, x, y, z, warps, shared, kinds, tuple(values), stream_of(index))
        return made

    call.tables = tables  # type: ignore[attr-defined]  # whose addresses it has: they live as long as it does
    return call


def loaded(file: str, launch: Launch, index: int) -> int:
    """The address of the machine code in a file, loaded to the GPU of this index, which is the current one."""
    launcher: Any = torch._C._StaticCudaLauncher
    return int(launcher._load_kernel(file, launch.symbol, launch.shared, index)[0])


def _runtime() -> tuple[Callable[[], int], Callable[[int], int], Callable[..., Tensor], Callable[..., None]]:
    """The functions that Inductor's code calls: the number of the current device, its stream, a new tensor there, a launch."""
    guards: Any = torch._C._dynamo.guards
    launcher: Any = torch._C._StaticCudaLauncher
    return (
        torch._C._cuda_getDevice,
        torch._C._cuda_getCurrentRawStream,
        guards._empty_strided_cuda,
        launcher._launch_kernel,
    )
