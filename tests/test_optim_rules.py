"""The rules: bit for bit against formulas written a second time in numpy, and within a derived bound against torch.optim."""

import math

import numpy as np
import pytest
import second
import torch
from conftest import same_bits
from strategies import RULES
from torch import Tensor, nn

from bnbref import optim
from bnbref.optim import rules
from bnbref.optim.equation import at_step
from bnbref.optim.update import new_state, step

F = np.float32
GROUP = {
    "lr": 3e-2,
    "betas": (0.87, 0.93, 0.995),
    "eps": 1e-3,
    "weight_decay": 0.07,
    "alpha": 3.0,
    "t_alpha": 3,
    "t_beta3": 4,
}
U = 2.0**-24  # one rounding to float32: relative error at most U


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_same_bits_as_the_second_implementation(rule, eager):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=generator)
    state = new_state(rule, p.shape, 32, 256, lambda key, shape, dtype: torch.empty(shape, dtype=dtype))
    want, states = p.numpy().copy(), [np.zeros(1000, F) for _ in rule.states]
    for t in range(1, 7):
        g = torch.randn(1000, generator=generator) * 10 ** torch.linspace(-6, 2, 1000)
        step(*at_step(rule, t, GROUP), p, g, state, blocksize=256)
        want, _, states = second.step(repr(rule), t, GROUP, want, g.numpy(), states)
        assert want.dtype == F
        assert same_bits(p, torch.from_numpy(want))
        assert all(same_bits(state[s.key], torch.from_numpy(x)) for s, x in zip(rule.states, states, strict=True))


@pytest.mark.parametrize(("rule", "most"), [(rules.LARS(), 0.02), (rules.LAMB(), 0.1)], ids=repr)
def test_the_step_is_no_longer_than_a_part_of_the_parameter(rule, most, eager):
    """Norms of one element are exact, so the clipped step is one product more."""
    p, g = torch.tensor([0.75]), torch.tensor([-3.0])
    state = new_state(rule, p.shape, 32, 256, lambda key, shape, dtype: torch.empty(shape, dtype=dtype))
    planned = at_step(rule, 1, {**GROUP, "weight_decay": 0.0})
    step(*planned, p, g, state, blocksize=256, max_norm=most)
    # |step| = lr most |p|, by the ratio, its product with lr, that with u, and the subtraction: some roundings of each.
    assert abs(float(p) - (0.75 + GROUP["lr"] * most * 0.75)) < 8 * U
    zero = torch.zeros(1)
    step(*planned, zero, g, state, blocksize=256, max_norm=most)
    assert float(zero) != 0  # a parameter of zeros is not held at zero


def test_clipping_does_nothing_to_short_steps(eager):
    p, q = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(5000))
    p.grad = q.grad = torch.full((5000,), 1e-3)
    optim.LARS8bit([p], lr=0.1, momentum=0.9, max_unorm=1.0).step()
    optim.SGD8bit([q], lr=0.1, momentum=0.9).step()
    assert same_bits(p.data, q.data)


def adam_bound(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int) -> Tensor:
    """What float32 can lose in one step, beside the same step in float64.

    m is a sum of two products, each of a rounded coefficient: 3 U of the sum of magnitudes. v likewise with g^2: 4 U. The
    denominator is the root of that (2 U), sqrt, 1 / root (2 U) and + eps (1 U): 6 U; the quotient and the product with the
    rounded rate 3 more, so 12 U of the direction taken with magnitudes. decay p: 2 U; the last subtraction: 1 U.
    """
    b1, b2, _ = GROUP["betas"]
    size = (b1 * m.abs() + (1 - b1) * g.abs()) / (((b2 * v + (1 - b2) * g * g) / (1 - b2**t)).sqrt() + GROUP["eps"])
    moved = GROUP["lr"] / (1 - b1**t) * size
    return 1.01 * U * (3 * p.abs() + 13 * moved)


def test_adam_is_torchs(eager):
    torch.manual_seed(1)
    ours, theirs = nn.Parameter(torch.randn(5000)), nn.Parameter(torch.empty(5000, dtype=torch.float64))
    arguments = {
        "lr": GROUP["lr"],
        "betas": GROUP["betas"][:2],
        "eps": GROUP["eps"],
        "weight_decay": GROUP["weight_decay"],
    }
    mine, torchs = optim.AdamW32bit([ours], **arguments), torch.optim.AdamW([theirs], **arguments)
    for t in range(1, 20):
        ours.grad = torch.randn(5000) * 0.1
        state = mine.state[ours]
        m, v = (state.get(key, torch.zeros(5000)).double() for key in ("state1", "state2"))
        theirs.data, theirs.grad = ours.data.double(), ours.grad.double()
        if t > 1:  # each step is compared alone: from the same parameter and state
            torchs.state[theirs].update(exp_avg=m.clone(), exp_avg_sq=v.clone())
        bound = adam_bound(theirs.data, theirs.grad, m, v, t)
        mine.step()
        torchs.step()
        assert bool(((ours.double() - theirs).abs() <= bound).all())


@pytest.mark.parametrize(
    ("mine", "torchs", "key", "other"),
    [
        (optim.SGD32bit, torch.optim.SGD, "momentum_buffer", {"momentum": 0.8}),
        (optim.RMSprop32bit, torch.optim.RMSprop, "square_avg", {"alpha": 0.8, "eps": 1e-2}),
        (optim.Adagrad32bit, torch.optim.Adagrad, "sum", {"eps": 1e-2}),
    ],
)
def test_the_coupled_rules_are_torchs(mine, torchs, key, other, eager):
    torch.manual_seed(2)
    a, b = nn.Parameter(torch.randn(5000)), nn.Parameter(torch.empty(5000, dtype=torch.float64))
    arguments = {"lr": 0.03, "weight_decay": 0.1, **other}
    ours, theirs = mine([a], **arguments), torchs([b], **arguments)
    for t in range(1, 10):
        a.grad = torch.randn(5000) * 0.1
        b.data, b.grad = a.data.double(), a.grad.double()
        if t > 1:
            theirs.state[b][key] = ours.state[a]["state1"].double()
        before = b.data.clone()
        decayed = b.grad.abs() + 0.1 * before.abs()
        ours.step()
        theirs.step()
        # g + wd p loses 3 U of the sum of magnitudes S. SGD: m 2 U of |b1 m| and 5 U of S together with its own rounding.
        # The others divide by a root: the error of v, 2 (3 U S) |g| and 4 roundings, reaches the quotient g / (sqrt(v) + eps)
        # as that of g (3 U S / eps at most), of v (as much), and 8 roundings of a quotient below 1 / sqrt(1 - alpha) < 3.
        state = theirs.state[b][key].abs()
        lost = 6 * (state + decayed) if mine is optim.SGD32bit else 8 * decayed / (state.sqrt() + 1e-2) + 24
        assert bool(
            ((a.double() - b).abs() <= 1.01 * U * (before.abs() + 0.03 * (lost + 3 * state.clamp(max=3)))).all()
        )


def test_schedules_of_ademamix():
    numbers = [rules.AdEMAMix().coefficients(t, GROUP) for t in (1, 2, 3, 4, 100)]
    assert [n["alpha"] for n in numbers] == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert numbers[0]["b3"] < numbers[1]["b3"] < numbers[2]["b3"] < 0.995
    assert numbers[3]["b3"] == pytest.approx(0.995, abs=1e-15)
    assert numbers[4]["b3"] == 0.995
    # The half-life grows linearly from that of b1 to that of b3 (2409.03137, appendix A.1): 1 / ln b3(t) does.
    at = [1 / math.log(n["b3"]) for n in numbers[:4]]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1]) == pytest.approx(at[3] - at[2])
