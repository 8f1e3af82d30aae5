"""Checkpoints: bitsandbytes' files are read and written to the byte, and whatever is damaged is refused by name."""

import contextlib
import json
import re
import struct
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import bnbref
from bnbref import checkpoint
from bnbref.functional import dequantize_4bit, quantize_4bit

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
QUANTIZED = ("nf4_nested", "nf4_plain", "int8")
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8, "I8": np.int8}


@pytest.fixture(autouse=True)
def uncompiled(request):
    """The kernels are proven elsewhere; one test here compiles them."""
    with contextlib.nullcontext() if "compiled" in request.node.name else bnbref.eager():
        yield


def is_projection(name):
    return name.endswith("_proj.weight")


def listing(lines):
    """A paragraph for each message, without what other libraries say in their own words, and long numbers."""
    theirs = re.compile(r"(?<=UTF-8 JSON: )[^;]*|(?<=shards: )[^;]*|(?<=safetensors file: )[^;]*|(?<=\d{20})\d+")
    return "\n".join(textwrap.fill(theirs.sub("...", line), 112, subsequent_indent="    ") for line in lines)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# ---- an independent reader: the format in numpy ---------------------------------------------------------------------


def parse(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    body = data[8 + length :]
    return {
        name: np.frombuffer(body[slice(*t["data_offsets"])], NUMPY[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
    }


def to_bfloat16(x):
    """Round to nearest, ties to even: the upper 16 bits."""
    word = x.view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def weight_by_definition(raw, name):
    scb, blob = name.removesuffix("weight") + "SCB", f"{name}.quant_state.bitsandbytes__nf4"
    if scb in raw:
        return raw[name].astype(np.float32) * raw[scb][:, None] * np.float32(1 / 127)
    if blob not in raw:
        return raw[name]
    state = json.loads(raw[blob].tobytes())
    scale = raw[f"{name}.absmax"]
    if "nested_offset" in state:
        blocks = np.arange(scale.size) // state["nested_blocksize"]
        scale = raw[f"{name}.nested_quant_map"][scale] * raw[f"{name}.nested_absmax"][blocks]
        scale = scale + np.float32(state["nested_offset"])
    codes = np.stack([raw[name] >> 4, raw[name] & 15], axis=-1).reshape(-1)
    value = raw[f"{name}.quant_map"][codes] * scale.repeat(state["blocksize"])
    return to_bfloat16(value).reshape(state["shape"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["base", *QUANTIZED])
def test_read_is_the_definition(kind, compiled):
    raw = parse(FIXTURES / kind / "model.safetensors")
    weights = checkpoint.read(FIXTURES / kind)
    assert weights.keys() == parse(FIXTURES / "base" / "model.safetensors").keys()
    for name, weight in weights.items():
        want = weight_by_definition(raw, name)
        assert list(weight.shape) == list(want.shape)
        assert bits(weight).numpy().tobytes() == want.tobytes(), name


def test_read_rounds_once_to_the_dtype_asked_for():
    for kind in QUANTIZED:
        exact = checkpoint.read(FIXTURES / kind, torch.float32)
        for dtype in (torch.float16, torch.bfloat16):
            weights = checkpoint.read(FIXTURES / kind, dtype)
            assert all(torch.equal(weight, exact[name].to(dtype)) for name, weight in weights.items())


def test_integers_stay_what_they_are_whatever_dtype_is_asked_for():
    positions = torch.tensor([2**24 + 1, 2**53 + 1])  # which float32 does not have
    assert torch.equal(checkpoint.Checkpoint({"p": positions}).read("p", torch.float32), positions)


def test_entries_say_what_is_in_a_file():
    lines = []
    for kind in ("base", *QUANTIZED):
        for e in checkpoint.entries(FIXTURES / kind):
            if e.name.endswith(("embed_tokens.weight", "layers.0.mlp.down_proj.weight")):
                name, dtype = e.name.removeprefix("model."), str(e.dtype).removeprefix("torch.")
                lines.append(
                    f"{name} {e.format} {e.shape} {dtype} {e.code_bytes} + {e.scale_bytes} = {e.bits:.3f} bits"
                )
    assert_expected_inline(
        listing(lines),
        """\
embed_tokens.weight plain (512, 128) bfloat16 131072 + 0 = 16.000 bits
layers.0.mlp.down_proj.weight plain (128, 256) bfloat16 65536 + 0 = 16.000 bits
embed_tokens.weight plain (512, 128) bfloat16 131072 + 0 = 16.000 bits
layers.0.mlp.down_proj.weight nf4 (128, 256) bfloat16 16384 + 1778 = 4.434 bits
embed_tokens.weight plain (512, 128) bfloat16 131072 + 0 = 16.000 bits
layers.0.mlp.down_proj.weight nf4 (128, 256) bfloat16 16384 + 2192 = 4.535 bits
embed_tokens.weight plain (512, 128) bfloat16 131072 + 0 = 16.000 bits
layers.0.mlp.down_proj.weight int8 (128, 256) float32 32768 + 513 = 8.125 bits""",
    )


# ---- to the byte: what bitsandbytes wrote from `base` ---------------------------------------------------------------


def quantize_base(tmp_path, kind):
    """`base` quantized as `kind` is: the file and its tensors, with those that bitsandbytes wrote."""
    settings_of = {"nf4_plain": {}, "nf4_nested": {"double_quant": True}, "int8": {"quantize": "int8"}}
    path = tmp_path / "model.safetensors"
    checkpoint.write(path, load_file(FIXTURES / "base" / "model.safetensors"), where=is_projection, **settings_of[kind])
    theirs = FIXTURES / kind / "model.safetensors"
    return path, load_file(path), load_file(theirs), theirs.read_bytes()


def differences(ours, theirs):
    assert {k: (t.dtype, t.shape) for k, t in ours.items()} == {k: (t.dtype, t.shape) for k, t in theirs.items()}
    return {k: int((ours[k] != theirs[k]).sum()) for k in theirs if not torch.equal(bits(ours[k]), bits(theirs[k]))}


def test_nf4_is_written_to_the_byte(tmp_path):
    path, _, _, theirs = quantize_base(tmp_path, "nf4_plain")
    assert path.read_bytes() == theirs


def native_codes(scales, offset, absmax2):
    """bitsandbytes' CPU quantize_blockwise: the code of the middle of one of 65536 bins (numerics.md, section 2)."""
    one, half, top = np.float32(1), np.float32(0.5), np.float32(65535)
    values = np.array(bnbref.codebooks.dynamic().values, np.float32)
    thresholds = half * (values[:-1] + values[1:])
    scaled = (scales - offset) * (one / absmax2).repeat(256)[: scales.size]
    bin_of = np.trunc((np.clip(scaled, -one, one) + one) * half * top + half)
    middle = -one + (np.float32(2) * bin_of) / top
    return (thresholds[None] < middle[:, None]).sum(1).astype(np.uint8)


def test_double_quantization_differs_by_the_table_of_their_cpu_kernel(tmp_path):
    path, ours, theirs, their_bytes = quantize_base(tmp_path, "nf4_nested")
    # One tensor has seven scales in a bin that lies across a threshold: the nearest code is 160.
    name = "model.layers.1.mlp.gate_proj.weight.absmax"
    assert differences(ours, theirs) == {name: 7}
    wrong = ours[name] != theirs[name]
    assert ours[name][wrong].tolist() == [160] * 7
    assert theirs[name][wrong].tolist() == [159] * 7

    # With that table every byte is theirs, in all fourteen tensors.
    _, scales, _, _ = quantize_base(tmp_path, "nf4_plain")
    nested = [key.removesuffix(".nested_absmax") for key in ours if key.endswith(".nested_absmax")]
    assert len(nested) == 14
    for weight in nested:
        offset = json.loads(bytes(ours[f"{weight}.quant_state.bitsandbytes__nf4"].tolist()))["nested_offset"]
        absmax, absmax2 = scales[f"{weight}.absmax"].numpy(), ours[f"{weight}.nested_absmax"].numpy()
        ours[f"{weight}.absmax"] = torch.from_numpy(native_codes(absmax, np.float32(offset), absmax2))
    save_file(ours, path, metadata={"format": "pt"})
    assert path.read_bytes() == their_bytes


def test_int8_is_theirs(tmp_path):
    # Their cast of the weight to float16 loses bits of the small ones, but changes no code.
    path, ours, theirs, their_bytes = quantize_base(tmp_path, "int8")
    assert not differences(ours, theirs)
    assert path.read_bytes() == their_bytes


# ---- write, and read again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_is_written_is_read(tmp_path, quant_type, dtype, quant_storage, double_quant):
    path = tmp_path / "a.safetensors"
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {"w": weight, "w_bias": torch.ones(3)}
    how = {"blocksize": 128, "double_quant": double_quant, "quant_storage": quant_storage}
    checkpoint.write(path, tensors, quant_type, where="w".__eq__, **how)
    packed, state = quantize_4bit(weight, None, None, 128, double_quant, quant_type, quant_storage)
    assert torch.equal(bits(load_file(path)["w"]), bits(packed))
    weights = checkpoint.read(path)
    assert weights["w"].dtype == dtype
    assert torch.equal(weights["w"], dequantize_4bit(packed, state))
    assert torch.equal(weights["w_bias"], torch.ones(3))
    (entry, _) = checkpoint.entries(path)
    assert (entry.format, entry.shape, entry.dtype, entry.code_bytes) == (quant_type, (24, 40), dtype, 480)


@pytest.mark.parametrize("shape", [(3,), (1, 1), (5, 7), (2, 3, 4), (0, 4)])
def test_any_shape(tmp_path, shape):
    weight = torch.randn(shape)
    for double_quant in (False, True):
        checkpoint.write(tmp_path / "a.safetensors", {"w": weight}, where="w".__eq__, double_quant=double_quant)
        assert checkpoint.read(tmp_path / "a.safetensors")["w"].shape == weight.shape


def test_the_file_that_is_being_read_can_be_written(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = {"a.weight": torch.randn(64, 64), "b": torch.randn(100_000)}
    save_file(weights, path)
    mapped = checkpoint.read(path)  # views of the file
    checkpoint.write(path, mapped, "int8", where="a.weight".__eq__)
    assert torch.equal(mapped["b"], weights["b"])
    assert torch.equal(checkpoint.read(path)["b"], weights["b"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"bad: a weight .* 1 of its elements are NaN or infinite"):
        checkpoint.write(path, {"bad": torch.tensor([float("nan")])}, where="bad".__eq__)
    with pytest.raises(RuntimeError, match="share memory"):
        checkpoint.write(path, {"w": torch.ones(2), "b": mapped["b"], "tied": mapped["b"]}, where="w".__eq__)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_cannot_be_written_is_refused(tmp_path):
    weight, ints = torch.ones(2, 2), torch.ones(2, dtype=torch.int64)
    lines = []
    for tensors, options in (
        ({"w": weight}, {"quantize": "nf5"}),
        ({"w": weight}, {"blocksize": 100}),
        ({"w": weight}, {"where": "other".__eq__}),
        ({"w": ints}, {}),
        ({"w": torch.tensor([float("inf")])}, {}),
        ({"w": weight}, {"quant_storage": torch.float32}),
        ({"w": weight}, {"quant_storage": torch.int16}),
        ({"w": weight}, {"quantize": "int8"}),
        ({"w": weight, "w.absmax": weight}, {}),
        ({"w": weight, "w.lora": weight}, {}),
    ):
        with pytest.raises(ValueError) as error:
            checkpoint.write(tmp_path / "a.safetensors", tensors, **{"where": "w".__eq__, **options})
        lines.append(str(error.value))
    assert list(tmp_path.iterdir()) == []
    assert_expected_inline(
        listing(lines),
        """\
quantize must be 'nf4', 'fp4' or 'int8', got 'nf5'
blocksize must be a power of two from 32 to 4096 (bitsandbytes reads no other), got 100
where must select some of the 1 tensors, got none
w: a weight of shape (2,) cannot become nf4: its dtype must be float32, float16 or bfloat16, got torch.int64
w: a weight of shape (1,) cannot become nf4: 1 of its elements are NaN or infinite
w: quant_storage torch.float32 has 4 bytes, which do not divide the 2 bytes of 4 packed elements
quant_storage must be one of uint8, float32, float16, bfloat16, int8, float64, which a file may have, got
    torch.int16
w: int8 is for matrices called 'weight', got float32 [2, 2]
w: w.absmax is among the tensors already
w.lora: unknown key under the quantized weight w""",
    )


def test_what_is_no_checkpoint_is_refused_by_its_name(tmp_path):
    file, weight = tmp_path / "a.safetensors", torch.ones(2, 2)
    checkpoint.write(file, {"w": weight}, where="w".__eq__)
    before = file.read_bytes()
    opened = checkpoint.open_checkpoint(file)
    lines = []
    for call in (
        lambda: checkpoint.write(None, {"w": weight}, where="w".__eq__),
        lambda: checkpoint.write(file, [weight], where="w".__eq__),
        lambda: checkpoint.write(file, {"w": weight, 1: weight}, where="w".__eq__),
        lambda: checkpoint.write(file, {"w": weight, "v": [1.0]}, where="w".__eq__),
        lambda: checkpoint.write(file, {"w": weight, "v": torch.empty(3, device="meta")}, where="w".__eq__),
        lambda: checkpoint.write(file, {"w": weight}, where="w"),
        lambda: checkpoint.write(file, {"w": weight}, where="w".__eq__, double_quant="False"),
        lambda: checkpoint.keys(3),
        lambda: checkpoint.read(file, "float16"),
        lambda: opened.read("w", device=torch.float16),
        lambda: opened.read("w", device=True),
        lambda: checkpoint.Checkpoint(None),
        lambda: checkpoint.Checkpoint({"w": weight.numpy()}),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        lines.append(str(error.value))
    assert file.read_bytes() == before
    assert_expected_inline(
        listing(lines),
        """\
path must be a str or PathLike, got None
tensors must be a Mapping, got list
tensors must have names, got 1 for one
v must be a torch.Tensor, got list
v must have numbers to be written, got float32 [3] on meta
where must be a Callable, got 'w'
double_quant must be a bool, got 'False'
path must be a str or PathLike, got 3
dtype must be a torch.dtype or None, got 'float16'
device must be a torch.device or str, got torch.float16
device must be a torch.device or str, got True
tensors must be a Mapping, got None
w must be a torch.Tensor, got numpy.ndarray""",
    )


# ---- files and directories ------------------------------------------------------------------------------------------


def shards(folder, tensors, parts=3):
    """Neighbouring tensors, which belong to one weight, in different files."""
    weight_map = {key: f"model-{number % parts}.safetensors" for number, key in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({key: tensors[key] for key, where in weight_map.items() if where == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


def test_every_container_holds_the_same(tmp_path):
    tensors = load_file(FIXTURES / "nf4_nested" / "model.safetensors")
    index, _ = shards(tmp_path, tensors)
    torch.save(tensors, tmp_path / "model.bin")
    want = checkpoint.read(FIXTURES / "nf4_nested")
    for path in (FIXTURES / "nf4_nested" / "model.safetensors", tmp_path, index, str(tmp_path / "model.bin")):
        weights = checkpoint.read(path)
        assert list(weights) == sorted(want)
        assert all(torch.equal(bits(weights[name]), bits(want[name])) for name in want)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    tensors = load_file(FIXTURES / "int8" / "model.safetensors")
    index, weight_map = shards(tmp_path, tensors)
    first, other = "lm_head.weight", "model.embed_tokens.weight"
    lines = []
    for damaged in (
        {**weight_map, "more.weight": weight_map[first]},
        {key: file for key, file in weight_map.items() if key != first},
        {**weight_map, first: weight_map[other]},
        {**weight_map, first: "../model-0.safetensors"},
        {**weight_map, first: 3},
        None,
    ):
        index.write_text(json.dumps({"weight_map": damaged}))
        with pytest.raises(ValueError) as error:
            checkpoint.read(tmp_path)
        lines.append(str(error.value))
    for text in ("", "[" * 100_000, "[]", '{"weight_map": '):
        index.write_text(text)
        with pytest.raises(ValueError) as error:
            checkpoint.read(tmp_path)
        lines.append(str(error.value)[:99])
    assert_expected_inline(
        listing(lines),
        """\
more.weight in model-0.safetensors: the index and the file disagree, it is not there
lm_head.weight in model-0.safetensors: the index and the file disagree, it is there
lm_head.weight in model-0.safetensors: the index and the file disagree, it is there
model.safetensors.index.json is not an index of shards: ...
model.safetensors.index.json is not an index of shards: ...
model.safetensors.index.json is not an index of shards: ...
model.safetensors.index.json is not an index of shards: ...
model.safetensors.index.json is not an index of shards: ...
model.safetensors.index.json is not an index of shards: ...
model.safetensors.index.json is not an index of shards: ...""",
    )


def test_what_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "a.safetensors", tmp_path / "a.bin"):
        with pytest.raises(FileNotFoundError, match=re.escape(tmp_path.name)):
            checkpoint.read(path)
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        checkpoint.read(tmp_path)
    with pytest.raises(ValueError, match="name must be one of the 21 weights of the checkpoint, got 'w'"):
        checkpoint.open_checkpoint(FIXTURES / "base").read("w")
    with pytest.raises(ValueError, match=r"dtype must be float32, float16, bfloat16 or None, got torch\.int8"):
        checkpoint.read(FIXTURES / "base", torch.int8)


def test_safetensors_is_asked_for_when_needed(monkeypatch, tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert checkpoint.read(tmp_path / "a.pt") == {"w": torch.ones(1)}
    with pytest.raises(ImportError, match="pip install safetensors"):
        checkpoint.read(FIXTURES / "base")


# ---- damage ---------------------------------------------------------------------------------------------------------


def whole():
    """A 4-bit weight with double quantization, an int8 one and a plain one."""
    weight = ((torch.arange(4096) * 37 % 101 - 50) / 64).view(64, 64).bfloat16()
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    tensors = {"q.weight": packed, "q.bias": torch.ones(64)}
    tensors |= {f"q.weight.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
    codes, absmax, _ = bnbref.functional.int8_vectorwise_quant(weight)
    return tensors | {"k.weight": codes, "k.SCB": absmax, "k.weight_format": torch.tensor(0, dtype=torch.uint8)}


BLOB = "q.weight.quant_state.bitsandbytes__nf4"


def without(*keys):
    return lambda t: [t.pop(key) for key in keys]


def replaced(key, value):
    return lambda t: t.update({key: value(t[key]) if callable(value) else value})


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def state(**changes):
    def change(blob):
        return text(json.dumps({**json.loads(bytes(blob.tolist())), **changes}))

    return replaced(BLOB, change)


def poisoned(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def both(first, second):
    return lambda tensors: (first(tensors), second(tensors))


DAMAGE = {
    # companions of a 4-bit weight
    "no absmax": without("q.weight.absmax"),
    "no quant_map": without("q.weight.quant_map"),
    "no quant_state": without(BLOB),
    "no nested_absmax": without("q.weight.nested_absmax"),
    "no nested_quant_map": without("q.weight.nested_quant_map"),
    "nothing but the weight": without(*(key for key in whole() if key.startswith("q.weight."))),
    "no weight": without("q.weight"),
    "two quant_states": replaced("q.weight.quant_state.bitsandbytes__fp4", text("{}")),
    "unknown key": replaced("q.weight.zero_point", torch.zeros(64)),
    "unknown key far below": replaced("q.weight.lora.a.weight", torch.zeros(64)),
    "companions of both": replaced("q.SCB", torch.ones(64)),
    # tensors of a 4-bit weight
    "absmax too short": replaced("q.weight.absmax", lambda t: t[1:]),
    "absmax of floats": replaced("q.weight.absmax", lambda t: t.float()),
    "nested_absmax too long": replaced("q.weight.nested_absmax", torch.ones(2)),
    "nested_absmax NaN": replaced("q.weight.nested_absmax", poisoned(float("nan"))),
    "nested_absmax negative": replaced("q.weight.nested_absmax", poisoned(-1.0)),
    "scales overflow": both(replaced("q.weight.nested_absmax", poisoned(3e38)), state(nested_offset=3e38)),
    "nested_quant_map infinite": replaced("q.weight.nested_quant_map", poisoned(float("inf"))),
    "quant_map of another type": replaced("q.weight.quant_map", lambda t: t.flip(0)),
    "codes too short": replaced("q.weight", lambda t: t[1:]),
    "codes as a row": replaced("q.weight", lambda t: t.t()),
    "codes as floats": replaced("q.weight", lambda t: t.float()),
    "codes as bools": replaced("q.weight", lambda t: t.bool()),
    "not quantized": replaced("q.weight", torch.zeros(64, 64)),
    # the JSON
    "JSON cut off": replaced(BLOB, lambda t: t[:-1]),
    "JSON not UTF-8": replaced(BLOB, poisoned(255)),
    "JSON empty": replaced(BLOB, lambda t: t[:0]),
    "JSON deep": replaced(BLOB, text("[" * 60_000)),
    "JSON long": replaced(BLOB, torch.full((70_000,), 32, dtype=torch.uint8)),
    "JSON of digits": replaced(BLOB, text('{"quant_type": "nf4", "blocksize": ' + "9" * 5000 + "}")),
    "JSON not an object": replaced(BLOB, text("[]")),
    "JSON of another type": state(quant_type="fp4"),
    "JSON with more": state(zero_point=1),
    "shape huge": state(shape=[2**40, 2**20]),
    "shape beyond int64": state(shape=[2**70, 0]),
    "shape negative": state(shape=[-64, -64]),
    "shape not of numbers": state(shape=["64", 64]),
    "shape null": state(shape=None),
    "shape smaller": state(shape=[64, 63]),
    "blocksize 0": state(blocksize=0),
    "blocksize huge": state(blocksize=2**80),
    "blocksize larger than all": both(state(blocksize=2**40), replaced("q.weight.absmax", lambda t: t[:1])),
    "nested_blocksize larger than all": state(nested_blocksize=2**40),
    "blocksize not whole": state(blocksize=64.0),
    "nested_blocksize": state(nested_blocksize=16),
    "nested_dtype": state(nested_dtype="float16"),
    "nested_offset NaN": state(nested_offset=float("nan")),
    "nested_offset beyond float32": state(nested_offset=1e39),
    "nested_offset beyond floats": state(nested_offset=10**400),
    "nested_offset a list": state(nested_offset=[1]),
    "dtype": state(dtype="float64"),
    "dtype a list": state(dtype=["float32"]),
    # int8
    "no SCB": without("k.SCB"),
    "no SCB, no weight_format": without("k.SCB", "k.weight_format"),
    "no int8 weight": without("k.weight"),
    "SCB too short": replaced("k.SCB", lambda t: t[1:]),
    "SCB of float16": replaced("k.SCB", lambda t: t.half()),
    "SCB a column": replaced("k.SCB", lambda t: t[:, None]),
    "SCB NaN": replaced("k.SCB", poisoned(float("nan"))),
    "SCB negative": replaced("k.SCB", poisoned(-1.0)),
    "weight_format 1": replaced("k.weight_format", torch.tensor(1, dtype=torch.uint8)),
    "weight_format a float": replaced("k.weight_format", torch.tensor(0.0)),
    "weight_format empty": replaced("k.weight_format", torch.ones(0, dtype=torch.uint8)),
    "int8 weight of uint8": replaced("k.weight", lambda t: t.view(torch.uint8)),
    "int8 weight flat": replaced("k.weight", lambda t: t.view(-1)),
    "unknown key under int8": replaced("k.weight.CB", torch.ones(1)),
}


def test_damage_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(whole(), path)
    assert [entry.format for entry in checkpoint.entries(path)] == ["int8", "plain", "nf4"]
    lines = []
    for what, damage in DAMAGE.items():
        tensors = whole()
        damage(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        message = "no error"
        try:
            checkpoint.read(path)
        except ValueError as error:
            message = str(error)
        assert re.match(r"[qk]\.", message), f"{what}: {message} does not name the tensor"
        lines.append(f"{what}: {message}")
    assert_expected_inline(
        listing(lines),
        """\
no absmax: q.weight: a 4-bit weight needs absmax, nested_absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__<quant_type> beside it, got nested_absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__nf4
no quant_map: q.weight: a 4-bit weight needs absmax, nested_absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__<quant_type> beside it, got absmax, nested_absmax, nested_quant_map,
    quant_state.bitsandbytes__nf4
no quant_state: q.weight: a 4-bit weight needs absmax, nested_absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__<quant_type> beside it, got absmax, nested_absmax, nested_quant_map, quant_map
no nested_absmax: q.weight: a 4-bit weight needs absmax, nested_absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__<quant_type> beside it, got absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__nf4
no nested_quant_map: q.weight: a 4-bit weight needs absmax, nested_absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__<quant_type> beside it, got absmax, nested_absmax, quant_map,
    quant_state.bitsandbytes__nf4
nothing but the weight: q.weight: uint8 [2048, 1] is a quantized weight, but its scales are missing
no weight: q.weight is missing, but its ['absmax', 'nested_absmax', 'nested_quant_map', 'quant_map',
    'quant_state.bitsandbytes__nf4'] are there
two quant_states: q.weight: a 4-bit weight needs absmax, nested_absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__<quant_type> beside it, got absmax, nested_absmax, nested_quant_map, quant_map,
    quant_state.bitsandbytes__fp4, quant_state.bitsandbytes__nf4
unknown key: q.weight.zero_point: unknown key under the quantized weight q.weight
unknown key far below: q.weight.lora.a.weight: unknown key under the quantized weight q.weight
companions of both: q.weight: an int8 weight needs SCB and weight_format beside it, got SCB, absmax,
    nested_absmax, nested_quant_map, quant_map, quant_state.bitsandbytes__nf4
absmax too short: q.weight: absmax must be torch.uint8 with 64 elements, got torch.uint8 (63,)
absmax of floats: q.weight: absmax must be torch.uint8 with 64 elements, got torch.float32 (64,)
nested_absmax too long: q.weight: nested_absmax must be torch.float32 with 1 elements, got torch.float32 (2,)
nested_absmax NaN: q.weight: nested_absmax has NaN or infinite elements
nested_absmax negative: q.weight: nested_absmax has scales that are negative
scales overflow: q.weight: nested_absmax and nested_offset give scales that overflow float32
nested_quant_map infinite: q.weight: nested_quant_map has NaN or infinite elements
quant_map of another type: q.weight: quant_map is not the codebook 'nf4': [1.0, 0.7229568362236023,
    0.5626170039176941, 0.44070982933044434, 0.33791524171829224, 0.24611230194568634, 0.16093020141124725,
    0.07958029955625534, 0.0, -0.09105003625154495, -0.18477343022823334, -0.28444138169288635,
    -0.39491748809814453, -0.5250730514526367, -0.6961928009986877, -1.0]
codes too short: q.weight must be 2048 bytes [bytes / itemsize, 1] of uint8, int8 or floats for the shape [64,
    64], got 2047 bytes, uint8 [2047, 1]
codes as a row: q.weight must be 2048 bytes [bytes / itemsize, 1] of uint8, int8 or floats for the shape [64,
    64], got 2048 bytes, uint8 [1, 2048]
codes as floats: q.weight must be 2048 bytes [bytes / itemsize, 1] of uint8, int8 or floats for the shape [64,
    64], got 8192 bytes, float32 [2048, 1]
codes as bools: q.weight must be 2048 bytes [bytes / itemsize, 1] of uint8, int8 or floats for the shape [64,
    64], got 2048 bytes, bool [2048, 1]
not quantized: q.weight must be 2048 bytes [bytes / itemsize, 1] of uint8, int8 or floats for the shape [64,
    64], got 16384 bytes, float32 [64, 64]
JSON cut off: q.weight: quant_state.bitsandbytes__nf4 is not UTF-8 JSON: ...
JSON not UTF-8: q.weight: quant_state.bitsandbytes__nf4 is not UTF-8 JSON: ...
JSON empty: q.weight: quant_state.bitsandbytes__nf4 is not UTF-8 JSON: ...
JSON deep: q.weight: quant_state.bitsandbytes__nf4 is not UTF-8 JSON: ...
JSON long: q.weight: quant_state.bitsandbytes__nf4 must be one-dimensional uint8 of a few bytes, got torch.uint8
    (70000,)
JSON of digits: q.weight: quant_state.bitsandbytes__nf4 is not UTF-8 JSON: ...; use sys.set_int_max_str_digits()
    to increase the limit
JSON not an object: q.weight: quant_state.bitsandbytes__nf4 must be a JSON object of that quant_type, got []
JSON of another type: q.weight: quant_state.bitsandbytes__nf4 must be a JSON object of that quant_type, got
    {'quant_type': 'fp4', 'blocksize': 64, 'dtype': 'bfloat16', 'shape': [64, 64], 'nested_blocksize': 256,
    'nested_dtype': 'float32', 'nested_offset': 0.7802734375}
JSON with more: q.weight: keys of a quant state must be ['absmax', 'blocksize', 'dtype', 'nested_absmax',
    'nested_blocksize', 'nested_dtype', 'nested_offset', 'nested_quant_map', 'quant_map', 'quant_type',
    'shape'], got ['absmax', 'blocksize', 'dtype', 'nested_absmax', 'nested_blocksize', 'nested_dtype',
    'nested_offset', 'nested_quant_map', 'quant_map', 'quant_type', 'shape', 'zero_point']
shape huge: q.weight: absmax must be torch.uint8 with 18014398509481984 elements, got torch.uint8 (64,)
shape beyond int64: q.weight: shape must be a list of sizes, got [11805916207174113034..., 0]
shape negative: q.weight: shape must be a list of sizes, got [-64, -64]
shape not of numbers: q.weight: shape must be a list of sizes, got ['64', 64]
shape null: q.weight: this operation needs the quant state's shape, which is None
shape smaller: q.weight: absmax must be torch.uint8 with 63 elements, got torch.uint8 (64,)
blocksize 0: q.weight: blocksize must be an integer from 1 to 4096, got 0
blocksize huge: q.weight: blocksize must be an integer from 1 to 4096, got 12089258196146291747...
blocksize larger than all: q.weight: blocksize must be an integer from 1 to 4096, got 1099511627776
nested_blocksize larger than all: q.weight: nested_blocksize must be an integer from 1 to 4096, got
    1099511627776
blocksize not whole: q.weight: blocksize must be an integer from 1 to 4096, got 64.0
nested_blocksize: q.weight: nested_blocksize must be 256, got 16
nested_dtype: q.weight: nested_dtype must be float32, got 'float16'
nested_offset NaN: q.weight: nested_offset must be a finite float32 number, got nan
nested_offset beyond float32: q.weight: nested_offset must be a finite float32 number, got 1e+39
nested_offset beyond floats: q.weight: nested_offset must be a finite float32 number, got
    10000000000000000000...
nested_offset a list: q.weight: nested_offset must be a finite float32 number, got [1]
dtype: q.weight: dtype must be ['bfloat16', 'float16', 'float32'], got 'float64'
dtype a list: q.weight: dtype must be ['bfloat16', 'float16', 'float32'], got ['float32']
no SCB: k.weight: an int8 weight needs SCB and weight_format beside it, got weight_format
no SCB, no weight_format: k.weight: int8 [64, 64] is a quantized weight, but its scales are missing
no int8 weight: k.weight is missing, but its ['SCB', 'weight_format'] are there
SCB too short: k.SCB must be float32 [64], got float32 [63]
SCB of float16: k.SCB must be float32 [64], got float16 [64]
SCB a column: k.SCB must be float32 [64], got float32 [64, 1]
SCB NaN: k.SCB has scales that are NaN, infinite or negative
SCB negative: k.SCB has scales that are NaN, infinite or negative
weight_format 1: k.weight_format must be uint8 0 (rows, the only layout left), got uint8 [] [1]
weight_format a float: k.weight_format must be uint8 0 (rows, the only layout left), got float32 [] [0.0]
weight_format empty: k.weight_format must be uint8 0 (rows, the only layout left), got uint8 [0] []
int8 weight of uint8: k.weight must be int8 [n, k], as there is k.SCB, got uint8 [64, 64]
int8 weight flat: k.weight must be int8 [n, k], as there is k.SCB, got int8 [4096]
unknown key under int8: k.weight.CB: unknown key under the quantized weight k.weight""",
    )


def test_a_file_that_is_cut_off_names_the_first_tensor_that_is_missing(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(whole(), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    lines = []
    for damaged in (
        data[:-1],
        data[: 8 + length],
        data[: 8 + length - 1],
        data[:7],
        b"",
        data + b"\0",
        struct.pack("<Q", 2**62) + data[8:],
        data.replace(b'"shape":[64,64]', b'"shape":[9,2**9]'),
        data.replace(b'"shape":[64,64]', b'"shape":[64,99]'),
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            checkpoint.read(path)
        lines.append(str(error.value))
    assert_expected_inline(
        listing(lines),
        """\
model.safetensors is not a whole safetensors file: ...; q.weight.quant_state.bitsandbytes__nf4 ends at byte 8726
    of 8725
model.safetensors is not a whole safetensors file: ...; k.SCB ends at byte 1008 of 752
model.safetensors is not a whole safetensors file: ...; k.SCB ends at byte 1008 of 751
model.safetensors is not a whole safetensors file: ...
model.safetensors is not a whole safetensors file: ...
model.safetensors is not a whole safetensors file: ...
model.safetensors is not a whole safetensors file: ...
model.safetensors is not a whole safetensors file: ...
model.safetensors is not a whole safetensors file: ...
model.safetensors is not a whole safetensors file: ...""",
    )


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    tensors = whole()
    save_file(tensors, folder / "whole.safetensors")
    torch.save(tensors, folder / "whole.pt")
    return folder


@settings(max_examples=150, deadline=10_000)
@given(data=st.data())
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_random_damage_is_refused_or_read(files, suffix, data):
    """Cut anywhere, flip anything: ValueError or tensors, at once, and nothing larger than the file can explain."""
    content = bytearray((files / f"whole{suffix}").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0] if suffix == ".safetensors" else 1024
    place = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4), "bytes changed"):
        content[at] = value
    end = data.draw(st.one_of(st.just(len(content)), place), "cut at")
    path = files / f"damaged{suffix}"
    path.write_bytes(content[:end])
    with Largest() as largest:
        try:
            weights = checkpoint.read(path)
        except ValueError:
            weights = {}
    assert all(type(weight) is torch.Tensor for weight in weights.values())
    assert largest.nbytes <= explained(content)


def explained(content):
    """A byte is two codes, each an index of eight bytes; and rows of 16 of the largest blocks are padded to two."""
    return 16 * len(content) + 2 * 16 * 4096 * 8


def test_random_damage_of_the_state_is_refused_or_read(files):
    """The same inside of the JSON, where a digit is a size."""
    path = files / "state.safetensors"
    size = whole()[BLOB].numel()

    @settings(max_examples=150, deadline=10_000)
    @given(
        at=st.integers(0, size - 1), inserted=st.text('0123456789-.eE,[]{}"null ', max_size=8), drop=st.integers(0, 3)
    )
    def run(at, inserted, drop):
        tensors = whole()
        content = bytes(tensors[BLOB].tolist())
        tensors[BLOB] = text((content[:at] + inserted.encode() + content[at + drop :]).decode())
        save_file(tensors, path)
        with Largest() as largest:
            try:
                checkpoint.read(path)
            except ValueError as error:
                unnamed.extend([str(error)] if "q.weight" not in str(error) else [])
        assert largest.nbytes <= explained(path.read_bytes())

    unnamed = []
    run()
    assert unnamed == []


def test_what_torch_load_would_believe(tmp_path):
    path = tmp_path / "a.pt"
    lines = []
    for content in (
        {"w": torch.zeros(1).expand(2**40)},
        {"w": torch.zeros(2, 2).to_sparse()},
        {"w": torch.zeros(2, device="meta")},
        {"w": 1},
        {1: torch.zeros(1)},
        [torch.zeros(1)],
        {"w": torch.nn.Linear(1, 1)},
        {"w.absmax": torch.zeros(1)},
    ):
        torch.save(content, path)
        with pytest.raises(ValueError) as error:
            checkpoint.read(path)
        lines.append(str(error.value).splitlines()[0])
    torch.save({"w": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError) as error:
        checkpoint.read(path)
    lines.append(str(error.value).splitlines()[0])
    assert_expected_inline(
        listing(lines),
        """\
w in a.pt must lie in the file, got float32 [1099511627776] on cpu
'w' in a.pt must be a dense tensor with a name, got Tensor
w in a.pt must lie in the file, got float32 [2] on meta
'w' in a.pt must be a dense tensor with a name, got int
1 in a.pt must be a dense tensor with a name, got Tensor
a.pt must hold a dict of tensors, got list
a.pt is not a whole file of torch.save with nothing but tensors: UnpicklingError
w is missing, but its ['absmax'] are there
a.pt is not a whole file of torch.save with nothing but tensors: RuntimeError""",
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tensors": [torch.ones(2)]}, "tensors"),
        ({"where": "q.weight"}, "where"),
        ({"tensors": {"q.weight": [1.0]}}, "q.weight"),
        ({"double_quant": "False"}, "double_quant"),
    ],
)
def test_arguments_of_another_kind_are_named(tmp_path, change, named):
    given = {"tensors": {"q.weight": torch.ones(64)}, "quantize": "nf4", "where": lambda name: True} | change
    with pytest.raises(TypeError, match=named):
        checkpoint.write(tmp_path / "a.safetensors", **given)
