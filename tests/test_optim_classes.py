"""The surface: bitsandbytes' names and signatures, and everything that a torch.optim.Optimizer can do."""

import contextlib
import copy
import inspect
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import same_bits
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import bnbref
from bnbref import optim
from bnbref.optim.family import UNUSED

pytestmark = pytest.mark.usefixtures("eager")

# bitsandbytes 0.50.2, inspect.signature of every class of bitsandbytes.optim, without self and params.
_ADAM = "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay={}, amsgrad=False, optim_bits=32, args=None, min_8bit_size=4096"
_MIX = "lr=0.001, betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha=None, t_beta3=None, eps=1e-08, weight_decay=0.01"
_SGD = "lr, momentum=0, dampening=0, weight_decay=0, nesterov=False"
_LAMB = "lr=0.001, bias_correction=True, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=False, adam_w_mode=True"
_RMS = "lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, centered=False"
_GRAD = "lr=0.01, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, optim_bits={}"
_LION = "lr=0.0001, betas=(0.9, 0.99), weight_decay=0"
SIGNATURES = {
    "AdEMAMix": _MIX + ", optim_bits=32, min_8bit_size=4096, is_paged=False",
    "AdEMAMix32bit AdEMAMix8bit": _MIX + ", min_8bit_size=4096, is_paged=False",
    "PagedAdEMAMix": _MIX + ", optim_bits=32, min_8bit_size=4096",
    "PagedAdEMAMix32bit PagedAdEMAMix8bit": _MIX + ", min_8bit_size=4096",
    "Adagrad Adagrad32bit": _GRAD.format(32) + ", args=None, min_8bit_size=4096",
    "Adagrad8bit": _GRAD.format(8) + ", args=None, min_8bit_size=4096",
    "Adam Adam32bit Adam8bit PagedAdam PagedAdam32bit PagedAdam8bit": _ADAM.format(0) + ", is_paged=False",
    "AdamW AdamW32bit AdamW8bit": _ADAM.format(0.01) + ", is_paged=False",
    "PagedAdamW PagedAdamW32bit PagedAdamW8bit": _ADAM.format(0.01),
    "LAMB": _LAMB + ", optim_bits=32, args=None, min_8bit_size=4096, max_unorm=1.0",
    "LAMB32bit LAMB8bit": _LAMB + ", args=None, min_8bit_size=4096, max_unorm=1.0",
    "LARS": _SGD + ", optim_bits=32, args=None, min_8bit_size=4096, max_unorm=0.02",
    "LARS32bit LARS8bit": _SGD + ", args=None, min_8bit_size=4096, max_unorm=0.02",
    "Lion": _LION + ", optim_bits=32, args=None, min_8bit_size=4096, is_paged=False",
    "Lion32bit Lion8bit": _LION + ", args=None, min_8bit_size=4096, is_paged=False",
    "PagedLion": _LION + ", optim_bits=32, args=None, min_8bit_size=4096",
    "PagedLion32bit PagedLion8bit": _LION + ", args=None, min_8bit_size=4096",
    "RMSprop": _RMS + ", optim_bits=32, args=None, min_8bit_size=4096",
    "RMSprop32bit RMSprop8bit": _RMS + ", args=None, min_8bit_size=4096",
    "SGD": _SGD + ", optim_bits=32, args=None, min_8bit_size=4096",
    "SGD32bit SGD8bit": _SGD + ", args=None, min_8bit_size=4096",
}
NAMES = [name for names in SIGNATURES for name in names.split()]
ALL = [
    prefix + family + suffix
    for family in (
        "SGD",
        "Adam",
        "AdamW",
        "Lion",
        "LAMB",
        "LARS",
        "RMSprop",
        "Adagrad",
        "AdEMAMix",
        "AdamWScheduleFree",
    )
    for prefix in ("", "Paged")
    for suffix in ("", "8bit", "32bit")
]


OF_MATRICES = [
    prefix + family + suffix
    for family in ("Muon", "Adafactor", "SOAP")
    for prefix in ("", "Paged")
    for suffix in ("", "8bit", "32bit")
]
"""Without a counterpart in bitsandbytes: test_optim_matrices.py."""

MATRICES_ALONE = ("Muon", "SOAP")
"""Families that take no vectors, and have a second rule for these, "adamw"."""


def by_rule(name, params, **settings):
    """Groups of parameters: those that are no matrices apart, where the class has another rule for them."""
    if not any(family in name for family in MATRICES_ALONE):
        return [{"params": params, **settings}]
    matrices, others = [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]
    return [{"params": matrices, **settings}, {"params": others, "rule": "adamw", **settings}]


def make(name, params, **arguments):
    needed = {"lr": 1e-2, "momentum": 0.9} if "SGD" in name or "LARS" in name else {}
    return getattr(optim, name)(params, **{**needed, **arguments})


def parameter(numel=5000, dtype=torch.float32):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(numel).to(dtype))
    p.grad = torch.randn(numel).to(dtype)
    return p


def test_all_are_there():
    assert set(NAMES) <= set(ALL)
    others = {"GlobalOptimManager", "GradientRelease", "Optimizer", "Rule", "State", "muon_groups", "read_pages"}
    assert {*ALL, *OF_MATRICES, *others} == set(optim.__all__)


@pytest.mark.parametrize(("names", "want"), SIGNATURES.items())
def test_signatures_are_bitsandbytes(names, want):
    for name in names.split():
        parameters = list(inspect.signature(getattr(optim, name)).parameters.values())[1:]
        assert parameters.pop().kind is inspect.Parameter.VAR_KEYWORD  # ours, by name alone
        # Adam8bit(optim_bits=32) and PagedAdam(is_paged=False) are what bitsandbytes says; here the default is the truth.
        fixed = {"optim_bits": 8 if "8bit" in name else 32, "is_paged": name.startswith("Paged")}
        got = [(p.name, p.default) for p in parameters]
        for text, (argument, default) in zip(want.split(", ") if "(" not in want else split(want), got, strict=True):
            assert text.partition("=")[0] == argument
            if argument not in fixed and "=" in text:
                assert eval(text.partition("=")[2]) == default
            if argument in fixed:
                assert default == fixed[argument]


def split(text):
    """At the commas outside of parentheses."""
    parts = [""]
    depth = 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def test_signatures_are_those_of_the_installed_bitsandbytes():
    theirs = pytest.importorskip("bitsandbytes").optim
    for names, want in SIGNATURES.items():
        for name in names.split():
            parameters = list(inspect.signature(getattr(theirs, name)).parameters.values())[1:]
            assert [p.name for p in parameters] == [part.partition("=")[0] for part in split(want)], name


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:paged state")
def test_every_class_steps_copies_and_pickles(name):
    p = parameter()
    optimizer = make(name, [p])
    optimizer.step()
    (first, *_) = optimizer.rule.states
    assert optimizer.state[p][first.key].dtype == (torch.uint8 if "8bit" in name else torch.float32)
    assert optimizer.is_paged == name.startswith("Paged")
    assert type(optimizer).__name__ in repr(optimizer)
    assert "p" in inspect.getdoc(type(optimizer))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        [q] = other.param_groups[0]["params"]
        q.grad = torch.ones_like(q)
        expected = p.detach().clone()
        assert same_bits(q.data, expected)
        other.step()
        again = nn.Parameter(expected)
        again.grad = torch.ones_like(q)
        fresh = make(name, [again])
        fresh.load_state_dict(optimizer.state_dict())
        fresh.step()
        assert same_bits(q.data, again.data)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Adam", {"amsgrad": True}, "amsgrad of Adam"),
        ("AdamW8bit", {"optim_bits": 16}, "optim_bits of AdamW8bit is 8, got 16"),
        ("AdamW", {"optim_bits": 4}, "optim_bits must be 8 or 32, got 4"),
        ("Adagrad8bit", {"optim_bits": 32}, "optim_bits of Adagrad8bit is 8, got 32"),
        ("Lion8bit", {"optim_bits": 32}, "optim_bits of Lion8bit is 8, got 32"),
        ("PagedLion", {"is_paged": False}, "is_paged of PagedLion is True, got False"),
        ("AdamW", {"lr": -1.0}, "lr must not be negative"),
        ("AdamW", {"betas": (0.9, 1.0)}, "betas must lie in"),
        ("AdamW", {"args": object()}, "args of AdamW must be left"),
        ("AdamW", {"blocksize": 0}, "blocksize must be a positive"),
        ("SGD", {"nesterov": True}, "nesterov of SGD"),
        ("SGD8bit", {"dampening": 0.5}, "dampening of SGD8bit"),
        ("LAMB", {"adam_w_mode": False}, "adam_w_mode"),
        ("RMSprop", {"centered": True}, "centered of RMSprop"),
        ("RMSprop8bit", {"momentum": 0.9}, "momentum of RMSprop8bit"),
        ("Adagrad", {"lr_decay": 0.1}, "lr_decay of Adagrad"),
        ("AdamW", {"lr": None}, "lr must not be negative, but a finite number, got None"),
        ("AdamW", {"lr": float("nan")}, "lr must not be negative, but a finite number, got nan"),
        ("AdamW", {"lr": torch.tensor([0.1, 0.2])}, "lr must not be negative, but a finite number"),
        ("AdamW", {"betas": (0.9,)}, r"betas must be 2 numbers, got \(0.9,\)"),
        ("LAMB32bit", {"betas": None}, "betas must be 2 numbers, got None"),
        ("Lion8bit", {"betas": (0.9, 0.99, 0.999)}, "betas must be 2 numbers"),
        ("AdamW8bit", {"betas": "(0.9, many)"}, "betas must be 2 numbers"),
        ("AdEMAMix8bit", {"betas": (0.9, 0.99)}, "betas must be 3 numbers"),
        ("AdamW8bit", {"blocksize": True}, "blocksize must be a positive integer, got True"),
        ("AdamW8bit", {"blocksize": 2.5}, "blocksize must be a positive"),
        ("AdEMAMix", {"t_beta3": 3, "betas": (0.0, 0.9, 0.9)}, "t_beta3"),
    ],
)
def test_refusals(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name, [parameter()], **arguments)


def test_a_gradient_of_another_shape_is_refused():
    p = parameter(100)
    p.data = p.data[:50]  # as a table that is cut between the backward pass and the step
    optimizer = optim.AdamW8bit([p])
    with pytest.raises(
        ValueError, match=r"a gradient must have the shape .* here it has shape \(100,\), the parameter \(50,\)"
    ):
        optimizer.step()
    assert not optimizer.state[p]


USED = {"SGD": {"momentum"}, "LARS": {"momentum"}, "Muon": {"momentum", "nesterov"}}
"""By family, the arguments of `UNUSED` that mean something to it."""


@pytest.mark.parametrize("name", [name for name in [*ALL, *OF_MATRICES] if not name.startswith("Paged")])
def test_an_argument_without_use_is_refused(name):
    used = USED.get(name.removesuffix("8bit").removesuffix("32bit"), set())
    for argument in (UNUSED.keys() & inspect.signature(getattr(optim, name)).parameters.keys()) - used:
        with pytest.raises(ValueError, match=f"{argument} of {name} must be left at its default, got 0.5"):
            make(name, [parameter()], **{argument: 0.5})


@pytest.mark.parametrize(("name", "argument"), [("LARS8bit", "momentum"), ("RMSprop", "alpha")])
def test_an_average_of_nothing_is_another_rule(name, argument):
    with pytest.raises(NotImplementedError, match=f"{argument} must be above 0"):
        make(name, [parameter()], **{argument: 0})


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AssertionError, KeyboardInterrupt, ValueError])
def test_a_group_that_fails_is_no_group(error):
    """Whatever a stranger's rule raises when it is asked for its coefficients."""

    class Picky(optim.rules.SGD):
        def coefficients(self, t, group):
            if group["lr"] > 1:
                raise error("too fast")
            return super().coefficients(t, group)

    optimizer = optim.Optimizer([parameter()], Picky(), {"lr": 0.5, "weight_decay": 0.0, "betas": (0.9,)})
    with pytest.raises((error, ValueError), match="too fast"):
        optimizer.add_param_group({"params": [parameter()], "lr": 2.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.booleans())
def test_a_parameter_that_a_group_has_twice_is_refused(places, added):
    """Tied weights, gathered by hand: one gradient would be two steps."""
    ps = [parameter() for _ in range(5)]
    group, optimizer = [ps[i] for i in places], optim.AdamW([ps[4]])
    twice = len(set(places)) < len(places)
    with pytest.raises(ValueError, match="once") if twice else contextlib.nullcontext():
        optimizer.add_param_group({"params": group}) if added else optim.AdamW(group).step()
    assert len(optimizer.param_groups) == 1 + (added and not twice)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion", "PagedSGD32bit"])
def test_what_chooses_an_implementation_of_torch_changes_nothing(name):
    p, q = parameter(), parameter()
    make(name, [p]).step()
    make(name, [q], foreach=True, fused=True, capturable=False, differentiable=False, maximize=False).step()
    assert same_bits(p.data, q.data)


@pytest.mark.parametrize(
    ("name", "value"), [("percentile_clipping", 5), ("block_wise", False), ("weight_decy", 0.1), ("rho", 1)]
)
def test_an_override_that_would_mean_nothing_is_refused(name, value):
    p, q = parameter(), parameter()
    manager = optim.GlobalOptimManager.get_instance()
    manager.override_config(p, key_value_dict={"percentile_clipping": 100, "block_wise": True, "skip_zeros": False})
    optim.AdamW8bit([p]).step()
    manager.override_config(q, name, value)
    with pytest.raises(ValueError, match=f"overrides {name} by {value}, which AdamW8bit has not"):
        optim.AdamW8bit([q]).step()


@pytest.mark.parametrize("where", ["all", "group", "override"])
@pytest.mark.parametrize("name", ["capturable", "differentiable"])
def test_what_no_step_here_can_be_is_refused(name, where):
    p = parameter()
    if where == "override":
        optim.GlobalOptimManager.get_instance().override_config(p, name, True)
    ways = {
        "all": lambda: optim.AdamW8bit([p], **{name: True}),
        "group": lambda: optim.AdamW8bit([{"params": [p], name: True}]),
        "override": lambda: optim.AdamW8bit([p]).step(),
    }
    with pytest.raises(NotImplementedError, match=f"{name} must be False, got True"):
        ways[where]()


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD32bit", "Lion8bit", "RMSprop"])
def test_maximize_goes_up(name):
    """By the gradient with the other sign, for all parameters or for a group."""
    params = [parameter() for _ in range(4)]
    for p in params[2:]:
        p.grad = -p.grad
    make(name, [params[0]], maximize=True).step()
    make(name, [{"params": [params[1]], "maximize": True}, {"params": [params[3]]}]).step()
    make(name, [params[2]]).step()
    assert all(same_bits(p.data, params[0].data) for p in params)


def test_a_group_has_the_settings_that_groups_have():
    """What the constructor takes for all parameters at once would be ignored in a group."""
    with pytest.raises(ValueError, match=r"momentum is no setting of a group .*: SGD8bit has \['betas', "):
        optim.SGD8bit([{"params": [parameter()], "momentum": 0.5}], lr=0.1, momentum=0.9)
    optimizer = optim.AdamW([parameter()])
    for setting in ({"amsgrad": True}, {"is_paged": True}, {"betas": (0.9, 2.0)}, {"optim_bits": 4}, {"lr": -1}):
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": [parameter()], **setting})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [parameter()], "amsgrad": False, "foreach": None, "lr_scale": 0.5, "lr": 0.5})


def test_lr_is_a_tensor():
    """What the host computes with it is float64, as with a number."""
    p, q = parameter(), parameter()
    lr = torch.tensor(1e-3)
    ours = optim.AdamW8bit([p], lr=lr, weight_decay=0.1)
    numbers = optim.AdamW8bit([q], lr=float(lr), weight_decay=0.1)
    for _ in range(2):
        ours.step()
        numbers.step()
        lr.mul_(0.5)
        numbers.param_groups[0]["lr"] = float(lr)
    assert same_bits(p.data, q.data)


@pytest.mark.parametrize("name", ["AdamW8bit", "Adagrad32bit"])
def test_a_parameter_keeps_its_size(name):
    p, q = parameter(), parameter()
    optimizer = make(name, [q, p])
    optimizer.step()
    p.data = torch.ones(6000)
    p.grad = torch.ones(6000)
    before = q.detach().clone()
    with pytest.raises(
        ValueError, match=r"keep its shape: its state1 has \(5000,\), from its first step, the parameter now \(6000,"
    ):
        optimizer.step()
    assert same_bits(q.data, before)  # nothing has moved
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["state1"].shape == (6000,)


@given(
    name=st.sampled_from(["AdamW8bit", "Lion32bit"]),
    n=st.integers(1, 600),
    start=st.integers(-700, 700),
    every=st.sampled_from([1, 2]),
)
@example(name="AdamW8bit", n=513, start=-513, every=2)  # a row with gaps, of which the last block is stepped last
def test_a_gradient_in_the_memory_of_its_parameter(name, n, start, every):
    """Anywhere in the same memory it is as good as a copy, or refused: where a step would write what it has yet to read."""
    with bnbref.eager():
        buffer = torch.linspace(-1, 1, 3000)
        results = []
        for copied in (True, False):
            memory = buffer.clone()
            p = nn.Parameter(memory[1000 : 1000 + n])
            g = memory[1000 + start : 1000 + start + every * n : every]
            p.grad = g.clone() if copied else g
            optimizer = getattr(optim, name)([p], lr=1e-2, **({"min_8bit_size": 1} if name == "AdamW8bit" else {}))
            if not copied and every == 1 and 0 < abs(start) < n:
                with pytest.raises(ValueError, match="a gradient must not overlap its parameter in memory"):
                    optimizer.step()
                return
            optimizer.step()
            results.append(p.detach().clone())
        assert same_bits(*results)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion32bit", "Muon8bit"])
def test_a_gradient_in_the_memory_of_another_parameter_is_refused(name):
    """It would be read before that parameter's step, or after it, or a part of it before and a part after."""
    with bnbref.eager():
        buffer = torch.linspace(-1, 1, 6400).view(4, 40, 40)
        params = [nn.Parameter(buffer[0]), nn.Parameter(buffer[1])]
        optimizer = getattr(optim, name)(params, lr=1e-2)
        params[0].grad, params[1].grad = buffer[2], buffer[3]
        optimizer.step()  # one buffer for all of them
        params[0].grad = params[1].grad = buffer[3]
        optimizer.step()
        before = buffer.clone()
        for i, other in ((0, buffer[1]), (1, buffer[0]), (0, buffer[1].t()), (1, buffer.view(160, 40)[20:60])):
            params[0].grad, params[1].grad = buffer[2], buffer[3]
            params[i].grad = other
            with pytest.raises(ValueError, match="a gradient must not be memory of a parameter that makes a step"):
                optimizer.step()
        assert same_bits(buffer, before)
        wide = torch.linspace(-1, 1, 3200).view(40, 80)
        beside = [nn.Parameter(wide[:, :40]), nn.Parameter(torch.ones(40, 40))]
        beside[0].grad, beside[1].grad = wide[:, 40:], torch.ones(40, 40)
        getattr(optim, name)(beside, lr=1e-2).step()


def test_gradients_of_another_dtype():
    """16 bits and 32 are read as they are; no other dtype is."""
    p, q = parameter(dtype=torch.bfloat16), parameter(dtype=torch.bfloat16)
    again = nn.Parameter(p.detach().float())
    grad = torch.randn(5000)
    states = []
    for x, g in ((p, grad), (q, grad.to(torch.float16)), (again, grad)):
        x.grad_dtype = None
        x.grad = g
        optimizer = optim.AdamW32bit([x])
        optimizer.step()
        states.append(optimizer.state[x]["state1"])
    assert same_bits(p.data, again.data.bfloat16())
    assert same_bits(states[0], states[2])
    assert not same_bits(states[0], states[1])
    for dtype in (torch.float64, torch.complex64):
        p.grad = grad.to(dtype)
        with pytest.raises(ValueError, match=f"a gradient must be float32, float16 or bfloat16, got {dtype}"):
            optim.AdamW8bit([p]).step()


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse CSR)")  # torch calls both a prototype
@pytest.mark.parametrize("name", ["AdamW8bit", "SGD32bit", "Adafactor8bit"])
def test_what_is_not_dense_is_refused(name):
    parts, refusal = [torch.randn(3, 4), torch.randn(2, 4)], "must be dense, got"
    for layout in (torch.jagged, torch.strided):
        with pytest.raises(ValueError, match=f"a parameter {refusal} a nested tensor"):
            make(name, [nn.Parameter(torch.nested.nested_tensor(parts, layout=layout))])
    for sparse in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        with pytest.raises(ValueError, match=f"a parameter {refusal} {sparse.layout}"):
            make(name, [nn.Parameter(sparse)])
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = make(name, table.parameters())
    table(torch.arange(3)).sum().backward()
    with pytest.raises(ValueError, match=f"a gradient {refusal} torch.sparse_coo"):
        optimizer.step()


def test_named_parameters():
    layer = nn.Linear(100, 50)
    layer(torch.ones(2, 100)).sum().backward()
    optimizer = optim.AdamW8bit(layer.named_parameters())
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    other = optim.AdamW8bit(layer.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert same_bits(other.state[layer.weight]["state1"], optimizer.state[layer.weight]["state1"])


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion32bit", "LAMB8bit"])
def test_scalars_and_nothing_are_parameters(name):
    scalar, empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3))
    scalar.grad, empty.grad = torch.tensor(1.0), torch.zeros(0, 3)
    make(name, [scalar, empty], min_8bit_size=0).step()
    assert float(scalar.detach()) < 2.0


WRONG_KINDS = [None, "x", 2.5, float("nan"), [1], torch.tensor([1, 2]), object()]


@pytest.mark.parametrize("name", ["optim_bits", "min_8bit_size", "page_bytes", "is_paged", "stochastic_rounding", "maximize",
                                  "nonzero_squares",
                                  "foreach", "fused", "capturable", "generator", "page_directory"])  # fmt: skip
def test_settings_of_another_kind(name):
    """A setting that is no number, flag or generator is none: a string would be a flag that is set."""
    nothing = name in ("foreach", "fused", "generator", "page_directory")
    for value in WRONG_KINDS[2 if name == "page_directory" else 1 if nothing else 0 :]:
        with pytest.raises(TypeError, match=f"{name} must be "):
            optim.AdamW([parameter()], **{name: value})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:paged state")
def test_what_bitsandbytes_took_until_0_49_may_say_what_holds(name):
    optimizer = make(name, [parameter()], percentile_clipping=100, block_wise=True)
    optimizer.step()
    with pytest.raises(ValueError, match=f"percentile_clipping of {name} must be 100, which clips nothing, got 5"):
        make(name, [parameter()], percentile_clipping=5)
    with pytest.raises(ValueError, match=f"block_wise of {name} must be True, got False"):
        make(name, [parameter()], block_wise=False)


@pytest.mark.parametrize("name", [*ALL, *OF_MATRICES])
@pytest.mark.filterwarnings("ignore:paged state")
def test_settings_are_read_where_bitsandbytes_has_them(name):
    args = make(name, by_rule(name, [parameter()]), min_8bit_size=16).args
    expected = 8 if "8bit" in name else 32
    assert (args.optim_bits, args.min_8bit_size, args.is_paged) == (expected, 16, name.startswith("Paged"))
    assert (args.skip_zeros, args.percentile_clipping, args.block_wise) == (False, 100, True)
    assert (args.max_unorm > 0) == ("LARS" in name or "LAMB" in name)
    with pytest.raises(AttributeError):
        args.optim_bits = 8  # it would change nothing


def test_a_manager_that_is_initialized_again_has_forgotten_all(monkeypatch):
    manager = optim.GlobalOptimManager.get_instance()
    for name in ("_of_parameter", "_of_module"):
        monkeypatch.setattr(manager, name, copy.copy(getattr(manager, name)))
    layer = nn.Linear(64, 64)
    manager.override_config(layer.weight, "optim_bits", 8)
    manager.register_module_override(layer, "bias", {"lr": 0.5})
    assert len(manager.overrides()) >= 2
    manager.initialize()
    assert len(manager.overrides()) == 0


def test_sgd_needs_momentum():
    with pytest.raises(NotImplementedError, match=r"torch\.optim\.SGD"):
        optim.SGD([parameter()], lr=0.1)


def test_parameters_and_gradients_that_have_no_rule():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="float64"):
        optim.Adam([p]).step()
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optim.Adam(table.parameters()).step()


def test_betas_from_a_command_line():
    assert optim.AdamW([parameter()], betas="(0.9, 0.95)").param_groups[0]["betas"] == (0.9, 0.95)


def test_closure_groups_schedulers_and_hooks():
    p, q = parameter(), parameter(100)
    optimizer = optim.AdamW8bit([{"params": [p], "lr": 0.5}], lr=0.1)
    optimizer.add_param_group({"params": [q], "weight_decay": 0.0})
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p * p).sum() + (q * q).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.05]
    assert calls == ["post"]
    assert optimizer.state[q]["state1"].dtype == torch.float32  # below min_8bit_size
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10).step()  # it moves betas


def test_grad_scaler_skips_steps_with_infinities():
    p = parameter()
    optimizer, scaler = optim.Adam8bit([p]), torch.amp.GradScaler("cpu")
    before = p.detach().clone()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same_bits(p.detach(), before)
    optimizer.zero_grad()
    scaler.scale((p * p).sum()).backward()
    scaler.step(optimizer)
    assert not same_bits(p.detach(), before)


def test_overrides():
    layer, manager = nn.Linear(128, 64), optim.GlobalOptimManager.get_instance()
    manager.register_parameters(layer.parameters())
    manager.override_config(layer.weight, key_value_dict={"optim_bits": 32, "lr": 0.0})
    optimizer = optim.AdamW8bit(layer.parameters(), weight_decay=0.0)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["state1"].dtype == torch.float32
    assert same_bits(layer.weight.detach(), before)
    with pytest.raises(ValueError, match="key and value"):
        manager.override_config(layer.weight)
    with pytest.raises(RuntimeError, match="get_instance"):
        optim.GlobalOptimManager()


@pytest.mark.parametrize("kind", [bnbref.nn.Embedding, bnbref.nn.StableEmbedding])
def test_embeddings_keep_32_bits(kind):
    for table in (kind(100, 64), copy.deepcopy(kind(100, 64))):
        optimizer = optim.Adam8bit(table.parameters())
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
        assert optimizer.state[table.weight]["state1"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_read_as_float32_and_rounded_once(dtype):
    p = parameter(dtype=dtype)
    q = nn.Parameter(p.detach().float())
    q.grad = p.grad.float()
    optim.AdamW8bit([p]).step()
    optim.AdamW8bit([q]).step()
    assert same_bits(p.data, q.data.to(dtype))


@pytest.mark.parametrize("name", [name for name in (*ALL, *OF_MATRICES) if name.endswith("8bit")])
@pytest.mark.filterwarnings("ignore:paged state")
def test_defaults_of_torch_are_for_what_its_user_makes(name, tmp_path):
    """`torch.set_default_device` and `set_default_dtype` reach no tensor of a step, a state, a page or a state dict."""

    def run(pages):
        p = nn.Parameter(torch.linspace(-1, 1, 4200, dtype=torch.float32, device="cpu").view(60, 70))
        directory = {"page_directory": pages} if "Paged" in name else {}
        optimizer = make(name, by_rule(name, [p]), **directory)
        for _ in range(2):
            p.grad = p.detach().cos()
            optimizer.step()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        optimizer.step()
        return [p.detach(), *(t for state in saved["state"].values() for t in tensors_in(state))]

    want = run(tmp_path / "a")
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = run(tmp_path / "b")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def tensors_in(state):
    for value in state.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value


def test_settings_of_parameters_in_threads():
    """Some threads give parameters settings of their own while others read all of them, as every step does."""
    manager, interval = optim.GlobalOptimManager.get_instance(), sys.getswitchinterval()
    layers = [[nn.Linear(1, 1) for _ in range(300)] for _ in range(2)]

    def write(mine):
        for layer in mine:
            manager.register_module_override(layer, "weight", {"optim_bits": 32})
            manager.override_config(layer.bias, "optim_bits", 32)

    def read(times):
        for _ in range(times):
            manager.overrides()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            work = [*(pool.submit(write, mine) for mine in layers), pool.submit(read, 60), pool.submit(read, 60)]
            for each in work:
                each.result()
    finally:
        sys.setswitchinterval(interval)
    found = manager.overrides()
    assert all(p in found for mine in layers for layer in mine for p in layer.parameters())
