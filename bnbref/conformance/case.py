"""A case: one call of an operation, and what may come out of it.

Those of the vectors are files (vectors.py), which tests/kit_cases made; others are made when the kit runs (pairs.py), and a
random input is one, too (test_backend.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnbref.arguments import dtype_name
from bnbref.conformance.expected import Expected
from bnbref.conformance.specification import FLAGS, RULES

CPU = torch.device("cpu")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an operation, and what may come out of it.

    id: `operation/name`. params: arguments that are no tensors, as JSON values. layout: the inputs that are given as transposes
    of contiguous tensors. may_refuse: an exception is as good as the result. quick: part of the short run. derived: the
    expectation is what the operation's oracle says of these inputs, nothing more or less, so that the inputs may be varied.
    settings: of a case of pairs.py those that are not plain.
    """

    id: str
    operation: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Expected]
    rules: tuple[str, ...]
    flags: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    may_refuse: bool = False
    quick: bool = True
    derived: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [r for r in self.rules if r not in RULES] + [f for f in self.flags if f not in FLAGS]
        if unknown:
            raise ValueError(f"case {self.id} refers to rules or flags that do not exist: {unknown}")

    @property
    def dtype(self) -> str:
        """The dtype that the case is about: of what is quantized or multiplied, else of the result."""
        given = next((self.inputs[name] for name in ("x", "a", "p", "grad") if name in self.inputs), None)
        about = given if given is not None else self.expected["y"].value
        return dtype_name(about.dtype)
