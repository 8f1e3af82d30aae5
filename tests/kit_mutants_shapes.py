"""Backends, each wrong in one way where a shape or strides are not what a kernel was written for."""

from collections.abc import Callable
from typing import Any

import torch
from kit_mutants import Mutant, right
from kit_mutants_version4 import STEPS, Change, adding, given, made
from torch import Tensor

from bnbref import int8

MUTANTS: list[Mutant] = []
"""All of them."""

_add = adding(MUTANTS)


def _square_as_it_is(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    square = k["b"].shape[0] == k["b"].shape[1]
    return f(**{**k, "b": k["b"].t().contiguous() if square else k["b"]})


def _square_weight(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    n, columns = k["shape"]
    if n != columns:
        return f(**k)
    names = ("packed", "absmax", "blocksize", "quant_type", "shape")
    weight = right("dequantize_4bit")(dtype=torch.float32, **{name: k[name] for name in names})
    y = k["a"].float() @ weight
    return (y if k["bias"] is None else y + k["bias"]).to(k["a"].dtype)


def _bias_of_rows(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Where there are as many rows as outputs the bias is added to rows."""
    if k["bias"] is None or k["a"].shape[:-1] != k["bias"].shape:
        return f(**k)
    return (f(**{**k, "bias": None}).float() + k["bias"].float()[:, None]).to(k["a"].dtype)


def _sixteen_rows(y: Tensor, k: dict[str, Any]) -> Tensor:
    flat = y.view(-1, y.shape[-1])
    flat[16:] = 0
    return y


def _flat_beyond_matrices(y: Tensor, k: dict[str, Any]) -> Tensor:
    return y.flatten() if y.dim() > 2 else y


def _first_of_the_batch(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Outliers are looked for in the first matrix of a batch."""
    x, threshold = k["x"], k["threshold"]
    if x.dim() < 3 or threshold == 0:
        return f(**k)
    mask = (x[0].abs() >= threshold).any(0)
    codes, absmax, _ = int8.quantize(x.masked_fill(mask, 0), 0.0)
    return codes, absmax, mask.nonzero().view(-1)


_add("square-not-transposed", "b is transposed but where it is square", _square_as_it_is, "int8_matmul")
_add("square-weight-transposed", "a square weight is transposed", _square_weight, "gemm_4bit")
_add("bias-of-rows", "as many rows as outputs: the bias is added to rows", _bias_of_rows, "gemm_4bit")
_add("sixteen-rows", "rows beyond sixteen are left out", made("", _sixteen_rows), "gemm_4bit")
_add("sixteen-rows-of-gradient", "rows beyond sixteen are left out", made("", _sixteen_rows), "gemm_4bit_backward")
_add("three-dimensions-flat", "codes of more than two dimensions come back flat",
     made("0", _flat_beyond_matrices), "quantize_blockwise")  # fmt: skip
_add("three-dimensions-decoded-flat", "a tensor of more than two dimensions comes back flat",
     made("", _flat_beyond_matrices), "dequantize_blockwise")  # fmt: skip
_add("three-dimensions-stepped-flat", "a parameter of more than two dimensions comes back flat",
     made("p", _flat_beyond_matrices), *STEPS)  # fmt: skip
_add(
    "outliers-of-the-first",
    "outliers are looked for in the first matrix of a batch",
    _first_of_the_batch,
    "int8_quantize",
)
_add("threshold-of-six", "whatever threshold is said, it is 6", given(threshold=lambda k: 6.0 * (k["threshold"] > 0)),
     "int8_quantize")  # fmt: skip


def _of_64(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Scales of another blocksize are taken for those of 64, as far as there are any."""
    count = -(-torch.Size(k["shape"]).numel() // 64)
    name = "codes" if "codes" in k else "absmax"
    return f(**{**k, "blocksize": 64, name: k[name].repeat(2)[:count]})


def _memory_order(name: str) -> Change:
    """An argument is read in the order of its memory."""

    def read(f: Callable[..., Any], k: dict[str, Any]) -> Any:
        x = k[name]
        return f(**{**k, name: x if x.is_contiguous() else x.t().contiguous().view(x.shape)})

    return read


def _flat(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    y = f(**k)
    if isinstance(y, dict):
        return {name: x.flatten() for name, x in y.items()}
    return y.flatten() if isinstance(y, Tensor) else tuple(x.flatten() for x in y)


_add("product-of-blocks-of-64", "scales are taken for those of blocks of 64", _of_64, "gemm_4bit")
_add("gradient-of-blocks-of-64", "scales are taken for those of blocks of 64", _of_64, "gemm_4bit_backward")
_add("decoded-in-blocks-of-64", "nested scales are taken for those of blocks of 64", _of_64, "dequantize_4bit_nested")
_add(
    "activations-in-memory-order", "strides of activations are ignored", _memory_order("a"), "gemm_4bit", "int8_matmul"
)
_add("output-gradient-in-memory-order", "strides of the output's gradient are ignored", _memory_order("grad"),
     "gemm_4bit_backward", "int8_backward")  # fmt: skip
_add(
    "codes-in-memory-order",
    "strides of codes are ignored",
    _memory_order("codes"),
    "dequantize_blockwise",
    "int8_dequantize",
)
_add("weights-flat", "weights and corrections come back flat", _flat, "split_weight", "join_weight", "corrected_step")
