"""The cases as files that need neither Python nor torch: a pair for each operation, in the folder of its version.

A version has the cases that came with it: v1/ of the first eighteen operations, v2/ of more optimizers, v3/ and v4/ what those
before let pass. OPERATION.json lists the cases, as schema.json says. OPERATION.safetensors has their tensors: eight bytes of
length, a JSON header, the bytes of the tensors, little-endian.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.archive import DIGESTS
from bnbref.conformance.case import Case
from bnbref.conformance.expected import Also, Expected
from bnbref.conformance.operations import OPERATIONS

VERSIONS = tuple(DIGESTS)
ROOT = Path(__file__).parent
"""The folder of the folders of all versions."""

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""Dtypes by the names that safetensors has for them."""


LISTS, SWITCHES = ("rules", "flags", "layout"), ("may_refuse", "quick", "derived")
"""Fields of a case that are lists of names, or true or false."""


# ---- safetensors ----------------------------------------------------------------------------------------------------


def _little_endian(data: bytes, size: int) -> bytes:
    """The words of `size` bytes, from this machine's order of bytes or to it."""
    if sys.byteorder == "little":
        return data
    return b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor, little-endian.

    >>> raw(torch.tensor([1.0])).hex()
    '0000803f'
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return _little_endian(bytes(flat.tolist()), tensor.element_size())


def from_bytes(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor of which these are the bytes, little-endian."""
    if not data:
        return torch.empty(tuple(shape), dtype=dtype)
    words = bytearray(_little_endian(data, dtype.itemsize))
    return torch.frombuffer(words, dtype=torch.uint8).clone().view(dtype).view(tuple(shape))


def load_safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    >>> import safetensors.torch
    >>> load_safetensors(safetensors.torch.save({"x": torch.tensor([1, 2])}))
    {'x': tensor([1, 2])}
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    body = data[start:]
    return {
        name: from_bytes(body[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]], entry["shape"])
        for name, entry in header.items()
    }


# ---- files ----------------------------------------------------------------------------------------------------------


def folder_of(version: int, root: Path = ROOT) -> Path:
    """Where the files of a version are."""
    return root / f"v{version}"


def _bodies(operation: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders that have cases of an operation, and what its JSON says there."""
    for folder in map(folder_of, VERSIONS):
        file = folder / f"{operation}.json"
        if file.exists():
            yield folder, json.loads(file.read_text(encoding="utf-8"))


def read(operation: str) -> list[Case]:
    """The stored cases of an operation.

    >>> read("int8_dequantize")[0].id
    'int8_dequantize/every-code'
    """
    return [case for folder, body in _bodies(operation) for case in _read(folder, body)]


def _read(folder: Path, body: Mapping[str, Any]) -> Iterator[Case]:
    tensors = load_safetensors((folder / body["tensors"]).read_bytes())

    def expected(entry: Mapping[str, Any]) -> Expected:
        found = {name: tensors[entry[name]] for name in ("free", "pairs", "low", "high") if name in entry}
        also = Also(tensors[entry["also_index"]], tensors[entry["also_value"]]) if "also_index" in entry else None
        return Expected(tensors[entry["value"]], ulp=entry.get("ulp", 0), also=also, **found)

    def case(entry: Mapping[str, Any]) -> Case:
        inputs = {name: tensors[key] for name, key in entry["inputs"].items()}
        outputs = {name: expected(output) for name, output in entry["outputs"].items()}
        rest: dict[str, Any] = {name: tuple(entry[name]) for name in LISTS}
        rest |= {name: entry[name] for name in SWITCHES}
        return Case(entry["id"], body["operation"], entry["params"], inputs, outputs, **rest)

    return map(case, body["cases"])


def read_all() -> list[Case]:
    """All stored cases."""
    return [case for op in OPERATIONS for case in read(op)]


def stored() -> dict[str, dict[str, Any]]:
    """Each stored case by its id, as its file has it: without its tensors."""
    return {case["id"]: case for op in OPERATIONS for _, body in _bodies(op) for case in body["cases"]}
