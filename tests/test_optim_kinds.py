"""What a setting may be is said once: constructor, group, loaded group and step take it or refuse it alike, by its name."""

import collections
import contextlib
import copy
import decimal
import fractions
import inspect
import math

import pytest
import torch
from conftest import same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_optim_classes import make
from torch import nn

from bnbref import optim
from bnbref.optim import kinds
from bnbref.optim.rules import Rule, SettingError, count, flag, number, one_of, weight, weights
from bnbref.optim.settings import ANYWHERE

pytestmark = [pytest.mark.usefixtures("eager"), pytest.mark.filterwarnings("ignore:paged state")]
FAMILIES = [
    "SGD", "LARS", "Adam", "AdamW", "LAMB", "Lion", "RMSprop", "Adagrad", "AdEMAMix", "AdamWScheduleFree", "Muon", "Adafactor",
    "SOAP",
]  # fmt: skip
REFUSED = (ValueError, TypeError, NotImplementedError)


def numpy_scalars():
    numpy = pytest.importorskip("numpy")
    return st.sampled_from(
        [numpy.float32(0.5), numpy.int64(3), numpy.bool_(True), numpy.float16(0.25), numpy.array([0.5, 0.75])]
    )


NUMBERS = (
    st.integers(-3, 3)
    | st.floats(-2, 2)
    | st.sampled_from([8, 24, 32, 100, 256, 1e300, 10**400, 10**5000, 2**64, 5e-324, math.nan, math.inf, -1e-13])
)
ONES = (
    NUMBERS
    | st.none()
    | st.booleans()
    | st.text(max_size=4)
    | st.sampled_from([fractions.Fraction(1, 3), fractions.Fraction(10**400), decimal.Decimal(8), 1j, b"1", "0.9"])
)
TENSORS = st.sampled_from([0.5, 3, True, [0.5], [0.5, 0.75], [1.0, 2.0], 1j]).map(torch.tensor)
WHATEVER = (
    ONES | TENSORS | st.lists(ONES, max_size=4) | st.lists(ONES, max_size=4).map(tuple) | ONES.map(lambda x: (x, x))
    | st.deferred(numpy_scalars)
    | st.sampled_from([{}, {0.5, 0.75}, math.sin, torch.ones(1, device="meta"), torch.ones(1).to_sparse()])
)  # fmt: skip


def arguments(kind):
    """The names of what a class takes beside parameters."""
    made = [own for own in kind.__mro__ if issubclass(own, optim.Optimizer)]
    found = {
        p.name for own in made for p in inspect.signature(own.__init__).parameters.values() if p.kind != p.VAR_KEYWORD
    }
    return sorted(found - {"self", "params", "rule", "defaults", "page_directory"})


def parameter():
    p = nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
    p.grad = torch.ones_like(p)
    return p


@settings(max_examples=80)
@given(st.sampled_from(FAMILIES), st.data(), WHATEVER)
def test_an_argument_is_taken_or_refused_by_its_name(name, data, value):
    """What is taken makes a step to finite numbers. Nothing is found out only there, and no error is Python's."""
    key, p = data.draw(st.sampled_from(arguments(getattr(optim, name)))), parameter()
    optimizer, said = None, key
    try:
        optimizer = make(name, [p], **{key: value})
    except REFUSED as error:
        said = str(error)
    assert key in said
    if optimizer is not None:
        optimizer.step()
        assert bool(p.isfinite().all())


@settings(max_examples=80)
@given(st.sampled_from(FAMILIES), st.data(), WHATEVER)
def test_a_setting_is_judged_alike_wherever_it_stands(name, data, value):
    params = [parameter(), parameter()]
    optimizer = make(name, [{"params": params[:1]}, {"params": params[1:]}])
    optimizer.step()
    key = data.draw(st.sampled_from(sorted({*optimizer._own, *optimizer.defaults} - {"rule", "train_mode"})))
    before = copy.deepcopy([params, [dict(x) for x in optimizer.state.values()], optimizer.param_groups])

    def of_a_group():
        copy.deepcopy(optimizer).add_param_group({"params": [parameter()], key: value})

    def loaded():
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][1][key] = value
        optimizer.load_state_dict(saved)
        optimizer.param_groups[1][key] = before[2][1].get(key, optimizer._own.get(key))

    def stepped():
        optimizer.param_groups[1][key] = value
        optimizer.step()

    said = {}
    for way in (of_a_group, loaded, stepped):
        said[way.__name__] = ""
        try:
            way()
        except REFUSED as error:
            said[way.__name__] = str(error)
            assert way is stepped or str(optimizer.param_groups) == str(before[2])
    assert all(key in text for text in said.values() if text), said
    # These may be taken, and not be those of a state that is there.
    assert len({bool(text) for text in said.values()}) == 1 or key in ("blocksize", "master_weight_bits"), said
    assert not said["stepped"] or all(map(same_bits, before[0], params))


def test_a_third_beta_would_mean_nothing():
    for name, many in (("AdamW8bit", 2), ("SGD", 2), ("Lion", 2), ("AdEMAMix", 3), ("SOAP8bit", 2)):
        optimizer = make(name, [parameter()])
        for betas in ((0.5,) * (many + 1), (0.5,) * (many - 1)):
            if name == "SGD" and len(betas) == 1:
                continue  # it has one, and takes it alone
            optimizer.param_groups[0]["betas"] = betas
            with pytest.raises(SettingError, match=f"betas must be {many} numbers, got"):
                optimizer.step()


VALUES = {
    "nesterov": [True, False], "ns_steps": [5, 3], "ns_coefficients": [(3.4445, -4.775, 2.0315), (3.0, -3.2, 1.2)],
    "adjust_lr_fn": ["original", "match_rms_adamw"], "adamw_eps": [1e-8, 1e-4], "d": [1.0, 2.0], "momentum": [0.9, 0.5],
    "eps": [(2.0**-23, 1e-3), (2.0**-20, 1e-2)], "alpha": [0.99, 0.5], "page_bytes": [2**28, 2**20],
    "percentile_clipping": [100, 5], "args": [None, "adam_w"],
}  # fmt: skip
"""Two values of each argument that only the constructor takes. Of those that are not here: False and True."""

WAYS = [("adjust_lr_fn", None, "original"), ("eps", (None, 1e-3), (2.0**-23, 1e-3))]
"""Two ways to say the same."""


def in_another_type(value):
    if isinstance(value, tuple):
        return st.sampled_from([value, list(value), collections.UserList(value)])
    if not isinstance(value, float):  # flags are flags, and counts are integers
        return st.just(value)
    return st.sampled_from([value, fractions.Fraction(value), torch.tensor(value, dtype=torch.float64)])


@given(st.sampled_from(FAMILIES), st.data(), st.sampled_from(["group", "loaded", "later", "one"]))
def test_a_group_may_say_what_holds_and_nothing_else(name, data, where):
    """Of what only the constructor takes: torch's Muon has nesterov in its groups, and one that has another one here would be
    stepped as if it had said nothing."""
    p = parameter()
    optimizer, kind = make(name, [p]), getattr(optim, name)
    keys = {*arguments(kind), "skip_zeros"} - {*optimizer._own, *optimizer.defaults, *ANYWHERE, "generator"}
    key = data.draw(st.sampled_from(sorted(keys)))
    values = VALUES.get(key, [False, True])
    chosen = {key: data.draw(st.sampled_from(values))}
    try:
        optimizer = make(name, [p], **chosen)
    except (*REFUSED, TypeError):  # there is one value alone, or no such argument
        by_class = [
            inspect.signature(own.__init__).parameters for own in kind.__mro__ if issubclass(own, optim.Optimizer)
        ]
        default = next((found[key].default for found in by_class if key in found), False)
        chosen, values = {}, [default, *(x for x in values if x != default)][:2]
    holds = chosen.get(key, values[0])
    ways = [holds, *(way for of, way, same in WAYS if of == key and same == holds)]
    true = data.draw(st.sampled_from(ways).flatmap(in_another_type))
    other = data.draw(st.sampled_from([values[holds == values[0]], torch.ones(2)]))

    def say(value):
        if where == "group":
            make(name, [{"params": [parameter()], key: value}], **chosen).step()
        elif where == "loaded":
            saved = optimizer.state_dict()
            saved["param_groups"][0][key] = value
            optimizer.load_state_dict(saved)
            optimizer.step()
        elif where == "later":
            optimizer.param_groups[0][key] = value
            optimizer.step()
        else:
            optim.GlobalOptimManager.get_instance().override_config(p, key, value)
            optimizer.step()

    say(true)
    with pytest.raises(
        (ValueError, TypeError), match=rf"{key} is no setting of a group|overrides {key} by|{key} must be"
    ):
        say(other)


@given(
    st.sampled_from(["AdamW8bit", "SGD", "Lion", "AdEMAMix8bit", "SOAP8bit"]),
    st.lists(st.floats(0, 0.99), min_size=4, max_size=4),
    st.sampled_from([tuple, list, collections.UserList, collections.deque, torch.tensor, "numpy", str, set, bytes]),
)
def test_betas_are_any_sequence_of_numbers(name, numbers, kind):
    """By the constructor, in a group, loaded, put there later: as a file of settings may have them. One order, no text."""
    many = len(make(name, [parameter()]).defaults["betas"])
    as_tuple = tuple(numbers[:many])
    if kind == "numpy":
        kind = pytest.importorskip("numpy").array
    betas = kind(as_tuple) if kind is not bytes else bytes(many)
    if kind is torch.tensor:
        as_tuple = tuple(betas.tolist())
    ways = ["group", "loaded", "later"] + ["made"] * (
        name != "SGD" and kind is not str
    )  # of a command line it takes a text
    ends = []
    for way, given_ in ((None, as_tuple), *((way, betas) for way in ways)):
        torch.manual_seed(0)
        p = parameter()
        try:
            optimizer = make(
                name,
                [{"params": [p], **({"betas": betas} if way == "group" else {})}],
                **({"betas": betas} if way == "made" else {}),
            )
            if way == "loaded":
                saved = optimizer.state_dict()
                saved["param_groups"][0]["betas"] = given_
                optimizer.load_state_dict(saved)
            elif way in ("later", None):
                optimizer.param_groups[0]["betas"] = given_
            optimizer.step()
            ends.append(p.detach())
        except (ValueError, TypeError) as error:
            ends.append(str(error).startswith("betas must "))
    if kind in (str, set, bytes):
        assert ends[1:] == [True] * len(ways)
    else:
        assert all(same_bits(end, ends[0]) for end in ends)


@given(st.floats(0, 2), st.floats(0, 2), st.sampled_from(["group", "loaded", "later", "one"]))
def test_max_unorm_is_that_of_clipped_steps(most, said, where):
    """Beside a clipped rule a group of another one has none: its steps are as they would be alone, and it may not say one."""
    defaults = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-8, "weight_decay": 0.0}
    both = {"clipped": optim.rules.LAMB(), "free": optim.rules.Adam()}
    p, q, alone, other = (parameter() for _ in range(4))
    groups = [{"params": [p], "rule": "clipped"}, {"params": [q], "rule": "free"}]
    ours = optim.Optimizer(groups, both, defaults, max_unorm=most)
    assert [ours.settings(x, group)["max_unorm"] for x, group in ((p, groups[0]), (q, groups[1]))] == [most, 0]
    ours.step()
    optim.Optimizer([alone], both["free"], defaults).step()
    optim.Optimizer([other], both["clipped"], defaults, max_unorm=most).step()
    assert same_bits(q, alone)
    assert same_bits(p, other)

    def say():
        if where == "group":
            ours.add_param_group({"params": [parameter()], "rule": "free", "max_unorm": said})
        elif where == "loaded":
            saved = ours.state_dict()
            saved["param_groups"][1]["max_unorm"] = said
            ours.load_state_dict(saved)
        elif where == "later":
            groups[1]["max_unorm"] = said
            ours.step()
        else:
            optim.GlobalOptimManager.get_instance().override_config(q, "max_unorm", said)
            ours.step()

    with (
        pytest.raises(SettingError, match="max_unorm must be 0 where no step is clipped")
        if said
        else contextlib.nullcontext()
    ):
        say()


def test_a_name_of_a_rule_is_a_name():
    for name in ("sgd", ["muon"], None, 0):
        with pytest.raises(ValueError, match=r"rule of a group must be one of \['muon', 'adamw'\], got "):
            optim.Muon([{"params": [parameter()], "rule": name}])


class Mine(Rule):
    """A stranger's, with a setting of each kind."""

    states = ()

    def coefficients(self, t, group):
        if flag(group, "off") and number(group, "lr") > 0:
            raise SettingError("off needs a learning rate of 0")
        every = count(group, "every", least=1)
        how = {"up": -1.0, "down": 1.0}[one_of(group, "how", ("up", "down"))]
        b1, _ = weights(group, many=2)
        return {"rate": how * number(group, "lr"), "decay": 1.0, "mine": b1 * weight(group, "momentum") / every}

    def direction(self, p, g, c):
        return (c.mine * g,)


DEFAULTS = {"lr": 0.5, "betas": (0.5, 0.5), "momentum": 0.5, "every": 1, "how": "down", "off": False}


@given(st.sampled_from(sorted(DEFAULTS)), WHATEVER)
@example("every", 10**400)
def test_a_strangers_setting_is_judged_as_ours_are(key, value):
    p = parameter()
    optimizer = optim.Optimizer([p], Mine(), DEFAULTS)

    def made():
        optim.Optimizer([parameter()], Mine(), {**DEFAULTS, key: value})

    def loaded():
        group = {**optimizer.param_groups[0], "params": [0], key: value}
        optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": [group]})

    def stepped():
        optimizer.param_groups[0][key] = value
        optimizer.step()

    said = []
    for way in (made, loaded, stepped):
        said.append("")
        try:
            way()
        except SettingError as error:
            said[-1] = str(error)
    assert len({*said}) == 1
    assert not said[0] or key in said[0] or said[0].startswith("off needs")


def test_what_the_kinds_say():
    said = []
    for read, value in (
        (number, -1), (lambda group, name: number(group, name, least=1), 0.5), (weight, 1.0), (weights, (0.5, 1.0)),
        (lambda group, name: weights(group, name, many=2), [0.5]), (count, 2.5),
        (lambda group, name: count(group, name, 1, 99), 100),
        (flag, "False"), (lambda group, name: one_of(group, name, (8, 32, None)), 16),
        (lambda group, name: kinds.one_of_kinds(group, name, (str, type(None))), 3),
    ):  # fmt: skip
        with pytest.raises(SettingError) as caught:
            read({"x": value}, "x")
        said.append(str(caught.value))
    assert said == [
        "x must not be negative, but a finite number, got -1",
        "x must be a finite number from 1 to 3.40282e+38, got 0.5",
        "x must lie in [0, 1), got 1.0",
        "x must lie in [0, 1), got (0.5, 1.0)",
        "x must be 2 numbers, got [0.5]",
        "x must be an integer from 0 on, got 2.5",
        "x must be an integer from 1 to 99, got 100",
        "x must be True or False, got 'False'",
        "x must be 8, 32 or None, got 16",
        "x must be str or None, got 3",
    ]


def test_what_a_loaded_group_says_and_nothing_reads_is_refused():
    """As by `add_param_group`: a momentum of torch's SGD, which is no setting of a group here, would not be that of the steps."""
    p = parameter()
    for theirs, ours, match in (
        (
            torch.optim.SGD([p], lr=0.1, momentum=0.5),
            optim.SGD8bit([p], lr=0.2, momentum=0.9),
            "momentum is no setting of a group",
        ),
        (torch.optim.Adam([p], amsgrad=True), optim.Adam8bit([p]), "amsgrad is no setting of a group"),
        (torch.optim.RMSprop([p], alpha=0.5), optim.RMSprop8bit([p]), "alpha is no setting of a group"),
    ):
        before = str(ours.param_groups)
        with pytest.raises(ValueError, match=match):
            ours.load_state_dict(theirs.state_dict())
        assert str(ours.param_groups) == before
    ours.load_state_dict(torch.optim.AdamW([p], lr=0.5).state_dict())
    assert ours.param_groups[0]["lr"] == 0.5


def test_no_parameter_has_a_mode_of_its_own():
    p = parameter()
    optim.GlobalOptimManager.get_instance().override_config(p, "train_mode", False)
    with pytest.raises(ValueError, match="train_mode is that of a group"):
        optim.AdamWScheduleFree8bit([p]).step()
