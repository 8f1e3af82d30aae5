"""Every class, with any of its arguments, saved in any way: what is continued has the bits of what was not interrupted.

The arguments are those of the signatures, and their values are generated: what a class may not have it refuses when it is made.
No eps is 0, as 0 / 0 is NaN: torch's `set_optimizer_state_dict` makes states by a step with gradients of 0.
"""

import copy
import inspect
import io
import pickle
import tempfile

import pytest
import torch
import torch.distributed.checkpoint.state_dict as of_torch
from conftest import same_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_optim_classes import ALL, OF_MATRICES, by_rule, make
from torch import nn

from bnbref import optim

pytestmark = [pytest.mark.usefixtures("eager"), pytest.mark.filterwarnings("ignore:paged state")]
SHAPES = ((30, 20), (30, 20), (700,), (3, 5))
WEIGHTS = st.floats(0, 0.99)
VALUES = {
    "lr": st.floats(0, 0.1), "eps": st.floats(1e-10, 1e-3), "weight_decay": st.floats(0, 0.3),
    "betas": st.tuples(WEIGHTS, WEIGHTS), "alpha": WEIGHTS, "momentum": st.floats(0.01, 0.99),
    "min_8bit_size": st.sampled_from([0, 100, 4096]),
    "max_unorm": st.floats(0, 2), "optim_bits": st.sampled_from([8, 32]), "is_paged": st.booleans(),
    "t_alpha": st.sampled_from([None, 2, 10]), "t_beta3": st.sampled_from([None, 3]), "bias_correction": st.booleans(),
    "nesterov": st.booleans(), "ns_steps": st.integers(1, 6), "adjust_lr_fn": st.sampled_from([None, "match_rms_adamw"]),
    "adamw_eps": st.floats(1e-10, 1e-3), "beta2_decay": st.floats(-1, 0), "d": st.floats(1, 3), "beta1": WEIGHTS,
    "shampoo_beta": WEIGHTS, "frequency": st.integers(1, 4), "warmup_steps": st.integers(0, 5),
}  # fmt: skip
OF_ALL = {
    "blocksize": st.sampled_from([64, 100, 256, 4096, 10_000]), "stochastic_rounding": st.booleans(),
    "master_weight_bits": st.sampled_from([None, 24, 32]), "maximize": st.booleans(), "nonzero_squares": st.booleans(),
    "foreach": st.sampled_from([None, True, False]), "fused": st.sampled_from([None, True]),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES)


def trained(model, optimizer, first, last):
    """Steps, in the second of which one parameter has no gradient."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for i, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if (i, t) == (2, 1) else grad
        optimizer.step()


def generated(name, data):
    """Some arguments of a class, each with a value that its name may have."""
    signature = inspect.signature(getattr(optim, name).__init__).parameters
    known = {**{key: value for key, value in VALUES.items() if key in signature}, **OF_ALL}
    keys = data.draw(st.sets(st.sampled_from(sorted(known)), max_size=5))
    options = {"min_8bit_size": 50, **{key: data.draw(known[key], label=key) for key in sorted(keys)}}
    if "betas" in options and "AdEMAMix" in name:
        options["betas"] += (0.999,)
    return options


@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_is_saved_is_continued(examples):
    settings(max_examples=examples)(is_continued)()


@given(
    st.sampled_from([*ALL, *OF_MATRICES]), st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["file", "pages", "pickle", "deepcopy", "get_optimizer_state_dict"]), st.booleans(),
)  # fmt: skip
def is_continued(name, data, dtype, how, averaged):
    """averaged: whether it is saved while the parameters are averages, if they ever are."""
    options = generated(name, data)

    def made(model, **more):
        more |= {"generator": torch.Generator().manual_seed(0)} if options.get("stochastic_rounding") else {}
        return make(name, by_rule(name, list(model.parameters())), **options, **more)

    model = Model(dtype)
    try:
        optimizer = made(model)
    except (ValueError, NotImplementedError):
        assume(False)
    switches = averaged and "ScheduleFree" in name
    trained(model, optimizer, 0, 2)
    if switches:
        optimizer.eval()
    with tempfile.TemporaryDirectory() as folder:
        if how in ("pickle", "deepcopy"):
            one = model, optimizer
            other, second = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
        else:
            other = copy.deepcopy(model)
            second = made(other, **({"page_directory": folder} if how == "pages" else {}))
            if how == "get_optimizer_state_dict":
                saved = copy.deepcopy(of_torch.get_optimizer_state_dict(model, optimizer))
                of_torch.set_optimizer_state_dict(other, second, saved)
            else:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                second.load_state_dict(torch.load(file, weights_only=True))
            if options.get("stochastic_rounding"):
                second._generator.set_state(optimizer._generator.get_state())
        if switches:
            optimizer.train(), second.train()
        trained(model, optimizer, 2, 4)
        trained(other, second, 2, 4)
        assert same_bits(list(model.parameters()), list(other.parameters()))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert optimizer.state[p].keys() == second.state[q].keys()
            for key, value in optimizer.state[p].items():
                there = second.state[q][key]
                assert same_bits(value, there) if isinstance(value, torch.Tensor) else value == there, key
