"""The notebooks of the tutorials, each from its page: text becomes a cell of Markdown, and a block of Python a cell of code.

    python docs/notebooks.py            writes docs/content/notebooks/*.ipynb

The first cell of code installs bnbref. `tests/test_notebooks.py` compares the files with what this writes, and runs them.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(page for page in (ROOT / "docs/content/tutorials").glob("*.md") if page.stem != "index")
FOLDER = ROOT / "docs/content/notebooks"

CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
BESIDE = re.compile(r"\]\((?![a-z]+:|#|\.\./)")
"""Where the address of another tutorial begins: notebooks lie beside the folder of the tutorials."""

INSTALL = """\
# In a checkout the path is right as it is. Elsewhere, as on a GPU service, write in its place
# "bnbref[hf] @ git+ADDRESS", with the address from which you would clone the repository.
%pip install --quiet "../../..[hf]"
"""


def cell(kind: str, number: int, text: str, **metadata: Any) -> dict[str, Any]:
    """A cell as nbformat 4.5 has it."""
    body = {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": metadata,
        "source": text.strip("\n").splitlines(keepends=True),
    }
    return body | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page."""
    title, _, rest = BESIDE.sub("](../tutorials/", page).partition("\n\n")
    cells = [cell("markdown", 0, title), cell("code", 1, INSTALL, tags=["install"])]
    for number, part in enumerate(CODE.split(rest), 2):
        if part.strip():
            cells.append(cell("markdown" if number % 2 == 0 else "code", number, part))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text(page: Path) -> str:
    """The file of the notebook of a page."""
    return json.dumps(notebook(page.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for page in PAGES:
        (FOLDER / f"{page.stem}.ipynb").write_text(text(page), encoding="utf-8")
