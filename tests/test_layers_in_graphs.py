"""What a graph reads of a quantized weight: whatever is done to a layer between two calls, its graph computes what
the layer computes. And Dynamo passes over a layer in its checks, as over a float one."""

import contextlib
import copy
import fractions
import functools
import gc
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from conftest import difference, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bnbref
from bnbref.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bnbref.products import MatmulLtState
from bnbref.quant_state import QuantState

BF16 = torch.bfloat16
N, K = 8, 128
DEVICE = "cpu"


def floats(seed):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def weight_4bit(seed, **arguments):
    return Params4bit(floats(seed), **{"quant_type": "nf4", **arguments}).to(DEVICE)


def weight_8bit(seed):
    return Int8Params(floats(seed), requires_grad=False).to(DEVICE)


def layer_4bit(**arguments):
    layer = Linear4bit(K, N, quant_type="nf4", compute_dtype=BF16)
    layer.weight = weight_4bit(0, **arguments)
    return layer.requires_grad_(False).to(DEVICE)


def layer_8bit():
    layer = Linear8bitLt(K, N, has_fp16_weights=False, threshold=2.0)
    layer.weight = weight_8bit(0)
    return layer.requires_grad_(False).to(DEVICE)


class Block(nn.Module):
    """A layer, which changes may replace, in a model that is compiled."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 2


def assigned(attribute, value, of=lambda weight: weight):
    """A change: assigns an attribute of something that belongs to the weight."""

    def change(block, seed):
        setattr(of(block.layer.weight), attribute, value(seed))

    return change


def scaled(tensor, seed):
    return tensor * (1 + seed / 8)


def new_weight(make):
    def change(block, seed):
        block.layer.weight = make(seed)

    return change


def put_in_place(make):
    """As accelerate and transformers put a weight in its place."""

    def change(block, seed):
        block.layer._parameters["weight"] = make(seed)

    return change


def put_where_the_old_one_was(make):
    """The new weight may get the address, and so the `id`, of the old one."""

    def change(block, seed):
        block.layer._parameters["weight"] = None
        gc.collect()
        block.layer._parameters["weight"] = make(seed)

    return change


def put_beside_the_old_one(make):
    """The old weight is in use elsewhere, so nothing says that the layer has another."""
    kept = []

    def change(block, seed):
        kept.append(block.layer.weight)
        block.layer._parameters["weight"] = make(seed)

    return change


def swapped(make):
    def change(block, seed):
        torch.utils.swap_tensors(block.layer.weight, make(seed))

    return change


def new_data(make):
    def change(block, seed):
        block.layer.weight.data = make(seed)

    return change


def loaded(make, assign):
    def change(block, seed):
        other = copy.deepcopy(block.layer)
        other.weight = make(seed)
        block.layer.load_state_dict(other.state_dict(), assign=assign)

    return change


def replaced(copied):
    def change(block, seed):
        block.layer = copied(block.layer)

    return change


def functional(block, seed):
    """torch.func swaps parameters in and out again."""
    torch.func.functional_call(
        block, {"layer.bias": torch.full((N,), float(seed), device=DEVICE)}, torch.randn(2, K, device=DEVICE)
    )


def moved(block, seed):
    block.to("meta").to_empty(device=DEVICE) if seed < 0 else block.to(DEVICE)


def state_of(weight):
    return weight.quant_state


def state2_of(weight):
    return weight.quant_state.state2


def multiplied(attribute, of):
    def change(block, seed):
        state = of(block.layer.weight)
        setattr(state, attribute, scaled(getattr(state, attribute), seed))

    return change


COMMON = {
    "copied": replaced(copy.deepcopy),
    "copied flatly": replaced(copy.copy),
    "pickled": replaced(lambda layer: pickle.loads(pickle.dumps(layer))),
    "functional call": functional,
    "moved": moved,
    "frozen bias": lambda block, seed: block.layer.bias.requires_grad_(seed % 2 == 0),
    "other bias": lambda block, seed: setattr(
        block.layer, "bias", nn.Parameter(torch.full((N,), float(seed), device=DEVICE))
    ),
}


def weights(make):
    return {
        "assigned": new_weight(make),
        "put in place": put_in_place(make),
        "put where the old one was": put_where_the_old_one_was(make),
        "put beside the old one": put_beside_the_old_one(make),
        "swapped": swapped(make),
        "new data": new_data(make),
        "loaded": loaded(make, False),
        "loaded, assigned": loaded(make, True),
    }


def nested_state(seed):
    return weight_4bit(seed).quant_state


FOUR = {
    **COMMON,
    **weights(weight_4bit),
    "flat weight": new_weight(lambda seed: weight_4bit(seed, compress_statistics=seed % 2 == 0)),
    "fp4": new_weight(lambda seed: weight_4bit(seed, quant_type="fp4", blocksize=128)),
    "state": assigned("quant_state", nested_state),
    "state2": assigned("state2", lambda seed: nested_state(seed).state2, state_of),
    "absmax": assigned("absmax", lambda seed: nested_state(seed).absmax, state_of),
    "absmax in place": lambda block, seed: block.layer.weight.quant_state.state2.absmax.mul_(1 + seed / 8),
    "offset": multiplied("offset", state_of),
    "absmax2": multiplied("absmax", state2_of),
    "code2": multiplied("code", state2_of),
    "quant_type": assigned("quant_type", lambda seed: ("nf4", "fp4")[seed % 2], state_of),
    "state moved": lambda block, seed: block.layer.weight.quant_state.to(DEVICE),
    "state of others": lambda block, seed: setattr(
        block.layer.weight, "quant_state", QuantState.from_dict(nested_state(seed).as_dict(), DEVICE)
    ),
    "compute_dtype": lambda block, seed: setattr(
        block.layer, "compute_dtype", (None, torch.float32, torch.float16, BF16)[seed % 4]
    ),
}
EIGHT = {
    **COMMON,
    **weights(weight_8bit),
    "SCB": assigned("SCB", lambda seed: weight_8bit(seed).SCB),
    "SCB of layer": lambda block, seed: setattr(block.layer, "SCB", weight_8bit(seed).SCB),
    "threshold": lambda block, seed: setattr(block.layer.state, "threshold", float(seed)),
    "settings": lambda block, seed: setattr(block.layer, "state", MatmulLtState(threshold=float(seed))),
}


def check(make, table, changes, calls=1, **compiled):
    """calls: how often the graph runs before and after each change. A CUDA graph is first warm, then recorded, then replayed."""
    torch.compiler.reset()
    block = Block(make())
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).to(BF16).to(DEVICE)
    graph = torch.compile(block, fullgraph=True, **(compiled or {"backend": "eager"}))
    with torch.no_grad():
        for _ in range(calls):
            graph(x)
        for name, seed in changes:
            try:
                table[name](block, seed)
                want = block(x)
            except (
                AttributeError,
                RuntimeError,
                TypeError,
                ValueError,
            ):  # a change that this layer, or the earlier ones, refuse
                return
            for _ in range(calls):
                got = graph(x).clone()
                assert same_bits(got, want), (name, difference(got, want))


def changes_of(table):
    return st.lists(st.tuples(st.sampled_from(sorted(table)), st.integers(0, 5)), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None)
@given(changes_of(FOUR))
def test_a_graph_sees_what_is_done_to_a_4bit_layer(changes):
    with bnbref.eager():
        check(layer_4bit, FOUR, changes)


@settings(max_examples=8, deadline=None)
@given(changes_of(EIGHT))
def test_a_graph_sees_what_is_done_to_an_8bit_layer(changes):
    with bnbref.eager():
        check(layer_8bit, EIGHT, changes)


@pytest.mark.parametrize("name", FOUR)
def test_each_change_of_a_4bit_layer(name):
    with bnbref.eager():
        check(layer_4bit, FOUR, [(name, 1), (name, 2)])


@pytest.mark.parametrize("name", EIGHT)
def test_each_change_of_an_8bit_layer(name):
    with bnbref.eager():
        check(layer_8bit, EIGHT, [(name, 1), (name, 3)])


@pytest.mark.cuda
@pytest.mark.parametrize(("make", "table", "name"), [
    *((layer_4bit, FOUR, name) for name in FOUR),
    *((layer_8bit, EIGHT, name) for name in EIGHT),
])  # fmt: skip
def test_a_cuda_graph_sees_each_change(make, table, name, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cuda")
    unseen = pytest.raises(RuntimeError, match="was replaced through `_parameters`")
    with unseen if name == "put beside the old one" else contextlib.nullcontext():
        check(make, table, [(name, 1), (name, 3)], calls=4, mode="reduce-overhead")


def test_a_state_that_is_changed_inside_of_a_graph():
    block, absmax = Block(layer_4bit(compress_statistics=False)), torch.full((N * K // 64,), 3.0)

    def forward(x):
        y = block(x)
        block.layer.weight.quant_state.absmax = absmax
        return y, block(x)

    x = torch.ones(1, K, dtype=BF16)
    with torch.no_grad(), bnbref.eager():
        graph = torch.compile(forward, backend="eager")
        got = graph(x), graph(x)
        block.layer.weight = weight_4bit(0, compress_statistics=False)
        want = forward(x), forward(x)
    assert all(same_bits(a, b) for a, b in zip(sum(got, ()), sum(want, ()), strict=True))


@pytest.mark.parametrize("make", [layer_4bit, layer_8bit])
def test_a_weight_that_is_gone_is_not_kept(make):
    """Offloading frees a weight by putting one without memory in its place."""
    layer = make()
    codes = layer.weight.untyped_storage()
    known = layer._known
    assert "arguments" in known
    layer._parameters["weight"] = type(layer.weight)(torch.empty(0, device="meta"), requires_grad=False)
    gc.collect()
    assert not known
    assert torch._C._storage_Use_Count(codes._cdata) == 1


@pytest.mark.parametrize(
    "make", [lambda: layer_4bit(compress_statistics=True), lambda: layer_4bit(compress_statistics=False), layer_8bit],
    ids=["nested", "nf4", "int8"],
)  # fmt: skip
def test_dynamo_passes_over_a_layer(make):
    torch.compiler.reset()
    block = Block(make())

    def forward(x):
        return block(x)

    with torch.no_grad(), bnbref.eager(), torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        torch.compile(forward, backend="eager", fullgraph=True)(torch.ones(1, K, dtype=BF16))
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(forward)
    (layer,) = re.findall(r"source=[^,]*_modules\['layer'\], .*tag_safe=\((\w+), (\w+)\)", str(entry.guard_manager))
    assert layer[0] == "True"


@pytest.mark.parametrize("make", [layer_4bit, layer_8bit])
def test_a_layer_is_one_node_of_a_graph(make):
    """Every other one, as a cast to the dtype that x has, goes through all passes of a compilation, for each layer of a model."""
    torch.compiler.reset()
    graphs, layer = [], make()
    layer.bias = None

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), bnbref.eager():
        torch.compile(layer, backend=backend, fullgraph=True)(torch.ones(2, K, dtype=BF16))
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes if node.op.startswith("call")] in (
        ["bnbref.linear_4bit.default"],
        ["bnbref.linear_8bit.default"],
    )


@pytest.mark.parametrize("make", [layer_4bit, layer_8bit])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
def test_a_graph_under_autocast(make, backend, dtype):
    torch.compiler.reset()
    # float32 is rounded twice, to compute_dtype, then to autocast's. Nothing is an outlier: their sums are bounded only.
    layer, x = make(), floats(1).clamp(-1.9, 1.9).to(dtype)
    if make is layer_8bit and dtype == torch.float64:
        pytest.skip("an int8 product takes no float64")
    graph = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad(), bnbref.eager(), torch.autocast("cpu", dtype=torch.float16):
        assert same_bits(graph(x), layer(x))


@pytest.mark.parametrize(("make", "x", "said"), [
    (layer_4bit, torch.ones(2, K + 1), f"x must be .*{K}"),
    (layer_8bit, torch.ones(2, K + 1), f"x must be .*{K}"),
    (layer_8bit, torch.ones(2, K, dtype=torch.float64), "A must be float32, float16 or bfloat16"),
    (layer_4bit, torch.ones(2, K, device="meta"), "must be on the device of A, meta"),
    (layer_8bit, torch.ones(2, K, device="meta"), "must be on the device of A, meta"),
])  # fmt: skip
def test_what_a_layer_refuses_a_graph_refuses_in_the_same_words(make, x, said):
    torch.compiler.reset()
    layer = make()
    graph = torch.compile(layer, backend="eager")
    with torch.no_grad(), bnbref.eager():
        for call in (layer, graph):
            with pytest.raises(ValueError, match=said):
                call(x)


@pytest.mark.parametrize("make", [functools.partial(Linear4bit, K, N), layer_4bit, layer_8bit])
def test_a_graph_refuses_what_is_no_tensor(make):
    torch.compiler.reset()
    with torch.no_grad(), bnbref.eager(), pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        torch.compile(make().to(DEVICE), backend="eager")([1.0] * K)


@pytest.mark.parametrize(("n", "k", "said"), [(N - 1, K, rf"bias must be \[{N - 1}\]"), (N, K // 2, "x must be")])
def test_an_int8_weight_of_another_shape_is_refused_in_a_graph_too(n, k, said):
    torch.compiler.reset()
    layer = layer_8bit()
    layer.bias = nn.Parameter(torch.zeros(N))
    layer.weight = Int8Params(floats(0)[:n, :k], requires_grad=False).to(DEVICE)
    graph = torch.compile(layer, backend="eager")
    with torch.no_grad(), bnbref.eager():
        for call in (layer, graph):
            with pytest.raises(ValueError, match=said):
                call(torch.ones(2, K))


@pytest.mark.parametrize("make", [weight_4bit, weight_8bit])
def test_what_a_weight_is_asked_outside_of_a_graph(make):
    """Dynamo gives up the function, and tries what is called in it: each question would have the answer of the first one."""
    torch.compiler.reset()
    weight = make(0)
    want = weight.dtype, weight.shape, weight.device, weight.is_contiguous(), weight.is_floating_point()

    def asked(x):
        torch._dynamo.graph_break()
        for _ in range(1):  # a break in a loop, for which the function is given up
            torch._dynamo.graph_break()
            found = weight.dtype, weight.shape, weight.device, weight.is_contiguous(), weight.is_floating_point()
        return x + 1, found

    assert torch.compile(asked, backend="eager")(torch.ones(2))[1] == want


def test_an_int8_layer_whose_weight_lost_its_scales_is_one_graph():
    """FSDP replaces a weight by one without attributes, and the layer remembers the scales."""
    torch.compiler.reset()
    layer, x = layer_8bit(), torch.ones(2, K, dtype=BF16)
    with torch.no_grad(), bnbref.eager():
        want = layer(x)
        layer.weight = Int8Params(layer.weight.data, requires_grad=False)
        assert layer._known is None
        assert same_bits(torch.compile(layer, backend="eager", fullgraph=True)(x), want)


@pytest.mark.parametrize("make", [layer_4bit, layer_8bit])
def test_equal_blocks_share_a_graph(make):
    """As the blocks of a model that are compiled one by one."""
    torch.compiler.reset()
    blocks, graphs = [Block(make()) for _ in range(4)], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.ones(2, K, dtype=BF16)
    with torch.no_grad(), bnbref.eager():
        for seed, block in enumerate(blocks):
            block.layer.weight = weight_4bit(seed) if make is layer_4bit else weight_8bit(seed)
            block.compile(backend=backend)
            want = Block.forward(block, x)
            assert same_bits(block(x), want)
    assert len(graphs) == 1


@pytest.mark.parametrize("make", [layer_4bit, layer_8bit])
def test_layers_that_exchange_their_weights(make):
    torch.compiler.reset()
    pair = nn.Sequential(make(), make())
    pair[1].weight = (weight_4bit if make is layer_4bit else weight_8bit)(5)
    pair[1].bias = nn.Parameter(pair[0].bias.detach().clone(), requires_grad=False)

    def forward(x):
        return pair[0](x), pair[1](x)

    graph, x = torch.compile(forward, backend="eager", fullgraph=True), torch.ones(2, K, dtype=BF16)
    with torch.no_grad(), bnbref.eager():
        first, second = graph(x)
        tables = pair[0]._parameters, pair[1]._parameters
        tables[0]["weight"], tables[1]["weight"] = tables[1]["weight"], tables[0]["weight"]
        assert all(map(same_bits, graph(x), (second, first)))


@pytest.mark.parametrize(("make", "scales"), [(layer_4bit, "quant_state"), (layer_8bit, "SCB")])
def test_scales_that_are_deleted(make, scales):
    torch.compiler.reset()
    block, x = Block(make()), torch.ones(2, K, dtype=BF16)
    graph = torch.compile(block, backend="eager")
    with torch.no_grad(), bnbref.eager():
        graph(x)
        delattr(block.layer.weight, scales)
        assert not block.layer._known


@pytest.mark.parametrize("threshold", [2, fractions.Fraction(2), np.float32(2), np.int64(2)])
def test_a_threshold_of_any_type_is_that_number(threshold):
    """A graph holds a float of Python alone."""
    torch.compiler.reset()
    layer, want = Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold), layer_8bit()
    layer.load_state_dict(want.state_dict())
    layer, x = layer.requires_grad_(False).to(DEVICE), torch.ones(2, K, dtype=BF16)
    with torch.no_grad(), bnbref.eager():
        assert same_bits(torch.compile(layer, backend="eager", fullgraph=True)(x), want(x))
