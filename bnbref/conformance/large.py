"""Cases that are too large for a file: every number of 16 bits, and tensors of more than 2^16 elements.

A kernel may be wrong for one number of 65,536, or where an index has 16 bits. These cases are made when the kit runs: their
expectation is that of the oracles, and they are in no version of the vectors.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, four_bit, value_table
from bnbref.conformance.backends import Backend
from bnbref.conformance.case import CPU, Case
from bnbref.conformance.oracles import expect

RULES = {
    "quantize_blockwise": "Q8-3", "quantize_4bit": "Q4-3", "dequantize_blockwise": "D8-2", "dequantize_4bit": "D4-2",
    "int8_quantize": "I8-2",
}  # fmt: skip
"""The rule that the cases of each operation are about."""

_HALVES = ("float16", "bfloat16")
_BEYOND = 2**16 + 2**12 + 1


def _numbers(dtype: str, largest: float) -> Tensor:
    """Every number of a 16-bit dtype up to that magnitude, but for subnormal ones."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(getattr(torch, dtype))
    size = every.float().abs()
    return every[(size <= largest) & ((size >= torch.finfo(every.dtype).tiny) | (size == 0))]


def _without_ties(numbers: Tensor, thresholds: Tensor) -> Tensor:
    """The numbers but those whose magnitude is that of a threshold: ties have cases, and a rule, of their own."""
    return numbers[~torch.isin(numbers.float().abs(), thresholds.abs())]


def _in_blocks(numbers: Tensor) -> Tensor:
    """The numbers three times, in blocks of 64 whose first element is the scale 1, 4 or 1/4: more than 2^16 elements."""
    rows = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 63)).view(-1, 63)
    one = torch.cat((torch.ones_like(rows[:, :1]), rows), 1)
    return torch.cat((one, one * 4, one / 4)).view(-1)


def _arguments() -> Iterator[tuple[str, str, dict[str, Tensor], dict[str, Any]]]:
    """Operation, label, tensors and parameters of each case."""
    values = value_table(DYNAMIC, CPU)
    for dtype in _HALVES:
        numbers = _numbers(dtype, 1.0)
        for quant_type in ("nf4", "fp4"):
            x = _in_blocks(_without_ties(numbers, torch.tensor(four_bit(quant_type).thresholds)))
            yield "quantize_4bit", f"{quant_type}-{dtype}", {"x": x}, {"blocksize": 64, "quant_type": quant_type}
        x = _in_blocks(_without_ties(numbers, (values[:-1] + values[1:]) / 2))
        yield "quantize_blockwise", f"signed-{dtype}", {"x": x, "values": values}, {"blocksize": 64}
    yield "int8_quantize", "float16", {"x": _numbers("float16", 127.0).view(4, -1)}, {"threshold": 0.0}
    i = torch.arange(_BEYOND)
    scales = 1 + torch.arange(-(-_BEYOND // 64)).float() / 512
    codes = {"codes": (i % 251).to(torch.uint8), "absmax": scales, "values": values}
    yield "dequantize_blockwise", "float32", codes, {"blocksize": 64, "dtype": "float32"}
    packed = {"packed": (i[: -(-_BEYOND // 2)] % 251).to(torch.uint8), "absmax": scales}
    shape = {"shape": [1, _BEYOND], "blocksize": 64, "quant_type": "nf4", "dtype": "float32"}
    yield "dequantize_4bit", "nf4-float32", packed, shape


def _id(operation: str, label: str) -> str:
    return f"{operation}/large-{label}"


def listed() -> dict[str, str]:
    """The rule of each case by its id."""
    return {_id(operation, label): RULES[operation] for operation, label, *_ in _arguments()}


def cases(backend: Backend, only: str = "") -> Iterator[Case]:
    """The cases of what a backend has whose id contains `only`."""
    for operation, label, inputs, params in _arguments():
        if operation in backend.functions and only in _id(operation, label):
            expected = expect(operation, inputs, params)
            yield Case(_id(operation, label), operation, params, inputs, expected, (RULES[operation],), quick=False)
