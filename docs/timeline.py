"""A recorded step as bars over time: one line for kernels, one for copies each way (`benchmarks/overlap.py`)."""

from collections.abc import Mapping
from typing import Any

from svg import WIDTH, Picture

LEFT, RIGHT, ROW = 96, 14, 46
STYLES = {"kernels": "second", "to the GPU": "first", "to the host": "third"}


def timeline(run: Mapping[str, Any]) -> Picture:
    """Bars of what `benchmarks/overlap.py` wrote."""
    beside = run["kernels beside copies_ms"] / run["busy_ms"]["kernels"]
    picture = Picture(
        "Kernels and copies of a step of a paged optimizer over time",
        f"{run['what']}, on {run['machine']['gpu']}: a step of {run['ms']:.1f} ms. Copies to the GPU and to the host run at the "
        f"same time for {run['copies both ways_ms']:.1f} ms, and {beside:.0%} of the kernels' {run['busy_ms']['kernels']:.1f} ms "
        f"are beside copies.",
        ROW * 3 + 92,
    )

    def x(ms: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ms / run["ms"]

    picture.text(8, 20, f"{run['what']}", "small")
    for row, (name, style) in enumerate(STYLES.items()):
        top = 34 + ROW * row
        picture.text(8, top + 18, name, "small")
        words = f"{run['busy_ms'][name]:.1f} ms" if name == "kernels" else f"{run['GB/s'][name]:.1f} GB/s"
        picture.text(8, top + 34, words, "small quiet")
        for start, end in run["spans"][name]:
            picture.bar(x(start), top + 6, max(x(end) - x(start), 0.6), 24, style)
    base = 34 + ROW * 3 + 6
    picture.line(LEFT, base, WIDTH - RIGHT, base)
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if run["ms"] / s <= 8)
    for number in range(int(run["ms"] / step) + 1):
        picture.line(x(number * step), base, x(number * step), base + 5)
        picture.text(x(number * step), base + 20, f"{number * step:g}", "small quiet", "middle")
    picture.text(8, base + 20, "ms", "small quiet")
    picture.text(8, base + 42, f"{run['machine']['gpu']}, torch {run['machine']['packages']['torch']}", "small quiet")
    return picture
