"""Sharded is unsharded: FSDP2, DDP and ZeRO give, on gloo or on NCCL (`backend.py`), the bits of a single process of the CPU."""

import copy
import itertools
from unittest import mock

import backend
import pytest
import torch
from conftest import difference, same_bits
from hypothesis import given
from hypothesis import strategies as st
from test_optim_classes import make
from test_optim_wrappers import Lookahead
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bnbref import optim
from bnbref.optim import paging, sharding, stepping
from bnbref.optim.cuts import Cut, complete
from bnbref.optim.parts import Coded, Part
from bnbref.optim.state_dict import WRAPPED

# Two ranks cut 70 x 61 and 3 x 2000 inside a block, and 64 x 128 between two; a rank has nothing of 1 x 5000; 2000 elements
# here are 4000 there, so that 8 bits are for the whole alone to decide. On more GPUs other rows are cut, and the same is to hold.
SHAPES = ((70, 61), (64, 128), (1, 5000), (3, 2000), (70, 61, 2), (100,))
MATRICES = ((70, 61), (64, 128), (1, 500), (3, 200), (70, 61, 2), (100,))
"""The same for rules of whole matrices, with 8 bits from 500 elements on: SOAP has eigenvectors of both sides."""
NAMES = ("AdamW8bit", "AdamW32bit", "Lion8bit", "SGD8bit", "AdEMAMix8bit", "PagedAdamW8bit")
CLIPPED = ("LAMB8bit", "LARS8bit")
OF_MATRICES = ("Muon8bit", "Adafactor8bit", "SOAP8bit")
"""On each rank the same operators on the same whole matrices: bits too, with as many threads."""
STEPS = 4
pytestmark = pytest.mark.gpus


class Model(nn.Module):
    """Gradients of eight bits times 3: their mean over 2, 3, 4, 6 or 8 ranks is exact, in whatever order it divides."""

    def __init__(self, dtype=torch.float32, shapes=SHAPES):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)

    def forward(self, seed):
        generator = torch.Generator().manual_seed(seed)
        gradients = [3 * torch.randn(w.shape, generator=generator).bfloat16().float() for w in self.weights]
        return sum((w * g.to(w)).sum() for w, g in zip(self.weights, gradients, strict=True))


def trained(model, optimizer, first, last):
    for t in range(first, last):
        optimizer.zero_grad()
        model(t).backward()
        optimizer.step()
    return whole(model)


def whole(model):
    """The parameters, each in one piece on the CPU."""
    return [(w.full_tensor() if isinstance(w, DTensor) else w.detach().clone()).cpu() for w in model.parameters()]


def options(name):
    return {"lr": 1e-2, "weight_decay": 0.1, "min_8bit_size": 4096}


def of_matrices(name, model):
    """Stacks of matrices by the same rule where it takes them, as vectors by AdamW if not."""
    settings = options(name) | {"min_8bit_size": 500}
    if name == "Adafactor8bit":
        return optim.Adafactor8bit(model.parameters(), beta1=0.9, **settings)
    hidden, others = ([p for p in model.parameters() if (p.dim() == 2) == flag] for flag in (True, False))
    extra = {"frequency": 2} if name == "SOAP8bit" else {}
    groups = [{"params": hidden}, {"params": others, "rule": "adamw"}]
    return getattr(optim, name)(groups, **extra, **settings)


def calls_of_a_step(name, device, mesh):
    """How many parameters have blocks that are cut, and how often the ranks exchange something for them."""
    model = fully_shard(Model().to(device), mesh=mesh)
    optimizer = make(name, model.parameters(), **options(name))
    model(0).backward()
    shards = [sharding.shard_of(p) for p in model.parameters() if p.numel() >= 4096]
    with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as exchange:
        optimizer.step()
    return sum(bool(shard.cut_blocks(256)) for shard in shards), exchange.call_count


def transposed(device, mesh=None):
    """Parameters that are not contiguous; a rank that has one row of one has a contiguous part."""
    torch.manual_seed(0)
    ps = [torch.randn(2100, rows).to(device).t() for rows in (3, 70)]
    ps = [p if mesh is None else distribute_tensor(p, mesh, [Shard(0)]) for p in ps]
    if mesh is not None:
        ps = [
            DTensor.from_local(p.to_local().t().contiguous().t(), mesh, [Shard(0)], shape=p.shape, stride=p.stride())
            for p in ps
        ]
    ps = [nn.Parameter(p) for p in ps]
    optimizer = make("AdamW8bit", ps, **options("AdamW8bit"))
    for t in range(3):
        for p in ps:
            p.grad = p.detach() * (3 - 2 * t)  # the same bits on every device, which a sine has not
        optimizer.step()
    return [(p.full_tensor() if mesh is not None else p).detach().cpu().contiguous() for p in ps]


def gradients_placed_otherwise(device, mesh):
    """Parameters after a step by gradients that are placed otherwise: as terms of a sum, whole on each rank, or by columns."""
    torch.manual_seed(0)
    p, g = torch.randn(64, 64, device=device), torch.randn(64, 64, device=device)
    term = g if mesh.get_rank() == 0 else torch.zeros_like(g)  # of which the sum is exact
    whole_on_each = [Replicate()]
    pairs = [
        (whole_on_each, DTensor.from_local(term, mesh, [Partial()])),
        ([Shard(0)], distribute_tensor(g, mesh, whole_on_each)),
        ([Shard(0)], distribute_tensor(g, mesh, [Shard(1)])),
    ]
    ps = [nn.Parameter(distribute_tensor(p.clone(), mesh, placements)) for placements, _ in pairs] + [nn.Parameter(p)]
    for q, grad in zip(ps, [*(grad for _, grad in pairs), g], strict=True):
        q.grad = grad
    make("AdamW8bit", ps, lr=1e-2, min_8bit_size=1).step()
    return [(q.full_tensor() if isinstance(q, DTensor) else q).detach().cpu() for q in ps]


def interrupted(device, mesh):
    """What a warning says when memory ends at the last parameter, on all ranks."""
    model = fully_shard(Model().to(device), mesh=mesh)
    optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"))
    model(0).backward()
    update, last = stepping.update, list(model.parameters())[-1]

    def until_the_last(turn, *rest):
        if turn.p is last:
            raise torch.OutOfMemoryError
        update(turn, *rest)

    with (
        mock.patch.object(stepping, "update", until_the_last),
        pytest.warns(UserWarning, match="interrupted") as said,
        pytest.raises(torch.OutOfMemoryError),
    ):
        optimizer.step()
    return str(said[0].message)


@mock.patch.object(paging, "PAGED_FROM", 1000)
def run_all(rank, ranks, path):
    """Everything that the ranks show; what rank 0 has is saved."""
    found, mesh, device = {}, backend.mesh(ranks), backend.device(rank)
    for name in (*NAMES, *CLIPPED):
        model = fully_shard(Model().to(device), mesh=mesh)
        optimizer = make(name, model.parameters(), **options(name))
        halfway = trained(model, optimizer, 0, STEPS // 2)
        state = optimizer.state_dict()
        found[name] = {"params": halfway, "state": state, "end": trained(model, optimizer, STEPS // 2, STEPS)}
    for name in OF_MATRICES:
        model = fully_shard(Model(shapes=MATRICES).to(device), mesh=mesh)
        optimizer = of_matrices(name, model)
        halfway = trained(model, optimizer, 0, STEPS // 2)
        state = optimizer.state_dict()
        found[name] = {"params": halfway, "state": state, "end": trained(model, optimizer, STEPS // 2, STEPS)}
    model = fully_shard(Model(torch.bfloat16).to(device), mesh=mesh)
    found["bfloat16"] = trained(model, make("AdamW8bit", model.parameters(), **options("AdamW8bit")), 0, STEPS)
    for bits in (24, 32):
        model = fully_shard(Model(torch.bfloat16).to(device), mesh=mesh)
        optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"), master_weight_bits=bits)
        end = trained(model, optimizer, 0, STEPS)
        exact = [optimizer.exact_weight(p).full_tensor().cpu() for p in model.parameters()]
        found[bits] = {"end": end, "exact": exact, "state": optimizer.state_dict()}
    model = fully_shard(Model().to(device), mesh=mesh)
    optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"))
    release = optim.GradientRelease(optimizer)
    found["released"] = trained(model, optimizer, 0, STEPS)
    model(STEPS).backward()
    found["left"] = [p.grad is not None for p in model.parameters()]
    release.remove()
    model = fully_shard(Model().to(device), mesh=mesh)
    optimizer = make("AdamWScheduleFree8bit", model.parameters(), **options("AdamWScheduleFree8bit"))
    found["Schedule-Free"] = {"y": trained(model, optimizer, 0, STEPS)}
    optimizer.eval()
    found["Schedule-Free"]["x"] = whole(model)
    with pytest.raises(NotImplementedError, match="fully_shard"):
        optim.GradientRelease(optim.AdamW8bit(Model().to(device).parameters()))
    model = DistributedDataParallel(Model().to(device))
    found["DDP"] = trained(model, make("AdamW8bit", model.parameters(), **options("AdamW8bit")), 0, STEPS)
    model = Model().to(device)
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optim.AdamW8bit, **options("AdamW8bit"))
    found["ZeRO"] = trained(model, zero, 0, STEPS)
    zero.consolidate_state_dict(to=0)
    if rank == 0:
        found["ZeRO state"] = zero.state_dict()["state"]
    found["collective calls"] = [
        calls_of_a_step(name, device, mesh) for name in ("AdamW8bit", "PagedAdamW8bit", "AdamW32bit")
    ]
    found["transposed"] = transposed(device, mesh)
    found["placed otherwise"] = gradients_placed_otherwise(device, mesh)
    found["interrupted"] = interrupted(device, mesh)
    model = fully_shard(Model().to(device), mesh=mesh)
    optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"))
    halfway = ahead(model, optimizer, 0, STEPS // 2)
    blocks_are_checked_on_every_rank(optimizer)
    what_is_sharded_otherwise(model, optimizer)
    found["ahead"] = {"params": halfway, "state": optimizer.state_dict()}
    found["ahead"]["end"] = ahead(model, optimizer, STEPS // 2, STEPS)
    if rank == 0:
        torch.save(found, path)
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 4, device=device), mesh, [Shard(1)]))
    columns.grad = columns.detach()
    with pytest.raises(NotImplementedError, match=r"Shard\(dim=1\)"):
        optim.AdamW8bit([columns]).step()
    rows = nn.Parameter(distribute_tensor(torch.ones(4, 4, device=device), mesh, [Shard(0)]))
    rows.grad = rows.detach()
    with pytest.raises(NotImplementedError, match="page_directory"):
        optim.AdamW8bit([rows], page_directory=path + ".pages")
    for late, place in ((rows, {"page_directory": path + ".pages"}), (columns, {})):
        plain = nn.Parameter(torch.ones(4, 4))
        plain.grad = torch.ones(4, 4)
        optimizer = optim.AdamW8bit([plain], **place)
        optimizer.param_groups[0]["params"].append(late)  # as accelerate does after it has sharded a model
        with pytest.raises(NotImplementedError, match=r"page_directory|Shard\(dim=1\)"):
            optimizer.step()
        assert not optimizer.state
        assert bool((plain == 1).all())


def ahead(model, optimizer, first, last):
    """Lookahead around the optimizer, one step at a time: the parameters, and what it keeps of them."""
    wrapper = Lookahead(optimizer)
    for t in range(first, last):
        optimizer.zero_grad()
        model(t).backward()
        wrapper.step()
    return whole(model)


def blocks_are_checked_on_every_rank(optimizer):
    """Where 100 rows are cut a rank may have as many blocks of one size as of another."""
    optimizer.param_groups[0]["blocksize"] = 250
    with pytest.raises(ValueError, match="blocksize of a parameter must stay"):
        optimizer.step()
    optimizer.param_groups[0]["blocksize"] = 256


def what_is_sharded_otherwise(model, optimizer):
    """What others keep of a sharded parameter, but not as it is, is refused by name when it is saved."""
    p = next(iter(model.parameters()))
    for other in (p.to_local().detach(), p.detach().redistribute(placements=[Replicate()]), p.detach().full_tensor()):
        optimizer.state[p]["mine"] = other
        with pytest.raises(ValueError, match="'mine' in the state of a sharded parameter of shape"):
            optimizer.state_dict()
    optimizer.state[p]["mine"] = torch.tensor(3)
    optimizer.state_dict()
    del optimizer.state[p]["mine"]


@mock.patch.object(paging, "PAGED_FROM", 1000)
def run_others(rank, ranks, path):
    """Goes on from what the ranks saved."""
    saved, ends = torch.load(path, weights_only=True, map_location="cpu"), {}
    for name in NAMES:
        model = fully_shard(Model().to(backend.device(rank)), mesh=backend.mesh(ranks))
        optimizer = make(name, model.parameters(), **options(name))
        for w, p in zip(model.parameters(), saved[name]["params"], strict=True):
            w.data.copy_(distribute_tensor(p.detach().to(w.device), w.device_mesh, w.placements))
        optimizer.load_state_dict(saved[name]["state"])
        ends[name] = trained(model, optimizer, STEPS // 2, STEPS)
    for name in OF_MATRICES:
        model = fully_shard(Model(shapes=MATRICES).to(backend.device(rank)), mesh=backend.mesh(ranks))
        optimizer = of_matrices(name, model)
        for w, p in zip(model.parameters(), saved[name]["params"], strict=True):
            w.data.copy_(distribute_tensor(p.detach().to(w.device), w.device_mesh, w.placements))
        optimizer.load_state_dict(saved[name]["state"])
        ends[name] = trained(model, optimizer, STEPS // 2, STEPS)
    model = fully_shard(Model().to(backend.device(rank)), mesh=backend.mesh(ranks))
    optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"))
    for w, p in zip(model.parameters(), saved["ahead"]["params"], strict=True):
        w.data.copy_(distribute_tensor(p.detach().to(w.device), w.device_mesh, w.placements))
    optimizer.load_state_dict(saved["ahead"]["state"])
    ends["ahead"] = ahead(model, optimizer, STEPS // 2, STEPS)
    if rank == 0:
        torch.save(ends, path)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """The file that the ranks wrote, and what is in it."""
    folder = tmp_path_factory.mktemp("distributed")
    backend.spawn(run_all, backend.RANKS, folder, str(folder / "saved.pt"))
    return folder, torch.load(folder / "saved.pt", weights_only=True, map_location="cpu")


def alone(name, dtype=torch.float32):
    model = Model(dtype)
    optimizer = make(name, model.parameters(), **options(name))
    halfway = trained(model, optimizer, 0, STEPS // 2)
    state = copy.deepcopy(optimizer.state_dict())
    return halfway, state, trained(model, optimizer, STEPS // 2, STEPS)


@pytest.mark.usefixtures("eager")
def test_sharded_is_unsharded(ranked):
    _, found = ranked
    for name in NAMES:
        halfway, state, end = alone(name)
        assert same_bits(found[name]["params"], halfway), name
        assert same_bits(found[name]["end"], end), name
        assert_same_state(found[name]["state"]["state"], state["state"])
    assert same_bits(found["bfloat16"], alone("AdamW8bit", torch.bfloat16)[2])


def test_one_exchange_for_all_parameters(ranked):
    """And for each parameter that may be in pages, which come and go one after the other."""
    by_element, paged, none = ranked[1]["collective calls"]
    assert by_element == (by_element[0], 1)
    assert paged == (by_element[0], by_element[0])
    assert none == (by_element[0], 0)
    assert by_element[0] >= 3


@pytest.mark.usefixtures("eager")
def test_sharded_is_unsharded_for_what_is_not_contiguous(ranked):
    assert same_bits(ranked[1]["transposed"], transposed(torch.device("cpu")))


def test_gradients_are_placed_like_their_parameters(ranked):
    *placed, plain = ranked[1]["placed otherwise"]
    for p in placed:
        assert same_bits([p], [plain]), difference([p], [plain])


def test_an_interrupted_exchange_is_no_finished_step(ranked):
    assert "[] have made it, [] are as they were, and [0, 1, 2, 3, 4, 5] may have made" in ranked[1]["interrupted"]


@pytest.mark.usefixtures("eager")
def test_sharded_released_and_averaged_is_unsharded(ranked):
    assert same_bits(ranked[1]["released"], alone("AdamW8bit")[2])
    assert not any(ranked[1]["left"])
    model = Model()
    optimizer = make("AdamWScheduleFree8bit", model.parameters(), **options("AdamWScheduleFree8bit"))
    assert same_bits(ranked[1]["Schedule-Free"]["y"], trained(model, optimizer, 0, STEPS))
    optimizer.eval()
    assert same_bits(ranked[1]["Schedule-Free"]["x"], whole(model))


@pytest.mark.usefixtures("eager")
def test_sharded_weights_have_the_corrections_of_unsharded_ones(ranked):
    for bits in (24, 32):
        found, model = ranked[1][bits], Model(torch.bfloat16)
        optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"), master_weight_bits=bits)
        assert same_bits(found["end"], trained(model, optimizer, 0, STEPS))
        assert same_bits(found["exact"], [optimizer.exact_weight(p) for p in model.parameters()])
        assert_same_state(found["state"]["state"], optimizer.state_dict()["state"])


def assert_same_state(got, want):
    assert got.keys() == want.keys()
    for i, state in want.items():
        assert got[i]["step"] == state["step"]
        assert got[i][WRAPPED].keys() == state[WRAPPED].keys()
        for key, x in state[WRAPPED].items():
            assert same_bits(got[i][WRAPPED][key], x.cpu()), (i, key)


@pytest.mark.usefixtures("eager")
def test_sharded_matrices_are_whole_ones(ranked):
    """Parameters, states by element and states of the whole matrix."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in OF_MATRICES:
            model = Model(shapes=MATRICES).to(backend.device())  # products have other bits on another device
            optimizer = of_matrices(name, model)
            found = ranked[1][name]
            assert same_bits(found["params"], trained(model, optimizer, 0, STEPS // 2)), name
            assert_same_state(found["state"]["state"], optimizer.state_dict()["state"])
            assert same_bits(found["end"], trained(model, optimizer, STEPS // 2, STEPS)), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("eager")
def test_what_a_wrapper_keeps_of_shards_is_saved_whole(ranked):
    model = Model()
    optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"))
    assert same_bits(ranked[1]["ahead"]["params"], ahead(model, optimizer, 0, STEPS // 2))
    states = ranked[1]["ahead"]["state"]["state"]
    assert same_bits(
        [state["slow"] for state in states.values()], [optimizer.state[p]["slow"] for p in model.parameters()]
    )
    assert same_bits(ranked[1]["ahead"]["end"], ahead(model, optimizer, STEPS // 2, STEPS))


@pytest.mark.usefixtures("eager")
def test_clipped_rules_differ_by_their_norms_alone(ranked):
    """A norm of n elements is within n 2^-24 of the exact one, so with n <= 8540 the ratio of two on either side within 2e-3;
    the step is its product with lr and a direction, which with these betas is at most 10 long in each element, or with a
    code that moved because of it, by a fiftieth of itself."""
    bound = STEPS * 1e-2 * 10 * 2e-3
    for name in CLIPPED:
        for got, p in zip(ranked[1][name]["end"], alone(name)[2], strict=True):
            assert torch.allclose(got, p, rtol=0, atol=bound)


@pytest.mark.usefixtures("eager")
def test_ddp_and_zero_are_a_single_process(ranked):
    _, found = ranked
    end = alone("AdamW8bit")[2]
    assert same_bits(found["DDP"], end)
    assert same_bits(found["ZeRO"], end)
    model = Model()
    optimizer = make("AdamW8bit", model.parameters(), **options("AdamW8bit"))
    trained(model, optimizer, 0, STEPS)
    assert_same_state(found["ZeRO state"], optimizer.state_dict()["state"])


@pytest.mark.usefixtures("eager")
def test_two_ranks_save_and_three_go_on(ranked):
    folder, found = ranked
    backend.spawn(run_others, backend.OTHER, folder, str(folder / "saved.pt"))
    ends = torch.load(folder / "saved.pt", weights_only=True, map_location="cpu")
    every = (*NAMES, *OF_MATRICES, "ahead")
    assert {name: same_bits(ends[name], found[name]["end"]) for name in every} == dict.fromkeys(every, True)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 16))
def test_shards_have_every_element_and_block(sizes, blocksize):
    bounds = (0, *(sum(sizes[: i + 1]) for i in range(len(sizes))))
    shards = [sharding.Shard(bounds, rank, None) for rank in range(len(sizes))]
    owners = {}
    for shard in shards:
        for e in range(shard.start, shard.stop):
            owners.setdefault(e // blocksize, set()).add(shard.rank)
        first, last = shard.whole_blocks(blocksize)
        assert 0 <= first <= last <= shard.stop - shard.start
    assert shards[0].cut_blocks(blocksize) == sorted(b for b, ranks in owners.items() if len(ranks) > 1)
    for shard in shards:
        assert set(shard.blocks(blocksize)) == {b for b, ranks in owners.items() if shard.rank in ranks}
        inside = {e // blocksize for e in range(*(shard.start + i for i in shard.whole_blocks(blocksize)))}
        assert inside == {b for b, ranks in owners.items() if ranks == {shard.rank}}
        for block in shard.cut_blocks(blocksize):
            here, place = shard.part(block, blocksize)
            elements = range(shard.start + here.start, shard.start + here.stop)
            assert [e - block * blocksize for e in elements] == list(range(place.start, place.stop))


@given(st.data())
def test_cut_blocks_are_completed(data):
    """Of several parameters of any dtype: what each rank has of the blocks, and back."""
    blocksize, ranks = data.draw(st.integers(1, 20)), data.draw(st.integers(2, 4))
    sizes = data.draw(st.lists(st.lists(st.integers(0, 50), min_size=ranks, max_size=ranks), min_size=1, max_size=3))
    dtypes, generator = (torch.float32, torch.bfloat16, torch.float16), torch.Generator().manual_seed(0)
    wholes, bounds = [], []
    for own in sizes:
        bounds.append((0, *itertools.accumulate(own)))
        n, blocks = sum(own), -(-sum(own) // blocksize)
        weights = tuple(torch.randn(n, generator=generator).to(data.draw(st.sampled_from(dtypes))) for _ in range(2))
        codes = torch.randint(256, (n,), generator=generator, dtype=torch.uint8)
        wholes.append(Part(weights[:1], weights[1], None, [Coded(codes, torch.rand(blocks))]))
    cuts = {}
    for rank in range(ranks):
        shards = [sharding.Shard(b, rank, None) for b in bounds]
        parts = [sliced_whole(whole, shard, blocksize) for whole, shard in zip(wholes, shards, strict=True)]
        found = [Cut(*pair, blocksize) for pair in zip(parts, shards, strict=True)]
        cuts[rank] = [cut for cut in found if cut.shard.cut_blocks(blocksize)]
    if not cuts[0]:
        return
    words = []
    with mock.patch.object(torch.distributed, "all_reduce", lambda x, group: words.append(x.clone())):
        for own in cuts.values():
            complete(own)
    every = sum(words)
    for own in cuts.values():
        with mock.patch.object(torch.distributed, "all_reduce", lambda x, group: x.copy_(every)):
            parts, write_back = complete(own)
        for cut, part in zip(own, parts, strict=True):
            whole = next(w for w, b in zip(wholes, bounds, strict=True) if b is cut.shard.bounds)
            blocks = [b for b in cut.shard.cut_blocks(blocksize) if b in cut.shard.blocks(blocksize)]
            assert (part is None) == (not blocks)
            if part is not None:
                want = torch.cat([torch.arange(whole.p.numel())[b * blocksize : (b + 1) * blocksize] for b in blocks])
                assert same_bits(
                    [part.p, part.g, part.states[0].codes], [x[want] for x in (whole.p, whole.g, whole.states[0].codes)]
                )
                assert same_bits(part.states[0].absmax, whole.states[0].absmax[blocks])
                part.p.neg_(), part.states[0].codes.bitwise_not_(), part.states[0].absmax.neg_()
        before = [(cut.part.p.clone(), cut.part.states[0].codes.clone(), cut.part.g.clone()) for cut in own]
        write_back()
        for cut, (p, codes, g) in zip(own, before, strict=True):
            mine = torch.arange(cut.shard.start, cut.shard.stop) // blocksize
            cutting = torch.isin(mine, torch.tensor(cut.shard.cut_blocks(blocksize)))
            assert same_bits(cut.part.p, torch.where(cutting, -p, p))
            assert same_bits(cut.part.states[0].codes, torch.where(cutting, ~codes, codes))
            assert same_bits(cut.part.g, g)


def sliced_whole(whole, shard, blocksize):
    """A copy of what a rank has."""
    blocks = shard.blocks(blocksize)
    return whole.map(lambda x: x[shard.start : shard.stop].clone(), lambda x: x[blocks.start : blocks.stop].clone())
