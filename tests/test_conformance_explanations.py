"""What a report says of a failure is so: whose convention it follows, and that the smallest input shows it."""

from dataclasses import fields, replace

import kit_mutants
import pytest
import torch

from bnbref.conformance import findings, judge, report, vectors
from bnbref.conformance.backends import Backend
from bnbref.conformance.dialects import BNB_CUDA, DIALECTS, REFERENCE, TEXT, in_words
from bnbref.conformance.explain import explain
from bnbref.conformance.oracles import ORACLES
from bnbref.conformance.oracles.formula import Conventions
from bnbref.conformance.predictions import PREDICT, predict
from bnbref.conformance.shrink import shrink
from bnbref.kernels import eager

CPU = torch.device("cpu")
STORED = vectors.read_all()
CONVENTIONS = {
    (name, str(getattr(d, name))): (name, getattr(d, name))
    for d in DIALECTS
    for name in TEXT
    if getattr(d, name) != getattr(REFERENCE, name)
}
"""Every convention of a dialect, a field and its value, once."""


@pytest.mark.parametrize("operation", PREDICT)
def test_what_is_predicted_of_the_reference_is_right(operation):
    """A prediction that is wrong of the reference would make a convention of any mistake."""
    for case in (c for c in STORED if c.operation == operation):
        predicted = predict(REFERENCE, case)
        known = replace(case, expected={name: case.expected[name] for name in predicted})
        assert predicted or operation == "load_4bit"
        assert [f.message for f in judge.failures_of(known, predicted)] == [], case.id


OF_STEPS = {field.name for field in fields(Conventions)}


def followed(field, value):
    """The failures of who has this convention alone, in the first case of each operation that it makes fail."""
    dialect = replace(REFERENCE, **{field: value})
    for operation in PREDICT:
        if (field in OF_STEPS) != operation.startswith("optimizer") and field not in ("ties", "floor"):
            continue
        for case in (c for c in STORED if c.operation == operation and c.quick):
            predicted = predict(dialect, case)
            known = replace(case, expected={name: case.expected[name] for name in predicted})
            failures = [f for f in judge.failures_of(known, predicted) if f.kind == "value"]
            if failures:
                yield from failures
                break


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda c: f"{c[0]}-{str(c[1])[:12]}")
def test_who_has_a_convention_is_told_so(convention):
    """Or another's, where that makes the same of the case: a scale of 1 is the same in float16."""
    told = [[line.partition(": ")[2] for line in explain(failure)] for failure in followed(*convention)]
    assert all(told)
    assert not told or any(in_words(*convention) in texts for texts in told)


def _one_more(operation, name):
    """A backend whose result of that name has one added to its last element."""

    def function(**arguments):
        made = kit_mutants.right(operation)(**arguments)
        if isinstance(made, dict):
            return {**made, name: _added(made[name])}
        return (_added(made[0]), *made[1:]) if isinstance(made, tuple) else _added(made)

    return Backend("mine", {operation: function}, within=eager)


def _added(x):
    x = x.clone()
    x.view(-1)[-1:] += 1
    return x


@pytest.mark.parametrize(
    ("name", "output", "most"),
    [
        ("quantize_4bit/nf4-noise-float32", "packed", 2),
        ("quantize_blockwise/signed-noise-bfloat16", "codes", 256 + 2),
        ("dequantize_4bit/nf4-columns-32-float32", "y", None),
        ("gemm_4bit/nf4-5-32x128-bias-float32", "y", None),
        ("int8_quantize/noise-float32", "codes", 1),
        ("int8_matmul/5x3x33", "product", 66),
        ("int8_mm_dequant/bias-float32", "y", 4),
        ("optimizer_32bit/adam-usual", "p", 4),
        ("optimizer_8bit/ademamix-size-257", "p", 5 + 3 + 512),
    ],
)
def test_the_smallest_input_shows_the_failure(name, output, most):
    """Run for itself, it fails in the same way. It is smaller, and where `most` is given it has no more numbers than that: an
    element of x and the absmax; of a step an element of each tensor, a scale of each state, and the codebooks."""
    case = next(c for c in STORED if c.id == name)
    backend = _one_more(case.operation, output)
    (failure, *_) = (f for f in judge.run_case(backend, case, CPU).failures if f.output == output)
    small = shrink(backend, failure, CPU)
    assert (output, "value") in [(f.output, f.kind) for f in judge.run_case(backend, small.case, CPU).failures]
    assert findings.size_of(small) < findings.size_of(failure)
    assert most is None or findings.size_of(small) <= most
    assert case.operation in ORACLES


def test_a_finding_says_where_what_and_of_how_many_cases():
    backend = _one_more("int8_mm_dequant", "y")
    cases = [c for c in STORED if c.operation == "int8_mm_dequant"][:2]
    results = judge.run(backend, cases, CPU)
    one, two = (report.report(backend, CPU, chosen) for chosen in (results[:1], results))
    (finding,) = one.findings
    lines = findings.describe(finding).split("\n")
    assert lines[0] == cases[0].id
    assert "  input    dtype=float32" in lines
    last = findings.elements(finding.example)[-1]
    assert last.place == tuple(n - 1 for n in finding.example.got.shape)
    assert report.counts(two.results) == {"passed": 0, "failed": 2, "refused": 0, "not implemented": 0}
    told = report.as_text(two).split("\n")
    assert any(line.split() == ["int8_mm_dequant", "0/2", "-", "-", "-"] for line in told)
    assert any(line.startswith("broken: ") for line in told)
    assert "conforms" not in told


def test_a_scalar_that_is_wrong_has_no_place():
    backend = Backend("mine", {"quantize_4bit_nested": _with_offset}, within=eager)
    case = next(c for c in STORED if c.operation == "quantize_4bit_nested")
    (failure,) = judge.run_case(backend, case, CPU).failures
    (element,) = findings.elements(failure)
    assert element.want == findings.number(case.expected["offset"].value)


def _with_offset(**k):
    packed, codes, absmax2, offset = kit_mutants.right("quantize_4bit_nested")(**k)
    return packed, codes, absmax2, offset + 1


def test_a_step_is_told_whatever_the_order_of_its_operations():
    """One unit in the last place beside what the reference's order makes of the convention."""
    case = next(c for c in STORED if c.id == "optimizer_32bit/adam-decay")
    predicted = predict(BNB_CUDA, case)
    beside = {**predicted, "p": predicted["p"].nextafter(torch.tensor(torch.inf))}
    (failure,) = (f for f in judge.failures_of(case, beside) if f.output == "p")
    assert [line.partition(": ")[2] for line in explain(failure)] == [in_words("decay_after", True)]


def test_inputs_of_eight_numbers_are_told_and_of_nine_begun():
    case = next(c for c in STORED if c.id == "quantize_4bit/nf4-noise-float32")
    eight, nine = (
        findings.inputs_of(judge.Failure(replace(case, inputs={"x": torch.ones(n)}), "packed", "value", ""))[0] for n in (8, 9)
    )  # fmt: skip
    assert eight == f"x = {[1.0] * 8} float32, hex {' '.join(['3f800000'] * 8)}"
    assert nine == "x = float32 [9], hex 3f800000 3f800000 3f800000 3f800000 ..."


def test_a_mistake_is_no_refusal():
    """A KeyError is none of the exceptions by which a backend may refuse a blocksize."""
    case = next(c for c in STORED if c.id == "quantize_4bit/nf4-blocksize-100")
    for error, status in ((KeyError("100"), "failed"), (ValueError("100"), "refused")):
        backend = Backend("mine", {"quantize_4bit": lambda error=error, **_: _raise(error)})
        assert judge.run_case(backend, case, CPU).status == status


def _raise(error):
    raise error
