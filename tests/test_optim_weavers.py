"""Rules with steps of the whole matrix that somebody else might write: wherever their states are, they compute the same."""

import copy
import pickle
import tempfile
from unittest import mock

import backend
import pytest
import torch
from conftest import difference, running, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optim_paging import FarAway, LateCopies
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from bnbref import optim
from bnbref.optim.rules import Rule, State
from bnbref.optim.state_dict import WRAPPED

# ---- generated rules ------------------------------------------------------------------------------------------------

# Of a stack of matrices each is treated alone, and no sum is rounded: the bits do not depend on how many there are.
WHOLES = {
    "flip": lambda x, y: x.flip(-2),
    "roll": lambda x, y: x.roll(1, -1),
    "most": lambda x, y: x.abs().amax(-1, keepdim=True).expand(x.shape),
    "where": lambda x, y: torch.where(x.flip(-1) > y, x, y.flip(-2)),
    "sorted": lambda x, y: x.sort(-1).values,
    "in float64": lambda x, y: x.double() / 3,
    "in bfloat16": lambda x, y: (x + y).bfloat16(),
    "in another layout": lambda x, y: x.mT.contiguous().mT,
    "what it was given": lambda x, y: y,
}
ELEMENTS = {
    "+": lambda x, y: x + y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / (y.abs() + 1.0),
    "negative": lambda x, y: -x,
    "max": lambda x, y: torch.where(x > y, x, y),
    "sign": lambda x, y: 0.5 * x.sign(),
    "root": lambda x, y: Rule.sqrt(x.abs()),
}
# What is made of a state of the whole matrix, and what becomes of it.
USES = {
    "rows": lambda x, s: x + s[..., None],
    "columns": lambda x, s: x + s[..., None, :],
    "rows x rows": lambda x, s: x + s.amax(-1)[..., None],
    "columns x columns": lambda x, s: x + s.amax(-2)[..., None, :],
}
NEWS = {
    "rows": lambda x, s: 0.5 * s + x.amax(-1),
    "columns": lambda x, s: 0.5 * s + x.amax(-2),
    "rows x rows": lambda x, s: 0.5 * s + x.amax(-1)[..., None] * x.amin(-1)[..., None, :],
    "columns x columns": lambda x, s: 0.5 * s + x.amax(-2)[..., None] * x.amin(-2)[..., None, :],
}


class Weaver(Rule):
    """A random program over parameter, gradient, states of any kind, and coefficients of any name and type."""

    def __init__(self, states, lines, results, numbers):
        self.states, self._lines, self._results, self._numbers = states, lines, results, numbers

    def coefficients(self, t, group):
        return {"rate": group["lr"], "decay": 0.5, "t": 1 / t, **self._numbers}

    def direction(self, p, g, *given_and_c):
        *given, c = given_and_c
        kept = list(zip(self.states, given, strict=True))
        values = [*(x for s, x in kept if s.of == "elements"), p, g]
        of_matrices = [(s.of, x) for s, x in kept if s.of != "elements"]
        for name, i, j in self._lines:
            x, y = values[i % len(values)], values[j % len(values)]
            if name in ELEMENTS:
                values.append(c.t * ELEMENTS[name](x, y))
            elif name in WHOLES:
                values.append(self.whole(WHOLES[name], x, y))
            elif name == "split":
                values += self.whole(lambda x, y: [y, x.flip(-1)], x, y, results=2)
            elif of_matrices:
                kind, state = of_matrices[i % len(of_matrices)]
                values.append(self.whole(USES[kind], y, state))
            values += [values[-1] * getattr(c, number) for number in self._numbers]
        # A state is finite, however wild the lines before it are.
        chosen = [0 * p + values[-1 - i % len(values)] for i in self._results]
        direction, *new = [chosen[0], *(torch.where(x == x, x, 0.0).clamp(-100, 100) for x in chosen[1:])]
        for i, (s, x) in enumerate(kept):
            new[i] = self.whole(NEWS[s.of], new[i], x) if s.of != "elements" else new[i] if s.signed else new[i].abs()
        return (direction, *new)


@st.composite
def weavers(draw):
    # Names that programs and files have for something else, too.
    keys = st.sampled_from(["state1", "momentum", "absmax", "row", "g", "direction", "é", "step_", "s0", "w0", "x"])
    of = st.sampled_from(["elements", "elements", *USES])
    kinds = draw(st.dictionaries(keys, st.tuples(st.booleans(), of), max_size=5))
    states = tuple(State(key, signed or kind != "elements", kind) for key, (signed, kind) in kinds.items())
    name = st.sampled_from([*ELEMENTS, *WHOLES, "split", "use"])
    lines = draw(st.lists(st.tuples(name, st.integers(0, 9), st.integers(0, 9)), max_size=8))
    results = draw(st.lists(st.integers(0, 5), min_size=1 + len(states), max_size=1 + len(states)))
    odd = st.sampled_from(
        ["beta", "Ω", "a1", "w0", "g", "c", "p", "s0", "where", "sqrt", "direction", "full_like", "x_"]
    )
    number = st.sampled_from([True, 0, -1, 0.25, torch.tensor(0.5), torch.tensor([2]), 1e-30])
    return Weaver(states, lines, results, draw(st.dictionaries(odd, number, max_size=3)))


# ---- wherever their states are ----------------------------------------------------------------------------------------

SHAPES = ((20, 30), (20, 30), (700,), (3, 11), (1, 500), (5, 4, 30), (7, 90))


def trained(rule, bits, placement=None, mesh=None, device=None, **options):
    """Parameters and saved states after some steps, with a gradient that is not finite among them."""
    torch.manual_seed(0)
    place = (lambda x: x.to(device)) if mesh is None else lambda x: distribute_tensor(x, mesh, [Shard(0)])
    params = [nn.Parameter(place(torch.randn(shape))) for shape in SHAPES]
    optimizer = optim.Optimizer(
        params, copy.deepcopy(rule), {"lr": 0.25}, optim_bits=bits, min_8bit_size=100, **options
    )
    optimizer._placement = placement or optimizer._placement
    for t in range(3):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(10 * t + i)
            grad = torch.randn(SHAPES[i], generator=generator) * 10 ** torch.linspace(-4, 4, SHAPES[i][-1])
            if (i, t) == (0, 1):
                grad[3, 4] = torch.nan
            p.grad = place(grad)
        optimizer.step()
    saved = [state.get(WRAPPED, {}) for _, state in sorted(optimizer.state_dict()["state"].items())]
    whole = [p.detach() if mesh is None else p.full_tensor().detach() for p in params]
    return [x.cpu() for x in (*whole, *(state[key] for state in saved for key in sorted(state)))]


@settings(max_examples=8)
@given(weavers(), st.sampled_from([8, 32]))
def test_paged_and_on_disk_is_resident(rule, bits):
    with running("eager"), tempfile.TemporaryDirectory() as folder, mock.patch.object(FarAway, "_is_away", _from_ten):
        want = trained(rule, bits)
        paged = trained(rule, bits, FarAway(True, page_bytes=1, copies=LateCopies))
        assert same_bits(paged, want), difference(paged, want)
        on_disk = trained(rule, bits, page_directory=folder)
        assert same_bits(on_disk, want), difference(on_disk, want)


def _from_ten(self, x, device):
    return x.numel() >= 10


@pytest.mark.slow
@settings(max_examples=20)
@given(weavers(), st.sampled_from([8, 32]))
def test_a_weaver_has_the_same_bits_compiled(rule, bits):
    compiled = trained(rule, bits)
    with running("eager"):
        eager = trained(rule, bits)
    assert same_bits(compiled, eager), difference(compiled, eager)


def on_ranks(rank, ranks, path):
    """Each rule on all ranks, and on one alone: what differs is said by its number."""
    device, mesh = backend.device(rank), backend.mesh(ranks)
    with open(path, "rb") as file:
        rules = pickle.load(file)
    for i, (rule, bits) in enumerate(rules):
        sharded = trained(rule, bits, mesh=mesh)
        alone = trained(rule, bits, device=device)
        assert same_bits(sharded, alone), (i, rule.states, rule._lines, difference(sharded, alone))


@pytest.mark.gpus
def test_sharded_is_unsharded(tmp_path):
    rules = []

    @settings(max_examples=15, database=None)
    @given(weavers(), st.sampled_from([8, 32]))
    def draw(rule, bits):
        rules.append((rule, bits))

    draw()
    path = tmp_path / "rules"
    path.write_bytes(pickle.dumps(rules))
    backend.spawn(on_ranks, backend.RANKS, tmp_path, str(path))
