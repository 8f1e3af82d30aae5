"""Running the cases on a backend, and judging what comes back."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Backend, Unsupported
from bnbref.conformance.cases import Case
from bnbref.conformance.expected import same, wrong_elements
from bnbref.conformance.operations import OPERATIONS, arguments

REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)
"""Exceptions by which a backend may say that it does not support something."""


@dataclass(frozen=True)
class Failure:
    """One result that the rules do not allow.

    output: the name of the result; of the input, where kind is "mutated". kind: "value", "shape", "dtype", "missing", "raised",
    "crashed" or "mutated". message: one line. wrong: flat indices of the wrong elements. got: the result as it came, None where
    there was none.
    """

    case: Case
    output: str
    kind: str
    message: str
    wrong: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    got: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """What became of a case, and the seconds it took.

    status: "passed", "failed", "not implemented", or "refused", where the rules allow an exception.
    """

    case: Case
    status: str
    failures: tuple[Failure, ...] = ()
    seconds: float = 0.0


def given(case: Case, device: torch.device) -> dict[str, Any]:
    """The arguments of a case on a device: copies of its own."""
    tensors: dict[str, Any] = {}
    for name, tensor in case.inputs.items():
        tensor = tensor.to(device, copy=True)
        tensors[name] = tensor.t().contiguous().t() if name in case.layout else tensor
    absent = {name: None for name in OPERATIONS[case.operation].optional if name not in tensors}
    return {**tensors, **arguments(case.params), **absent}


def call(function: Callable[..., Any], case: Case, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """The results by name, on the CPU, and the names of inputs that were modified."""
    keywords = given(case, device)
    with torch.enable_grad():  # a package for inference may have switched it off when it was imported
        result = function(**keywords)
    if isinstance(result, Mapping):
        named = dict(result)
    else:
        parts = result if isinstance(result, (tuple, list)) else (result,)
        named = dict(zip(case.expected, parts, strict=False))
    cpu = {name: part.detach().cpu() if isinstance(part, Tensor) else part for name, part in named.items()}
    mutated = [n for n, t in case.inputs.items() if not bool(same(keywords[n].cpu(), t).all())]
    return cpu, mutated


def failures_of(case: Case, results: Mapping[str, Any]) -> Iterator[Failure]:
    """What is wrong with the results of a case."""
    for name, expected in case.expected.items():
        got, want = results.get(name), expected.value
        if not isinstance(got, Tensor):
            yield Failure(case, name, "missing", f"{name} is {got!r}, must be a tensor")
            continue
        if got.dtype != want.dtype:
            yield Failure(case, name, "dtype", f"{name} is {got.dtype}, must be {want.dtype}", got=got)
            continue
        if got.shape != want.shape:
            message = f"{name} has shape {list(got.shape)}, must have {list(want.shape)}"
            yield Failure(case, name, "shape", message, got=got)
        wrong = wrong_elements(got, expected) if got.numel() == want.numel() else torch.empty(0)
        if wrong.numel():
            message = f"{wrong.numel()} of {got.numel()} elements of {name} are wrong"
            yield Failure(case, name, "value", message, wrong, got)
    extra = sorted(set(results) - set(case.expected))
    if extra:
        yield Failure(case, extra[0], "missing", f"{', '.join(extra)} should not be there")


def of_answer(
    case: Case, results: Mapping[str, Any] | None, mutated: Iterable[str] = (), seconds: float = 0.0
) -> Result:
    """The result of a case, of what was returned by name; None where there is no answer."""
    if results is None:
        return Result(case, "not implemented", seconds=seconds)
    failures = [Failure(case, name, "mutated", f"the argument {name} was modified") for name in mutated]
    failures += failures_of(case, results)
    return Result(case, "failed" if failures else "passed", tuple(failures), seconds)


def run_case(backend: Backend, case: Case, device: torch.device) -> Result:
    """One case on a backend."""
    function = backend.functions.get(case.operation)
    if function is None:
        return Result(case, "not implemented")
    begin = time.perf_counter()
    try:
        results, mutated = call(function, case, device)
    except Exception as error:  # whatever a backend throws is a finding, not the end of the run
        if case.may_refuse and isinstance(error, REFUSALS) and not isinstance(error, Unsupported):
            return Result(case, "refused", seconds=time.perf_counter() - begin)
        if isinstance(error, NotImplementedError):
            return of_answer(case, None, seconds=time.perf_counter() - begin)
        text = f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Result(case, "failed", (Failure(case, "", "raised", text),), time.perf_counter() - begin)
    return of_answer(case, results, mutated, time.perf_counter() - begin)


def run(backend: Backend, cases: Iterable[Case], device: torch.device) -> list[Result]:
    """All cases on a backend, in order."""
    return [run_case(backend, case, device) for case in cases]
