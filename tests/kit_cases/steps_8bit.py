"""Cases of the optimizers' steps, with state in 8 bits: those of steps.py, and what codes and scales may do wrong.

Codes are those of any rule of rounding but where that is what a case is about.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, Codebook, value_table
from bnbref.conformance.case import CPU, Case
from bnbref.conformance.oracles.codes import encode_8bit
from bnbref.conformance.oracles.formula import CLIPPED, REFERENCE, STATES
from bnbref.conformance.oracles.intervals import Interval
from bnbref.conformance.oracles.steps import BLOCKSIZE, both
from bnbref.conformance.oracles.values import each
from kit_cases.inputs import cast, noise
from kit_cases.oracles import make
from kit_cases.steps import SQUARES, USUAL, average, decay_flag, hyper, results, squares

Coded = dict[str, Tensor]


def _books(unsigned: bool) -> list[Codebook]:
    """The codebooks of values1 and values2. bitsandbytes codes squares with the signed one too, where they are the only state."""
    return [DYNAMIC_UNSIGNED if unsigned else DYNAMIC, DYNAMIC_UNSIGNED]


def _coded(name: str, count: int, seed: int, books: list[Codebook]) -> Coded:
    made: Coded = {}
    for i, square in enumerate(squares(name), 1):
        x = average(count, seed + i, square)
        book = books[1 if i == 2 else 0]
        values = value_table(book, CPU)
        absmax = torch.stack([block.abs().amax() for block in x.split(BLOCKSIZE)])
        made |= {f"state{i}": encode_8bit(x / each(absmax, BLOCKSIZE, count), values), f"absmax{i}": absmax}
        if i < 3:
            made[f"values{i}"] = values
    return made


def _zeros(name: str, count: int, books: list[Codebook]) -> Coded:
    """States before the first step: all zero."""
    made = _coded(name, count, 0, books)
    for i in range(1, STATES[name] + 1):
        made[f"state{i}"] = torch.full_like(made[f"state{i}"], books[1 if i == 2 else 0].code_of_zero)
        made[f"absmax{i}"] = torch.zeros_like(made[f"absmax{i}"])
    return made


def _is_clear(given: Coded, k: dict[str, Any]) -> Tensor:
    """Which elements have new codes far from every threshold, and from zero."""
    coded = []
    for i in range(1, STATES[k["optimizer"]] + 1):
        values = given[f"values{2 if i == 2 else 1}"]
        scale = each(given[f"absmax{i}"], BLOCKSIZE, given["p"].numel())
        coded.append((values, values[given[f"state{i}"].long()] * scale))
    old = [x for _, x in coded]
    made = both(given["p"], given["g"], old, [Interval.point(x) for x in old], k, REFERENCE, eight=True)
    clear = torch.ones_like(made.bad)
    for (values, _), new in zip(coded, made.states, strict=True):
        scaled = torch.cat([block / block.abs().amax() if block.any() else block for block in new.split(BLOCKSIZE)])
        middle = (values[:-1] + values[1:]) / 2
        above = torch.searchsorted(middle, scaled)
        distances = [(middle[i.clamp(0, 254)] - scaled).abs() for i in (above - 1, above)]
        near = torch.minimum(*distances) < 2e-4
        clear &= ~near & ((scaled.abs() > 0.02) | (scaled == 0))
    return clear | made.bad


def _cleared(given: Coded, k: dict[str, Any]) -> Coded:
    """The inputs with what gives a code near a threshold, or near zero, replaced by another element of its block.

    What is left has the same codes by any rule of rounding. Where the largest of a block was replaced, others may not be
    clear any more: it is done until all are.
    """
    moving = ("p", "g", *(f"state{i}" for i in range(1, STATES[k["optimizer"]] + 1)))
    for _ in range(20):
        clear = _is_clear(given, k)
        if bool(clear.all()):
            return given
        source = torch.arange(clear.numel())
        for block in torch.arange(clear.numel()).split(BLOCKSIZE):
            kept = block[clear[block] & given["g"][block].isfinite()]
            if kept.numel() == 0:
                raise ValueError(f"no element of a block of {k} is far from every threshold")
            source[block] = torch.where(clear[block], block, kept[torch.arange(block.numel()) % kept.numel()])
        given = {key: x[source] if key in moving else x for key, x in given.items()}
    raise ValueError(f"the elements of {k} do not get far from every threshold")


def optimizer_8bit(name: str) -> Iterator[Case]:
    """Cases of one optimizer with 8-bit state in blocks of 256."""
    of_decay = "raw-gradient" if name in SQUARES else decay_flag(name)
    signed = _books(unsigned=False)

    def case(
        label: str, rules: str, flags: str = "", count: int = 512, seed: int = 0, dtype: str = "float32",
        inputs: Coded | None = None, clear: bool = True, zero: bool = False, books: list[Codebook] = signed, **changed: Any,
    ) -> Case:  # fmt: skip
        # bitsandbytes' CUDA operator does not know the names lamb and lars.
        options: dict[str, Any] = {"may_refuse": name in CLIPPED}
        options |= {key: changed.pop(key) for key in ("quick",) if key in changed}
        # Squares of numbers from 3/8 to 1, that none is next to nothing beside the largest of its block.
        g = noise(count, 302 + seed)
        g = torch.where(g < 0, -1.0, 1.0) * (0.375 + g.abs() * 0.625)
        g[::7] *= 0.0 if zero else 1.0
        given = {"p": noise(count, 301 + seed), "g": g, **_coded(name, count, 303 + seed, books), **(inputs or {})}
        given |= {key: cast(given[key], dtype) for key in ("p", "g")}
        k = hyper(name, **changed)
        given = _cleared(given, k) if clear else given
        return make(f"{name}-{label}", "optimizer_8bit", given, rules, flags, **options, **k)

    before = _zeros(name, 512, signed)
    for t, seed in ((1, 0), (2, 2), (3, 3)):
        made = case(f"step-{t}", "OB-1 OB-2", "bias-correction", seed=seed, inputs=before, step=t)
        yield made
        before = results(made)
    resumed = case("resumed", "OB-1 OB-2", "resume", zero=True)
    yield resumed
    yield case("usual", "OB-1 OB-2", "", quick=False, **{**USUAL, "weight_decay": 0.0})
    yield case("decay", "OB-3", of_decay, weight_decay=0.25)
    yield case("scaled", "OB-3", "raw-gradient", gnorm_scale=0.5)
    # One half of every block has no gradient and no state; then a step more, in which it still has none.
    idle = _zeros(name, 512, signed)
    half = torch.arange(512) % 2 == 1
    g = torch.where(half, torch.where(noise(512, 331) < 0, -0.5, 0.5), 0.0)
    first = case("zeros", "OB-4", "zero-state-drift", inputs={**idle, "g": g}, step=1, clear=False)
    yield first
    yield case("zeros-step-2", "OB-4", "zero-state-drift", inputs={**results(first), "g": g}, step=2, clear=False)
    nothing = {**_zeros(name, 512, signed), "g": torch.zeros(512)}
    yield case("nothing", "OB-2", "zero-block", inputs=nothing, step=1, clear=False)
    # Gradients over ten decades: the small ones of a block have codes next to that of zero.
    wide = noise(512, 332).sign() * torch.exp2(-(torch.arange(512) % 34).double()).float()
    yield case("wide", "OB-2", "binned-codes", inputs={**_zeros(name, 512, signed), "g": wide}, step=1, clear=False)
    tiny = noise(512, 333).sign() * 2.0**-30 * (1 + noise(512, 334).abs())
    small = {**_zeros(name, 512, signed), "g": tiny}
    yield case("small", "OB-2", "absmax-floor", inputs=small, step=1, eps=2.0**-40)
    for label, value in (("nan", math.nan), ("inf", math.inf)):
        inputs = {key: x.clone() for key, x in resumed.inputs.items()}
        inputs["g"][[5, 300]] = value
        # The largest of their blocks, and larger than before: the new scale is theirs, whatever becomes of the bad element.
        inputs["g"][[9, 310]] = 4.0
        for i in range(1, STATES[name] + 1):
            inputs[f"state{i}"][[9, 310]] = 255
        yield case(label, "OB-6", "bad-gradient", inputs=inputs)
    for count in (1, 255, 256, 257, 344):
        yield case(f"size-{count}", "OB-5", "tail-block", count=count, seed=count % 7, quick=count in (257, 344))
    if name in SQUARES:
        yield case("unsigned", "OB-1 OB-2", "", books=_books(unsigned=True))
    if name == "ademamix":
        yield case("scales", "OB-5", "second-average-scale", count=300, seed=5)
    if name in ("adam", "momentum"):
        for dtype in ("float16", "bfloat16"):
            yield case(dtype, "OB-1", "rounding", dtype=dtype)
    if name in CLIPPED:
        yield case("clipped", "OB-7", "clip-lost", max_unorm=0.0625)
