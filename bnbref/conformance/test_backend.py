"""`pytest --pyargs bnbref.conformance --backend NAME --device DEV`: every case, and random inputs, as tests."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from bnbref.codebooks import DYNAMIC, value_table
from bnbref.conformance.case import Case
from bnbref.conformance.findings import describe
from bnbref.conformance.judge import Result, run_case
from bnbref.conformance.oracles import expect
from bnbref.conformance.report import report


class _Wrong(Exception):
    """The result of a random input is wrong."""


def verdict(tested: Any, result: Result) -> None:
    """Fails the test with the findings, one screen each; skips it where nothing ran."""
    if result.status in ("refused", "not implemented"):
        pytest.skip(result.status)
    if result.failures:
        found = report(tested.backend, tested.device, [result]).findings
        pytest.fail("\n\n".join(map(describe, found)), pytrace=False)


def test_case(tested: Any, case: Case) -> None:
    """The results are what the rules allow."""
    result = run_case(tested.backend, case, tested.device)
    tested.results.append(result)
    verdict(tested, result)


@pytest.mark.parametrize("operation", ["quantize_blockwise", "quantize_4bit"])
def test_random(tested: Any, operation: str) -> None:
    """Any finite float32 in blocks of 64, sizes that are no multiple of it: the rules hold."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    if operation not in tested.backend.functions:
        pytest.skip("not implemented")
    last: list[Result] = []
    statuses = set()
    # Larger and smaller numbers have cases of their own.
    numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)

    def property_(x: list[float], quant_type: str) -> None:
        inputs = {"x": torch.tensor(x)}
        params: dict[str, Any] = {"blocksize": 64}
        if operation == "quantize_4bit":
            params["quant_type"] = quant_type
        else:
            inputs["values"] = value_table(DYNAMIC, torch.device("cpu"))
        rule = "Q8-3" if operation == "quantize_blockwise" else "Q4-3"
        case = Case(f"{operation}/random", operation, params, inputs, expect(operation, inputs, params), (rule,))
        last[:] = [run_case(tested.backend, case, tested.device)]
        statuses.add(last[0].status)
        if last[0].failures:
            raise _Wrong(last[0].failures[0].message)

    settings = hypothesis.settings(max_examples=tested.examples, deadline=None, database=None, derandomize=True)
    given = hypothesis.given(st.lists(numbers, min_size=1, max_size=130), st.sampled_from(["nf4", "fp4"]))
    with contextlib.suppress(_Wrong):  # told below, with the smallest input that hypothesis found
        settings(given(property_))()
    if statuses <= {"refused", "not implemented"}:  # as where `Unsupported` is raised
        pytest.skip("not implemented")
    if last and last[0].failures:
        (result,) = last
        if result.failures[0].output == "absmax":
            result = replace(result, case=replace(result.case, rules=(result.case.rules[0][:2] + "-1",)))
            result = replace(result, failures=tuple(replace(f, case=result.case) for f in result.failures))
        tested.results.append(result)
        verdict(tested, result)
