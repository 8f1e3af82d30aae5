"""The operations that a backend may implement: their arguments and their results.

A backend is any object with functions of the names in `SIGNATURES`, called with keyword arguments. Tensors are on one device,
packed codes are uint8 `[bytes]`, dtypes are torch's. A function returns its one result, a tuple of them in order, or a dict by
name. What the rules allow as results is stored with each case; `oracles` has it for the operations whose inputs are varied.

HYPER: optimizer (momentum, lars, adam, lamb, lion, rmsprop, adagrad or ademamix), step, lr, beta1, beta2, beta3, alpha, eps,
weight_decay, max_unorm, gnorm_scale. NUMBERS: step, lr, beta1, beta2, beta3 (SOAP), eps, weight_decay, warmup_steps
(Schedule-Free); of Muon lr, beta, weight_decay, nesterov, adjust, ns_steps, eps. States that an optimizer does not have are
None, and none of its results; nothing is updated in place.

`values` is float32 [256], sorted. `columns` holds the indices of outlier columns, int64, ascending, [0] if there are none. The
tensors of a file have the names of save_4bit's results; the last two are there if it is nested.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from bnbref.conformance.specification import entries

SIGNATURES = """
quantize_blockwise(x, values, blocksize) -> codes, absmax
dequantize_blockwise(codes, absmax, values, blocksize, dtype) -> y
quantize_4bit(x, blocksize, quant_type) -> packed, absmax
dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype) -> y
quantize_4bit_nested(x, blocksize, quant_type) -> packed, codes, absmax2, offset
dequantize_4bit_nested(packed, codes, absmax2, offset, values, blocksize, quant_type, shape, dtype) -> y
gemm_4bit(a, packed, absmax, bias=None, blocksize, quant_type, shape) -> y
gemm_4bit_backward(grad, packed, absmax, blocksize, quant_type, shape) -> grad_a
int8_quantize(x, threshold) -> codes, absmax, columns
int8_matmul(a, b) -> product
int8_mm_dequant(product, row, column, bias=None, dtype) -> y
int8_dequantize(codes, absmax) -> y
int8_backward(a, weight, grad) -> grad_a, grad_weight
save_4bit(x, blocksize, quant_type, nested) -> packed, state, absmax, quant_map, nested_absmax, nested_quant_map
load_4bit(packed, state, absmax, quant_map, nested_absmax=None, nested_quant_map=None, quant_type) -> y
evaluate_then_train(x, grad, packed, absmax, bias=None, blocksize, quant_type, shape) -> y, grad_x, packed, absmax
optimizer_32bit(p, g, state1, state2=None, state3=None, HYPER) -> p, state1, state2, state3
optimizer_8bit(p, g, state1, absmax1, values1, state2=None, absmax2=None, values2=None, state3=None, absmax3=None, HYPER)
  -> p, state1, absmax1, state2, absmax2, state3, absmax3
schedule_free(p, z, g, squares, NUMBERS) -> p, z, squares
muon(p, g, momentum, NUMBERS) -> p, momentum
muon_8bit(p, g, momentum, absmax, values, NUMBERS) -> p, momentum, absmax
adafactor(p, g, row, column, step, lr, beta2_decay, eps1, eps2, d, weight_decay) -> p, row, column
soap(p, g, momentum, squares, left, right, of_left, of_right, NUMBERS) -> p, momentum, squares, left, right
split_weight(x, dtype, bits) -> p, correction
join_weight(p, correction) -> x
corrected_step(p, correction, g, state1, state2, HYPER) -> p, correction, state1, state2
released_step(x, weight1, weight2=None, grad, lr) -> weight1, weight2
quantize_squares(x, values, blocksize) -> codes, absmax
optimizer_8bit_nonzero(p, g, state1, absmax1, values1, state2=None, absmax2=None, values2=None, state3=None, absmax3=None, HYPER)
  -> p, state1, absmax1, state2, absmax2, state3, absmax3
schedule_free_8bit(p, difference, absmax1, values1, g, squares, absmax2, values2, NUMBERS)
  -> p, difference, absmax1, squares, absmax2
soap_8bit(p, g, momentum, absmax1, values1, squares, absmax2, values2, left, right, of_left, of_right, NUMBERS)
  -> p, momentum, absmax1, squares, absmax2, left, right
soap_refresh(p, g, then, momentum, squares, left, right, of_left, of_right, NUMBERS) -> p, momentum, left, right
"""
"""The arguments and the results of every operation. `=None`: the argument is None where a case has no tensor for it."""


def arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """A case's parameters, JSON values, as a function takes them: dtypes as torch's, shapes as tuples.

    >>> arguments({"dtype": "float16", "shape": [2, 3], "blocksize": 64})
    {'dtype': torch.float16, 'shape': (2, 3), 'blocksize': 64}
    """
    made = dict(params)
    if "dtype" in made:
        made["dtype"] = getattr(torch, made["dtype"])
    if "shape" in made:
        made["shape"] = tuple(made["shape"])
    return made


class Operation(NamedTuple):
    """An operation of `SIGNATURES`. optional: its arguments that may be None. results: the names of its results, in order."""

    signature: str
    optional: tuple[str, ...]
    results: tuple[str, ...]


def _operation(signature: str) -> tuple[str, Operation]:
    call, _, results = signature.partition(" -> ")
    name, _, given = call.strip(")").partition("(")
    optional = (argument.removesuffix("=None") for argument in given.split(", ") if argument.endswith("=None"))
    return name, Operation(signature, tuple(optional), tuple(results.split(", ")))


OPERATIONS = dict(map(_operation, entries(SIGNATURES)))
"""Every operation of the kit by name."""
