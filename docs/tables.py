"""The tables of measured numbers in README.md and docs/content, made of benchmarks/results: `python docs/tables.py` writes them.

A table stands between `<!-- table: NAME -->` and `<!-- end of the table -->`. A program of benchmarks/ that ran again is
a new JSON, and so a new table; `tests/test_docs.py` compares.
"""

import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_tables
from measured import ROOT, digits, results, table

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


def beside_bitsandbytes() -> str:
    """The rows of `SPEED`."""
    found = results("cpu")
    rows = {row["what"]: row for row in found["rows"]}
    cells = ([name, *(f"{rows[name][key]:.2f}" for key in ("ours", "theirs", "ratio"))] for name in SPEED)
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


def rare_tokens() -> str:
    """An embedding whose tokens are as frequent as words: medians of the seeds."""
    found = results("rare_tokens")
    packages = found["machine"]["packages"]
    names = {
        "8 bits, nonzero_squares": "8 bits, `nonzero_squares`",
        "8 bits, torchao": f"8 bits, torchao {packages['torchao']}",
        "8 bits, bitsandbytes": f"8 bits, bitsandbytes {packages['bitsandbytes']} on a CPU",
    }
    cells = []
    for what in dict.fromkeys(row["what"] for row in found["rows"]):
        runs = [row for row in found["rows"] if row["what"] == what]
        rare, frequent, longest, usual = (
            statistics.median(run[key] for run in runs)
            for key in ("error_rare", "error_frequent", "longest_step", "median_longest_step")
        )
        cells.append([names.get(what, what), f"{frequent:.3f}", f"{rare:.3f}", f"{longest:.1f}", f"{usual:.1f}"])
    head = ["states", "error, frequent", "error, rare", "longest step", "median of the longest"]
    return table(head, cells, found, "bitsandbytes", "torchao")


def averages() -> str:
    """What becomes of squares whose gradients change their size."""
    found = results("averages")
    rows = [row for row in found["rows"] if row["what"] == "v"]
    cells = []
    for row in rows:
        before, after = (f"{row[key]:g}" for key in ("before", "after"))
        gradients = before if before == after else f"{before}, then {after}"
        cells.append([f"{row['beta2']:g}", gradients, *(f"{ratio:.2f}" for ratio in row["ratios"])])
    first, *later = rows[0]["at"]
    head = ["AdamW, beta2", "gradients of the half", f"its v in 8 bits over v in 32, step {first}"]
    return table([*head, *(f"step {step}" for step in later)], cells, found)


def slow_averages() -> str:
    """What becomes of a slow momentum."""
    found = results("averages")
    cells = [
        [f"{row['beta3']:g}", *(f"{value:.2f}" for value in (row["error"], *row["parts"]))]
        for row in found["rows"]
        if row["what"] == "slow average"
    ]
    head = [
        "AdEMAMix, beta3",
        "error of the slow average in 8 bits, over its size",
        "part of the mean found in 32 bits",
        "in 8 bits",
    ]
    return table(head, cells, found)


TABLES: dict[str, Callable[[], str]] = {
    "cpu": beside_bitsandbytes,
    "batch-invariant": batch_invariant,
    "first-use": first_use,
    "optimizers": optimizers,
    "matrix-optimizers": partial(matrix_optimizers, "matrix_optimizers"),
    "matrix-optimizers-h100": partial(matrix_optimizers, "matrix_optimizers-nvidia-h100-80gb-hbm3"),
    **{name: partial(training, name) for name in ("ablation", "weights", "muon", "squares")},
    "rare-tokens": rare_tokens,
    "averages": averages,
    "slow-averages": slow_averages,
    **gpu_tables.TABLES,
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
