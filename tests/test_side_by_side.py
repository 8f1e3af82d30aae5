"""bnbref beside the real bitsandbytes: every difference has a reason that was tried, and the page says what was found."""

import importlib.util
import json
import subprocess
import sys

import pytest
import side_by_side
import torch
from side_by_side import CORRECTIONS, FAIL, Outcome, Row, difference, judge

needs_the_libraries = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "peft", "accelerate")),
    reason="transformers, peft and accelerate are not installed: pip install 'bnbref[hf]'",
)


@pytest.mark.slow
@needs_the_libraries
def test_every_difference_has_a_reason():
    """Runs all flows on both, and on bitsandbytes with the corrections that are the reasons."""
    command = [sys.executable, side_by_side.__file__]
    done = subprocess.run(command, cwd=side_by_side.ROOT, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


@needs_the_libraries
def test_the_page_is_what_was_found():
    facts = json.loads(side_by_side.STORED.read_text(encoding="utf-8"))
    assert side_by_side.PAGE.read_text(encoding="utf-8") == side_by_side.page(facts)
    rows = [Row(**row) for row in facts["rows"]]
    assert [row.flow for row in rows] == [*side_by_side.all_flows()]
    assert {row.flow: tuple(row.reasons) for row in rows if row.reasons} == side_by_side.all_reasons()
    assert {row.flow for row in rows if row.bnbref} == FAIL.keys()


# The judge, on findings whose verdict is known.


@pytest.mark.parametrize(
    ("rows", "reasons", "left", "verdict"),
    [
        ([Row("f", None, None, "", [])], {}, {}, None),
        ([Row("f", None, None, "1%", [])], {}, {}, "f: 1%, and no reason is known"),
        ([Row("f", "E", None, "one raises", [])], {}, {}, "no reason is known"),
        ([Row("f", None, None, "1%", ["bins"])], {"f": ("bins",)}, {}, None),
        ([Row("f", None, None, "", ["bins"])], {"f": ("bins",)}, {}, "f: there is no difference any more"),
        ([Row("f", None, None, "1%", ["bins"])], {"f": ("bins",)}, {("bins",): "2%"}, "f: 2%, although corrected for bins"),
        ([Row("f", None, None, "1%", [])], {"f": ("bins", "meta")}, {("bins",): "1%"}, "f: meta explain it alone"),
        ([Row("f", None, None, "1%", [])], {"f": ("bins", "meta")}, {("bins",): "1%", ("meta",): "1%"}, None),
        ([Row("f", "E", "E", "", [])], {}, {}, "f: bnbref raises, and no reason is known"),
        ([], {"g": ("bins",)}, {}, "g: there is no such flow"),
    ],
)  # fmt: skip
def test_the_judge(rows, reasons, left, verdict, monkeypatch):
    monkeypatch.setattr(
        side_by_side, "CORRECTIONS", {name: CORRECTIONS[name] for own in reasons.values() for name in own}
    )
    wrong = judge(rows, reasons, {}, lambda name, part: left.get(part, ""))
    assert wrong == [] if verdict is None else len(wrong) == 1 and verdict in wrong[0]


def test_the_judge_on_errors_and_idle_corrections(monkeypatch):
    monkeypatch.setattr(side_by_side, "CORRECTIONS", {"bins": CORRECTIONS["bins"]})
    wrong = judge([Row("f", None, None, "", [])], {}, {"f": "peft"}, lambda name, part: "")
    assert wrong == ["f: bnbref does not raise any more", "bins: a correction that is no reason of any flow"]


def test_differences():
    def of(**tensors):
        return Outcome({name: torch.tensor(value) for name, value in tensors.items()}, None)

    assert difference(of(a=1.0), of(a=1.0)) == ""
    assert difference(of(a=0.0), of(a=-0.0)) == "signs of zeros"
    assert difference(of(a=[1.0, 0.0]), of(a=[1.0, 0.1])) == "1e-01 of the norm"
    assert difference(of(a=[1, 2]), of(a=[1, 3])) == "50.0% of codes"
    assert difference(of(a=float("nan")), of(a=1.0)) == "100.0% of codes"
    assert difference(of(a=1), of(b=1)) == "other tensors"
    assert difference(of(a=1), of(a=1.0)) == "other shapes or dtypes"
    assert difference(Outcome(None, "E"), of(a=1)) == "one raises"
    assert difference(Outcome(None, "E"), Outcome(None, "E")) == ""
