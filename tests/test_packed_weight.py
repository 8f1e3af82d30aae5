"""What a weight keeps of its products has the bits of new ones, whatever was done to the weight, its state or the call."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import as_on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import raw
from torch import nn

import bnbref
from bnbref import products
from bnbref.kernels.compiler import missing_compiler
from bnbref.nn import Linear4bit, Params4bit
from bnbref.packed_weight import PackedWeight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
COMPILED = missing_compiler("cpu") is None and bnbref.kernels.compile_enabled()
compiled = pytest.mark.skipif(not COMPILED, reason="not compiled here")


def layer(n=6, k=64, nested=False, bias=False, seed=0, **options):
    torch.manual_seed(seed)
    made = Linear4bit(k, n, bias=bias, quant_type="nf4", compress_statistics=nested, **options)
    made.load_state_dict({"weight": torch.randn(n, k)} | ({"bias": torch.randn(n)} if bias else {}))
    return made.to("cpu")


def anew(made, x):
    """The product of the layer as it is now, of which nothing was kept."""
    bias = None if made.bias is None else made.bias.to(x.dtype)
    return bnbref.matmul_4bit(x, made.weight.data, made.quant_state, bias=bias)


def check(made, x):
    with torch.no_grad():
        for _ in range(3):
            assert raw(made(x)) == raw(anew(made, x))


SHAPES = st.sampled_from([(64,), (1, 64), (1, 1, 64), (2, 1, 64), (3, 64), (2, 2, 64), (0, 64), (9, 64)])


@settings(max_examples=25)
@given(
    nested=st.booleans(),
    bias=st.booleans(),
    storage=st.sampled_from([torch.uint8, BF16, F32]),
    calls=st.lists(st.tuples(SHAPES, st.sampled_from([F32, BF16, F16])), min_size=1, max_size=4),
)
def test_a_kept_product_has_the_bits_of_a_new_one(nested, bias, storage, calls):
    made = layer(nested=nested, bias=bias, quant_storage=storage)
    for shape, dtype in calls:
        check(made, torch.randn(*shape).to(dtype))
        check(made, torch.randn(*shape[:-1], 128).to(dtype)[..., ::2])


@pytest.mark.parametrize(("n", "k", "blocksize"), [(5, 64, 64), (6, 96, 32), (3, 33, 64), (2, 64, 4096), (4, 24, 8)])
def test_weights_whose_blocks_do_not_end_with_a_row(n, k, blocksize):
    made = layer(n, k)
    packed, state = bnbref.functional.quantize_4bit(torch.randn(n, k), blocksize=blocksize, quant_type="nf4")
    made.weight = bnbref.nn.Params4bit.of_codes(packed, state)
    for rows in (1, 4):
        check(made, torch.randn(rows, k))


def other(made):
    return layer(seed=1).weight


CHANGES = {
    "another weight": lambda made: setattr(made, "weight", other(made)),
    "other scales": lambda made: setattr(made.quant_state, "absmax", torch.rand(6)),
    "scales in place": lambda made: made.quant_state.absmax.mul_(2),
    "another codebook": lambda made: setattr(made.quant_state, "quant_type", "fp4"),
    "another state": lambda made: setattr(made.weight, "quant_state", copy.deepcopy(other(made).quant_state)),
    "data": lambda made: setattr(made.weight, "data", other(made).detach()),
    "codes in place": lambda made: made.weight.data.fill_(0x35),
    "a state dict": lambda made: made.load_state_dict(other_layer().state_dict()),
    "a state dict, assigned": lambda made: made.load_state_dict(other_layer().state_dict(), assign=True),
    "a state dict of floats": lambda made: made.load_state_dict({"weight": torch.randn(6, 64)}),
    "a move": lambda made: made.to("cpu"),
    "a bias": lambda made: setattr(made, "bias", nn.Parameter(torch.randn(6))),
    "a bias of another dtype": lambda made: setattr(made, "bias", nn.Parameter(torch.randn(6, dtype=BF16))),
}


def other_layer():
    return layer(seed=2)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_kept_is_void_when_something_changes(change, rows):
    made, x = layer(), torch.randn(rows, 64)
    check(made, x)
    CHANGES[change](made)
    check(made, x)


@pytest.mark.parametrize("field", ["absmax", "code", "offset"])
def test_of_nested_scales_too(field):
    made, x = layer(nested=True), torch.randn(1, 64)
    check(made, x)
    state = made.quant_state
    if field == "offset":
        state.offset = state.offset + 1
    else:
        setattr(state.state2, field, getattr(state.state2, field) * 2)
    check(made, x)


@pytest.mark.parametrize("around", [contextlib.nullcontext, as_on_gpu], ids=["cpu", "as on a GPU"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("which", ["absmax", "nested absmax", "second absmax", "nested code"])
def test_other_memory_under_the_same_scales_is_seen(which, rows, around):
    """`scales.data = `, as some who offload do; also as a GPU keeps its arguments."""
    if around is as_on_gpu and rows == 1 and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        pytest.skip("Inductor of torch 2.11 cannot compile the kernel of GPUs for a CPU")
    made, x = layer(n=256, k=128, nested=" " in which), torch.randn(rows, 128)
    with around():
        seen_to_follow(which, made, x)


def seen_to_follow(which, made, x):
    state = made.quant_state
    if state.state2 is not None:  # a table of its own: the codebook's is everybody's
        state.state2.code = state.state2.code.clone()
    check(made, x)
    scales = {
        "absmax": state.absmax, "nested absmax": state.absmax, "second absmax": state.state2 and state.state2.absmax,
        "nested code": state.state2 and state.state2.code,
    }[which]  # fmt: skip
    scales.data = scales.flip(0).clone()
    check(made, x)


@compiled
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_few_rows_refuse_what_many_refuse(nested, kept):
    """Codes and scales that do not fit the shape: by a sentence that names them, and not torch's about a view."""
    made = layer(nested=nested)
    packed, state = made.weight.data, made.quant_state
    wrong = {
        "packed": (packed[:-1], state),
        "absmax": (packed, state.map(torch.clone)),
        "device": (packed, state.map(torch.clone)),
        "dtype": (packed, state.map(torch.clone)),
    }
    wrong["absmax"][1].absmax = state.absmax[:-1]
    wrong["device"][1].absmax = state.absmax.to("meta")
    # Also as a nested state has its codes, which lost what undoes them.
    wrong["dtype"][1].absmax, wrong["dtype"][1].state2 = torch.ones(6, dtype=torch.uint8), None
    for name, message in (
        ("packed", r"packed must hold 192 bytes for shape \(6, 64\), got 191"),
        ("absmax", "absmax must have one scale per block: 6 for 384 elements in blocks of 64, got 5"),
        ("device", "absmax2? must be on the device of (packed, cpu, got meta|codes, meta, got cpu)"),
        ("dtype", "absmax must be float32, float16 or bfloat16, got torch.uint8"),
    ):
        codes, other = wrong[name]
        weight = Params4bit.of_codes(codes, other) if kept else codes
        for rows in (1, 3):
            with pytest.raises(ValueError, match=message):
                bnbref.matmul_4bit(torch.ones(rows, 64), weight, other)


def test_a_call_with_other_weights_does_not_use_what_is_kept():
    made, x = layer(), torch.randn(1, 64)
    check(made, x)
    with torch.no_grad():
        got = torch.func.functional_call(made, dict(layer(seed=1).named_parameters()), (x,))
    assert raw(got) == raw(anew(layer(seed=1), x))
    check(made, x)


@compiled
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_training_step_is_a_call_of_what_is_kept(rows, dtype, autocast, monkeypatch):
    """Its bits and gradient are those of a product that keeps nothing, also of inputs that are cast and under autocast."""
    made, x = layer(nested=True, compute_dtype=BF16), torch.randn(rows, 64).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        y = products.matmul_4bit(x.to(BF16), made.weight.data.clone(), made.quant_state).to(dtype)
    (want,) = torch.autograd.grad(y.sum(), x)
    monkeypatch.setattr("bnbref.nn.linear.matmul_4bit", None)  # what a call comes to that is not prepared
    for _ in range(3):
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            got = made(x)
        assert raw(got) == raw(y)
        assert raw(torch.autograd.grad(got.sum(), x)[0]) == raw(want)


@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_under_way_around_a_call_is_honoured(rows):
    made, x = layer(bias=True), torch.randn(rows, 64)
    check(made, x)
    with bnbref.eager():
        check(made, x)
    with bnbref.batch_invariant():
        check(made, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        assert made(x.bfloat16()).dtype == BF16
        assert raw(made(x.bfloat16())) == raw(anew(made, x.bfloat16()))
    with torch.inference_mode():
        assert raw(made(x)) == raw(anew(made, x))
    check(made, x)
    got = torch.func.vmap(made)(x[:, None])
    assert torch.allclose(got[:, 0], anew(made, x), atol=1e-4)  # other orders of 64 summands of about 1
    y = made(x.requires_grad_())
    y.sum().backward()
    with torch.no_grad():
        want = made.quant_state.dequantize(made.weight.data, F32).sum(0)
    assert torch.allclose(x.grad, want.expand_as(x), atol=1e-5)  # six summands of about 1


@compiled
def test_a_second_call_is_a_call_of_compiled_code(monkeypatch):
    """What is kept is in use: neither the checks of a product nor the door's look at its arguments are run again."""
    made, x = layer(), torch.randn(1, 64)
    check(made, x)

    def fail(*args, **kwargs):
        raise AssertionError("not prepared")

    monkeypatch.setattr(products, "matmul_4bit", fail)
    monkeypatch.setattr(bnbref.kernels.Kernel, "__call__", fail)
    with torch.no_grad():
        made(x)


@pytest.mark.parametrize("nested", [False, True])
def test_a_trace_neither_reads_nor_leaves_what_is_kept(nested):
    """A graph that were guarded by it, or broken at it, would be compiled anew, or run in pieces without a CUDA graph."""
    model, x = nn.Sequential(layer(64, 64, nested), layer(64, 64, nested, seed=1)), torch.randn(1, 64)
    with torch.no_grad():
        for _ in range(2):
            found = torch._dynamo.explain(model)(x)
            assert (found.graph_count, found.graph_break_count) == (1, 0)
            assert not [
                guard.name for guard in found.out_guards if "state._kept" in guard.name or "_changed" in guard.name
            ]
            assert raw(model(x)) == raw(anew(model[1], anew(model[0], x)))


@compiled
def test_codes_that_come_from_elsewhere_each_time_share_what_their_state_keeps(monkeypatch):
    """FSDP gathers the codes into new memory for each product."""
    made = layer(32, 64)
    x, state, codes = torch.randn(4, 64, requires_grad=True), made.quant_state, made.weight.data
    made._parameters["weight"] = nn.Parameter(codes.clone(), requires_grad=False)
    want = made(x)
    made(x)
    monkeypatch.setattr(bnbref.kernels.Kernel, "__call__", None)
    made._parameters["weight"] = nn.Parameter(codes.clone(), requires_grad=False)
    assert raw(made(x)) == raw(want)
    made._parameters["weight"] = nn.Parameter(codes[:-1].clone(), requires_grad=False)
    with pytest.raises(ValueError, match="packed must hold 1024 bytes"):
        made(x)
    assert state.cache()
    assert not copy.deepcopy(state).cache()


@compiled
@pytest.mark.parametrize("nested", [False, True])
def test_decoded_weights_of_gradients_are_kept_too(nested, monkeypatch):
    made, x = layer(512, 64, nested=nested), torch.randn(4, 64, requires_grad=True)  # two whole blocks of nested scales
    made(x).sum().backward()
    monkeypatch.setattr(bnbref.kernels.Kernel, "__call__", None)
    want, x.grad = x.grad, None
    made(x).sum().backward()
    assert raw(x.grad) == raw(want)


def test_what_is_kept_does_not_follow_the_weight():
    made, x = layer(), torch.randn(1, 64)
    check(made, x)
    assert isinstance(made.weight.products, PackedWeight) or not COMPILED
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied.weight.products is None
        check(copied, x)
    assert "products" not in made.weight.__dict__  # accelerate makes keywords of these


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("lost", ["codes", "absmax", "offset"])
def test_memory_that_was_freed_is_named_and_not_read(lost, rows):
    """FSDP1 frees the weights of a module outside of its forward. Compiled code would read what is there, and end the process."""
    made, x = layer(nested=True), torch.randn(rows, 64, requires_grad=True)
    made(x)
    y = made(x)
    memory = (made.weight.data if lost == "codes" else getattr(made.quant_state, lost)).untyped_storage()
    kept, size = memory.clone(), memory.nbytes()
    for left in (0, size // 2):
        memory.resize_(left)
        for call in (lambda: made(x), y.sum().backward, torch.no_grad()(lambda: made(x.detach()))):
            with pytest.raises(ValueError, match=f"needs [0-9]+ bytes, and its storage has {left}: it was freed"):
                call()
    memory.resize_(size)  # as FSDP does before the next forward
    memory.copy_(kept)
    assert raw(made(x)) == raw(y)
    made(x).sum().backward()


@pytest.mark.parametrize("rows", [1, 4])
def test_an_activation_or_a_bias_that_was_freed_is_named(rows):
    made, x = layer(nested=True, bias=True), torch.randn(rows, 64)
    for _ in range(3):
        made(x)
    assert made(x[:0]).shape == (0, made.out_features)  # without memory, as it should be
    for name, tensor in (("A", x), ("bias", made.bias)):
        tensor.untyped_storage().resize_(0)
        with pytest.raises(
            ValueError, match=f"^{name} of shape .* needs [0-9]+ bytes, and its storage has 0: it was freed"
        ):
            made(torch.randn(rows, 64) if name == "bias" else x)


def test_what_is_kept_frees_the_codes_with_the_weight():
    """Offloading puts a weight on the meta device in the place of the codes, and the codes must be gone."""
    made, x = layer(), torch.randn(1, 64)
    check(made, x)
    codes = weakref.ref(made.weight.data.untyped_storage())
    alive = weakref.ref(made.weight)
    made._parameters["weight"] = made.weight.to("meta")
    gc.collect()
    assert alive() is None
    assert codes() is None
    with pytest.raises((RuntimeError, ValueError)):
        made(x)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_kept_frees_the_codes_at_once(rows, nested):
    """Not when the collector of cycles comes by: offloading makes new parameters in every forward."""
    gc.disable()
    try:
        made, x = layer(64, 64, nested), torch.randn(rows, 64)
        check(made, x)
        alive = weakref.ref(made.weight), weakref.ref(made.weight.data.untyped_storage()), weakref.ref(made.quant_state)
        made._parameters["weight"] = None
        made._remembered = None
        assert [one() for one in alive] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("n", [6, 64])
def test_writes_in_place_are_seen_whatever_was_copied_to_align_it(n, rows):
    made, x = layer(n, 64, nested=True), torch.randn(rows, 64)
    codes = torch.cat([torch.zeros(1, dtype=torch.uint8), made.weight.data.view(-1)])[1:].view(-1, 1)  # an odd offset
    made.weight = bnbref.nn.Params4bit.of_codes(codes, made.quant_state)
    check(made, x)
    state = made.quant_state
    state.state2.code = state.state2.code.clone()  # the table is one for all weights
    check(made, x)
    for tensor in (state.absmax, codes):
        tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8))
        check(made, x)
    for tensor in (state.state2.absmax, state.state2.code, state.offset):
        tensor.mul_(1.5)
        check(made, x)


def test_a_bias_that_is_a_negative_view():
    made, x = layer(bias=True), torch.randn(1, 64)
    made.bias.requires_grad_(False)
    check(made, x)
    made._parameters["bias"] = None
    made._parameters["bias"] = torch._neg_view(torch.full((6,), 5.0))
    check(made, x)
    check(made, torch._neg_view(x))


def test_a_product_in_a_graph_decodes_its_weight_once(monkeypatch):
    made, x, calls = layer(64, 64), torch.randn(4, 64), []
    name = "_decoded" if COMPILED else "decoded"
    decoded = getattr(PackedWeight, name)
    monkeypatch.setattr(PackedWeight, name, lambda *args: calls.append(1) or decoded(*args))
    graph = torch.compile(made, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            calls.clear()
            graph(x)
            assert len(calls) == 1
