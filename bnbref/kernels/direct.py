"""Every call of a kernel but the first of its layout: Inductor's code itself, without the Python around it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.context import is_lazy
from bnbref.kernels.launch import Call


def call_layout(args: Sequence[Any], constants: Mapping[str, Any]) -> Any:
    """All of a call that Dynamo and Inductor look at. Calls with equal layouts run the same compiled code."""
    tensors = [None if t is None else (type(t), t.device, t.dtype, t.shape, t.stride(), is_lazy(t)) for t in args]
    kinds = map(type, constants.values())  # 1 is equal to 1.0 and to True
    return torch.get_num_threads(), *tensors, *constants.items(), *kinds


def written(args: Sequence[Any], into: Sequence[int]) -> tuple[Tensor, ...]:
    """What a call returns that has written into its arguments: these. Autograd is told, which has not seen it."""
    targets = tuple(args[i] for i in into)
    torch.autograd.graph.increment_version(targets)
    return targets


def direct(
    ran: Sequence[Call], tensors: Sequence[Any], count: int, result: Any, into: Sequence[int]
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
    if into:

        def update(args: Sequence[Any]) -> Any:
            code([value if i is None else args[i] for i, value in template])
            return written(args, into)

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

    return call


def alone(
    launch: Callable[[Sequence[Any]], list[Tensor] | None], several: bool, into: Sequence[int],
    otherwise: Callable[[Sequence[Any]], Any],
) -> Callable[[Sequence[Any]], Any]:  # fmt: skip
    """A call that is one launch. otherwise: makes the calls that the launch is not for."""

    def call(args: Sequence[Any]) -> Any:
        results = launch(args)
        if results is None:
            return otherwise(args)
        return written(args, into) if into else tuple(results) if several else results[0]

    return call
