"""The order of a sum as a tree of its elements, and in words: what is repeated is said once."""

from collections.abc import Iterator, Sequence

Tree = int | tuple["Tree", ...]
"""An element of the sum, or what is added at once: two subtrees, or more where an instruction adds several."""


def leaves(tree: Tree) -> Iterator[int]:
    """The elements of a tree.

    >>> list(leaves(((0, 2), 1)))
    [0, 2, 1]
    """
    if isinstance(tree, int):
        yield tree
    else:
        for child in tree:
            yield from leaves(child)


def spine(tree: Tree) -> list[Tree]:
    """What is added one after another, first to last: `((a, b), c)` is a, b, c.

    >>> spine((((0, 1), 2), (3, 4)))
    [0, 1, 2, (3, 4)]
    """
    parts: list[Tree] = []
    while not isinstance(tree, int) and len(tree) == 2:
        tree, last = tree
        parts.append(last)
    return [tree, *reversed(parts)]


def _moved(tree: Tree, by: int) -> Tree:
    return tree + by if isinstance(tree, int) else tuple(_moved(child, by) for child in tree)


def _repeated(parts: Sequence[Tree]) -> int | None:
    """The step, if all parts are the first one, moved by it again and again."""
    step = min(leaves(parts[1])) - min(leaves(parts[0]))
    same = all(_moved(parts[0], i * step) == part for i, part in enumerate(parts))
    return step if same and step > 0 else None


def in_words(tree: Tree) -> str:
    """A tree, its innermost sums first. `8 by 4`: eight of what was described, each 4 elements after the one before,
    added in turn.

    >>> in_words((((0, 2), 4), ((1, 3), 5)))
    '3 by 2, pairs by 1'
    >>> in_words((0, 1, 2, 3))
    '4 by 1 at once'
    """
    if isinstance(tree, int):
        return f"element {tree}"
    if len(tree) > 2:
        step = _repeated(tree)
        return (
            " + ".join(_shortened(tree)) + " at once"
            if step is None
            else _then(tree[0], f"{len(tree)} by {step} at once")
        )
    parts = spine(tree)
    first: Tree = parts[0]
    for i in range(1, len(parts)):  # the first of what is repeated may be a tree
        if (step := _repeated([first, *parts[i:]])) is not None:
            return _then(first, f"{len(parts) - i + 1} by {step}" if len(parts) - i > 1 else f"pairs by {step}")
        first = (first, parts[i])
    return " + ".join(_shortened(parts))


def _then(inner: Tree, text: str) -> str:
    if isinstance(inner, int):
        return text
    words = in_words(inner)
    return f"({words}), {text}" if " + " in words else f"{words}, {text}"


def _shortened(parts: Sequence[Tree]) -> Iterator[str]:
    """Each part in words; of a pattern that goes on for four times or more, the first two times and the last."""
    at = 0
    while at < len(parts):
        period, times = max(
            ((p, _times(parts, at, p)) for p in (1, 2, 4, 8, 16)), key=lambda found: found[0] * found[1]
        )
        end = at + period * times
        if times < 4:
            period, end = 1, at + 1
        shown = list(parts[at:end]) if times < 4 else [*parts[at : at + 2 * period], None, *parts[end - period : end]]
        for part in shown:
            if part is None:
                yield "..."
            else:
                yield str(part) if isinstance(part, int) else f"[{in_words(part)}, from {min(leaves(part))}]"
        at = end


def _times(parts: Sequence[Tree], at: int, period: int) -> int:
    """How often a pattern of so many parts comes again and again, each time moved by the same step."""
    first, times = parts[at : at + period], 1
    if len(parts) < at + 2 * period:
        return 1
    step = min(leaves(parts[at + period])) - min(leaves(first[0]))
    while parts[at + times * period :][:period] == [_moved(part, times * step) for part in first]:
        times += 1
    return times
