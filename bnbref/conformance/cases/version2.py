"""Cases that came with version 2: Schedule-Free, Muon, Adafactor, SOAP, corrections of 16-bit weights, steps in a backward pass.

As in steps.py, numbers are those that float32 has, and a case leaves all but one thing at nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, value_table
from bnbref.conformance.cases import CPU, Case, make
from bnbref.conformance.cases.inputs import beside, integers, noise, spread
from bnbref.conformance.cases.steps import hyper
from bnbref.conformance.oracles.codes import encode_8bit
from bnbref.conformance.oracles.weights import split

WEIGHTS = [(dtype, bits) for dtype in ("bfloat16", "float16") for bits in (24, 32)]


def _squares(shape: Sequence[int], seed: int) -> Tensor:
    x = _noise(shape, seed) / 2
    return x * x + 0.015625


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    return noise(torch.Size(shape).numel(), seed).view(*shape)


def _schedule_free() -> Iterator[Case]:
    def case(label: str, rules: str, flags: str = "", seed: int = 0, inputs: dict[str, Tensor] | None = None, **k: Any) -> Case:
        p = _noise((100,), 401 + seed)
        given = {"p": p, "z": p + _noise((100,), 402 + seed) / 8, "g": _noise((100,), 403 + seed), "squares": _squares((100,), 404 + seed)}
        numbers = {"step": 17, "lr": 0.0625, "beta1": 0.875, "beta2": 0.96875, "eps": 0.0009765625, "weight_decay": 0.0, "warmup_steps": 0}
        return make(label, "schedule_free", {**given, **(inputs or {})}, rules, flags, **{**numbers, **k})

    first = case("step-1", "SF-1", "bias-correction", inputs={"z": _noise((100,), 401), "squares": torch.zeros(100)}, step=1)
    yield first
    yield case("step-2", "SF-1", "bias-correction", seed=5, inputs={key: x.value for key, x in first.expected.items()}, step=2)
    yield case("resumed", "SF-2", "resume")
    yield case("step-5000", "SF-2", "resume", step=5000, quick=False)
    usual = {"step": 1000, "lr": 0.0025, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    yield case("usual", "SF-2", quick=False, **usual)
    yield case("no-gradient", "SF-2", inputs={"g": torch.zeros(100)})
    yield case("matrix", "SF-2 G-1", inputs={key: _noise((20, 5), i) for i, key in enumerate(("p", "z", "g"), 410)} | {"squares": _squares((20, 5), 414)})
    yield case("warmup", "SF-3", "averaging-weight", step=3, warmup_steps=8)
    yield case("after-warmup", "SF-3", "averaging-weight", step=12, warmup_steps=8)
    yield case("decay", "SF-4", "decay-of-the-average", weight_decay=0.25)


def _hadamard(size: int) -> Tensor:
    made = torch.ones(1, 1)
    while made.shape[0] < size:
        made = torch.cat((torch.cat((made, made), 1), torch.cat((made, -made), 1)))
    return made


def _rows(blocks: Sequence[tuple[int, int]], seed: int) -> tuple[Tensor, Tensor]:
    """Orthogonal rows of ones with signs, blocks of (rows, columns) in a shuffled matrix, and of each row the number of its block."""
    made = torch.block_diag(*(_hadamard(columns)[:rows] for rows, columns in blocks))
    of = torch.cat([torch.full((rows,), i) for i, (rows, _) in enumerate(blocks)])
    rows, columns = (torch.argsort(integers(n, seed + i, 20)) for i, n in enumerate(made.shape))
    sign = 1 - 2 * integers(made.shape[1], seed + 2, 1).float()
    return (made * sign)[rows][:, columns], of[rows]


def _muon() -> Iterator[Case]:
    square = ((4, 4), (2, 2), (1, 1), (1, 1))

    def case(
        label: str, rules: str, flags: str = "", blocks: Sequence[tuple[int, int]] = square, seed: int = 0, size: float = 1.0,
        old: float = 1.0, tall: bool = False, eight: bool = False, layout: tuple[str, ...] = (), quick: bool = True, **k: Any,
    ) -> Case:  # fmt: skip
        unit, of = _rows(blocks, 420 + seed)
        # Blocks differ in size, and momentum has other ratios than the gradient: which of them is orthogonalised shows.
        magnitude = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0])[of % 5] * size
        g, momentum = unit * magnitude[:, None], unit * (torch.tensor([2.0, -0.5, 3.0, 0.25, 0.0])[of % 5] * old)[:, None]
        g, momentum = (x.t().contiguous() if tall else x for x in (g, momentum))
        inputs = {"p": _noise(g.shape, 430 + seed) / 8, "g": g, "momentum": momentum}
        if eight:
            values, absmax = value_table(DYNAMIC, CPU), torch.full((-(-momentum.numel() // 256),), 4 * old)
            inputs["momentum"] = encode_8bit(momentum / absmax[0].clamp(min=2.0**-100), values)
            inputs |= {"absmax": absmax, "values": values}
        numbers = {"lr": 0.125, "beta": 0.875, "weight_decay": 0.0, "nesterov": True, "adjust": "original", "ns_steps": 1, "eps": 1e-7}
        operation = "muon_8bit" if eight else "muon"
        return make(label, operation, inputs, rules, flags, layout=layout, quick=quick, **{**numbers, **k})

    yield case("resumed", "MU-1", "nesterov")
    yield case("step-1", "MU-1", "nesterov", old=0.0)
    yield case("without-nesterov", "MU-1", "nesterov", nesterov=False)
    yield case("two-turns", "MU-2", seed=4, ns_steps=2)
    yield case("five-turns", "MU-2", seed=4, ns_steps=5)
    yield case("dense", "MU-2", blocks=((8, 8),))
    yield case("large", "MU-2", size=2.0**40, old=2.0**40)
    yield case("small", "MU-2", size=2.0**-18, old=2.0**-18)
    yield case("one", "MU-2", blocks=((1, 1),))
    yield case("transposed", "MU-2 G-3", layout=("g",))
    yield case("wide", "MU-3", "muon-scale", blocks=((4, 8), (2, 4)))
    yield case("tall", "MU-3", "muon-scale", blocks=((4, 8), (2, 4)), tall=True)
    yield case("tall-as-adamw", "MU-3", "muon-scale", blocks=((4, 8), (2, 4)), tall=True, adjust="match_rms_adamw")
    yield case("wide-as-adamw", "MU-3", "muon-scale", blocks=((4, 8), (2, 4)), adjust="match_rms_adamw")
    yield case("zero-rows", "MU-4", "", blocks=(*square, (1, 1)))
    yield case("nothing", "MU-4", "", size=0.0, old=0.0)
    yield case("decay", "MU-5", "adam-decay-order", weight_decay=0.25)
    yield case("resumed", "MB-1", eight=True)
    yield case("step-1", "MB-1", eight=True, old=0.0)
    yield case("several-blocks", "MB-2", "tail-block", eight=True, blocks=((16, 16), (2, 2)), seed=3)
    yield case("tall", "MB-1", eight=True, blocks=((4, 8), (2, 4)), tall=True)
    yield case("nothing", "MB-3", "zero-block", eight=True, size=0.0, old=0.0)


def _adafactor() -> Iterator[Case]:
    def case(
        label: str, rules: str, flags: str = "", shape: tuple[int, int] = (6, 5), seed: int = 0, p: float = 1.0, first: bool = False,
        inputs: dict[str, Tensor] | None = None, layout: tuple[str, ...] = (), **k: Any,
    ) -> Case:  # fmt: skip
        states = {"row": _squares(shape[:1], 443 + seed), "column": _squares(shape[1:], 444 + seed)}
        states = {key: x * (not first) for key, x in states.items()}
        given = {"p": _noise(shape, 441 + seed) * p, "g": _noise(shape, 442 + seed), **states, **(inputs or {})}
        numbers = {"step": 1 if first else 16, "lr": 0.0625, "beta2_decay": -0.75, "eps1": 2.0**-23, "eps2": 0.0009765625, "d": 4.0, "weight_decay": 0.0}
        return make(label, "adafactor", given, rules, flags, layout=layout, **{**numbers, **k})

    yield case("step-1", "AF-1", "resume", first=True)
    yield case("resumed", "AF-1", "resume")
    yield case("row", "AF-1", shape=(1, 7))
    yield case("column", "AF-1", shape=(7, 1))
    yield case("larger", "AF-1", shape=(16, 24), quick=False)
    yield case("transposed", "AF-1 G-3", layout=("g",))
    zeros = _noise((6, 5), 445)
    zeros[2], zeros[:, 3] = 0, 0
    yield case("zeros", "AF-1", inputs={"g": zeros})
    yield case("clipped", "AF-2", "update-clip", inputs={"g": _noise((6, 5), 446) * 4}, d=1.0)
    yield case("small-parameter", "AF-3", p=2.0**-16)
    yield case("late", "AF-3", step=400)
    yield case("decay", "AF-4", "scaled-decay", weight_decay=0.25)


def _reflection(size: int, *marked: int) -> Tensor:
    """I - 2 v v^T / |v|^2 with four ones in v, or one: orthogonal, and exact."""
    v = torch.zeros(size)
    v[list(marked)] = 1
    return torch.eye(size) - 2 / len(marked) * torch.outer(v, v)


def _soap() -> Iterator[Case]:
    of_left = _reflection(6, 0, 1, 2, 3) @ _reflection(6, 2, 3, 4, 5) @ _reflection(6, 1)
    of_right = _reflection(5, 0, 1, 3, 4) @ _reflection(5, 0, 1, 2, 3)

    def case(label: str, rules: str, flags: str = "", seed: int = 0, inputs: dict[str, Tensor] | None = None, **k: Any) -> Case:
        sides = [_noise((n, n), 454 + n + seed) for n in (6, 5)]
        given = {
            "p": _noise((6, 5), 451 + seed), "g": _noise((6, 5), 452 + seed), "momentum": _noise((6, 5), 453 + seed) / 2,
            "squares": _squares((6, 5), 454 + seed), "left": sides[0] + sides[0].t(), "right": sides[1] + sides[1].t(),
            "of_left": of_left, "of_right": of_right,
        }  # fmt: skip
        numbers = {"step": 17, "lr": 0.0625, "beta1": 0.875, "beta2": 0.96875, "beta3": 0.9375, "eps": 2.0**-40, "weight_decay": 0.0}
        return make(label, "soap", {**given, **(inputs or {})}, rules, flags, **{**numbers, **k})

    zero = {key: torch.zeros(6, 5) for key in ("momentum", "squares")}
    yield case("step-1", "SO-1", "bias-correction", inputs={**zero, "g": _noise((6, 5), 460) + 1}, step=1)
    yield case("resumed", "SO-1", "resume")
    yield case("square", "SO-1", inputs={key: x for key, x in zip(("p", "g", "momentum"), _noise((3, 5, 5), 461), strict=True)} | {
        "squares": _squares((5, 5), 462), "left": _noise((5, 5), 463), "of_left": of_right.t().contiguous()})  # fmt: skip
    yield case("own-axes", "SO-1", inputs={"of_left": torch.eye(6), "of_right": torch.eye(5)})
    yield case("no-gradient", "SO-2", inputs={"g": torch.zeros(6, 5)})
    yield case("means", "SO-2", seed=30)
    yield case("decay", "SO-3", "adam-decay-order", weight_decay=0.25)


def _corrections() -> Iterator[Case]:
    for dtype, bits in WEIGHTS:
        name, kind = f"{dtype}-{bits}", {"dtype": dtype, "bits": bits}
        shift = 16 if dtype == "bfloat16" else 13
        halves = [j << (shift - 2) for j in range(1, 4)] + [1 << (shift - 9), 3 << (shift - 9)]
        ties = beside([1.0, 1.9921875, -3.0, 0.0078125], [h + i for h in halves for i in (-1, 0, 1)])
        yield make(f"{name}-ties", "split_weight", {"x": ties}, "WS-1", "weight-tie", **kind)
        yield make(f"{name}-noise", "split_weight", {"x": noise(256, 471)}, "WS-1 WS-2", **kind)
        wide = spread(256, 472, -120, 120) if dtype == "bfloat16" else spread(256, 473, -13, 15)
        yield make(f"{name}-wide", "split_weight", {"x": torch.cat((wide, torch.tensor([0.0, -0.0])))}, "WS-2", **kind)
        most = 1 << (shift - 1)
        every = torch.arange(-128, 128).to(torch.int8) if bits == 24 else torch.arange(-most, most, 255).to(torch.int16)
        for label, p in (("one", 1.0), ("minus-two", -2.0), ("zero", 0.0)):
            p_ = torch.full((every.numel(),), p, dtype=getattr(torch, dtype))
            yield make(f"{name}-{label}", "join_weight", {"p": p_, "correction": every}, "WJ-1" if p else "WJ-2")


def _corrected() -> Iterator[Case]:
    def case(label: str, rules: str, flags: str, dtype: str, bits: int, seed: int = 0, inputs: dict[str, Tensor] | None = None, **k: Any) -> Case:
        p, correction = split(noise(100, 481 + seed), getattr(torch, dtype), bits)
        given = {"p": p, "correction": correction, "g": noise(100, 482 + seed).to(p.dtype), "state1": noise(100, 483 + seed) / 2, "state2": _squares((100,), 484 + seed)}
        return make(f"{dtype}-{bits}-{label}", "corrected_step", {**given, **(inputs or {})}, rules, flags, **hyper("adam", **k))

    half = (torch.arange(100) % 2).float()
    for dtype, bits in WEIGHTS:
        yield case("resumed", "WC-1", "", dtype, bits)
        yield case("small-steps", "WC-1", "small-steps", dtype, bits, lr=2.0**-12)
        yield case("decay", "WC-1", "small-steps", dtype, bits, lr=2.0**-12, weight_decay=0.25)
        idle = {"g": (noise(100, 485) * half).to(getattr(torch, dtype)), "state1": noise(100, 486) * half, "state2": _squares((100,), 487) * half}
        yield case("zeros", "WC-2", "zero-state-drift", dtype, bits, inputs=idle)


def _released() -> Iterator[Case]:
    def whole(shape: Sequence[int], seed: int) -> Tensor:
        return (integers(torch.Size(shape).numel(), seed, 4) - 8).float().view(*shape)

    for label, rows, sizes in (("two-layers", 4, (5, 6, 3)), ("one-row", 1, (3, 2, 4)), ("square", 3, (4, 4, 4))):
        n, hidden, out = sizes
        inputs = {"x": whole((rows, n), 491), "weight1": whole((hidden, n), 492), "weight2": whole((out, hidden), 493), "grad": whole((rows, out), 494)}
        yield make(label, "released_step", inputs, "GR-1", "stepped-too-early", lr=0.125)
    inputs = {"x": whole((3, 4), 495), "weight1": whole((4, 4), 496), "grad": whole((3, 4), 497)}
    yield make("tied", "released_step", inputs, "GR-2", "stepped-too-early", lr=0.125)


def version_2_cases() -> Iterator[Case]:
    """Every case that came with version 2."""
    for cases in (_schedule_free, _muon, _adafactor, _soap, _corrections, _corrected, _released):
        yield from cases()
