"""Sixteen floats looked up by four bits: `table[codes & 15]`, as one shuffle instruction where the CPU has one.

A 4-bit decoder is this lookup. Inductor spells an indexed load as a scalar loop, and the plain substitute, a tree of fifteen
selects, costs fifty vector instructions. AVX512 holds the whole table in one register (`vpermps`), AVX2 in two (`vpermps`
twice, and a blend). `enable` teaches that to Inductor's C++ backend as the lowering of two operators:

    lookup16(codes, table)                         table[codes & 15]
    scaled16_bits(codes, scale, table, dtype)      the bits of T(fl(table[codes & 15] * scale)),  T = dtype, a float of 16 bits

The second one is a decoded weight. Where a vector of codes shares one scale it scales and rounds the *table* and then looks up:
sixteen products and roundings for a block, whatever its size, and the same bits, since each entry sees the same two operations.

Everywhere else (another device, another instruction set, a torch whose internals look different, an exported program) plain
tensor operations give the same bits, more slowly. `lowering()` says which. The C++ itself is in `lookup16_cpp`.
"""

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from bnbref.context import constant_of_graphs, exporting
from bnbref.kernels import lookup16_cpp
from bnbref.kernels.floats import choose, rounded_bits
from bnbref.kernels.lookup16_cpp import Table, scalar_code, vector_code
from bnbref.kernels.taught import digest_of, operator

_AVX512 = "vpermps"
_AVX2 = "2 x vpermps + blend"
_PLAIN = "plain tensor operations"

_TEXT = digest_of(__name__, lookup16_cpp.__name__)


# ---- definitions ----------------------------------------------------------------------------------------------------


def gather16(codes: Tensor, table: Table) -> Tensor:
    """The definition of `lookup16`: `table[codes & 15]` as float32, any shape.  Exact.

    >>> gather16(torch.tensor([0, 15, 16], dtype=torch.int32), tuple(range(16)))
    tensor([ 0., 15.,  0.])
    """
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[(codes & 15).to(torch.int64)]


def tree16(codes: Tensor, table: Table) -> Tensor:
    """`gather16` with four tests and fifteen selects: no memory access, any device, any compiler.  Exact.

    >>> codes = torch.arange(-40, 40, dtype=torch.int32)
    >>> torch.equal(tree16(codes, tuple(range(16))), gather16(codes, tuple(range(16))))
    True
    """
    return choose([(codes & bit) != 0 for bit in (8, 4, 2, 1)], table, codes)


# ---- what the package calls -----------------------------------------------------------------------------------------


def lookup16(codes: Tensor, table: Table) -> Tensor:
    """`table[codes & 15]` as float32, for integer codes of any shape; bits above the fourth are ignored.  Exact.

    >>> lookup16(torch.tensor([[0, 15], [16, -1]], dtype=torch.int32), tuple(range(16)))
    tensor([[ 0., 15.],
            [ 0., 15.]])
    """
    _check(table)
    if _native(codes):
        native: Tensor = torch.ops.bnbref.lut16(codes.to(torch.int32), table, enable(), _TEXT)
        return native
    return tree16(codes, table) if torch.compiler.is_compiling() else gather16(codes, table)


def scaled16_bits(codes: Tensor, scale: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
    """The bits of `T(fl(table[codes & 15] * scale))` in the lower half of an int32, with zeros above.  Exact.

    Two of them make a word of output. dtype: T, bfloat16 or float16. codes and scale, float32, broadcast.

    >>> scaled16_bits(torch.tensor([15], dtype=torch.int32), torch.tensor([1.0]), (0.0,) * 15 + (-1.0,), torch.bfloat16) == 0xBF80
    tensor([True])
    """
    _check(table)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be bfloat16 or float16, got {dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"scale must be float32, got {scale.dtype}")
    if _native(codes):
        native: Tensor = torch.ops.bnbref.scaled16(codes.to(torch.int32), scale, table, dtype, enable(), _TEXT)
        return native
    value = tree16(codes, table) if torch.compiler.is_compiling() else gather16(codes, table)
    return rounded_bits(value * scale, dtype)


def _check(table: Table) -> None:
    if len(table) != 16:
        raise ValueError(f"table must have 16 entries, got {len(table)}")


def _native(codes: Tensor) -> bool:
    """Whether to call our operator, which Inductor knows as shuffles: when compiling for a CPU that has them. An eager call has
    nothing from it, and an exported program must run where bnbref is not installed."""
    return torch.compiler.is_compiling() and not exporting() and codes.device.type == "cpu" and enable() > 0


# ---- the operators: what a backend other than Inductor runs ---------------------------------------------------------


@operator(
    "lut16(Tensor codes, float[] table, int width, str text='') -> Tensor",
    lambda codes, table, width, text="": codes.new_empty(codes.shape, dtype=torch.float32),
)
def _(codes: Tensor, table: list[float], width: int, text: str = "") -> Tensor:
    return gather16(codes, tuple(table))


@operator(
    "scaled16(Tensor codes, Tensor scale, float[] table, ScalarType dtype, int width, str text='') -> Tensor",
    lambda codes, scale, *_: codes.new_empty(torch.broadcast_shapes(codes.shape, scale.shape), dtype=torch.int32),
)
def _(codes: Tensor, scale: Tensor, table: list[float], dtype: torch.dtype, width: int, text: str = "") -> Tensor:
    return rounded_bits(gather16(codes, tuple(table)) * scale, dtype).contiguous()


# ---- teaching Inductor ----------------------------------------------------------------------------------------------


@functools.cache
def lowering() -> str:
    """What compiled CPU code does for a lookup: "vpermps", "2 x vpermps + blend", or "plain tensor operations: <why>".

    Registers the lowerings with Inductor when it is first called, and so imports `torch._inductor`.
    """
    try:
        return _register()
    except (ImportError, AttributeError, TypeError) as error:  # a torch whose internals have moved
        return f"{_PLAIN}: Inductor's internals are not as expected ({error})"


@constant_of_graphs
def enable() -> int:
    """The width in bits of the vectors of the lowerings, 0 where there are none, and plain operations are compiled.

    The first compilation calls it. The width is an argument of the operators, because Inductor's cache on disk does not tell CPUs
    apart, and so is a digest of the lowering.
    """
    return {_AVX512: 512, _AVX2: 256}.get(lowering(), 0)


def _width(isa: Any) -> int:
    """How many bits the vectors of an instruction set have, if it is one of x86 with the shuffles, else 0."""
    width = int(isa.bit_width()) if isa else 0
    return width if {512: "avx512", 256: "avx2"}.get(width, "?") in str(isa) else 0


def _register() -> str:
    from torch._inductor import cpu_vec_isa
    from torch._inductor import lowering as lowerings
    from torch._inductor.codegen.cpp import CppOverrides, CppVecKernel, CppVecOverrides
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
    from torch._inductor.ops_handler import DefaultHandler
    from torch._inductor.shape_propagation import ShapePropagationOpsHandler
    from torch._inductor.virtualized import V, ops

    width = _width(cpu_vec_isa.pick_vec_isa())
    if not width:
        return f"{_PLAIN}: no AVX2 or AVX512"
    used: dict[Any, str] = {
        lowerings: "make_pointwise register_lowering fallback_handler broadcast_tensors",
        CppVecKernel: "_get_num_vectors broadcast", CppOverrides: "where", CppVecOverrides: "where",
        DefaultHandler: "_default", DtypePropagationOpsHandler: "constant", ShapePropagationOpsHandler: "constant",
    }  # fmt: skip
    for owner, names in used.items():
        for name in names.split():
            getattr(owner, name)

    def declare(table: Table, dtype: torch.dtype | None) -> str:
        """Makes an operation of Inductor and returns its name: a look-up, or a scaled one that is rounded to a dtype. Operations
        take elements of tensors only, so that everything else (the table, the dtype) must be part of the name."""
        name = f"bnbref16_{str(dtype).rpartition('.')[2]}_{struct.pack('<16f', *table).hex()}"
        if hasattr(CppOverrides, name):
            return name
        result = torch.float32 if dtype is None else torch.int32

        def scalar(q: Any, scale: Any = None) -> str:
            return scalar_code(q, scale, table, dtype)

        def vector(cls: Any, q: Any, scale: Any = None) -> str:
            if not q.is_vec:
                if scale is None or not scale.is_vec:
                    return scalar(q, scale)
                q = V.kernel.broadcast(q)
            return vector_code(
                q, scale, table, dtype, V.kernel.vec_isa.bit_width(), V.kernel._get_num_vectors(torch.int32)
            )

        setattr(DefaultHandler, name, lambda self, *args, **kwargs: self._default(name, args, kwargs))
        setattr(CppOverrides, name, staticmethod(scalar))
        setattr(CppVecOverrides, name, classmethod(vector))  # a staticmethod would get its scalars broadcast
        setattr(DtypePropagationOpsHandler, name, staticmethod(lambda *args: result))
        setattr(ShapePropagationOpsHandler, name, staticmethod(lambda *args: args[0].shape))
        return name

    def lower(op: Any, inputs: list[Any], table: list[float], dtype: torch.dtype | None, *rest: Any) -> Any:
        codes, isa = inputs[0], cpu_vec_isa.pick_vec_isa()
        if codes.get_device().type != "cpu" or codes.get_dtype() != torch.int32 or (isa and not _width(isa)):
            call = lowerings.fallback_handler(op, add_to_fallback_set=False)  # of the operator itself
            return call(*inputs, table, *rest)
        name = declare(tuple(map(float, table)), dtype)

        def inner(*elements: Any) -> Any:
            return getattr(ops, name)(*elements)

        result = torch.float32 if dtype is None else torch.int32
        return lowerings.make_pointwise(inner, override_return_dtype=result)(*lowerings.broadcast_tensors(*inputs))

    @lowerings.register_lowering(torch.ops.bnbref.lut16.default, type_promotion_kind=None)
    def _(codes: Any, table: list[float], width: int, text: str = "") -> Any:
        return lower(torch.ops.bnbref.lut16.default, [codes], table, None, width, text)

    @lowerings.register_lowering(torch.ops.bnbref.scaled16.default, type_promotion_kind=None)
    def _(codes: Any, scale: Any, table: list[float], dtype: torch.dtype, width: int, text: str = "") -> Any:
        return lower(torch.ops.bnbref.scaled16.default, [codes, scale], table, dtype, dtype, width, text)

    return {512: _AVX512, 256: _AVX2}[width]
