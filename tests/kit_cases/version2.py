"""Cases that came with version 2: Schedule-Free, Muon, Adafactor, SOAP, corrections of 16-bit weights, steps in a backward pass.

As in steps.py, numbers are those that float32 has, and a case leaves all but one thing at nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, value_table
from bnbref.conformance.case import CPU, Case
from bnbref.conformance.oracles.codes import encode_8bit
from bnbref.conformance.oracles.steps import BLOCKSIZE
from kit_cases.inputs import beside, integers, matrix, noise, spread, squares
from kit_cases.oracles import make
from kit_cases.oracles.master_weights import LINES, split
from kit_cases.steps import hyper


@dataclass(frozen=True)
class _Of:
    """Makes the cases of an operation. tensors: its inputs, of a seed. numbers: its other arguments."""

    operation: str
    tensors: Callable[[int], Mapping[str, Tensor]]
    numbers: Mapping[str, Any]

    def __call__(
        self, label: str, rules: str, flags: str = "", seed: int = 0, inputs: Mapping[str, Tensor] | None = None, **changed: Any
    ) -> Case:  # fmt: skip
        given = {**self.tensors(seed), **(inputs or {})}
        return make(label, self.operation, given, rules, flags, **{**self.numbers, **changed})


# ---- Schedule-Free --------------------------------------------------------------------------------------------------


def _averaged(seed: int, shape: Sequence[int] = (100,)) -> dict[str, Tensor]:
    p = matrix(shape, 401 + seed)
    near = p + matrix(shape, 402 + seed) / 8
    return {"p": p, "z": near, "g": matrix(shape, 403 + seed), "squares": squares(shape, 404 + seed)}


def _schedule_free() -> Iterator[Case]:
    numbers = {"step": 17, "lr": 0.0625, "beta1": 0.875, "beta2": 0.96875, "eps": 0.0009765625, "weight_decay": 0.0}
    case = _Of("schedule_free", _averaged, {**numbers, "warmup_steps": 0})
    start = {"z": _averaged(0)["p"], "squares": torch.zeros(100)}
    first = case("step-1", "SF-1", "bias-correction", inputs=start, step=1)
    yield first
    then = {key: x.value for key, x in first.expected.items()}
    yield case("step-2", "SF-1", "bias-correction", seed=5, inputs=then, step=2)
    yield case("resumed", "SF-2", "resume")
    yield case("step-5000", "SF-2", "resume", step=5000, quick=False)
    yield case("usual", "SF-2", quick=False, step=1000, lr=0.0025, beta1=0.9, beta2=0.999, eps=1e-8)
    yield case("no-gradient", "SF-2", inputs={"g": torch.zeros(100)})
    yield case("matrix", "SF-2 G-1", inputs=_averaged(10, (20, 5)))
    yield case("warmup", "SF-3", "averaging-weight", step=3, warmup_steps=8)
    yield case("after-warmup", "SF-3", "averaging-weight", step=12, warmup_steps=8)
    yield case("decay", "SF-4", "decay-of-the-average", weight_decay=0.25)


# ---- Muon -----------------------------------------------------------------------------------------------------------

Blocks = Sequence[tuple[int, int]]
"""Rows and columns of matrices along a diagonal; as many columns as a power of two, and not more rows."""

SQUARE, OBLONG = ((4, 4), (2, 2), (1, 1), (1, 1)), ((4, 8), (2, 4))


def _hadamard(size: int) -> Tensor:
    made = torch.ones(1, 1)
    while made.shape[0] < size:
        made = torch.cat((torch.cat((made, made), 1), torch.cat((made, -made), 1)))
    return made


def _orthogonal(blocks: Blocks, seed: int, sizes: Sequence[Sequence[float]]) -> list[Tensor]:
    """For each list of sizes a matrix of orthogonal rows of ones with signs, shuffled, each times the size of its block."""
    made = torch.block_diag(*(_hadamard(columns)[:rows] for rows, columns in blocks))
    of = torch.cat([torch.full((rows,), i) for i, (rows, _) in enumerate(blocks)])
    rows, columns = (torch.argsort(integers(n, seed + i, 20)) for i, n in enumerate(made.shape))
    sign = 1 - 2 * integers(made.shape[1], seed + 2, 1).float()
    return [((made * sign) * torch.tensor(size)[of][:, None])[rows][:, columns] for size in sizes]


def _directed(
    blocks: Blocks = SQUARE, seed: int = 0, size: float = 1.0, old: float = 1.0, tall: bool = False, first: float = 1.0
) -> dict[str, Tensor]:
    """Blocks differ in size, and the momentum has other ratios than the gradient: which of them is orthogonalised shows."""
    sizes = [[x * size for x in (first, 2.0, 0.5, 3.0, 0.0)], [x * old for x in (2.0, -0.5, 3.0, 0.25, 0.0)]]
    g, momentum = (x.t().contiguous() if tall else x for x in _orthogonal(blocks, 420 + seed, sizes))
    return {"p": matrix(g.shape, 430 + seed) / 8, "g": g, "momentum": momentum}


def _coded(**options: Any) -> dict[str, Tensor]:
    """The same with the momentum in 8 bits, scaled so that a number and its negative are both in the codebook."""
    given, values = _directed(**options), value_table(DYNAMIC, CPU)
    scale, blocks = 4 * options.get("old", 1.0), -(-given["p"].numel() // BLOCKSIZE)
    codes = encode_8bit(given["momentum"] / scale if scale else given["momentum"], values)
    return {**given, "momentum": codes, "absmax": torch.full((blocks,), scale), "values": values}


def _muon() -> Iterator[Case]:
    numbers = {"lr": 0.125, "beta": 0.875, "weight_decay": 0.0, "nesterov": True, "adjust": "original", "ns_steps": 1}
    case, coded = (_Of(name, lambda _: {}, {**numbers, "eps": 1e-7}) for name in ("muon", "muon_8bit"))
    yield case("resumed", "MU-1", "nesterov", inputs=_directed())
    yield case("step-1", "MU-1", "nesterov", inputs=_directed(old=0.0))
    yield case("without-nesterov", "MU-1", "nesterov", inputs=_directed(), nesterov=False)
    yield case("two-turns", "MU-2", inputs=_directed(seed=4), ns_steps=2)
    small = _directed(((1, 1), (4, 4), (8, 8), (1, 1)), old=0.0, first=1024.0)  # of most rows beside the first
    yield case("five-turns", "MU-2", inputs=small, ns_steps=5)
    yield case("dense", "MU-2", inputs=_directed(((8, 8),)))
    yield case("large", "MU-2", inputs=_directed(size=2.0**40, old=2.0**40))
    yield case("small", "MU-2", inputs=_directed(size=2.0**-18, old=2.0**-18))
    yield case("one", "MU-2", inputs=_directed(((1, 1),)))
    yield case("transposed", "MU-2 G-3", inputs=_directed(), layout=("g",))
    for adjust, name in (("original", ""), ("match_rms_adamw", "-as-adamw")):
        yield case(f"wide{name}", "MU-3", "muon-scale", inputs=_directed(OBLONG), adjust=adjust)
        yield case(f"tall{name}", "MU-3", "muon-scale", inputs=_directed(OBLONG, tall=True), adjust=adjust)
    yield case("zero-rows", "MU-4", inputs=_directed((*SQUARE, (1, 1))))
    yield case("nothing", "MU-4", inputs=_directed(size=0.0, old=0.0))
    yield case("decay", "MU-5", "adam-decay-order", inputs=_directed(), weight_decay=0.25)
    yield coded("resumed", "MB-1", inputs=_coded())
    yield coded("step-1", "MB-1", inputs=_coded(old=0.0))
    yield coded("tall", "MB-1", inputs=_coded(blocks=OBLONG, tall=True))
    yield coded("several-blocks", "MB-2", "tail-block", inputs=_coded(blocks=((16, 16), (2, 2)), seed=3))
    yield coded("nothing", "MB-3", "zero-block", inputs=_coded(size=0.0, old=0.0))


# ---- Adafactor and SOAP ---------------------------------------------------------------------------------------------


def _factored(seed: int, shape: tuple[int, int] = (6, 5)) -> dict[str, Tensor]:
    p, g = matrix(shape, 441 + seed), matrix(shape, 442 + seed)
    return {"p": p, "g": g, "row": squares(shape[:1], 443 + seed), "column": squares(shape[1:], 444 + seed)}


def _adafactor() -> Iterator[Case]:
    numbers = {"step": 16, "lr": 0.0625, "beta2_decay": -0.75, "eps1": 2.0**-23, "eps2": 0.0009765625, "d": 4.0}
    case = _Of("adafactor", _factored, {**numbers, "weight_decay": 0.0})
    yield case("step-1", "AF-1", "resume", inputs={"row": torch.zeros(6), "column": torch.zeros(5)}, step=1)
    yield case("resumed", "AF-1", "resume")
    for name, shape, quick in (("row", (1, 7), True), ("column", (7, 1), True), ("larger", (16, 24), False)):
        yield case(name, "AF-1", inputs=_factored(0, shape), quick=quick)
    yield case("transposed", "AF-1 G-3", layout=("g",))
    zeros = matrix((6, 5), 445)
    zeros[2], zeros[:, 3] = 0, 0
    yield case("zeros", "AF-1", inputs={"g": zeros})
    yield case("clipped", "AF-2", "update-clip", inputs={"g": matrix((6, 5), 446) * 4}, d=1.0)
    yield case("small-parameter", "AF-3", inputs={"p": matrix((6, 5), 447) * 2.0**-16})
    yield case("late", "AF-3", step=400)
    yield case("decay", "AF-4", "scaled-decay", weight_decay=0.25)


def _reflection(size: int, *marked: int) -> Tensor:
    """I - 2 v v^T / |v|^2, where v has one or four ones: orthogonal, and exact."""
    v = torch.zeros(size)
    v[list(marked)] = 1
    return torch.eye(size) - 2 / len(marked) * torch.outer(v, v)


OF_LEFT = _reflection(6, 0, 1, 2, 3) @ _reflection(6, 2, 3, 4, 5) @ _reflection(6, 1)
OF_RIGHT = _reflection(5, 0, 1, 3, 4) @ _reflection(5, 0, 1, 2, 3)


def _rotated(seed: int, of_left: Tensor = OF_LEFT, of_right: Tensor = OF_RIGHT) -> dict[str, Tensor]:
    shape = (len(of_left), len(of_right))
    means = {name: matrix((n, n), 456 + n + seed) for name, n in zip(("left", "right"), shape, strict=True)}
    given = {key: matrix(shape, 451 + i + seed) for i, key in enumerate(("p", "g", "momentum"))}
    return {**given, "squares": squares(shape, 454 + seed), **means, "of_left": of_left, "of_right": of_right}


def _soap() -> Iterator[Case]:
    numbers = {"step": 17, "lr": 0.0625, "beta1": 0.875, "beta2": 0.96875, "beta3": 0.9375, "eps": 2.0**-40}
    case = _Of("soap", _rotated, {**numbers, "weight_decay": 0.0})
    zero = {key: torch.zeros(6, 5) for key in ("momentum", "squares")}
    yield case("step-1", "SO-1", "bias-correction", inputs={**zero, "g": matrix((6, 5), 460) + 1}, step=1)
    yield case("resumed", "SO-1", "resume")
    yield case("square", "SO-1", inputs=_rotated(0, OF_RIGHT.t().contiguous(), OF_RIGHT))
    yield case("own-axes", "SO-1", inputs={"of_left": torch.eye(6), "of_right": torch.eye(5)})
    yield case("no-gradient", "SO-2", inputs={"g": torch.zeros(6, 5)})
    yield case("means", "SO-2", seed=30)
    yield case("decay", "SO-3", "adam-decay-order", weight_decay=0.25)


# ---- weights of 16 bits, and steps in a backward pass ---------------------------------------------------------------


def _corrections(dtype: torch.dtype, bits: int, name: str) -> Iterator[Case]:
    shift = LINES[dtype][0]
    kind: dict[str, Any] = {"dtype": name, "bits": bits}
    label = f"{name}-{bits}"
    # Halves of a step of the weight, and of one of the correction.
    halves = [j << (shift - 2) for j in (1, 2, 3)] + [1 << (shift - 9), 3 << (shift - 9)]
    ties = beside([1.0, 1.9921875, -3.0, 0.0078125], [half + i for half in halves for i in (-1, 0, 1)])
    yield make(f"{label}-ties", "split_weight", {"x": ties}, "WS-1", "weight-tie", **kind)
    yield make(f"{label}-noise", "split_weight", {"x": noise(256, 471)}, "WS-1", **kind)
    wide = spread(256, 472, -120, 120) if dtype == torch.bfloat16 else spread(256, 473, -13, 15)
    yield make(f"{label}-wide", "split_weight", {"x": torch.cat((wide, torch.tensor([0.0, -0.0])))}, "WS-2", **kind)
    most = 1 << (shift - 1)
    every = torch.arange(-128, 128).to(torch.int8) if bits == 24 else torch.arange(-most, most, 255).to(torch.int16)
    for named, p in (("one", 1.0), ("minus-two", -2.0), ("zero", 0.0)):
        inputs = {"p": torch.full((len(every),), p, dtype=dtype), "correction": every}
        yield make(f"{label}-{named}", "join_weight", inputs, "WJ-1" if p else "WJ-2")


def _corrected(dtype: torch.dtype, bits: int, name: str) -> Iterator[Case]:
    def tensors(_: int) -> dict[str, Tensor]:
        p, correction = split(noise(100, 481), dtype, bits)
        g, states = noise(100, 482).to(dtype), {"state1": noise(100, 483) / 2, "state2": squares((100,), 484)}
        return {"p": p, "correction": correction, "g": g, **states}

    case, label = _Of("corrected_step", tensors, hyper("adam")), f"{name}-{bits}"
    yield case(f"{label}-resumed", "WC-1")
    yield case(f"{label}-small-steps", "WC-1", "small-steps", lr=2.0**-12)
    yield case(f"{label}-decay", "WC-1", "small-steps", lr=2.0**-12, weight_decay=0.25)
    half = torch.arange(100) % 2
    idle = {key: x * half for key, x in tensors(0).items() if key not in ("p", "correction")}
    yield case(f"{label}-zeros", "WC-2", "zero-state-drift", inputs=idle)


def _released() -> Iterator[Case]:
    def whole(rows: int, columns: int, seed: int) -> Tensor:
        return (integers(rows * columns, seed, 4) - 8).float().view(rows, columns)

    for name, rows, n, hidden, out in (("two-layers", 4, 5, 6, 3), ("one-row", 1, 3, 2, 4), ("tied", 3, 4, 4, 4)):
        inputs = {"x": whole(rows, n, 491), "weight1": whole(hidden, n, 492), "grad": whole(rows, out, 493)}
        inputs |= {} if name == "tied" else {"weight2": whole(out, hidden, 494)}
        yield make(name, "released_step", inputs, "GR-2" if name == "tied" else "GR-1", "stepped-too-early", lr=0.125)


def version_2_cases() -> Iterator[Case]:
    """Every case that came with version 2."""
    for of_steps in (_schedule_free, _muon, _adafactor, _soap, _released):
        yield from of_steps()
    for of_weights in (_corrections, _corrected):
        for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
            for bits in (24, 32):
                yield from of_weights(dtype, bits, name)
