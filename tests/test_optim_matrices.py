"""Rules that see whole matrices: a step computes what the direction says, and every class keeps what the others promise."""

import copy
import math
import types

import pytest
import torch
from conftest import difference, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_optim_classes import MATRICES_ALONE, OF_MATRICES, by_rule
from test_optim_paging import FarAway, LateCopies
from torch import nn

from bnbref import blockwise, optim
from bnbref.optim import matrices, matrix_steps
from bnbref.optim.equation import coefficients_of, write_down
from bnbref.optim.rules import LARS, SGD, Rule, State, absmax_key, averages, decoupled

U = 2.0**-24  # one rounding to float32: relative error at most U
SHAPES = ((70, 61), (70, 61), (3, 40))
VECTORS = ((100,), (4200,))
each_family = pytest.mark.parametrize(
    "name", [name for name in OF_MATRICES if name.endswith("8bit") != name.startswith("Paged")]
)
eight_bit = pytest.mark.parametrize(
    "name", [name for name in OF_MATRICES if not name.startswith("Paged") and "8bit" in name]
)


def made(name, params, **options):
    """An optimizer by that name, with momentum, and AdamW for what is no matrix where it takes none."""
    kind = getattr(optim, name)
    extra = {"beta1": 0.9} if "Adafactor" in name else {"frequency": 2} if "SOAP" in name else {}
    groups = by_rule(name, params)
    for others in groups[1:]:
        others["lr"] = 1e-3
    return kind(groups, weight_decay=0.1, **extra, **options)


def start(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in (*SHAPES, *VECTORS)]
    return params, made(name, params, **options)


def advanced(params, optimizer, first, last):
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


# ---- the step -------------------------------------------------------------------------------------------------------

# Of a stack of matrices each is treated alone, and no sum is rounded: the bits do not depend on how many there are.
WHOLES = {
    "flip": lambda x: x.flip(-2),
    "roll": lambda x: x.roll(1, -1),
    "most": lambda x: x.abs().amax(-1, keepdim=True).expand(x.shape),
    "both": lambda x, y: torch.where(x.flip(-1) > y, x, y.flip(-2)),
    "split": lambda x: (x.flip(-2), x.roll(1, -2)),
}
ELEMENTS = {
    "+": lambda x, y: x + y, "*": lambda x, y: x * y, "/": lambda x, y: x / (y.abs() + 1.0), "neg": lambda x, y: -x,
    "where": lambda x, y: torch.where(x > y, x, y), "scaled": lambda x, y: 0.5 * x, "of p": lambda x, y: x,
}  # fmt: skip


class Woven(Rule):
    """A random program over p, g, two states and coefficients, with steps of the whole matrix among its lines."""

    states = (State("one"), State("row", of="rows"), State("two", signed=False))

    def __init__(self, lines, results):
        self._lines, self._results = lines, results

    def coefficients(self, t, group):
        return {"rate": group["lr"], "decay": 0.5, "x": 1 / t}

    def direction(self, p, g, one, row, two, c):
        values = [p, g, one, two]
        for name, i, j in self._lines:
            x, y = values[i % len(values)], values[j % len(values)]
            if name in ELEMENTS:
                values.append(c.x * ELEMENTS[name](x, y))
            else:
                found = self.whole(WHOLES[name], *([x, y] if name == "both" else [x]), results=1 + (name == "split"))
                values += found if name == "split" else [found]
        d, one, two = (values[-1 - i % len(values)] for i in self._results)
        u, row = self.whole(counted, d, row, results=2)
        return u, one, row, 1.0 * two


def counted(x, row):
    return x, row + x.amax(-1)


programs = st.builds(
    Woven,
    st.lists(
        st.tuples(st.sampled_from([*WHOLES, *ELEMENTS]), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8
    ),
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
)


def woven(rule, steps=2):
    """Gradients, and parameters and states after some steps of the optimizer."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 10)) for _ in range(2)]
    optimizer = optim.Optimizer(params, rule, {"lr": 0.25})
    inputs = []
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(6, 10) * 10 ** torch.linspace(-9, 9, 10)
            p.grad[:, ::4] = -0.0
        inputs.append([p.grad.clone() for p in params])
        optimizer.step()
    return inputs, [[p.detach(), *(optimizer.state[p][s.key] for s in rule.states)] for p in params]


@settings(max_examples=150)
@given(programs)
@example(Woven([("scaled", 1, 0), ("flip", 4, 0)], (0, 0, 0)))  # -0.0 there and back
@example(Woven([("flip", 2, 0), ("*", 4, 2), ("both", 5, 1), ("where", 6, 0)], (0, 1, 2)))
def test_a_step_computes_what_the_direction_says(rule):
    """Bit for bit what the direction computes when it is called with matrices."""
    with running("eager"):
        found = woven(rule)
        torch.manual_seed(0)
        state = [[torch.randn(6, 10), torch.zeros(6, 10), torch.zeros(6), torch.zeros(6, 10)] for _ in range(2)]
        for t, gradients in enumerate(found[0], 1):
            c = types.SimpleNamespace(
                **{name: torch.tensor(x) for name, x in rule.coefficients(t, {"lr": 0.25}).items()}
            )
            for i, (g, (p, *own)) in enumerate(zip(gradients, state, strict=True)):
                u, *new = rule.direction(p, g, *own, c)
                stays = u.abs() > 2.0**63  # as what is not finite
                state[i] = [torch.where(stays | u.isnan(), p, c.decay * p - c.rate * u), *new]
        for got, want in zip(found[1], state, strict=True):
            if all(bool((x.abs() < 2.0**63).all()) for x in want):
                assert same_bits(got, want), difference(got, want)


@pytest.mark.slow
@settings(max_examples=20)
@given(programs)
def test_a_woven_rule_has_the_same_bits_compiled(rule):
    compiled = woven(rule)
    with running("eager"):
        eager = woven(rule)
    assert same_bits(compiled[1], eager[1]), difference(compiled[1], eager[1])


def test_a_rule_reads_like_its_paper():
    chain = write_down(matrices.Muon(), ("rate", "decay", "b", "not_b", "eps"))
    assert list(chain.calls) == ["orthogonal"]
    assert_expected_inline(
        chain.source,
        """\
def direction(p, g, s0, c):
    a0 = c.b * s0
    a1 = c.not_b * g
    a2 = a0 + a1
    a3 = c.b * a2
    a4 = c.not_b * g
    a5 = a3 + a4
    w0 = orthogonal(a5, c.eps)
    return (w0, a2,)""",
    )


def going(body, **attributes):
    def direction(self, p, g, m, row, c):
        return body(self, p, g, m, row, c)

    own = {"states": (State("m"), State("row", of="rows")), "direction": direction, **attributes}
    own["coefficients"] = lambda self, t, group: {"rate": group["lr"], "decay": 1.0}
    return type("Mine", (Rule,), own)()


def twice(x):
    return x, x


BROKEN = {
    "uses its state 'row', of the whole matrix, other than by Rule.whole": going(
        lambda s, p, g, m, row, c: (row * g, m, row)
    ),
    "returns for its state 'row', of the whole matrix, what is no result": going(
        lambda s, p, g, m, row, c: (s.whole(torch.tanh, g), m, g)
    ),
    "has states of the whole matrix, ['row'], and no call": going(lambda s, p, g, m, row, c: (g, m, row)),
    "calls whole with 3, which is no function": going(lambda s, p, g, m, row, c: (s.whole(3, g), m, row)),
    "must be of one of ('elements', 'rows'": going(None, states=(State("m"), State("row", of="diagonals"))),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_rule_is_refused_when_the_optimizer_is_made(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        optim.Optimizer([nn.Parameter(torch.ones(3, 4))], BROKEN[message], {"lr": 1.0})
    assert message in str(caught.value)


WRONG = {
    "tanh of Mine must return 2 results": lambda s, p, g, m, row, c: (s.whole(torch.tanh, g, results=2)[0], m, row),
    "a stack of 1 matrices, got (4, 3)": lambda s, p, g, m, row, c: (s.whole(lambda x: x[0].mT, g), m, row),
    "must have the parameter's shape (3, 4), got (4, 3)": lambda s, p, g, m, row, c: (
        s.whole(lambda x: x.mT, g),
        m,
        row,
    ),
    "a new row must have the shape (3,), got (3, 4)": lambda s, p, g, m, row, c: (g, m, s.whole(torch.tanh, g)),
    "dense tensors of floats, got torch.int32": lambda s, p, g, m, row, c: (s.whole(torch.Tensor.int, g), m, row),
    "dense tensors of floats, got torch.complex64": lambda s, p, g, m, row, c: (g, s.whole(torch.fft.fft, g), row),
    "torch.float32, torch.sparse_coo": lambda s, p, g, m, row, c: (s.whole(torch.Tensor.to_sparse, g), m, row),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_step_that_returns_something_else_is_refused(message, eager):
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    with pytest.raises(ValueError) as caught:
        optim.Optimizer([p], going(WRONG[message]), {"lr": 1.0}).step()
    assert message in str(caught.value)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_of_another_float_are_rounded_to_float32(dtype, bits, eager):
    """Before anything else is done with them, in states as in directions."""

    def trained(convert):
        p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        p.grad = torch.linspace(-3, 2, 12).view(3, 4)

        def direction(s, p, g, m, row, c):
            u, row = s.whole(lambda x, r: (convert(x / 3), convert(r + x.square().mean(-1) / 3)), g, row, results=2)
            return u * 1.1 + m, convert_state(s, m, g), row

        def convert_state(s, m, g):
            return s.whole(lambda x, y: convert(x + y / 3), m, g)

        optimizer = optim.Optimizer([p], going(direction), {"lr": 1.0}, optim_bits=bits, min_8bit_size=0)
        for _ in range(3):
            optimizer.step()
        return [p.detach(), *(x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))]

    assert same_bits(trained(lambda x: x.to(dtype)), trained(lambda x: x.to(dtype).float()))


# ---- the rules ------------------------------------------------------------------------------------------------------


@given(
    st.permutations(range(6)), st.lists(st.integers(-5, 5), min_size=6, max_size=6), st.integers(6, 9), st.booleans()
)
def test_newton_schulz_is_torchs(places, powers, columns, tall):
    """On matrices with one number in each row and column: no sum has two terms, but that of the norm, which is exact."""
    x = torch.zeros(6, columns)
    for row, (column, power) in enumerate(zip(places, powers, strict=True)):
        x[row, column] = (-1.0) ** power * 2.0**power
    x = x.mT if tall else x
    torchs = torch.optim._muon._zeropower_via_newtonschulz(x, matrices.QUINTIC, 5, 1e-7)
    assert same_bits(matrices.newton_schulz(x), torchs)
    assert same_bits(matrices.newton_schulz(torch.stack([x, 2 * x])), torch.stack([torchs, torchs]))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs(nesterov, adjust, eager, monkeypatch):
    """The equation around newton_schulz, which is left out on both sides: it has its own test. Torch computes in float64."""
    monkeypatch.setattr(matrices, "newton_schulz", lambda x, *_: x)
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda x, *_: x)
    torch.manual_seed(1)
    ours, theirs = nn.Parameter(torch.randn(70, 30)), nn.Parameter(torch.empty(70, 30, dtype=torch.float64))
    arguments = {"lr": 0.03, "weight_decay": 0.07, "momentum": 0.87, "nesterov": nesterov, "adjust_lr_fn": adjust}
    mine, torchs = optim.Muon32bit([ours], **arguments), torch.optim.Muon([theirs], **arguments)
    scale = math.sqrt(70 / 30) if adjust == "original" else 0.2 * math.sqrt(70)
    for t in range(1, 8):
        ours.grad = torch.randn(70, 30)
        theirs.data, theirs.grad = ours.data.double(), ours.grad.double()
        m = mine.state[ours]["momentum"].double() if t > 1 else torch.zeros_like(theirs)
        torchs.state[theirs]["momentum_buffer"] = m.clone()
        before = theirs.data.abs()
        mine.step()
        torchs.step()
        # m: two products of rounded coefficients and their sum, 3 U of the magnitudes S; u again 3 U, of b S + (1 - b) |g|. The
        # scale and the rate, each rounded and multiplied, 4 U; so 10 U of the step taken with magnitudes. decay p: 2 U of
        # p; the last subtraction 1 U of both.
        size = 0.87 * m.abs() + 0.13 * theirs.grad.abs()
        size = 0.87 * size + 0.13 * theirs.grad.abs() if nesterov else size
        assert bool(((ours.double() - theirs).abs() <= 1.01 * U * (3 * before + 11 * 0.03 * scale * size)).all())


def test_adafactor_is_torchs(eager):
    """In vectors and matrices; torch computes in float64."""
    torch.manual_seed(2)
    for shape in ((40, 30), (500,)):
        ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape, dtype=torch.float64))
        arguments = {"lr": 0.02, "weight_decay": 0.1, "eps": (2.0**-23, 1e-3)}
        mine, torchs = optim.Adafactor([ours], **arguments), torch.optim.Adafactor([theirs], **arguments)
        for _ in range(5):
            ours.grad = torch.randn(shape)
            theirs.data, theirs.grad = ours.data.double(), ours.grad.double()
            if mine.state[ours]:
                row, column = (mine.state[ours][key].double() for key in ("row", "column"))
                own = {"row_var": row[:, None], "col_var": column[None, :]} if len(shape) == 2 else {"variance": column}
                torchs.state[theirs].update(own)
            before = theirs.data.clone()
            mine.step()
            torchs.step()
            # A mean of n squares loses n U, of r and of q; r q / mean(r) so 3 n U and some roundings; its root half of that. The
            # two roots of mean squares lose n U of all n elements each, with n the number of elements. What is left are some
            # twenty roundings. All of it is relative to the step.
            step = (theirs.data - before * (1 - 0.02 * 0.1)).abs()
            bound = 1.01 * U * (3 * before.abs() + (4 * before.numel() + 20) * step)
            assert bool(((ours.double() - theirs).abs() <= bound).all())


def test_adafactor_is_transformers(eager):
    """As test_adafactor_is_torchs, whose bound this is, but for decay, which transformers multiplies by the root of a mean, too.

    It adds 1e-30 to squares, which is far below a rounding.
    """
    theirs = pytest.importorskip("transformers.optimization").Adafactor
    torch.manual_seed(5)
    for shape, beta1 in (((40, 30), 0.0), ((500,), 0.0), ((40, 30), 0.9)):
        ours, q = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape, dtype=torch.float64))
        mine = optim.Adafactor([ours], lr=0.02, beta1=beta1)
        other = theirs([q], lr=0.02, beta1=beta1 or None, relative_step=False)
        names = {"row": "exp_avg_sq_row", "column": "exp_avg_sq_col"} if len(shape) == 2 else {"column": "exp_avg_sq"}
        names |= {"momentum": "exp_avg"} if beta1 else {}
        kept = torch.zeros(shape, dtype=torch.float64)
        for _ in range(5):
            ours.grad = torch.randn(shape)
            q.data, q.grad = ours.data.double(), ours.grad.double()
            if mine.state[ours]:
                other.state[q].update({name: mine.state[ours][key].double() for key, name in names.items()})
                if beta1:  # theirs has the learning rate in it
                    kept = other.state[q]["exp_avg"].mul_(0.02).abs()
            before = q.data.clone()
            mine.step()
            other.step()
            step = (q.data - before).abs() + 2 * kept
            bound = 1.01 * U * (3 * before.abs() + (4 * before.numel() + 20) * step)
            assert bool(((ours.double() - q).abs() <= bound).all())


def test_soap_is_pytorch_optimizers(eager):
    """From equal states; theirs in float64. The first gradient makes bases, which no two programs order alike, and no step."""
    theirs = pytest.importorskip("pytorch_optimizer").SOAP
    torch.manual_seed(6)
    rows, columns, b1, b2, b = 12, 20, 0.9, 0.95, 0.8
    ours, q = nn.Parameter(torch.randn(rows, columns)), nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    options = {"lr": 0.01, "weight_decay": 0.0, "betas": (b1, b2), "shampoo_beta": b, "eps": 0.0}
    mine, other = optim.SOAP32bit([ours], **options, frequency=3), theirs([q], **options, precondition_frequency=1000)
    q.grad = torch.ones_like(q)
    other.step()
    ours.grad, p = torch.randn(rows, columns), ours.detach().clone()
    mine.step()
    assert same_bits(ours.detach(), p)
    for t in range(1, 8):
        ours.grad = torch.randn(rows, columns)
        p, g = ours.detach().double(), ours.grad.double()
        m, v, left, right, of_left, of_right = (x.double() for key, x in mine.state[ours].items() if key != "step")
        mine.step()
        q.data, q.grad = p.clone(), g.clone()
        other.state[q].update(
            exp_avg=m.clone(), exp_avg_sq=v.clone(), GG=[left.clone(), right.clone()], Q=[of_left, of_right]
        )
        other.step()

        # A product of three matrices errs by n U of the product of magnitudes, n being the terms of both sums and some roundings;
        # what comes in erring goes out erring by as much times magnitudes. x, y, r, z are as in the rule: z = y / r.
        n, rate = rows + columns + 4, 0.01 / (1 - b1**t)
        left_abs, right_abs = of_left.abs(), of_right.abs()
        x, y = (of_left.mT @ a @ of_right for a in (g, b1 * m + (1 - b1) * g))
        v = b2 * v + (1 - b2) * x * x
        r = v.sqrt() / math.sqrt(1 - b2**t)
        dx = n * U * left_abs.mT @ g.abs() @ right_abs
        dy = (n + 3) * U * left_abs.mT @ (b1 * m.abs() + (1 - b1) * g.abs()) @ right_abs
        dv = 4 * U * v + (1 - b2) * (2 * x.abs() + dx) * dx
        dr = dv / v * r + 4 * U * r
        assert bool((dr < r).all())
        z = y.abs() / r
        dz = (dy + z * dr) / (r - dr) + U * z
        u = left_abs @ (dz + n * U * z) @ right_abs.mT
        step = (q - p).abs()
        assert bool(((ours.double() - q).abs() <= 1.01 * (rate * u + U * (p.abs() + 4 * step))).all())
        for key, mean, square in (("left", left, g.abs() @ g.abs().mT), ("right", right, g.abs().mT @ g.abs())):
            got, want = mine.state[ours][key].double(), other.state[q]["GG"][key == "right"]
            assert bool(((got - want).abs() <= (n + 4) * U * (mean.abs() + square)).all())


@settings(max_examples=20)
@given(st.permutations(range(5)), st.integers(5, 8), st.sampled_from([1, 2, 100]))
def test_soap_is_adam_where_the_axes_are_the_eigenvectors(places, columns, frequency):
    """Gradients with one number in each row and column at most, always in the same place: to turn is to permute."""
    with running("eager"):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(5, columns, generator=generator))
        q = nn.Parameter(p.detach().clone())
        soap = optim.SOAP32bit([p], lr=1e-2, betas=(0.9, 0.99), frequency=frequency)
        adam = optim.AdamW32bit([q], lr=1e-2, betas=(0.9, 0.99))
        for t in range(5):
            p.grad = torch.zeros(5, columns)
            p.grad[range(5), places] = torch.randn(5, generator=generator)
            q.grad = p.grad.clone()
            soap.step()
            if t > 0:  # the first gradient makes no step
                adam.step()
        assert same_bits(p.detach(), q.detach())


def test_the_first_gradient_of_soap_makes_no_step(eager):
    """In its own bases it is a diagonal, and a step would go where the rounding of the zeros beside it points."""
    p = nn.Parameter(torch.randn(8, 20))
    before = p.detach().clone()
    optimizer = optim.SOAP8bit([p], lr=0.1, min_8bit_size=0)
    p.grad = torch.randn(8, 20)
    optimizer.step()
    assert same_bits(p.detach(), before)
    state = optimizer.state[p]
    assert state["momentum_absmax"].tolist() == state["squares_absmax"].tolist() == [0.0]
    inside = state["of_left"].mT @ state["left"] @ state["of_left"]
    assert float((inside - inside.diagonal().diag()).abs().max()) < 1e-4 * float(inside.abs().max())
    optimizer.step()
    assert not same_bits(p.detach(), before)


def test_soap_begins_where_a_gradient_is_finite(eager):
    """After a first gradient that is not, bases are those of the mean when they are made again."""
    p = nn.Parameter(torch.randn(8, 20))
    before = p.detach().clone()
    optimizer = optim.SOAP32bit([p], weight_decay=0.0, frequency=3)
    for t in range(5):
        p.grad = torch.full_like(p, math.nan) if t == 0 else torch.randn(8, 20)
        optimizer.step()
        assert same_bits(p.detach(), before) == (t < 4)
    basis = optimizer.state[p]["of_left"]
    assert float((basis.mT @ basis - torch.eye(8)).abs().max()) < 4 * 8**2.5 * U


def test_soap_turns_towards_the_eigenvectors():
    """What `averaged` leaves are orthogonal bases, and in them the mean is nearer to a diagonal at each call."""
    torch.manual_seed(0)
    g = torch.randn(3, 6, 9)
    left, right, of_left, of_right = (torch.zeros(3, n, n) for n in (6, 9, 6, 9))
    left, right, of_left, of_right = matrices.averaged(g, left, right, of_left, of_right, *torch.tensor([0.1, 1.0]))
    others = []
    for _ in range(30):
        left, right, of_left, of_right = matrices.averaged(
            g + g.flip(-1), left, right, of_left, of_right, *torch.tensor([0.1, 1.0])
        )
        inside = of_left.mT @ left @ of_left
        others.append(float((inside - inside.diagonal(dim1=-2, dim2=-1).diag_embed()).norm()) / float(left.norm()))
        # Householder's QR of n columns: Q is within n n sqrt(n) roundings of an orthogonal matrix (Higham, theorem 19.4), some of
        # each column's step: 4 each; the product that is looked at adds n.
        for q, n in ((of_left, 6), (of_right, 9)):
            assert float((q.mT @ q - torch.eye(n)).abs().max()) < (4 * n**2.5 + n) * U
    assert others[-1] < others[0]


# ---- what every class promises ----------------------------------------------------------------------------------------


@eight_bit
def test_eager_is_compiled(name):
    params, optimizer = start(name)
    compiled = advanced(params, optimizer, 0, 3)
    with running("eager"):
        again, other = start(name)
        eager = advanced(again, other, 0, 3)
    assert same_bits(compiled, eager), difference(compiled, eager)
    for p, q in zip(params, again, strict=True):
        assert all(same_bits(x, other.state[q][key]) for key, x in optimizer.state[p].items() if key != "step")


@each_family
@pytest.mark.filterwarnings("ignore:paged state")
def test_interrupted_is_uninterrupted_and_paged_is_resident(name, eager, tmp_path):
    params, optimizer = start(name)
    want = advanced(params, optimizer, 0, 4)

    params, optimizer = start(name)
    halfway = advanced(params, optimizer, 0, 2)
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    params, other = start(name)
    for p, data in zip(params, halfway, strict=True):
        p.data.copy_(data)
    other.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    assert same_bits(advanced(params, other, 2, 4), want)

    params, optimizer = start(name, page_directory=tmp_path / "pages")
    halfway = advanced(params, optimizer, 0, 2)
    states = copy.deepcopy(optim.read_pages(tmp_path / "pages"))
    assert same_bits(advanced(params, optimizer, 2, 4), want)
    params, other = start(name)
    for p, data in zip(params, halfway, strict=True):
        p.data.copy_(data)
    other.load_state_dict({**other.state_dict(), "state": states})
    assert same_bits(advanced(params, other, 2, 4), want)

    params, optimizer = start(name)
    optimizer._placement = FarAway(True, page_bytes=1, copies=LateCopies)
    assert same_bits(advanced(params, optimizer, 0, 4), want)


def test_alone_is_together(eager, monkeypatch):
    """Where no sum has two terms: one number in each row and column."""
    ends = []
    for size in (matrix_steps.BATCH, 1):
        monkeypatch.setattr(matrix_steps, "BATCH", size)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(64, 64)) for _ in range(3)]
        optimizer = optim.Muon8bit(params)
        for _ in range(3):
            for i, p in enumerate(params):
                p.grad = torch.eye(64).roll(i, 0) * 2.0 ** torch.arange(64).remainder(5)
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert same_bits(*ends)


@eight_bit
@pytest.mark.parametrize(
    ("bad", "where"), [(math.nan, (1, 2)), (math.inf, (1, 2)), (2.0**64, (1, 2)), (2.0**62, ...)], ids=str
)
def test_one_element_that_is_not_finite_changes_nothing(name, bad, where, eager):
    """Nor do elements that all are, if the sum of their squares is not: a mean of squares that is infinite would stay so."""
    params, optimizer = start(name)
    advanced(params, optimizer, 0, 2)
    before = [p.detach().clone() for p in params]
    kept = [{key: x.clone() for key, x in optimizer.state[p].items() if key != "step"} for p in params]
    for p in params:
        p.grad = torch.randn(p.shape)
    for p in params[:2]:
        p.grad[where] = bad
    optimizer.step()
    for p, data, state in zip(params, before, kept, strict=True):
        same = all(same_bits(optimizer.state[p][key], x) for key, x in state.items())
        assert same_bits(p.detach(), data) == same == any(p is q for q in params[:2])


def transposed(x):
    """The same matrix, column after column in memory."""
    return x.mT.contiguous().mT


@eight_bit
@pytest.mark.parametrize("gradients", [False, True])
def test_bfloat16_maximize_and_strides(name, gradients, eager):
    """Parameters that are rounded, transposed with their gradients or without, or go up."""
    params, optimizer = start(name, torch.bfloat16)
    want = advanced(params, optimizer, 0, 2)
    params, _ = start(name, torch.bfloat16)
    params = [nn.Parameter(transposed(p.detach()) if p.dim() == 2 else p.detach()) for p in params]
    optimizer = made(name, params, maximize=True)
    for t in range(2):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.empty_like(p).copy_(-torch.randn(p.shape, generator=generator))
            assert p.grad.stride() == p.stride()
            if not gradients:
                p.grad = p.grad.contiguous()
        optimizer.step()
    assert same_bits([p.detach() for p in params], want)


@eight_bit
def test_scalars_and_nothing_are_parameters(name, eager):
    shapes = [(0, 3), (3, 0), (1, 1), *([] if any(x in name for x in MATRICES_ALONE) else [(), (0,)])]
    params = [nn.Parameter(torch.full(shape, 2.0)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = made(name, params, min_8bit_size=0)
    optimizer.step()
    optimizer.step()  # SOAP's first is here
    assert all(bool((p.detach() < 2.0).all()) for p in params)


def test_a_clipped_rule_has_no_whole_steps():
    with pytest.raises(TypeError, match="Mine is clipped after steps of the whole matrix"):
        optim.Optimizer(
            [nn.Parameter(torch.ones(3, 4))],
            going(WRONG["a new row must have the shape (3,), got (3, 4)"], clipped=True),
            {"lr": 1.0},
        )


def test_each_of_two_rules_is_clipped_or_not(eager):
    """max_unorm is a setting of the optimizer, and means the rule that is clipped."""
    params = [nn.Parameter(torch.ones(10)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(10)
    group = {"lr": 1.0, "betas": (0.9,), "weight_decay": 0.0}
    groups = [{"params": params[:1]}, {"params": params[1:2], "rule": "sgd"}]
    optim.Optimizer(groups, {"lars": LARS(), "sgd": SGD()}, group, max_unorm=0.5).step()
    assert params[0].tolist() == [0.5] * 10
    assert params[1].tolist() == [0.0] * 10


@each_family
@pytest.mark.filterwarnings("ignore:paged state")
def test_on_meta_a_step_makes_states_of_the_same_shapes(name, eager):
    """As whoever asks how much memory a run takes."""
    found = []
    for device in ("cpu", "meta"):
        params = [nn.Parameter(torch.ones(shape, device=device)) for shape in (*SHAPES, *VECTORS)]
        optimizer = made(name, params)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        states = [{key: x for key, x in optimizer.state[p].items() if key != "step"} for p in params]
        found.append([{key: (x.shape, x.dtype) for key, x in state.items()} for state in states])
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="must have numbers, got a tensor on meta"):
        optimizer.load_state_dict(optimizer.state_dict())


def test_inside_a_graph(eager):
    ends = []
    for wrap in (lambda step: step, torch.compile):
        p = nn.Parameter(torch.linspace(-1, 1, 64 * 80).view(64, 80))
        p.grad = p.detach().sin()
        optimizer = optim.Muon8bit([p])
        step = wrap(optimizer.step)
        step()
        step()
        ends.append(p.detach())
    assert same_bits(*ends)


def test_bytes_of_state(eager):
    p = nn.Parameter(torch.randn(128, 128))
    p.grad = torch.randn(128, 128)
    sides, block = 2 * 4 / 128, 4 / 256
    table = {
        "Muon8bit": 1 + block, "Muon32bit": 4, "Adafactor": sides, "SOAP8bit": 2 + 2 * block + 16, "SOAP32bit": 24,
    }  # fmt: skip
    for name, want in table.items():
        optimizer = getattr(optim, name)([p])
        optimizer.step()
        assert sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)) / p.numel() == want
    for name, want in (("Adafactor8bit", 1 + block + sides), ("Adafactor32bit", 4 + sides)):
        optimizer = getattr(optim, name)([p], beta1=0.9)
        optimizer.step()
        assert sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)) / p.numel() == want


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_what_is_no_matrix_is_refused():
    vector, filters = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(4, 3, 3, 3))
    for p in (vector, filters):
        with pytest.raises(
            ValueError, match=r"Muon takes no parameter of shape \(.*\): let its group say \"rule\": 'adamw'"
        ):
            optim.Muon8bit([p])
    optimizer = optim.Muon8bit([nn.Parameter(torch.ones(4, 4))])
    with pytest.raises(ValueError, match="rule of a group must be one of \\['muon', 'adamw'\\], got 'adam'"):
        optimizer.add_param_group({"params": [vector], "rule": "adam"})
    for arguments, message in (
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn must be 'original', 'match_rms_adamw' or None, got 'none'"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"ns_steps": 0}, "ns_steps must be an integer"), ({"lr": -1}, "lr must not be negative"),
        ({"ns_steps": 2.5}, "ns_steps must be an integer"), ({"eps": math.nan}, "eps must not be negative"),
        ({"ns_coefficients": "abc"}, "ns_coefficients must be three finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            optim.Muon([nn.Parameter(torch.ones(4, 4))], **arguments)
    with pytest.raises(ValueError, match="nesterov is no setting of a group"):
        optim.Muon([{"params": [nn.Parameter(torch.ones(4, 4))], "nesterov": False}])


@pytest.mark.parametrize(
    ("kind", "name", "value", "in_a_group"),
    [
        (optim.Adafactor, "eps", (None, -1.0), False), (optim.Adafactor, "eps", (math.nan, 1e-3), False),
        (optim.Adafactor, "eps", 1e-8, False), (optim.Adafactor, "d", math.nan, False),
        (optim.Adafactor, "beta1", None, False), (optim.Adafactor, "beta2_decay", 0.8, True),
        (optim.SOAP, "frequency", 0, True), (optim.SOAP, "frequency", 1.5, True), (optim.SOAP, "frequency", True, True),
        (optim.SOAP, "shampoo_beta", 1.0, True), (optim.AdamWScheduleFree, "warmup_steps", -1, True),
    ],
)  # fmt: skip
def test_a_setting_that_means_nothing_is_refused(kind, name, value, in_a_group):
    """By its name; and in a group, where it may stand there, as by the constructor."""
    p = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=f"{name} must"):
        kind([p], **{name: value})
    if in_a_group:
        with pytest.raises(ValueError, match=f"{name} must"):
            kind([{"params": [p], name: value}])


@pytest.mark.parametrize("lr", [math.nan, "1", None])
@each_family
@pytest.mark.filterwarnings("ignore:paged state")
def test_a_learning_rate_that_is_none_is_refused_at_the_first_step(name, lr, eager):
    params, optimizer = start(name)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert same_bits([p.detach() for p in params], before)


@pytest.mark.filterwarnings("error")  # a step that was interrupted is one
def test_a_matrix_keeps_its_shape(eager):
    """Adafactor has no state by element whose shape would say so."""
    for shape in ((6, 4), (4, 6), (24,)):
        p = nn.Parameter(torch.ones(4, 6) if shape != (4, 6) else torch.ones(6, 4))
        p.grad = torch.ones_like(p)
        optimizer = optim.Adafactor([p])
        optimizer.step()
        p.data = torch.ones(shape)
        p.grad = torch.ones(shape)
        with pytest.raises(ValueError, match="a parameter must keep its shape"):
            optimizer.step()


def test_the_others_are_by_adamw(eager):
    """The same bits as AdamW8bit alone."""
    matrix, vector, alone = (nn.Parameter(torch.ones(shape)) for shape in ((64, 80), (5000,), (5000,)))
    optimizer = optim.Muon8bit([{"params": [matrix]}, {"params": [vector], "rule": "adamw", "lr": 1e-3}], lr=0.02)
    other = optim.AdamW8bit([alone], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, nonzero_squares=True)
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn(64, 80), torch.randn(5000)
        alone.grad = vector.grad.clone()
        optimizer.step()
        other.step()
    assert same_bits(vector.detach(), alone.detach())
    assert {s: x.dtype for s, x in optimizer.state[vector].items() if s != "step"}["state1"] == torch.uint8


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.norm = nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.head


def test_groups_of_a_model():
    model = Tied()
    muon, adamw = optim.muon_groups(model, lr=1e-4)
    assert [id(p) for p in muon["params"]] == [id(model.hidden.weight)]
    assert len(adamw["params"]) == 4
    assert (adamw["rule"], adamw["lr"]) == ("adamw", 1e-4)
    optim.Muon8bit([muon, adamw], lr=0.02)
    with pytest.raises(ValueError, match="head must name the modules of Sequential"):
        optim.muon_groups(nn.Sequential(nn.Linear(3, 3)))
    model.hidden.requires_grad_(False)
    assert [group["rule"] for group in optim.muon_groups(model)] == ["adamw"]
    for head in ("", "9", ["0", 1], "0.weight"):
        with pytest.raises(
            ValueError, match="head must name modules of Sequential, as its named_modules\\(\\) do, got"
        ):
            optim.muon_groups(nn.Sequential(nn.Linear(3, 3)), head=head)
    with pytest.raises(TypeError, match="model must be a Module, got None"):
        optim.muon_groups(None)


def test_a_rule_on_tensors_is_its_definition():
    """`whole` is the step itself where nothing is written down."""
    rule = matrices.Muon()
    found = coefficients_of(rule, 1, {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, **rule.defaults})
    c = types.SimpleNamespace(**{name: torch.tensor(x) for name, x in found.items()})
    g = torch.randn(8, 5)
    u, m = rule.direction(torch.zeros(8, 5), g, torch.zeros(8, 5), c)
    assert same_bits(u, rule.orthogonal(c.b * m + c.not_b * g, c.eps))
    assert decoupled({"lr": 0.1, "weight_decay": 0.0}) | averages(b=0.9) | {"eps": 1e-7} == found


@pytest.mark.parametrize(("name", "options"), [("Muon", {}), ("SOAP", {}), ("Adafactor", {"beta1": 0.9})])
def test_states_in_8_bits_are_the_codes_of_those_in_32(name, options, eager):
    """After the first step, before which both are 0."""
    found = []
    for bits in ("8bit", "32bit"):
        p = nn.Parameter(torch.linspace(-1, 1, 40 * 30).view(40, 30))
        p.grad = torch.sin(torch.arange(1200.0)).view(40, 30)
        optimizer = getattr(optim, name + bits)([p], lr=1e-2, min_8bit_size=0, **options)
        optimizer.step()
        found.append(optimizer.state[p])
    coded, floats = found
    keys = [key for key, x in coded.items() if isinstance(x, torch.Tensor) and x.dtype == torch.uint8]
    assert keys
    (rule, *_) = optimizer._rules.rules.values()
    for s in [s for s in rule.states if s.key in keys]:
        codes, absmax = blockwise.quantize(floats[s.key], rule.codebook(s), 256)
        assert same_bits((coded[s.key], coded[absmax_key(s.key)]), (codes, absmax))
