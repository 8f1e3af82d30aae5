"""Sixteen floats looked up by four bits: `table[codes & 15]`, as one shuffle instruction where the CPU has one.

A 4-bit decoder is this lookup.  Inductor spells an indexed load as a scalar loop, and the plain substitute, a tree of fifteen
selects, costs fifty vector instructions.  AVX512 holds the whole table in one register (`vpermps`), AVX2 in two (`vpermps`
twice, and a blend).  `enable` teaches that to Inductor's C++ backend as the lowering of two operators:

    lookup16(codes, table)                    table[codes & 15]
    scaled16(codes, scale, table, dtype)      T(fl(table[codes & 15] * scale)),  T = dtype

The second one is a decoded weight.  Where a vector of codes shares one scale it scales and rounds the *table* and then looks up:
sixteen products and roundings for a block, whatever its size, and the same bits, since each entry sees the same two operations.

Everywhere else (another device, another instruction set, a torch whose internals look different, an exported program) plain
tensor operations give the same bits, more slowly.  `lowering()` says which.
"""

import struct
from typing import Any

import torch
from torch import Tensor, library

from bnbref.context import exporting
from bnbref.kernels.compiler import digest_of
from bnbref.kernels.floats import rounded, rounded_bits

Table = tuple[float, ...]

_AVX512 = "vpermps"
_AVX2 = "2 x vpermps + blend"
_PLAIN = "plain tensor operations"
_chosen: str | None = None  # what `enable` found: None before it was called

_TEXT = digest_of(__name__)

_operators = library.Library("bnbref", "FRAGMENT")
_operators.define(
    "lut16(Tensor codes, float[] table, int width, str text='') -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_operators.define(
    "scaled16(Tensor codes, Tensor scale, float[] table, ScalarType dtype, bool bits, int width, str text='') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    # Tensors, because torch.where of two Python floats has the default dtype, which is bfloat16 while transformers loads a model.
    row = [torch.full((), value, dtype=torch.float32, device=codes.device) for value in table]
    for bit in (1, 2, 4, 8):
        high = (codes & bit) != 0
        row = [torch.where(high, odd, even) for even, odd in zip(row[::2], row[1::2], strict=True)]
    return row[0]


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


def scaled16(codes: Tensor, scale: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
    """`T(fl(table[codes & 15] * scale))` as float32, T = dtype (float32, bfloat16 or float16); codes and scale broadcast.  Exact.

    >>> scaled16(torch.tensor([3], dtype=torch.int32), torch.tensor([1.01]), tuple(range(16)), torch.bfloat16)
    tensor([3.0312])
    """
    return _scaled(codes, scale, table, dtype, bits=False)


def scaled16_bits(codes: Tensor, scale: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
    """The bits of what `scaled16` rounds to, in the lower end of an int32 with zeros above: two make a word of output.  Exact.

    >>> scaled16_bits(torch.tensor([15], dtype=torch.int32), torch.tensor([1.0]), (0.0,) * 15 + (-1.0,), torch.bfloat16) == 0xBF80
    tensor([True])
    """
    return _scaled(codes, scale, table, dtype, bits=True)


def _scaled(codes: Tensor, scale: Tensor, table: Table, dtype: torch.dtype, bits: bool) -> Tensor:
    _check(table)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"scale must be float32, got {scale.dtype}")
    if _native(codes):
        native: Tensor = torch.ops.bnbref.scaled16(codes.to(torch.int32), scale, table, dtype, bits, enable(), _TEXT)
        return native
    value = tree16(codes, table) if torch.compiler.is_compiling() else gather16(codes, table)
    return rounded_bits(value * scale, dtype) if bits else rounded(value * scale, dtype)


def _check(table: Table) -> None:
    if len(table) != 16:
        raise ValueError(f"table must have 16 entries, got {len(table)}")


def _native(codes: Tensor) -> bool:
    """Whether to call our operator, which Inductor knows as shuffles: when compiling for a CPU that has them. An eager call has
    nothing from it, and an exported program must run where bnbref is not installed."""
    return torch.compiler.is_compiling() and not exporting() and codes.device.type == "cpu" and enable() > 0


# ---- the operators: what a backend other than Inductor runs ---------------------------------------------------------


@library.impl(_operators, "lut16", "CompositeExplicitAutograd")
def _(codes: Tensor, table: list[float], width: int, text: str = "") -> Tensor:
    return gather16(codes, tuple(table))


@library.register_fake("bnbref::lut16", lib=_operators)  # type: ignore[untyped-decorator]
def _(codes: Tensor, table: list[float], width: int, text: str = "") -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


@library.impl(_operators, "scaled16", "CompositeExplicitAutograd")
def _(
    codes: Tensor, scale: Tensor, table: list[float], dtype: torch.dtype, bits: bool, width: int, text: str = ""
) -> Tensor:
    value = gather16(codes, tuple(table)) * scale
    return (rounded_bits(value, dtype) if bits else rounded(value, dtype)).contiguous()


@library.register_fake("bnbref::scaled16", lib=_operators)  # type: ignore[untyped-decorator]
def _(
    codes: Tensor, scale: Tensor, table: list[float], dtype: torch.dtype, bits: bool, width: int, text: str = ""
) -> Tensor:
    shape = torch.broadcast_shapes(codes.shape, scale.shape)
    return torch.empty(shape, dtype=torch.int32 if bits else torch.float32, device=codes.device)


# ---- teaching Inductor ----------------------------------------------------------------------------------------------


def lowering() -> str:
    """What compiled CPU code does for a lookup: "vpermps", "2 x vpermps + blend", or "plain tensor operations: <why>"."""
    enable()
    return str(_chosen)


def enable() -> int:
    """Registers the lowerings with Inductor, once per process, and returns the width of their vectors in bits.

    Returns 0 where they cannot be registered; then plain operations are compiled. It imports `torch._inductor`, and is therefore
    called by the first compilation, not at import. The width is an argument of the operators, because Inductor's cache on disk
    does not tell CPUs apart, and so is a digest of this file.
    """
    global _chosen
    if _chosen is None:
        try:
            _chosen = _register()
        except (ImportError, AttributeError, TypeError) as error:  # a torch whose internals have moved
            _chosen = f"{_PLAIN}: Inductor's internals are not as expected ({error})"
    return {_AVX512: 512, _AVX2: 256}.get(_chosen, 0)


# As torch.compiler.assume_constant_result does, without importing torch._dynamo.
enable._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    for owner, name in (
        (lowerings, "make_pointwise"),
        (lowerings, "register_lowering"),
        (lowerings, "fallback_handler"),
        (lowerings, "broadcast_tensors"),
        (CppVecKernel, "_get_num_vectors"),
        (CppVecKernel, "broadcast"),
        (CppOverrides, "where"),
        (CppVecOverrides, "where"),
        (DefaultHandler, "_default"),
        (DtypePropagationOpsHandler, "constant"),
        (ShapePropagationOpsHandler, "constant"),
    ):
        getattr(owner, name)

    def declare(table: Table, dtype: torch.dtype, bits: bool, scaled: bool) -> str:
        """Makes an operation of Inductor and returns its name. Operations take elements of tensors only, so that everything else
        (the table, the dtype) must be part of the name."""
        name = f"bnbref16_{str(dtype)[6:]}_{bits:d}{scaled:d}_{struct.pack('<16f', *table).hex()}"
        if hasattr(CppOverrides, name):
            return name
        result = torch.int32 if bits else torch.float32

        def scalar(q: Any, scale: Any = None) -> str:
            return _scalar_code(q, scale, table, dtype, bits)

        def vector(cls: Any, q: Any, scale: Any = None) -> str:
            if not q.is_vec:
                if scale is None or not scale.is_vec:
                    return scalar(q, scale)
                q = V.kernel.broadcast(q)
            return _vector_code(
                q, scale, table, dtype, bits, V.kernel.vec_isa.bit_width(), V.kernel._get_num_vectors(torch.int32)
            )

        setattr(DefaultHandler, name, lambda self, *args, **kwargs: self._default(name, args, kwargs))
        setattr(CppOverrides, name, staticmethod(scalar))
        setattr(CppVecOverrides, name, classmethod(vector))  # a staticmethod would get its scalars broadcast
        setattr(DtypePropagationOpsHandler, name, staticmethod(lambda *args: result))
        setattr(ShapePropagationOpsHandler, name, staticmethod(lambda *args: args[0].shape))
        return name

    def lower(op: Any, inputs: list[Any], rest: tuple[Any, ...], dtype: torch.dtype, bits: bool) -> Any:
        codes, isa = inputs[0], cpu_vec_isa.pick_vec_isa()
        if codes.get_device().type != "cpu" or codes.get_dtype() != torch.int32 or (isa and not _width(isa)):
            return lowerings.fallback_handler(op, add_to_fallback_set=False)(
                *inputs, *rest
            )  # a call of the operator itself
        name = declare(tuple(map(float, rest[0])), dtype, bits, len(inputs) == 2)
        if len(inputs) == 2:
            inputs = lowerings.broadcast_tensors(*inputs)

        def inner(*elements: Any) -> Any:
            return getattr(ops, name)(*elements)

        return lowerings.make_pointwise(inner, override_return_dtype=torch.int32 if bits else torch.float32)(*inputs)

    @lowerings.register_lowering(torch.ops.bnbref.lut16.default, type_promotion_kind=None)
    def _(codes: Any, table: list[float], width: int, text: str = "") -> Any:
        return lower(torch.ops.bnbref.lut16.default, [codes], (table, width, text), torch.float32, False)

    @lowerings.register_lowering(torch.ops.bnbref.scaled16.default, type_promotion_kind=None)
    def _(
        codes: Any, scale: Any, table: list[float], dtype: torch.dtype, bits: bool, width: int, text: str = ""
    ) -> Any:
        return lower(torch.ops.bnbref.scaled16.default, [codes, scale], (table, dtype, bits, width, text), dtype, bits)

    return {512: _AVX512, 256: _AVX2}[width]


# ---- the C++ --------------------------------------------------------------------------------------------------------


def _literals(table: Table) -> str:
    return ", ".join(
        "-INFINITY" if v == -torch.inf else "INFINITY" if v == torch.inf else "NAN" if v != v else f"{v.hex()}f"
        for v in table
    )


def _scalar_code(q: Any, scale: Any, table: Table, dtype: torch.dtype, bits: bool) -> str:
    value = "table[q & 15]" + ("" if scale is None else " * s")
    if dtype == torch.float32:
        value = f"c10::bit_cast<int32_t>({value})" if bits else value
    else:
        rounded = f"{'c10::BFloat16' if dtype == torch.bfloat16 else 'c10::Half'}({value})"
        value = f"static_cast<int32_t>({rounded}.x)" if bits else f"static_cast<float>({rounded})"
    return (
        f"([](int32_t q, float s) {{ static const float table[16] = {{{_literals(table)}}}; return {value}; }})"
        f"({q}, {1 if scale is None else scale})"
    )


def _vector_code(q: Any, scale: Any, table: Table, dtype: torch.dtype, bits: bool, width: int, count: int) -> str:
    """A lambda applied to a vector, or to each of the `count` vectors that a tile of 16-bit elements needs."""
    m, lanes = f"_mm{width}", width // 32
    tables = [f"{m}_setr_ps({_literals(table[i : i + lanes])})" for i in range(0, 16, lanes)]

    def look(tables: list[str]) -> str:
        if width == 512:
            return f"_mm512_permutexvar_ps(q, {tables[0]})"
        low, high = (f"_mm256_permutevar8x32_ps({part}, q)" for part in tables)
        return f"_mm256_blendv_ps({low}, {high}, _mm256_castsi256_ps(_mm256_slli_epi32(q, 28)))"

    def product(value: str, factor: str) -> str:
        return _rounding_code(f"{m}_mul_ps({value}, {factor})", dtype, bits, width)

    if scale is None:
        value, kind = look(tables), "int"
    elif scale.is_vec:
        value, kind = product(look(tables), "s"), "at::vec::Vectorized<float>"
    else:
        value, kind = look([product(part, f"{m}_set1_ps(s)") for part in tables]), "float"
    out = (
        f"at::vec::Vectorized<int32_t>({m}_castps_si{width}({value}))"
        if bits
        else f"at::vec::Vectorized<float>({value})"
    )
    one = f"[](at::vec::Vectorized<int32_t> q, {kind} s) {{ return {out}; }}"
    if count == 1:
        return f"({one})({q}, {0 if scale is None else scale})"
    each = [
        f"one({q}[{i}], {0 if scale is None else f'{scale}[{i}]' if scale.is_vec else scale})" for i in range(count)
    ]
    # By operator[] and the default constructor, which VectorizedN has for every count.
    fill = " ".join(f"all[{i}] = {part};" for i, part in enumerate(each))
    return f"[&] {{ auto one = {one}; at::vec::VectorizedN<{'int32_t' if bits else 'float'},{count}> all; {fill} return all; }}()"


def _rounding_code(value: str, dtype: torch.dtype, bits: bool, width: int) -> str:
    """Round a vector of float32 to nearest even; the bits in the low half of each lane, or the rounded float32."""
    m, si = f"_mm{width}", f"si{width}"
    if dtype == torch.float32:
        return value
    if dtype == torch.float16:
        half = f"{m}_cvtps_ph({value}, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)"
        return f"{m}_castsi{width}_ps({m}_cvtepu16_epi32({half}))" if bits else f"{m}_cvtph_ps({half})"
    # bfloat16 is rounded with integers, because the instruction for it, vcvtneps2bf16, flushes subnormals: half an ulp is added,
    # less one where the last bit that is kept is 0.
    word = f"{m}_castps_{si}(v)"
    odd = f"{m}_and_{si}({m}_srli_epi32({word}, 16), {m}_set1_epi32(1))"
    sum_ = f"{m}_add_epi32({word}, {m}_add_epi32({m}_set1_epi32(32767), {odd}))"
    nan = f"{m}_set1_epi32(0x7fc00000)"
    if width == 512:
        whole = f"_mm512_mask_mov_epi32({sum_}, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), {nan})"
    else:
        whole = f"_mm256_blendv_epi8({sum_}, {nan}, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)))"
    half = f"{m}_srli_epi32({whole}, 16)" if bits else f"{m}_and_{si}({whole}, {m}_set1_epi32(-65536))"
    return f"[&] {{ auto v = {value}; return {m}_castsi{width}_ps({half}); }}()"
