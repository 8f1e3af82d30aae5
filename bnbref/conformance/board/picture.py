"""The board as a drawing: a row for each backend, a column for each rule. An SVG for a README, light and dark."""

import html
from collections.abc import Sequence
from itertools import groupby

from bnbref.conformance.board import STATES, Column
from bnbref.conformance.specification import RULES

CELL, ROW, GAP, HEAD = 11, 19, 6, 142
"""The width of a column and the height of a row, the gap between operations, the height of their names."""

SHAPES = {
    "passed": "h9v14h-9z",
    "dialect": "h9l-9 14z",
    "defect": "h3l1.5 4.5l1.5 -4.5h3l-3 7l3 7h-3l-1.5 -4.5l-1.5 4.5h-3l3 -7z",
    "refused": "h9v14h-9zm1.5 1.5v11h6v-11z",
    "not offered": "m3.5 6h2v2h-2z",
    "not judged": "m1.5 6h6v2h-6z",
}
"""A path for each state, from the upper left corner of a cell. The shapes differ, so that states are not told by colour alone."""

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.passed { fill: #2da44e; } .dialect { fill: #bf8700; } .defect { fill: #cf222e; } .refused { fill: #8250df; fill-rule: evenodd; }
.not-offered, .not-judged { fill: #8c959f; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .defect { fill: #ff7b72; } .refused { fill: #bc8cff; } }
"""


def as_picture(columns: Sequence[Column]) -> str:
    """The board as an SVG."""
    left = 8 + max([7 * len(column.title) for column in columns], default=0)
    places: dict[str, float] = {}
    labels: list[str] = []
    x = float(left)
    for operation, rules in groupby(columns[0].cells if columns else (), key=lambda rule: RULES[rule].operation):
        labels.append(f'<text transform="translate({x + 9:.0f} {HEAD - 6}) rotate(-60)">{operation}</text>')
        for rule in rules:
            places[rule] = x
            x += CELL
        x += GAP
    paths = dict.fromkeys(STATES, "")
    for row, column in enumerate(columns):
        top = HEAD + ROW * row
        labels.append(f'<text x="{left - 8}" y="{top + 12}" text-anchor="end">{html.escape(column.title)}</text>')
        for rule, cell in column.cells.items():
            paths[cell.state] += f"M{places[rule]:.0f} {top}{SHAPES[cell.state]}"
    below, at = HEAD + ROW * len(columns) + 12, float(left)
    for state in STATES:
        paths[state] += f"M{at:.0f} {below}{SHAPES[state]}"
        labels.append(f'<text x="{at + 14:.0f}" y="{below + 12}">{state}</text>')
        at += 40 + 7 * len(state)
    width = max(x, at) + 60  # the last name leans to the right
    drawn = "".join(f'<path class="{state.replace(" ", "-")}" d="{path}"/>' for state, path in paths.items())
    title = f"{len(columns)} backends by {len(places)} rules"
    size = f'viewBox="0 0 {width:.0f} {below + 22}" width="{width:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}"><title>{title}</title>'
    return f"{head}<style>{STYLE}</style>{''.join(labels)}{drawn}</svg>\n"
