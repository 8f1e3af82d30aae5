"""The specification: the numbered rules that a backend is judged by, and the real bugs that cases were made from.

Both are text, in specification.txt and flags.txt. docs/content/spec shows the same text, a page for each operation.
"""

import re
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__)


class Rule(NamedTuple):
    """One numbered sentence of the specification.

    id: operation and number. text: what is required. freedom: what a backend may do otherwise, and still conforms.
    """

    id: str
    operation: str
    text: str
    freedom: str = ""


class Flag(NamedTuple):
    """A bug that was real: what went wrong, where, and its number in bitsandbytes' tracker if it has one."""

    name: str
    story: str
    issue: str = ""


def entries(block: str) -> list[str]:
    """The paragraphs of a block, each begun by a line that is not indented, without their line breaks."""
    return [" ".join(entry.split()) for entry in re.split(r"\n(?! )", block.strip())]


def _rules(text: str) -> tuple[dict[str, str], dict[str, Rule]]:
    """The description of each operation, and the rules by their ids. A block of the text is about one operation."""
    operations: dict[str, str] = {}
    found: dict[str, Rule] = {}
    for block in text.split("\n\n"):
        head, *sentences = entries(block)
        operation, _, about = head.partition(": ")
        operations[operation] = about
        for entry in sentences:
            name, _, rest = entry.partition(" ")
            sentence, _, freedom = rest.partition(" Freedom: ")
            if rest.startswith("= "):  # the sentence of another operation's rule
                sentence, freedom = found[rest[2:]][2:]
            found[name] = Rule(name, operation, sentence, freedom)
    return operations, found


ABOUT, RULES = _rules(_HERE.with_name("specification.txt").read_text(encoding="utf-8"))
"""The description of each operation by its name, and every rule by its id."""

_FLAG = re.compile(r"(\S+): (.*?)(?: \[(#.*)\])?")
FLAGS = {
    match[1]: Flag(match[1], match[2], match[3] or "")
    for match in map(_FLAG.fullmatch, entries(_HERE.with_name("flags.txt").read_text(encoding="utf-8")))
    if match
}
"""Every flag by its name; in brackets stands the number of the report in bitsandbytes' tracker."""

RULE_OF_RESULT = {
    ("int8_backward", "grad_weight"): "IB-2",
    ("evaluate_then_train", "grad_x"): "LE-2",
    ("evaluate_then_train", "packed"): "LE-3",
    ("evaluate_then_train", "absmax"): "LE-3",
}
"""The rule of a result, by operation and name, that has one of its own. Other results have the first rule of their case."""


def rules_of(operation: str) -> list[Rule]:
    """The rules of an operation, in order.

    >>> [rule.id for rule in rules_of("int8_matmul")]
    ['IM-1', 'IM-2']
    """
    return [rule for rule in RULES.values() if rule.operation == operation]
