"""How a table of measured numbers is written: the results of a program of benchmarks/, rows, digits, and the line below."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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
    rule = "|" + "---|" * len(head)
    first, *others = ("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (head, *rows))
    return "\n".join([first, rule, *others])


def source(run: dict[str, Any], *packages: str) -> str:
    """The line below a table: the command that made it, where, with which packages, and when, as far as the run says so."""
    machine = run["machine"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    gpu = machine.get("gpu") or next((row["gpu"] for row in run.get("rows", ()) if row.get("gpu")), None)
    versions = (f"{name} {machine['packages'][name]}" for name in ("torch", *packages))
    place = gpu or f"{machine['cpu']}, {threads}"
    return f"`{run['command']}`: {', '.join([place, *versions, *filter(None, [run.get('day')])])}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]], run: dict[str, Any], *packages: str) -> str:
    """A table, and below it its source."""
    return f"{lines(head, rows)}\n\n({source(run, *packages)})"


def digits(number: float) -> str:
    """Three of them, and no more than two after the point.

    >>> [digits(x) for x in (0.0312, 5.667, 62.37, 2177.0)]
    ['0.03', '5.67', '62.4', '2177']
    """
    return f"{number:.{max(0, min(2, 3 - len(str(int(number)))))}f}"
