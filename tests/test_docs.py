"""Every ```python block of README.md and docs/ runs, as a reader would run it: in order, in a fresh interpreter.

The blocks of one page are one program: the page with everything but its code blanked out, so that a traceback
names the page and the line. `<!-- not executed: REASON -->` on the line before a block leaves it out.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bnbref.cli import parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)")
NOT_EXECUTED = re.compile(r"<!--\s*not executed\b:?\s*(?P<reason>.*?)\s*-->")
UNCHECKED_SPELLINGS = {"py", "py3", "python3", "pycon", "ipython", "Python"}
RUN = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'), {'__name__': '__main__'})"


def program_of(text: str, name: str) -> str:
    """The executed code of a page, every line at the line number that it has in the page."""
    lines = text.splitlines()
    program = [""] * len(lines)
    before = ""  # the last line above the block that is not empty
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            before = lines[number].strip() or before
            number += 1
            continue
        where, start, language = f"{name}:{number + 1}", number + 1, opening["language"]
        closing = re.compile(rf" *{opening['fence'][0]}{{{len(opening['fence'])},}} *$")
        end = next((n for n in range(start, len(lines)) if closing.match(lines[n])), None)
        if end is None:
            raise ValueError(f"{where}: the code block is never closed")
        if language in UNCHECKED_SPELLINGS:
            raise ValueError(f"{where}: write ```python, not ```{language}, so that the block is executed")
        if language == "python":
            skip = NOT_EXECUTED.search(before)
            if skip is None:
                program[start:end] = textwrap.dedent("\n".join(lines[start:end])).split("\n") if end > start else []
            elif not skip["reason"]:
                raise ValueError(f"{where}: `<!-- not executed: REASON -->` needs a reason")
        before = ""
        number = end + 1
    return "\n".join(program)


def run_page(text: str, path: Path, directory: Path) -> None:
    """Runs the page in `directory`; fails with the traceback, which names the page and the line."""
    try:
        program = program_of(text, path.name)
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
    command = [sys.executable, "-c", RUN, str(path)]
    done = subprocess.run(command, input=program, cwd=directory, capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        lines = re.findall(rf'File "{re.escape(str(path))}", line (\d+)', done.stderr)
        place = f"{path}:{lines[-1]}" if lines else str(path)
        pytest.fail(f"{place}: a code block fails\n\n{done.stderr}", pytrace=False)


@pytest.mark.parametrize("page", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in PAGES])
def test_code_blocks_run(page, tmp_path):
    run_page(page.read_text(encoding="utf-8"), page, tmp_path)


@pytest.mark.parametrize("page", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in PAGES])
def test_tests_that_a_page_names_exist(page):
    """A claim stands beside the test that shows it: `test_one.py`, `tests/test_one.py` or `test_something`."""
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    for name in re.findall(r"`(?:tests/)?(test_\w+(?:\.py)?)`", page.read_text(encoding="utf-8")):
        known = name in tests if name.endswith(".py") else any(f"def {name}(" in text for text in tests.values())
        assert known, f"{page.name} names {name}, which is not in tests/"


@pytest.mark.parametrize("page", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in PAGES])
def test_files_that_a_page_names_exist(page):
    """Of the package, as `bnbref/optim/step.py`; on the pages that list its files, by the last part of the path alone."""
    lists = page.name in ("reading.md", "kit.md")
    files = {
        path.relative_to(ROOT).as_posix() for folder in ("bnbref", "tests") for path in (ROOT / folder).rglob("*.py")
    }
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text(encoding="utf-8")):
        if lists or name.startswith("bnbref/"):
            assert any(f"/{file}".endswith(f"/{name}") for file in files), (
                f"{page.name} names {name}, which is not there"
            )


def test_every_file_is_on_the_page_that_says_in_which_order_to_read_them():
    """But those of the folders that it names as a whole."""
    page = (ROOT / "docs/content/reading.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "bnbref").rglob("*.py")):
        folder = path.relative_to(ROOT / "bnbref").parts[0]
        if not path.stem.startswith("__") and folder not in ("conformance", "demo", "selfcheck"):
            assert re.search(rf"`(\w+/)*{path.name}`", page), f"{path.relative_to(ROOT)} is in no row of reading.md"


def test_the_site_lists_every_page():
    """`make docs` refuses a page that its list lacks, and few run it."""
    listed = re.findall(
        r"^ +- (?:[\w -]+: )?([\w/-]+\.md)$", (ROOT / "docs/mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    content = ROOT / "docs" / "content"
    assert sorted(listed) == sorted(page.relative_to(content).as_posix() for page in content.rglob("*.md"))


def test_tables_are_of_the_results():
    """A benchmark that ran again is a new table: `python docs/tables.py`."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import tables
    finally:
        sys.path.remove(str(ROOT / "docs"))
    pages = tables.pages()
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run python docs/tables.py"
    used = [match["name"] for text in pages.values() for match in tables.PLACE.finditer(text)]
    assert set(used) == set(tables.TABLES)


def speeds(text: str) -> dict[str, str]:
    """Rows of tables by their first cell."""
    return {line.split("|")[1].strip(): line for line in text.splitlines() if re.match(r"\| [^-|]", line)}


def test_the_front_page_and_the_page_of_speed_say_the_same():
    """Every row that the front page measured is on the page of speed, as it is."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    front = speeds(readme.partition("## How fast")[2].partition("\n## ")[0])
    page = speeds((ROOT / "docs/content/speed.md").read_text(encoding="utf-8"))
    assert len(front) >= 5
    assert front == {name: page.get(name) for name in front}


def test_the_front_page_is_a_screen():
    """Of a desk: sixty lines of text, and nothing that one must scroll for to see what it is."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 65


COMMAND = re.compile(r"python -m bnbref ([^`\n]*)")
REST = re.compile(r" #|[|>;)]|&&")
"""What ends a command on its line."""


def refused_commands(text: str) -> list[str]:
    """The commands of a page that `python -m bnbref` would not take. One that lacks an argument is only mentioned there."""
    found = []
    for match in COMMAND.finditer(re.sub(r"\\\n *", " ", text)):
        command = REST.split(match[1])[0].translate({ord("["): None, ord("]"): None}).rstrip(" .,:")
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            parser().parse_args(shlex.split(command))
        if "error" in said.getvalue() and "required" not in said.getvalue():
            found.append(f"{command}: {said.getvalue().splitlines()[-1]}")
    return found


@pytest.mark.parametrize("page", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in PAGES])
def test_commands_of_a_page_are_taken(page):
    assert refused_commands(page.read_text(encoding="utf-8")) == []


def test_a_command_that_is_not_taken_is_found():
    assert refused_commands("`python -m bnbref plan 7B --memory 8GiB` and `python -m bnbref alias`, whose | x") == []
    assert (
        len(refused_commands("    python -m bnbref plan 7B --memry 8GiB | less\n`python -m bnbref qlora --steps few`"))
        == 2
    )


# The runner itself, on pages whose outcome is known.


def outcome(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    run_page(text, page, tmp_path)


def test_blocks_of_a_page_share_names_and_may_be_indented(tmp_path):
    outcome(
        "```python\nx = 1\n```\n\n=== tab\n\n    ```python title='t'\n    if x:\n        y = x + 1\n    ```\n\n"
        "```text\nnot code\n```\n\n~~~python\nassert y == 2\n~~~\n\n````md\n```python\nnested\n```\n````\n",
        tmp_path,
    )


def test_a_failing_block_is_named_by_line(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:8: a code block fails\n\n(.|\n)*ZeroDivisionError"):
        outcome("# Title\n\n```python\nx = 0\n```\n\n```python\n1 / x\n```\n", tmp_path)


def test_a_syntax_error_is_named_by_line(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:5: a code block fails\n\n(.|\n)*SyntaxError"):
        outcome("# Title\n\n```python\nx = 0\n>>> x\n```\n", tmp_path)


def test_a_block_is_left_out_for_a_reason(tmp_path):
    outcome("<!-- not executed: needs a GPU -->\n\n```python\n1 / 0\n```\n", tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:2: .* needs a reason"):
        outcome("<!-- not executed: -->\n```python\n1 / 0\n```\n", tmp_path)


def test_a_reason_holds_for_one_block(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:6"):
        outcome("<!-- not executed: slow -->\n```python\n```\n\n```python\n1 / 0\n```\n", tmp_path)


def test_blocks_that_nobody_would_check_are_refused(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:1: write ```python, not ```pycon"):
        outcome("```pycon\n>>> 1\n```\n", tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:1: .* never closed"):
        outcome("```python\n1\n", tmp_path)
