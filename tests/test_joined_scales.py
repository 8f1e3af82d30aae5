"""What undoes the second quantization lies in one piece of memory: the same numbers, wherever they came from and go to."""

import copy
import io
import pickle

import pytest
import torch
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bnbref
from bnbref import operators
from bnbref.functional import quantize_4bit
from bnbref.joined_scales import join, memory_of, split
from bnbref.nn import Linear4bit, Params4bit
from bnbref.quant_state import QuantState, quantize_scales

BF16 = torch.bfloat16


def state_of(n, k, blocksize=64, blocksize2=256, seed=0):
    """The codes of a weight and their state, whose scales are quantized in blocks of blocksize2."""
    torch.manual_seed(seed)
    with bnbref.eager():
        packed, state = quantize_4bit(torch.randn(n, k), quant_type="nf4", blocksize=blocksize)
        state.absmax, state.offset, state.state2 = quantize_scales(state.absmax, blocksize2)
        state.nested = True
    return packed, state


def layer(n=24, k=128, seed=0):
    torch.manual_seed(seed)
    made = Linear4bit(k, n, bias=False, quant_type="nf4", compute_dtype=BF16)
    made.load_state_dict({"weight": torch.randn(n, k)})
    with bnbref.eager():
        return made.to("cpu")


def fields(state):
    return state.state2.absmax, state.state2.code, state.offset


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 200),
    blocksize=st.sampled_from([24, 32, 64, 4096]),
    blocksize2=st.sampled_from([1, 3, 16, 256]),
)
def test_joined_scales_are_the_same_numbers_in_one_memory(n, k, blocksize, blocksize2):
    packed, state = state_of(n, k, blocksize, blocksize2)
    before = copy.deepcopy(state)
    assert memory_of(state) is None
    join(state)
    assert state == before
    memory = memory_of(state)
    assert memory is not None
    for given_, view in zip(fields(state), split(memory, state.state2.absmax.numel()), strict=True):
        assert given_.data_ptr() == view.data_ptr()
        assert same_bits(given_, view)
    places = [t.storage_offset() * t.itemsize for t in fields(state)]
    assert all(place % 16 == 0 for place in places), "Inductor compiles for addresses that 16 divides"
    join(state)
    assert memory_of(state).data_ptr() == memory.data_ptr(), "what is joined stays where it is"
    with bnbref.eager():
        assert same_bits(state.dequantize(packed, BF16), before.dequantize(packed, BF16))
        (arguments, own) = (packed, state.absmax, [memory], [n, k], blocksize, blocksize2, "nf4"), True
        assert same_bits(torch.ops.bnbref.weight_4bit(*arguments, own, BF16), before.dequantize(packed, BF16))


def in_memory_of(more):
    """A change of a state: its parts in their places, of a memory that is longer by so many elements."""

    def change(state):
        memory = torch.zeros(memory_of(state).numel() + more)
        views = split(memory, state.state2.absmax.numel())
        for view, part in zip(views, fields(state), strict=True):
            view.copy_(part)
        state.state2.absmax, state.state2.code, state.offset = views

    return change


ASSIGNED = {
    "a longer memory": in_memory_of(8),
    "a shorter memory": in_memory_of(-3),
    "another offset": lambda s: setattr(s, "offset", s.offset.clone()),
    "other values": lambda s: setattr(s.state2, "code", s.state2.code.clone()),
    "another absmax2": lambda s: setattr(s.state2, "absmax", s.state2.absmax.clone()),
    "another state2": lambda s: setattr(s, "state2", copy.deepcopy(s.state2)),
    "a part in the place of another": lambda s: setattr(s, "offset", s.state2.code[0]),
}
UNUSUAL = {
    "an absmax2 with gaps": lambda s: setattr(s.state2, "absmax", s.state2.absmax.repeat_interleave(2)[::2]),
    "an offset [1]": lambda s: setattr(s, "offset", s.offset.view(1)),
    "an offset in float64": lambda s: setattr(s, "offset", s.offset.double()),
    "a parameter": lambda s: setattr(s.state2, "absmax", nn.Parameter(s.state2.absmax)),
    "an absmax2 with a gradient": lambda s: setattr(s.state2, "absmax", s.state2.absmax.clone().requires_grad_()),
    "no values": lambda s: setattr(s.state2, "code", None),
    "no offset": lambda s: setattr(s, "offset", None),
    "not nested": lambda s: setattr(s, "state2", None),
}


@pytest.mark.parametrize("nested", [True, False])
def test_what_a_graph_reads_of_a_weight_is_no_view(nested):
    """For a view Dynamo makes its base too: a twelfth of its calls of Python for a layer. Memory and numbers are the same."""
    torch.manual_seed(0)
    made = Linear4bit(128, 24, bias=False, quant_type="nf4", compress_statistics=nested)
    packed, state = quantize_4bit(torch.randn(24, 128), quant_type="nf4", compress_statistics=nested)
    state.absmax = state.absmax.view(-1)
    place, before = state.absmax.data_ptr(), copy.deepcopy(state)
    made.weight = Params4bit.of_codes(packed, state)
    absmax, second, *_ = made._known["arguments"]
    assert not any(t._is_view() for t in (made.weight, absmax, *second))
    assert absmax.data_ptr() == place
    assert made.weight.quant_state == before


@pytest.mark.parametrize("change", ASSIGNED | UNUSUAL)
def test_scales_that_do_not_lie_in_one_memory_are_seen(change):
    """What was assigned is joined again; what is not as `quantize_4bit` makes it stays as it is."""
    _, state = state_of(8, 4096)
    join(state)
    (ASSIGNED | UNUSUAL)[change](state)
    assert memory_of(state) is None
    before = copy.deepcopy(state)
    join(state)
    assert state == before
    assert (memory_of(state) is None) == (change in UNUSUAL)


def test_scales_on_meta_stay_apart():
    _, state = state_of(8, 4096)
    join(state)
    moved = state.map(lambda t: t.to("meta"))
    join(moved)
    assert memory_of(moved) is None


def weight_inputs(module, x):
    """How many inputs of its graph are of the weight."""
    names: list[str] = []

    def backend(graph, inputs):
        names.extend(node.name for node in graph.graph.nodes if node.op == "placeholder")
        return graph

    with torch.no_grad(), bnbref.eager():
        torch.compile(module, backend=backend, fullgraph=True)(x)
    return len([name for name in names if "weight" in name or "known" in name])


def test_a_layer_in_a_graph_has_three_inputs_for_its_weight():
    torch.compiler.reset()
    assert weight_inputs(layer(), torch.ones(2, 128, dtype=BF16)) == 3


FIELDS = ["offset", "code", "absmax2"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("assigned", [False, True])
def test_a_graph_sees_what_is_done_to_joined_scales(field, assigned, grad):
    """In place, or by an assignment, which takes the scales apart."""
    torch.compiler.reset()
    made, x = layer(), torch.randn(3, 128, dtype=BF16, requires_grad=grad)
    state = made.weight.quant_state
    assert memory_of(state) is not None
    graph = torch.compile(made, backend="aot_eager")
    with torch.set_grad_enabled(grad), bnbref.eager():
        before = graph(x)
        owner, name = (state, "offset") if field == "offset" else (state.state2, field.rstrip("2"))
        if assigned:
            setattr(owner, name, getattr(owner, name) * 2)
        else:
            getattr(owner, name).mul_(2)
        assert (memory_of(state) is None) == assigned
        got, want = graph(x), made(x)
        assert same_bits(got.detach(), want.detach())
        assert not same_bits(got.detach(), before.detach())
        if grad:
            (a,), (b,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x)
            assert same_bits(a, b)


def test_a_gradient_whose_weight_was_saved_elsewhere(monkeypatch):
    """As `save_on_cpu` does on a GPU: what is unpacked has no attributes, and only what the graph was given is known."""
    torch.compiler.reset()
    made, x = layer(), torch.randn(3, 128, dtype=BF16, requires_grad=True)
    graph = torch.compile(made, backend="aot_eager")
    with bnbref.eager():
        (want,) = torch.autograd.grad(made(x).sum(), x)
        graph(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.empty_like(t).copy_(t), lambda t: t):
            y = graph(x)
        calls: list[int] = []
        monkeypatch.setattr(operators, "split", lambda *given: calls.append(1) or split(*given))
        (got,) = torch.autograd.grad(y.sum(), x)
    assert same_bits(got, want)
    assert calls, "they were not taken from the parameter"


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_torch(value, weights_only=False):
    """A whole layer is more than weights: torch.load then needs to be told that the file is trusted."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_of_a_layer_has_scales_of_its_own_in_one_memory(copied):
    made = layer()
    other = copied(made)
    assert other.weight.quant_state == made.weight.quant_state
    memories = [memory_of(m.weight.quant_state) for m in (made, other)]
    assert all(m is not None for m in memories)
    assert memories[0].untyped_storage().data_ptr() != memories[1].untyped_storage().data_ptr()


def test_all_scales_of_a_state_can_be_saved_together():
    """torch.save refuses memory that is seen in two dtypes."""
    state = layer().weight.quant_state
    kept = {"absmax": state.absmax, **dict(zip(FIELDS, fields(state), strict=True))}
    loaded = through_torch(kept, weights_only=True)
    assert all(same_bits(kept[name], loaded[name]) for name in kept)


def test_sharing_a_layer_s_memory_shares_all_of_it():
    made = layer()
    made.share_memory()
    assert all(t.is_shared() for t in (made.weight.quant_state.absmax, *fields(made.weight.quant_state)))
    assert memory_of(made.weight.quant_state) is not None


def test_a_state_of_somebody_s_own_works_in_a_layer():
    """A parameter made by hand, as other libraries do, of fields that no graph of ours expects: the offset is `[1]`."""
    torch.compiler.reset()
    packed, state = state_of(24, 128)
    state.offset = state.offset.view(1)
    made = Linear4bit(128, 24, bias=False, quant_type="nf4", compute_dtype=BF16)
    made.weight = Params4bit.of_codes(packed, state)
    assert memory_of(state) is None
    x = torch.randn(3, 128, dtype=BF16)
    with torch.no_grad(), bnbref.eager():
        assert same_bits(torch.compile(made, backend="aot_eager", fullgraph=True)(x), made(x))
    assert isinstance(made.weight.quant_state, QuantState)
