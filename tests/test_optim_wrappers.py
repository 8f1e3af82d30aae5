"""Strangers' classes around an optimizer: what they keep in its `state`, and saved states that they put there themselves."""

import copy
import warnings

import pytest
import torch
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st
from test_optim_classes import ALL, OF_MATRICES, by_rule, make
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from bnbref import optim
from bnbref.optim.rule import absmax_key, qmap_key
from bnbref.optim.state_dict import WRAPPED

pytestmark = pytest.mark.usefixtures("eager")

NAMES = [name for name in (*ALL, *OF_MATRICES) if not name.startswith("Paged")]


def parameter(dtype=torch.float32, shape=(30, 20)):
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(shape).to(dtype))


def made(name, p, **options):
    return make(name, by_rule(name, [p]), min_8bit_size=1, **options)


def same(a, b):
    """Whether two saved states have the same tensors."""
    return a.keys() == b.keys() and same_bits(list(a.values()), list(b.values()))


def stepped(p, optimizer, *times):
    for t in times:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p.dtype)
        optimizer.step()


class Lookahead:
    """timm's and others': slow weights (1907.08610) are kept in the state of the optimizer within."""

    def __init__(self, base):
        self.base = base
        for group in base.param_groups:
            group.setdefault("lookahead_step", 0)

    @torch.no_grad()
    def step(self):
        self.base.step()
        for group in self.base.param_groups:
            group["lookahead_step"] += 1
            for p in group["params"]:
                state = self.base.state[p]
                if "slow" not in state:
                    state["slow"] = p.detach().clone()
                if group["lookahead_step"] % 3 == 0:
                    p.copy_(state["slow"].lerp_(p, 0.5))


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD", "AdEMAMix8bit", "LAMB", "AdamWScheduleFree"])
def test_what_a_wrapper_keeps_is_resumed(name):
    p = parameter()
    stepped(p, Lookahead(made(name, p)), *range(7))
    q = parameter()
    first = made(name, q)
    stepped(q, Lookahead(first), *range(4))
    saved = copy.deepcopy(first.state_dict())
    r = nn.Parameter(q.detach().clone())
    second = made(name, r)
    second.load_state_dict(saved)
    wrapper = Lookahead(second)
    assert second.state[r]["slow"].data_ptr() != saved["state"][0]["slow"].data_ptr()
    stepped(r, wrapper, *range(4, 7))
    assert torch.equal(p, r)


kept = st.dictionaries(
    st.text("abcdefgh_", min_size=1, max_size=8),
    st.one_of(
        st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(max_size=3),
        st.lists(st.integers(), max_size=2), st.sampled_from([torch.int64, torch.float16]).map(lambda d: torch.ones(2, dtype=d)),
    ),
    max_size=3,
)  # fmt: skip


@given(
    name=st.sampled_from(NAMES),
    mine=kept,
    bits=st.sampled_from([None, 24]),
    first=st.booleans(),
    steps=st.integers(0, 2),
)
def test_anything_that_is_kept_comes_back_and_changes_no_step(name, mine, bits, first, steps):
    """first: whether it is there before the first step."""
    options = {"master_weight_bits": bits}
    p, q = (parameter(torch.bfloat16, (9, 30)) for _ in range(2))
    alone, other = (made(name, x, **options) for x in (p, q))
    if first:
        other.state[q].update(copy.deepcopy(mine))
    stepped(q, other, *range(steps))
    other.state[q].update(copy.deepcopy(mine))
    fresh = made(name, q, **options)
    fresh.load_state_dict(other.state_dict())
    got = {key: x for key, x in fresh.state[q].items() if key in mine}
    assert str(got) == str({key: mine[key] for key in got})
    assert got.keys() == mine.keys()
    stepped(q, fresh, steps)
    stepped(p, alone, *range(steps + 1))
    assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
@pytest.mark.parametrize("name", ["AdamW8bit", "SOAP", "SGD"])
def test_a_parameter_without_a_step_is_saved(name):
    """`state` is a defaultdict: whoever looks makes an entry. A step that was refused made one, too."""
    p = parameter()
    optimizer = made(name, p)
    assert optimizer.state[p] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    p.grad = torch.sparse_coo_tensor(
        torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), p.shape, check_invariants=False
    )
    optimizer = made(name, p)
    with pytest.raises(ValueError, match="a gradient must be dense"):
        optimizer.step()
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "SGD", "Muon8bit", "AdamWScheduleFree8bit"])
def test_a_saved_state_that_is_put_in_place(name):
    """Before it is read at the next step, it is saved as it came."""
    p, q = parameter(), parameter()
    first, second = made(name, p), made(name, q)
    stepped(p, first, 0, 1)
    stepped(q, second, 0, 1)
    before = copy.deepcopy(second.state_dict()["state"][0])
    second.state[q] = copy.deepcopy(before)
    assert same(second.state_dict()["state"][0][WRAPPED], before[WRAPPED])
    if name == "AdamWScheduleFree8bit":
        first.eval(), second.eval()
        assert torch.equal(p, q)
        first.train(), second.train()
    stepped(p, first, 2)
    stepped(q, second, 2)
    assert torch.equal(p, q)


def test_a_correction_that_is_put_in_place():
    p = parameter(torch.bfloat16)
    optimizer = optim.AdamW8bit([p], min_8bit_size=1, master_weight_bits=32)
    stepped(p, optimizer, 0)
    want = optimizer.exact_weight(p)
    optimizer.state[p] = optimizer.state_dict()["state"][0]
    assert torch.equal(optimizer.exact_weight(p), want)
    assert not torch.equal(want, p.float())


def test_zero_redundancy_optimizer(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        p, q = parameter(), parameter()
        stepped(p, optim.AdamW8bit([p], min_8bit_size=1), 0, 1, 2)
        optimizer = ZeroRedundancyOptimizer([q], optim.AdamW8bit, lr=1e-3, min_8bit_size=1)
        stepped(q, optimizer, 0, 1)
        optimizer.consolidate_state_dict()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = ZeroRedundancyOptimizer([q], optim.AdamW8bit, lr=1e-3, min_8bit_size=1)
        optimizer.load_state_dict(saved)
        optimizer.consolidate_state_dict()
        assert same(optimizer.state_dict()["state"][0][WRAPPED], saved["state"][0][WRAPPED])
        stepped(q, optimizer, 2)
        assert torch.equal(p, q)
    finally:
        torch.distributed.destroy_process_group()


def test_a_state_of_another_rule_is_refused_in_a_wrapper_too():
    p = parameter()
    adam, lion = optim.AdamW8bit([p], min_8bit_size=1), optim.Lion8bit([p], min_8bit_size=1)
    stepped(p, adam, 0)
    lion.state[p] = adam.state_dict()["state"][0]
    with pytest.raises(ValueError, match="it is of another rule"):
        lion.step()
    names = {name("state1") for name in (str, absmax_key, qmap_key)}
    assert names < adam.state_dict()["state"][0][WRAPPED].keys()


def test_a_step_inside_a_graph():
    """Coefficients are made anew at each step: Dynamo neither keeps those of the first nor warns of what it met."""
    ends = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        torch._dynamo.reset()
        p = parameter()
        optimizer = optim.AdamW8bit([p], min_8bit_size=1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
        step = wrap(optimizer.step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for t in range(4):
                p.grad = torch.full_like(p, t + 1.0)
                step()
                schedule.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@given(st.sampled_from(NAMES), st.sampled_from(["lr", "step", "kept", "gone"]), st.booleans())
def test_hooks_of_others_see_what_is_saved_and_loaded(name, change, replace):
    """Whether they change it in place or return another one: before it is a state, and after it was one."""
    p = parameter()
    optimizer = made(name, p)
    stepped(p, optimizer, 0)
    plain, seen = copy.deepcopy(optimizer.state_dict()), []

    def changed(_, saved):
        seen.append(copy.deepcopy(saved))
        saved = copy.deepcopy(saved) if replace else saved
        if change == "lr":
            saved["param_groups"][0]["lr"] = 0.5
        elif change == "step":
            saved["state"][0]["step"] = 7
        elif change == "kept":
            saved["state"][0]["mine"] = "something"
        else:
            del saved["state"][0]
        return saved if replace else None

    optimizer.register_state_dict_post_hook(changed)
    saved = optimizer.state_dict()
    fresh = made(name, p)
    fresh.load_state_dict(saved)
    other = made(name, p)
    other.register_load_state_dict_pre_hook(changed)
    other.load_state_dict(copy.deepcopy(plain))
    assert len(seen) == 2
    for one in seen:
        assert same(one["state"][0][WRAPPED], plain["state"][0][WRAPPED])
        assert one["param_groups"] == plain["param_groups"]
    for loaded in (fresh, other):
        state, group = loaded.state.get(p, {}), loaded.param_groups[0]
        got = {"lr": group["lr"] == 0.5, "step": state.get("step") == 7, "kept": "mine" in state, "gone": not state}
        assert got == {key: key == change for key in got}
    assert same(made_plain(optimizer)["state"][0][WRAPPED], plain["state"][0][WRAPPED])


@pytest.mark.parametrize("kept", [3, {"count": 3}, None])
def test_what_is_kept_under_a_key_that_is_no_parameters_comes_back(kept):
    p = parameter()
    optimizer = made("AdamW8bit", p)
    optimizer.state["of others"] = kept
    stepped(p, optimizer, 0)
    fresh = made("AdamW8bit", p)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state["of others"] == kept
    stepped(p, fresh, 1)
    for key, state in ((1, {}), ("0", {"step": 1}), ("weight", optimizer.state_dict()["state"][0])):
        saved = optimizer.state_dict()
        saved["state"][key] = state
        with pytest.raises(ValueError, match=f"states of parameters that are in none of its param_groups.*{key}"):
            fresh.load_state_dict(saved)


def test_a_hook_may_unwrap_what_is_loaded():
    p = parameter()
    optimizer = made("AdamW8bit", p)
    stepped(p, optimizer, 0)
    fresh = made("AdamW8bit", p)
    fresh.register_load_state_dict_pre_hook(lambda _, given: given["optimizer"])
    fresh.load_state_dict({"optimizer": optimizer.state_dict(), "epoch": 1})
    assert same(made_plain(fresh)["state"][0][WRAPPED], made_plain(optimizer)["state"][0][WRAPPED])


@pytest.mark.parametrize("how", ["step", "load"])
@pytest.mark.parametrize("files", [False, True])
def test_what_began_in_inference_mode_is_stepped_outside_of_it(how, files, tmp_path):
    """torch.optim's loaded states are, too; those that began there are not."""
    p, q = parameter(torch.bfloat16), parameter(torch.bfloat16)
    inside, outside = (
        made("AdamW8bit", x, master_weight_bits=24, **({"page_directory": tmp_path} if files and x is p else {}))
        for x in (p, q)
    )
    if how == "load":
        stepped(p, inside, 0)
        inside.state[p]["mine"] = torch.ones(2)
    with torch.inference_mode():
        stepped(p, inside, 0) if how == "step" else inside.load_state_dict(copy.deepcopy(inside.state_dict()))
    assert not any(x.is_inference() for x in inside.state[p].values() if isinstance(x, torch.Tensor))
    stepped(p, inside, 1)
    stepped(q, outside, 0, 1)
    assert same_bits(p.detach(), q.detach())


def made_plain(optimizer):
    """What an optimizer saves when the hooks of others are gone."""
    optimizer._optimizer_state_dict_post_hooks.clear()
    return optimizer.state_dict()
