"""Interrupted and continued is uninterrupted, bit for bit; and files go to bitsandbytes and come back."""

import contextlib
import copy
import numbers
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st
from test_optim_classes import ALL, make
from torch import nn

from bnbref import eager as eagerly
from bnbref import functional as F
from bnbref import optim
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, Codebook, value_table
from bnbref.optim.master_weights import CORRECTIONS
from bnbref.optim.rules import AdEMAMix
from bnbref.optim.state_dict import WRAPPED

CORRECTION = CORRECTIONS[torch.float16]

CONTINUED = """
import sys, torch, bnbref
sys.path.insert(0, "tests")
from test_optim_checkpoint import advanced, start
results = {}
with bnbref.eager():
    for name, saved in torch.load(sys.argv[1], weights_only=True).items():
        directory = sys.argv[2] + "/" + name if name.startswith("Paged") else None
        params, optimizer = start(name, directory)
        for p, data in zip(params, saved["params"]):
            p.data.copy_(data)
        if directory is None:
            optimizer.load_state_dict(saved["optimizer"])
        else:
            states = bnbref.optim.read_pages(directory)
            optimizer.load_state_dict({**saved["optimizer"], "state": states})
        results[name] = advanced(params, optimizer, 3, 6)
torch.save(results, sys.argv[1])
"""

NUMBERS_OF_A_FILE = (
    st.integers(-3, 70)
    | st.floats(-2, 70)
    | st.sampled_from([64, 64.0, 10**400, 2**60, float("inf"), float("nan"), None, True, "3", 1j, [1]])
    | st.sampled_from(
        [torch.tensor(5.0), torch.tensor(64), torch.tensor([1, 2]), torch.tensor(2.5), torch.tensor(True)]
    )
)


def start(name, directory=None):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size)) for size in ((70, 61), (100,), (4096,))]
    params[2].data = params[2].data.bfloat16()
    options = {"page_directory": directory} if directory else {}
    return params, make(name, params, lr=1e-2, weight_decay=0.1, **options)


def advanced(params, optimizer, first, last):
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:paged state")
def test_interrupted_is_uninterrupted_in_every_class(tmp_path):
    """Plain classes by state_dict and torch.load(weights_only=True), paged ones from their directory, in a new process."""
    saved, want = {}, {}
    for name in ALL:
        params, optimizer = start(name)
        want[name] = advanced(params, optimizer, 0, 6)
        directory = str(tmp_path / name) if name.startswith("Paged") else None
        params, optimizer = start(name, directory)
        halfway = advanced(params, optimizer, 0, 3)
        state = optimizer.state_dict()
        if directory:
            state = {**state, "state": {}}
        saved[name] = {"params": halfway, "optimizer": state}
    del optimizer  # with its process, as it has the directory to itself
    torch.save(saved, tmp_path / "saved.pt")
    command = [sys.executable, "-c", CONTINUED, str(tmp_path / "saved.pt"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    got = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert {name: same_bits(got[name], want[name]) for name in ALL} == dict.fromkeys(ALL, True)


@pytest.mark.usefixtures("eager")
def test_the_layout_is_bitsandbytes():
    params, optimizer = start("AdEMAMix8bit")
    advanced(params, optimizer, 0, 2)
    state = optimizer.state_dict()["state"][0]
    assert set(state) == {"step", WRAPPED}
    assert state["step"] == 2
    shapes = {key: (tuple(x.shape), x.dtype) for key, x in state[WRAPPED].items()}
    u8, f32 = torch.uint8, torch.float32
    assert shapes == {
        "state1": ((2, 70, 61), u8),
        "qmap1": ((256,), f32),
        "absmax1": ((2, 17), f32),
        "state2": ((70, 61), u8),
        "qmap2": ((256,), f32),
        "absmax2": ((17,), f32),
    }


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "Lion8bit", "AdEMAMix8bit", "RMSprop8bit", "Adagrad32bit"])
def test_bitsandbytes_goes_on_from_here_and_we_from_there(name):
    """Loaded by the other library the next step agrees, up to the differences of the two kernels."""
    bnb = pytest.importorskip("bitsandbytes")
    params, ours = start(name)
    advanced(params, ours, 0, 3)
    copied = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = getattr(bnb.optim, name)(copied, lr=1e-2, weight_decay=0.1)
    theirs.load_state_dict(ours.state_dict())
    a, b = advanced(params, ours, 3, 4), advanced(copied, theirs, 3, 4)
    assert all(torch.allclose(x.float(), y.float(), rtol=1e-2, atol=2e-4) for x, y in zip(a, b, strict=True))
    back = [nn.Parameter(p.detach().clone()) for p in copied]
    again = make(name, back, lr=1e-2, weight_decay=0.1)
    again.load_state_dict(theirs.state_dict())
    for p, q in zip(copied, back, strict=True):
        if theirs.state[p].get("qmap1") is None or torch.equal(
            theirs.state[p]["qmap1"], ours.state_dict()["state"][0][WRAPPED].get("qmap1")
        ):
            assert torch.equal(theirs.state[p]["state1"].flatten()[: q.numel()], again.state[q]["state1"].flatten())
    advanced(back, again, 4, 5)


@pytest.mark.usefixtures("eager")
def test_codes_of_another_codebook_are_translated():
    """bitsandbytes keeps the squares of RMSprop with the signed map."""
    params, optimizer = start("RMSprop8bit")
    advanced(params, optimizer, 0, 2)
    saved = optimizer.state_dict()
    wrapped = saved["state"][0][WRAPPED]
    squares = F.dequantize_blockwise(wrapped["state1"], absmax=wrapped["absmax1"], code=wrapped["qmap1"], blocksize=256)
    codes, state = F.quantize_blockwise(squares, code=F.create_dynamic_map(), blocksize=256)
    wrapped.update(state1=codes, absmax1=state.absmax, qmap1=F.create_dynamic_map())
    _, other = start("RMSprop8bit")
    other.load_state_dict(saved)
    mine = other.state_dict()["state"][0][WRAPPED]
    loaded = F.dequantize_blockwise(mine["state1"], absmax=mine["absmax1"], code=mine["qmap1"], blocksize=256)
    signed = F.dequantize_blockwise(codes, state)
    farthest = mine["qmap1"].diff().max() / 2  # from its nearest value, in a block of absmax 1
    assert bool(((loaded - signed).abs() <= 1.001 * farthest * squares.max()).all())
    assert same_bits(loaded == 0, signed == 0)


@pytest.mark.usefixtures("eager")
def test_half_a_checkpoint_is_refused():
    params, optimizer = start("AdamW8bit")
    advanced(params, optimizer, 0, 1)
    for key, message in (("state2", "no 'state2'"), ("absmax1", "no 'absmax1'")):
        saved = optimizer.state_dict()
        del saved["state"][0][WRAPPED][key]
        with pytest.raises(ValueError, match=message):
            start("AdamW8bit")[1].load_state_dict(saved)
    saved = optimizer.state_dict()
    saved["state"][0] = None  # as ZeroRedundancyOptimizer leaves what it has loaded
    with pytest.raises(
        ValueError, match="saved state of parameter 0 must be a dict, and so must what it wraps, got None: torch"
    ):
        start("AdamW8bit")[1].load_state_dict(saved)
    other = optim.AdamW8bit(start("AdamW8bit")[0], blocksize=64)
    with pytest.raises(ValueError, match="blocksize"):
        other.load_state_dict(optimizer.state_dict())
    fresh = start("AdamW8bit")[1]
    fresh.load_state_dict(fresh.state_dict())  # accelerate does this before the first step


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("state1", lambda x: x.tolist(), "saved state1 must be a tensor"),
        ("state1", lambda x: x.to("meta"), "saved state1 must have numbers"),
        ("state1", lambda x: x[1:], "saved state1 has 299 numbers, its parameter has 300"),
        ("state1", torch.Tensor.long, "saved state1 must be uint8 codes or floats"),
        ("state1", lambda x: x.to(torch.float8_e5m2), "saved state1 must be uint8 codes or floats of 16 bits or more"),
        ("state1", torch.Tensor.float, "saved state2 must be floats, or state1, state2 all codes"),
        ("state2", torch.Tensor.half, "saved state1 must be floats, or state1, state2 all codes"),
        ("state2", torch.Tensor.to_sparse, r"saved state2 must have numbers, got a tensor on torch\.sparse_coo"),
        ("qmap1", lambda x: x.tolist(), "saved qmap1 must be a tensor"),
        ("qmap2", lambda x: x.to("meta"), "saved qmap2 must have numbers"),
        ("absmax2", torch.Tensor.to_sparse, "saved absmax2 must have numbers"),
        ("absmax1", lambda x: x[1:], "saved absmax has 1 scales for 300 codes"),
        ("absmax1", lambda x: x / 0, "saved absmax1 has scales that are no floats, NaN, infinite or negative"),
        ("absmax2", lambda x: -x, "saved absmax2 has scales that are no floats"),
        ("absmax2", torch.Tensor.int, "saved absmax2 has scales that are no floats"),
        ("qmap1", lambda x: x / 2, "saved qmap1 is no map of Adam"),
        (CORRECTION, torch.Tensor.float, f"saved {CORRECTION} must be int8 or int16"),
        (CORRECTION, lambda x: x[1:], f"saved {CORRECTION} has 299 elements"),
        (CORRECTION, lambda x: x + 2**12 + 1 - x.max(), f"saved {CORRECTION} goes beyond 4096"),
    ],
)
def test_a_state_that_no_step_leaves_is_refused(key, change, message):
    p, q = (nn.Parameter(torch.linspace(-1, 1, 300).half()) for _ in range(2))
    optimizer, other = (optim.AdamW8bit([x], min_8bit_size=0, master_weight_bits=32) for x in (p, q))
    p.grad = torch.linspace(1, 2, 300).half()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0][WRAPPED][key] = change(saved["state"][0][WRAPPED][key])
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)


@pytest.mark.usefixtures("eager")
def test_codes_of_states_that_are_stacked_are_all_translated():
    """bitsandbytes keeps both momenta of AdEMAMix under one name, with one map of codes."""
    params, optimizer = start("AdEMAMix8bit")
    advanced(params, optimizer, 0, 2)
    rule = AdEMAMix().with_codebooks(Codebook.nearest("uniform", [k / 127 for k in range(-127, 128)]), DYNAMIC_UNSIGNED)
    other = optim.Optimizer(start("AdEMAMix8bit")[0], rule, optimizer.defaults)
    other.load_state_dict(optimizer.state_dict())
    want, got = optimizer.state[params[0]], other.state[other.param_groups[0]["params"][0]]
    for key in rule.stacked:
        values = [
            F.dequantize_blockwise(
                x[key], absmax=x[f"absmax{key[-1]}"], code=value_table(book, x[key].device), blocksize=256
            )
            for x, book in ((want, DYNAMIC), (got, rule.codebooks[0]))
        ]
        # The values of the uniform map are 2 / 254 of a block's scale apart.
        assert bool(((values[0] - values[1]).abs() <= 1.001 * want[f"absmax{key[-1]}"].max() / 254).all())


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("own", "others"), [(192, 256), (256, 192)])
def test_as_many_blocks_of_another_size_are_other_blocks(own, others):
    """A state in blocks of 256 does not say so, as bitsandbytes' says none."""
    p = nn.Parameter(torch.ones(300))
    optimizer = optim.AdamW8bit([p], min_8bit_size=0, blocksize=own)
    p.grad = torch.ones(300)
    optimizer.step()
    with pytest.raises(ValueError, match=f"saved state1 is in blocks of {own}, not {others}"):
        optim.AdamW8bit([p], min_8bit_size=0, blocksize=others).load_state_dict(optimizer.state_dict())


@pytest.mark.usefixtures("eager")
def test_saving_and_loading_leave_no_hook():
    """Each would go through the whole state once more, at every later checkpoint."""
    _, optimizer = start("AdamW8bit")
    before = {name: len(value) for name, value in vars(optimizer).items() if "hooks" in name}
    optimizer.load_state_dict(optimizer.state_dict())
    assert {name: len(value) for name, value in vars(optimizer).items() if "hooks" in name} == before


@pytest.mark.usefixtures("eager")
def test_a_state_of_another_rule_is_refused_where_it_would_be_another_number():
    """What has the same names and is the same quantity is taken: whoever resumes may change Adam8bit for AdamW8bit, or bits."""
    families = ("SGD", "LARS", "Adam", "AdamW", "LAMB", "Lion", "RMSprop", "Adagrad", "AdEMAMix", "AdamWScheduleFree")
    taken = {}
    for bits in ("8bit", "32bit"):
        for name in families:
            params, optimizer = start(name + bits)
            advanced(params, optimizer, 0, 2)
            saved = optimizer.state_dict()
            for other in families:
                params, loaded = start(other + "8bit")
                try:
                    loaded.load_state_dict(saved)
                except ValueError as error:
                    assert "saved state" in str(error) or "saved difference" in str(error)  # noqa: PT017, the other outcome
                    continue
                advanced(params, loaded, 2, 3)
                taken.setdefault(f"{name} {bits}", []).append(other)
    momentum, adam = ["SGD", "LARS", "Lion"], ["Adam", "AdamW", "LAMB"]
    # In float32 squares have no map that says what they are.
    squares = {"8bit": ["RMSprop", "Adagrad"], "32bit": [*momentum, "RMSprop", "Adagrad"]}
    assert taken == {
        f"{name} {bits}": others
        for bits in ("8bit", "32bit")
        for names, others in ((momentum, momentum), (adam, adam), (["RMSprop", "Adagrad"], squares[bits]))
        for name in names
    } | {f"{name} {bits}": [name] for name in ("AdEMAMix", "AdamWScheduleFree") for bits in ("8bit", "32bit")}


@pytest.mark.usefixtures("eager")
def test_what_is_no_state_dict_is_refused():
    params, optimizer = start("AdamW8bit")
    advanced(params, optimizer, 0, 1)
    right = optimizer.state_dict()
    wrapped = {**right["state"][0], WRAPPED: None}
    for wrong, message in (
        ({}, "state_dict must have 'state', a dict, and 'param_groups'"),
        ({**right, "state": [1]}, "state_dict must have 'state', a dict"),
        ({"state": right["state"]}, "state_dict must have 'state', a dict, and 'param_groups'"),
        ({**right, "state": {0: None}}, "the saved state of parameter 0 must be a dict"),
        ({**right, "state": {0: wrapped}}, "the saved state of parameter 0 must be a dict, and so must what it wraps"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
    with pytest.raises(TypeError, match="state_dict must be a Mapping, got list"):
        optimizer.load_state_dict([right])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamWScheduleFree", "PagedAdamW8bit"])
@pytest.mark.parametrize("wrong", ["last", "rule", "step"])
def test_what_is_refused_changes_nothing(name, wrong, tmp_path):
    """A state that is none of its parameter's, the last of several, or a group without a rule: the run goes on as before."""
    (params, optimizer), (others, other) = (
        start(name, tmp_path / str(i) if name.startswith("Paged") else None) for i in range(2)
    )
    advanced(params, optimizer, 0, 2)
    advanced(others, other, 0, 3)
    saved = other.state_dict()
    for group in saved["param_groups"]:
        group["lr"] = 0.5
        group["rule"] = "none" if wrong == "rule" else group.get("rule", "")
    last = saved["state"][len(params) - 1]
    if wrong == "last":
        key = next(iter(last[WRAPPED]))
        last[WRAPPED][key] = last[WRAPPED][key][:3]
    if wrong == "step":
        del last["step"]
    with pytest.raises(ValueError, match=r"none|has 3 numbers|has no 'step'"):
        optimizer.load_state_dict(saved)
    want, (again, undisturbed) = advanced(params, optimizer, 2, 4), start(name)
    assert same_bits(want, advanced(again, undisturbed, 0, 4))
    assert {group["lr"] for group in optimizer.param_groups} == {group["lr"] for group in undisturbed.param_groups}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("where", ["group", "parameter"])
def test_a_block_size_of_its_own_is_saved_and_loaded(where):
    """A group's, or that of one parameter: the states of these have other numbers of scales."""

    def begun():
        params, _ = start("AdamW8bit")
        if where == "parameter":
            optim.GlobalOptimManager.get_instance().override_config(params[0], "blocksize", 128)
        groups = [{"params": params[:1], **({"blocksize": 128} if where == "group" else {})}, {"params": params[1:]}]
        return params, make("AdamW8bit", groups, lr=1e-2)

    params, optimizer = begun()
    advanced(params, optimizer, 0, 2)
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    want = advanced(params, optimizer, 2, 4)
    params, other = begun()
    for p, value in zip(params, values, strict=True):
        p.data.copy_(value)
    other.load_state_dict(saved)
    assert len(other.state[params[0]]["absmax1"]) == -(-70 * 61 // 128)
    assert same_bits(advanced(params, other, 2, 4), want)


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD8bit", "AdEMAMix8bit", "AdamWScheduleFree8bit", "SOAP8bit"])
def test_whoever_writes_to_the_maps_of_a_state_dict_writes_to_nobody_elses(name, eager):
    """torch.distributed.checkpoint loads into the tensors of a state dict, and safetensors saves none that share their memory."""
    p, q = (nn.Parameter(torch.ones(8, 40)) for _ in range(2))
    optimizer = make(name, [p, q], min_8bit_size=0)
    x = torch.linspace(-1, 1, 320).view(8, 40)
    before = F.quantize_blockwise(x)
    p.grad = q.grad = x
    optimizer.step()
    maps = [
        m for state in optimizer.state_dict()["state"].values() for key, m in state[WRAPPED].items() if "qmap" in key
    ]
    assert len({m.data_ptr() for m in maps}) == len(maps) > 0
    for m in maps:
        m.zero_()
    after = F.quantize_blockwise(x)
    assert same_bits(after[0], before[0])
    assert same_bits(F.dequantize_blockwise(*after), F.dequantize_blockwise(*before))
    optimizer.step()
    assert all(
        bool(m.any()) for s in optimizer.state_dict()["state"].values() for k, m in s[WRAPPED].items() if "qmap" in k
    )


@given(
    st.sampled_from(["step", "blocksize"]), st.sampled_from(["AdamW8bit", "SGD32bit", "Muon8bit"]), NUMBERS_OF_A_FILE
)
def test_the_counts_of_a_saved_state_are_counts(key, name, value):
    """A step of 2.5 was one of 2, and one of -3 failed at the next step."""
    with eagerly():
        p = nn.Parameter(torch.ones(8, 40))
        optimizer = make(name, [p], min_8bit_size=0, blocksize=64)
        p.grad = torch.ones(8, 40)
        optimizer.step()
        saved = optimizer.state_dict()
        before = str(saved)
        one = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        whole = isinstance(one, numbers.Real) and not isinstance(one, bool) and 0 <= one < 2**53 and one == int(one)
        if key in saved["state"][0]:
            changed = {**saved, "state": {0: {**saved["state"][0], key: value}}}
            right = whole and (key == "step" or one == 64)
            refused = pytest.raises(ValueError, match=f"saved {key} must be an integer|blocksize")
            with contextlib.nullcontext() if right else refused:
                optimizer.load_state_dict(changed)
                assert optimizer.state[p][key] == one
            assert right or str(optimizer.state_dict()) == before
            optimizer.step()


# What a file may have in the place of a tensor.
STRANGE = {
    "itself": lambda x: x, "none": lambda x: None, "a list": torch.Tensor.tolist, "an integer": lambda x: 3, "a string": repr,
    "nothing": lambda x: x.flatten()[:0], "a number": lambda x: torch.ones((), dtype=x.dtype), "one less": lambda x: x[1:],
    "one": lambda x: x[:1], "a side more": lambda x: x[None], "in a row": torch.Tensor.flatten,
    "twice": lambda x: torch.cat([x, x]), "complex": lambda x: x.to(torch.complex64), "bool": torch.Tensor.bool,
    "codes": torch.Tensor.byte, "long": torch.Tensor.long,
    "double": torch.Tensor.double, "half": torch.Tensor.half, "float8": lambda x: x.float().to(torch.float8_e5m2),
    "sparse": torch.Tensor.to_sparse, "meta": lambda x: x.to("meta"), "nan": lambda x: x.float() / 0,
    "negative": lambda x: -1 - x.float(),
}  # fmt: skip
STRANGERS = st.sampled_from(["AdamW8bit", "AdEMAMix8bit", "AdEMAMix32bit", "Lion8bit", "SGD32bit", "LAMB8bit"])


@given(STRANGERS, STRANGERS, st.sampled_from([(), (1,), (2,), (0,), (2, 300)]), st.data())
def test_whatever_a_file_has_is_loaded_or_refused(one, other, shape, data):
    """By a ValueError, after which the optimizer is what it was, or by none and then it steps."""

    def begun(name):
        p = nn.Parameter(torch.ones(shape))
        optimizer = make(name, [p], min_8bit_size=0)
        p.grad = torch.ones(shape)
        optimizer.step()
        return optimizer

    with eagerly():
        saved, optimizer = begun(one).state_dict(), begun(other)
        wrapped = saved["state"][0][WRAPPED]
        key, how = data.draw(st.sampled_from(sorted(wrapped))), data.draw(st.sampled_from(sorted(STRANGE)))
        with contextlib.suppress(IndexError, RuntimeError):  # what is no tensor of such a shape cannot be cut so
            wrapped[key] = STRANGE[how](wrapped[key])
        before = str(optimizer.state_dict())
        try:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
        except ValueError:
            assert str(optimizer.state_dict()) == before
        optimizer.step()
