"""What 8-bit state promises: zeros stay zero, signs are kept, what is not finite changes nothing; and stochastic rounding."""

import numpy as np
import pytest
import second
import torch
from conftest import running, same_bits
from strategies import RULES
from torch import nn

from bnbref import functional, optim
from bnbref.codebooks import linear
from bnbref.kernels import REGISTRY
from bnbref.optim import rules, update
from bnbref.optim.equation import at_step
from bnbref.optim.rules import absmax_key
from bnbref.optim.state_dict import WRAPPED
from bnbref.optim.update import new_state, step

EIGHT = [optim.SGD8bit, optim.LARS8bit, optim.Adam8bit, optim.LAMB8bit, optim.Lion8bit, optim.RMSprop8bit,
         optim.Adagrad8bit, optim.AdEMAMix8bit]  # fmt: skip
NEEDED = {optim.SGD8bit: {"lr": 1e-2, "momentum": 0.9}, optim.LARS8bit: {"lr": 1e-2, "momentum": 0.9}}


def memory(key, shape, dtype):
    return torch.empty(shape, dtype=dtype)


def planned(rule, t=1, **changes):
    group = {
        "lr": 1e-2,
        "betas": (0.9, 0.99, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.0,
        "alpha": 2.0,
        "t_alpha": None,
        "t_beta3": None,
    }
    return at_step(rule, t, {**group, **changes})


@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.Lion8bit], ids=lambda c: c.__name__)
def test_a_thousand_steps_with_zero_gradients_drift_by_nothing(kind):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(2 * 4096 + 100))
    zero = torch.rand(p.shape) < 0.25
    before = p.detach().clone()
    optimizer = kind([p], lr=1e-3, weight_decay=0.0)
    for _ in range(1000):
        p.grad = torch.randn(p.shape).masked_fill(zero, 0.0)
        optimizer.step()
    assert same_bits(p.detach()[zero], before[zero])
    assert float((p.detach()[~zero] != before[~zero]).float().mean()) > 0.9


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_signs_are_kept(rule, eager):
    torch.manual_seed(0)
    p = torch.randn(5000)
    state = new_state(rule, p.shape, 8, 256, memory)
    exact = new_state(rule, p.shape, 32, 256, memory)
    for t in range(1, 4):
        g = torch.randn(5000) * 10 ** torch.linspace(-9, 0, 5000)
        q = p.clone()
        for s in rule.states:  # from the decoded state, the step in 32 bits
            exact[s.key].copy_(decoded(state, s))
        step(*planned(rule, t), q, g, exact, blocksize=256)
        step(*planned(rule, t), p, g, state, blocksize=256)
        assert same_bits(p, q)
        for s in rule.states:
            now = decoded(state, s)
            assert bool((now.sign() * exact[s.key].sign() >= 0).all())
            assert not bool(now[exact[s.key] == 0].any())


def decoded(state, s):
    values = torch.tensor(RULES[0].codebook(s).values)
    return functional.dequantize_blockwise(state[s.key], absmax=state[absmax_key(s.key)], code=values, blocksize=256)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**64])
def test_what_is_not_finite_changes_nothing(bits, bad, eager):
    for rule in RULES:
        torch.manual_seed(0)
        p = torch.randn(1000)
        state = new_state(rule, p.shape, bits, 256, memory)
        step(*planned(rule), p, -torch.rand(1000), state, blocksize=256)
        before, kept = p.clone(), {key: x.clone() for key, x in state.items()}
        g = torch.full((1000,), bad)
        step(*planned(rule, 2, weight_decay=0.1), p, g, state, blocksize=256)
        assert same_bits(p, before)
        assert all(same_bits(state[key], x) for key, x in kept.items())
        g[::2] = 1e-3  # half of them: the others move, and the state of these is coded anew only if absmax grows
        step(*planned(rule, 2), p, g, state, blocksize=256)
        assert same_bits(p[1::2], before[1::2])
        assert bool((p[::2] != before[::2]).all())


def test_state_is_the_second_implementations(eager):
    """Lion's state through the slow quantizer of tests/second.py."""
    rule = rules.Lion()
    rng = np.random.default_rng(0)
    p, m = torch.zeros(600), np.zeros(600, np.float32)
    state = new_state(rule, p.shape, 8, 100, memory)
    for t in range(1, 4):
        g = (rng.standard_normal(600) * 10.0 ** rng.uniform(-6, 3, 600)).astype(np.float32)
        step(*planned(rule, t), p, torch.from_numpy(g), state, blocksize=100)
        exact = np.float32(0.99) * m + np.float32(1 - 0.99) * g
        codes, scales = second.quantize("dynamic_signed", exact, 100)
        m = second.dequantize(second.VALUES["dynamic_signed"], codes.tolist(), scales, 100, torch.float32).numpy()
        assert state["state1"].tolist() == codes.tolist()
        assert state["absmax1"].tolist() == scales.tolist()


@pytest.mark.parametrize("kind", EIGHT, ids=lambda c: c.__name__)
def test_any_shape_and_layout(kind, eager):
    """Whole blocks and tail, contiguous or not, give what the flat tensor gives."""
    torch.manual_seed(0)
    values, grads = torch.randn(70, 61), torch.randn(3, 70, 61)
    flat = nn.Parameter(values.flatten().clone())
    transposed = nn.Parameter(values.t().contiguous().t())
    assert not transposed.is_contiguous()
    one = kind([flat], min_8bit_size=1, **NEEDED.get(kind, {}))
    other = kind([transposed], min_8bit_size=1, **NEEDED.get(kind, {}))
    for g in grads:
        flat.grad, transposed.grad = g.flatten(), g.clone()
        one.step()
        other.step()
    assert same_bits(flat.data.view(70, 61), transposed.data.contiguous())


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "LAMB8bit", "Muon8bit", "Adafactor", "AdamWScheduleFree8bit"])
def test_a_parameter_may_be_a_negative_view(name, eager):
    """As the imaginary part of a conjugate is: its memory holds the numbers with the other sign."""
    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    p, q = nn.Parameter(torch._neg_view(x.clone())), nn.Parameter(-x)
    for each in (p, q):
        optimizer = getattr(optim, name)([each], min_8bit_size=1, master_weight_bits=24)
        for _ in range(2):
            each.grad = torch.ones_like(q)
            optimizer.step()
        if name.startswith("AdamWSchedule"):
            optimizer.eval()
    assert p.is_neg()
    assert same_bits(p.detach().resolve_neg(), q.detach())


@pytest.mark.parametrize("numel", [0, 1, 2, 255, 256, 257, 511, 512, 513])
def test_any_size(numel):
    results = []
    for mode in ("eager", "compiled"):
        with running(mode):
            p = nn.Parameter(torch.linspace(-1, 1, numel))
            optimizer = optim.AdamW8bit([p], min_8bit_size=0)
            for _ in range(2):
                p.grad = torch.linspace(1, -3, numel)
                optimizer.step()
            results.append([p.data, *(x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))])
    assert same_bits(*results)


def test_small_parameters_make_their_steps_in_one_call(eager, monkeypatch):
    """As on a GPU. Not what has coefficients of its own, and a parameter that is alone is not copied."""
    monkeypatch.setitem(update._JOINED, "cpu", 1024)
    seen = []
    monkeypatch.setattr(update, "_run", lambda part, *_: seen.append((len(part.p), part.p.data_ptr())))
    sizes = (512, 300, 1024, 1025, 700)
    for kind, rows in ((optim.AdamW8bit, [4, 2 + 2 + 4 + 3 + 1]), (optim.LAMB8bit, [2, 4, 4, 2, 2, 2, 2])):
        params = [nn.Parameter(torch.ones(n)) for n in sizes]
        optimizer = kind(params, min_8bit_size=1)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert [n for n, _ in seen] == rows
        seen.clear()
    alone = nn.Parameter(torch.ones(512))
    alone.grad = torch.ones(512)
    optimizer = optim.AdamW8bit([alone], min_8bit_size=1)
    optimizer.step()
    assert seen == [(2, alone.data_ptr())]
    tails = update.Tails()
    step(*planned(rules.Adam(), 2), alone.data, alone.grad, optimizer.state[alone], blocksize=256, tails=tails)
    tails.run_own()
    tails.run_own()  # what has made its step does not wait any more
    assert len(seen) == 2


def test_schedules_compile_nothing():
    p = nn.Parameter(torch.randn(8192))
    optimizer = optim.AdEMAMix8bit([p], t_alpha=10, t_beta3=10)
    for t in range(5):
        for group in optimizer.param_groups:
            group.update(lr=1e-3 / (t + 1), betas=(0.9, 0.99 + t * 1e-3, 0.9999), weight_decay=t * 0.1)
        p.grad = torch.randn(8192)
        optimizer.step()
        if t == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            variants = sum(len(kernel.variants) for kernel in REGISTRY.values())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert sum(len(kernel.variants) for kernel in REGISTRY.values()) == variants


def test_a_step_inside_somebody_elses_compile():
    """Their graph breaks where the host computes, and the bits are the same."""
    results = []
    for wrap in (lambda f: f, torch.compile):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(8192))
        optimizer = optim.Lion8bit([p], lr=1e-2)
        run = wrap(lambda optimizer=optimizer: optimizer.step())
        for _ in range(3):
            p.grad = torch.randn(8192)
            run()
        results.append(p.detach())
    assert same_bits(*results)


def test_stochastic_rounding(eager):
    """A step of a thousandth of an ulp: to nearest it is lost, at random it is taken by one element in a thousand."""

    def run(**options):
        p = nn.Parameter(torch.ones(2**20, dtype=torch.bfloat16))
        optimizer = optim.Lion32bit([p], lr=2.0**-8 * 2.0**-10, **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p.data

    assert bool((run() == 1).all())
    p = run(stochastic_rounding=True, generator=torch.Generator().manual_seed(0))
    assert set(p.unique().tolist()) == {1 - 2.0**-8, 1.0}
    moved = int((p < 1).sum())
    assert abs(moved - 2**10) < 6 * 2**5  # binomial: mean 2^10, deviation 2^5
    assert same_bits(p, run(stochastic_rounding=True, generator=torch.Generator().manual_seed(0)))


def test_bytes_of_state(eager):
    p = nn.Parameter(torch.randn(2**20))
    p.grad = torch.randn(2**20)
    for kind, want in ((optim.AdamW8bit, 2 + 2 * 4 / 256), (optim.AdamW32bit, 8.0), (optim.Lion8bit, 1 + 4 / 256)):
        optimizer = kind([p])
        optimizer.step()
        got = sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))
        assert got / p.numel() == want


class LinearAdam(rules.Adam):
    codebooks = (linear(), linear(signed=False))


def test_codebooks_are_the_rules_choice(mode):
    """Equal steps, for a comparison: a gradient of a thousandth of its block's largest leaves no state."""
    with running(mode):
        p = nn.Parameter(torch.ones(5000))
        p.grad = torch.full((5000,), 1e-3).index_fill(0, torch.arange(0, 5000, 256), 1.0)
        group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
        optimizer = optim.Optimizer([p], LinearAdam(), group, optim_bits=8)
        optimizer.step()
        assert optimizer.state[p]["state2"].unique().tolist() == [0, 255]
        assert same_bits(optimizer.state_dict()["state"][0][WRAPPED]["qmap2"], torch.linspace(0, 1, 256))


def test_last_blocks_are_stepped_together(mode):
    """Incomplete blocks of many parameters are rows of one call, with the bits that each has alone."""
    sizes = [1, 255, 256, 257, 511, 512, 513, 700, 5000, 1, 2**10 + 3] + [300] * 5
    with running(mode):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(size)) for size in sizes]
        alone = [nn.Parameter(p.detach().clone()) for p in params]
        optimizers = [optim.AdamW8bit([p], min_8bit_size=0) for p in alone]
        together = optim.AdamW8bit(params, min_8bit_size=0)
        for _ in range(2):
            for p, q in zip(params, alone, strict=True):
                p.grad = torch.randn(p.shape)
                q.grad = p.grad.clone()
            together.step()
            for optimizer in optimizers:
                optimizer.step()
        assert same_bits([p.data for p in params], [q.data for q in alone])
        for p, q, optimizer in zip(params, alone, optimizers, strict=True):
            ours, theirs = together.state[p], optimizer.state[q]
            assert all(same_bits(x, theirs[key]) for key, x in ours.items() if key != "step")
