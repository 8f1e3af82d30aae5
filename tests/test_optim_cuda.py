"""Muon, Adafactor, SOAP and Schedule-Free on an NVIDIA GPU: `python -m pytest -m cuda tests/test_optim_cuda.py`.

Their products and decompositions have other bits than those of a CPU, but on one GPU always the same: compiled or not, in pages
or not, interrupted or not, with the batches of a single run.
"""

import contextlib
import io

import pytest
import torch
from conftest import difference, same_bits
from test_optim_classes import by_rule
from torch import nn

import bnbref
from bnbref import optim
from bnbref.optim import paging

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
# Two of a shape are stepped together; no parameter is of whole blocks; the last is the only one that is not paged.
SHAPES = ((70, 61), (70, 61), (40, 130), (5000,), (7,))
PAGED_FROM = 4000
FAMILIES = ("Muon", "Adafactor", "SOAP", "AdamWScheduleFree")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_bits = pytest.mark.parametrize("bits", ["8bit", "32bit"])


@pytest.fixture(autouse=True)
def small_ones_are_paged(monkeypatch):
    monkeypatch.setattr(paging, "PAGED_FROM", PAGED_FROM)


def start(family, bits, paged=False, dtype=torch.float32, **options):
    """Parameters, and an optimizer of them with momentum."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(DEVICE, dtype)) for shape in SHAPES]
    options |= {"beta1": 0.9} if family == "Adafactor" else {"frequency": 2} if family == "SOAP" else {}
    kind = getattr(optim, ("Paged" if paged else "") + family + bits)
    return params, kind(by_rule(family, params), lr=1e-2, weight_decay=0.1, **options)


def advanced(params, optimizer, first, last):
    """Parameters and states after these steps, the fourth of which has a gradient that is not finite."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        if t == 3:
            params[2].grad[0, 0] = torch.nan
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    tensors = [x.cpu() for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    return [p.detach().cpu() for p in params] + tensors


@each_family
@pytest.mark.parametrize(
    ("bits", "dtype"), [("8bit", torch.float32), ("32bit", torch.float32), ("8bit", torch.bfloat16)], ids=str
)
def test_compiled_is_eager(family, bits, dtype):
    own = {"master_weight_bits": 24} if dtype == torch.bfloat16 else {}
    got = advanced(*start(family, bits, dtype=dtype, **own), 0, 5)
    with bnbref.eager():
        want = advanced(*start(family, bits, dtype=dtype, **own), 0, 5)
    assert same_bits(got, want), difference(got, want)


@each_family
@pytest.mark.parametrize(("bits", "page_bytes"), [("8bit", 1), ("32bit", 2**28)])
def test_paged_is_resident(family, bits, page_bytes):
    params, optimizer = start(family, bits, paged=True, page_bytes=page_bytes)
    got = advanced(params, optimizer, 0, 5)
    large = [x for x in optimizer.state[params[0]].values() if isinstance(x, torch.Tensor) and x.numel() > 1000]
    assert {x.device.type for x in large} == {"cpu"}
    assert same_bits(got, advanced(*start(family, bits), 0, 5))


@each_family
def test_a_directory_is_resident(family, tmp_path):
    bits = "8bit"
    params, optimizer = start(family, bits, page_directory=tmp_path)
    assert same_bits(advanced(params, optimizer, 0, 5), advanced(*start(family, bits), 0, 5))


@each_family
@pytest.mark.parametrize(("bits", "paged"), [("8bit", True), ("8bit", False), ("32bit", True)])
def test_resumed_is_uninterrupted(family, bits, paged):
    want = advanced(*start(family, bits), 0, 5)
    first, optimizer = start(family, bits, paged)
    advanced(first, optimizer, 0, 2)
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in first], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cpu")
    params, optimizer = start(family, bits, paged)
    for p, x in zip(params, saved["params"], strict=True):
        p.data.copy_(x)
    optimizer.load_state_dict(saved["optimizer"])
    assert same_bits(advanced(params, optimizer, 2, 5), want)


@each_bits
@pytest.mark.parametrize("paged", [False, True])
def test_averages_there_and_back_are_those_of_eager(bits, paged):
    ends = []
    for mode in (contextlib.nullcontext, bnbref.eager):
        with mode():
            params, optimizer = start("AdamWScheduleFree", bits, paged)
            advanced(params, optimizer, 0, 2)
            optimizer.eval()
            average = [p.detach().cpu() for p in params]
            optimizer.train()
            ends.append(average + advanced(params, optimizer, 2, 4))
    assert same_bits(*ends)
