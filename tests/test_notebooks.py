"""The notebooks of the tutorials: up to date with their pages, and every one runs from its first cell to its last."""

import json
import re
import sys
from pathlib import Path

import pytest
from test_docs import program_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/content/notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
QUICK = "judge"
"""It takes seconds. The pages of the others run in test_docs.py, and have the same code."""


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
def test_a_notebook_has_the_code_that_runs_on_the_page(notebooks, name):
    page = (ROOT / "docs/content/tutorials" / f"{name}.md").read_text(encoding="utf-8")
    lines = "\n".join(notebooks.cells(name, "code")).splitlines()
    assert [line for line in lines if line] == [line for line in program_of(page, name).splitlines() if line]


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(notebooks, name):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", "\n".join(notebooks.cells(name, "markdown")))
    assert links
    assert [link for link in links if not (FOLDER / link).exists()] == []


def test_the_first_cell_installs_this_checkout():
    for name in NAMES:
        first = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][1]
        assert first["metadata"]["tags"] == ["install"]
        (path,) = re.findall(r'%pip install --quiet "(.*)\[hf\]"', "".join(first["source"]))
        assert (FOLDER / path).resolve() == ROOT


@pytest.mark.parametrize("name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_notebook_runs(notebooks, name, tmp_path):
    done = notebooks.run(name, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_run_of_notebooks_says_how_long_and_whether(notebooks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    for name, code in (("good", "x = 1"), ("bad", "1 / x")):
        found = notebooks.notebook(f"# Title\n\n```python\nx = 0\n```\n\n```python\n{code}\n```\n")
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(found))
    assert notebooks.run_all(["good"])
    assert not notebooks.run_all(["good", "bad"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^good +\d+\.\d s  ok$", said, re.M)) == 2
    assert re.search(r"^bad +\d+\.\d s  failed$", said, re.M)
    assert "ZeroDivisionError" in said
