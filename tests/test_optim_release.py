"""Gradient release: the bits of a step after backward in every class, and never more than a layer's gradients."""

import copy

import pytest
import torch
from conftest import same_bits
from test_optim_classes import ALL, OF_MATRICES, by_rule, make
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnbref
from bnbref import optim
from bnbref.kernels import compile_enabled
from bnbref.kernels.compiler import missing_compiler
from bnbref.optim import GradientRelease

quick = pytest.mark.usefixtures("eager")


def network(dtype=torch.float32, width=80, depth=4):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers).to(dtype)


def trained(model, optimizer, first, last):
    for t in range(first, last):
        x = torch.randn(8, 80, generator=torch.Generator().manual_seed(t)).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(model, optimizer):
    states = [x for p in model.parameters() for x in optimizer.state[p].values()]
    return [*(p.detach() for p in model.parameters()), *(x for x in states if isinstance(x, torch.Tensor))]


@quick
@pytest.mark.filterwarnings("ignore:paged state")
@pytest.mark.parametrize("name", [*ALL, *OF_MATRICES])
def test_released_is_a_step_after_backward(name):
    results = []
    for released in (False, True):
        model = network()
        first, rest = [*model[:4].parameters()], [*model[4:].parameters()]
        optimizer = make(name, [*by_rule(name, first, lr=1e-3), *by_rule(name, rest)])
        handle = GradientRelease(optimizer) if released else None
        trained(model, optimizer, 0, 3)
        if handle is not None:
            handle.remove()
        trained(model, optimizer, 3, 4)
        results.append(tensors(model, optimizer))
    assert same_bits(*results)


@quick
def test_after_remove_gradients_stay_until_the_step():
    model = network()
    optimizer = optim.AdamW8bit(model.parameters())
    GradientRelease(optimizer).remove()
    model(torch.ones(1, 80)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(optimizer.state.values())


@quick
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("name", ["AdamW8bit", "SOAP"])
def test_a_backward_pass_that_is_differentiated_steps_the_same(name):
    """Where the gradients have a graph, hooks run with gradients on: a step must not become part of that graph."""
    results = []
    for create_graph in (False, True):
        model = network(depth=1)
        optimizer = make(name, by_rule(name, [*model.parameters()]), min_8bit_size=0)
        GradientRelease(optimizer)
        model(torch.ones(2, 80)).square().sum().backward(create_graph=create_graph)
        results.append(tensors(model, optimizer))
        assert not any(x.requires_grad for x in results[-1])
    assert same_bits(*results)


@quick
def test_released_with_a_schedule_corrections_and_pages(tmp_path):
    results = []
    for released in (False, True):
        model = network(torch.bfloat16)
        path = tmp_path / str(released)
        optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2, master_weight_bits=24, page_directory=path)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        if released:
            GradientRelease(optimizer)
        for t in range(3):
            trained(model, optimizer, t, t + 1)
            schedule.step()
        assert [s["step"] for s in optim.read_pages(path).values()] == [3] * 8
        results.append([x.clone() for x in tensors(model, optimizer)])
        if released:
            model(torch.ones(1, 80, dtype=torch.bfloat16)).sum().backward()
            with pytest.raises(RuntimeError, match="interrupted"):  # until `step` says that it is over
                optim.read_pages(path)
    assert same_bits(*results)


def test_released_compiled_is_eager():
    results = []
    for compiled in (True, False):
        model = network()
        optimizer = optim.AdamW8bit(model.parameters())
        GradientRelease(optimizer)
        if compiled:
            trained(model, optimizer, 0, 2)
        else:
            with bnbref.eager():
                trained(model, optimizer, 0, 2)
        results.append(tensors(model, optimizer))
    assert same_bits(*results)


class Peak:
    """The most bytes of gradients that there are at once: looked at whenever one is complete."""

    def __init__(self, model):
        self.most, self._parameters = 0, list(model.parameters())
        for p in self._parameters:
            p.register_post_accumulate_grad_hook(self)

    def __call__(self, p):
        self.most = max(self.most, sum(q.grad.nbytes for q in self._parameters if q.grad is not None))


@quick
def test_there_is_one_gradient_at_a_time():
    found = {}
    for released in (False, True):
        model = network(depth=6)
        peak = Peak(model)
        optimizer = optim.AdamW8bit(model.parameters())
        if released:
            GradientRelease(optimizer)
        trained(model, optimizer, 0, 2)
        found[released] = peak.most
    assert found == {False: 6 * (80 * 80 + 80) * 4, True: 80 * 80 * 4}


def peak_of_backward(released, width=512, depth=16):
    """The most bytes allocated in a backward pass and a step, beyond what there was before, as torch's profiler counts them."""
    model = network(width=width, depth=depth)
    optimizer = optim.AdamW8bit(model.parameters())
    if released:
        GradientRelease(optimizer)
    for _ in range(2):  # the second: states are there
        loss = model(torch.ones(4, width)).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_the_peak_of_memory_is_a_layer_and_not_the_model():
    """16 layers of 1 MiB: all gradients, or one at a time, which is there twice (autograd copies a transposed one), and on a CPU
    what a step computes before it is copied: the parameter, and a quarter of its bytes for each state. 3.5 layers, and little."""
    if missing_compiler("cpu") or not compile_enabled():
        pytest.skip("uncompiled, a step allocates every number that it computes")
    layer = 512 * 512 * 4
    after, released = peak_of_backward(False), peak_of_backward(True)
    assert after >= 16 * layer
    assert released <= 4 * layer


@pytest.mark.cuda
def test_the_peak_of_memory_on_cuda():
    found = {}
    for released in (False, True):
        model = network(width=2048, depth=8).cuda()
        optimizer = optim.AdamW8bit(model.parameters())
        if released:
            GradientRelease(optimizer)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(torch.ones(4, 2048, device="cuda")).sum().backward()
            optimizer.step()
            found[released] = torch.cuda.max_memory_allocated() - before
            optimizer.zero_grad()
    layer = 2048 * 2048 * 4
    assert found[False] >= 8 * layer
    assert found[True] <= 4 * layer


@quick
def test_tied_parameters_step_once():
    ends = []
    for released in (False, True):
        model = network(depth=2)
        model[2].weight = model[0].weight
        optimizer = optim.AdamW8bit(model.parameters())
        if released:
            GradientRelease(optimizer)
        trained(model, optimizer, 0, 2)
        assert optimizer.state[model[0].weight]["step"] == 2
        ends.append(tensors(model, optimizer))
    assert same_bits(*ends)


@quick
@pytest.mark.parametrize("change", ["reversed", "moved", "gone"])
def test_a_parameter_has_the_settings_of_the_group_that_it_is_in(change):
    """Which may be another one than when gradients were released, or none."""
    ends = []
    for released in (False, True):
        model = network(depth=2)
        weights, others = (
            [p for p in model.parameters() if p.dim() == 2],
            [p for p in model.parameters() if p.dim() == 1],
        )
        optimizer = optim.AdamW8bit([{"params": weights, "lr": 1e-3}, {"params": others, "lr": 0.5}])
        if released:
            GradientRelease(optimizer)
        groups = optimizer.param_groups
        if change == "reversed":
            groups.reverse()
        elif change == "moved":
            groups[1]["params"].append(groups[0]["params"].pop())
        else:
            del groups[0]
        trained(model, optimizer, 0, 2)
        ends.append(tensors(model, optimizer))
    assert same_bits(*ends)


@quick
def test_a_hook_does_not_walk_over_all_parameters():
    """Of many, each would be looked at for each of the others: that took longer than the steps."""

    class Counted(list):
        looks = 0

        def __iter__(self):
            Counted.looks += 1
            return super().__iter__()

    model = network(depth=20)
    optimizer = optim.AdamW8bit(model.parameters())
    optimizer.param_groups[0]["params"] = Counted(optimizer.param_groups[0]["params"])
    GradientRelease(optimizer)
    trained(model, optimizer, 0, 1)
    several = Counted.looks
    trained(model, optimizer, 1, 2)
    assert Counted.looks - several < 20


@quick
def test_accumulation_is_refused_before_anything_moves():
    model = network()
    optimizer = optim.AdamW8bit(model.parameters())
    GradientRelease(optimizer)
    x = torch.ones(2, 80)
    model(x).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="accumulated"):
        model(x).sum().backward()
    assert same_bits([p.detach() for p in model.parameters()], before)
    optimizer.zero_grad()
    optimizer.step()
    model(x).sum().backward()  # a new iteration
    optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {2}


@quick
def test_a_graph_in_several_passes_is_refused():
    shared = nn.Linear(80, 80)
    optimizer = optim.AdamW8bit(shared.parameters())
    GradientRelease(optimizer)
    x = torch.ones(2, 80, requires_grad=True)
    with pytest.raises(RuntimeError, match="passes of one graph"):
        checkpoint(shared, checkpoint(shared, x, use_reentrant=True), use_reentrant=True).sum().backward()
    other = copy.deepcopy(nn.Linear(80, 80))
    optimizer = optim.AdamW8bit(other.parameters())
    GradientRelease(optimizer)
    checkpoint(other, checkpoint(other, x, use_reentrant=False), use_reentrant=False).sum().backward()
    assert optimizer.state[other.weight]["step"] == 1


@quick
def test_what_is_refused():
    model = network()
    with pytest.raises(TypeError, match="SGD"):
        GradientRelease(torch.optim.SGD(model.parameters()))
    model(torch.ones(1, 80)).sum().backward()
    with pytest.raises(RuntimeError, match="has a gradient already"):
        GradientRelease(optim.AdamW8bit(model.parameters()))
    free = optim.AdamWScheduleFree(network().parameters())
    free.eval()
    GradientRelease(free)
    p = free.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match="train"):
        p.sum().backward()


@quick
def test_what_comes_too_late_clips_nothing_or_raises():
    model = network()
    optimizer = optim.AdamW8bit(model.parameters())
    GradientRelease(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 80)).sum()).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)
