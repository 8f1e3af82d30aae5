"""Schedule-Free AdamW: the paper's three sequences, a second implementation's bits, and all that holds of other rules."""

import math

import numpy as np
import pytest
import second
import torch
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optim_paging import FarAway, LateCopies
from torch import nn

import bnbref
from bnbref import optim
from bnbref.optim import master_weights, schedule_free
from bnbref.optim.schedule_free import share

quick = pytest.mark.usefixtures("eager")
F = np.float32
LR, BETAS, EPS, WD, WARMUP = 1e-2, (0.9, 0.99), 1e-8, 0.1, 3
OPTIONS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WD, "warmup_steps": WARMUP}

# 30 steps round y, a number below 8, by half a unit, 2^-22; and as much again for all that is computed with numbers below 1/8.
BOUND = 2 * 30 * 2**-22


def gradient(t, shape=(5000,)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(t))


def trained(steps=6, shape=(5000,), kind=optim.AdamWScheduleFree, dtype=torch.float32, first=0, p=None, **options):
    p = nn.Parameter(gradient(99, shape).to(dtype)) if p is None else p
    optimizer = kind([p], **OPTIONS, **options)
    return p, go_on(p, optimizer, first, steps)


def go_on(p, optimizer, first, last):
    for t in range(first, last):
        p.grad = gradient(t, p.shape).to(p.dtype)
        optimizer.step()
    return optimizer


def tensors(p, optimizer):
    return [p.detach(), *(x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))]


@given(st.integers(1, 40), st.integers(0, 12))
def test_share_is_a_square_over_the_sum_of_squares(t, warmup):
    rates = [min(1.0, i / max(1, warmup)) for i in range(1, t + 1)]
    assert share(t, warmup) == pytest.approx(rates[-1] ** 2 / sum(r * r for r in rates), rel=1e-12)


@quick
def test_it_is_the_papers_three_sequences():
    """z, x and y in float64, as the paper writes them."""
    p, optimizer = trained(30)
    z = x = y = gradient(99).double()
    v, total = torch.zeros_like(z), 0.0
    b1, b2 = BETAS
    for t in range(1, 31):
        g = gradient(t - 1).double()
        v = b2 * v + (1 - b2) * g * g
        r = LR * min(1, t / WARMUP)
        total += r * r
        z = z - r * (g / ((v / (1 - b2**t)).sqrt() + EPS) + WD * y)
        x = x + r * r / total * (z - x)
        y = (1 - b1) * z + b1 * x
    assert (p.detach() - y).abs().max() <= BOUND
    optimizer.eval()
    assert (p.detach() - x).abs().max() <= BOUND
    assert (x - y).abs().max() > 100 * BOUND


@quick
def test_it_is_the_authors_package():
    theirs = pytest.importorskip("schedulefree")
    p, optimizer = trained(30)
    q = nn.Parameter(gradient(99))
    other = theirs.AdamWScheduleFree([q], **OPTIONS, foreach=False)
    other.train()
    go_on(q, other, 0, 30)
    assert (p - q).abs().max() <= BOUND
    optimizer.eval()
    other.eval()
    assert (p - q).abs().max() <= BOUND


def second_step(t, p, g, d, v):
    """The rule in numpy: every product, sum and quotient rounded to float32."""
    b1, b2 = BETAS
    r, c = LR * min(1, t / WARMUP), share(t, WARMUP)
    v = F(b2) * v + F(1 - b2) * (g * g)
    u = g / (np.sqrt(v / F(1 - b2**t)) + F(EPS)) + F(WD) * p
    return p - (F(r * (1 - b1 * (1 - c))) * u - F(b1 * c) * d), F(1 - c) * (d - F(r) * u), v


@quick
@pytest.mark.parametrize(("bits", "nonzero"), [(32, True), (8, True), (8, False)])
def test_a_second_implementation_has_the_same_bits(bits, nonzero):
    p, optimizer = trained(5, optim_bits=bits, nonzero_squares=nonzero)
    own, states = gradient(99).numpy(), [np.zeros(5000, F), np.zeros(5000, F)]
    books = ["dynamic_signed", "dynamic_unsigned"]
    for t in range(1, 6):
        own, *states = second_step(t, own, gradient(t - 1).numpy(), *states)
        if bits == 8:
            states = [coded(x, book, nonzero and i == 1) for i, (x, book) in enumerate(zip(states, books, strict=True))]
    assert same_bits(p.detach(), torch.from_numpy(own))
    if bits == 32:
        assert same_bits(
            [optimizer.state[p][key] for key in ("difference", "squares")], [torch.from_numpy(x) for x in states]
        )


def coded(x, book, nonzero):
    """x after it was 8 bits. nonzero: what is not 0 gets no code of 0, but the next one."""
    out = []
    for start in range(0, len(x), 256):
        part = x[start : start + 256]
        scale = second.absmax(part)
        scaled = second.scaled(part, scale)
        codes = second.encode(book, scaled)
        codes = np.maximum(codes, scaled > 0) if nonzero else codes
        out.append(second.VALUES[book][codes] * scale)
    return np.concatenate(out).astype(F)


def test_compiled_is_eager():
    for shape, options in (((70, 61), {}), ((5000,), {"optim_bits": 8, "master_weight_bits": 24})):
        dtype = torch.bfloat16 if "master_weight_bits" in options else torch.float32
        compiled = trained(3, shape, dtype=dtype, **options)
        compiled[1].eval()
        with bnbref.eager():
            plain = trained(3, shape, dtype=dtype, **options)
            plain[1].eval()
        assert same_bits(tensors(*compiled), tensors(*plain))


@quick
@pytest.mark.parametrize("options", [{}, {"optim_bits": 8}, {"optim_bits": 8, "master_weight_bits": 24}], ids=str)
def test_resumed_is_uninterrupted_in_both_modes(options, tmp_path):
    dtype = torch.bfloat16 if "master_weight_bits" in options else torch.float32
    for evaluated in (False, True):
        p, optimizer = trained(3, dtype=dtype, **options)
        if evaluated:
            optimizer.eval()
        torch.save((p.detach(), optimizer.state_dict()), tmp_path / "saved.pt")
        weight, state = torch.load(tmp_path / "saved.pt", weights_only=True)
        q = nn.Parameter(weight)
        resumed = optim.AdamWScheduleFree([q], **OPTIONS, **options)
        resumed.load_state_dict(state)
        optimizer.train()
        resumed.train()
        go_on(p, optimizer, 3, 6)
        go_on(q, resumed, 3, 6)
        assert same_bits(tensors(p, optimizer), tensors(q, resumed))


@quick
def test_a_directory_and_streamed_pages_are_resident(tmp_path):
    want = trained(3, optim_bits=8)
    away = trained(3, optim_bits=8, page_directory=tmp_path)
    p = nn.Parameter(gradient(99))
    streamed = optim.AdamWScheduleFree8bit([p], **OPTIONS)
    streamed._placement = FarAway(True, copies=LateCopies)
    go_on(p, streamed, 0, 3)
    for optimizer in (want[1], away[1], streamed):
        optimizer.eval()
    assert same_bits(tensors(*away), tensors(*want))
    assert same_bits(tensors(p, streamed), tensors(*want))


@quick
@pytest.mark.parametrize("options", [{}, {"optim_bits": 8}], ids=str)
def test_there_and_back_again_rounds_twice(options):
    """y and x are numbers of at most 8: each of the two sums errs by half a unit, 2^-22; of 8 bits d is the same both times."""
    p, optimizer = trained(5, **options)
    before = p.detach().clone()
    optimizer.train()  # it is in that mode
    assert same_bits(p.detach(), before)
    optimizer.eval()
    average = p.detach().clone()
    optimizer.eval()
    assert same_bits(p.detach(), average)
    assert not same_bits(average, before)
    optimizer.train()
    assert (p.detach() - before).abs().max() <= 2 * 2**-22


@quick
@settings(max_examples=12)
@given(at=st.integers(0, 5), to_train=st.booleans(), pages=st.booleans())
def test_a_switch_that_is_interrupted_is_undone(at, to_train, pages):
    """By an exception at any parameter: all of them are in the mode in which they were, and switch when they are asked again."""
    params = [nn.Parameter(gradient(i, (i + 1, 300))) for i in range(5)]
    optimizer = optim.AdamWScheduleFree8bit(params, **OPTIONS, min_8bit_size=500)
    if pages:
        optimizer._placement = FarAway(True, copies=LateCopies)
    for t in range(3):
        for p in params:
            p.grad = gradient(t, p.shape)
        optimizer.step()
    if to_train:
        optimizer.eval()
    switch = optimizer.train if to_train else optimizer.eval
    before = [p.detach().clone() for p in params]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_free, "set_value", interrupting(at))
        if at < len(params):
            with pytest.raises(KeyboardInterrupt):
                switch()
        else:
            switch()
    if at < len(params):
        assert optimizer.param_groups[0]["train_mode"] is not to_train
        assert all((p.detach() - q).abs().max() <= 2 * 2**-22 for p, q in zip(params, before, strict=True))
        switch()
    assert optimizer.param_groups[0]["train_mode"] is to_train
    (optimizer.eval if to_train else optimizer.train)()
    assert all((p.detach() - q).abs().max() <= 4 * 2**-22 for p, q in zip(params, before, strict=True))


@quick
@pytest.mark.parametrize("where", ["group", "override"])
def test_betas_of_a_group_and_of_one_parameter_are_those_of_its_average(where):
    """What goes from y to x and back is measured with the beta1 with which y was made."""
    p, q = nn.Parameter(gradient(99)), nn.Parameter(gradient(99))
    one = optim.AdamWScheduleFree([p], **{**OPTIONS, "betas": (0.5, 0.99)})
    if where == "override":
        optim.GlobalOptimManager.get_instance().override_config(q, "betas", (0.5, 0.99))
    other = optim.AdamWScheduleFree(
        [{"params": [q], **({"betas": (0.5, 0.99)} if where == "group" else {})}], **OPTIONS
    )
    for x, optimizer in ((p, one), (q, other)):
        go_on(x, optimizer, 0, 4)
        optimizer.eval()
    assert same_bits(tensors(p, one), tensors(q, other))


def interrupting(at):
    """`set_value`, which an exception keeps from writing the `at`-th parameter."""
    calls = iter(range(1000))

    def set_value(*args):
        if next(calls) == at:
            raise KeyboardInterrupt
        master_weights.set_value(*args)

    return set_value


@quick
def test_modes_and_what_is_refused():
    p, optimizer = trained(1)
    optimizer.eval()
    before = p.detach().clone()
    p.grad = gradient(1)
    with pytest.raises(RuntimeError, match="train"):
        optimizer.step()
    assert same_bits(p.detach(), before)
    assert optimizer.state_dict()["param_groups"][0]["train_mode"] is False
    optimizer.train()
    optimizer.step()
    for warmup in (-1, 2.5, "3"):
        with pytest.raises(ValueError, match="warmup_steps"):
            optim.AdamWScheduleFree([p], warmup_steps=warmup)
    # A gradient that is no number leaves the element where it is: z, x and y of it.
    p.grad = torch.full_like(p, math.nan)
    before = [x.clone() for x in tensors(p, optimizer)]
    optimizer.step()
    assert same_bits(tensors(p, optimizer), before)


@quick
def test_8_bits_go_where_32_bits_go():
    """A quadratic with noise: the average of 8-bit differences ends as near to the minimum, within a tenth of the way there."""
    ends = {}
    for bits in (32, 8):
        p = nn.Parameter(gradient(99))
        optimizer = optim.AdamWScheduleFree([p], lr=1e-2, optim_bits=bits)
        for t in range(200):
            p.grad = 0.1 * (p.detach() - 3) + 0.1 * gradient(t)
            optimizer.step()
        optimizer.eval()
        ends[bits] = (p.detach() - 3).abs().mean().item()
    assert ends[32] < 2.5
    assert abs(ends[8] - ends[32]) < 0.1 * (3 - ends[32])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("blocksize", [128, 512])
def test_a_switch_checks_what_a_step_checks(blocksize):
    p = nn.Parameter(torch.linspace(-1, 1, 1024))
    optimizer = optim.AdamWScheduleFree8bit([p], lr=1e-2, min_8bit_size=512, blocksize=256)
    p.grad = torch.ones(1024)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["blocksize"] = blocksize
    with pytest.raises(ValueError, match="blocksize of a parameter must stay what it was"):
        optimizer.eval()
    assert torch.equal(p, before)
    optimizer.param_groups[0]["blocksize"] = 256
    optimizer.eval()
