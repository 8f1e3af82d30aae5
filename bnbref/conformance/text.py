"""Cases and answers as lines of text, for a pipe to a program in any language.

One case is a line of words for each of its parts. A tensor is its name, dtype, number of dimensions, dimensions, and the
hexadecimal words of its elements' bits.

    case quantize_4bit/nf4-size-2
    param blocksize 64
    param quant_type nf4
    tensor x float32 1 2 3f800000 3ecccccd
    end

The answer has the same form: the case, its results as tensors, or `unsupported`, and an end.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bnbref.arguments import dtype_name, is_shape
from bnbref.conformance.case import Case
from bnbref.conformance.vectors import DTYPES, from_bytes


def hex_words(x: Tensor) -> list[str]:
    """Each element as the hexadecimal word of its bits, most significant digit first.

    >>> hex_words(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    ['3f80', 'c000']
    """
    size = x.element_size()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    words = x.detach().contiguous().reshape(-1).view(kind).tolist()
    return [f"{word & (1 << 8 * size) - 1:0{2 * size}x}" for word in words]


def _word(value: Any) -> str:
    """A parameter: `true` and `false`, lists with commas and without blanks."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def tensor_line(name: str, tensor: Tensor) -> str:
    """A tensor as a line of text: name, dtype, number of dimensions, dimensions, elements.

    >>> tensor_line("x", torch.tensor([[1.0, -2.0]]))
    'tensor x float32 2 1 2 3f800000 c0000000'
    """
    return " ".join(
        ["tensor", name, dtype_name(tensor.dtype), str(tensor.dim()), *map(str, tensor.shape), *hex_words(tensor)]
    )


def parse_tensor(line: str) -> tuple[str, Tensor]:
    """The name and the tensor of a line. Raises ValueError where it is not as long as its shape, or of another dtype.

    >>> parse_tensor("tensor x int8 1 2 01 ff")
    ('x', tensor([ 1, -1], dtype=torch.int8))
    """
    _, name, kind, dims, *rest = [*line.split(), "", "", ""][: max(4, len(line.split()))]
    dtype: Any = getattr(torch, kind, None)
    if dtype not in DTYPES.values():
        known = ", ".join(map(dtype_name, DTYPES.values()))
        raise ValueError(f"dtype of tensor {name} must be one of {known}, got {kind!r}")
    count = int(dims) if dims.isdecimal() else -1
    sizes, words = rest[: max(0, count)], rest[max(0, count) :]
    if count < 0 or len(sizes) < count or not all(size.isdecimal() for size in sizes):
        raise ValueError(
            f"tensor {name} must have the number of its dimensions and each of them after its dtype, got {dims!r}"
        )
    shape = [int(size) for size in sizes]
    if not is_shape(shape):
        raise ValueError(f"tensor {name} must have a shape whose product an index of 64 bits holds, got {shape}")
    if len(words) != math.prod(shape):
        raise ValueError(f"tensor {name} of shape {shape} must have {math.prod(shape)} elements, got {len(words)}")
    digits = 2 * dtype.itemsize
    for word in words:
        if not re.fullmatch(f"[0-9a-fA-F]{{{digits}}}", word):
            raise ValueError(f"an element of {kind} must be the {digits} hexadecimal digits of its bits, got {word!r}")
    return name, from_bytes(b"".join(bytes.fromhex(word)[::-1] for word in words), dtype, shape)


def as_text(cases: Iterable[Case]) -> Iterator[str]:
    """The lines of the cases, for a program to answer."""
    for case in cases:
        yield f"case {case.id}"
        yield from (f"param {name} {_word(value)}" for name, value in case.params.items())
        yield from (tensor_line(name, tensor) for name, tensor in case.inputs.items())
        yield "end"


def parse_answers(lines: Iterable[str]) -> dict[str, dict[str, Tensor] | None]:
    """Results by case; None for `unsupported`. Raises ValueError with the number of a line that is none of an answer."""
    found: dict[str, dict[str, Tensor] | None] = {}
    current: str | None = None
    number = 0
    for number, line in enumerate(lines, 1):
        word = line.split(maxsplit=1)[0] if line.strip() else ""
        try:
            if word == "case":
                if current is not None:
                    raise ValueError(f"the answer to {current} has no end")
                if len(line.split()) != 2:
                    raise ValueError(f"a case must be `case OPERATION/NAME`, got {line.strip()!r}")
                _, current = line.split()
                if current in found:
                    raise ValueError(f"{current} is answered twice")
                found[current] = {}
            elif word == "unsupported" and current is not None:
                found[current] = None
            elif word == "tensor" and current is not None:
                name, tensor = parse_tensor(line)
                results = found[current]
                if results is not None and results.setdefault(name, tensor) is not tensor:
                    raise ValueError(f"{current} has two tensors {name}")
            elif word == "end" and current is not None:
                current = None
            elif word in ("tensor", "unsupported", "end"):
                raise ValueError(f"{word} must stand after the line of its case, `case OPERATION/NAME`")
            elif word:
                raise ValueError(
                    f"expected case, tensor, unsupported or end, got {word!r}; what is no answer belongs on stderr"
                )
        except (ValueError, OverflowError) as error:
            raise ValueError(f"line {number}: {error}") from error
    if current is not None:
        raise ValueError(f"line {number}: the answer to {current} has no end: the program ended, or was cut off")
    return found
