"""The cases as files that need neither Python nor torch: a pair for each operation, in the folder of its version.

A version has the cases that came with it: v1/ of the first eighteen operations, v2/ of more optimizers, v3/ and v4/ what those
before let pass. OPERATION.json lists the cases, as schema.json says. OPERATION.safetensors has their tensors: eight bytes of
length, a JSON header, the bytes of the tensors, little-endian.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.cases import Case
from bnbref.conformance.cases.codes import quantization_cases
from bnbref.conformance.cases.steps import optimizer_32bit
from bnbref.conformance.cases.steps_8bit import optimizer_8bit
from bnbref.conformance.cases.sums import product_cases
from bnbref.conformance.cases.values import dequantization_cases
from bnbref.conformance.cases.version2 import version_2_cases
from bnbref.conformance.cases.version3 import version_3_cases
from bnbref.conformance.cases.version4 import version_4_cases
from bnbref.conformance.expected import Also, Expected
from bnbref.conformance.operations import OPERATIONS
from bnbref.conformance.oracles.formula import STATES
from bnbref.conformance.specification import FLAGS, RULES

VERSIONS = (1, 2, 3, 4)
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


def save_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file: the largest dtypes first, so that all are aligned."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        parts.append(raw(tensor))
        start, end = end, end + len(parts[-1])
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
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
        name: from_bytes(body[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]], entry["shape"])
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


def all_cases() -> dict[int, list[Case]]:
    """Every case by the version that it came with, in a fixed order, computed from the oracles. Takes some seconds.

    Raises ValueError where two have one id.
    """
    first = [*quantization_cases(), *dequantization_cases(), *product_cases()]
    first += [case for cases in (optimizer_32bit, optimizer_8bit) for name in STATES for case in cases(name)]
    made = {1: first, 2: [*version_2_cases()]}
    for version, later in ((3, version_3_cases), (4, version_4_cases)):
        made[version] = list(later({case.id: case for cases in made.values() for case in cases}))
    repeated = [name for name, n in Counter(case.id for cases in made.values() for case in cases).items() if n > 1]
    if repeated:
        raise ValueError(f"cases must have ids of their own, got {repeated} twice")
    return made


def files(cases: Sequence[Case], version: int) -> dict[str, bytes]:
    """The files of the cases of a version by name."""
    made: dict[str, bytes] = {}
    for op in OPERATIONS:
        chosen = [case for case in cases if case.operation == op]
        if not chosen:
            continue
        store = _Store()
        listed = [
            {
                "id": case.id,
                "params": dict(case.params),
                "inputs": {name: store.add(tensor) for name, tensor in case.inputs.items()},
                "outputs": {name: _output(expected, store) for name, expected in case.expected.items()},
                **{name: list(getattr(case, name)) for name in LISTS},
                **{name: getattr(case, name) for name in SWITCHES},
            }
            for case in chosen
        ]
        rules = dict.fromkeys(rule for case in chosen for rule in case.rules)
        flags = dict.fromkeys(flag for case in chosen for flag in case.flags)
        body = {
            "version": version,
            "operation": op,
            "tensors": f"{op}.safetensors",
            "rules": {rule: {"text": RULES[rule].text, "freedom": RULES[rule].freedom} for rule in rules},
            "flags": {flag: {"story": FLAGS[flag].story, "issue": FLAGS[flag].issue} for flag in flags},
            "cases": listed,
        }
        made[f"{op}.json"] = (json.dumps(body, indent=1) + "\n").encode()
        made[f"{op}.safetensors"] = save_safetensors(store.tensors)
    return made


def folder_of(version: int, root: Path = ROOT) -> Path:
    """Where the files of a version are."""
    return root / f"v{version}"


def write(root: Path) -> None:
    """Compute all cases and write their files, with the two that are written by hand, a folder for each version."""
    for version, cases in all_cases().items():
        by_hand = {name: (folder_of(version) / name).read_bytes() for name in ("README.md", "schema.json")}
        folder_of(version, root).mkdir(exist_ok=True)
        for name, data in {**files(cases, version), **by_hand}.items():
            (folder_of(version, root) / name).write_bytes(data)


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
