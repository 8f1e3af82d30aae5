"""The cases, computed anew and written as files: `PYTHONPATH=tests python -m kit_cases DIR`.

A published version never changes, so that what this writes are the bytes that are there, on every machine. For this the bounds
of a published case are those of its file, where those of this machine are the same but for the rounding of float64.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance import archive, vectors
from bnbref.conformance.case import Case
from bnbref.conformance.expected import Expected
from bnbref.conformance.operations import OPERATIONS
from bnbref.conformance.oracles.formula import STATES
from bnbref.conformance.specification import FLAGS, RULES
from bnbref.conformance.vectors import DTYPES, LISTS, SWITCHES, folder_of, raw
from kit_cases.codes import quantization_cases
from kit_cases.steps import optimizer_32bit
from kit_cases.steps_8bit import optimizer_8bit
from kit_cases.sums import product_cases
from kit_cases.values import dequantization_cases
from kit_cases.version2 import version_2_cases
from kit_cases.version3 import version_3_cases
from kit_cases.version4 import version_4_cases


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
    published = {case.id: case for case in vectors.read_all()}
    return {
        version: [as_published(case, published[case.id]) if case.id in published else case for case in cases]
        for version, cases in made.items()
    }


ROUNDED_OTHERWISE = 2.0**-24
"""By what share of its width a bound may differ between two machines.

The square root of float64 that torch takes from MKL errs by up to one unit in the last place, on each kind of CPU for other
numbers; the order of a sum depends on the CPU, too. Either moves a bound by at most 2^-52 of an intermediate result. An interval
is at least 2^-21 of each of its intermediate results wide (`Interval.widened`), so one rounding is at most 2^-31 of the width,
and no formula has more than 2^7 of them.
"""


def as_published(case: Case, published: Case) -> Case:
    """The case with the bounds of its file, where these differ from its own by roundings of float64 at most."""

    def bounds(name: str, made: Expected) -> Expected:
        file = published.expected.get(name)
        if file is None or made.low is None or made.high is None or file.low is None or file.high is None:
            return made
        if made.low.shape != file.low.shape:
            return made
        moved = torch.maximum((made.low - file.low).abs(), (made.high - file.high).abs())
        same = (made.low == file.low) & (made.high == file.high)  # infinite bounds have no distance
        if not (same | (moved <= ROUNDED_OTHERWISE * (file.high - file.low))).all():
            return made
        return replace(made, low=file.low, high=file.high)

    return replace(case, expected={name: bounds(name, made) for name, made in case.expected.items()})


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


def write(root: Path) -> None:
    """Compute all cases and write their files and sums, with the two that are written by hand, a folder for each version."""
    for version, cases in all_cases().items():
        by_hand = {name: (folder_of(version) / name).read_bytes() for name in ("README.md", "schema.json")}
        folder_of(version, root).mkdir(exist_ok=True)
        for name, data in {**files(cases, version), **by_hand}.items():
            (folder_of(version, root) / name).write_bytes(data)
        (folder_of(version, root) / archive.SUMS).write_text(archive.sums(folder_of(version, root)), encoding="utf-8")
        print(archive.digest(folder_of(version, root)))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
