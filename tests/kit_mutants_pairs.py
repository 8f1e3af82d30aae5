"""Backends, each wrong where two settings meet, as a kernel that is compiled for each combination may be; or for one number of 16
bits, or beyond 2^16 elements. They are right everywhere else."""

from collections.abc import Callable
from typing import Any

import torch
from kit_mutants import Mutant
from kit_mutants_version4 import Change, adding
from torch import Tensor

MUTANTS: list[Mutant] = []
"""All of them. pairs.py and large.py have the cases that find them."""

_add = adding(MUTANTS)


def _where(when: Callable[[dict[str, Any]], bool], wrong: Change) -> Change:
    """The right result but where that is so."""
    return lambda f, k: wrong(f, k) if when(k) else f(**k)


def _first(change: Callable[[Tensor], Tensor]) -> Change:
    """The first result, changed."""

    def changed(f: Callable[..., Any], k: dict[str, Any]) -> Any:
        made = f(**k)
        if isinstance(made, dict):
            return {**made, "p": change(made["p"])}
        return (change(made[0]), *made[1:]) if isinstance(made, tuple) else change(made)

    return changed


def _without(**dropped: Any) -> Change:
    return lambda f, k: f(**{**k, **dropped})


def _end(y: Tensor) -> Tensor:
    """The last element is that of the first."""
    y = y.clone()
    y.view(-1)[-1] = y.view(-1)[0] + 1 if y.view(-1)[-1] == y.view(-1)[0] else y.view(-1)[0]
    return y


def _blocks_of_64(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    count = torch.Size(k["shape"]).numel() if "shape" in k else k["codes"].numel()
    return f(**{**k, "blocksize": 64, "absmax": k["absmax"].repeat(k["blocksize"] // 64)[: -(-count // 64)]})


def _one_inner_scale(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    packed, codes, absmax2, offset = f(**k)
    return packed, codes, absmax2[:1].expand(absmax2.shape).clone(), offset


def _of(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == dtype


HALF, BRAIN = torch.float16, torch.bfloat16

_add("bfloat16-blocks-of-128", "bfloat16 in blocks of 128: the last code is the first one",
     _where(lambda k: _of(k["x"], BRAIN) and k["blocksize"] == 128, _first(_end)), "quantize_4bit")  # fmt: skip
_add("float16-odd", "float16 of odd sizes: the last code is the first one",
     _where(lambda k: _of(k["x"], HALF) and k["x"].numel() % 2 == 1, _first(_end)), "quantize_blockwise",
     "quantize_4bit")  # fmt: skip
_add("bfloat16-transposed", "a transposed bfloat16 is read in the order of its memory",
     _where(lambda k: _of(k["x"], BRAIN) and not k["x"].is_contiguous(),
            lambda f, k: f(**{**k, "x": k["x"].t().contiguous().view(k["x"].shape)})), "quantize_4bit")  # fmt: skip
_add("float16-scales-of-64", "float16 in blocks of 1024: scales are taken for those of blocks of 64",
     _where(lambda k: k["dtype"] == HALF and k["blocksize"] == 1024, _blocks_of_64),
     "dequantize_4bit", "dequantize_blockwise")  # fmt: skip
_add("unsigned-cube", "unsigned codes of three dimensions: the last element is the first one",
     _where(lambda k: k["codes"].dim() == 3 and not bool((k["values"] < 0).any()), _first(_end)),
     "dequantize_blockwise")  # fmt: skip
_add(
    "one-inner-scale",
    "scales of scales: that of the first block of 256 alone",
    _one_inner_scale,
    "quantize_4bit_nested",
)
_add("bias-of-one-row-lost", "a single row: the bias is left out",
     _where(lambda k: k["a"].numel() == k["shape"][1], _without(bias=None)), "gemm_4bit")  # fmt: skip
_add("bfloat16-product-of-64", "bfloat16 by a weight in blocks of 1024: scales are taken for those of blocks of 64",
     _where(lambda k: _of(k["a"], BRAIN) and k["blocksize"] == 1024, _blocks_of_64), "gemm_4bit")  # fmt: skip
_add("fp4-gradient-of-two-rows", "two rows by an FP4 weight: the last element of the gradient is the first one",
     _where(lambda k: k["quant_type"] == "fp4" and k["grad"].shape[-2] == 2, _first(_end)), "gemm_4bit_backward")  # fmt: skip
_add("whole-thresholds", "thresholds are whole numbers",
     lambda f, k: f(**{**k, "threshold": float(int(k["threshold"]))}), "int8_quantize")  # fmt: skip
_add("bfloat16-bias-lost", "a bfloat16 bias is left out", _where(lambda k: k["dtype"] == BRAIN, _without(bias=None)),
     "int8_mm_dequant")  # fmt: skip
_add("bfloat16-lion", "Lion in bfloat16 has no decay",
     _where(lambda k: _of(k["p"], BRAIN) and k["optimizer"] == "lion", _without(weight_decay=0.0)),
     "optimizer_32bit", "optimizer_8bit")  # fmt: skip
_add("float16-ademamix", "AdEMAMix in float16 has alpha 0",
     _where(lambda k: _of(k["p"], HALF) and k["optimizer"] == "ademamix", _without(alpha=0.0)),
     "optimizer_32bit", "optimizer_8bit")  # fmt: skip
_add("float16-matrix-left", "a float16 matrix: the last element is not stepped",
     _where(lambda k: _of(k["p"], HALF) and k["p"].dim() == 2, _first(_end)), "optimizer_32bit", "optimizer_8bit")  # fmt: skip


def _one_number(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """One bfloat16 has the code of the number before it."""
    x = k["x"]
    return f(**{**k, "x": torch.where(x == -0.69140625, x[:1] * 0, x)} if _of(x, BRAIN) and x.dim() == 1 else k)


_MANY = 2**16
_add("one-bfloat16", "a bfloat16 of -0.69140625 is taken for 0", _one_number, "quantize_4bit")
_add("beyond-65536", "beyond 2^16 elements the last one is wrong",
     _where(lambda k: next(x for x in (k.get("x"), k.get("codes"), k.get("packed")) if x is not None).numel() > _MANY // 2,
            _first(_end)), "quantize_4bit", "quantize_blockwise", "dequantize_4bit", "dequantize_blockwise")  # fmt: skip
_add("last-step-beyond-4096", "beyond 4096 elements the last one is not stepped",
     _where(lambda k: k["p"].numel() > 4096, _first(_end)), "optimizer_32bit", "optimizer_8bit")  # fmt: skip
