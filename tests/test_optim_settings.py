"""Settings that are changed between steps, as schedules and users do: what a group may not begin with, no step takes."""

import contextlib
import copy
import fractions
import itertools
import math
import tempfile

import pytest
import torch
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optim_classes import OF_MATRICES, make
from torch import nn

from bnbref import optim
from bnbref.optim.rules import SGD, Rule, State

pytestmark = pytest.mark.usefixtures("eager")
FAMILIES = ["SGD8bit", "AdamW8bit", "Lion32bit", "LAMB8bit", "AdEMAMix8bit", "AdamWScheduleFree8bit"]
FAMILIES += [name for name in OF_MATRICES if not name.startswith("Paged") and "8bit" in name]
REFUSED = (ValueError, TypeError, NotImplementedError)

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([8, 24, 32, 100, 256, 4096])
    | st.floats(-2, 2)
    | st.sampled_from([math.nan, math.inf, "", "adamw", "0.9"])
    | st.lists(st.floats(-1, 2), max_size=4).map(tuple)
    | st.floats(-1, 1).map(torch.tensor)
)


def begun(name):
    """An optimizer that has made a step, its two parameters, and how to make a group of settings."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(30, 40)) for _ in range(2)]
    optimizer = make(name, [{"params": params[:1]}, {"params": params[1:]}], min_8bit_size=0)
    for p in params:
        p.grad = torch.randn(30, 40)
    optimizer.step()
    return optimizer, params


def everything(optimizer, params):
    return [x for p in params for x in (p.detach(), *optimizer.state[p].values()) if isinstance(x, torch.Tensor)]


@settings(max_examples=60)
@given(st.sampled_from(FAMILIES), st.data(), VALUES, st.booleans())
def test_what_a_group_may_not_begin_with_no_step_takes(name, data, value, of_one):
    """It changes nothing. of_one: the setting of one parameter, by `GlobalOptimManager`."""
    optimizer, params = begun(name)
    others = ("foreach", "fused", "capturable", "differentiable")
    key = data.draw(st.sampled_from(sorted({*optimizer._own, *optimizer.defaults, *others})))
    fresh = nn.Parameter(torch.ones(30, 40))
    try:
        copy.deepcopy(optimizer).add_param_group({"params": [fresh], key: value})
        refused = False
    except REFUSED:
        refused = True
    except RuntimeError:
        assert key == "train_mode"  # averages make no step
        refused = True
    if of_one:
        optim.GlobalOptimManager.get_instance().override_config(params[1], key, value)
    else:
        optimizer.param_groups[1][key] = value
    before = copy.deepcopy(everything(optimizer, params))
    try:
        optimizer.step()
        stepped = True
    except REFUSED:
        stepped = False
    except RuntimeError:
        stepped = key != "train_mode"  # averages make no step
    after = everything(optimizer, params)
    assert not (stepped and refused)
    assert stepped or same_bits(after, before)
    assert all(bool(x.isfinite().all()) for x in after if x.is_floating_point())


@given(
    st.sampled_from([name for name in FAMILIES if "8bit" in name]), st.integers(1, 120), st.data(),
    st.sampled_from(["later", "loaded", "put", "pages"]),
)  # fmt: skip
def test_blocks_stay_what_they_were(name, numel, data, how):
    """Another size that would make other blocks is refused, and changes nothing: as many of them, too, or in another run."""
    sizes = st.integers(1, 150) | st.sampled_from([256, 512, numel, numel + 1, 2**40])
    before = data.draw(sizes)
    after = data.draw(sizes | st.integers(max(1, before - 3), before + 3))
    same = min(before, numel) == min(after, numel)
    own = {"beta1": 0.9} if "Adafactor" in name else {}
    params = [nn.Parameter(torch.linspace(-1, 1, numel).view(1, -1)) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        pages = {"page_directory": folder} if how == "pages" else {}
        ours, twin = (make(name, [x], min_8bit_size=0, blocksize=before, **own) for x in params)
        ours = make(name, params[:1], min_8bit_size=0, blocksize=before, **own, **pages)
        for t in range(2):
            for p in params:
                p.grad = torch.sin(torch.arange(numel) * (t + 1.0)).view(1, -1)
            ours.step()
            twin.step()
        want = copy.deepcopy(everything(ours, params[:1]))
        saved = {**ours.state_dict(), **({"state": optim.read_pages(folder)} if pages else {})}
        refused = contextlib.nullcontext() if same else pytest.raises(ValueError, match="blocksize")
        if how == "later":
            ours.param_groups[0]["blocksize"] = after
        else:
            ours = make(name, params[:1], min_8bit_size=0, blocksize=after, **own)
        if how == "put":
            ours.state[params[0]] = saved["state"][0]
        with refused:
            if how in ("loaded", "pages"):
                ours.load_state_dict(saved)
            ours.step()
            twin.step()
        if same:
            assert same_bits(everything(ours, params[:1]), everything(twin, params[1:]))
        else:
            assert same_bits(params[0].detach(), want[0])
            assert how != "later" or same_bits(everything(ours, params[:1]), want)


def test_blocks_of_256_say_nothing_in_a_file():
    """Which is then bitsandbytes' to the letter."""
    for blocksize, counts in ((256, {"step"}), (128, {"step", "blocksize"}), (5000, {"step", "blocksize"})):
        p = nn.Parameter(torch.ones(1000))
        p.grad = torch.ones(1000)
        optimizer = optim.AdamW8bit([p], min_8bit_size=0, blocksize=blocksize)
        optimizer.step()
        assert optimizer.state_dict()["state"][0].keys() == {*counts, "__bnb_optimizer_quant_state__"}


@pytest.mark.parametrize("blocksize", [64, 256, 2048, 5000])
def test_states_of_bitsandbytes_do_not_say_their_blocksize(blocksize):
    """The number of their scales tells. bitsandbytes had blocks of 2048 until 0.43, and has blocks of 256 since."""

    def stepped(p):
        p.grad = torch.sin(torch.arange(6000.0))
        optimizer = optim.AdamW8bit([p], min_8bit_size=0, blocksize=blocksize)
        optimizer.step()
        return optimizer

    p, resumed = (nn.Parameter(torch.ones(6000)) for _ in range(2))
    optimizer, later = stepped(p), stepped(resumed)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].pop("blocksize", None)
    later.load_state_dict(saved)
    for each in (optimizer, later):
        each.step()
    assert torch.equal(p, resumed)
    another = optim.AdamW8bit([p], min_8bit_size=0, blocksize=2 * blocksize)
    with pytest.raises(ValueError, match="blocksize"):
        another.load_state_dict(saved)


def test_a_group_of_another_rule_than_its_states():
    p = nn.Parameter(torch.ones(8, 9))
    p.grad = torch.ones(8, 9)
    optimizer = optim.Muon8bit([p])
    optimizer.step()
    optimizer.param_groups[0]["rule"] = "adamw"
    with pytest.raises(
        ValueError, match=r"has \['momentum', 'step'\] and no 'state1', which Adam keeps: it began by another"
    ):
        optimizer.step()
    del optimizer.state[p]
    optimizer.step()


def test_a_group_has_no_momentum_where_the_optimizer_has_none():
    """Adafactor keeps one, or not, for all groups: a group that asks for it in vain would be stepped without."""
    with pytest.raises(ValueError, match="beta1 of a group must be 0 where the optimizer's is"):
        optim.Adafactor([{"params": [nn.Parameter(torch.ones(4, 4))], "beta1": 0.9}])
    optim.Adafactor([{"params": [nn.Parameter(torch.ones(4, 4))], "beta1": 0.0}], beta1=0.9)


@given(
    st.sampled_from(["AdamW8bit", "SGD32bit", "Adafactor8bit"]),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=3), st.booleans(),
)  # fmt: skip
def test_a_parameter_has_memory_for_each_element(name, sides, later):
    """Of an expanded tensor, or of one whose rows overlap, no step could make what it should."""
    shape, strides = zip(*sides, strict=True)
    data = torch.randn(64 + sum(size * stride for size, stride in sides)).as_strided(shape, strides)
    places = torch.arange(1000).as_strided(shape, strides).reshape(-1).tolist()
    p = nn.Parameter(torch.ones(shape) if later else data)
    p.grad = torch.ones(shape)
    before, said = data.clone(), ""
    try:
        optimizer = make(name, [p])
        p.data = data
        optimizer.step()
    except ValueError as error:
        said = str(error)
    if said:
        assert "must have memory for each of its elements" in said
        assert not data.is_contiguous()
        assert torch.equal(data, before)
    else:
        assert len({*places}) == len(places)
        q = nn.Parameter(before.contiguous())
        q.grad = p.grad
        make(name, [q]).step()
        assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 4, 5)])
def test_a_parameter_may_lie_as_torch_lays_it(shape):
    for order in itertools.permutations(range(len(shape))):
        for data in (
            torch.ones(shape).permute(order),
            torch.ones([2 * size for size in shape])[1::2, ::2].permute(order),
        ):
            p = nn.Parameter(data)
            p.grad = torch.ones(p.shape)
            optim.AdamW8bit([p]).step()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("steps", [2, 100])
def test_a_schedule_may_end_at_no_learning_rate(steps):
    """By its roundings torch's LinearLR ends at -1.85e-20 for a hundred steps; a learning rate that is negative is none."""
    p = nn.Parameter(torch.ones(8))
    optimizer = optim.AdamW8bit([p], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=steps)
    for _ in range(steps + 1):
        p.grad = torch.ones(8)
        optimizer.step()
        schedule.step()
    assert abs(optimizer.param_groups[0]["lr"]) < 1e-18
    optimizer.param_groups[0]["lr"] = -1e-6
    with pytest.raises(ValueError, match="lr must not be negative"):
        optimizer.step()


class Offhand(Rule):
    """A stranger's rule, which takes a name for whatever it likes."""

    states = (State("state1"),)

    def coefficients(self, t, group):
        return {"rate": 0.5, "decay": 1.0, "mine": float(group["mine"] is None)}

    def direction(self, p, g, m, c):
        return g + c.mine * m, m


OURS = (
    "lr",
    "eps",
    "weight_decay",
    "betas",
    "momentum",
    "beta1",
    "shampoo_beta",
    "frequency",
    "warmup_steps",
    "beta2_decay",
)


@given(
    st.dictionaries(st.sampled_from(OURS), VALUES, min_size=1), st.sampled_from(["defaults", "group", "one", "later"])
)
def test_a_name_means_what_its_rule_takes_it_for(own, where):
    """A stranger's frequency may be 0.5, and its eps two numbers: what our rules make of these names is none of its business."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    defaults = {**dict.fromkeys(OURS), "mine": None, **(own if where == "defaults" else {})}
    optimizer = optim.Optimizer([{"params": [p], **(own if where == "group" else {})}], Offhand(), defaults)
    if where == "one":
        optim.GlobalOptimManager.get_instance().override_config(p, key_value_dict=own)
    elif where == "later":
        optimizer.param_groups[0].update(own)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert p.tolist() == [0.5] * 3


@given(
    st.sampled_from([*FAMILIES, "AdamWScheduleFree32bit", "RMSprop32bit", "Adagrad32bit"]), st.data(),
    st.floats(2.0**-14, 0.5, width=16), st.sampled_from(["fraction", "float16", "float32", "tensor", "bfloat16", "float64"]),
)  # fmt: skip
def test_a_number_of_any_type_is_that_number(name, data, value, kind):
    """Of numpy's types, too, whose arithmetic would round the coefficients to their own precision."""
    numpy = pytest.importorskip("numpy")
    kinds = {"fraction": fractions.Fraction, "tensor": torch.tensor, "bfloat16": lambda x: torch.tensor(x).bfloat16()}
    made = kinds.get(kind) or getattr(numpy, kind)
    value = float(made(value))  # of bfloat16 it is another one
    ends = []
    key = data.draw(st.sampled_from(["lr", "weight_decay", "eps", "betas"]))
    for x in (value, made(value)):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(20, 30))
        optimizer = make(name, [p], min_8bit_size=0)
        if key in optimizer.defaults:
            count = len(optimizer.defaults["betas"]) if key == "betas" else 0
            optimizer.param_groups[0][key] = (x,) * count or x
        for _ in range(3):
            p.grad = torch.randn(20, 30)
            optimizer.step()
        ends.append(everything(optimizer, [p]))
    assert same_bits(*ends)


@given(st.floats(2.0**-20, 4.0), st.sampled_from(["group", "later", "one", "loaded"]))
def test_eps_of_a_group_is_that_of_its_rule(eps, where):
    """Muon's is the least norm by which newton_schulz divides; that of AdamW's groups is another, with another default."""
    p, q, v = (nn.Parameter(torch.full(shape, 2.0**-9)) for shape in ((4, 5), (4, 5), (3,)))
    groups = [{"params": [p], **({"eps": eps} if where == "group" else {})}, {"params": [v], "rule": "adamw"}]
    ours, want = optim.Muon(groups, adamw_eps=1e-4), torch.optim.Muon([q], eps=eps)
    assert [group["eps"] for group in ours.param_groups] == [eps if where == "group" else 1e-7, 1e-4]
    if where == "later":
        ours.param_groups[0]["eps"] = eps
    elif where == "one":
        optim.GlobalOptimManager.get_instance().override_config(p, "eps", eps)
    elif where == "loaded":
        saved = optim.Muon([{"params": [p]}, groups[1]], eps=eps).state_dict()
        ours.load_state_dict(saved)
    p.grad, q.grad = (torch.linspace(-1, 1, 20).view(4, 5) * 2.0**-9 for _ in range(2))
    ours.step()
    want.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # a step is 1e-3 long, and torch rounds it to bfloat16


@pytest.mark.parametrize("name", ["SGD8bit", "Lion8bit", "Adagrad8bit", "Muon8bit"])
@pytest.mark.parametrize(
    "wrong", [{"eps": "1e-8"}, {"eps": -1}, {"betas": ("0.9", 0.5)}, {"betas": 2}, {"betas": None}]
)
def test_what_no_rule_of_the_group_reads_is_judged_too(name, wrong):
    """eps of Lion, betas of Adagrad: they are settings of the group, and a rule that it changes to may read them."""
    (setting,) = wrong
    with pytest.raises(REFUSED, match=f"^{setting} must"):
        make(name, [{"params": [nn.Parameter(torch.ones(2, 2))], **wrong}])


def test_overrides_are_of_parameters():
    manager, p = optim.GlobalOptimManager.get_instance(), nn.Parameter(torch.ones(2))
    for call, message in (
        (lambda: manager.override_config(None, "lr", 1.0), "parameters must be a torch.Tensor or Iterable, got None"),
        (lambda: manager.override_config([p, "w"], "lr", 1.0), "each of parameters must be a torch.Tensor, got 'w'"),
        (lambda: manager.override_config(p, 3, 1.0), "key must be a str or None, got 3"),
        (lambda: manager.override_config(p, key_value_dict=[1]), "key_value_dict must be a Mapping or None, got list"),
        (lambda: manager.register_module_override("m", "w", {}), "module must be a Module, got 'm'"),
        (lambda: manager.register_module_override(nn.Linear(1, 1), 0, {}), "param_name must be a str, got 0"),
        (lambda: manager.register_module_override(nn.Linear(1, 1), "weight", 8), "config must be a Mapping, got 8"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert p not in manager.overrides()


def test_what_a_rule_and_its_defaults_are_is_asked_when_the_optimizer_is_made():
    p = [nn.Parameter(torch.ones(2))]
    for field, value, message in (
        ("clipped", "no", "clipped of SGD must be True or False, got 'no'"),
        ("defaults", None, "defaults of SGD must be a dict of settings, got None"),
    ):
        rule = SGD()
        setattr(rule, field, value)
        with pytest.raises(TypeError, match=message):
            optim.Optimizer(p, rule, {"lr": 0.1, "betas": (0.5,), "weight_decay": 0})
    with pytest.raises(TypeError, match="defaults must be a Mapping, got None"):
        optim.Optimizer(p, SGD(), None)


def test_exact_weights_are_those_of_tensors():
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([p])
    with pytest.raises(TypeError, match=r"p must be a torch\.Tensor, got 'p'"):
        optimizer.exact_weight("p")
    with pytest.raises(TypeError, match=r"value must be a torch\.Tensor, got list"):
        optimizer.set_exact_weight(p, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"value must be float32 of shape \(2,\), .* on meta"):
        optimizer.set_exact_weight(p, torch.empty(2, device="meta"))
