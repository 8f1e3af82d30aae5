"""Weights of 16 bits with a correction: every float32 comes back, or the bound; and every rule trains as on float32 weights."""

import copy
import math
import struct
from fractions import Fraction

import pytest
import torch
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st
from test_optim_classes import ALL, OF_MATRICES, by_rule, make
from torch import nn

import bnbref
from bnbref import optim
from bnbref.optim import master_weights
from bnbref.optim.equation import at_step
from bnbref.optim.step import step_blocks, step_elements

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = [(BF16, torch.int16), (BF16, torch.int8), (F16, torch.int16), (F16, torch.int8)]
each_kind = pytest.mark.parametrize(("dtype", "correction"), KINDS)
quick = pytest.mark.usefixtures("eager")


@st.composite
def float32s(draw):
    """Float32s of all magnitudes: any bits; a number of 16 bits and its neighbours; the middle of two, and its neighbours."""
    bits = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["any", "bfloat16", "float16", "small"]))
    if kind == "bfloat16":
        bits = (bits & 0xFFFF8000) + draw(
            st.sampled_from([-257, -129, -128, -127, -1, 0, 1, 127, 128, 129, 255])
        ) & 0xFFFFFFFF
    if kind == "float16":
        near = draw(st.floats(width=16, allow_nan=False))
        bits = (struct.unpack("I", struct.pack("f", near))[0] & 0xFFFFF000) + draw(st.integers(-40, 40)) & 0xFFFFFFFF
    if kind == "small":
        bits &= 0x8001FFFF
    return struct.unpack("f", struct.pack("I", bits))[0]


def tensor(values):
    """Exactly these floats: torch.tensor goes by way of float64, which keeps every float32."""
    return torch.tensor(values, dtype=torch.float32)


def nearest_away(x: float, dtype: torch.dtype) -> float:
    """x rounded to the nearest number of a dtype, a tie away from zero, in exact arithmetic."""
    digits, smallest, largest = (8, -133, math.inf) if dtype == BF16 else (11, -24, 65520.0)
    if not abs(x) < largest or x == 0:
        return math.copysign(math.inf, x) if not math.isnan(x) and x != 0 else x
    unit = Fraction(2) ** max(math.frexp(x)[1] - digits, smallest)
    count = Fraction(abs(x)) / unit
    return math.copysign(float((2 * count + 1) // 2 * unit), x)


@quick
@each_kind
@given(st.lists(float32s(), min_size=1, max_size=40))
def test_split_and_exact(dtype, correction, values):
    x = tensor(values)
    p, c = master_weights.split(x, dtype, correction)
    back = master_weights.joined(p, c)
    assert p.dtype == dtype
    assert c.dtype == correction
    assert back.dtype == torch.float32
    if (dtype, correction) == (BF16, torch.int16):
        assert same_bits(torch.where(x.isnan(), 0.0, back), torch.where(x.isnan(), 0.0, x))
    for one, near, got in zip(values, p.tolist(), back.tolist(), strict=True):
        if math.isnan(one):
            assert math.isnan(near)
            assert math.isnan(got)
            continue
        assert math.copysign(1, one) == math.copysign(1, got) == math.copysign(1, near)
        if correction == torch.int16:
            want = nearest_away(one, dtype)  # bfloat16 has no number above its largest but infinity
            assert near == (want if abs(want) < 2.0**128 else math.copysign(math.inf, one))
        if math.isinf(got) or math.isinf(one):
            assert abs(one) >= (65520 - 2**-4 * 2 if dtype == F16 else (2 - 2.0**-16) * 2.0**127)
            continue
        # Half of the last bit that is kept. Of 24 bits: 16 of significand, or 19. A product with 2^-112 rounds once more, to a
        # multiple of 2^-149, which is one of 2^-37.
        error = abs(Fraction(got) - Fraction(one))
        if dtype == BF16:
            bound = 0 if correction == torch.int16 else max(Fraction(abs(one)) / 2**16, Fraction(2) ** -142)
        else:
            below = Fraction(2) ** -38 if abs(one) < 2**-14 else 0
            bound = below if correction == torch.int16 else max(Fraction(abs(one)) / 2**19, Fraction(2) ** -33) + below
        assert error <= bound, (one, near, got)


@quick
@each_kind
@given(st.lists(float32s(), min_size=1, max_size=40))
def test_what_was_split_is_split_alike(dtype, correction, values):
    p, c = master_weights.split(tensor(values), dtype, correction)
    again = master_weights.split(master_weights.joined(p, c), dtype, correction)
    assert same_bits(p.float().nan_to_num(), again[0].float().nan_to_num())
    assert torch.equal(c, again[1])


MISTAKES = {
    "a tie to even": (BF16, torch.int16, lambda x, p, c: (x.to(BF16), c)),
    "the last bit": (BF16, torch.int16, lambda x, p, c: (p, c & ~1)),
    "a code too few": (BF16, torch.int8, lambda x, p, c: (p, c.clamp(min=-127))),
    "nothing kept": (F16, torch.int8, lambda x, p, c: (p, c * 0)),
    "no sign": (F16, torch.int16, lambda x, p, c: (p, c.abs())),
}


@quick
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, monkeypatch):
    dtype, correction, wrong = MISTAKES[mistake]
    right = master_weights.split
    near = torch.arange(-300, 300)  # numbers around 1: ties, and what lies beside them
    values = (near * 2**12 + near % 5 - 2 + 0x3F800000).to(torch.int32).view(F32).tolist()
    check = test_split_and_exact.hypothesis.inner_test
    check(dtype, correction, values)
    monkeypatch.setattr(master_weights, "split", lambda x, *dtypes: wrong(x, *right(x, *dtypes)))
    with pytest.raises(AssertionError):
        check(dtype, correction, values)


def test_a_bfloat16_with_every_correction_is_a_float32_of_its_own():
    """Every 97th bfloat16, first and last: their pairs number float32s without a gap, and come back. `make proofs`: all."""
    steps = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for high in [*range(0, 0x7F80, 97), 1, 0x7F7F]:
        p = torch.full((2**16,), high, dtype=torch.int16).view(BF16)
        c = steps.clamp(min=0) if high == 0 else steps
        x = master_weights.joined(p, c.to(torch.int16))
        assert torch.equal(x.view(torch.int32), (high << 16) + c)
        for sign in (1, -1):
            q, rest = master_weights.split(sign * x, BF16, torch.int16)
            assert same_bits(q, sign * p)
            assert torch.equal(rest.to(torch.int32), c)


@quick
@each_kind
def test_a_parameter_that_somebody_sets_keeps_its_sign(dtype, correction):
    least, most = torch.iinfo(correction).min, torch.iinfo(correction).max
    p = torch.tensor([0.0, -0.0, 0.0, 1.0, -1.0], dtype=dtype)
    got = master_weights.joined(p, torch.tensor([least, least, most, least, least], dtype=correction))
    assert got[:2].tolist() == [0, 0]
    assert 0 < got[2] < 2**-14
    assert (got[3:] - p[3:].float()).abs().max() <= 2**-5


@pytest.mark.parametrize(
    ("kernel", "dtype", "correction"),
    [(step_elements, F16, torch.int16), (step_blocks, BF16, torch.int8)],
    ids=["elements", "blocks"],
)
def test_compiled_is_eager(kernel, dtype, correction):
    """The kinds that tests/strategies.py does not prove."""
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    rule, hyper = at_step(optim.rules.Adam(), 3, group)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (8 * 256,), generator=generator)
    x = bits.to(torch.int32).view(torch.float32).view(8, 256)
    x = torch.where(x.isnan(), 1.0, x)
    p, c = master_weights.split(x, dtype, correction)
    g = torch.randn(8, 256, generator=generator).to(dtype)
    g[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    codes = [torch.randint(0, 256, (8, 256), generator=generator, dtype=torch.uint8) for _ in range(2)]
    floats = [torch.randn(8, 256, generator=generator), torch.rand(8, 256, generator=generator)]
    states = [y for k in codes for y in (k, torch.rand(8, generator=generator))]
    if kernel is step_elements:
        p, g, c, states = p.view(-1), g.view(-1), c.view(-1), [f.view(-1) for f in floats]
    results = []
    for compiled in (True, False):
        args = [y.clone() for y in (p, g, hyper)] + [None] + [y.clone() for y in (*states, c)]
        if compiled:
            kernel(*args, rule=rule)
        else:
            with bnbref.eager():
                kernel(*args, rule=rule)
        results.append([y for y in args if y is not None])
        assert same_bits(args[0].view(-1)[:3], p.view(-1)[:3])
        assert torch.equal(args[-1].view(-1)[:3], c.view(-1)[:3])
    assert all(map(same_bits, *results))


# ---- optimizers -----------------------------------------------------------------------------------------------------

SIZES = ((300, 20), (7,), (5000,), (64, 100))


def gradients(t, dtype=BF16):
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(size, generator=generator).to(dtype) * 2.0 ** (i - 2) for i, size in enumerate(SIZES)]


def parameters(dtype=BF16):
    generator = torch.Generator().manual_seed(99)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def step(params, optimizer, t):
    for p, g in zip(params, gradients(t), strict=True):
        p.grad = g.to(p.dtype)
    optimizer.step()


def tensors(optimizer):
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


@quick
@pytest.mark.filterwarnings("ignore:paged state")
@pytest.mark.parametrize("name", [*ALL, *OF_MATRICES])
def test_of_32_bits_every_class_trains_as_on_float32(name):
    """The same bits of values and states as a float32 parameter has; and the parameter is the nearest bfloat16."""
    params, wide = parameters(), [nn.Parameter(p.detach().float()) for p in parameters()]
    optimizer = make(name, by_rule(name, params), lr=1e-3, weight_decay=0.1, master_weight_bits=32)
    want = make(name, by_rule(name, wide), lr=1e-3, weight_decay=0.1)
    for t in range(4):
        step(params, optimizer, t)
        step(wide, want, t)
    for p, w in zip(params, wide, strict=True):
        assert same_bits(optimizer.exact_weight(p), w.detach())
        assert (p.detach().float() - w).abs().max() <= 2**-8 * w.abs().max()
        state = {key: x for key, x in optimizer.state[p].items() if key != master_weights.CORRECTIONS[BF16]}
        assert state.pop("step") == 4
        assert all(same_bits(x, want.state[w][key]) for key, x in state.items())


@quick
@each_kind
@pytest.mark.parametrize("name", ["AdamW8bit", "SGD32bit", "LAMB8bit"])
def test_a_step_is_one_on_float32_and_a_split(name, dtype, correction):
    params = parameters(dtype)
    bits = 24 if correction == torch.int8 else 32
    optimizer = make(name, params, lr=1e-3, weight_decay=0.1, master_weight_bits=bits)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    want = make(name, wide, lr=1e-3, weight_decay=0.1)
    for t in range(4):
        step(params, optimizer, t)
        for w in wide:
            w.grad = None
        for w, g in zip(wide, gradients(t), strict=True):
            w.grad = g.to(dtype).float()
        want.step()
        for p, w in zip(params, wide, strict=True):
            near, rest = master_weights.split(w.detach(), dtype, correction)
            assert same_bits(p.detach(), near)
            assert torch.equal(optimizer.state[p][master_weights.CORRECTIONS[dtype]], rest)
            w.data.copy_(master_weights.joined(near, rest))


@quick
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedLion8bit", "AdEMAMix32bit", "LARS8bit", "SGD"])
@pytest.mark.filterwarnings("ignore:paged state")
def test_resumed_is_uninterrupted_and_a_directory_is_resident(name, bits, tmp_path):
    params, optimizer = parameters(), None
    optimizer = make(name, params, master_weight_bits=bits)
    for t in range(2):
        step(params, optimizer, t)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(name, others, master_weight_bits=bits)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    paged = [nn.Parameter(p.detach().clone()) for p in parameters()]
    away = make(name, paged, master_weight_bits=bits, page_directory=tmp_path / "pages")
    for t in range(2):
        step(paged, away, t)
    for t in range(2, 4):
        step(params, optimizer, t)
        step(others, resumed, t)
        step(paged, away, t)
    want = [*(p.detach() for p in params), *tensors(optimizer)]
    assert same_bits([*(p.detach() for p in others), *tensors(resumed)], want)
    assert same_bits([*(p.detach() for p in paged), *tensors(away)], want)
    read = optim.read_pages(tmp_path / "pages")
    assert torch.equal(
        read[0][master_weights.CORRECTIONS[BF16]], optimizer.state[params[0]][master_weights.CORRECTIONS[BF16]]
    )
    copied = copy.deepcopy(optimizer)
    assert same_bits(tensors(copied), tensors(optimizer))


@quick
@pytest.mark.parametrize("bits", [24, 32])
def test_streamed_is_resident(bits):
    from test_optim_paging import FarAway, LateCopies

    results = []
    for placement in (None, FarAway(True, page_bytes=20_000, copies=LateCopies)):
        params = parameters()
        optimizer = optim.AdamW8bit(params, master_weight_bits=bits)
        optimizer._placement = placement or optimizer._placement
        for t in range(3):
            step(params, optimizer, t)
        results.append([*(p.detach() for p in params), *tensors(optimizer)])
    assert same_bits(*results)


@quick
def test_small_steps_are_not_lost():
    """100 steps of 2^-12 on a weight of 1, where a bfloat16 moves by 2^-8 at least."""
    ends = {}
    for bits in (None, 24, 32):
        p = nn.Parameter(torch.ones(2, dtype=BF16))
        optimizer = optim.SGD([p], lr=2.0**-12, momentum=1e-30, master_weight_bits=bits)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[bits] = optimizer.exact_weight(p)[0].item()
    assert ends == {None: 1.0, 24: 1 - 100 * 2**-12, 32: 1 - 100 * 2**-12}


@quick
def test_an_exact_value_is_read_and_set():
    params = parameters()
    optimizer = optim.AdamW8bit(params, master_weight_bits=32)
    value = torch.randn(SIZES[0]) * 3
    optimizer.set_exact_weight(params[0], value)  # before the first step, too
    assert same_bits(optimizer.exact_weight(params[0]), value)
    assert same_bits(optimizer.exact_weight(params[1]), params[1].detach().float())
    step(params, optimizer, 0)
    saved = [optimizer.exact_weight(p) for p in params]
    others = parameters()
    other = optim.AdamW8bit(others, master_weight_bits=32)
    other.load_state_dict(optimizer.state_dict())
    for p, x in zip(others, saved, strict=True):
        other.set_exact_weight(p, x)
    step(params, optimizer, 1)
    step(others, other, 1)
    assert same_bits([p.detach() for p in params], [p.detach() for p in others])
    with pytest.raises(ValueError, match="float32"):
        other.set_exact_weight(others[0], value.double())
    plain = optim.AdamW8bit(parameters())
    plain.set_exact_weight(plain.param_groups[0]["params"][0], value)
    assert same_bits(plain.param_groups[0]["params"][0].detach(), value.to(BF16))


@quick
def test_groups_overrides_and_float32_parameters():
    params = parameters()
    wide = nn.Parameter(torch.ones(5000))
    groups = [{"params": params[:2], "master_weight_bits": 24}, {"params": [*params[2:], wide]}]
    optimizer = optim.AdamW8bit(groups, master_weight_bits=32)
    optim.GlobalOptimManager.get_instance().override_config(params[3], "master_weight_bits", None)
    wide.grad = torch.ones_like(wide)
    step(params, optimizer, 0)
    found = [optimizer.state[p].get(master_weights.CORRECTIONS[BF16]) for p in (*params, wide)]
    assert [None if x is None else x.dtype for x in found] == [torch.int8, torch.int8, torch.int16, None, None]
    assert (
        sum(x.nbytes for x in optimizer.state[params[2]].values() if isinstance(x, torch.Tensor)) == 5000 * 4 + 20 * 8
    )


@quick
def test_a_state_without_a_correction_begins_with_none_missing():
    params = parameters()
    plain = optim.AdamW8bit(params)
    step(params, plain, 0)
    optimizer = optim.AdamW8bit(params, master_weight_bits=24)
    optimizer.load_state_dict(plain.state_dict())
    step(params, optimizer, 1)
    assert all(optimizer.state[p][master_weights.CORRECTIONS[BF16]].dtype == torch.int8 for p in params)


CASTS = [(BF16, F16), (F16, BF16), (BF16, torch.float32), (F16, torch.float32)]


@quick
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("name", ["AdamW8bit", "Muon", "LARS32bit", "AdamWScheduleFree8bit"])
@pytest.mark.parametrize(("dtype", "to"), CASTS)
def test_a_cast_is_refused_and_what_was_read_before_it_is_set_after_it(name, bits, dtype, to):
    """A correction counts in steps of its dtype: a bfloat16's int8 in a float16 would be an eighth of what it was."""
    model = nn.Linear(70, 70, bias=False, dtype=dtype)
    optimizer = make(name, model.parameters(), lr=1e-2, master_weight_bits=bits)
    [p] = model.parameters()

    def backward():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p.dtype)

    backward()
    optimizer.step()
    value, saved, state = optimizer.exact_weight(p), optimizer.state_dict(), dict(optimizer.state[p])
    model.to(to)
    before = p.detach().clone()
    backward()
    refused = [optimizer.step, lambda: optimizer.exact_weight(p), lambda: optimizer.load_state_dict(saved)]
    refused += [optimizer.eval] if "ScheduleFree" in name else []
    for call in refused:
        with pytest.raises(ValueError, match=f"belongs to a parameter of {dtype}, but p is {to}"):
            call()
    assert same_bits(p.detach(), before)
    assert same_bits(list(state.values())[1:], list(optimizer.state[p].values())[1:])
    optimizer.set_exact_weight(p, value)
    exact = optimizer.exact_weight(p)
    steps_of = {32: 2.0**-38, 24: 2.0**-33}[bits]  # what float16 with a correction may miss
    assert bool(((exact - value).abs() <= value.abs() * 2.0**-16 * (bits == 24) + steps_of).all())
    optimizer.step()
    assert not same_bits(optimizer.exact_weight(p), exact)  # which is memory of its own, of a float32 too


def test_pages_of_a_cast_parameter_are_read(tmp_path):
    """The file of the correction that it had goes with it."""
    model = nn.Linear(70, 70, bias=False, dtype=BF16)
    optimizer = optim.AdamW8bit(model.parameters(), master_weight_bits=24, is_paged=True, page_directory=tmp_path)
    for dtype in (BF16, torch.float16):
        value = optimizer.exact_weight(model.weight) if model.weight in optimizer.state else None
        model.to(dtype)
        if value is not None:
            optimizer.set_exact_weight(model.weight, value)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": optim.read_pages(tmp_path)})
    optimizer.step()


@quick
def test_what_is_refused():
    p = nn.Parameter(torch.ones(5000, dtype=BF16))
    for bits, error in ((16, ValueError), (8, ValueError), (24.0, TypeError), ("24", TypeError)):
        with pytest.raises(error, match="master_weight_bits"):
            optim.AdamW8bit([p], master_weight_bits=bits)
    with pytest.raises(ValueError, match="stochastic_rounding"):
        optim.AdamW8bit([p], master_weight_bits=24, stochastic_rounding=True)
    with pytest.raises(ValueError, match="stochastic_rounding"):
        optim.AdamW8bit([{"params": [p], "stochastic_rounding": True}], master_weight_bits=24)
    optimizer = optim.AdamW8bit([p], master_weight_bits=24)
    p.grad = torch.ones_like(p)
    optim.GlobalOptimManager.get_instance().override_config(p, "stochastic_rounding", True)
    with pytest.raises(ValueError, match="stochastic_rounding"):
        optimizer.step()
    optim.GlobalOptimManager.get_instance().initialize()
    optimizer.step()
    saved = optimizer.state_dict()
    wide = nn.Parameter(torch.ones(5000))
    with pytest.raises(ValueError, match=r"float32"):
        optim.AdamW8bit([wide]).load_state_dict(saved)
    of_half = {master_weights.CORRECTIONS[F16]: torch.full((5000,), 5000, dtype=torch.int16)}
    with pytest.raises(ValueError, match="goes beyond 4096"):
        master_weights.checked_correction(p.detach().half(), of_half)
    p.data = p.data.float()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"float32"):
        optimizer.step()

    class Taken(optim.Rule):
        states = (optim.State("correction"),)

    with pytest.raises(ValueError, match="correction"):
        optim.Optimizer([wide], Taken(), {"lr": 1.0})


@quick
def test_bytes_of_weights():
    """The table in docs/content/optimizers.md: weight, correction and states."""
    table = {
        ("AdamW", F32, None): (4, 0, 8),
        ("AdamW8bit", F32, 24): (4, 0, 2 + 8 / 256),
        ("AdamW8bit", BF16, 32): (2, 2, 2 + 8 / 256),
        ("AdamW8bit", BF16, 24): (2, 1, 2 + 8 / 256),
        ("AdamW8bit", BF16, None): (2, 0, 2 + 8 / 256),
        ("Lion8bit", BF16, 24): (2, 1, 1 + 4 / 256),
        ("SGD8bit", BF16, 24): (2, 1, 1 + 4 / 256),
        ("AdEMAMix8bit", BF16, 24): (2, 1, 3 + 12 / 256),
        ("AdamWScheduleFree8bit", BF16, 24): (2, 1, 2 + 8 / 256),
    }
    for (name, dtype, bits), want in table.items():
        p = nn.Parameter(torch.ones(2**16, dtype=dtype))
        p.grad = torch.ones_like(p)
        optimizer = make(name, [p], master_weight_bits=bits)
        optimizer.step()
        sizes = {key: x.nbytes / p.numel() for key, x in optimizer.state[p].items() if isinstance(x, torch.Tensor)}
        correction = sizes.pop(master_weights.CORRECTIONS[BF16], 0)
        assert (p.element_size(), correction, sum(sizes.values())) == want, name


def test_a_value_belongs_to_a_parameter_of_the_optimizer():
    own, other = (nn.Parameter(torch.ones(3, dtype=BF16)) for _ in range(2))
    optimizer = optim.AdamW8bit([own], master_weight_bits=24)
    with pytest.raises(ValueError, match=r"p must be a parameter of this optimizer, got another one of shape \(3,\)"):
        optimizer.set_exact_weight(other, torch.ones(3))


@quick
@pytest.mark.parametrize(
    ("dtype", "message"),
    [(F32, "belongs to a parameter of"), (torch.float64, "a parameter must be float32, float16 or")],
)
def test_a_parameter_that_was_cast_is_refused_before_anything_is_changed(dtype, message, tmp_path):
    params = [nn.Parameter(torch.ones(n, dtype=BF16)) for n in (300, 200)]
    optimizer = optim.PagedAdamW8bit(params, min_8bit_size=0, master_weight_bits=32, page_directory=tmp_path)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = params[0].detach().clone()
    params[1].data = params[1].data.to(dtype)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert same_bits(params[0].detach(), before)
    assert {i: state["step"] for i, state in optim.read_pages(tmp_path).items()} == {0: 1, 1: 1}
