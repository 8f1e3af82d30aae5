"""Averages of squares in 8 bits: by default the smallest round to 0 where bitsandbytes' do; `nonzero_squares` keeps them."""

import copy

import pytest
import torch
from conftest import running, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optim_classes import ALL, NAMES, OF_MATRICES, make
from torch import nn

import bnbref
from bnbref import optim
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED

FAMILIES = ["Adam8bit", "AdamW8bit", "LAMB8bit", "AdEMAMix8bit", "AdamWScheduleFree8bit", "Muon8bit", "SOAP8bit"]
LR = 2.0**-10


def made(name, p, **options):
    group = {"params": [p]} | ({"rule": "adamw"} if name in ("Muon8bit", "SOAP8bit") else {})
    settings = {"lr": LR, "weight_decay": 0.0, "min_8bit_size": 1, "nonzero_squares": True, **options}
    return getattr(optim, name)([group], **settings)


def of_nothing(optimizer, p):
    """How many elements have a momentum and squares of 0."""
    state = optimizer.state[p]
    momenta = [
        state[s.key] != DYNAMIC.code_of_zero for s in optimizer._rules.of(optimizer.param_groups[0]).states if s.signed
    ]
    squares = state["squares" if "squares" in state else "state2"] == DYNAMIC_UNSIGNED.code_of_zero
    return int((torch.stack(momenta).any(0) & squares).sum())


# Gradients whose squares, and a thousandth of them, are normal float32 and more than 2^-149 of each other: else what is divided
# by the largest of a block is 0 before it has a code. Rows of them that come at some steps alone, as those of tokens do.
gradient = st.floats(2.0**-30, 2.0**30, width=32) | st.just(0.0)
tokens = st.lists(st.tuples(gradient, st.sets(st.integers(0, 5))), min_size=2, max_size=12)


@pytest.mark.usefixtures("eager")
@settings(max_examples=60)
@given(st.sampled_from(FAMILIES), tokens, st.sampled_from([0.5, 0.9, 0.999]))
def test_no_momentum_stands_over_squares_of_0(name, rows, b2):
    p = nn.Parameter(torch.zeros(len(rows), 8))
    betas = (0.9, b2, 0.99) if "Mix" in name else (0.9, b2)
    optimizer = made(name, p, betas=betas)
    for t in range(6):
        sizes = torch.tensor([size * (t in steps) for size, steps in rows])
        p.grad = sizes[:, None] * torch.tensor([1, -1, 0.5, 2, 0, 1, 1, -3.0])
        optimizer.step()
        assert of_nothing(optimizer, p) == 0


def rare_and_frequent(name, steps=30, **options):
    """The longest step, in learning rates, of an element with a gradient of 2^-12 once, where its block has 1 at every step."""
    p = nn.Parameter(torch.zeros(256))
    optimizer = made(name, p, **options)
    longest = 0.0
    for t in range(steps):
        p.grad = torch.ones(256)
        p.grad[0] = 2.0**-12 if t == 0 else 0.0
        before = p[0].item()
        optimizer.step()
        longest = max(longest, abs(p[0].item() - before) / LR)
    return longest


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit", "AdEMAMix8bit"])
def test_a_rare_gradient_makes_no_step_of_a_thousand_learning_rates(name):
    unclipped = {"max_unorm": 0.0} if name == "LAMB8bit" else {}
    in_32_bits = rare_and_frequent(name, min_8bit_size=10_000, **unclipped)
    assert rare_and_frequent(name, nonzero_squares=False, **unclipped) > 1000
    assert rare_and_frequent(name, **unclipped) <= 2 * in_32_bits < 10


@pytest.mark.parametrize("name", [*ALL, *OF_MATRICES])
def test_it_is_the_default_where_bitsandbytes_has_no_such_class(name):
    rules = make(name, [nn.Parameter(torch.ones(4, 4))])._rules.rules.values()
    kept = {rule.codebooks[1] == DYNAMIC_UNSIGNED.nonzero() for rule in rules}
    assert kept == {name not in NAMES and any(x in name for x in ("ScheduleFree", "Muon", "SOAP"))}


def trained(p, optimizer, steps=4):
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        p.grad = torch.randn(p.shape, generator=generator) * 10 ** torch.linspace(-9, 9, p.numel()).view(p.shape)
        optimizer.step()
    return [p.detach(), *(x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))]


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWScheduleFree8bit"])
def test_eager_is_compiled(name):
    def both():
        p = nn.Parameter(torch.ones(700))
        return trained(p, made(name, p))

    compiled = both()
    with running("eager"):
        assert same_bits(both(), compiled)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("one", "other"), [(True, False), (False, True)])
def test_files_are_the_same(one, other):
    """What is saved with or without it goes on without or with it, code for code."""
    p, q = nn.Parameter(torch.ones(700)), nn.Parameter(torch.ones(700))
    saving, loading = made("AdamW8bit", p, nonzero_squares=one), made("AdamW8bit", q, nonzero_squares=other)
    trained(p, saving)
    loading.load_state_dict(saving.state_dict())
    assert same_bits(
        [saving.state[p][k] for k in ("state2", "absmax2")], [loading.state[q][k] for k in ("state2", "absmax2")]
    )
    wrapped = [o.state_dict()["state"][0]["__bnb_optimizer_quant_state__"]["qmap2"] for o in (saving, loading)]
    assert same_bits(*wrapped)


def test_zeros_stay_zeros():
    with bnbref.eager():
        p = nn.Parameter(torch.ones(600))
        optimizer = made("AdamW8bit", p)
        for _ in range(3):
            p.grad = torch.ones(600)
            p.grad[::2] = 0.0
            optimizer.step()
    assert (p[::2] == 1).all()
    assert (optimizer.state[p]["state2"][::2] == 0).all()


@pytest.mark.parametrize("name", ["Lion8bit", "SGD8bit", "LARS8bit", "Adafactor8bit"])
def test_there_must_be_squares(name):
    p = nn.Parameter(torch.ones(4, 4))
    needed = {"lr": LR, "momentum": 0.9} if name in ("SGD8bit", "LARS8bit") else {}
    with pytest.raises(ValueError, match=f"nonzero_squares must be False: {name} keeps no squares by element"):
        getattr(optim, name)([p], nonzero_squares=True, **needed)


def test_it_is_no_setting_of_a_group():
    """Nor is what older versions of bitsandbytes took, unless it says what always holds."""
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    for name, value in (
        ("nonzero_squares", True),
        ("percentile_clipping", 5),
        ("percentile_clipping", 0),
        ("block_wise", "no"),
        ("block_wise", False),
    ):
        with pytest.raises(ValueError, match=f"{name} is no setting of a group"):
            optim.AdamW8bit([{"params": [p], name: value}])
    optim.AdamW8bit([{"params": [p], "percentile_clipping": 100, "block_wise": True}])
    for kind, name, holds in ((optim.SOAP8bit, "nonzero_squares", True), (optim.PagedAdam8bit, "is_paged", True)):
        copy.deepcopy(kind([{"params": [p], name: holds}])).add_param_group({"params": [q], name: holds})
        with pytest.raises(ValueError, match=f"{name} is no setting of a group or of a parameter, got False"):
            kind([{"params": [p], name: False}])
