"""A direction with steps of the whole matrix between its parts, as calls of kernels: which computes what, from what, and when.

    a0 = c.b1 * s0                     kernel    g, s0  ->  a4, and the new s0
    ...
    w0 = newton_schulz(a4)             torch     a4     ->  w0
    return (w0, a2,)                   kernel    w0     ->  p

A kernel reads a parameter and a gradient, and writes the parameter and states. What it reads here is in these two places,
whatever it is: so the kernels are those of any rule, states in 8 bits and all. It reads no more than two matrices beside its
states, of which each is written by one kernel, the last that reads it. What a part computed before and a later one needs is
computed again from what both read.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Names in a line, and neither those of coefficients nor the p that lends a number its shape.
_NAME = re.compile(r"(?<!full_like\()(?<![.\w])(?:p|g|[asw]\d+)\b")
_COEFFICIENT = re.compile(r"\bc\.(\w+)")

DESCENT, WRITE, LOOK = "descent", "write", "look"


class TooMany(ValueError):
    """A part of a direction needs more matrices than a kernel has room for."""


@dataclass(frozen=True)
class Part:
    """A call of a kernel.

    source: of its direction. states: the numbers of those that it has. p, g: the names of the matrices in these places; None
    where it needs no second one. out: the name of what it computes, if any. kind: DESCENT writes the parameter by the
    direction, and its states; WRITE the direction itself in the place of p, and its states; LOOK returns the direction, and
    writes nothing.
    """

    kind: str
    source: str
    states: tuple[int, ...]
    p: str | None
    g: str
    out: str | None


def prefixed(name: str) -> str:
    """What a part of kind WRITE calls a coefficient of its rule, as it has a rate and a decay of its own."""
    return f"_{name}"


class _Program:
    """The lines of a direction by the names of what they compute; w0 and so on are the results of `calls`."""

    def __init__(self, lines: Sequence[str], calls: Sequence[tuple[str, ...]]) -> None:
        split = (line.partition(" = ") for line in lines)
        self.text = {name: text for name, _, text in split if name.startswith("a")}
        self._call_of = {name: i for i, results in enumerate(calls) for name in results}

    def lines(self, names: Iterable[str]) -> tuple[list[str], set[str]]:
        """The lines that compute these, in their order, and what they read: p, g, states and results of calls."""
        needed, read, left = set(), set(), list(names)
        while left:
            name = left.pop()
            if name not in self.text:
                read.add(name)
            elif name not in needed:
                needed.add(name)
                left += _NAME.findall(self.text[name])
        return [name for name in self.text if name in needed], read

    def stage(self, name: str) -> int:
        """How many calls must have been made before this can be computed."""
        return max((self._call_of[x] + 1 for x in self.lines([name])[1] if x in self._call_of), default=0)

    def states(self, names: Iterable[str]) -> set[int]:
        return {int(name[1:]) for name in self.lines(names)[1] if name.startswith("s")}

    def matrices(self, names: Iterable[str]) -> list[str]:
        """What is read beside states, the gradient first and the parameter last: p may hold what is not finite."""
        found = {name for name in self.lines(names)[1] if not name.startswith("s")}
        return sorted(found, key=lambda name: (name == "p", name != "g", name))

    def part(self, kind: str, out: str | None, new: dict[int, str]) -> Part:
        """A call of a kernel that computes `out`, if any, and the states in `new`."""
        wanted = [*([out] if out else []), *new.values()]
        matrices = [x for x in self.matrices(wanted) if kind != DESCENT or x != "p"]
        # The place of the parameter is taken where it is written, by the parameter itself or by `out`.
        if len(matrices) > (1 if kind == DESCENT or (kind == WRITE and out) else 2):
            raise TooMany(f"needs {', '.join(matrices)} at once, and there is room for two matrices beside its states")
        states = sorted(self.states(wanted) | new.keys())
        g, second = (*matrices, "g")[0], (*matrices, None, None)[1]
        p = "p" if kind == DESCENT else second
        places = {g: "g", **({p: "p"} if p else {}), **{f"s{i}": f"s{j}" for j, i in enumerate(states)}}

        def placed(text: str) -> str:
            text = _NAME.sub(lambda found: places.get(found[0], found[0]), text)
            return _COEFFICIENT.sub(lambda found: f"c.{prefixed(found[1])}", text) if kind == WRITE else text

        lines = [f"{name} = {placed(self.text[name])}" for name in self.lines(wanted)[0]]
        inputs = ["p", "g", *(f"s{j}" for j in range(len(states)))]
        results = [placed(out) if out else "full_like(p, 0.0)", *(placed(new.get(i, f"s{i}")) for i in states)]
        text = [f"def direction({', '.join(inputs)}, c):", *lines, f"return ({', '.join(results)},)"]
        return Part(kind, "\n    ".join(text), tuple(states), p, g, out)


@functools.lru_cache(maxsize=256)
def schedule(
    lines: tuple[str, ...], calls: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...], direction: str,
    new: tuple[tuple[int, str], ...],
) -> tuple[Part | int, ...]:  # fmt: skip
    """The calls of kernels, and the numbers of the calls of `Rule.whole` between them.

    calls: of each the names of its arguments and of its results. new: the numbers of states by element, and their new values.

    >>> for part in schedule(("a0 = g + s0", "w0 = f(a0)"), ((("a0",), ("w0",)),), "w0", ((0, "a0"),)):
    ...     print(part if isinstance(part, int) else f"{part.kind} p={part.p} g={part.g} out={part.out} states={part.states}")
    write p=None g=g out=a0 states=(0,)
    0
    descent p=p g=w0 out=w0 states=()
    """
    program = _Program(lines, [results for _, results in calls])
    outs: list[list[str]] = []
    for args, _ in calls:
        seen = {x for stage in outs for x in stage}
        outs.append([x for x in dict.fromkeys(args) if x in program.text and x not in seen])
    stages = [*outs, [direction]]
    last = _last(program, stages, dict(new))
    parts: list[Part | int] = []
    for k, names in enumerate(stages):
        written = {i: name for i, name in new if last[i] == k}
        final = k == len(calls)
        parts += [program.part(LOOK, out, {}) for out in names[:-1]]
        parts += _stage(program, names[-1] if names else None, written, final)
        if not final:
            parts.append(k)
    return tuple(parts)


def _last(program: _Program, stages: Sequence[Sequence[str]], new: dict[int, str]) -> dict[int, int]:
    """The stage at which each state is written: its new value can be computed, and nothing later reads the old one."""
    last = {i: program.stage(name) for i, name in new.items()}
    for k, names in enumerate(stages):
        for i in program.states(names):
            last[i] = max(last[i], k)
    for _ in new:  # states of which one is computed of the other are written together
        for i, name in new.items():
            linked = program.states([name]) | {i}
            last.update(dict.fromkeys(linked, max(last[j] for j in linked)))
    return last


def _stage(program: _Program, out: str | None, new: dict[int, str], final: bool) -> list[Part]:
    """The kernels for what a stage computes and writes: one, if it has room for what both need."""
    if out is None:
        return [program.part(WRITE, None, new)] if new else []
    descent = [Part(DESCENT, "def direction(p, g, c):\n    return (g,)", (), "p", out, None)] if final else []
    if program.states([out]) <= new.keys():
        for kind, after in [(DESCENT, [])] * final + [(WRITE, descent)]:
            with contextlib.suppress(TooMany):
                return [program.part(kind, out, new), *after]
    return [program.part(LOOK, out, {}), *([program.part(WRITE, None, new)] if new else []), *descent]
