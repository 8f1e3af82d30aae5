"""What the rules allow of each operation, as a function of its arguments: the oracles of the kit, and those that only made cases.

values.py: what undoes a quantization, and files. sums.py: gradients. squares.py: squares in 8 bits. averaging.py, adafactor.py,
muon.py, soap.py: optimizers; matrices.py is their arithmetic. master_weights.py: weights of 16 bits that are trained as if they
had more, and steps in a backward pass.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bnbref.conformance import oracles
from bnbref.conformance.case import Case
from bnbref.conformance.expected import Expected
from bnbref.conformance.operations import arguments
from bnbref.kernels import eager
from kit_cases.oracles import adafactor, averaging, master_weights, muon, soap, squares, sums, values

_OWN = (
    values.dequantize_4bit_nested, values.int8_dequantize, values.save_4bit, values.load_4bit,
    sums.int8_backward, sums.evaluate_then_train, averaging.schedule_free, averaging.schedule_free_8bit,
    muon.muon, muon.muon_8bit, adafactor.adafactor, soap.soap, soap.soap_refresh, squares.soap_8bit, squares.quantize_squares,
    squares.optimizer_8bit_nonzero, master_weights.split_weight, master_weights.join_weight, master_weights.corrected_step,
    master_weights.released_step,
)  # fmt: skip

ORACLES = {**oracles.ORACLES, **{oracle.__name__: oracle for oracle in _OWN}}
"""The oracle of each operation."""


def expect(operation: str, inputs: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Expected]:
    """What each result of an operation may be, computed by the reference, uncompiled."""
    with eager():
        return ORACLES[operation](**inputs, **arguments(params))


def make(
    name: str, operation: str, inputs: Mapping[str, Tensor], rules: str, flags: str = "",
    expected: Mapping[str, Expected] | None = None, layout: tuple[str, ...] = (), may_refuse: bool = False, quick: bool = True,
    **params: Any,
) -> Case:  # fmt: skip
    """A case. rules, flags: their names, between blanks. expected: by the oracle of the operation, if not given.

    Raises ValueError for a rule or a flag that does not exist.
    """
    wanted = expect(operation, inputs, params) if expected is None else expected
    return Case(
        f"{operation}/{name}", operation, params, dict(inputs), wanted, tuple(rules.split()), tuple(flags.split()),
        layout, may_refuse, quick, expected is None,
    )  # fmt: skip
