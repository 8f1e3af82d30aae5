"""Pages: the same bits wherever the state lives, never more of it on the device than allowed, and a readable directory."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import same_bits
from torch import nn

from bnbref import optim
from bnbref.optim import paging

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
        assert self.on_device == 0


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
    assert 0 < made[0].most <= max(page_bytes, largest)


def test_the_next_states_are_fetched_before_the_current_ones_are_awaited():
    made = []

    def copies(device):
        made.append(LateCopies(device))
        return made[-1]

    trained(optim.PagedAdamW8bit, steps=1, placement=FarAway(True, copies=copies))
    assert made[0].log == ["fetch"] * 4 + ["wait", "write"] * 4
    trained(optim.PagedAdamW8bit, steps=1, placement=FarAway(True, page_bytes=1, copies=copies))
    assert made[1].log == ["fetch", "wait", "write"] * 4


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
params = [torch.nn.Parameter(torch.ones(5000)) for _ in range(2)]
optimizer = optim.PagedAdamW8bit(params, page_directory=sys.argv[1])
with bnbref.eager():
    for t in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        if t == 2 and sys.argv[2] == "inside":
            params[1].register_hook(lambda g: None)
            optimizer._update_other, count = optimizer._update, []
            def update(*args):
                count.append(1)
                os._exit(9) if len(count) == 2 else optimizer._update_other(*args)
            optimizer._update = update
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


def test_paged_on_a_cpu_says_once_that_it_is_resident():
    with pytest.warns(UserWarning, match="page_directory") as caught:
        trained(optim.PagedAdamW, sizes=((400, 300), (400, 300)))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(optim.PagedAdamW, sizes=((100, 100),))  # too small to be paged anywhere


@pytest.mark.cuda
@each_kind
def test_paged_on_cuda_is_resident(kind):
    results = []
    for options in ({"is_paged": True, "page_bytes": 2**20}, {}):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(400, 300, device="cuda")) for _ in range(6)]
        family = kind.__mro__[1]
        optimizer = family(params, lr=1e-2, optim_bits=8 if "8bit" in kind.__name__ else 32, **options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        assert (optimizer.state[params[0]]["state1"].device.type == "cpu") == bool(options)
        results.append([*(p.data.cpu() for p in params), *(x.cpu() for x in tensors(optimizer))])
    assert same_bits(*results)
