"""Oracles: what the rules allow the results of an operation to be, as a function of its arguments.

They are here for operations whose inputs the kit varies: to make a failing input smaller (shrink.py), to see what a convention
makes of a step (predictions.py), for every two settings together (pairs.py), and for random inputs (test_backend.py). Of all
other operations the expectation is stored with the cases alone. "Rules Q8" in a docstring are those of specification.txt whose
ids begin with Q8.

codes.py: quantizations. values.py: what undoes them. sums.py: float products. steps.py: optimizers, whose arithmetic is in
formula.py and intervals.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bnbref.conformance.expected import Expected
from bnbref.conformance.operations import arguments
from bnbref.conformance.oracles import codes, steps, sums, values
from bnbref.kernels import eager

_VARIED = (
    codes.quantize_blockwise, codes.quantize_4bit, codes.quantize_4bit_nested, codes.int8_quantize, values.dequantize_blockwise,
    values.dequantize_4bit, values.int8_matmul, values.int8_mm_dequant, sums.gemm_4bit, sums.gemm_4bit_backward,
    steps.optimizer_32bit, steps.optimizer_8bit,
)  # fmt: skip

ORACLES: dict[str, Callable[..., dict[str, Expected]]] = {oracle.__name__: oracle for oracle in _VARIED}
"""The oracles of the operations whose inputs are varied, by name."""


def expect(operation: str, inputs: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Expected]:
    """What each result of one of `ORACLES` may be, computed by the reference, uncompiled."""
    with eager():
        return ORACLES[operation](**inputs, **arguments(params))
