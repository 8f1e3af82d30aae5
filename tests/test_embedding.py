"""Embeddings: the rows that are looked up are those of the whole table, dequantized."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import running
from hypothesis import given
from hypothesis import strategies as st
from layers import BF16, F16, F32, embeddings, fill, raw, raw_weight
from torch import nn

from bnbref import int8
from bnbref.nn import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding
from bnbref.nn.embedding import scales_at


@pytest.fixture(params=["eager"], autouse=True)
def kernels(request):
    """Kernels run uncompiled, unless a test asks for "compiled" by this parameter."""
    with running(request.param):
        yield


def whole(table):
    """The whole table, dequantized by the definition."""
    if isinstance(table, Embedding8bit):
        return int8.dequantize(table.weight.data, table.weight.SCB, table.dtype)
    return table.quant_state.dequantize(table.weight.data, table.dtype)


@given(table=embeddings(), shape=st.sampled_from([(), (0,), (4,), (2, 3), (2, 0)]), seed=st.integers(0, 9))
def test_rows_are_those_of_the_whole_table(table, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, table.num_embeddings, shape, generator=generator)
    for index in (ids, ids.int()):
        rows = table(index)
        assert raw(rows) == raw(F.embedding(ids, whole(table)))
        assert not rows.requires_grad


@given(table=embeddings(), data=st.data())
def test_scales_are_those_of_the_blocks(table, data):
    if isinstance(table, Embedding4bit):
        scales = table.quant_state.scales()
        index = torch.tensor(data.draw(st.lists(st.integers(0, scales.numel() - 1), max_size=5)), dtype=torch.int64)
        assert raw(scales_at(table.quant_state, index)) == raw(scales[index])


@given(table=embeddings(), beyond=st.sampled_from([1, 100]))
def test_ids_beyond_the_table_are_refused(table, beyond):
    with pytest.raises(IndexError):
        table(torch.tensor([0, table.num_embeddings - 1 + beyond]))


@pytest.mark.parametrize("table", [Embedding4bit(3, 64), Embedding8bit(3, 64)])
def test_what_is_not_quantized_is_not_looked_up(table):
    with pytest.raises(RuntimeError, match=r"the table of Embedding.bit\(3, 64\) is not quantized yet"):
        table(torch.tensor([1]))


@pytest.mark.parametrize("make", [Embedding4bit, Embedding8bit])
def test_rows_have_the_dtype_that_a_float_table_would_have(make):
    table = make(3, 64, dtype=BF16)
    assert table.dtype == table.to("cpu").dtype == BF16
    ids = torch.tensor([1])
    for cast, dtype in ((nn.Module.half, F16), (nn.Module.float, F32), (lambda t: t.to(BF16), BF16)):
        codes = raw_weight(table)
        table = cast(copy.deepcopy(table))
        assert table(ids).dtype == table.dtype == dtype
        assert raw_weight(table) == codes
    assert make(3, 64).to(F16).to("cpu")(ids).dtype == F16
    assert make(3, 64, dtype=F16).to("meta").dtype == F16


def test_assigning_a_table_assigns_its_dtype():
    table = fill(Embedding4bit(3, 64)).to(BF16).to("cpu")
    into = Embedding4bit(3, 64)
    into.load_state_dict(table.state_dict())
    assert into.dtype == F32
    into.load_state_dict(table.state_dict(), assign=True)
    assert into.dtype == BF16
    assert raw(into(torch.arange(3))) == raw(table(torch.arange(3)))


def test_the_named_tables_have_their_codebooks():
    assert EmbeddingFP4(2, 2).weight.quant_type == "fp4" == Embedding4bit(2, 2).weight.quant_type
    assert EmbeddingNF4(2, 2, BF16, BF16, "meta").weight.quant_type == "nf4"
    assert not Embedding4bit(2, 2).weight.compress_statistics
    for table in (Embedding4bit, EmbeddingFP4, EmbeddingNF4):
        assert fill(table(4, 64, quant_storage=BF16)).to("cpu").weight.dtype == BF16


@pytest.mark.parametrize("table", [Embedding4bit(30, 96, compress_statistics=True), Embedding8bit(30, 96)])
def test_compiled_and_exported_rows_are_the_same(table):
    table, ids = fill(table).to("cpu"), torch.tensor([[3, 29], [0, 3]])
    want = raw(table(ids))
    torch._dynamo.reset()
    assert raw(torch.compile(table, fullgraph=True, backend="aot_eager")(ids)) == want
    assert raw(torch.export.export(table, (ids,)).module()(ids)) == want


@pytest.mark.parametrize("kernels", ["compiled"], indirect=True)
@pytest.mark.parametrize(
    "make", [lambda: Embedding4bit(30, 96, compress_statistics=True), lambda: Embedding8bit(30, 96)]
)
def test_compiled_kernels_give_the_same_bits(kernels, make):
    table, ids = fill(make()).to("cpu"), torch.tensor([[3, 29], [0, 3]])
    with running("eager"):
        want = fill(make()).to("cpu")
        assert raw_weight(table) == raw_weight(want)
        rows = raw(want(ids))
    assert raw(table(ids)) == rows
    assert table(ids[:0]).shape == (0, 2, 96)


# ---- float tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Embedding, StableEmbedding])
def test_float_tables(make):
    table = make(10, 16, padding_idx=2, dtype=BF16)
    assert table.optim_bits == 32
    assert (table.weight[2] == 0).all()
    # Xavier: uniform up to sqrt(6 / (10 + 16)) = 0.4804, which bfloat16 rounds to at most 0.4805.
    assert table.weight.abs().max() <= 0.4805
    rows = table(torch.tensor([[1, 2]]))
    assert (rows.shape, rows.dtype) == ((1, 2, 16), BF16)
    rows.float().square().sum().backward()
    assert (table.weight.grad[2] == 0).all()


def test_the_stable_one_normalises_in_the_dtype_of_the_norm():
    table = StableEmbedding(10, 16, dtype=BF16)
    assert list(table.state_dict()) == ["weight", "norm.weight", "norm.bias"]
    assert table.norm.weight.dtype == F32
    ids = torch.arange(10)
    assert raw(table(ids)) == raw(F.layer_norm(table.weight.float(), (16,)).to(BF16))
    assert table.half()(ids).dtype == F16


@pytest.mark.parametrize(("dim", "logged"), [(64, False), (128, False), (65, True), (96, True), (32, True)])
def test_rows_that_are_no_whole_blocks_are_logged(dim, logged, caplog):
    with caplog.at_level("WARNING", logger="bnbref"):
        EmbeddingNF4(3, dim)
    message = f"embedding_dim {dim} is no multiple of the block size 64: this will lead to slow inference"
    assert caplog.messages == [message] * logged
