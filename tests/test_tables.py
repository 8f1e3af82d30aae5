"""A file says what its codes mean by tables and JSON: each is what it says it is, on every way in, or it is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import raw
from safetensors.torch import load_file, save_file
from torch import nn

import bnbref
from bnbref import checkpoint, optim
from bnbref.codebooks import DYNAMIC, FOUR_BIT, dynamic, is_table_of, linear, value_table
from bnbref.functional import dequantize_4bit, quantize_4bit
from bnbref.nn import Embedding4bit, Linear4bit, Params4bit, replace_parameter_4bit, replace_parameter_4bit_prequantized
from bnbref.optim.state_dict import WRAPPED
from bnbref.quant_state import QuantState
from bnbref.state_fields import BLOB

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _eager():
    with bnbref.eager():
        yield


def entries(quant_type="nf4", nested=True):
    """The entries `weight...` of a weight [60, 64] of which one block, and 60 scales, are a whole number of nothing."""
    weight = torch.randn(60, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = quantize_4bit(weight, compress_statistics=nested, quant_type=quant_type)
    parts = {f"weight.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
    return {"weight": packed, **parts}


def stats(found):
    return {key: value for key, value in found.items() if key != "weight"}


def from_dict(found):
    return dequantize_4bit(found["weight"], QuantState.from_dict(stats(found), device="cpu"))


def from_prequantized(found):
    weight = Params4bit.from_prequantized(found["weight"], stats(found))
    return dequantize_4bit(weight.data, weight.quant_state)


def into(make, assign):
    def read(found):
        layer = make()
        layer.load_state_dict(found, assign=assign)
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    return read


def parameter(found):
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(60, 64, dtype=torch.bfloat16))
    replace_parameter_4bit(module, "weight")
    module.load_state_dict(found)
    return module.weight


def prequantized_parameter(found):
    module = nn.Module()
    module.weight = nn.Parameter(found["weight"], requires_grad=False)
    replace_parameter_4bit_prequantized(module, "weight", stats(found))
    return module.weight


WAYS = {
    "Checkpoint": lambda found: checkpoint.Checkpoint(found).read("weight"),
    "from_dict": from_dict,
    "from_prequantized": from_prequantized,
    "float layer": into(lambda: Linear4bit(64, 60, False), assign=False),
    "quantized layer": into(lambda: Linear4bit(64, 60, False).to("cpu"), assign=False),
    "layer on meta": into(lambda: Linear4bit(64, 60, False, device="meta"), assign=True),
    "embedding": into(lambda: Embedding4bit(60, 64), assign=True),
    "parameter": parameter,
    "prequantized parameter": prequantized_parameter,
}
BELIEVED = {"blocksize", "nested_offset"}
"""Numbers of the JSON that nothing else in a file contradicts: a blocksize with which there are as many blocks, the mean."""


NAMES = ("absmax", "blocksize", "dtype", "keys of a quant state", "nested", "quant_type", "shape", "weight must hold")
"""What a refusal may name beside the key that was changed."""


def outcome(way, found):
    try:
        return WAYS[way](found)
    except (ValueError, RuntimeError) as error:  # what load_state_dict raises is a RuntimeError
        return str(error)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), way=st.sampled_from(list(WAYS)), quant_type=st.sampled_from(["nf4", "fp4"]), nested=st.booleans()
)
def test_a_changed_byte_of_a_table_or_the_json_is_refused_or_without_effect(data, way, quant_type, nested):
    whole = entries(quant_type, nested)
    want = WAYS[way](whole)
    tables = [key for key in whole if "map" in key or BLOB in key]
    key = data.draw(st.sampled_from(tables))
    changed = whole[key].clone()
    bytes_of = changed.view(torch.uint8).view(-1)
    at, by = data.draw(st.integers(0, bytes_of.numel() - 1)), data.draw(st.integers(1, 255))
    if BLOB in key and data.draw(st.booleans()):  # a digit for a digit, which JSON cannot notice
        digits = [i for i, byte in enumerate(bytes_of.tolist()) if chr(byte).isdigit()]
        at = data.draw(st.sampled_from(digits))
        by = bytes_of[at].item() ^ ord(data.draw(st.sampled_from("0123456789")))
    before = bytes(bytes_of.tolist())
    bytes_of[at] ^= by
    got = outcome(way, {**whole, key: changed})
    if isinstance(got, str):
        names = (*NAMES, key.removeprefix("weight."))
        assert any(name in got for name in names), got
        return
    if raw(got) == raw(want):
        return
    if BLOB in key:
        old, new = json.loads(before), json.loads(bytes(bytes_of.tolist()))
        differing = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        assert differing <= BELIEVED, differing
        return
    assert key == "weight.nested_quant_map"
    # The values that the file has, each within 2^-19 of what they are; scales are at most the largest one plus the offset.
    torch.testing.assert_close(
        got.float(), want.float(), rtol=2.0**-8, atol=0.0
    )  # one rounding to bfloat16 may tip over


OTHER_MAPS = {
    "reversed": value_table(DYNAMIC, CPU).flip(0),
    "unsigned": value_table(dynamic(signed=False), CPU),
    "linear": value_table(linear(), CPU),
    "zeros": torch.zeros(256),
    "a value too far": value_table(DYNAMIC, CPU) * (1 + 2.0**-18),
}


@pytest.mark.parametrize("how", OTHER_MAPS)
@pytest.mark.parametrize("way", WAYS)
def test_another_map_of_nested_scales_is_refused_by_name(way, how):
    with pytest.raises((ValueError, RuntimeError), match="nested_quant_map is not the dynamic map"):
        WAYS[way]({**entries(), "weight.nested_quant_map": OTHER_MAPS[how]})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nested_offset": -0.5}, "nested_offset must be the mean of magnitudes"),
        ({"nested_blocksize": 128}, "nested_blocksize must be 256"),
        ({"nested_blocksize": 512}, "nested_blocksize must be 256"),
    ],
)
def test_what_no_writer_writes_is_refused_by_name(way, changes, message):
    whole = entries()
    key = f"weight.{BLOB}nf4"
    text = json.dumps({**json.loads(bytes(whole[key].tolist())), **changes})
    whole[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match=message):
        WAYS[way](whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nested", [False, True])
def test_negative_scales_are_refused_by_name(way, nested):
    key = "weight.nested_absmax" if nested else "weight.absmax"
    whole = entries(nested=nested)
    whole[key][0] *= -1
    with pytest.raises((ValueError, RuntimeError), match=f"{key.removeprefix('weight.')} has scales that are negative"):
        WAYS[way](whole)


def test_a_map_that_another_torch_computed_is_read():
    """Without a fused multiply-add a product of linspace is rounded before it is added."""
    edges = [torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64).float() for i in range(7)]
    values = [0.0, 1.0]
    for exponent, edge in enumerate(edges):
        fractions = (edge[:-1] + edge[1:]) / 2 * 10 ** (exponent - 6)
        values += [*fractions.tolist(), *(-fractions).tolist()]
    theirs = torch.tensor(sorted(values), dtype=torch.float32)
    own = value_table(DYNAMIC, CPU)
    assert is_table_of(theirs, DYNAMIC)
    assert not torch.equal(theirs, own)
    state = QuantState.from_dict({**stats(entries()), "weight.nested_quant_map": theirs}, device="cpu")
    assert torch.equal(state.state2.code, theirs)  # and by these values its scales are decoded


@given(st.sampled_from([*FOUR_BIT.values(), DYNAMIC, dynamic(signed=False), linear()]), st.data())
def test_a_value_that_is_off_makes_another_table(book, data):
    table = value_table(book, CPU).clone()
    assert is_table_of(table, book)
    at = data.draw(st.sampled_from([i for i, value in enumerate(table.tolist()) if value]))
    table[at] *= 1 + data.draw(st.sampled_from([2.0**-18, -(2.0**-18), -2.0, 1.0]))
    assert not is_table_of(table, book)


# ---- transformers ---------------------------------------------------------------------------------------------------


def test_transformers_names_the_tensor(tmp_path, caplog, monkeypatch):
    transformers = pytest.importorskip("transformers")
    hf = pytest.importorskip("bnbref.integrations.hf.transformers")
    hf.take_over_bitsandbytes()
    shutil.copytree(Path(__file__).parent / "fixtures" / "checkpoints" / "nf4_nested", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight.nested_quant_map"
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    try:
        with pytest.raises(RuntimeError):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        hf.give_back_bitsandbytes()
    assert "layers.0.self_attn.q_proj.weight" in caplog.text
    assert "nested_quant_map is not the dynamic map" in caplog.text


# ---- optimizers -----------------------------------------------------------------------------------------------------


def stepped(cls, **options):
    p = nn.Parameter(torch.linspace(-1, 1, 4096))
    optimizer = cls([p], lr=1e-2, **options)
    p.grad = torch.linspace(1, -2, 4096)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.RMSprop8bit, optim.AdEMAMix8bit, optim.Lion8bit])
def test_a_map_of_other_values_is_refused_by_the_optimizer(cls):
    saved = stepped(cls).state_dict()
    wrapped = saved["state"][0][WRAPPED]
    for key in [key for key in wrapped if key.startswith("qmap")]:
        for how in ("reversed", "linear", "zeros", "a value too far"):
            wrapped_now = {**wrapped, key: OTHER_MAPS[how]}
            with pytest.raises(ValueError, match=f"saved {key} is no map of"):
                stepped(cls).load_state_dict({**saved, "state": {0: {"step": 1, WRAPPED: wrapped_now}}})


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_changed_byte_of_an_optimizers_map_is_refused_or_without_effect(data):
    saved = stepped(optim.AdamW8bit).state_dict()
    want = stepped(optim.AdamW8bit)
    want.load_state_dict(saved)
    wrapped = saved["state"][0][WRAPPED] = {k: v.clone() for k, v in saved["state"][0][WRAPPED].items()}
    key = data.draw(st.sampled_from(["qmap1", "qmap2"]))
    bytes_of = wrapped[key].view(torch.uint8)
    bytes_of[data.draw(st.integers(0, 1023))] ^= data.draw(st.integers(1, 255))
    got, refusal = stepped(optim.AdamW8bit), None
    try:
        got.load_state_dict(saved)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert f"saved {key} is no map of" in refusal
        return
    old, new = (o.state_dict()["state"][0][WRAPPED] for o in (want, got))
    assert {name: raw(value) for name, value in new.items()} == {name: raw(value) for name, value in old.items()}


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("absmax1", lambda t: -t, "saved absmax1 has scales that are no floats, NaN, infinite or negative"),
        ("absmax2", lambda t: t * float("nan"), "saved absmax2 has scales"),
        ("state1", lambda t: t.to(torch.int32), "saved state1 must be uint8 codes or floats"),
    ],
)
def test_scales_and_states_that_are_none_are_refused_by_the_optimizer(key, change, message):
    saved = stepped(optim.AdamW8bit).state_dict()
    wrapped = saved["state"][0][WRAPPED]
    wrapped[key] = change(wrapped[key])
    with pytest.raises(ValueError, match=message):
        stepped(optim.AdamW8bit).load_state_dict(saved)
