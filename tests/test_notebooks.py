"""The notebooks of the tutorials: up to date with their pages, and every one runs from its first cell to its last."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import program_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/content/notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
QUICK = "judge"
"""It takes seconds. The pages of the others run in test_docs.py, and have the same code."""

RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"cell {number}", "exec"), names)
"""


def cells(name, kind):
    """The texts of the cells of a kind, but for the one that installs."""
    found = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [
        "".join(c["source"]) for c in found if c["cell_type"] == kind and "install" not in c["metadata"].get("tags", ())
    ]


@pytest.fixture(scope="module")
def notebooks():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import notebooks
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return notebooks


def test_there_is_a_notebook_of_each_tutorial_as_it_is(notebooks):
    assert sorted(page.stem for page in notebooks.PAGES) == NAMES
    stale = [
        p.stem for p in notebooks.PAGES if notebooks.text(p) != (FOLDER / f"{p.stem}.ipynb").read_text(encoding="utf-8")
    ]
    assert stale == [], "python docs/notebooks.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_code_that_runs_on_the_page(name):
    page = (ROOT / "docs/content/tutorials" / f"{name}.md").read_text(encoding="utf-8")
    lines = "\n".join(cells(name, "code")).splitlines()
    assert [line for line in lines if line] == [line for line in program_of(page, name).splitlines() if line]


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", "\n".join(cells(name, "markdown")))
    assert links
    assert [link for link in links if not (FOLDER / link).exists()] == []


def test_the_first_cell_installs_this_checkout():
    for name in NAMES:
        first = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][1]
        assert first["metadata"]["tags"] == ["install"]
        (path,) = re.findall(r'%pip install --quiet "(.*)\[hf\]"', "".join(first["source"]))
        assert (FOLDER / path).resolve() == ROOT


@pytest.mark.parametrize("name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_notebook_runs(name, tmp_path):
    code = json.dumps(cells(name, "code"))
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=code, cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
