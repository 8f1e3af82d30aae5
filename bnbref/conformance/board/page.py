"""The board as one HTML page: it loads nothing, and all but the filters works without its script.

A dialect or a defect is a button. It opens what failed: the smallest input in hexadecimal, what came, what is allowed.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnbref.conformance.board import STATES, Cell, Column, key
from bnbref.conformance.explain import verdict
from bnbref.conformance.specification import ABOUT, FLAGS, RULES

STYLE, SCRIPT = (Path(__file__).with_name(f"board.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))

SIGNS = {"passed": "✓", "dialect": "≈", "defect": "✗", "refused": "!", "not offered": "·", "not judged": "?"}
"""The sign in a cell of each state, so that states are not told by colour alone."""


def as_page(columns: Sequence[Column]) -> str:
    """The board as a page of its own."""
    rules = list(columns[0].cells) if columns else []
    meanings = "".join(f"<dt>{_signed(state)}<dd>{_text(meaning)}" for state, meaning in STATES.items())
    head = "".join(f'<th scope=col data-column="{_text(c.name)}">{_opener(c.name, _text(c.title))}' for c in columns)
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>The board: which rules backends keep</title><style>{STYLE}</style>
<h1>The board</h1>
<p>Implementations of the formats and optimizers of bitsandbytes, judged by numbered rules. A framed cell opens what failed: the
smallest input, what came, what is allowed. A rule opens its text, a backend its versions. Arrow keys go from cell to cell.</p>
<form><p><label>Find <input type=search name=find placeholder="Q4, absmax, optimizer" autocomplete=off></label>
<output aria-live=polite></output> <button type=reset>reset</button></p>
<fieldset><legend>Only rules that a backend has as</legend>{"".join(_box("state", s, _signed(s)) for s in STATES)}</fieldset>
<details><summary>Only these backends</summary>{"".join(_box("column", c.name, _text(c.title)) for c in columns)}</details>
<details><summary>What the signs mean</summary><dl>{meanings}</dl></details></form>
<div class=scroll><table id=board><thead><tr><th scope=col>Rule{head}</thead>
{"".join(_group(operation, rules, columns) for operation in ABOUT)}</table></div>
{"".join(_about_column(column) for column in columns)}
{"".join(_about_rule(rule, columns) for rule in rules)}
{"".join(_about_cell(column, rule) for column in columns for rule in rules if column.cells[rule].findings)}
<script>{SCRIPT}</script></html>
"""


def _text(words: object) -> str:
    return html.escape(str(words))


def _signed(state: str, words: str = "") -> str:
    """A state in its colour, after its sign."""
    return f'<span class="{state.replace(" ", "-")}">{SIGNS[state]} {words or state}</span>'


def _box(name: str, value: str, label: str) -> str:
    return f'<label><input type=checkbox name={name} value="{_text(value)}"> {label}</label>'


def _opener(identity: str, label: str, described: str = "") -> str:
    """The button that opens the dialog of this id. described: what it says to those who cannot see it."""
    said = f' aria-label="{_text(described)}"' if described else ""
    return f'<button popovertarget="{_text(identity)}"{said}>{label}</button>'


def _opened(identity: str, title: str, body: str) -> str:
    """The dialog that a button opens. The browser opens it, closes it by Escape, and gives the focus back to the button."""
    name = _text(identity)
    return (
        f'<div popover id="{name}" role=dialog aria-labelledby="{name}-title">'
        f'<button class=close popovertarget="{name}" popovertargetaction=hide autofocus>close</button>'
        f'<h2 id="{name}-title">{title}</h2>{body}</div>\n'
    )


def _group(operation: str, rules: Iterable[str], columns: Sequence[Column]) -> str:
    """The rows of an operation."""
    rows = "".join(_row(rule, columns) for rule in rules if RULES[rule].operation == operation)
    head = f"<tr><th scope=rowgroup colspan={len(columns) + 1}><span>{operation}</span>"
    return f"<tbody>{head}{rows}</tbody>\n" if rows else ""


def _row(rule: str, columns: Sequence[Column]) -> str:
    about = RULES[rule]
    flags = {flag for column in columns for finding in column.cells[rule].findings for flag in finding["flags"]}
    words = " ".join([rule, about.operation, about.text, *sorted(flags)]).lower()
    head = f"<th scope=row>{_opener(rule, rule)} <span>{_text(about.text)}</span>"
    return f'<tr data-find="{_text(words)}">{head}{"".join(_td(rule, column) for column in columns)}\n'


def _td(rule: str, column: Column) -> str:
    cell = column.cells[rule]
    told = f"{rule}, {column.title}: {cell.state}"
    if cell.findings:
        inner = _opener(f"{column.name}/{rule}", SIGNS[cell.state], told)
    else:
        inner = f'<span role=img aria-label="{cell.state}">{SIGNS[cell.state]}</span>'
    data = f'data-state="{cell.state}" data-column="{_text(column.name)}"'
    return f'<td class="{cell.state.replace(" ", "-")}" {data} title="{_text(told)}, {_counts(cell)}">{inner}'


def _counts(cell: Cell) -> str:
    return ", ".join(f"{n} {status}" for status, n in cell.counts.items() if n) or "no case"


def _about_column(column: Column) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in column.versions.items())
    states = "".join(f"<tr><th>{_signed(state)}<td>{column.count(state)}" for state in STATES)
    file = _text(column.file.name)
    report = (
        f'<p>The report, made on {_text(column.made)}: <a href="{file}">{file}</a></p>' if column.file.exists() else ""
    )
    matrix = f"<pre class=matrix>{_text(column.matrix)}</pre>" if column.matrix else ""
    body = f"<p>{_text(versions)}</p><table>{states}</table>{matrix}{report}{_program(column)}"
    return _opened(column.name, _text(column.title), body)


def _program(column: Column) -> str:
    name = _text(column.program)
    return f'<p>Without bnbref: <a href="{name}">{name}</a></p>' if name else ""


def _about_rule(rule: str, columns: Sequence[Column]) -> str:
    about = RULES[rule]
    freedom = f"<p>Freedom: {_text(about.freedom)}</p>" if about.freedom else ""
    rows = "".join(
        f"<tr><th>{_text(c.title)}<td>{_signed(c.cells[rule].state)}<td>{_counts(c.cells[rule])}" for c in columns
    )
    return _opened(rule, f"{rule}, {about.operation}", f"<p>{_text(about.text)}</p>{freedom}<table>{rows}</table>")


def _about_cell(column: Column, rule: str) -> str:
    cell = column.cells[rule]
    findings = "".join(_finding(column, finding) for finding in cell.findings)
    title = f"{_signed(cell.state)} {rule}, {_text(column.title)}"
    return _opened(f"{column.name}/{rule}", title, f"<p>{_text(RULES[rule].text)}</p>{findings}{_program(column)}")


def _finding(column: Column, finding: Mapping[str, Any]) -> str:
    """One finding: the input, the elements, drawings, whose convention it is, what it was made from, how to see it again."""
    first, *others = finding["cases"]
    elements = "".join(
        f"<tr><td>{_text(e['place'])}<td>{_text(e['got'])}<td>{_text(e['want'])}" for e in finding["elements"]
    )
    table = f"<table><tr><th>element<th>got<th>want{elements}</table>" if elements else ""
    table += column.drawings.get(key(finding), "")
    about = [f"Follows {text}" for text in finding["follows"]]
    about += [f"A case of {name}. {FLAGS[name].story} {FLAGS[name].issue}".strip() for name in finding["flags"]]
    operation, _, case = first.partition("/")
    again = (
        f"python -m bnbref check --backend {column.backend} --device {column.device} --only {first}\n"
        f"python -m bnbref vectors gen {operation} --only {case}"
    )
    return (
        f"<h3>{_signed(verdict(finding['follows']), _text(finding['message']))}</h3>"
        f"<p>{_text(first)}{f' and {len(others)} more' if others else ''}</p><pre>{_text(chr(10).join(finding['input']))}</pre>"
        f"{table}{''.join(f'<p>{_text(text)}</p>' for text in about)}<pre>{_text(again)}</pre>"
    )
