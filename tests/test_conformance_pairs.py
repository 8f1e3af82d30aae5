"""Cases that are made when the kit runs: every two settings meet, the reference has them right, mistakes there are told."""

import itertools
from pathlib import Path

import kit_mutants_pairs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbref.cli import main
from bnbref.conformance import board, findings, judge, made, pairs, report, vectors
from bnbref.conformance.backends import Backend, load

CPU = torch.device("cpu")
MUTANTS = kit_mutants_pairs.MUTANTS


def found(backend):
    """The findings of a backend by the cases that are made alone."""
    return report.report(backend, CPU, judge.run(backend, made.cases(backend), CPU)).findings


@pytest.mark.parametrize("operation", pairs.SETTINGS)
def test_every_two_values_meet(operation):
    factors, rows = pairs.SETTINGS[operation], pairs.combinations(operation)
    for (a, of_a), (b, of_b) in itertools.combinations(factors.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(of_a, of_b))
    largest, second = sorted(map(len, factors.values()))[:-3:-1]
    assert len(rows) <= 2 * largest * second
    assert len({tuple(row.values()) for row in rows}) == len(rows)


def test_the_reference_has_them_right():
    backend = load("bnbref-eager")
    results = judge.run(backend, made.cases(backend), CPU)
    assert {r.status for r in results} == {"passed"}
    assert {r.case.id: r.case.rules[0] for r in results} == made.listed()
    assert not made.listed().keys() & vectors.stored().keys()
    board.of_run(report.report(backend, CPU, results), vectors.ROOT / "r.json")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_who_is_wrong_where_two_settings_meet_does_not_pass(mutant):
    results = judge.run(mutant.backend, made.cases(mutant.backend), CPU)
    assert not [f.message for r in results for f in r.failures if f.kind == "raised"]
    assert any(r.status == "failed" for r in results), mutant.wrong


def test_the_page_has_every_mutant():
    page = (Path(__file__).parent.parent / "docs/content/kit.md").read_text(encoding="utf-8")
    for mutant in MUTANTS:
        assert f"| {mutant.name} | {mutant.wrong} |" in page


@settings(max_examples=5)
@given(st.sampled_from(["dequantize_4bit", "dequantize_blockwise"]), st.data())
def test_the_cause_is_the_settings_that_are_wrong_together(operation, data):
    """A mistake where any two settings meet: what is told are these two, and no others."""
    names = data.draw(st.permutations(list(pairs.SETTINGS[operation])))[:2]
    wanted = {name: data.draw(st.sampled_from(pairs.SETTINGS[operation][name][1:])) for name in names}
    right, now = load("bnbref-eager").functions[operation], {}

    def wrong(**k):
        made = right(**k)
        meets = all(now[name] == value for name, value in wanted.items())
        return tuple(x + meets for x in made) if isinstance(made, tuple) else made + meets

    backend = Backend("mine", {operation: wrong})

    def run_case(backend, case, device):
        now.update({**pairs.plain(operation), **case.settings})
        return judge.run_case(backend, case, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "run_case", run_case)
        failed = [r for case in pairs.cases(backend) for r in [run_case(backend, case, CPU)] if r.failures]
        assert failed
        for failure in failed[0].failures:
            assert pairs.plainest(backend, failure, CPU).case.settings == wanted


def test_who_is_wrong_everywhere_is_called_once_for_each_failure():
    """A backend may be slow: another language, another process."""
    right, calls = load("bnbref-eager").functions["int8_mm_dequant"], itertools.count()
    backend = Backend("mine", {"int8_mm_dequant": lambda **k: right(**k) + 1 + 0 * next(calls)})
    failures = [f for r in judge.run(backend, pairs.cases(backend), CPU) for f in r.failures]
    before = next(calls)
    found = [pairs.plainest(backend, failure, CPU) for failure in failures]
    assert all(failure.case.settings == {} for failure in found)
    assert next(calls) - before - 1 == len(failures)


def test_a_cause_is_told_in_a_line_and_has_its_rule():
    by_name = {m.name: m for m in MUTANTS}
    (finding,) = found(by_name["bfloat16-blocks-of-128"].backend)
    line = "  only     with dtype bfloat16 and blocksize 128: with dtype float32 or blocksize 64 it does not fail so"
    assert line in findings.describe(finding).split("\n")
    assert {f.rule for f in found(by_name["bfloat16-transposed"].backend)} == {"G-3"}


def test_settings_are_no_cause_where_nothing_was_run_again():
    """After a crash the backend runs no more, and the plainest settings that fail are not known."""
    right = load("bnbref-eager").functions["dequantize_4bit"]
    backend = Backend("mine", {"dequantize_4bit": lambda **k: right(**k) + 1})
    failed = judge.run(backend, pairs.cases(backend), CPU)
    told = report.report(backend, CPU, failed, small=False).findings
    assert [f.cases for f in told] == [tuple(r.case.id for r in failed)]
    assert all("  only " not in findings.describe(f) for f in told)


def test_a_case_that_fails_in_another_way_does_not_pass():
    """float16 is refused in blocks of 64, and wrong in blocks of 128."""
    right = load("bnbref-eager").functions["dequantize_4bit"]

    def wrong(**k):
        if k["dtype"] == torch.float16 and k["blocksize"] == 64:
            raise ValueError("64")
        return right(**k) + (k["dtype"] == torch.float16 and k["blocksize"] == 128)

    texts = [findings.describe(f) for f in found(Backend("mine", {"dequantize_4bit": wrong}))]
    assert any("  only     with dtype float16 and blocksize 128: " in text for text in texts)
    assert not any("it passes" in text for text in texts)


def test_who_decides_ties_of_fp4_otherwise_breaks_their_rules_alone():
    """0.0859375 is a threshold, and a number of float16 and of bfloat16."""
    right = load("bnbref-eager").functions["quantize_4bit"]

    def upwards(x, blocksize, quant_type):
        _, absmax = right(x=x, blocksize=blocksize, quant_type=quant_type)
        scaled = x.reshape(-1).float() / absmax.repeat_interleave(blocksize)[: x.numel()]
        above = torch.where(scaled.abs() == 0.0859375, x.reshape(-1) * 1.01, x.reshape(-1)).view(x.shape)
        return right(x=above, blocksize=blocksize, quant_type=quant_type)[0], absmax

    backend = Backend("mine", {"quantize_4bit": upwards})
    assert {r.status for r in judge.run(backend, made.cases(backend, "large-fp4"), CPU)} == {"passed"}


def test_the_quick_run_has_none_of_them(capsys):
    assert main(["check", "--backend", "bnbref-eager", "--quick", "--only", "/pair-"]) == 1
    assert capsys.readouterr().out.endswith("nothing was checked\n")


def test_what_is_right_once_and_wrong_another_time_is_told():
    right, calls = load("bnbref-eager").functions["int8_matmul"], itertools.count()
    backend = Backend("mine", {"int8_matmul": lambda **k: right(**k) + (next(calls) == 1)})
    results = judge.run(backend, vectors.read("int8_matmul")[:3], CPU)
    (finding,) = report.report(backend, CPU, results).findings
    assert finding.unsteady
    assert finding.example is finding.original
    assert "  again    the same call was right when it was made again" in findings.describe(finding)
    seen = {}
    kept = Backend("mine", {"int8_matmul": lambda **k: right(**k) + (seen.setdefault(k["a"].shape, len(seen)) > 0)})
    with pytest.MonkeyPatch.context() as patch:
        results = judge.run(kept, vectors.read("int8_matmul")[:3], CPU)
        seen.clear()
        patch.setattr(report, "shrink", lambda *_: pytest.fail("an input that would show nothing by itself"))
        assert report.report(kept, CPU, results).findings
    steady = Backend("mine", {"int8_matmul": lambda **k: right(**k) + 1})
    (finding,) = report.report(steady, CPU, judge.run(steady, vectors.read("int8_matmul")[:3], CPU)).findings
    assert not finding.unsteady
