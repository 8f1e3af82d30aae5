"""The cases that are made when the kit runs: of every two settings together (pairs.py), and those that are large (large.py)."""

from collections.abc import Iterator

from bnbref.conformance import large, pairs
from bnbref.conformance.backends import Backend
from bnbref.conformance.case import Case


def cases(backend: Backend, only: str = "") -> Iterator[Case]:
    """The cases of what a backend has whose id contains `only`. No others are made: all of them take seconds."""
    yield from pairs.cases(backend, only)
    yield from large.cases(backend, only)


def listed() -> dict[str, str]:
    """The rule of each case by its id."""
    return pairs.listed() | large.listed()
