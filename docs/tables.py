"""The tables of measured numbers in README.md and docs/content, made of benchmarks/results: `python docs/tables.py` writes them.

A table stands between `<!-- table: NAME -->` and `<!-- end of the table -->`. A program of benchmarks/ that ran again is
a new JSON, and so a new table; `tests/test_docs.py` compares.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end of the table -->", re.DOTALL)

SPEED = (
    "quantize_4bit nf4 from fp32", "quantize_4bit nf4 from bf16", "dequantize_4bit nf4 to fp32", "dequantize_4bit nf4 to bf16",
    "quantize_blockwise dynamic from fp32 (theirs inexact)", "dequantize_blockwise dynamic to fp32",
    "Linear4bit bf16 forward + backward, 512 rows",
    "Linear4bit bf16 forward, 1 row", "Linear4bit bf16 forward, 1 row, packed kernel",
    "Linear4bit bf16 forward, 16 rows", "Linear4bit bf16 forward, 16 rows, packed kernel",
    "Linear8bitLt bf16, threshold 0, 1 row",
    "Linear8bitLt bf16, threshold 6, 16 rows", "Linear8bitLt bf16, threshold 6, 512 rows",
)  # fmt: skip
"""The rows of cpu.json that the page of speed has."""

FRONT = tuple(SPEED[number] for number in (1, 3, 6, 7, 8, 12))
"""Those of them that the front page has."""


def results(name: str) -> dict[str, Any]:
    """What a program of benchmarks/ has saved: command, machine, rows."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown.

    >>> print(lines(["", "ms"], [["a", "1"]]))
    | | ms |
    |---|---|
    | a | 1 |
    """
    cells = [head, ["---"] * len(head), *rows]
    text = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(line.replace("|  |", "| |").replace(" --- ", "---") for line in text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], found: dict[str, Any], *packages: str) -> str:
    """A table, and below it the command that made it, where, with which packages, and when."""
    machine = found["machine"]
    gpu = next((row["gpu"] for row in found["rows"] if row.get("gpu")), None)
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", *packages))
    source = f"`{found['command']}`: {gpu or machine['cpu'] + ', ' + threads}, {versions}, {found['day']}."
    return f"{lines(head, rows)}\n\n({source})"


def digits(number: float) -> str:
    """Three of them, and no more than two after the point.

    >>> [digits(x) for x in (0.0312, 5.667, 62.37, 2177.0)]
    ['0.03', '5.67', '62.4', '2177']
    """
    return f"{number:.{max(0, min(2, 3 - len(str(int(number)))))}f}"


def beside_bitsandbytes(names: Iterable[str]) -> str:
    """Rows of cpu.json."""
    found = results("cpu")
    rows = {row["what"]: row for row in found["rows"]}
    cells = ([name, *(f"{rows[name][key]:.2f}" for key in ("ours", "theirs", "ratio"))] for name in names)
    return table(["", "bnbref", "bitsandbytes", "ratio"], cells, found, "bitsandbytes")


def batch_invariant() -> str:
    """What `batch_invariant()` costs: rows of cpu.json, whose "theirs" is the same layer without it."""
    found = results("cpu")
    rows = [(re.search(r"batch_invariant\(\), (\d+) rows?", row["what"]), row) for row in found["rows"]]
    cells = [[match[1], digits(row["ours"]), digits(row["theirs"])] for match, row in rows if match]
    return table(["rows", "in `batch_invariant()`, ms", "without, ms"], cells, found)


def first_use() -> str:
    """Seconds of each phase."""
    found, phases = results("first_use"), ("imports", "load", "first forward")
    cells = ([row["what"], *(digits(row[phase]) for phase in phases)] for row in found["rows"])
    head = ["", "imports of torch and transformers, s", "loading, s", "first forward, s"]
    return table(head, cells, found, "transformers", "bitsandbytes")


def optimizers() -> str:
    """Steps on a CPU, beside other libraries and beside one tensor of the same size."""
    found = results("optimizers")
    pairs = [(*row["what"].split(" / "), row) for row in found["rows"] if " / " in row["what"]]
    cells = [
        [ours, theirs, digits(row["ours"]), digits(row["theirs"]), f"{row['ratio']:.2f}"] for ours, theirs, row in pairs
    ]
    return table(["bnbref", "other", "ms", "ms of the other", "ratio"], cells, found, "bitsandbytes")


def matrix_optimizers(name: str) -> str:
    """Steps of optimizers of whole matrices: times, bytes of state, and on a GPU the bytes that a step needs."""
    found = results(name)
    rows = {row["what"]: row for row in found["rows"] if "ratio" in row}
    heads = {", bytes of state": "bytes", ", peak bytes of a step": "bytes of a step"}
    more = [key for key in heads if any(what.endswith(key) for what in rows)]
    head = ["", "bnbref", "other", "ratio", *(word for key in more for word in (heads[key], f"other's {heads[key]}"))]
    cells = []
    for what, row in rows.items():
        if not what.endswith(tuple(heads)):
            more_of_it = [f"{rows[what + key][side]:.2f}" for key in more for side in ("ours", "theirs")]
            times = [digits(row["ours"]), digits(row["theirs"]), f"{row['ratio']:.2f}"]
            cells.append([what.replace(" / ", "; "), *times, *more_of_it])
    return table(head, cells, found)


def training(name: str) -> str:
    """Runs of training, one of each variant and seed: medians of the seeds, and the longest step of all."""
    found = results(name)
    variants = dict.fromkeys(row["what"] for row in found["rows"])
    head = ["", "loss", "held-out loss", "held out, each seed", "longest step", "unstable runs"]
    cells = []
    for variant in variants:
        runs = [row for row in found["rows"] if row["what"] == variant]
        loss, held = (statistics.median(run[key] for run in runs) for key in ("loss", "heldout_loss"))
        each = ", ".join(f"{run['heldout_loss']:.3f}" for run in runs)
        longest = max((run["longest_step"] for run in runs if "longest_step" in run), default=None)
        unstable = f"{sum(run['unstable'] for run in runs)} of {len(runs)}"
        what = variant.replace("nonzero_squares", "`nonzero_squares`")
        cells.append([what, f"{loss:.3f}", f"{held:.3f}", each, "" if longest is None else f"{longest:.1f}", unstable])
    if not any(row[4] for row in cells):  # older results have no longest step
        head, *cells = ([*row[:4], row[5]] for row in (head, *cells))
    return table(head, cells, found)


TABLES: dict[str, Callable[[], str]] = {
    "cpu-front": partial(beside_bitsandbytes, FRONT),
    "cpu": partial(beside_bitsandbytes, SPEED),
    "batch-invariant": batch_invariant,
    "first-use": first_use,
    "optimizers": optimizers,
    "matrix-optimizers": partial(matrix_optimizers, "matrix_optimizers"),
    "matrix-optimizers-h100": partial(matrix_optimizers, "matrix_optimizers-nvidia-h100-80gb-hbm3"),
    **{name: partial(training, name) for name in ("ablation", "weights", "muon", "squares")},
}


def written(page: str) -> str:
    """The text of a page with its tables as the results have them."""
    parts = PLACE.split(page)
    parts[1::2] = [f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end of the table -->" for name in parts[1::2]]
    return "".join(parts)


def pages() -> dict[Path, str]:
    """The pages that have such tables, as they should be."""
    texts = {
        path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs/content").rglob("*.md")]
    }
    return {path: written(text) for path, text in texts.items() if PLACE.search(text)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
