"""The notebooks of the tutorials, each from its page: text becomes a cell of Markdown, and a block of Python a cell of code.

    python docs/notebooks.py                  writes docs/content/notebooks/*.ipynb
    python docs/notebooks.py --run            runs each of them, and says how long it took and on what
    python docs/notebooks.py --run load nf4   these two

The first cell of code installs bnbref, and is left out in a run: a run takes the bnbref, transformers and peft of this Python,
and neither Jupyter nor the network. A model goes to the GPU if there is one. `tests/test_notebooks.py` compares the files with
what this writes, and runs them.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
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


def cells(name: str, kind: str) -> list[str]:
    """The texts of the cells of a kind in a notebook, but for the one that installs."""
    found = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [
        "".join(c["source"]) for c in found if c["cell_type"] == kind and "install" not in c["metadata"].get("tags", ())
    ]


RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"cell {number}", "exec"), names)
"""


def run(name: str, folder: str | Path) -> subprocess.CompletedProcess[str]:
    """The cells of a notebook in a Python of its own, whose files go into the folder."""
    code = json.dumps(cells(name, "code"))
    return subprocess.run([sys.executable, "-c", RUN], input=code, cwd=folder, capture_output=True, text=True)


def run_all(names: list[str]) -> bool:
    """Run notebooks, and print a line for each; whether all ran to their end."""
    import torch

    print(f"torch {torch.__version__}, on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'}")
    failed = []
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            done = run(name, folder)
        print(f"{name:12} {time.monotonic() - start:6.1f} s  {'failed' if done.returncode else 'ok'}", flush=True)
        failed += [done.stderr] if done.returncode else []
    print(*failed, sep="\n", end="")
    return not failed


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument(
        "--run", nargs="*", metavar="NAME", choices=[p.stem for p in PAGES], help="run them, or those named"
    )
    chosen = arguments.parse_args().run
    if chosen is not None:
        sys.exit(not run_all(chosen or [page.stem for page in PAGES]))
    FOLDER.mkdir(exist_ok=True)
    for page in PAGES:
        (FOLDER / f"{page.stem}.ipynb").write_text(text(page), encoding="utf-8")
