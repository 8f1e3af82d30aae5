"""gpu_flows.py's rows as a table with what they must reach, and as the plot of the page On a GPU."""

import importlib
from pathlib import Path
from typing import Any

MEASURES = {
    "generate": ("tokens/s", "first_s", "peak_MB"),
    "static": ("tokens/s", "first_s", "peak_MB"),
    "first": ("first_s", "static_s"),
    "qlora": ("ms", "first_s", "peak_MB"),
    "load": ("first_s", "again_s", "peak_MB"),
    "layers": ("call_us", "kernels_us"),
}
"""Of each part, in the order of a line. More is better for tokens/s, less for all else."""

OTHERS = ("bitsandbytes", "bf16")


def bars(shape: str, row: dict[str, Any], measure: str) -> dict[str, float]:
    """What the ratio to another contender must reach; a ratio above 1 is bnbref's."""
    part, four = row["part"], row["format"].startswith("nf4")
    if part == "generate" and measure == "tokens/s":
        return {"bitsandbytes": 1.0}
    if part == "static":
        if measure == "tokens/s":
            faster = {"bf16": 1.3} if four and shape == "8B" else {}
            return {"bitsandbytes": 5.0 if four else 4.0, **faster}
        return {"bf16": 1.0} if measure == "first_s" else {}
    if part == "qlora":
        return {} if measure == "first_s" else {"bitsandbytes": 1.0}
    if part == "load":
        seconds = {"bitsandbytes": 1 / 1.5} if row["what"] == "cold caches" and measure == "first_s" else {}
        return {"bitsandbytes": 1 / 1.05} if measure == "peak_MB" else seconds
    if part == "layers":
        count = int(row["what"].split()[1])
        few = 1 / 0.75 if count == 1 else 1 / 0.8
        return {"bitsandbytes": 1.0} if not four else {"bitsandbytes": few} if count <= 8 else {}
    return {}


def ratio(measure: str, ours: float | None, theirs: float | None) -> float | None:
    """Above 1 is ours."""
    if not ours or not theirs:
        return None
    return ours / theirs if measure == "tokens/s" else theirs / ours


def beside(run: dict[str, Any], row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The other contenders' rows of the same kind; a model in bfloat16 stands beside every format."""
    same = [
        other
        for other in run["rows"]
        if (other["part"], other["what"]) == (row["part"], row["what"]) and other["format"] in (row["format"], "")
    ]
    return {other["contender"]: other for other in same}


def lines(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each measure of each row of bnbref: values, ratios, and the bars that were missed."""
    found = []
    for row in run["rows"]:
        if row["contender"] != "bnbref":
            continue
        others = beside(run, row)
        for measure in MEASURES[row["part"]]:
            values = {name: others.get(name, {}).get(measure) for name in ("bnbref", *OTHERS)}
            if not any(values.values()):
                continue
            ratios = {name: ratio(measure, values["bnbref"], values[name]) for name in OTHERS}
            wanted = bars(run["shape"], row, measure)
            missed = [name for name, bar in wanted.items() if (got := ratios[name]) is not None and got < bar]
            what = ", ".join(text for text in (f"{row['part']} {row['format']}", row["what"], measure) if text)
            found.append({"what": what, **values, "ratios": ratios, "bars": wanted, "missed": missed})
    return found


def same_start(run: dict[str, Any], row: dict[str, Any]) -> tuple[int, int] | None:
    """How many tokens, from the first on, are those of bitsandbytes' `generate` in that format; of how many."""
    kind = ("generate", "bitsandbytes", row["format"])
    for other in run["rows"]:
        if (other["part"], other["contender"], other["format"]) == kind and "tokens" in other:
            pairs = list(zip(row["tokens"], other["tokens"], strict=True))
            return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs)), len(pairs)
    return None


def table(run: dict[str, Any]) -> str:
    """Markdown; below it what failed, and whether the texts begin alike."""

    def number(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    head = ["| | bnbref | bitsandbytes | bf16 | ratio to bitsandbytes | to bf16 |", "|---|---|---|---|---|---|"]
    for entry in lines(run):
        cells = [number(entry[name]) for name in ("bnbref", *OTHERS)]
        for name in OTHERS:
            missed = f" (missed: {entry['bars'][name]:.2f})" if name in entry["missed"] else ""
            cells.append(number(entry["ratios"][name]) + missed)
        head.append(f"| {entry['what']} | {' | '.join(cells)} |")
    for row in run["rows"]:
        names = " ".join(text for text in (row["part"], row["format"], row["what"], row["contender"]) if text)
        if "error" in row:
            head.append(f"\n{names} failed: {row['error']}")
        elif row["contender"] == "bnbref" and "tokens" in row and (same := same_start(run, row)) is not None:
            head.append(f"\n{names}: the first {same[0]} of {same[1]} tokens are those of bitsandbytes' generate")
    return "\n".join(head)


COLORS = {"bnbref": "C0", "bitsandbytes": "C1", "bf16": "0.6"}
PANELS = (
    ("generate", "", "tokens/s", "generate as it comes: tokens/s"),
    ("static", "", "tokens/s", "static cache, compiled: tokens/s"),
    ("static", "", "first_s", "its first call: seconds"),
    ("qlora", "loop", "ms", "a step of QLoRA: ms"),
    ("load", "cold caches", "first_s", "loading, cold caches: seconds"),
    ("layers", "4096x4096, 1 rows", "kernels_us", "one row, 4096 x 4096: µs"),
)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """A panel for each measurement that there is of a shape, three in a row."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'bnbref[bench]', or leave out --plot") from error
    panels: dict[str, tuple[list[dict[str, Any]], str]] = {}
    for shape in dict.fromkeys(run["shape"] for run in runs):
        rows = [row for run in runs if run["shape"] == shape for row in run["rows"]]
        for part, what, measure, title in PANELS:
            own = [row for row in rows if (row["part"], row["what"]) == (part, what) and row.get(measure)]
            if own:
                panels[f"{shape}, {title}"] = own, measure
    height = -(-len(panels) // 3)
    with pyplot.rc_context({"svg.fonttype": "none", "font.size": 7}):
        figure, grid = pyplot.subplots(height, 3, figsize=(9, 2 * height), layout="constrained", squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, (own, measure)) in zip(grid.flat, panels.items(), strict=False):
            bar_chart(axes, own, measure)
            axes.set_title(title)
        figure.legend(
            [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in COLORS.values()],
            COLORS,
            ncols=3,
            loc="outside lower center",
        )
        figure.savefig(path)


def bar_chart(axes: Any, rows: list[dict[str, Any]], measure: str) -> None:
    """A bar for each row, with its value; the format beside it."""
    places = range(len(rows))
    drawn = axes.barh(places, [row[measure] for row in rows], color=[COLORS[row["contender"]] for row in rows])
    axes.bar_label(drawn, fmt="%.3g", padding=2)
    axes.set_yticks(places, [row["format"] for row in rows])
    axes.margins(x=0.15)
    axes.invert_yaxis()
