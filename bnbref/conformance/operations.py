"""What a backend may implement: each operation's arguments, its results, and what the rules allow them to be.

A backend is any object with functions of these names, called with keyword arguments. Tensors are on one device, packed codes
are uint8 `[bytes]`, dtypes are torch's. A function returns its one result, a tuple of them in order, or a dict by name.

    quantize_blockwise(x, values, blocksize)                            -> codes, absmax
    dequantize_blockwise(codes, absmax, values, blocksize, dtype)       -> y
    quantize_4bit(x, blocksize, quant_type)                             -> packed, absmax
    dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)  -> y
    quantize_4bit_nested(x, blocksize, quant_type)                      -> packed, codes, absmax2, offset
    dequantize_4bit_nested(packed, codes, absmax2, offset, values, blocksize, quant_type, shape, dtype)  -> y
    gemm_4bit(a, packed, absmax, bias, blocksize, quant_type, shape)    -> y
    int8_quantize(x, threshold)                                         -> codes, absmax, columns
    int8_matmul(a, b)                                                   -> product
    int8_mm_dequant(product, row, column, bias, dtype)                  -> y
    int8_dequantize(codes, absmax)                                      -> y
    save_4bit(x, blocksize, quant_type, nested)                         -> the tensors of a file, by name
    load_4bit(the same tensors, quant_type)                             -> y
    gemm_4bit_backward(grad, packed, absmax, blocksize, quant_type, shape)  -> grad_a
    int8_backward(a, weight, grad)                                      -> grad_a, grad_weight
    evaluate_then_train(x, grad, packed, absmax, bias, blocksize, quant_type, shape)  -> y, grad_x, packed, absmax
    optimizer_32bit(p, g, state1, state2, state3, HYPER)                -> p, state1, state2, state3
    optimizer_8bit(p, g, state1, absmax1, values1, state2, absmax2, values2, state3, absmax3, HYPER)  -> p, state1, absmax1, ...

HYPER: optimizer (momentum, lars, adam, lamb, lion, rmsprop, adagrad or ademamix), step, lr, beta1, beta2, beta3, alpha, eps,
weight_decay, max_unorm, gnorm_scale. States that an optimizer does not have are None, and none of its results; nothing is
updated in place.

`values` is float32 [256], sorted. `columns` holds the indices of outlier columns, int64, ascending, [0] if there are none.
`bias` may be None. In save_4bit and load_4bit the names are packed, absmax, quant_map, state, nested_absmax, nested_quant_map.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.expected import Expected
from bnbref.conformance.oracles import codes, steps, sums, values
from bnbref.fused import eager


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


@dataclass(frozen=True)
class Operation:
    """An operation: its oracle, which takes its arguments and returns what each result may be, and what it is, in words."""

    oracle: Callable[..., dict[str, Expected]]
    about: str

    def expect(self, inputs: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Expected]:
        """What each result may be, computed by the reference, uncompiled."""
        with eager():
            return self.oracle(**inputs, **arguments(params))

    @functools.cached_property
    def optional(self) -> tuple[str, ...]:
        """Arguments that are None where a case has no tensor for them."""
        parameters = inspect.signature(self.oracle).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.default is None)


OPERATIONS = {
    "quantize_blockwise": Operation(
        codes.quantize_blockwise,
        "A tensor in blocks of consecutive elements, each scaled by its largest magnitude and coded in 8 bits: codes "
        "uint8 in the shape of x, absmax float32, one a block.",
    ),
    "dequantize_blockwise": Operation(
        values.dequantize_blockwise,
        "The values of 8-bit codes times the scales of their blocks, in float32, float16 or bfloat16.",
    ),
    "quantize_4bit": Operation(
        codes.quantize_4bit,
        "A tensor in blocks, scaled as in 8 bits, coded in NF4 or FP4, two codes a byte: packed uint8 [(numel + 1) / "
        "2], absmax float32, one a block.",
    ),
    "dequantize_4bit": Operation(
        values.dequantize_4bit,
        "The values of packed 4-bit codes times the scales of their blocks, in a given shape and dtype.",
    ),
    "quantize_4bit_nested": Operation(
        codes.quantize_4bit_nested,
        "4-bit quantization whose scales are quantized themselves: their mean, and 8-bit codes of what is left, in "
        "blocks of 256.",
    ),
    "dequantize_4bit_nested": Operation(
        values.dequantize_4bit_nested,
        "The scales decoded from their 8-bit codes, then the weight by them.",
    ),
    "gemm_4bit": Operation(
        sums.gemm_4bit,
        "A product with a 4-bit weight [n, k]: a [..., k] in float32, float16 or bfloat16, y [..., n] in the same.",
    ),
    "gemm_4bit_backward": Operation(
        sums.gemm_4bit_backward,
        "The gradient of a product's input: grad [..., n] in float32, float16 or bfloat16, grad_a [..., k] in the "
        "same.",
    ),
    "int8_quantize": Operation(
        codes.int8_quantize,
        "LLM.int8(): rows of x scaled to 127 and rounded, columns with outliers left out.",
    ),
    "int8_matmul": Operation(
        values.int8_matmul,
        "The int32 product a @ b^T of int8 a [..., k] and b [n, k].",
    ),
    "int8_mm_dequant": Operation(
        values.int8_mm_dequant,
        "An int32 product scaled by the absmax of its rows and columns, over 127^2.",
    ),
    "int8_dequantize": Operation(
        values.int8_dequantize,
        "int8 rows scaled back.",
    ),
    "int8_backward": Operation(
        sums.int8_backward,
        "The gradients of y = a @ W^T by LLM.int8(), whose weight is a float tensor that is quantized on the way: a "
        "[..., k], weight [n, k] and grad [..., n] of one dtype.",
    ),
    "save_4bit": Operation(
        values.save_4bit,
        "The tensors that bitsandbytes writes for a 4-bit weight, byte for byte.",
    ),
    "load_4bit": Operation(
        values.load_4bit,
        "The weight from such tensors.",
    ),
    "evaluate_then_train": Operation(
        sums.evaluate_then_train,
        "A Linear4bit of a packed weight, evaluated without gradients (y), then trained on the same input (grad_x), "
        "then saved (packed, absmax).",
    ),
    "optimizer_32bit": Operation(
        steps.step_32bit,
        "One step of an optimizer with float32 states, p and g float32, float16 or bfloat16. Nothing is updated in "
        "place: the new p and states are the results.",
    ),
    "optimizer_8bit": Operation(
        steps.step_8bit,
        "The same with states as uint8 codes and float32 absmax of blocks of 256 consecutive elements. values1 is the "
        "signed dynamic map, also of the squares of rmsprop and adagrad, as bitsandbytes has it, or the unsigned one; "
        "values2 is the unsigned one.",
    ),
}
"""Every operation of the kit by name."""
