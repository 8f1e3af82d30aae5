"""Checkpoints of several ranks: states of 8 bits go from one process to several and back, and what was saved stays whole."""

import copy
import os
from unittest import mock

import backend
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import same_bits, words
from test_optim_classes import make
from test_optim_distributed import Model, assert_same_state, options, trained
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.nn.parallel import DistributedDataParallel

from bnbref.nn import Linear4bit, replace_parameter_4bit
from bnbref.optim import AdamW8bit, paging

pytestmark = [pytest.mark.gpus, pytest.mark.usefixtures("eager"), pytest.mark.filterwarnings("ignore:paged state")]
NAMES = ("AdamW8bit", "PagedAdamW8bit", "AdEMAMix8bit", "SGD8bit")
FIRST, SECOND, LAST = 1, 2, 4
"""Steps when one process saves, when several do, and at the end."""


def start(name, rank=0, ranks=0):
    """A model and its optimizer: sharded over ranks, or of one process if there are none."""
    model = Model().to(backend.device(rank))
    if ranks:
        fully_shard(model, mesh=backend.mesh(ranks))
    return model, make(name, model.parameters(), **options(name))


def state_of(model, optimizer):
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def load(model, optimizer, folder, **kwargs):
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder, **kwargs)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


@mock.patch.object(paging, "PAGED_FROM", 1000)
def run_all(rank, ranks, folder):
    """Goes on from what one process saved; saves, and trains on while the copy is being written."""
    beside = dist.new_group(
        backend="gloo"
    )  # what is written in the background must not meet the training's collectives
    for name in NAMES:
        model, optimizer = start(name, rank, ranks)
        load(model, optimizer, folder / name / "one")
        trained(model, optimizer, FIRST, SECOND)
        dcp.save(state_of(model, optimizer), checkpoint_id=folder / name / "several")
        saving = dcp.async_save(state_of(model, optimizer), checkpoint_id=folder / name / "later", process_group=beside)
        end = trained(model, optimizer, SECOND, LAST)
        saving.result()
        if rank == 0:
            torch.save(end, folder / name / "end.pt")
    model = DistributedDataParallel(Model().to(backend.device(rank)))
    optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"))
    load(model.module, optimizer, folder / "AdamW8bit" / "one")
    trained(model, optimizer, FIRST, SECOND)
    dcp.save(state_of(model.module, optimizer), checkpoint_id=folder / "AdamW8bit" / "replicated")
    broadcast(rank, ranks)


def broadcast(rank, ranks):
    """The whole state of rank 0 alone, as torch gives it and takes it."""
    model, optimizer = start("AdamW8bit", rank, ranks)
    trained(model, optimizer, 0, FIRST)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(state) == (rank == 0)
    other, again = start("AdamW8bit", rank, ranks)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(
        other, again, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    assert same_bits(trained(other, again, FIRST, LAST), trained(model, optimizer, FIRST, LAST))


def test_one_process_to_several_and_back(tmp_path):
    ends, states = {}, {}
    for name in NAMES:
        model, optimizer = start(name)
        trained(model, optimizer, 0, FIRST)
        dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path / name / "one", no_dist=True)
        trained(model, optimizer, FIRST, SECOND)
        states[name] = copy.deepcopy(optimizer.state_dict()["state"])
        ends[name] = trained(model, optimizer, SECOND, LAST)
    backend.spawn(run_all, backend.RANKS, tmp_path, tmp_path)
    for name in NAMES:
        several = torch.load(tmp_path / name / "end.pt", weights_only=True)
        assert same_bits(several, ends[name]), name
        kinds = ("several", "later", "replicated") if name == "AdamW8bit" else ("several", "later")
        for kind in kinds:
            model, optimizer = start(name)
            load(model, optimizer, tmp_path / name / kind, no_dist=True)
            assert_same_state(optimizer.state_dict()["state"], states[name])
            assert same_bits(trained(model, optimizer, SECOND, LAST), ends[name]), (name, kind)


class Experts(nn.Module):
    """Three-dimensional weights in four bits, and one to train."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 64, 64, generator=generator))
        self.scale = nn.Parameter(torch.ones(64))
        replace_parameter_4bit(self.experts, "up")

    def forward(self, x):
        return sum((x * self.scale) @ w for w in self.experts.up)


def run_experts(rank, ranks, folder):
    x, device, mesh = torch.ones(2, 64), backend.device(rank), backend.mesh(ranks)
    one, other = (fully_shard(Experts(seed).to(device), mesh=mesh) for seed in (0, 1))
    want = one(x.to(device))
    with pytest.raises(NotImplementedError, match=r"spread over ranks .* model\.state_dict"):
        get_model_state_dict(one)
    dcp.save(one.state_dict(), checkpoint_id=folder)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    assert same_bits(other(x.to(device)), want)
    if rank == 0:
        torch.save(want.cpu(), folder / "want.pt")


def adapted(rank=0):
    """A frozen norm, a frozen layer in four bits whose codes are called floats, and an adapter, as FSDP1 flattens them."""
    torch.manual_seed(0)
    storage = {"quant_storage": torch.float32, "compute_dtype": torch.float32, "quant_type": "nf4"}
    layers = nn.LayerNorm(64), Linear4bit(64, 64, bias=False, **storage), nn.Linear(64, 3)
    model = nn.Sequential(*layers).to(backend.device(rank))
    model[0].requires_grad_(False)
    return model


def losses_of(model, rows):
    """Of three steps of the adapter, which each begin with the parameters of all ranks."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model(rows).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach()


def run_flat(rank, ranks, folder):
    model = FullyShardedDataParallel(adapted(rank), use_orig_params=True, device_id=backend.device(rank))
    rows = torch.arange(64 * ranks, device=backend.device(rank)).view(ranks, 64).sin()
    losses = losses_of(model, rows[rank : rank + 1])
    dist.all_reduce(losses)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        state = model.state_dict()
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad])
    for gathered in (FullyShardedDataParallel.optim_state_dict, get_optimizer_state_dict):
        with pytest.raises(NotImplementedError, match=r"FSDP1 .* cannot gather the states of this optimizer"):
            gathered(model, optimizer)
    if rank == 0:
        torch.save({"losses": losses / ranks, "state": state}, folder / "flat.pt")


NO_INTEGERS = torch.__version__ < "2.13"
"""Whether FSDP2 shards no integers, as that of older versions."""


def run_layers(rank, ranks, folder):
    run_flat(rank, ranks, folder)
    if not NO_INTEGERS:
        run_experts(rank, ranks, folder)


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """The folder with what the ranks have saved of models with weights in four bits."""
    folder = tmp_path_factory.mktemp("layers")
    backend.spawn(run_layers, backend.RANKS, folder, folder)
    return folder


@pytest.mark.skipif(NO_INTEGERS, reason="FSDP2 of older versions shards no integers")
def test_experts_in_four_bits_go_from_several_to_one(layered):
    model = Experts(2).to(backend.device())
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=layered, no_dist=True)
    set_model_state_dict(model, state)
    assert same_bits(
        model(torch.ones(2, 64, device=backend.device())).cpu(), torch.load(layered / "want.pt", weights_only=True)
    )


def test_flat_parameters_of_codes_and_numbers_train_and_are_saved(layered):
    """FSDP1 joins codes with numbers, and leaves a flat part of each on a rank."""
    found = torch.load(layered / "flat.pt", weights_only=True, map_location=backend.device())
    model = adapted()
    alone = losses_of(model, torch.arange(64 * backend.RANKS, device=backend.device()).view(-1, 64).sin())
    # Two products, each of sums of 64 in another order for another number of rows: 64 * 2^-24 of the magnitudes, which are at
    # most sqrt(64) times the result in the norm. A loss is a sum of squares: twice that of each, 2 * 2 * 8 * 2^-18.
    torch.testing.assert_close(found["losses"], alone, rtol=2**-13, atol=0)
    frozen = {name: value for name, value in model.state_dict().items() if not name.startswith("2.")}
    assert found["state"].keys() == model.state_dict().keys()
    assert all(torch.equal(words(value), words(found["state"][name])) for name, value in frozen.items())


class Killed(dcp.FileSystemWriter):
    """On one rank the process ends where its file is half-way."""

    def write_data(self, plan, planner):
        os._exit(9)


def run_killed(rank, ranks, folder):
    model, optimizer = start("AdamW8bit", rank, ranks)
    trained(model, optimizer, 0, FIRST)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "1")
    trained(model, optimizer, FIRST, SECOND)
    last = rank == ranks - 1
    dcp.save(state_of(model, optimizer), storage_writer=(Killed if last else dcp.FileSystemWriter)(folder / "2"))


def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    # The one that was killed, or another that misses it.
    ended = (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException)
    with pytest.raises(ended):
        backend.spawn(run_killed, backend.RANKS, tmp_path, tmp_path)
    model, optimizer = start("AdamW8bit")
    end = trained(model, optimizer, 0, LAST)
    model, optimizer = start("AdamW8bit")
    with pytest.raises(dcp.CheckpointException, match="metadata"):
        load(model, optimizer, tmp_path / "2", no_dist=True)
    load(model, optimizer, tmp_path / "1", no_dist=True)
    assert same_bits(trained(model, optimizer, FIRST, LAST), end)


def test_flattened_states_are_refused_by_name():
    """torch finds the entries of flattened states by the names of its own optimizers' states."""
    model, optimizer = start("AdamW8bit")
    trained(model, optimizer, 0, FIRST)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict"):
        set_optimizer_state_dict(model, optimizer, state, options=flat)
    state = optimizer.state_dict()
    state["state"] = {i: {"step": x["step"]} for i, x in state["state"].items()}  # which torchtitan finds again
    with pytest.raises(ValueError, match=r"no 'state1', only \['step'\]: .* torchtitan lose states"):
        optimizer.load_state_dict(state)
