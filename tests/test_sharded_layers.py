"""Layers whose weight or activation is a DTensor: FSDP2 saves and loads them, and tensor parallelism is refused by name.

One process is a mesh of one rank: what is done with a DTensor does not depend on how many there are.
"""

import pytest
import torch
import torch.distributed as dist
from conftest import same_bits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import bnbref

BF16 = torch.bfloat16
FOUR = {"quant_storage": BF16, "quant_type": "nf4"}
LINEAR = {"bias": False, "compute_dtype": torch.float32, **FOUR}
LAYERS = {
    "four bits": lambda: bnbref.nn.Linear4bit(64, 32, compress_statistics=False, **LINEAR),
    "double": lambda: bnbref.nn.Linear4bit(64, 32, **LINEAR),
    "int8": lambda: bnbref.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False),
    "embedding": lambda: bnbref.nn.Embedding4bit(50, 64, **FOUR),
}
pytestmark = [pytest.mark.usefixtures("eager", "mesh"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def made(kind, seed):
    torch.manual_seed(seed)
    layer = LAYERS[kind]()
    nn.init.normal_(layer.weight)
    return layer.to("cpu").requires_grad_(False)


def given(kind):
    return torch.arange(3) if kind == "embedding" else torch.linspace(-1, 1, 192).view(3, 64)


def sharded(kind, seed, mesh):
    if kind == "int8" and torch.__version__ < "2.13":
        pytest.skip("FSDP2 of this torch shards no integers")
    return fully_shard(made(kind, seed), mesh=mesh)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["shards", "whole"])
def test_a_weight_that_is_spread_over_ranks_is_loaded_with_its_scales(kind, how, mesh):
    layer, want = sharded(kind, 0, mesh), made(kind, 1)(given(kind))
    if how == "shards":
        layer.load_state_dict(sharded(kind, 1, mesh).state_dict())
    else:
        set_model_state_dict(layer, made(kind, 1).state_dict(), options=StateDictOptions(full_state_dict=True))
    assert same_bits([layer(given(kind))], [want])


@pytest.mark.parametrize("kind", LAYERS)
def test_what_does_not_fit_the_shards_changes_nothing(kind, mesh):
    layer = sharded(kind, 0, mesh)
    state = sharded(kind, 1, mesh).state_dict()
    del state["SCB" if kind == "int8" else "weight.absmax"]
    with pytest.raises(RuntimeError, match=r"SCB|absmax|its scales are missing"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"weight is missing, but its .* are there"):
        layer.load_state_dict({k: t for k, t in sharded(kind, 1, mesh).state_dict().items() if k != "weight"})
    kept = {k: t for k, t in sharded(kind, 0, mesh).state_dict().items() if k != "weight"}
    assert layer.load_state_dict(kept, strict=False).missing_keys == ["weight"]
    weight = distribute_tensor(torch.ones(50 if kind == "embedding" else 32, 64), mesh)
    with pytest.raises(RuntimeError, match=r"spread over ranks as codes in|must be a whole"):
        layer.load_state_dict({"weight": weight})
    assert same_bits([layer(given(kind))], [made(kind, 0)(given(kind))])


@pytest.mark.parametrize("kind", ["four bits", "double", "int8"])
@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel, None])
def test_tensor_parallelism_is_refused_when_a_layer_is_called(kind, style, mesh):
    layer, x = made(kind, 0), given(kind)
    if style is None:
        x = distribute_tensor(x, mesh, [Replicate()])
    else:
        layer = parallelize_module(layer, mesh, style())
    with pytest.raises(TypeError, match=r"A must be a plain tensor, got a DTensor .* no tensor parallelism"):
        layer(x)
