"""Programs of users around a rule that somebody else has written: whatever they do between steps, the steps are the same."""

import copy
import io
import tempfile

import pytest
import torch
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from test_optim_strangers import Proper, strangers
from torch import nn

from bnbref import optim
from bnbref.optim.state_dict import WRAPPED

pytestmark = pytest.mark.usefixtures("eager")
STEPS = 4
GRADIENTS = [torch.sin(torch.arange(700.0) * (t + 1)) for t in range(STEPS)]


class Loop:
    """A parameter, its optimizer, and a step by the next gradient."""

    def __init__(self, rule, bits, **options):
        self.options = {"optim_bits": bits, "min_8bit_size": 0, **options}
        self.rule, self.p = rule, nn.Parameter(torch.linspace(-1, 1, 700))
        self.optimizer, self.t = None, 0
        self.optimizer = self.another()

    def another(self):
        """A new optimizer with the groups of the one before, if there is one."""
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups] if self.optimizer else [self.p]
        return optim.Optimizer(groups, self.rule, {"lr": 0.25}, **self.options)

    def backward(self):
        self.p.grad = None
        (self.p * GRADIENTS[self.t]).sum().backward()
        self.t += 1

    def step(self):
        self.backward()
        self.optimizer.step()


def plain(loop):
    loop.step()


def copied(loop):
    loop.step()
    loop.optimizer = copy.deepcopy(loop.optimizer)
    [loop.p] = loop.optimizer.param_groups[0]["params"]


def saved(loop):
    loop.step()
    file = io.BytesIO()
    torch.save(loop.optimizer.state_dict(), file)
    file.seek(0)
    loop.optimizer = loop.another()
    loop.optimizer.load_state_dict(torch.load(file, weights_only=True))


def in_safetensors(loop):
    loop.step()
    whole = loop.optimizer.state_dict()
    state = whole["state"][0]
    if WRAPPED in state:  # a rule may have no states
        state = {**state, WRAPPED: load(save(state[WRAPPED]))}
    loop.optimizer = loop.another()
    loop.optimizer.load_state_dict({**whole, "state": {**whole["state"], 0: state}})


def scaled(loop):
    """With a step between that GradScaler skips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    scaler.scale(torch.zeros(1))
    loop.backward()
    gradient = loop.p.grad.clone()
    for factor in (torch.inf, scaler.get_scale()):
        loop.p.grad = gradient * factor
        scaler._scale.fill_(scaler.get_scale() if factor == torch.inf else factor)
        scaler.unscale_(loop.optimizer)
        scaler.step(loop.optimizer)
        scaler.update(2.0**10)


def grouped(loop):
    """Groups are added and parameters frozen."""
    other = nn.Parameter(torch.ones(30))
    loop.optimizer.add_param_group({"params": [other], "lr": 0.5})
    other.grad = torch.ones(30)
    loop.step()
    other.requires_grad_(False)
    other.grad = None


def scheduled(loop):
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda t: torch.tensor(1.0))
    loop.step()
    schedule.step()


def hooked(loop):
    handles = [
        loop.optimizer.register_step_pre_hook(lambda *_: None),
        loop.optimizer.register_step_post_hook(lambda *_: None),
    ]
    loop.step()
    for handle in handles:
        handle.remove()


def compiled(loop):
    torch.compiler.reset()
    loop.backward()
    torch.compile(loop.optimizer.step, backend="eager")()


def released(loop):
    loop.p.grad = None
    release = optim.GradientRelease(loop.optimizer)
    loop.backward()
    loop.optimizer.step()
    release.remove()


PROGRAMS = [copied, saved, in_safetensors, scaled, grouped, scheduled, hooked, compiled, released]


@settings(max_examples=20)
@given(strangers(), st.sampled_from([8, 32]), st.lists(st.sampled_from(PROGRAMS), min_size=STEPS, max_size=STEPS))
def test_whatever_a_program_does_between_steps_they_are_the_same(stranger, bits, programs):
    *program, numbers, _ = stranger
    want, got = (Loop(Proper(*program, numbers), bits) for _ in range(2))
    for each in programs:
        plain(want)
        each(got)
        assert same_bits(got.p, want.p), each.__name__
        ours, theirs = got.optimizer.state[got.p], want.optimizer.state[want.p]
        assert ours.keys() == theirs.keys()
        assert all(
            same_bits(x, theirs[key]) if isinstance(x, torch.Tensor) else x == theirs[key] for key, x in ours.items()
        )


@settings(max_examples=10)
@given(strangers(), st.sampled_from([8, 32]))
def test_steps_that_end_in_files_are_the_same(stranger, bits):
    """Each is made by an optimizer that finds in the files what the one before has left."""
    *program, numbers, _ = stranger
    want = Loop(Proper(*program, numbers), bits)
    with tempfile.TemporaryDirectory() as folder:
        got = Loop(Proper(*program, numbers), bits, page_directory=folder)
        for t in range(STEPS):
            if t > 0:
                got.optimizer = None  # which had the files
                got.optimizer = got.another()
                got.optimizer.load_state_dict({**got.optimizer.state_dict(), "state": optim.read_pages(folder)})
            plain(want)
            plain(got)
    assert same_bits(got.p, want.p)
