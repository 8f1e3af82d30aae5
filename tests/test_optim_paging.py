"""Pages: the same bits wherever the state lives, never more of it on the device than allowed, and a readable directory."""

import contextlib
import copy
import gc
import itertools
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnbref import optim
from bnbref.optim import paging, planned_steps, update

pytestmark = pytest.mark.usefixtures("eager")
KINDS = [optim.PagedAdamW8bit, optim.PagedAdamW32bit, optim.PagedAdEMAMix8bit, optim.PagedLion8bit]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda c: c.__name__)


class LateCopies:
    """A device whose copies happen as late as they may: a fetch at its `wait`, a write-back at the next fetch or the end."""

    def __init__(self, device):
        self.pending, self.on_device, self.most, self.log = [], 0, 0, []

    def fetch(self, host):
        self._drain()
        device = [torch.full_like(x, 77) for x in host]
        self.on_device += sum(x.nbytes for x in host)
        self.most = max(self.most, self.on_device)
        self.log.append("fetch")
        return device, (host, device)

    def wait(self, event):
        for host, device in zip(*event, strict=True):
            device.copy_(host)
        self.log.append("wait")

    def write_back(self, host, device):
        self.pending.append((host, device))
        self.on_device -= sum(x.nbytes for x in host)
        self.log.append("write")

    def _drain(self):
        for host, device in self.pending:
            for target, x in zip(host, device, strict=True):
                target.copy_(x)
        self.pending.clear()

    def finish(self):
        self._drain()
        self.log.append("finish")


class FarAway(paging.Placement):
    """Every state of 1000 elements or more is away, on a host that is this CPU too."""

    def _is_away(self, x, device):
        return x.numel() >= 1000


def trained(kind, steps=3, sizes=((300, 20), (7,), (5000,), (64, 100), (4096,)), placement=None, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = kind(params, lr=1e-2, **options)
    if placement is not None:
        optimizer._placement = placement
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return params, optimizer


def tensors(optimizer):
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


@each_kind
@pytest.mark.parametrize("page_bytes", [1, 20_000, 2**28])
def test_streamed_is_resident(kind, page_bytes):
    made = []

    def copies(device):
        made.append(LateCopies(device))
        return made[-1]

    params, optimizer = trained(kind, placement=FarAway(True, page_bytes=page_bytes, copies=copies))
    want, resident = trained(kind)
    assert all(map(same_bits, [p.data for p in params], [p.data for p in want]))
    assert all(map(same_bits, tensors(optimizer), tensors(resident)))
    largest = max(
        sum(x.nbytes for x in state.values() if isinstance(x, torch.Tensor)) for state in optimizer.state.values()
    )
    assert 0 < made[0].most <= max(page_bytes, 2 * largest)
    assert made[0].on_device == 0


def test_what_is_in_pages_and_what_waits_for_others_do_not_meet(monkeypatch):
    """Small parameters make one step together, as on a GPU, although those between them are written back at once."""
    monkeypatch.setitem(update._JOINED, "cpu", 2**18)
    run, rows = update._run, []
    monkeypatch.setattr(update, "_run", lambda part, *rest: (rows.append(len(part.p)), run(part, *rest)))
    sizes, options = ((512,), (1024,), (512,), (1100,), (300,)), {"min_8bit_size": 1}
    found = trained(optim.AdamW8bit, sizes=sizes, placement=FarAway(True, copies=LateCopies), **options)
    assert rows == 3 * [4, 4, 2, 2 + 2 + 2]  # the last block of 1100 elements is copied, into two rows
    monkeypatch.setitem(update._JOINED, "cpu", 0)
    alone = trained(optim.AdamW8bit, sizes=sizes, **options)
    assert all(map(equal, everything(*found), everything(*alone)))


def test_the_next_states_are_fetched_before_the_current_ones_are_awaited():
    made = []

    def copies(device):
        made.append(LateCopies(device))
        return made[-1]

    trained(optim.PagedAdamW8bit, steps=1, placement=FarAway(True, copies=copies))
    assert made[0].log == ["fetch"] * 4 + ["wait", "write"] * 4 + ["finish"]
    trained(optim.PagedAdamW8bit, steps=1, placement=FarAway(True, page_bytes=1, copies=copies))
    assert made[1].log == ["fetch", *["fetch", "wait", "write"] * 3, "wait", "write", "finish"]


@each_kind
def test_a_directory_is_resident(kind, tmp_path):
    params, optimizer = trained(kind, page_directory=tmp_path)
    want, resident = trained(kind)
    assert all(map(same_bits, [p.data for p in params], [p.data for p in want]))
    assert all(map(same_bits, tensors(optimizer), tensors(resident)))
    assert sum(f.stat().st_size for f in tmp_path.glob("*.bin")) == sum(x.nbytes for x in tensors(resident))


@each_kind
def test_a_directory_is_a_checkpoint(kind, tmp_path):
    params, _ = trained(kind, page_directory=tmp_path / "pages")
    copied = [nn.Parameter(p.data.clone()) for p in params]
    other = kind(copied, lr=1e-2)
    other.load_state_dict({**other.state_dict(), "state": optim.read_pages(tmp_path / "pages")})
    want, whole = trained(kind)
    for p, q in zip(copied, want, strict=True):
        p.grad = torch.full_like(p, 0.5)
        q.grad = torch.full_like(q, 0.5)
    other.step()
    whole.step()
    assert all(map(same_bits, [p.data for p in copied], [p.data for p in want]))


KILLED = """
import os, sys, torch, bnbref
from bnbref import optim
from bnbref.optim import stepping
params = [torch.nn.Parameter(torch.ones(5000)) for _ in range(2)]
optimizer = optim.PagedAdamW8bit(params, page_directory=sys.argv[1])
with bnbref.eager():
    for t in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        if t == 2 and sys.argv[2] == "inside":
            params[1].register_hook(lambda g: None)
            original, count = stepping.update, []
            def update(*args):
                count.append(1)
                os._exit(9) if len(count) == 2 else original(*args)
            stepping.update = update
        optimizer.step()
os._exit(9)
"""


@pytest.mark.parametrize("when", ["between", "inside"])
def test_a_killed_process_leaves_a_checkpoint_or_says_that_it_does_not(when, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], cwd=Path(__file__).parent.parent)
    assert done.returncode == 9
    if when == "inside":
        with pytest.raises(RuntimeError, match="interrupted"):
            optim.read_pages(tmp_path)
    else:
        states = optim.read_pages(tmp_path)
        assert [state["step"] for state in states.values()] == [3, 3]
        assert states[0]["state1"].dtype == torch.uint8


def test_which_states_are_in_pages():
    """As in bitsandbytes, by the elements of the parameter: of an optimizer that is not paged, none."""
    pages = [paging.Placement(is_paged).pages(numel) for is_paged in (False, True) for numel in (99_999, 100_000)]
    assert pages == [False, False, False, True]


def test_paged_on_a_cpu_says_once_that_it_is_resident():
    with pytest.warns(UserWarning, match="page_directory") as caught:
        trained(optim.PagedAdamW, sizes=((400, 300), (400, 300)))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(optim.PagedAdamW, sizes=((100, 100),))  # too small to be paged anywhere


@pytest.mark.parametrize("small", [0, 2**18])
def test_two_parameters_of_one_memory_are_stepped_one_after_the_other(small):
    """As a weight that was tied by `nn.Parameter(other)`: here or where small parameters make their steps together."""
    memory, alone = (torch.linspace(-1, 1, 1000) for _ in range(2))
    tied, single = [nn.Parameter(memory) for _ in range(2)], [nn.Parameter(alone) for _ in range(2)]
    for p in tied + single:
        p.grad = torch.linspace(3, -1, 1000)
    with mock.patch.dict(update._JOINED, {"cpu": small}):
        optim.AdamW8bit(tied, lr=1e-2, min_8bit_size=1).step()
    for p in single:
        optim.AdamW8bit([p], lr=1e-2, min_8bit_size=1).step()
    assert same_bits(memory, alone)


@pytest.mark.parametrize("small", [0, 2**18])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("transposed", [False, True])
def test_two_parameters_with_common_memory_are_stepped_one_after_the_other(small, bits, transposed):
    """Parts of one vector that overlap; the second one may be in a layout of which the step makes a copy."""
    memory, alone = (torch.linspace(-1, 1, 1200) for _ in range(2))
    pairs = []
    for x in (memory, alone):
        second = x[200:].view(20, 50)
        pairs.append([nn.Parameter(x[:1000]), nn.Parameter(second.mT if transposed else second)])
        for p in pairs[-1]:
            p.grad = torch.linspace(3, -1, 1000).view(p.shape)
    options = {"lr": 1e-2, "min_8bit_size": 1, "optim_bits": bits}
    with mock.patch.dict(update._JOINED, {"cpu": small}):
        optim.AdamW(pairs[0], **options).step()
    for p in pairs[1]:
        optim.AdamW([p], **options).step()
    assert same_bits(memory, alone)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.sampled_from([1, 2])), max_size=9))
def test_what_has_memory_in_common_is_found_by_one_walk(spans):
    """Beside a comparison of each with each. With a stride of 2, a tensor counts as all between its first and last element."""
    memory = torch.zeros(64)
    parts = [memory[first : first + length * stride : stride] for first, length, stride in spans]
    ends = [(first, first + (length - 1) * stride + 1) for first, length, stride in spans]
    assert planned_steps.in_common([SimpleNamespace(p=p) for p in parts]) == {
        i
        for (i, (first, last)), (j, (begin, end)) in itertools.product(enumerate(ends), repeat=2)
        if i != j and first < end and begin < last
    }


# ---- interrupted ----------------------------------------------------------------------------------------------------


def everything(params, optimizer):
    """For each parameter: it, and its state."""
    states = [{k: copy.deepcopy(x) for k, x in optimizer.state[p].items()} for p in params]
    return [(p.detach().clone(), state) for p, state in zip(params, states, strict=True)]


def equal(one, other):
    (p, state), (q, again) = one, other
    tensors = [[x for x in s.values() if isinstance(x, torch.Tensor)] for s in (state, again)]
    return same_bits(p, q) and state["step"] == again["step"] and same_bits(*tensors)


@settings(max_examples=20)
@given(
    at=st.integers(0, 7), again=st.booleans(), away=st.booleans(), page_bytes=st.sampled_from([1, 2**28]),
    small=st.sampled_from([0, 2**18]),
)  # fmt: skip
def test_out_of_memory_in_the_middle_says_what_is_whole(at, again, away, page_bytes, small):
    """A kernel fails at its call number `at`; with `again` all that come after it, too. small: the most elements of parameters
    that make their steps together, as on a GPU."""
    run, calls = update._run, itertools.count()

    def fails(*args):
        call = next(calls)
        if call == at or (again and call > at):
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(*args)

    placement = FarAway(True, page_bytes=page_bytes, copies=LateCopies) if away else None
    params, optimizer = trained(optim.PagedAdamW8bit, placement=placement)
    whole = trained(optim.PagedAdamW8bit, steps=4)
    before = everything(params, optimizer)
    for p, q in zip(params, whole[0], strict=True):
        p.grad = q.grad
    with (
        mock.patch.object(update, "_run", fails),
        mock.patch.dict(update._JOINED, {"cpu": small}),
        warnings.catch_warnings(record=True) as caught,
        contextlib.suppress(torch.OutOfMemoryError),
    ):
        warnings.simplefilter("always")
        optimizer.step()
    after, want = everything(params, optimizer), everything(*whole)
    said = [str(w.message) for w in caught if "interrupted" in str(w.message)]
    if not said:
        assert next(calls) <= at + 1  # it was called less often
        assert all(map(equal, after, want))
        return
    made, not_yet, partly = map(json.loads, re.findall(r"\[.*?\]", said[0]))
    assert sorted([*made, *not_yet, *partly]) == list(range(len(params)))
    assert len(partly) <= 1 or again  # none if only the last blocks failed, which then have a second chance
    assert all(equal(after[i], want[i]) for i in made)
    assert all(equal(after[i], before[i]) for i in not_yet)


@pytest.mark.parametrize("sizes", [(700,), (512, 300, 9000)], ids=str)
@pytest.mark.parametrize("at", range(6))
def test_ctrl_c_says_what_is_whole(at, sizes):
    """It comes after a kernel, which has changed what it was given, or between the copies of what several parameters share."""
    calls, run, copy_all = itertools.count(), update._run, torch._foreach_copy_

    def interrupted(function):
        def call(*args):
            function(*args)
            if next(calls) == at:
                raise KeyboardInterrupt

        return call

    def made(steps):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n, dtype=t)) for n in sizes for t in (torch.float32, torch.bfloat16)]
        optimizer = optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1)
        for p in params:
            p.grad = torch.randn_like(p)
        if steps:
            optimizer.step()
        return params, optimizer

    params, optimizer = made(0)
    with (
        mock.patch.object(update, "_run", interrupted(run)),
        mock.patch.object(torch, "_foreach_copy_", interrupted(copy_all)),
        mock.patch.dict(update._JOINED, {"cpu": 2**18}),
        pytest.warns(UserWarning, match="interrupted") if at < 2 * len(sizes) else contextlib.nullcontext([]) as caught,
        contextlib.suppress(KeyboardInterrupt),
    ):
        optimizer.step()
    done, not_yet, _ = map(json.loads, re.findall(r"\[.*?\]", str(caught[0].message))) if caught else ([], [], [])
    whole = everything(*made(1))
    assert all(equal(everything(params, optimizer)[i], whole[i]) for i in done)
    assert all(same_bits(params[i], made(0)[0][i]) for i in not_yet)


# ---- devices --------------------------------------------------------------------------------------------------------


def test_a_thousand_steps_do_not_grow():
    """Of memory on the device, where there is one, and of tensors that are alive."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placement = paging.Placement(True) if device == "cuda" else FarAway(True, copies=LateCopies)
    params = [nn.Parameter(torch.randn(size, device=device)) for size in ((400, 300), (300, 400), (7,))]
    params = params if device == "cuda" else [nn.Parameter(p.detach()[:10].clone()) for p in params]
    optimizer = optim.PagedAdamW8bit(params, lr=1e-2, min_8bit_size=1)
    optimizer._placement = placement
    found = []
    for t in range(1000 if device == "cuda" else 100):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if t in (9, 99, 999):
            alive = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
            found.append((alive, torch.cuda.memory_allocated() if device == "cuda" else 0))
    assert len(set(found)) == 1


@pytest.mark.cuda
@pytest.mark.gpus
@each_kind
@pytest.mark.parametrize("stream", ["default", "other"])
def test_paged_on_cuda_is_resident(kind, stream):
    """With parameters on every GPU, and on a stream whose work is late."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    results = []
    for options in ({"is_paged": True, "page_bytes": 2**20}, {}):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(400, 300).to(gpus[i % len(gpus)])) for i in range(6)]
        family = kind.__mro__[1]
        optimizer = family(params, lr=1e-2, optim_bits=8 if "8bit" in kind.__name__ else 32, **options)
        with contextlib.ExitStack() as streams:
            for gpu in gpus if stream == "other" else ():
                other = torch.cuda.Stream(gpu)
                other.wait_stream(torch.cuda.current_stream(gpu))
                streams.enter_context(torch.cuda.stream(other))
            for _ in range(3):
                for p in params:
                    gradient = torch.randn(p.shape)
                    with torch.cuda.device(p.device):
                        torch.cuda._sleep(10**7)
                    p.grad = gradient.to(p.device)
                optimizer.step()
            for gpu in gpus:
                torch.cuda.synchronize(gpu)
        assert (optimizer.state[params[0]]["state1"].device.type == "cpu") == bool(options)
        results.append([*(p.data.cpu() for p in params), *(x.cpu() for x in tensors(optimizer))])
    assert same_bits(*results)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.Lion8bit, optim.AdamW32bit], ids=lambda c: c.__name__)
def test_a_step_does_not_wait_for_the_gpu(kind):
    """What the host does for a step is done while the GPU is at the backward pass."""
    params = [nn.Parameter(torch.randn(size, device="cuda")) for size in (2**17, 5000, 7)]
    optimizer = kind(params, lr=1e-2)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.gpus
def test_a_gpu_that_is_full_leaves_whole_what_came_before():
    def start():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(size, device="cuda")) for size in (2**17, 2**17, 2**26, 2**17)]
        return params, optim.PagedAdamW8bit(params, lr=1e-2, page_bytes=1)

    def step(params, optimizer):
        generator = torch.Generator("cuda").manual_seed(1)
        for p in params:
            p.grad = torch.randn(p.shape, device="cuda", generator=generator)
        optimizer.step()

    params, optimizer = start()
    step(params, optimizer)
    want = everything(params, optimizer)
    params, optimizer = start()
    for p in params:
        optimizer.state[p] = optimizer.new_state(
            p, optimizer.settings(p, optimizer.param_groups[0]), optimizer._memory(p)
        )
    before = everything(params, optimizer)
    generator = torch.Generator("cuda").manual_seed(1)
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda", generator=generator)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)  # the state needs 2**27
    try:
        said = pytest.warns(UserWarning, match=r"\[0\] have made it, \[1, 2, 3\] are as they were, and \[\]")
        with said, pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    after = everything(params, optimizer)
    assert equal(after[0], want[0])
    assert all(equal(after[i], before[i]) for i in (1, 2, 3))  # the second waits for the fetch of the third to begin
    optimizer.step()  # with room it goes on
