"""Drawings of how far off the wrong elements of a finding are: an error map and a histogram, as inline SVG."""

import html
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bnbref.conformance.expected import ulps_apart
from bnbref.conformance.findings import Finding
from bnbref.conformance.judge import Failure
from bnbref.conformance.report import Report

WIDTH, HEIGHT = 400.0, 60.0
"""The size of the area of a drawing in which its bars are."""


def of_finding(done: Report, finding: Finding) -> str:
    """The error map of a finding's smallest case, and the histogram of all its cases."""
    return error_map(finding.original) + histogram(_alike(done, finding))


def _alike(done: Report, finding: Finding) -> list[Failure]:
    """The failures of a finding whose values are wrong, of one dtype: that of the first."""
    cases, output = set(finding.cases), finding.original.output
    found = [
        f for r in done.results if r.case.id in cases for f in r.failures if f.kind == "value" and f.output == output
    ]
    return [f for f in found if f.got is not None and found[0].got is not None and f.got.dtype == found[0].got.dtype]


def error_map(failure: Failure) -> str:
    """Draws which elements are wrong, from the first to the last, and how far: an inline SVG; empty where no values are wrong.

    The height of a bar is the logarithm of the distance: in representable numbers of the dtype for floats, in codes for codes. Of
    packed codes it shows only which bytes are wrong.
    """
    if failure.got is None or failure.kind != "value":
        return ""
    got = failure.got
    off, unit = _distances(failure)
    if failure.output == "packed":
        off, unit = (off != 0).long(), "wrong bytes"
    heights = off.double().add(1).log2()
    top = max(float(heights.max()), 1.0)
    count = got.numel()
    bars = "".join(
        f"<rect x={WIDTH * i / count:.1f} y={HEIGHT - h:.1f} width={max(WIDTH / count, 1):.1f} height={h:.1f} />"
        for i, h in _bars(failure.wrong, heights, HEIGHT / top)
    )
    label = f"{failure.case.id}: {failure.output}[0 .. {count - 1}], up to {int(off[failure.wrong].max())} {unit}"
    return _svg("", f"<g fill=currentColor opacity=.75>{bars}</g>", 11, label)


def _svg(kind: str, bars: str, below: int, label: str) -> str:
    """An SVG of bars on a line and of a label, which is `below` units below the line. kind: attributes of the SVG."""
    text = html.escape(label)
    return (
        f'<svg{kind} viewBox="0 0 {WIDTH:.0f} {HEIGHT + below + 4:.0f}" role=img aria-label="{text}">'
        f"{bars}<path d='M0 {HEIGHT:.0f}H{WIDTH:.0f}' stroke=currentColor stroke-width=.5 />"
        f"<text x=0 y={HEIGHT + below:.0f}>{text}</text></svg>"
    )


def _distances(failure: Failure) -> tuple[Tensor, str]:
    """How far each element of a result is from the expected value, int64, and in what."""
    if failure.got is None:
        raise ValueError(f"{failure.case.id} has no result")
    got, want = failure.got.reshape(-1), failure.case.expected[failure.output].value.reshape(-1)
    if got.dtype.is_floating_point:
        return ulps_apart(got, want), "ulp"
    return (got.long() - want.long()).abs(), "codes"


def _bars(wrong: Tensor, heights: Tensor, scale: float, most: int = 400) -> Iterable[tuple[int, float]]:
    """The places and heights of at most so many bars; where elements share a bar, the highest counts."""
    step = -(-heights.numel() // most)
    found: dict[int, float] = {}
    for i in wrong.tolist():
        place = i // step * step
        found[place] = max(found.get(place, 0.0), float(heights[i]) * scale, 1.0)
    return found.items()


_NOT_A_NUMBER = 2**31
"""The distance of NaN from a number, as `ulps_apart` has it."""


def distances(failures: Sequence[Failure]) -> list[tuple[str, int, int]]:
    """A row for 0 off, 1, 2 to 3, 4 to 7 and so on, and NaN: its label, how many elements are wrong, how many allowed.

    Distances are from the expected value: in representable numbers of the dtype (ulp), or in codes.
    """
    off = torch.cat([_distances(f)[0] for f in failures])
    masks = [torch.zeros(0 if f.got is None else f.got.numel()).index_fill(0, f.wrong, 1) for f in failures]
    wrong = torch.cat(masks) > 0
    nan = off >= _NOT_A_NUMBER
    bucket = torch.where(nan, 33, torch.where(off > 0, off.clamp(min=1).double().log2().floor().long() + 1, 0))
    rows = []
    last = int(bucket[~nan].max()) if bool((~nan).any()) else 0
    for i in [*range(last + 1), *([33] if bool(nan.any()) else [])]:
        label = "NaN" if i == 33 else "0" if i == 0 else str(2 ** (i - 1)) if i < 12 else f"2^{i - 1}"
        rows.append((label, int(((bucket == i) & wrong).sum()), int(((bucket == i) & ~wrong).sum())))
    return rows


def histogram(failures: Sequence[Failure]) -> str:
    """How many elements are how far off, over all of these failures: an inline SVG; empty where there are no values.

    A bar for each power of two, its height the logarithm of the number of elements: wrong ones full, allowed ones pale.
    """
    if not failures or failures[0].output == "packed":
        return ""
    rows, unit = distances(failures), _distances(failures[0])[1]
    most = math.log2(1 + max(wrong + allowed for _, wrong, allowed in rows))
    step = min(WIDTH / len(rows), 40.0)
    every = -(-len(rows) // 12)  # labels that do not run into each other
    parts = []
    for i, (label, wrong, allowed) in enumerate(rows):
        title = f"<title>{label} {unit} off: {wrong} wrong, {allowed} allowed</title>"
        for count, opacity in ((wrong + allowed, 0.25), (wrong, 0.75)):
            if count:
                h = HEIGHT * math.log2(1 + count) / most
                parts.append(
                    f"<rect x={step * i + 1:.1f} y={HEIGHT - h:.1f} width={step - 2:.1f} height={h:.1f} opacity={opacity}>"
                    f"{title}</rect>"
                )
        if i % every == 0 or label == "NaN":
            parts.append(f"<text x={step * i + 1:.1f} y={HEIGHT + 10:.0f}>{label}</text>")
    total = sum(wrong + allowed for _, wrong, allowed in rows)
    of = f"{total} elements of {failures[0].output}"
    label = f"{of} by distance in {unit}: full bars wrong, pale ones allowed, log scale"
    return _svg(" class=histogram", f"<g fill=currentColor>{''.join(parts)}</g>", 22, label)
