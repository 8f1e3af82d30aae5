"""Backends with habits that somebody may have who has read the pages alone, each wrong in one way.

Conventions of packages that have other formats, roundings of other languages, and scales where another layout has them.
"""

from dataclasses import replace
from typing import Any

import torch
from kit_mutants import Mutant, following, mutant, right
from torch import Tensor

from bnbref.conformance.dialects import FP4_OF_EIGHTHS, NF4_FOUR_DIGITS, REFERENCE


def _half_up(x: Tensor, threshold: float) -> Any:
    codes, absmax, columns = right("int8_quantize")(x, threshold)
    if threshold > 0 or not bool((absmax > 0).all()):
        return codes, absmax, columns
    scaled = x.float() * (127 * (1 / absmax)).view(*x.shape[:-1], 1)
    return (scaled + 0.5).floor().to(torch.int8), absmax, columns


def _float16_sums(a: Tensor, **rest: Any) -> Any:
    return right("gemm_4bit")(a=a, **rest).clamp(-65504, 65504).half().to(a.dtype)


def _scales_of_rows(absmax: Tensor, blocksize: int, shape: tuple[int, int], **rest: Any) -> Any:
    """The first scale of a row, where rows begin inside blocks."""
    rows, columns = shape
    if columns % blocksize == 0:
        return right("gemm_4bit")(absmax=absmax, blocksize=blocksize, shape=shape, **rest)
    weight = {"packed": rest["packed"], "quant_type": rest["quant_type"], "blocksize": blocksize, "shape": shape}
    values = right("dequantize_4bit")(absmax=torch.ones_like(absmax), dtype=torch.float32, **weight)
    own = absmax[torch.arange(rows) * columns // blocksize]
    y = rest["a"].float() @ (values * own[:, None]).t()
    return (y if rest["bias"] is None else y + rest["bias"].float()).to(rest["a"].dtype)


MUTANTS: list[Mutant] = [
    following("ties-to-upper", replace(REFERENCE, ties="upper"), "quantize_blockwise"),
    following("absmax-floor", replace(REFERENCE, floor=1e-12), "quantize_blockwise"),
    following("tiny-is-one", replace(REFERENCE, tiny_is_one=True), "quantize_4bit"),
    following("four-digits", replace(REFERENCE, nf4=NF4_FOUR_DIGITS), "quantize_4bit"),
    following("compared-in-16-bits", replace(REFERENCE, in_dtype=True), "quantize_4bit"),
    following("fp4-of-eighths", replace(REFERENCE, fp4=FP4_OF_EIGHTHS), "quantize_4bit"),
    mutant("half-up", "ties are rounded up", int8_quantize=_half_up),
    mutant("float16-sums", "a product is rounded to float16", gemm_4bit=_float16_sums),
    mutant("scales-of-rows", "a row of a weight has one scale", gemm_4bit=_scales_of_rows),
]
