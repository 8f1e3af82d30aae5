"""The same kernels in Triton's interpreter, on tensors of the CPU: the bits of the definition, or what differs.

Its arithmetic is numpy's, one IEEE operation at a time. So it shows what the written kernel computes, and neither contraction
nor an approximate division, which are ptxas' and which `written` looks for. What is taught to it: bfloat16, to which
it truncates and whose subnormals it loses; a function of CUDA's library; Inductor's reductions, element by element else.
"""

import contextlib
import copy
import json
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, and Triton's own are on import

import calls
import numpy as np
import pretend
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from conftest import difference, same_bits
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.runtime.triton_heuristics import GridExpr

from bnbref import few_rows
from bnbref.kernels import Kernel, by_address, byte_permute

np.seterr(all="ignore")  # infinities and NaN are made on purpose
Builder = interpreter.InterpreterBuilder
_cast, _reduce = Builder.cast_impl, interpreter.ReduceOps.apply_impl


def cast(self: Any, source: Any, target: Any) -> Any:
    """To bfloat16 to the nearest, the even one of two, and from there exactly, subnormals too."""
    if (source.dtype.scalar, target.scalar) == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), target.scalar)
    if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, target)
    bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), target.scalar)


def nearbyint(x: Any, _semantic: Any = None) -> Any:
    """Of CUDA's library, which the interpreter does not have."""
    return tl.tensor(interpreter.TensorHandle(np.rint(x.handle.data), x.handle.dtype), x.type)


def reduce(self: Any, operands: tuple[Any, ...]) -> Any:
    """Inductor's reductions by numpy's, which take a NaN along as they do; element by element it would be minutes."""
    for combine, by in ((triton_helpers.maximum, np.max), (triton_helpers._any_combine, np.any)):
        if self.combine_fn == combine:
            return self.min_max(operands[0], val_reduce_op=by)
    return _reduce(self, operands)


Builder.cast_impl = cast
triton_helpers.libdevice.nearbyint = nearbyint
interpreter.ReduceOps.apply_impl = reduce


class Launched:
    """A generated kernel. A block takes numpy some milliseconds, so blocks are larger than a GPU's; which is a constant to it.

    Not where the configuration is fixed: there Inductor leaves out the masks that blocks of this size do not need.
    """

    def __init__(self, name: str, source: str, device_str: str) -> None:
        self.tuner = getattr(PyCodeCache.load(source), name)

    def run(self, *args: Any, stream: int) -> None:
        config = copy.copy(self.tuner.configs[0])
        if self.tuner.heuristic_type != HeuristicType.FIXED:
            size = 1024 if len(config.kwargs) == 1 else 256
            config.kwargs = {name: max(size, block) for name, block in config.kwargs.items()}
        names = [name for name in self.tuner.fn.arg_names if name not in config.kwargs]
        grid = GridExpr.from_meta(self.tuner.inductor_meta, config).eval_slow(dict(zip(names, args, strict=False)))
        self.tuner.fn.run(*args, grid=grid, warmup=False, **config.kwargs)


class Compiler:
    """In place of Inductor's `AsyncCompile`."""

    triton = staticmethod(Launched)

    def wait(self, scope: Any) -> None:
        """Nothing is under way."""


def load(source: str) -> pretend.Call:
    """The generated wrapper, its memory and its kernels on the CPU."""
    for ours, theirs in (
        ("async_compile = Compiler()", "async_compile = AsyncCompile()"),
        ("empty_strided_cuda = empty_strided_cpu #", "empty_strided_cuda = "),
        ("nullcontext()", "torch.cuda._DeviceGuard(0)"),
    ):
        assert theirs in source, theirs
        source = source.replace(theirs, ours)
    names: dict[str, Any] = {"Compiler": Compiler, "nullcontext": contextlib.nullcontext, "__name__": "generated"}
    exec(compile(source, "generated", "exec"), names)
    call: pretend.Call = names["call"]
    return call


REAL: dict[int, torch.Tensor] = {}
"""What a fake tensor of the present call stands for. It and its aliases share a storage, which is the key."""


def loaded(source: str) -> pretend.Call:
    """The generated wrapper, for fake inputs."""
    run = load(source)
    return lambda inputs: run([REAL[x.untyped_storage()._cdata] if isinstance(x, torch.Tensor) else x for x in inputs])


def interpret(kernel: Kernel[..., Any], tensors: Sequence[Any], constants: Any) -> Any:
    """What the kernel would return on a GPU; what it writes to is written to."""
    tables = kernel.tables(*tensors, **constants)
    fakes, fake_tables = pretend.on_gpu(tensors), pretend.on_gpu(tables)
    REAL.clear()
    pairs = zip([*fakes, *fake_tables], [*tensors, *tables], strict=True)
    REAL.update({f.untyped_storage()._cdata: t for f, t in pairs if f is not None})
    results = pretend.generate(kernel, fakes, fake_tables, constants, loaded)
    return tuple(kernel.parameters.written(tensors)) if kernel.parameters.written(tensors) else results


def magnitudes(kernel: Kernel[..., Any], tensors: Sequence[Any], constants: Any) -> torch.Tensor:
    """The sums of magnitudes of a bounded kernel: the kernel itself, given magnitudes, and a codebook of magnitudes."""
    sizes = [t if t is None or not t.is_floating_point() else t.abs() for t in tensors]
    if "codebook" in constants:
        values = tuple(map(abs, constants["codebook"].values))
        book = SimpleNamespace(values=values)
        with mock.patch.object(few_rows, "value_table", return_value=torch.tensor(values)):
            return kernel.definition(*sizes, **{**constants, "codebook": book, "dtype": torch.float32}).double()
    sizes[0], sizes[2] = (t.to(torch.int32).abs().to(torch.int8) for t in (tensors[0], tensors[2]))
    return kernel.definition(*sizes, **{**constants, "dtype": torch.float32}).double()


def bound(kernel: Kernel[..., Any], tensors: Sequence[Any], constants: Any) -> torch.Tensor:
    """The largest difference of two results of a bounded kernel, each a sum of k products in float32, in some order, with a few
    roundings more, and rounded once: (k + 5) u and v times the sum of the magnitudes, 2^-11 for values that are float16 in a row
    of 16 bits, and 1.01 for what is of higher order."""
    dtype, k = constants["dtype"], tensors[0][0].numel()
    values = 2.0**-11 if dtype != torch.float32 and "codebook" in constants else 0.0
    relative = (k + 5) * 2.0**-24 + torch.finfo(dtype).eps / 2 + values
    return 2 * 1.01 * relative * magnitudes(kernel, tensors, constants)


def main() -> None:
    """A line of JSON for each call of a kernel."""
    pretend.install()
    # The interpreter runs no assembly; tests/test_byte_permute.py and tests/test_by_address.py do.
    byte_permute.is_taught = by_address.is_taught = lambda name: False

    def run(kernel: Kernel[..., Any], tensors: list[Any], constants: Any) -> Any:
        want = kernel.definition(*tensors, **constants)
        got = interpret(kernel, tensors, constants)
        line = {"kernel": kernel.name, "variant": calls.variant(kernel.name, tensors, constants)}
        results = want if isinstance(want, tuple) else (want,)
        line["numbers"] = sum(t.numel() for t in results)
        if kernel.exact:
            right = same_bits(got, want)
        else:
            right = bool(((got.double() - want.double()).abs() <= bound(kernel, tensors, constants)).all())
        line["difference"] = "" if right else difference(got, want)
        print(json.dumps(line), flush=True)
        return got

    calls.run_asked(run)


if __name__ == "__main__":
    main()
