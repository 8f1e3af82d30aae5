"""No false red: what a report says is broken, a program shows that does not know bnbref."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "content" / "conformance"
PROGRAMS = RESULTS / "programs"
SAME_PROGRAM = {"bitsandbytes-cpu-fork": "bitsandbytes"}
SAYS_RED = {"red", "red_codes", "shown"}
"""The functions of the programs whose first argument is a rule."""

REPORTS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}
RED = [name for name, report in REPORTS.items() if report["findings"]]


def program(name):
    return PROGRAMS / f"red_{SAME_PROGRAM.get(name, name)}.py"


def red(report):
    return {finding["rule"] for finding in report["findings"]}


@pytest.mark.parametrize("name", RED)
def test_every_red_rule_has_a_program_that_does_not_import_bnbref(name):
    tree = ast.parse(program(name).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in SAYS_RED]
    assert red(REPORTS[name]) <= {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        assert not any(str(name).startswith("bnbref") for name in names)


@pytest.mark.parametrize("name", [name for name in RED if REPORTS[name]["device"] == "cpu"])
def test_the_program_finds_what_the_report_says(name):
    report = REPORTS[name]
    for package, version in report["versions"].items():
        names = importlib.metadata.packages_distributions().get(package, [])
        if version not in map(importlib.metadata.version, names):
            pytest.skip(f"{package} {version} is not installed")
    if report["backend"] == "tinygrad" and "TINYGRAD" not in os.environ:
        pytest.skip("needs tinygrad's repository")
    done = subprocess.run([sys.executable, program(name)], capture_output=True, text=True, check=True)
    assert set(re.findall(r"^(\S+) is broken", done.stdout, re.MULTILINE)) == red(report)
