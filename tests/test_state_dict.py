"""State dicts: bitsandbytes' keys and bytes, loaded whole or refused."""

import copy
import gc
import itertools
import math
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import assume, given
from hypothesis import strategies as st
from layers import BF16, F16, F32, argument, fill, layers, linear4, linear8, raw, raw_weight, unquantized
from safetensors.torch import load_file, load_model, save_model
from torch import nn

import bnbref
from bnbref.nn import Embedding8bit, Linear4bit, Linear8bitLt
from bnbref.nn.parametrize import replace_parameter_4bit

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"


@pytest.fixture(autouse=True)
def _eager():
    with bnbref.eager():
        yield


def raws(state_dict):
    return {key: raw(value) for key, value in state_dict.items()}


# ---- keys and bytes -------------------------------------------------------------------------------------------------


def _listing(layer):
    rows = ((k, str(v.dtype)[6:], "" if "quant_state" in k else list(v.shape)) for k, v in layer.state_dict().items())
    return "\n".join(f"{key} {dtype} {shape}".rstrip() for key, dtype, shape in rows)


def test_keys_dtypes_and_shapes_of_4_bits():
    assert_expected_inline(
        _listing(linear4(64, 128, dtype=BF16, quant_type="nf4")),
        """\
weight uint8 [4096, 1]
bias bfloat16 [64]
weight.absmax uint8 [128]
weight.quant_map float32 [16]
weight.nested_absmax float32 [1]
weight.nested_quant_map float32 [256]
weight.quant_state.bitsandbytes__nf4 uint8""",
    )
    assert_expected_inline(
        _listing(linear4(64, 128, bias=False, compress_statistics=False, quant_storage=BF16)),
        """\
weight bfloat16 [2048, 1]
weight.absmax float32 [128]
weight.quant_map float32 [16]
weight.quant_state.bitsandbytes__fp4 uint8""",
    )


def test_keys_dtypes_and_shapes_of_8_bits():
    listing = _listing(linear8(64, 128))
    assert_expected_inline(
        listing,
        """\
weight int8 [64, 128]
bias float32 [64]
SCB float32 [64]
weight_format uint8 []""",
    )
    assert linear8().state_dict()["weight_format"].item() == 0
    assert list(Linear8bitLt(64, 32).to("cpu").state_dict()) == ["weight", "bias"]
    assert list(Linear8bitLt(64, 32, has_fp16_weights=False).state_dict()) == ["weight", "bias"]


def test_the_json_has_pythons_spacing_and_bitsandbytes_order():
    with torch.no_grad():
        layer = Linear4bit(64, 64, quant_type="nf4").to(BF16)
        layer.weight.fill_(1.5)
    blob = layer.to("cpu").state_dict()["weight.quant_state.bitsandbytes__nf4"]
    assert_expected_inline(
        bytes(blob.tolist()).decode(),
        """{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64], \
"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.5}""",
    )


def _checkpoint_layers(name, make):
    """Each layer of a checkpoint of the real bitsandbytes: its entries, the float weight, and a layer for it."""
    entries, base = (
        load_file(CHECKPOINTS / name / "model.safetensors"),
        load_file(CHECKPOINTS / "base" / "model.safetensors"),
    )
    for key in sorted(entries):
        if key.endswith(".weight") and entries[key].dtype in (torch.uint8, torch.int8):
            prefix = key.removesuffix("weight")
            own = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
            n, k = base[key].shape
            yield own, base[key], make(k, n)


FIXTURES = {
    "nf4_plain": lambda k, n: Linear4bit(k, n, False, quant_type="nf4", compress_statistics=False),
    "nf4_nested": lambda k, n: Linear4bit(k, n, False, quant_type="nf4"),
    "int8": lambda k, n: Linear8bitLt(k, n, False, has_fp16_weights=False),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_checkpoints_of_bitsandbytes_are_loaded_and_saved_unchanged(name):
    count = 0
    for entries, _, layer in _checkpoint_layers(name, FIXTURES[name]):
        layer.load_state_dict(entries)
        assert raws(layer.state_dict()) == raws(entries)
        count += 1
    assert count == 14


@pytest.mark.parametrize("name", FIXTURES)
def test_float_weights_become_the_bytes_of_bitsandbytes(name):
    for entries, weight, layer in _checkpoint_layers(name, FIXTURES[name]):
        layer.load_state_dict({"weight": weight}, assign=True)
        got = layer.to("cpu").state_dict()
        assert got.keys() == entries.keys()
        unequal = {key: got[key].int() - entries[key].int() for key in got if raw(got[key]) != raw(entries[key])}
        if name == "nf4_nested":
            # bitsandbytes encoded the scales on a CPU, by a table of 65,536 bins that is off at ties; and the mean that they
            # are taken from is a float sum, in an order that the CPU's vectors give. So: one step.
            assert unequal.pop("weight.absmax", torch.zeros(1)).abs().max() <= 1
            loose = {key for key in unequal if key == "weight.nested_absmax" or "quant_state" in key}
            unequal = {key: value for key, value in unequal.items() if key not in loose}
        assert not unequal


# ---- whole, or refused ----------------------------------------------------------------------------------------------


def _of_weight(layer, state_dict):
    return [key for key in state_dict if key != "bias"]


@given(layer=layers(), data=st.data(), strict=st.booleans(), assign=st.booleans(), quantized=st.booleans())
def test_a_part_of_a_quantized_weight_is_refused_and_changes_nothing(layer, data, strict, assign, quantized):
    whole = layer.state_dict()
    keys = _of_weight(layer, whole)
    kept = data.draw(st.sets(st.sampled_from(keys), min_size=1, max_size=len(keys) - 1))
    assume(kept | {"weight_format"} != {*keys, "weight_format"})  # that one alone may be missing
    into = fill(unquantized(layer), 77)
    into = into.to("cpu") if quantized else into
    before = raw_weight(into)
    with pytest.raises(RuntimeError, match="weight"):
        into.load_state_dict(
            {key: whole[key] for key in whole if key in kept or key == "bias"}, strict=strict, assign=assign
        )
    assert raw_weight(into) == before


DAMAGE = {
    "a code too few": lambda key, value: value[:-1] if value.dim() else None,
    "another dtype": lambda key, value: value.to(torch.float64 if value.is_floating_point() else torch.int16),
    "NaN": lambda key, value: torch.full_like(value, float("nan")) if value.is_floating_point() else None,
    "not a tensor": lambda key, value: None if key == "weight_format" else "bytes",
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("make", [linear4, lambda: linear4(compress_statistics=False), linear8])
def test_damaged_entries_are_refused_and_change_nothing(how, make):
    layer, whole = make(), make().state_dict()
    before = raw_weight(layer)
    for key in _of_weight(layer, whole):
        damaged = DAMAGE[how](key, whole[key])
        if damaged is None or (key == "weight_format" and how == "another dtype"):
            continue
        with pytest.raises(RuntimeError, match="Error\\(s\\) in loading"):
            layer.load_state_dict({**whole, key: damaged}, strict=False)
        assert raw_weight(layer) == before, key


@pytest.mark.parametrize("strict", [True, False])
def test_unknown_keys_beside_the_weight_are_refused(strict):
    layer = linear4()
    with pytest.raises(RuntimeError, match=r"weight\.zero_point|zero_point"):
        layer.load_state_dict({**layer.state_dict(), "weight.zero_point": torch.ones(1)}, strict=strict)
    layer = linear8()
    result = layer.load_state_dict({**layer.state_dict(), "zero_point": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["zero_point"]


def test_weights_of_another_shape_are_refused():
    for make in (linear4, linear8):
        with pytest.raises(RuntimeError, match=r"weight must have the shape \[32, 64\], got \[32, 32\]"):
            make().load_state_dict(make(32, 32).state_dict())
        with pytest.raises(RuntimeError, match=r"weight must (have the shape|be float) \[32, 64\].*\[32, 32\]"):
            make().load_state_dict({"weight": torch.ones(32, 32), "bias": torch.ones(32)})


def test_all_bad_layers_of_a_model_are_named():
    model = nn.Sequential(linear4(64, 64), nn.Sequential(linear8(64, 64)), linear4(64, 64))
    state_dict = {k: v for k, v in model.state_dict().items() if k not in ("0.weight.absmax", "1.0.SCB")}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state_dict, strict=False)
    assert_expected_inline(
        str(error.value).replace("\t", "    "),
        """\
Error(s) in loading state_dict for Sequential:
    0: weight: a 4-bit weight needs absmax, nested_absmax, nested_quant_map, quant_map, \
quant_state.bitsandbytes__<quant_type> beside it, got nested_absmax, nested_quant_map, quant_map, \
quant_state.bitsandbytes__fp4
    1.0: weight: int8 [64, 64] is a quantized weight, but its scales are missing""",
    )


def test_missing_and_unexpected_keys_are_told_as_ever():
    for layer in (linear4(), linear8()):
        result = layer.load_state_dict({"bias": torch.ones(32), "adapter": torch.ones(1)}, strict=False)
        assert (result.missing_keys, result.unexpected_keys) == (["weight"], ["adapter"])
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
            layer.load_state_dict({"bias": torch.ones(32)})
        assert (layer.bias == 1).all()


@pytest.mark.parametrize("make", [Linear4bit, Linear8bitLt])
def test_meta_needs_assign(make):
    with pytest.raises(RuntimeError, match="weight is on the meta device: load_state_dict needs assign=True"):
        make(64, 32, False, device="meta").load_state_dict(make(64, 32, False).state_dict())


# ---- float weights --------------------------------------------------------------------------------------------------


@given(layer=layers(), assign=st.booleans(), meta=st.booleans())
def test_a_float_weight_is_loaded_into_a_float_layer(layer, assign, meta):
    source = fill(unquantized(layer), 5)
    into = unquantized(layer, "meta" if meta and assign else "cpu")
    into.load_state_dict(source.state_dict(), assign=assign)
    assert raw_weight(into) == raw_weight(source)
    assert raw_weight(into.to("cpu")) == raw_weight(source.to("cpu"))


@given(layer=layers())
def test_a_float_weight_is_quantized_by_a_quantized_layer(layer):
    source = fill(unquantized(layer), 5)
    settings = {k: v for k, v in vars(layer.weight).items() if k not in ("quant_state", "SCB")}
    layer.load_state_dict(source.state_dict())
    assert {k: v for k, v in vars(layer.weight).items() if k not in ("quant_state", "SCB")} == settings
    want = type(layer.weight)(source.weight.data, **{**settings, "bnb_quantized": False}).to("cpu")
    assert raw(layer.weight.data) == raw(want.data)
    layer(argument(layer))


def test_a_float_weight_that_is_not_finite_is_refused():
    for layer in (linear4(), linear8()):
        before = raw_weight(layer)
        with pytest.raises(RuntimeError, match="64 of its elements are NaN or infinite"):
            layer.load_state_dict(
                {"weight": torch.full((32, 64), 1.0).index_fill(0, torch.tensor(3), torch.inf)}, strict=False
            )
        assert raw_weight(layer) == before


# ---- what else a layer may meet -------------------------------------------------------------------------------------


def test_loading_copies_and_assigning_does_not():
    for make in (linear4, linear8):
        source = make(seed=1)
        copied, assigned = make(), make()
        kept = copied.weight
        copied.load_state_dict(source.state_dict())
        assigned.load_state_dict(source.state_dict(), assign=True)
        assert copied.weight is kept
        assert assigned.weight.data_ptr() == source.weight.data_ptr() != copied.weight.data_ptr()
        tensors = [t.data_ptr() for t in source.state_dict().values()]
        own = [copied.weight.SCB] if isinstance(copied, Linear8bitLt) else copied.quant_state.tensors()
        assert not {t.data_ptr() for t in own} & set(tensors)


@pytest.mark.parametrize(("layout", "fine"), [(None, True), (0, True), ("row", True), (torch.tensor(0), True)] + [
    (bad, False) for bad in (1, 2, 3, 4, "col32", "col_turing", "col_ampere", torch.tensor(2, dtype=torch.uint8), torch.ones(2))
])  # fmt: skip
@pytest.mark.parametrize("make", [linear8, lambda: Embedding8bit(32, 64).to("cpu")])
def test_layouts_of_int8(layout, fine, make):
    layer, source = make(), make().state_dict()
    del source["weight_format"]
    if layout is not None:
        source["weight_format"] = layout
    if fine:
        assert not any(layer.load_state_dict(source))
    else:
        with pytest.raises(RuntimeError, match="weight_format must be 0 or 'row', the only layout left, got"):
            layer.load_state_dict(source)


def test_a_layer_that_trains_its_weight_takes_no_codes():
    layer = Linear8bitLt(64, 32)
    with pytest.raises(RuntimeError, match="this layer keeps a float weight"):
        layer.load_state_dict(linear8().state_dict())


def test_pre_hooks_see_the_whole_state_dict():
    layer, source = linear4(), {f"old_{k}": v for k, v in linear4(seed=1).state_dict().items()}

    def rename(module, state_dict, prefix, *rest):
        for key in list(state_dict):
            state_dict[prefix + key.removeprefix(prefix).removeprefix("old_")] = state_dict.pop(key)

    layer.register_load_state_dict_pre_hook(rename)
    layer.load_state_dict(source)
    assert raw_weight(layer) == raw_weight(linear4(seed=1))


@pytest.mark.parametrize("make", [linear4, linear8])
def test_scales_of_its_own_may_come_without_the_frozen_weight(make):
    """A checkpoint of adapters, by Trainer under DeepSpeed: without the parameters that are frozen, which scales are not."""
    layer, other = make(), make(seed=1)
    before = raw_weight(layer)

    def trained(source):
        frozen = [name for name, p in source.named_parameters() if not p.requires_grad]
        return {name: value.clone() for name, value in source.state_dict().items() if name not in frozen}

    assert layer.load_state_dict(trained(make()), strict=False).missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"\. $'):
        layer.load_state_dict(trained(make()))
    some = dict(list(trained(make()).items())[:-1])
    for wrong in (trained(other), some):
        with pytest.raises(RuntimeError, match=r"weight is missing, but its .* are there"):
            layer.load_state_dict({**wrong, "bias": layer.bias}, strict=False)
    assert raw_weight(layer) == before


@pytest.mark.parametrize("make", [linear4, linear8])
def test_the_very_codes_may_come_without_their_scales(make):
    """torch completes a full state dict of adapters by the frozen parameters of the model that it is loaded into."""
    layer = make()
    before = raw_weight(layer)
    found = layer.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    with pytest.raises(RuntimeError, match=r"SCB|its scales are missing|must have the shape"):
        layer.load_state_dict({"weight": layer.weight.data.clone(), "bias": layer.bias}, strict=False)
    assert raw_weight(layer) == before


@pytest.mark.parametrize("make", [linear4, linear8])
def test_a_pre_hook_sees_the_weight_and_may_replace_it(make):
    """The layers of Lightning quantize in such a hook. It found None in place of the weight."""
    layer, other, seen = make(), make(seed=1), []

    def replace(module, *rest):
        seen.append(raw_weight(module))
        module.weight = other.weight

    layer.register_load_state_dict_pre_hook(replace)
    before = [raw_weight(layer)]
    layer.load_state_dict({"bias": other.bias}, strict=False)
    assert seen == before
    assert raw_weight(layer) == raw_weight(other)
    layer.load_state_dict({"bias": other.bias}, strict=False)
    assert len(seen) == 2


@pytest.mark.parametrize("keep_vars", [True, False])
def test_nothing_that_is_saved_needs_a_gradient_but_parameters(keep_vars):
    for layer in (linear4(), linear8()):
        for key, value in layer.state_dict(keep_vars=keep_vars).items():
            assert value.requires_grad is (keep_vars and key == "bias")
            assert isinstance(value, nn.Parameter) is (keep_vars and key in ("weight", "bias"))


def test_no_two_entries_of_a_model_share_memory():
    # safetensors refuses shared memory; tables of values are one tensor in memory.
    model = nn.Sequential(*(linear4(64, 64, quant_type=t) for t in ("nf4", "fp4", "nf4")), linear8(64, 64))
    pointers = [value.untyped_storage().data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_what_the_file_says_holds():
    for dtype, storage, quant_type in itertools.product([F32, F16], [torch.uint8, F32], ["nf4", "fp4"]):
        layer = linear4(dtype=dtype, quant_storage=storage, quant_type=quant_type, compress_statistics=False)
        into = Linear4bit(64, 32).to("cpu")
        into.load_state_dict(layer.state_dict())
        assert raw_weight(into) == raw_weight(layer)
        assert into.quant_state.dtype == dtype


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [lambda: Linear8bitLt(8, 4, has_fp16_weights=False), lambda: Linear4bit(8, 4)])
def test_a_weight_that_is_tied_to_a_float_one_is_loaded_as_one(make, assign):
    layer, table = make(), nn.Embedding(4, 8)
    layer.weight = table.weight
    assert list(layer.state_dict()) == ["weight", "bias"]
    values = torch.randn(4, 8)
    layer.load_state_dict({"weight": values, "bias": torch.ones(4)}, assign=assign)
    assert torch.equal(layer.weight, values)
    assert layer.weight.requires_grad
    assert assign or layer.weight is table.weight
    for file in (linear8(4, 8).state_dict(), linear4(4, 8).state_dict()):
        with pytest.raises(RuntimeError, match="weight is a Parameter, not a quantized parameter"):
            layer.load_state_dict(file)


# ---- files ----------------------------------------------------------------------------------------------------------


@given(layers())
def test_state_dicts_hold_no_views_of_longer_storages(layer):
    """safetensors refuses to save such views, and torch.save writes all that is behind them."""
    for value in layer.state_dict().values():
        assert value.untyped_storage().nbytes() == value.nbytes
    model = nn.Sequential(layer)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/model.safetensors")
        fresh = nn.Sequential(unquantized(layer).to("cpu"))
        assert load_model(fresh, f"{folder}/model.safetensors") == (set(), [])
    assert raws(fresh.state_dict()) == raws(model.state_dict())


@given(layers(), st.booleans(), st.permutations(["a", "b", "c"]))
def test_layers_that_share_a_weight_come_back_through_a_file_of_safetensors(layer, quantized, names):
    """The file has the shared weight once, under the name that safetensors chooses; beside it stands one that is not shared."""
    first, second, third = names

    def model(shared, other):
        other_of_it = copy.copy(shared)  # with the same weight, and parameters of its own
        other_of_it._parameters = dict(shared._parameters)
        return nn.ModuleDict(dict(sorted({first: shared, second: other_of_it, third: other}.items())))

    tied = model(layer, copy.deepcopy(layer))
    with tempfile.TemporaryDirectory() as folder:
        save_model(tied, f"{folder}/model.safetensors")
        kept = [key for key in load_file(f"{folder}/model.safetensors") if key.startswith((first, second))]
        assert len(kept) == len(layer.state_dict())
        fresh = [fill(unquantized(layer), seed) for seed in (1, 2)]
        if quantized:
            fresh = [new.to("cpu") for new in fresh]
        again = model(*fresh)
        assert load_model(again, f"{folder}/model.safetensors") == (set(), [])
    assert raws(again.state_dict()) == raws(tied.state_dict())
    assert again[first].weight is again[second].weight


@given(
    st.sampled_from([(3, 5, 7), (2, 64), (1, 1), (4, 16, 64)]), st.booleans(), st.sampled_from([16, 64, 100]),
)  # fmt: skip
def test_neither_do_those_of_parametrized_modules(shape, nested, blocksize):
    module = nn.Module()
    module.up = nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
    replace_parameter_4bit(module, "up", compress_statistics=nested, blocksize=blocksize)
    for value in module.state_dict().values():
        assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("make", [linear4, linear8])
def test_a_state_dict_keeps_no_scales_of_a_weight_that_was_moved(make):
    """As when a model is taken from a GPU after it was saved: the memory of its scales there is free."""
    layer = make()
    scales = {name: weakref.ref(t) for name, t in layer.state_dict().items() if name not in ("weight", "bias")}
    layer._apply(torch.clone)
    gc.collect()
    assert [name for name, t in scales.items() if t() is not None] == []


@pytest.mark.parametrize("make", [linear4, linear8])
def test_a_layer_is_whole_while_it_is_moved(make):
    """Another thread may compute with it. What `_apply` calls for the bias stands for that thread."""
    layer = make()
    x = argument(layer)
    before, seen = layer(x), []

    def look(tensor):
        seen.append(torch.equal(layer(x), before))
        return tensor.clone()

    layer._apply(look)
    assert seen
    assert all(seen)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("make", [Linear4bit, Linear8bitLt])
def test_extra_state_is_loaded_into_the_layer_itself(make):
    class Counted(make):
        count = 0

        def get_extra_state(self):
            return self.count, self.weight.shape

        def set_extra_state(self, state):
            self.count, shape = state
            assert shape == self.weight.shape
            self.bias = nn.Parameter(self.bias.detach() + 1)

    settings = {"has_fp16_weights": False} if make is Linear8bitLt else {}
    layer, other = (Counted(64, 64, **settings).to("cpu") for _ in range(2))
    layer.count = 7
    for assign in (False, True):
        other.load_state_dict(layer.state_dict(), assign=assign)
        assert other.count == 7
        assert torch.equal(other.bias, layer.bias + 1)


@given(st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**63 - 1, 2**63, 10**30]), max_size=4))
def test_a_state_has_a_shape_that_torch_can_have(sizes):
    """One of 0 elements, too, whose strides no index holds."""
    with bnbref.eager():
        packed, state = bnbref.functional.quantize_4bit(torch.ones(min(math.prod(sizes), 81)), quant_type="nf4")
        fields = {**state.as_dict(packed=False), "shape": sizes}
        if math.prod(sizes) <= 81 and math.prod(max(n, 1) for n in sizes) < 2**63:
            loaded = bnbref.QuantState.from_dict(fields, torch.device("cpu"))
            assert bnbref.functional.dequantize_4bit(packed, loaded).shape == tuple(sizes)
        else:
            with pytest.raises(ValueError, match=r"shape|absmax"):
                bnbref.QuantState.from_dict(fields, torch.device("cpu"))
