"""The compiled variants of a kernel: what each is specialised on, and the one call of `torch.compile`."""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.context import NoThread, in_another_thread
from bnbref.kernels.compiler import options_for
from bnbref.kernels.configured import in_effect, is_configured
from bnbref.kernels.direct import alone, direct
from bnbref.kernels.formulations import Formulation
from bnbref.kernels.kept_launches import find, keep
from bnbref.kernels.launch import Call, bound, launched_alone, launches, recorded
from bnbref.kernels.parameters import Parameters

# On a GPU, Inductor chooses the block sizes of a kernel by timing its first call. A tensor of a few thousand elements must not
# choose them for one of millions, so a variant whose block sizes are timed exists twice there: for tensors below this many
# elements, and for the others (docs: How to read the code, table "choices of the door").
LARGE = 2**22

# What somebody may set for his own graphs, and so in the whole process, by torch._dynamo.config or torch._functorch.config, and
# what must not reach ours. A variant is compiled anew for each device, number of threads and default dtype that somebody asks
# for. The check of each graph, `verify_correctness`, fails where a size is dynamic. Random numbers, of which no kernel has any,
# would be an argument more, and need CUDA.
_OF_DYNAMO = {
    "recompile_limit": 2**31,
    "accumulated_recompile_limit": 2**31,
    "error_on_recompile": False,
    "verify_correctness": False,
}
_OF_AOT_AUTOGRAD = {"functionalize_rng_ops": False}

# Inductor decides by the size that it expects of a dynamic dimension how loops are fused and work is split, and keeps that code
# on disk for all sizes. On a CPU it is told this size, so that a small first tensor does not decide for large ones (table
# "choices of the door"). On a GPU it is not: there Inductor guards what it has decided by size, and a guard that holds for
# this size but not for the actual one is an error.
_TYPICAL_SIZE = 2**16


def import_compiler() -> None:
    """Imports torch's compiler, in the order in which another thread may be importing it for its own torch.compile.

    A thread of its own does it, which Ctrl-C does not reach. Python cannot repeat an import that was interrupted: a module that
    was whole by then is not imported again, and so is not entered into its package, which is. Raises ImportError or, of a source
    that a locale in ASCII cannot read, UnicodeDecodeError.
    """
    names = "torch._dynamo", "torch._inductor.compile_fx"

    def load() -> None:
        try:
            for name in names:
                importlib.import_module(name)
        except (ImportError, UnicodeDecodeError):
            raise
        except Exception as error:  # whatever a triton that is broken, or a folder of that name, raises on its way
            raise ImportError(f"{type(error).__name__}: {error}") from error

    if names[-1] in sys.modules:
        return load()  # which waits if another thread is importing them
    try:
        in_another_thread(load)
    except NoThread:
        load()


class Variants(dict[Any, Callable[..., Any]]):
    """The compiled formulations of a kernel, by the device type, dtypes, static sizes and constants that each is for."""

    def __init__(self, name: str, parameters: Parameters) -> None:
        super().__init__()
        self._name, self._parameters = name, parameters

    def call(
        self, device_type: str, formulation: Formulation, args: Sequence[Any], tables: tuple[Tensor, ...],
        constants: Mapping[str, Any], writes: bool, place: Path | None,
    ) -> tuple[Any, Callable[[Sequence[Any]], Any] | None]:  # fmt: skip
        """A call by way of Dynamo, which finds or compiles the code for these sizes.

        place: where the launch is kept on disk that it ends in, if it ends in one. Returns the result, and the function that
        makes the next call of this layout without Dynamo, or None if there can be none.
        """
        # Aliases of the arguments, because Dynamo marks dynamic sizes on the tensor itself, and the argument is the caller's. The
        # alias of a parameter is a plain tensor too, so that parameters and tensors share a variant.
        tensors = [None if t is None else _alias(t) for t in args]
        if writes:
            tensors = self._parameters.apart(tensors)
        into = self._parameters.written(range(len(args))) if writes else []
        dynamic = self._parameters.with_dynamic(tensors)
        named = {name: constants[name] for name in formulation.constants if name in constants}
        key = (device_type, *(_signature(t, dims) for t, dims in dynamic), *named.items(), *map(type, named.values()))
        key = (*key, *(_signature(t, ()) for t in tables), writes)
        own = formulation.options(device_type, tensors, constants)
        timed = device_type != "cpu" and not is_configured(own)
        large = timed and max(t.numel() for t in tensors if t is not None) >= LARGE
        if large:
            key = (*key, "large")
        variant = self.get(key)
        if variant is None:
            options = options_for(device_type, own, large)
            variant = self[key] = _compiled(self._name, formulation, len(tensors), into, constants, options)
        hint = _TYPICAL_SIZE if device_type == "cpu" else None
        for tensor, dims in dynamic:
            if tensor is not None:
                for dim in dims:
                    if tensor.shape[dim] > 1:  # Dynamo always specialises sizes 0 and 1
                        torch._dynamo.mark_dynamic(tensor, dim, hint_override=hint)
        everything = [*tensors, *tables]
        from torch._inductor.output_code import CompiledFxGraph

        launching = launches() if device_type == "cuda" else contextlib.nullcontext(list[Call]())
        with recorded(CompiledFxGraph, "__call__") as ran, launching as launched, _own_settings():
            result = variant(*everything)
        call = direct(ran, everything, len(args), result, into)
        one = launched_alone(launched, tensors, tables, () if writes else result)
        if call is not None and one is not None:
            launch, kernel = one
            index = next(t.device.index for t in args if t is not None)  # another device may be the current one
            call = alone(bound(launch, kernel.function, tables, len(args), index), launch.several, into, call)
            if place is not None:
                keep(place, launch, kernel, index)
        return (tuple(args[i] for i in into) if writes else result), call

    def kept(
        self, args: Sequence[Any], tables: tuple[Tensor, ...], writes: bool, place: Path,
        otherwise: Callable[[Sequence[Any]], Any],
    ) -> Callable[[Sequence[Any]], Any] | None:  # fmt: skip
        """The function that makes the calls of this layout by the launch that is kept there; None if none is.

        otherwise: makes the calls that the launch is not for.
        """
        index = torch.cuda.current_device()
        found = find(place, index)
        if found is None:
            return None
        launch, function = found
        into = self._parameters.written(range(len(args))) if writes else []
        return alone(bound(launch, function, tables, len(args), index), launch.several, into, otherwise)


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Inside, Dynamo compiles, whatever somebody has set for his own graphs.

    The stance that he gave it (`torch.compiler.set_stance`) may forbid to compile what is new, or take another backend.
    `missing_compiler` asks for the one that switches Dynamo off.
    """
    from torch._dynamo import eval_frame
    from torch._functorch import config

    theirs, ours = eval_frame._stance, eval_frame.DynamoStance()
    eval_frame._stance = ours  # `set_stance` raises where Dynamo watches the frames around ours
    try:
        with torch._dynamo.config.patch(_OF_DYNAMO), config.patch(_OF_AOT_AUTOGRAD):
            yield
    finally:
        if eval_frame._stance is ours:  # else somebody has set another one meanwhile, in another thread
            eval_frame._stance = theirs


def _alias(tensor: Tensor) -> Tensor:
    """The same memory as a plain tensor, without gradient.

    A dimension of size 1 has the stride of a contiguous tensor. No element has another place by it, but Dynamo compiles anew for
    each stride that it meets, and results of Inductor's code have others there.
    """
    alias, strides = tensor.detach(), list(tensor.stride())
    for dim in reversed(range(alias.dim())):
        if alias.shape[dim] == 1:
            strides[dim] = alias.shape[dim + 1] * strides[dim + 1] if dim + 1 < alias.dim() else 1
    return alias if alias.stride() == tuple(strides) else alias.as_strided(alias.shape, strides)


def _signature(tensor: Tensor | None, dynamic: tuple[int, ...]) -> Any:
    """What a variant is specialised on: the dtype, the sizes that are not dynamic, and of dynamic sizes whether they are 0 or 1,
    which Dynamo always specialises."""
    if tensor is None:
        return None
    return tensor.dtype, tuple(min(n, 2) if dim in dynamic else n for dim, n in enumerate(tensor.shape))


def _compiled(
    name: str, formulation: Formulation, count: int, into: Sequence[int], constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Callable[..., Any]:  # fmt: skip
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
