"""The operations that a backend may implement: their arguments, their results, and what the rules allow as results.

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

Since version 2 of the vectors:

    schedule_free(p, z, g, squares, step, lr, beta1, beta2, eps, weight_decay, warmup_steps)  -> p, z, squares
    muon(p, g, momentum, lr, beta, weight_decay, nesterov, adjust, ns_steps, eps)  -> p, momentum
    muon_8bit(p, g, momentum, absmax, values, the same numbers)             -> p, momentum, absmax
    adafactor(p, g, row, column, step, lr, beta2_decay, eps1, eps2, d, weight_decay)  -> p, row, column
    soap(p, g, momentum, squares, left, right, of_left, of_right, NUMBERS)  -> p, momentum, squares, left, right
    split_weight(x, dtype, bits)                                            -> p, correction
    join_weight(p, correction)                                              -> x
    corrected_step(p, correction, g, state1, state2, HYPER)                 -> p, correction, state1, state2
    released_step(x, weight1, weight2, grad, lr)                            -> weight1, weight2

Since version 4:

    quantize_squares(x, values, blocksize)                                  -> codes, absmax
    optimizer_8bit_nonzero(the arguments of optimizer_8bit)                 -> p, state1, absmax1, ...
    schedule_free_8bit(p, difference, absmax1, values1, g, squares, absmax2, values2, NUMBERS)  -> p, difference, ...
    soap_8bit(p, g, momentum, absmax1, values1, squares, absmax2, values2, left, ..., NUMBERS)  -> p, momentum, ...
    soap_refresh(p, g, then, momentum, squares, left, right, of_left, of_right, NUMBERS)  -> p, momentum, left, right

NUMBERS: step, lr, beta1, beta2, beta3 (SOAP), eps, weight_decay, warmup_steps (Schedule-Free). HYPER: optimizer (momentum,
lars, adam, lamb, lion, rmsprop, adagrad or ademamix), step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, max_unorm,
gnorm_scale. States that an optimizer does not have are None, and none of its results; nothing is updated in place.

`values` is float32 [256], sorted. `columns` holds the indices of outlier columns, int64, ascending, [0] if there are none.
`bias` may be None. In save_4bit and load_4bit the names are packed, absmax, quant_map, state, nested_absmax, nested_quant_map.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.expected import Expected
from bnbref.conformance.oracles import codes, master_weights, muon, optimizers, soap, steps, sums, values
from bnbref.kernels import eager


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
    """An operation: a function of its arguments that returns, by name, what each result may be."""

    oracle: Callable[..., dict[str, Expected]]

    def expect(self, inputs: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Expected]:
        """What each result may be, computed by the reference, uncompiled."""
        with eager():
            return self.oracle(**inputs, **arguments(params))

    @functools.cached_property
    def optional(self) -> tuple[str, ...]:
        """Arguments that are None where a case has no tensor for them."""
        parameters = inspect.signature(self.oracle).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.default is None)

    def in_order(self, results: Iterable[str]) -> list[str]:
        """The names of results as a tuple has them: those that are no arguments, then the others in the order of the arguments.

        >>> OPERATIONS["corrected_step"].in_order(["state1", "state2", "p", "correction"])
        ['p', 'correction', 'state1', 'state2']
        """
        arguments = list(inspect.signature(self.oracle).parameters)
        return sorted(results, key=lambda name: arguments.index(name) if name in arguments else -1)


_ORACLES = (
    codes.quantize_blockwise, values.dequantize_blockwise, codes.quantize_4bit, values.dequantize_4bit,
    codes.quantize_4bit_nested, values.dequantize_4bit_nested, sums.gemm_4bit, sums.gemm_4bit_backward, codes.int8_quantize,
    values.int8_matmul, values.int8_mm_dequant, values.int8_dequantize, sums.int8_backward, values.save_4bit,
    values.load_4bit, sums.evaluate_then_train, steps.optimizer_32bit, steps.optimizer_8bit,
    optimizers.schedule_free, muon.muon, muon.muon_8bit, optimizers.adafactor, soap.soap, master_weights.split_weight,
    master_weights.join_weight, master_weights.corrected_step, master_weights.released_step,
    codes.quantize_squares, steps.optimizer_8bit_nonzero, optimizers.schedule_free_8bit, soap.soap_8bit, soap.soap_refresh,
)  # fmt: skip

OPERATIONS = {oracle.__name__: Operation(oracle) for oracle in _ORACLES}
"""Every operation of the kit by name."""
