"""The modes of torch in which a function of bnbref may be called (tracing, autocast, transforms), and what it does about each.

autocast                              off inside: dtypes are the ones that are written down
torch.func, torch.autograd.forward_ad plain operations, and a derivative of ours where rounding has none
torch.jit.trace                       plain operations, no derivative of ours: a program that is saved cannot hold it
no_grad, inference_mode               nothing is a view of what autograd has not seen, so that it may be changed in place
a subclass of Tensor as a weight      is taken for its memory
a negative view, zeros without memory plain operations
a trace, a dispatch mode              a tensor that is made belongs to the recording, and is not kept
a CUDA graph that is being recorded   memory that is kept is not of its pool
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
T = TypeVar("T")

_NOTHING = contextlib.nullcontext()


def constant_of_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that Dynamo is to call when it traces, not to trace: its result is a constant of the graph.

    `torch.compiler.assume_constant_result` does the same, but imports torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _AutocastOff:
    """`torch.autocast(kind, enabled=False)` where autocast is on, for a fifth of the time."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations on x's device have the dtypes that are written down, whatever the caller's autocast says.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), without_autocast(torch.ones(1)):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return _NOTHING
    return torch.autocast(kind, enabled=False) if torch.compiler.is_dynamo_compiling() else _AutocastOff(kind)


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast would give to an argument of a product.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     as_autocast(torch.ones(1)).dtype, as_autocast(torch.ones(1, dtype=torch.float64)).dtype
    (torch.bfloat16, torch.float64)
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def jit_tracing() -> bool:
    """Whether `torch.jit.trace` records the operations that are called now."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


@constant_of_graphs
def exporting() -> bool:
    """Whether torch.export traces. In torch 2.11 Dynamo takes `is_exporting()` for True in every trace."""
    return torch.compiler.is_exporting()


@constant_of_graphs
def under_functorch(derivative: bool = False) -> bool:
    """Whether `torch.func` transforms, also while Dynamo traces; with `derivative`, whether by other transforms than `vmap`."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(not derivative or level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


def transforming() -> bool:
    """Whether tensors wrap tensors or have a tangent: `torch.func`, `torch.autograd.forward_ad`."""
    return under_functorch() if torch.compiler.is_compiling() else _transforming()


def _transforming() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def tracing() -> bool:
    """Whether somebody records operations (a trace, a dispatch mode). A tensor that is made now is then part of the recording,
    and must not be kept in a cache."""
    return traced() or recorded_outside()


def traced() -> bool:
    """Whether Dynamo or an export traces. (`is_compiling()` is also true for other code that runs meanwhile, in any thread.)"""
    return torch.compiler.is_dynamo_compiling() or exporting()


def recorded_outside() -> bool:
    """Whether a dispatch mode, `torch.jit.trace` or a transform of functions sees the operations that are called now."""
    return _get_current_dispatch_mode() is not None or jit_tracing() or transforming()


def undisturbed(x: Tensor) -> bool:
    """Whether x is a plain tensor, and nothing of the table at the head of this file is at work.

    Allowed are no_grad, inference_mode, and an autocast to the dtype that x has already.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(x) is Tensor
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and (not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.get_autocast_dtype(x.device.type))
    )


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a function of these tensors will be differentiated, so that it needs a derivative written by us."""
    if torch.compiler.is_compiling():
        transformed = under_functorch()
    elif torch._C._is_tracing():
        return False
    else:
        transformed = _transforming()
    return transformed or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def not_a_view(result: Tensor) -> Tensor:
    """The same memory as a tensor that is no view. Autograd forbids to change a view in place if it was made where autograd did
    not look, as in a custom function."""
    if not torch.compiler.is_compiling() and (torch._C._is_tracing() or not result._is_view()):
        return result  # jit.trace would take the shape for a constant
    return torch.ops.aten._unsafe_view(result, result.shape)  # type: ignore[no-any-return]


def is_lazy(x: Tensor) -> bool:
    """Whether x is not what its memory holds: a negative view, or zeros that have no memory, as tangents of forward mode are.

    >>> is_lazy(torch.ones(2)), is_lazy(torch._neg_view(torch.ones(2))), is_lazy(torch._efficientzerotensor(2))
    (False, True, True)
    """
    return x.is_neg() or x._is_zerotensor()


def plain(weight: Tensor) -> Tensor:
    """The same memory as a plain tensor. A quantized parameter is a subclass of Tensor, which checks every operation on it."""
    transformed = not torch.compiler.is_compiling() and transforming() and not weight.is_floating_point()
    if transformed and torch._C._functorch.is_batchedtensor(weight):
        raise ValueError(
            "a quantized weight must be one weight, got the codes of several under vmap: each has scales of its own. "
            "Call the layers in turn"
        )
    if type(weight) is Tensor and not weight.requires_grad:
        return weight
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach()


def as_bytes(codes: Tensor) -> Tensor:
    """Packed codes of any storage dtype as flat uint8.

    >>> as_bytes(torch.tensor([[1.0]]))
    tensor([  0,   0, 128,  63], dtype=torch.uint8)
    """
    flat = plain(codes).reshape(-1)
    if flat.dtype == torch.uint8:
        return flat
    if jit_tracing():  # it records `view(dtype)` as an operator that does not exist
        raise NotImplementedError(f"torch.jit.trace needs codes of quant_storage torch.uint8, got {flat.dtype}")
    return flat.view(torch.uint8)


class NoThread(RuntimeError):
    """No thread can be started: Python ends, or their number is limited."""


def in_another_thread(function: Callable[[], T]) -> T:
    """The result of a function that runs in a thread of its own, where no mode, autocast, default device or graph capture is.

    No signal interrupts it: what a handler raises in the thread that waits, as Ctrl-C does, is raised after the function's end.
    Raises NoThread if none can be started.

    Not by concurrent.futures, which takes no work once the main thread has ended.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # the caller's, in whose thread it is raised
            errors.append(error)
        ended.set()

    try:
        threading.Thread(target=run).start()
    except RuntimeError as error:
        raise NoThread(str(error)) from error
    raised: list[BaseException] = []
    while not ended.is_set():
        try:
            ended.wait()  # not `join`: interrupted, it takes a thread for ended (Python before 3.13)
        except BaseException as error:
            raised.append(error)
    if raised or errors:
        raise (*raised, *errors)[0]
    return results[0]


def cached(maxsize: int | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Like `functools.lru_cache`, for a function that makes a tensor on the device that is among its arguments.

    What is made while somebody traces is not kept. While torch.compile warms up or records a CUDA graph, memory that this thread
    allocates on the GPU belongs to the graph, and torch raises if any of it is still in use afterwards. So what is kept is made
    by another thread.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        def whole(*args: P.args, **kwargs: P.kwargs) -> T:
            made = make(*args, **kwargs)
            if isinstance(made, Tensor) and made.is_cuda:
                torch.cuda.current_stream(made.device).synchronize()  # other streams will read it
            return made

        @functools.lru_cache(maxsize)
        def kept(*args: P.args, **kwargs: P.kwargs) -> T:
            if not any(isinstance(x, torch.device) and x.type == "cuda" for x in args):
                return make(*args, **kwargs)
            return in_another_thread(functools.partial(whole, *args, **kwargs))

        @functools.wraps(make)
        def found(*args: P.args, **kwargs: P.kwargs) -> T:
            return make(*args, **kwargs) if tracing() else kept(*args, **kwargs)  # type: ignore[arg-type]

        found.kept = kept  # type: ignore[attr-defined]
        return found

    return decorate
