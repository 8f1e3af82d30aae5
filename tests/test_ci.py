"""The kit in other people's CI: the action runs as GitHub would run it, the page can be copied, the badge tells what happened."""

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from bnbref.cli import main
from bnbref.conformance import archive

ROOT = Path(__file__).resolve().parent.parent
ACTION = ROOT / ".github" / "actions" / "check" / "action.yml"
PAGE = ROOT / "docs" / "content" / "ci.md"
RIGHT = "import torch\ndef int8_matmul(a, b):\n    return torch.matmul(a.int(), b.int().transpose(-1, -2))\n"
WRONG = "import torch\ndef int8_matmul(a, b):\n    return (a.float() @ b.float().transpose(-1, -2)).to(torch.int32)\n"
CHOSEN = 'from kit_mutants import MUTANTS\nbackend = next(m.backend for m in MUTANTS if m.name == "ties-to-lower")\n'


@pytest.fixture
def action():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(ACTION.read_text(encoding="utf-8"))


def run_action(action, place, **inputs):
    """The steps of the action, but for the first, which installs; status, outputs and summary."""
    names = {name.replace("_", "-"): value for name, value in inputs.items()}
    given = {name: names.get(name, entry.get("default")) for name, entry in action["inputs"].items()}
    assert None not in given.values()
    files = {name: place / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    bin_ = place / "bin"
    bin_.mkdir(exist_ok=True)
    if not (bin_ / "python").exists():
        (bin_ / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (bin_ / "python").chmod(0o755)
    install, check = action["runs"]["steps"]
    assert "pip install" in install["run"]
    env = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: given[m[1]], text)
        for name, text in check["env"].items()
    }
    path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", check["run"]], cwd=place, capture_output=True, text=True,
        env={**os.environ, **env, **{k: str(v) for k, v in files.items()}, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done, *(file.read_text() for file in files.values())


def test_the_action_judges_a_backend(action, tmp_path):
    (tmp_path / "mine.py").write_text(RIGHT)
    done, output, summary = run_action(action, tmp_path, backend="mine", only="int8_matmul", folder="out of the way")
    assert done.returncode == 0, done.stderr
    assert output == "badge=4 rules kept\n"
    assert "| int8_matmul | 29/29 |" in summary
    files = {path.name for path in (tmp_path / "out of the way").iterdir()}
    assert files == {"report.json", "summary.json", "badge.json", "report.html", "report.md"}
    (tmp_path / "mine.py").write_text(WRONG)
    done, output, summary = run_action(action, tmp_path, backend="mine", only="int8_matmul", fail_on="defect")
    assert done.returncode == 1, done.stderr
    assert "broken: IM-1" in done.stdout
    assert output == "badge=3 rules kept, 1 defect\n"
    assert "**" in summary


def test_what_the_action_is_given_is_no_code(action, tmp_path):
    done, output, _ = run_action(action, tmp_path, backend='x"; touch harm; $(touch harm)')
    assert done.returncode == 2
    assert "must be one of" in done.stderr
    assert output == ""
    assert not (tmp_path / "harm").exists()


def test_the_action_installs_the_kit_that_it_came_with(action):
    (folder,) = re.findall(r'"\$GITHUB_ACTION_PATH/(.*?)"', action["runs"]["steps"][0]["run"])
    assert (ACTION.parent / folder).resolve() == ROOT
    text = ACTION.read_text(encoding="utf-8")
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(action["inputs"])
    assert not any("${{" in step["run"] for step in action["runs"]["steps"]), "inputs reach a shell as variables alone"


def test_the_page_can_be_copied(action):
    yaml = pytest.importorskip("yaml")
    text = PAGE.read_text(encoding="utf-8")
    workflow, *steps = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    (used,) = (s for s in workflow["jobs"]["bits"]["steps"] if "/actions/check@" in s.get("uses", ""))
    assert f"OWNER/bnbref/{ACTION.parent.relative_to(ROOT).as_posix()}@" in used["uses"]
    assert set(used["with"]) <= set(action["inputs"])
    assert all(isinstance(step, list) and "run" in step[0] for step in steps)
    for name in action["inputs"]:
        assert f"`{name}`" in text
    assert archive.DIGESTS[1][:4] + "..." in text


@pytest.mark.parametrize(
    ("source", "only", "fail_on", "status", "color", "message"),
    [
        (RIGHT, "int8_matmul", "any", 0, "brightgreen", "4 rules kept"),
        (CHOSEN, "quantize_blockwise/signed-t", "any", 1, "yellow", "4 rules kept, 1 dialect"),
        (CHOSEN, "quantize_blockwise/signed-t", "defect", 0, "yellow", "4 rules kept, 1 dialect"),
        (RIGHT, "quantize_4bit/nf4-size", "defect", 1, "lightgrey", "0 rules kept"),
    ],
    ids=["right", "choice", "choice-allowed", "nothing"],
)
def test_status_badge_and_summary(tmp_path, monkeypatch, source, only, fail_on, status, color, message):
    name = f"backend_{zlib.crc32(source.encode())}"  # a module of each source, as one that was imported stays
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    backend = f"{name}:backend" if source == CHOSEN else name
    files = [word for name in ("badge", "summary", "json") for word in (f"--{name}", str(tmp_path / name))]
    assert main(["check", "--backend", backend, "--only", only, "--fail-on", fail_on, *files]) == status
    badge = json.loads((tmp_path / "badge").read_text())
    assert badge == {"schemaVersion": 1, "label": "bnbref", "message": message, "color": color}
    summary = json.loads((tmp_path / "summary").read_text())
    assert summary["badge"] == badge
    assert summary["vectors"] == {f"v{version}": digest for version, digest in archive.DIGESTS.items()}
    broken = {finding["rule"] for finding in json.loads((tmp_path / "json").read_text())["findings"]}
    assert {*summary["rules"]["dialect"], *summary["rules"]["defect"]} == broken
