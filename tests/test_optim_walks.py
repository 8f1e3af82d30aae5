"""Whatever a user does to an optimizer between two steps, parameters and states have the bits of one that only steps. Rules
that users write are among them.

hypothesis walks: each step is something that loops and libraries do (save and load, copy, move, add a group, change the
learning rate, give gradients in another layout). Beside the optimizer goes a twin, to which only that is done which changes
results: the same gradients and settings. After each step the two are compared bit for bit.
"""

import contextlib
import copy
import io
import pickle
import tempfile
from unittest import mock

import pytest
import torch
from conftest import same_bits
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_optim_classes import make
from test_optim_strangers import Proper, strangers
from test_optim_weavers import weavers
from torch import nn

from bnbref import optim
from bnbref.optim import update

FAMILIES = [
    "SGD8bit",
    "AdamW",
    "AdamW8bit",
    "Lion8bit",
    "LAMB8bit",
    "LARS8bit",
    "RMSprop8bit",
    "Adagrad8bit",
    "AdEMAMix8bit",
]
FAMILIES += ["Muon8bit", "Adafactor8bit", "SOAP", "AdamWScheduleFree8bit", "PagedAdamW8bit"]
WITH_SQUARES = [family for family in FAMILIES if not any(x in family for x in ("SGD", "Lion", "LARS", "Adafactor"))]
OF_STRANGERS = strangers().map(lambda one: Proper(*one[:4], "field", one[-1])) | weavers()
SHAPES = [(70, 60), (64, 64), (9, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "plain": lambda g: g,
    "transposed": lambda g: g.mT.contiguous().mT,
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "negative": lambda g: torch._neg_view(-g),
    "offset": lambda g: torch.cat([g.new_zeros(3), g.reshape(-1)])[3:].view(g.shape),
}


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "nothing": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "no_grad": torch.no_grad,
}
"""What a program may have around whatever it calls; none of it is about an optimizer."""


def of_file(value):
    """A value as `torch.load(weights_only=True)` reads it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Walk(RuleBasedStateMachine):
    """`ours` walks, `twin` steps; each is a list of parameters and their optimizer."""

    @initialize(
        family=st.sampled_from(FAMILIES) | OF_STRANGERS,
        dtype=st.sampled_from(DTYPES),
        bits=st.sampled_from([None, 24, 32]),
        maximize=st.booleans(),
        nonzero=st.booleans(),
    )
    def begin(self, family, dtype, bits, maximize, nonzero):
        self.rule = None if isinstance(family, str) else family
        self.family, self.dtype = family if isinstance(family, str) else "of a stranger", dtype
        self.options = {"lr": 1e-2, "min_8bit_size": 64, "maximize": maximize}
        self.options |= {"nonzero_squares": True} if nonzero and self.family in WITH_SQUARES else {}
        self.options |= {"master_weight_bits": bits} if dtype != torch.float32 else {}
        self.folder = tempfile.TemporaryDirectory()
        self.time = 0
        self.groups = [{"shapes": SHAPES[:2]}]
        self.ours, self.twin = ((params := self.parameters(SHAPES[:2]), self.made(params)) for _ in range(2))

    def parameters(self, shapes):
        generator = torch.Generator().manual_seed(len(shapes))
        return [nn.Parameter(torch.randn(shape, generator=generator).to(self.dtype)) for shape in shapes]

    def made(self, params, **options):
        """An optimizer of this family with as many groups as there are now."""
        first = params[: len(SHAPES[:2])]
        groups, options = [{"params": first, "blocksize": 128}], {**self.options, **options}
        if self.rule is None:
            optimizer = make(self.family, groups, **options)
        else:
            rule = copy.deepcopy(self.rule)
            optimizer = optim.Optimizer(groups, rule, {"lr": options.pop("lr")}, optim_bits=8, **options)
        if len(params) > len(first):
            optimizer.add_param_group({"params": params[len(first) :], "lr": 2e-2})
        return optimizer

    @rule(
        layout=st.sampled_from([*LAYOUTS]),
        missing=st.sets(st.integers(0, 2)),
        bad=st.booleans(),
        released=st.booleans(),
        around=st.sampled_from([*AROUND]),
        joined=st.booleans(),
    )
    def step(self, layout, missing, bad, released, around, joined):
        """joined: small parameters make their steps in one call of the kernel, as on a GPU."""
        self.time += 1
        for params, optimizer in (self.ours, self.twin):
            small = 2**18 if joined and params is self.ours[0] else 0
            generator = torch.Generator().manual_seed(self.time)
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=generator).to(self.dtype)
                if bad and i == 0:
                    grad[0, 0] = torch.nan
                p.grad = None if i in missing else LAYOUTS[layout](grad) if params is self.ours[0] else grad
            with mock.patch.dict(update._JOINED, {"cpu": small}):
                if released and params is self.ours[0]:
                    self.backward_that_steps(params, optimizer, around)
                with AROUND[around if params is self.ours[0] else "nothing"]():
                    optimizer.step()

    def backward_that_steps(self, params, optimizer, around):
        """The gradients that the parameters have, once more, by a backward pass that makes the steps."""
        loss = sum(
            ((p * p.grad.detach()).sum() for p in params if p.grad is not None), torch.zeros((), requires_grad=True)
        )
        for p in params:
            p.grad = None
        release = optim.GradientRelease(optimizer)
        with AROUND[around]():
            loss.backward()
        assert all(p.grad is None for p in params)
        release.remove()

    @rule(how=st.sampled_from(["state dict", "file", "deepcopy", "pages"]), around=st.sampled_from([*AROUND]))
    def go_on_elsewhere(self, how, around):
        """As a run does that is continued: parameters and states into a new optimizer."""
        params, old = self.ours
        options = {"page_directory": tempfile.mkdtemp(dir=self.folder.name)} if how == "pages" else {}
        new = [nn.Parameter(p.detach().clone()) for p in params]
        with AROUND[around]():
            optimizer = self.made(new, **options)
            saved = old.state_dict()
            optimizer.load_state_dict(
                of_file(saved) if how == "file" else copy.deepcopy(saved) if how == "deepcopy" else saved
            )
        self.ours = new, optimizer

    @rule(how=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copied(self, how):
        self.ours = how(self.ours)

    @rule()
    def in_other_memory(self):
        """As `model.to(...)` and offloading move parameters, and users their states."""
        params, optimizer = self.ours
        for p in params:
            p.data = p.detach().clone()
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[key] = value.to("cpu", copy=True)

    @rule(transposed=st.booleans())
    def in_another_layout(self, transposed):
        for p in self.ours[0]:
            p.data = p.detach().mT.contiguous().mT if transposed else p.detach().contiguous()

    @rule(lr=st.sampled_from([1e-3, 0.0, 0.1]), as_tensor=st.booleans())
    def another_learning_rate(self, lr, as_tensor):
        for _, optimizer in (self.ours, self.twin):
            optimizer.param_groups[-1]["lr"] = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr

    @precondition(lambda self: len(self.ours[0]) < len(SHAPES))
    @rule()
    def another_group(self):
        for params, optimizer in (self.ours, self.twin):
            params += self.parameters(SHAPES[2:])
            optimizer.add_param_group({"params": params[2:], "lr": 2e-2})

    @rule(to_none=st.booleans())
    def clear(self, to_none):
        self.ours[1].zero_grad(set_to_none=to_none)

    @precondition(lambda self: "ScheduleFree" in self.family)
    @rule(around=st.sampled_from([*AROUND]))
    def evaluate_and_go_on(self, around):
        for side, optimizer in (self.ours, self.twin):
            with AROUND[around if side is self.ours[0] else "nothing"]():
                optimizer.eval()
                optimizer.train()

    @rule()
    def look(self):
        """Nothing that only looks changes anything."""
        params, optimizer = self.ours
        optimizer.state_dict()
        repr(optimizer)
        for p in params:
            assert optimizer.exact_weight(p).shape == p.shape

    @invariant()
    def the_same_bits(self):
        if not hasattr(self, "ours"):
            return
        (params, ours), (others, twin) = self.ours, self.twin
        assert same_bits([p.detach() for p in params], [p.detach() for p in others])
        for p, q in zip(params, others, strict=True):
            here, there = ours.state.get(p, {}), twin.state.get(q, {})
            assert here.keys() == there.keys()
            for key, value in here.items():
                assert same_bits(value, there[key]) if isinstance(value, torch.Tensor) else value == there[key], key

    def teardown(self):
        if hasattr(self, "folder"):
            self.ours = None
            self.folder.cleanup()


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:paged state")
@pytest.mark.parametrize("examples", [15, pytest.param(400, marks=pytest.mark.slow)])
def test_walks(examples):
    own = settings(max_examples=examples, stateful_step_count=12, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Walk, settings=own)
