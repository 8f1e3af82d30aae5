"""Backends that are wrong on purpose, each in one way: a conformance kit that lets one of them pass has a hole.

Some are the reference with one convention of a real backend (dialects.py), some one changed line of code.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnbref import fourbit, int8
from bnbref.codebooks import DYNAMIC, NF4, value_table
from bnbref.conformance.backends import Backend
from bnbref.conformance.backends.reference import Reference
from bnbref.conformance.dialects import FP4_BY_MIDPOINTS, REFERENCE, TEXT, Dialect, in_words
from bnbref.conformance.predictions import PREDICT
from bnbref.kernels import eager

_REFERENCE = Reference()


class Mutant(NamedTuple):
    """A wrong backend, which has only the operations that are wrong, and what is wrong with them."""

    name: str
    wrong: str
    backend: Backend


MUTANTS: list[Mutant] = []
"""Of what goes forwards, and of files. Those of gradients and optimizers are in kit_mutants_training.py."""


def mutant(name: str, wrong: str, **functions: Callable[..., Any]) -> Mutant:
    """One that has these functions, uncompiled."""
    return Mutant(name, wrong, Backend(name, functions, within=eager))


def right(op: str) -> Callable[..., Any]:
    """The reference's function."""
    function: Callable[..., Any] = getattr(_REFERENCE, op)
    return function


def following(name: str, dialect: Dialect, *operations: str) -> Mutant:
    """The reference with the one convention of a dialect that is not the reference's."""
    different = next(f for f in TEXT if getattr(dialect, f) != getattr(REFERENCE, f))
    functions = {op: _predicted(dialect, op) for op in operations}
    return mutant(name, in_words(different, getattr(dialect, different)), **functions)


def _predicted(dialect: Dialect, op: str) -> Callable[..., Any]:
    return lambda **arguments: PREDICT[op](dialect, **arguments)


def _add(name: str, wrong: str, **functions: Callable[..., Any]) -> None:
    MUTANTS.append(mutant(name, wrong, **functions))


# ---- conventions of real backends -----------------------------------------------------------------------------------


def _follow(name: str, dialect: Dialect, *operations: str) -> None:
    MUTANTS.append(following(name, dialect, *operations))


_QUANTIZE = ("quantize_blockwise", "quantize_4bit")
_follow("fp4-midpoints", replace(REFERENCE, fp4=FP4_BY_MIDPOINTS), "quantize_4bit")
_follow("ties-to-lower", replace(REFERENCE, ties="lower"), "quantize_blockwise")
_follow("binned-codes", replace(REFERENCE, ties="bins"), "quantize_blockwise")
_follow("division-in-the-tail", replace(REFERENCE, division="tail"), "quantize_4bit")
_follow("division-in-the-tail-8bit", replace(REFERENCE, division="tail"), "quantize_blockwise")
_follow("absmax-clamped", replace(REFERENCE, small="clamp"), "quantize_4bit")
_follow("subnormal-absmax-kept", replace(REFERENCE, small="keep"), "quantize_blockwise")
_follow("reciprocal-flushed", replace(REFERENCE, large=True), "quantize_4bit")
_follow("nested-zero-block-code-0", replace(REFERENCE, zero_block=0), "quantize_4bit_nested")
_follow("scale-index-by-row", replace(REFERENCE, row_scales=True), "dequantize_4bit")
_follow("vector-as-row", replace(REFERENCE, vector_as_row=True), "dequantize_4bit")
_follow("one-byte-transposed", replace(REFERENCE, row_transposed=True), "dequantize_4bit_nested")
_follow("constant-of-int8", replace(REFERENCE, int8_constant=6.200124e-05), "int8_mm_dequant")
_follow("product-in-float32", replace(REFERENCE, int8_float32=True), "int8_matmul")
_follow("int8-matrices-only", replace(REFERENCE, int8_2d=True), "int8_mm_dequant")
_follow("bfloat16-nan", replace(REFERENCE, bfloat16_nan=True), "dequantize_blockwise")


# ---- one changed line: quantization ---------------------------------------------------------------------------------


def _swapped_nibbles(x: Tensor, blocksize: int, quant_type: str) -> Any:
    packed, absmax = right("quantize_4bit")(x, blocksize, quant_type)
    return packed << 4 | packed >> 4, absmax


def _at_least(x: Tensor, blocksize: int, quant_type: str) -> Any:
    """`>=` where there should be `>`."""
    if quant_type != "nf4":
        return right("quantize_4bit")(x, blocksize, quant_type)
    below = [torch.tensor(t).nextafter(torch.tensor(-torch.inf)).item() for t in NF4.thresholds]
    packed, absmax = fourbit.quantize(x, replace(NF4, thresholds=tuple(below)), blocksize)
    return packed.view(-1), absmax


def _maximum_for_magnitude(x: Tensor, blocksize: int, quant_type: str) -> Any:
    packed, absmax = right("quantize_4bit")(x, blocksize, quant_type)
    blocks = torch.nn.functional.pad(x.reshape(-1).float(), (0, -x.numel() % blocksize)).view(-1, blocksize)
    return packed, blocks.amax(-1) if absmax.numel() else absmax


def _stale_absmax(x: Tensor, values: Tensor, blocksize: int) -> Any:
    codes, absmax = right("quantize_blockwise")(x, values, blocksize)
    return codes, torch.cat((absmax[:-1], absmax[-2:-1])) if absmax.numel() > 1 else absmax


def _pad_of_code_0(x: Tensor, blocksize: int, quant_type: str) -> Any:
    packed, absmax = right("quantize_4bit")(x, blocksize, quant_type)
    if x.numel() % 2:
        packed[-1] &= 0xF0
    return packed, absmax


def _padded_sizes(x: Tensor, blocksize: int, quant_type: str) -> Any:
    packed, absmax = right("quantize_4bit")(x, blocksize, quant_type)
    return torch.nn.functional.pad(packed, (0, -packed.numel() % (blocksize // 2))), absmax


def _normalized_in_place(x: Tensor, blocksize: int, quant_type: str) -> Any:
    made = right("quantize_4bit")(x, blocksize, quant_type)
    x.mul_(2)
    return made


def _memory_order(x: Tensor, values: Tensor, blocksize: int) -> Any:
    memory = x.t().contiguous().view(x.shape) if x.dim() == 2 and not x.is_contiguous() else x
    return right("quantize_blockwise")(memory, values, blocksize)


def _int32_codes(x: Tensor, values: Tensor, blocksize: int) -> Any:
    codes, absmax = right("quantize_blockwise")(x, values, blocksize)
    return codes.to(torch.int32), absmax


def _nan_spreads(x: Tensor, blocksize: int, quant_type: str) -> Any:
    packed, absmax = right("quantize_4bit")(x, blocksize, quant_type)
    return packed, absmax if bool(x.isfinite().all()) else absmax * torch.nan


def _largest_blocksize(x: Tensor, values: Tensor, blocksize: int) -> Any:
    return right("quantize_blockwise")(x, values, min(blocksize, 2048))


def _sign_of_minus_zero(x: Tensor, values: Tensor, blocksize: int) -> Any:
    codes, absmax = right("quantize_blockwise")(x, values, blocksize)
    return torch.where((x == 0) & x.signbit(), codes - 1, codes), absmax


_add("nibbles-swapped", "the first element is in the low nibble", quantize_4bit=_swapped_nibbles)
_add("at-least", "thresholds that are equal are counted", quantize_4bit=_at_least)
_add("maximum-for-magnitude", "absmax is the maximum", quantize_4bit=_maximum_for_magnitude)
_add("stale-absmax", "the last block has the absmax of the one before", quantize_blockwise=_stale_absmax)
_add("pad-of-code-0", "the nibble after an odd end is 0", quantize_4bit=_pad_of_code_0)
_add("padded-sizes", "results are as long as whole blocks", quantize_4bit=_padded_sizes)
_add("input-modified", "the input is scaled in place", quantize_4bit=_normalized_in_place)
_add("memory-order", "strides are ignored", quantize_blockwise=_memory_order)
_add("int32-codes", "codes have the dtype of an index", quantize_blockwise=_int32_codes)
_add("nan-spreads", "one NaN spoils every block", quantize_4bit=_nan_spreads)
_add("blocksize-4096", "blocksize 4096 is taken for 2048", quantize_blockwise=_largest_blocksize)
_add("minus-zero", "-0.0 has the code below 0's", quantize_blockwise=_sign_of_minus_zero)


# ---- one changed line: dequantization -------------------------------------------------------------------------------


def _scale_rounded(packed: Tensor, absmax: Tensor, dtype: torch.dtype, **rest: Any) -> Any:
    return right("dequantize_4bit")(packed, absmax.to(dtype).float(), dtype=dtype, **rest)


def _value_rounded(codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype) -> Any:
    return right("dequantize_blockwise")(codes, absmax, values.to(dtype).float(), blocksize, dtype)


def _truncated(codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype) -> Any:
    y = right("dequantize_blockwise")(codes, absmax, values, blocksize, torch.float32)
    return (y.view(torch.int32) & -65536).view(torch.float32).to(dtype) if dtype == torch.bfloat16 else y.to(dtype)


def _sign_lost(packed: Tensor, quant_type: str, **rest: Any) -> Any:
    return right("dequantize_4bit")(packed & 0x77 if quant_type == "fp4" else packed, quant_type=quant_type, **rest)


def _offset_lost(offset: Tensor, **rest: Any) -> Any:
    return right("dequantize_4bit_nested")(offset=torch.zeros_like(offset), **rest)


def _half_offset(absmax2: Tensor, **rest: Any) -> Any:
    return right("dequantize_4bit_nested")(absmax2=absmax2.half().float(), **rest)


def _nested_by_64(x: Tensor, blocksize: int, quant_type: str) -> Any:
    packed, absmax = right("quantize_4bit")(x, blocksize, quant_type)
    codes, absmax2 = right("quantize_blockwise")(absmax - absmax.mean(), value_table(DYNAMIC, torch.device("cpu")), 64)
    return packed, codes, absmax2, absmax.mean()


_add("scale-rounded", "the scale is rounded to the output dtype first", dequantize_4bit=_scale_rounded)
_add("value-rounded", "values are rounded to the output dtype first", dequantize_blockwise=_value_rounded)
_add("truncated", "bfloat16 by cutting off the lower bits", dequantize_blockwise=_truncated)
_add("sign-lost", "FP4's sign bit is dropped", dequantize_4bit=_sign_lost)
_add("offset-lost", "the offset of nested scales is dropped", dequantize_4bit_nested=_offset_lost)
_add("nested-in-half", "nested scales in float16", dequantize_4bit_nested=_half_offset)
_add("nested-by-64", "nested scales in blocks of 64", quantize_4bit_nested=_nested_by_64)


# ---- one changed line: products -------------------------------------------------------------------------------------


def _first_row(a: Tensor, **rest: Any) -> Any:
    y = right("gemm_4bit")(a=a, **rest)
    flat = y.view(-1, y.shape[-1])
    flat[1:] = 0
    return y


def _bias_lost(bias: Tensor | None, **rest: Any) -> Any:
    return right("gemm_4bit")(bias=None, **rest)


def _half_away(x: Tensor, threshold: float) -> Any:
    codes, absmax, columns = right("int8_quantize")(x, threshold)
    if threshold > 0 or not bool((absmax > 0).all()):
        return codes, absmax, columns
    scaled = x.float() * (127 * (1 / absmax)).view(*x.shape[:-1], 1)
    return (scaled.sign() * (scaled.abs() + 0.5).floor()).to(torch.int8), absmax, columns


def _outliers_kept(x: Tensor, threshold: float) -> Any:
    codes, absmax, columns = right("int8_quantize")(x, threshold)
    return (
        (right("int8_quantize")(x.clamp(-threshold, threshold), 0.0)[0] if threshold > 0 else codes),
        absmax,
        columns,
    )


def _above_threshold(x: Tensor, threshold: float) -> Any:
    beyond = torch.tensor(threshold).nextafter(torch.tensor(torch.inf)).item() if threshold > 0 else 0.0
    return right("int8_quantize")(x, beyond)


def _outliers_counted(x: Tensor, threshold: float) -> Any:
    codes, _, columns = right("int8_quantize")(x, threshold)
    return codes, right("int8_quantize")(x, 0.0)[1], columns


def _float16_detour(dtype: torch.dtype, **rest: Any) -> Any:
    return right("int8_mm_dequant")(dtype=torch.float16, **rest).to(dtype)


def _unsigned_operand(a: Tensor, b: Tensor) -> Any:
    return int8.multiply(a.clamp(min=-127), b)


_add("first-row", "the first row alone is multiplied", gemm_4bit=_first_row)
_add("bias-lost", "the bias is dropped", gemm_4bit=_bias_lost)
_add("half-away", "ties are rounded away from zero", int8_quantize=_half_away)
_add("outliers-kept", "columns with outliers are not zeroed", int8_quantize=_outliers_kept)
_add("above-threshold", "an element at the threshold is no outlier", int8_quantize=_above_threshold)
_add("outliers-counted", "absmax counts the outliers", int8_quantize=_outliers_counted)
_add("float16-detour", "through float16 to every dtype", int8_mm_dequant=_float16_detour)
_add("minus-128", "-128 is taken for -127", int8_matmul=_unsigned_operand)


# ---- one changed line: files ----------------------------------------------------------------------------------------


def _compact_json(**arguments: Any) -> Any:
    file = right("save_4bit")(**arguments)
    text = bytes(file["state"].tolist()).replace(b", ", b",").replace(b": ", b":")
    return {**file, "state": torch.tensor(list(text), dtype=torch.uint8)}


def _half_absmax(absmax: Tensor, nested_absmax: Tensor | None, **rest: Any) -> Any:
    absmax = absmax if nested_absmax is not None else absmax.half().float()
    inner = None if nested_absmax is None else nested_absmax * 1.001
    return right("load_4bit")(absmax=absmax, nested_absmax=inner, **rest)


def _float32_on_load(**arguments: Any) -> Any:
    return right("load_4bit")(**arguments).float()


_add("compact-json", "the state is JSON without blanks", save_4bit=_compact_json)
_add("nested-scales-off", "nested scales are one thousandth too large", load_4bit=_half_absmax)
_add("float32-on-load", "weights are loaded as float32", load_4bit=_float32_on_load)
