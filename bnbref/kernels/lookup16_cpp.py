"""The C++ of `lookup16`: expressions that Inductor writes into its kernels for x86, for one code or for a vector of them.

dtype: None for a look-up, whose result is float32. Of a scaled look-up it is bfloat16 or float16, and the result is the bits of
the rounded product in the lower half of an int32.
"""

from typing import Any

import torch

Table = tuple[float, ...]


def _literals(table: Table) -> str:
    return ", ".join(
        "-INFINITY" if v == -torch.inf else "INFINITY" if v == torch.inf else "NAN" if v != v else f"{v.hex()}f"
        for v in table
    )


def scalar_code(q: Any, scale: Any, table: Table, dtype: torch.dtype | None) -> str:
    """A lambda applied to one code, and to its scale if there is one."""
    value = "table[q & 15]"
    if dtype is not None:
        value = f"static_cast<int32_t>({'c10::BFloat16' if dtype == torch.bfloat16 else 'c10::Half'}({value} * s).x)"
    return (
        f"([](int32_t q, float s) {{ static const float table[16] = {{{_literals(table)}}}; return {value}; }})"
        f"({q}, {1 if scale is None else scale})"
    )


def vector_code(q: Any, scale: Any, table: Table, dtype: torch.dtype | None, width: int, count: int) -> str:
    """A lambda applied to a vector of `width` bits, or to each of the `count` vectors that a tile of 16-bit elements needs."""
    m, lanes = f"_mm{width}", width // 32
    tables = [f"{m}_setr_ps({_literals(table[i : i + lanes])})" for i in range(0, 16, lanes)]

    def look(tables: list[str]) -> str:
        if width == 512:
            return f"_mm512_permutexvar_ps(q, {tables[0]})"
        low, high = (f"_mm256_permutevar8x32_ps({part}, q)" for part in tables)
        return f"_mm256_blendv_ps({low}, {high}, _mm256_castsi256_ps(_mm256_slli_epi32(q, 28)))"

    if dtype is None:
        out, kind = f"at::vec::Vectorized<float>({look(tables)})", "int"
    elif scale.is_vec:
        value = _rounded(f"{m}_mul_ps({look(tables)}, s)", dtype, width)
        out, kind = f"at::vec::Vectorized<int32_t>({m}_castps_si{width}({value}))", "at::vec::Vectorized<float>"
    else:  # sixteen products and roundings, of the table
        value = look([_rounded(f"{m}_mul_ps({part}, {m}_set1_ps(s))", dtype, width) for part in tables])
        out, kind = f"at::vec::Vectorized<int32_t>({m}_castps_si{width}({value}))", "float"
    one = f"[](at::vec::Vectorized<int32_t> q, {kind} s) {{ return {out}; }}"
    if count == 1:
        return f"({one})({q}, {0 if scale is None else scale})"
    each = [
        f"one({q}[{i}], {0 if scale is None else f'{scale}[{i}]' if scale.is_vec else scale})" for i in range(count)
    ]
    # By operator[] and the default constructor, which VectorizedN has for every count.
    fill = " ".join(f"all[{i}] = {part};" for i, part in enumerate(each))
    element = "float" if dtype is None else "int32_t"
    return f"[&] {{ auto one = {one}; at::vec::VectorizedN<{element},{count}> all; {fill} return all; }}()"


def _rounded(value: str, dtype: torch.dtype, width: int) -> str:
    """A vector of float32 rounded to nearest even: the bits in the low half of each lane, of a vector whose type is float32."""
    m, si = f"_mm{width}", f"si{width}"
    if dtype == torch.float16:
        half = f"{m}_cvtps_ph({value}, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)"
        return f"{m}_castsi{width}_ps({m}_cvtepu16_epi32({half}))"
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
    return f"[&] {{ auto v = {value}; return {m}_castsi{width}_ps({m}_srli_epi32({whole}, 16)); }}()"
