"""Sixteen floats looked up by four bits: `table[codes & 15]`, as one shuffle instruction where the CPU has one.

A 4-bit decoder is this lookup.  Inductor spells an indexed load as a scalar loop, and the plain substitute, a tree of fifteen
selects, costs fifty vector instructions.  AVX512 holds the whole table in one register (`vpermps`), AVX2 in two
(`vpermps` twice, and a blend): `enable` teaches that instruction to Inductor's C++ backend, as a lowering of the operator
`bnbref::lut16`.  Everywhere else (another device, another instruction set, a torch whose internals look different, an
exported program) the select tree is used: the same bits, more slowly.  `lowering()` says which.
"""
from typing import Any

import torch
from torch import Tensor

Table = tuple[float, ...]

_library = torch.library.Library("bnbref", "FRAGMENT")
_library.define("lut16(Tensor codes, float[] table) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_chosen: str | None = None          # what `enable` found: None before it was called


def gather16(codes: Tensor, table: Table) -> Tensor:
    """The definition: `table[codes & 15]` as float32, any shape.  Exact.

    >>> gather16(torch.tensor([0, 15, 16], dtype=torch.int32), tuple(range(16)))
    tensor([ 0., 15.,  0.])
    """
    values = torch.tensor(table, dtype=torch.float32, device=codes.device)
    return values[(codes & 15).to(torch.int64)]


def tree16(codes: Tensor, table: Table) -> Tensor:
    """`gather16` with four tests and fifteen selects: no memory access, any device, any compiler.  Exact.

    >>> codes = torch.arange(-40, 40, dtype=torch.int32)
    >>> bool((tree16(codes, tuple(range(16))) == gather16(codes, tuple(range(16)))).all())
    True
    """
    # float32 scalars, not Python floats: where(mask, 1.0, 0.0) has the *default* dtype, bfloat16 while transformers loads a model
    row = [torch.full((), value, dtype=torch.float32, device=codes.device) for value in table]
    for bit in (1, 2, 4, 8):
        high = (codes & bit) != 0
        row = [torch.where(high, odd, even) for even, odd in zip(row[::2], row[1::2])]
    return row[0]


def lookup16(codes: Tensor, table: Table) -> Tensor:
    """`table[codes & 15]` as float32 for integer codes of any shape; the bits above the fourth are ignored.  Exact.

    Eager it is `gather16`; compiled for a CPU it is one instruction (`lowering()`), else `tree16`.

    >>> lookup16(torch.tensor([[0, 15], [16, -1]], dtype=torch.int32), tuple(range(16)))
    tensor([[ 0., 15.],
            [ 0., 15.]])
    """
    if len(table) != 16:
        raise ValueError(f"table must have 16 entries, got {len(table)}")
    if torch.compiler.is_exporting():
        return tree16(codes, table)             # an exported program must run where bnbref is not installed
    if not torch.compiler.is_compiling():
        return gather16(codes, table)
    if codes.device.type == "cpu" and enable():
        return torch.ops.bnbref.lut16(codes.to(torch.int32), table)
    return tree16(codes, table)


@torch.library.impl(_library, "lut16", "CompositeExplicitAutograd")
def _(codes: Tensor, table: list[float]) -> Tensor:
    return gather16(codes, tuple(table))


@torch.library.register_fake("bnbref::lut16", lib=_library)
def _(codes: Tensor, table: list[float]) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def lowering() -> str:
    """What compiled CPU code does for a lookup: "vpermps", "2 x vpermps + blend", or "select tree" and why."""
    enable()
    return str(_chosen)


def enable() -> bool:
    """Teach `lut16` to Inductor, once per process; False where it cannot be (then `lookup16` is a select tree).

    This imports `torch._inductor`, so it is left to the first compilation.
    """
    global _chosen
    if _chosen is None:
        try:
            _chosen = _register()
        except (ImportError, AttributeError, TypeError) as error:          # a torch whose internals have moved
            _chosen = f"select tree: Inductor's internals are not as expected ({error})"
    return not _chosen.startswith("select tree")


enable._dynamo_marked_constant = True       # torch.compiler.assume_constant_result, without importing torch._dynamo


# ---- Inductor's side ------------------------------------------------------------------------------------------------------------

_INSTRUCTION = {512: "vpermps", 256: "2 x vpermps + blend"}


def _bits() -> int:
    """Width of the x86 vectors that Inductor compiles for under its current options; 0 without AVX2 or AVX512."""
    from torch._inductor import cpu_vec_isa
    isa = cpu_vec_isa.pick_vec_isa()
    name = str(isa)                                                        # "avx512", "avx2", "avx512_vnni amx_tile", "asimd", ...
    width = int(isa.bit_width()) if isa else 0
    return width if name.startswith({512: "avx512", 256: "avx2"}.get(width, "-")) else 0


def _scalar(x: Any, table: Table) -> str:
    return f"[](int32_t q) {{ static const float table[16] = {{{_literals(table)}}}; return table[q & 15]; }}({x})"


def _vector(x: Any, table: Table) -> str:
    """C++ for a vector, or for the n vectors that a tile of 16-bit elements needs."""
    from torch._inductor.virtualized import V
    if V.kernel.vec_isa.bit_width() == 512:
        body = f"at::vec::Vectorized<float>(_mm512_permutexvar_ps(q, _mm512_setr_ps({_literals(table)})))"
    else:
        half = [f"_mm256_permutevar8x32_ps(_mm256_setr_ps({_literals(part)}), q)" for part in (table[:8], table[8:])]
        body = f"at::vec::Vectorized<float>(_mm256_blendv_ps({', '.join(half)}, _mm256_castsi256_ps(_mm256_slli_epi32(q, 28))))"
    one = f"[](at::vec::Vectorized<int32_t> q) {{ return {body}; }}"
    count = V.kernel._get_num_vectors(torch.int32)
    if count == 1:
        return f"({one})({x})"
    each = ", ".join(f"one({x}[{i}])" for i in range(count))
    return f"[&] {{ auto one = {one}; return at::vec::VectorizedN<float,{count}>({each}); }}()"


def _literals(table: Table) -> str:
    return ", ".join(f"{value.hex()}f" for value in table)


def _register() -> str:
    from torch._inductor import lowering as lowerings
    from torch._inductor.codegen.cpp import CppOverrides, CppVecKernel, CppVecOverrides
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
    from torch._inductor.ops_handler import DefaultHandler
    from torch._inductor.shape_propagation import ShapePropagationOpsHandler
    from torch._inductor.virtualized import ops

    width = _bits()
    if not width:
        return "select tree: no AVX2 or AVX512"
    for owner, name in ((lowerings, "make_pointwise"), (lowerings, "register_lowering"), (CppVecKernel, "_get_num_vectors"),
                        (CppVecOverrides, "where"), (CppOverrides, "where"), (DtypePropagationOpsHandler, "constant"),
                        (ShapePropagationOpsHandler, "constant"), (DefaultHandler, "_default")):
        getattr(owner, name)

    def declare(table: Table) -> str:
        """The name of this table's operation: Inductor's operations take tensors, so the table is in the name."""
        name = "bnbref_lut16_" + torch.tensor(table, dtype=torch.float32).view(torch.uint8).numpy().tobytes().hex()
        if not hasattr(CppOverrides, name):
            def scalar(x: Any) -> str: return _scalar(x, table)
            def vector(x: Any) -> str: return _vector(x, table)
            scalar.__name__ = vector.__name__ = name                     # CppVecOverrides falls back to the scalar of this name
            setattr(DefaultHandler, name, lambda self, *args, **kwargs: self._default(name, args, kwargs))
            setattr(CppOverrides, name, staticmethod(scalar))
            setattr(CppVecOverrides, name, staticmethod(vector))
            setattr(DtypePropagationOpsHandler, name, staticmethod(lambda x: torch.float32))
            setattr(ShapePropagationOpsHandler, name, staticmethod(lambda x: x.shape))
        return name

    def tree(x: Any, table: Table) -> Any:
        row = [ops.constant(value, torch.float32) for value in table]
        for bit in (1, 2, 4, 8):
            high = ops.ne(ops.bitwise_and(x, ops.constant(bit, torch.int32)), ops.constant(0, torch.int32))
            row = [ops.where(high, odd, even) for even, odd in zip(row[::2], row[1::2])]
        return row[0]

    @lowerings.register_lowering(torch.ops.bnbref.lut16.default, type_promotion_kind=None)
    def lower(codes: Any, table: list[float]) -> Any:
        fixed = tuple(map(float, table))
        if codes.get_device().type == "cpu" and codes.get_dtype() == torch.int32 and _bits():
            name = declare(fixed)
            inner = lambda x: getattr(ops, name)(x)
        else:
            inner = lambda x: tree(x, fixed)
        return lowerings.make_pointwise(inner, override_return_dtype=torch.float32)(codes)

    return _INSTRUCTION[width]
