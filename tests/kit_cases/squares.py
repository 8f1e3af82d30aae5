"""Cases that came with version 4: squares in 8 bits that do not become 0, steps that keep them, SOAP's refresh."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, value_table
from bnbref.conformance.case import CPU, Case
from kit_cases.inputs import beside, in_blocks, matrix, noise, random_bytes, scales, squares
from kit_cases.oracles import make
from kit_cases.version2 import OF_LEFT, OF_RIGHT

Earlier = Mapping[str, Case]
"""The cases of earlier versions by id."""

SIGNED, UNSIGNED = (value_table(book, CPU) for book in (DYNAMIC, DYNAMIC_UNSIGNED))


DECADES = torch.exp2(-(torch.arange(512) % 34).double()).float()
"""Gradients over ten decades, whose squares are over twenty: most are below the smallest value of the map."""


def _squares() -> Iterator[Case]:
    def case(label: str, x: Tensor, rules: str, flags: str = "", blocksize: int = 256) -> Case:
        return make(label, "quantize_squares", {"x": x, "values": UNSIGNED}, rules, flags, blocksize=blocksize)

    lowest = float(UNSIGNED[1])
    yield case("decades", DECADES.square(), "QS-1", "squares-lost")
    below = beside([lowest / 2, lowest, lowest / 4, lowest * 2.0**-40], (-2, -1, 0, 1, 2))
    yield case("beside-the-lowest", in_blocks(below, 256), "QS-1", "squares-lost")
    yield case("zeros", in_blocks(torch.tensor([0.0, 0.5, 0.0, lowest / 8] * 20), 64), "QS-2", "zero-block", 64)
    yield case("nothing", torch.zeros(300), "QS-2", "zero-block")
    middle = (UNSIGNED[1:-1] + UNSIGNED[2:]) / 2
    yield case("ties", in_blocks(middle[middle > 1e-3], 256), "QS-3", "tie-to-even")
    yield case("beside-midpoints", in_blocks(beside(middle.tolist(), (-2, -1, 1, 2)), 256), "QS-3")
    yield case("tail", noise(300, 621).square(), "QS-3", "tail-block")
    yield case("matrix", noise(300, 622).square().view(20, 15), "QS-3 G-1")


def _nonzero(earlier: Earlier) -> Iterator[Case]:
    """Those of optimizer_8bit in which a square is next to nothing beside the largest of its block, and others."""

    def case(of: str, label: str, rules: str, flags: str = "", **inputs: Tensor) -> Case:
        one = earlier[f"optimizer_8bit/{of}"]
        shorter = {key: x[:260] if x.numel() == 512 else x for key, x in {**one.inputs, **inputs}.items()}
        return make(label, "optimizer_8bit_nonzero", shorter, rules, flags, **one.params)

    for name in ("adam", "ademamix"):
        first = case(f"{name}-wide", f"{name}-wide", "ON-1", "squares-lost", g=DECADES * noise(512, 631).sign())
        yield first
        later = {key: expected.value for key, expected in first.expected.items()}
        yield case(f"{name}-step-2", f"{name}-wide-step-2", "ON-1", "squares-lost", **later, g=DECADES.flip(0))
        yield case(f"{name}-resumed", f"{name}-resumed", "ON-1", "resume")
        yield case(f"{name}-zeros", f"{name}-zeros", "ON-2", "zero-state-drift")
        yield case(f"{name}-nan", f"{name}-nan", "ON-2", "bad-gradient")
    for name in ("rmsprop", "adagrad"):
        yield case(f"{name}-unsigned", f"{name}-wide", "ON-1", "squares-lost", g=DECADES)


def _coded(names: tuple[str, str], shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Two states in 8 bits: numbers of both signs, and squares over eight decades."""
    count = torch.Size(shape).numel()
    given: dict[str, Tensor] = {}
    for i, (name, values) in enumerate(zip(names, (SIGNED, UNSIGNED), strict=True), 1):
        codes = 1 + random_bytes(count, seed + i) % 254
        given |= {name: codes.view(shape), f"absmax{i}": scales(-(-count // 256)) / 64, f"values{i}": values}
    return given


def _zero(names: tuple[str, str], shape: tuple[int, ...]) -> dict[str, Tensor]:
    given = _coded(names, shape, 0)
    for i, (name, book) in enumerate(zip(names, (DYNAMIC, DYNAMIC_UNSIGNED), strict=True), 1):
        given |= {name: torch.full_like(given[name], book.code_of_zero), f"absmax{i}": given[f"absmax{i}"] * 0}
    return given


def _schedule_free_8bit(earlier: Earlier) -> Iterator[Case]:
    names, numbers = ("difference", "squares"), earlier["schedule_free/resumed"].params

    def case(label: str, rules: str, flags: str = "", count: int = 260, states: dict[str, Tensor] | None = None,
             g: Tensor | None = None, **own: Any) -> Case:  # fmt: skip
        inputs = {"p": noise(count, 641), **(states or _coded(names, (count,), 642))}
        inputs["g"] = noise(count, 645) if g is None else g
        return make(label, "schedule_free_8bit", inputs, rules, flags, **{**numbers, **own})

    yield case("step-1", "SD-1", "bias-correction", states=_zero(names, (260,)), step=1)
    yield case("resumed", "SD-1", "resume")
    yield case("wide", "SD-2", "squares-lost", states=_zero(names, (260,)), g=DECADES[:260], step=1)
    idle = torch.arange(260) % 2
    yield case("zeros", "SD-2", "zero-state-drift", states=_zero(names, (260,)), g=DECADES[:260] * idle, step=1)
    yield case("warmup", "SD-1", "averaging-weight", step=3, warmup_steps=8)
    yield case("decay", "SD-1", "decay-of-the-average", weight_decay=0.25)
    yield case("tail", "SD-2", "tail-block", count=257)


# ---- SOAP -----------------------------------------------------------------------------------------------------------


def _soap_8bit(earlier: Earlier) -> Iterator[Case]:
    names, shape, one = ("momentum", "squares"), (6, 5), earlier["soap/resumed"]
    fixed = {name: one.inputs[name] for name in ("p", "g", "left", "right", "of_left", "of_right")}

    def case(label: str, rules: str, flags: str = "", states: dict[str, Tensor] | None = None, **own: Any) -> Case:
        inputs = {**fixed, **_coded(names, shape, 651), **(states or {})}
        return make(label, "soap_8bit", inputs, rules, flags, **{**one.params, "eps": 2.0**-10, **own})

    yield case("step-1", "SE-1", "bias-correction", states=_zero(names, shape), step=1)
    yield case("resumed", "SE-1", "resume")
    # Of rank one in its bases: all but one of the squares are next to nothing, or the rounding of zero.
    one_direction = torch.outer(OF_LEFT[:, 1] + OF_LEFT[:, 2] * 2.0**-12, OF_RIGHT[:, 3] + OF_RIGHT[:, 0] * 2.0**-9)
    yield case("wide", "SE-2", "squares-lost", states={**_zero(names, shape), "g": one_direction}, step=1)
    yield case("nothing", "SE-2", "zero-block", states={**_zero(names, shape), "g": torch.zeros(shape)}, step=1)
    yield case("decay", "SE-1", "adam-decay-order", weight_decay=0.25)
    large = (20, 15)
    sides = {
        f"of_{name}": torch.block_diag(*(of,) * n) for name, of, n in (("left", OF_RIGHT, 4), ("right", OF_RIGHT, 3))
    }
    sides |= {name: matrix((n, n), 655 + n) for name, n in zip(("left", "right"), large, strict=True)}
    several = {**_coded(names, large, 652), "p": matrix(large, 653), "g": matrix(large, 654), **sides}
    yield case("several-blocks", "SE-2", "tail-block", states=several)


def _mean(basis: Tensor, values: tuple[float, ...], seed: int) -> Tensor:
    """A mean with about these eigenvectors and eigenvalues: those are not far from the old bases, but not they."""
    off = matrix((len(basis), len(basis)), seed) / 4
    near = basis @ torch.diag(torch.tensor(values)) @ basis.t()
    return near + off + off.t()


def _soap_refresh(earlier: Earlier) -> Iterator[Case]:
    numbers = earlier["soap/resumed"].params  # eps is next to nothing there: what it is added to is free

    def case(label: str, rules: str, flags: str = "", left: int = 0, changed: dict[str, Tensor] | None = None,
             **own: Any) -> Case:  # fmt: skip
        of_left, of_right = (OF_RIGHT.t().contiguous() if left else OF_LEFT), OF_RIGHT
        shape = (len(of_left), len(of_right))
        inputs = {
            "p": matrix(shape, 661), "g": matrix(shape, 662), "then": matrix(shape, 663), "momentum": matrix(shape, 664),
            "squares": squares(shape, 665), "left": _mean(of_left, (1.0, 3.5, 2.5, 1.75, 4.5, 6.0)[: shape[0]], 666),
            "right": _mean(of_right, (2.5, 1.5, 5.0, 3.75, 1.0), 667), "of_left": of_left, "of_right": of_right,
        }  # fmt: skip
        return make(label, "soap_refresh", {**inputs, **(changed or {})}, rules, flags, **{**numbers, **own})

    yield case("resumed", "SR-1", "refresh")
    yield case("square", "SR-1", "refresh", left=5)
    yield case("usual", "SR-1", "refresh", beta1=0.95, beta2=0.95, beta3=0.95, lr=0.003, quick=False)
    yield case("fast", "SR-2", "refresh", beta3=0.5, changed={"g": matrix((6, 5), 668) * 2})
    axes = {"of_left": torch.eye(6), "of_right": torch.eye(5), "left": _mean(torch.eye(6), (6.0, 1.0, 2.0, 5.0, 3.0, 4.0), 669),
            "right": _mean(torch.eye(5), (1.0, 5.0, 2.0, 4.0, 3.0), 670)}  # fmt: skip
    yield case("own-axes", "SR-1", "refresh", changed=axes)
    yield case("decay", "SO-3 SR-1", "adam-decay-order", weight_decay=0.25)
    # The gradient that makes the bases: its singular values are apart, and its vectors those of reflections.
    of_left, of_right = OF_RIGHT.t(), OF_RIGHT
    g = of_left @ torch.diag(torch.tensor([2.0, 1.5, 3.0, 2.5, 1.0])) @ of_right.t()
    none = {name: torch.zeros(5, 5) for name in ("momentum", "squares", "left", "right", "of_left", "of_right")}
    yield case("first", "SR-3", "refresh", left=5, changed={**none, "g": g}, step=0)
    yield case("first-decay", "SR-3", "refresh", left=5, changed={**none, "g": g}, step=0, weight_decay=0.25)


def squares_and_refresh_cases(earlier: Earlier) -> Iterator[Case]:
    """Every case of this file."""
    for cases in (_nonzero, _schedule_free_8bit, _soap_8bit, _soap_refresh):
        yield from cases(earlier)
    yield from _squares()
