"""An SVG by hand: lines, boxes, words and arrows, in colours that follow the reader's light or dark setting."""

from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

WIDTH = 560
"""Of every picture. A phone shows it at two thirds, where 15 pixels of text are still read."""

STYLE = """
svg { color: #1f2328; --first: #0969da; --second: #bc4c00; --third: #1a7f37; --quiet: #6e7781; --paper: #f3f5f8 }
@media (prefers-color-scheme: dark) {
  svg { color: #e6edf3; --first: #58a6ff; --second: #f0883e; --third: #3fb950; --quiet: #8b949e; --paper: #22272e }
}
text { font: 15px system-ui, sans-serif; fill: currentColor }
.quiet { stroke: var(--quiet) } .first { stroke: var(--first) } .second { stroke: var(--second) } .third { stroke: var(--third) }
text.quiet { fill: var(--quiet); stroke: none } .small { font-size: 13px } .bold { font-weight: 600 }
.grid { stroke: var(--quiet); stroke-opacity: .35 }
.fill { fill: var(--first); fill-opacity: .15; stroke: none } .box { fill: var(--paper) } path, line { fill: none }
""".strip()


@dataclass
class Picture:
    """A drawing of `WIDTH` by `height`. title and description are what a screen reader says."""

    title: str
    description: str
    height: int
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str = "quiet", width: float = 1) -> None:
        """A straight line. style: a class of `STYLE`, which is its colour."""
        self.parts.append(
            f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{width}"/>'
        )

    def path(self, points: list[tuple[float, float]], style: str) -> None:
        """A line through points; with the class `fill` an area."""
        self.parts.append(f'<path class="{style}" d="M {" L ".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        """Words whose baseline begins, has its middle or ends at a point (anchor: start, middle, end)."""
        self.parts.append(
            f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def dot(self, x: float, y: float, style: str) -> None:
        """A filled point, in the colour of a class."""
        self.parts.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5" style="fill: var(--{style}); stroke: none"/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, style: str) -> None:
        """A filled rectangle, in the colour of a class."""
        self.parts.append(
            f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'style="fill: var(--{style}); stroke: none"/>'
        )

    def box(self, x: float, y: float, width: float, height: float, lines: list[str], style: str = "quiet") -> None:
        """A box with lines of words in its middle, the first of them bold."""
        self.parts.append(
            f'<rect class="box {style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6"/>'
        )
        top = y + height / 2 - 9.5 * (len(lines) - 1) + 5
        for number, words in enumerate(lines):
            self.text(x + width / 2, top + 19 * number, words, "small" if number else "bold", "middle")

    def arrow(self, x1: float, y1: float, x2: float, y2: float, style: str = "quiet") -> None:
        """An arrow to the second point, which must be straight below, above or beside the first."""
        self.line(x1, y1, x2, y2, style, 1.5)
        size = 6
        across, along = (1, 0) if x1 == x2 else (0, 1)
        back = -size if (y2 > y1 if x1 == x2 else x2 > x1) else size
        tips = [(x2 + s * size * across + back * along, y2 + s * size * along + back * across) for s in (-0.7, 0.7)]
        self.path([tips[0], (x2, y2), tips[1]], style)

    def svg(self) -> str:
        """The file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" aria-label={quoteattr(self.title)}>'
        )
        words = f"<title>{escape(self.title)}</title>\n<desc>{escape(self.description)}</desc>"
        return "\n".join([head, words, f"<style>\n{STYLE}\n</style>", *self.parts, "</svg>"]) + "\n"
