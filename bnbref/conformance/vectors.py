"""The cases as files that need neither Python nor torch, and as lines of text for a pipe.

Files, one pair for each operation in `v1/`: OPERATION.json lists the cases (v1/schema.json says how), OPERATION.safetensors has
their tensors: eight bytes of length, a JSON header, the bytes of the tensors, little-endian.

Text, one case: a line of words each, tensors as hexadecimal words of their elements' bits.

    case quantize_4bit/nf4-size-2
    param blocksize 64
    param quant_type nf4
    tensor x float32 1 2 3f800000 3ecccccd
    end

The answer has the same form: the case, its results as tensors, or `unsupported`, and an end.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from bnbref.conformance.cases import Case, forward_cases
from bnbref.conformance.cases_gradients import all_gradients
from bnbref.conformance.cases_optimizers import all_optimizers
from bnbref.conformance.judging import Also, Expected
from bnbref.conformance.operations import OPERATIONS
from bnbref.conformance.report import hex_words
from bnbref.conformance.rules import FLAGS, RULES

VERSION = 1
FOLDER = Path(__file__).parent / f"v{VERSION}"

_SAFETENSORS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _SAFETENSORS.items()}


# ---- safetensors ----------------------------------------------------------------------------------------------------


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor, little-endian.

    >>> raw(torch.tensor([1.0])).hex()
    '0000803f'
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    data = bytes(flat.tolist())
    size = tensor.element_size()
    if sys.byteorder == "big":
        return b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
    return data


def _tensor(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    size = dtype.itemsize
    if sys.byteorder == "big":
        data = b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
    if not data:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone().view(dtype).view(tuple(shape))


def save_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file: the largest dtypes first, so that all are aligned."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        data = raw(tensor)
        shape = list(tensor.shape)
        header[name] = {
            "dtype": _SAFETENSORS[tensor.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def load_safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    >>> load_safetensors(save_safetensors({"x": torch.tensor([1, 2])}))
    {'x': tensor([1, 2])}
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    body = data[start:]
    return {
        name: _tensor(body[slice(*entry["data_offsets"])], _DTYPES[entry["dtype"]], entry["shape"])
        for name, entry in header.items()
    }


# ---- files ----------------------------------------------------------------------------------------------------------


class _Store:
    """Tensors by content: what several cases share is kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def add(self, tensor: Tensor) -> str:
        content = (tensor.dtype, tuple(tensor.shape), raw(tensor))
        if content not in self._names:
            self._names[content] = f"t{len(self._names)}"
            self.tensors[self._names[content]] = tensor.contiguous()
        return self._names[content]


def _output(expected: Expected, store: _Store) -> dict[str, Any]:
    made: dict[str, Any] = {"grade": expected.grade, "value": store.add(expected.value)}
    if expected.ulp:
        made["ulp"] = expected.ulp
    if expected.also is not None:
        made |= {"also_index": store.add(expected.also.where), "also_value": store.add(expected.also.value)}
    for name in ("free", "pairs", "low", "high"):
        tensor = getattr(expected, name)
        if tensor is not None:
            made[name] = store.add(tensor)
    return made


def all_cases() -> list[Case]:
    """Every case, in a fixed order, computed from the oracles. Some seconds."""
    made = [*forward_cases(), *all_gradients(), *all_optimizers()]
    ids = [case.id for case in made]
    repeated = sorted({name for name in ids if ids.count(name) > 1})
    if repeated:
        raise ValueError(f"cases must have ids of their own, got {repeated} twice")
    order = list(OPERATIONS)
    return sorted(made, key=lambda case: order.index(case.operation))


def files(cases: Sequence[Case]) -> dict[str, bytes]:
    """The files of the vectors by name."""
    made: dict[str, bytes] = {}
    for op in OPERATIONS:
        chosen = [case for case in cases if case.operation == op]
        store = _Store()
        listed = [
            {
                "id": case.id,
                "params": dict(case.params),
                "inputs": {name: store.add(tensor) for name, tensor in case.inputs.items()},
                "outputs": {name: _output(expected, store) for name, expected in case.expected.items()},
                "rules": list(case.rules),
                "flags": list(case.flags),
                "layout": list(case.layout),
                "may_refuse": case.may_refuse,
                "quick": case.quick,
                "derived": case.derived,
            }
            for case in chosen
        ]
        rules = dict.fromkeys(rule for case in chosen for rule in case.rules)
        flags = dict.fromkeys(flag for case in chosen for flag in case.flags)
        body = {
            "version": VERSION,
            "operation": op,
            "tensors": f"{op}.safetensors",
            "rules": {rule: {"text": RULES[rule].text, "freedom": RULES[rule].freedom} for rule in rules},
            "flags": {flag: {"story": FLAGS[flag].story, "issue": FLAGS[flag].issue} for flag in flags},
            "cases": listed,
        }
        made[f"{op}.json"] = (json.dumps(body, indent=1) + "\n").encode()
        made[f"{op}.safetensors"] = save_safetensors(store.tensors)
    return made


def write(folder: Path) -> None:
    """Compute all cases and write their files."""
    for name, data in files(all_cases()).items():
        (folder / name).write_bytes(data)


def read(operation: str, folder: Path = FOLDER) -> list[Case]:
    """The stored cases of an operation.

    >>> read("int8_dequantize")[0].id
    'int8_dequantize/every-code'
    """
    body = json.loads((folder / f"{operation}.json").read_text(encoding="utf-8"))
    tensors = load_safetensors((folder / body["tensors"]).read_bytes())

    def expected(entry: Mapping[str, Any]) -> Expected:
        found = {name: tensors[entry[name]] for name in ("free", "pairs", "low", "high") if name in entry}
        also = Also(tensors[entry["also_index"]], tensors[entry["also_value"]]) if "also_index" in entry else None
        return Expected(tensors[entry["value"]], ulp=entry.get("ulp", 0), also=also, **found)

    return [
        Case(
            entry["id"],
            body["operation"],
            entry["params"],
            {name: tensors[key] for name, key in entry["inputs"].items()},
            {name: expected(output) for name, output in entry["outputs"].items()},
            tuple(entry["rules"]),
            tuple(entry["flags"]),
            tuple(entry["layout"]),
            entry["may_refuse"],
            entry["quick"],
            entry["derived"],
        )
        for entry in body["cases"]
    ]


def read_all(folder: Path = FOLDER) -> list[Case]:
    """All stored cases."""
    return [case for op in OPERATIONS for case in read(op, folder)]


# ---- text -----------------------------------------------------------------------------------------------------------


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def tensor_line(name: str, tensor: Tensor) -> str:
    """A tensor as a line of text: name, dtype, number of dimensions, dimensions, elements.

    >>> tensor_line("x", torch.tensor([[1.0, -2.0]]))
    'tensor x float32 2 1 2 3f800000 c0000000'
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    return " ".join(["tensor", name, dtype, str(tensor.dim()), *map(str, tensor.shape), *hex_words(tensor)])


def parse_tensor(line: str) -> tuple[str, Tensor]:
    """The name and the tensor of a line.

    >>> parse_tensor("tensor x int8 1 2 01 ff")
    ('x', tensor([ 1, -1], dtype=torch.int8))
    """
    _, name, kind, dims, *rest = line.split()
    dtype = getattr(torch, kind, None)
    if dtype not in _SAFETENSORS:
        raise ValueError(
            f"dtype of tensor {name} must be one of torch's {sorted(map(str, _SAFETENSORS))}, got {kind!r}"
        )
    shape = [int(n) for n in rest[: int(dims)]]
    words = rest[int(dims) :]
    if len(words) != math.prod(shape):
        raise ValueError(f"tensor {name} of shape {shape} must have {math.prod(shape)} elements, got {len(words)}")
    data = b"".join(int(word, 16).to_bytes(dtype.itemsize, "little") for word in words)
    return name, _tensor(data, dtype, shape)


def as_text(cases: Iterable[Case]) -> Iterator[str]:
    """The lines of the cases, for a program to answer."""
    for case in cases:
        yield f"case {case.id}"
        yield from (f"param {name} {_word(value)}" for name, value in case.params.items())
        yield from (tensor_line(name, tensor) for name, tensor in case.inputs.items())
        yield "end"


def parse_answers(lines: TextIO | Iterable[str]) -> dict[str, dict[str, Tensor] | None]:
    """Results by case; None for `unsupported`."""
    found: dict[str, dict[str, Tensor] | None] = {}
    current: str | None = None
    for number, line in enumerate(lines, 1):
        word = line.split(maxsplit=1)[0] if line.strip() else ""
        try:
            if word == "case":
                current = line.split()[1]
                found[current] = {}
            elif word == "unsupported" and current is not None:
                found[current] = None
            elif word == "tensor" and current is not None:
                name, tensor = parse_tensor(line)
                results = found[current]
                if results is not None:
                    results[name] = tensor
            elif word == "end":
                current = None
            elif word:
                raise ValueError(f"expected case, tensor, unsupported or end, got {word!r}")
        except (ValueError, IndexError, OverflowError) as error:
            raise ValueError(f"line {number}: {error}") from error
    return found
