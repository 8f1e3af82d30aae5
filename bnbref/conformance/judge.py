"""Running the cases on a backend, and judging what comes back."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Backend, Unsupported
from bnbref.conformance.case import Case
from bnbref.conformance.expected import same, wrong_elements
from bnbref.conformance.operations import OPERATIONS, arguments
from bnbref.subnormals import with_subnormals

REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)
"""Exceptions by which a backend may say that it does not support something."""


@dataclass(frozen=True)
class Failure:
    """One result that the rules do not allow.

    output: the name of the result, empty where there is none. kind: "value", "shape", "dtype", "missing", "raised",
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
    """The outcome of one case, and the seconds that it took.

    status: "passed", "failed", "not implemented", or "refused", where the rules allow an exception.
    """

    case: Case
    status: str
    failures: tuple[Failure, ...] = ()
    seconds: float = 0.0


BESIDE = 64
"""How many elements lie in memory before and behind those of an argument: an address stays a multiple of 64 bytes."""


def _room(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory for a tensor and what lies beside it, full of the largest number of its dtype."""
    kind = torch.finfo(tensor.dtype) if tensor.is_floating_point() else torch.iinfo(tensor.dtype)
    return torch.full((tensor.numel() + 2 * BESIDE,), kind.max, dtype=tensor.dtype, device=device)


def given(case: Case, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of a case on a device, copies of its own; and the memory in which each tensor lies, as a slice does."""
    tensors: dict[str, Any] = {}
    memory = {name: _room(tensor, device) for name, tensor in case.inputs.items()}
    for name, tensor in case.inputs.items():
        own = memory[name].detach()[BESIDE : BESIDE + tensor.numel()]
        tensors[name] = own.view(tensor.t().shape).t() if name in case.layout else own.view(tensor.shape)
        tensors[name].copy_(tensor)
    absent = {name: None for name in OPERATIONS[case.operation].optional if name not in tensors}
    return {**tensors, **arguments(case.params), **absent}, memory


def by_name(case: Case, result: Any) -> dict[str, Any]:
    """The results by name. What a tuple has beyond the names of the operation is called by its number: `result 3`.

    None at the end of a tuple is no result: a state that an optimizer does not have.
    """
    if isinstance(result, Mapping):
        return dict(result)
    parts = list(result) if isinstance(result, (tuple, list)) else [result]
    while len(parts) > len(case.expected) and parts[-1] is None:
        parts.pop()
    names = [name for name in OPERATIONS[case.operation].results if name in case.expected]
    names += [f"result {i + 1}" for i in range(len(case.expected), len(parts))]
    return dict(zip(names, parts, strict=False))


def _dense(part: Any) -> bool:
    return isinstance(part, Tensor) and part.layout == torch.strided and part.device.type != "meta"


def _unchanged(x: Tensor, was: Tensor) -> bool:
    return x.shape == was.shape and bool(same(x.detach().cpu(), was).all())


def modified(case: Case, keywords: Mapping[str, Any], memory: Mapping[str, Tensor]) -> list[str]:
    """The names of the inputs that are not what they were, or beside which something was written."""

    def kept(x: Tensor, was: Tensor, around: Tensor) -> bool:
        beside = torch.cat((around[:BESIDE], around[-BESIDE:])).cpu()
        return _unchanged(x, was) and len(beside.unique()) == 1

    return [name for name, was in case.inputs.items() if not kept(keywords[name], was, memory[name])]


def failures_of(case: Case, results: Mapping[str, Any]) -> Iterator[Failure]:
    """What is wrong with the results of a case."""
    for name, expected in case.expected.items():
        got, want = results.get(name), expected.value
        if name not in results:
            yield Failure(case, name, "missing", f"{name} is missing: the results are {', '.join(results) or 'none'}")
            continue
        if not isinstance(got, Tensor):
            what = "None" if got is None else f"of type {type(got).__module__}.{type(got).__name__}"
            yield Failure(case, name, "missing", f"{name} is {what}, must be a torch.Tensor")
            continue
        if got.layout != torch.strided or got.device.type == "meta":
            yield Failure(case, name, "missing", f"{name} has no elements in memory: {got.layout} on {got.device}")
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
    failures = [Failure(case, "", "mutated", message) for message in mutated]
    with with_subnormals():
        failures += failures_of(case, results)
    return Result(case, "failed" if failures else "passed", tuple(failures), seconds)


def run_case(backend: Backend, case: Case, device: torch.device) -> Result:
    """Runs one case on a backend, and judges what it returns."""
    function = backend.functions.get(case.operation)
    if function is None:
        return Result(case, "not implemented")
    keywords, memory = given(case, device)
    begin = time.perf_counter()
    try:
        with torch.enable_grad():  # a package for inference may have switched it off when it was imported
            returned = by_name(case, function(**keywords))
        results = {k: x.detach().to("cpu", copy=True) if _dense(x) else x for k, x in returned.items()}
    except (Exception, SystemExit) as error:  # whatever a backend throws is a finding, not the end of the run
        if case.may_refuse and isinstance(error, REFUSALS) and not isinstance(error, Unsupported):
            return Result(case, "refused", seconds=time.perf_counter() - begin)
        if isinstance(error, NotImplementedError):
            return of_answer(case, None, seconds=time.perf_counter() - begin)
        first = next(filter(str.strip, str(error).splitlines()), "").strip()
        # A name of a file that is not in UTF-8 has letters that nothing can print.
        text = f"raised {type(error).__name__}: {first.encode(errors='backslashreplace').decode()}"
        return Result(case, "failed", (Failure(case, "", "raised", text),), time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    mutated = [f"the argument {name} was modified, or memory beside it" for name in modified(case, keywords, memory)]
    if not all(_unchanged(x, was) for x, was in backend.returned):
        mutated.append("what the call before had returned was modified")
    backend.returned = [(x, results[name]) for name, x in returned.items() if _dense(x)]
    return of_answer(case, results, mutated, seconds)


def run(backend: Backend, cases: Iterable[Case], device: torch.device) -> list[Result]:
    """Runs cases on a backend, and judges them, in order."""
    return [run_case(backend, case, device) for case in cases]
