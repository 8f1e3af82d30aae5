"""Rules that see whole matrices: what acts by element is an equation as ever, and `Rule.whole` has the rest.

*Bounded*: products in bfloat16 and float32, and means, are torch's, in the order that it chooses on a device. Eager and compiled
they are the same calls, and so have the same bits.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.optim.kinds import SettingError, count, number, weight, weights
from bnbref.optim.rules import Rule, State, averages, decoupled

QUINTIC = (3.4445, -4.775, 2.0315)


def newton_schulz(
    x: Tensor, coefficients: tuple[float, float, float] = QUINTIC, steps: int = 5, eps: float | Tensor = 1e-7
) -> Tensor:
    """Nearly the orthogonal factor of each matrix: bfloat16 `[..., rows, columns]`, with singular values of 0.7 to 1.2.

        X = x / |x|,   then `steps` times   A = X X^T,   X = a X + (b A + c A^2) X

    Jordan et al., Muon (2024), where (a, b, c) make zero the steepest. Each product is one rounding to bfloat16 of a sum in
    float32, as in torch.optim.Muon.

    >>> x = newton_schulz(torch.tensor([[3.0, 0.0], [0.0, -0.5]]))
    >>> bool(((x.diagonal().abs() - 0.95).abs() < 0.3).all())
    True
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    wide = (x.mT if tall else x).bfloat16()
    y = wide.reshape(math.prod(wide.shape[:-2]), *wide.shape[-2:])
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.reshape(wide.shape)
    return y.mT if tall else y


class Muon(Rule):
    """Jordan et al., Muon (2024), as torch.optim.Muon: momentum, orthogonalised.  Decoupled decay.

    m = b m + (1 - b) g              u = newton_schulz(b m + (1 - b) g)           with nesterov, else of m
    p = (1 - lr wd) p - lr s u       s = sqrt(max(1, rows / columns))             or 0.2 sqrt(max(rows, columns))

    adjust: "original" for the first s, "match_rms_adamw" for the second (Liu et al., 2502.16982), by which a learning rate of
    AdamW's will do. eps: of newton_schulz, in a group that does not say its own.
    """

    states = (State("momentum"),)

    def __init__(
        self, nesterov: bool = True, coefficients: tuple[float, float, float] = QUINTIC, steps: int = 5, eps: float = 1e-7,
        adjust: str = "original",
    ) -> None:  # fmt: skip
        self.nesterov, self.ns_coefficients, self.steps, self.adjust = nesterov, coefficients, steps, adjust
        self.defaults = {"eps": eps}

    def takes(self, parameter: torch.Size) -> bool:
        return len(parameter) == 2

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        return decoupled(group) | averages(b=weight(group, "momentum")) | {"eps": number(group, "eps")}

    def direction(self, p: Tensor, g: Tensor, m: Tensor, c: Any) -> tuple[Tensor, ...]:
        m = c.b * m + c.not_b * g
        return self.whole(self.orthogonal, c.b * m + c.not_b * g if self.nesterov else m, c.eps), m

    def orthogonal(self, x: Tensor, eps: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        tall = math.sqrt(max(1, rows / max(1, columns)))
        scale = tall if self.adjust == "original" else 0.2 * math.sqrt(max(rows, columns))
        return scale * newton_schulz(x, self.ns_coefficients, self.steps, eps).float()


def factored(
    g: Tensor, p: Tensor, row: Tensor, column: Tensor, not_b: Tensor, eps: tuple[float, float], d: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The direction of Adafactor and its new means of squares by row and by column."""
    squares = g * g
    row = row + not_b * (squares.mean(-1) - row)
    column = column + not_b * (squares.mean(-2) - column)
    v = row[..., None] * column[..., None, :] / row.mean(-1)[..., None, None].clamp(min=eps[0])
    u = g * v.clamp(min=eps[0] ** 2).rsqrt()
    size, length = (x.square().mean((-2, -1), keepdim=True).sqrt() for x in (p, u))
    return size.clamp(min=eps[1]) / (length / d).clamp(min=1.0) * u, row, column


class Adafactor(Rule):
    """Shazeer & Stern, 1804.04235, as torch.optim.Adafactor, with momentum if b1 > 0.  Decoupled decay.

    r = b r + (1 - b) mean of g^2 by row           q = b q + (1 - b) mean of g^2 by column          b = 1 - t^decay
    u = g / max(sqrt(r q^T / mean(r)), eps1)       u = max(eps2, rms(p)) u / max(1, rms(u) / d)
    m = b1 m + (1 - b1) u                          p = (1 - lr wd) p - min(lr, 1 / sqrt(t)) m

    A vector is a matrix of one row, whose r q^T / mean(r) is q.
    """

    def __init__(self, momentum: bool = False, eps: tuple[float, float] = (2.0**-23, 1e-3), d: float = 1.0) -> None:
        self.momentum, self.eps, self.d = momentum, eps, d
        self.states = (State("row", of="rows"), State("column", of="columns"), *((State("momentum"),) * momentum))

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        b1, numbers = weight(group, "beta1"), decoupled(group)
        if b1 > 0 and not self.momentum:
            raise SettingError(f"beta1 of a group must be 0 where the optimizer's is, which has no momentum, got {b1}")
        falls = number(group, "beta2_decay", least=-math.inf, most=0.0)
        return numbers | averages(b1=b1) | {"rate": min(numbers["rate"], 1 / math.sqrt(t)), "not_b": t**falls}

    def direction(self, p: Tensor, g: Tensor, row: Tensor, column: Tensor, *m_and_c: Any) -> tuple[Tensor, ...]:
        *m, c = m_and_c
        u, row, column = self.whole(factored, g, p, row, column, c.not_b, self.eps, self.d, results=3)
        m = [c.b1 * m[0] + c.not_b1 * u] if self.momentum else []
        return (*(m or [u]), row, column, *m)


def rotated(g: Tensor, m: Tensor, of_left: Tensor, of_right: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and the momentum in the bases of SOAP."""
    return of_left.mT @ g @ of_right, of_left.mT @ m @ of_right


def rotated_back(u: Tensor, of_left: Tensor, of_right: Tensor) -> Tensor:
    """A direction in the bases of SOAP, as one of the parameter."""
    return of_left @ u @ of_right.mT


def averaged(
    g: Tensor, left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, not_b: Tensor, refresh: Tensor
) -> tuple[Tensor, ...]:
    """The means of G G^T and G^T G, and bases of their eigenvectors, or nearer to them by one step of a power iteration."""
    left, right = left + not_b * (g @ g.mT - left), right + not_b * (g.mT @ g - right)
    if refresh.is_meta or refresh:
        of_left, of_right = _nearer(left, of_left), _nearer(right, of_right)
    return left, right, of_left, of_right


def _nearer(mean: Tensor, basis: Tensor) -> Tensor:
    """Columns nearer to the eigenvectors of a mean `[..., n, n]` than those of `basis`. Of a basis of zeros, the eigenvectors."""
    # QR makes a column orthogonal to those before it. So they are sorted, the largest eigenvalue first: of an eigenvalue of 0 the
    # product is noise, which must not turn the others. Then each goes back to its place, where its squares were summed.
    power = mean @ basis
    order = (basis * power).sum(-2).argsort(dim=-1, descending=True, stable=True)
    sorted_basis = torch.linalg.qr(torch.take_along_dim(power, order[..., None, :], -1))[0]
    nearer = torch.take_along_dim(sorted_basis, order.argsort(-1)[..., None, :], -1)
    none = ~basis.any(-1).any(-1)[..., None, None]
    return torch.where(none, torch.linalg.eigh(mean)[1], nearer) if none.is_meta or none.any() else nearer


class SOAP(Rule):
    """Vyas et al., 2409.11321, algorithm 3: Adam in the eigenbases P, Q of Shampoo's statistics.  Decoupled decay.

    m = b1 m + (1 - b1) G            v = b2 v + (1 - b2) (P^T G Q)^2
    p = (1 - lr wd) p - lr P ((P^T m^ Q) / (sqrt(v^) + eps)) Q^T
    L = b L + (1 - b) G G^T          R = b R + (1 - b) G^T G          every `frequency` steps P, Q = qr(L P), qr(R Q)

    The first gradient makes L, R, P and Q alone, as in the authors' program: in its own bases it is a diagonal, and a step would
    go where the rounding of the zeros beside that points.
    """

    states = (
        State("momentum"), State("squares", signed=False), State("left", of="rows x rows"),
        State("right", of="columns x columns"), State("of_left", of="rows x rows"), State("of_right", of="columns x columns"),
    )  # fmt: skip

    def takes(self, parameter: torch.Size) -> bool:
        return len(parameter) == 2

    def coefficients(self, t: int, group: Mapping[str, Any]) -> dict[str, float]:
        (b1, b2), b, s = weights(group, many=2), weight(group, "shampoo_beta"), t - 1
        numbers = decoupled(group) | averages(b1=b1, b2=b2, b=b) | {"eps": number(group, "eps")}
        numbers |= {"refresh": float(s % count(group, "frequency", 1) == 0)}
        if s == 0:  # P and Q are 0, and so is the direction
            return numbers | averages(b1=1.0) | {"rate": 0.0, "decay": 1.0, "root": 1.0}
        return numbers | {"rate": numbers["rate"] / (1 - b1**s), "root": math.sqrt(1 - b2**s)}

    def direction(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        left, right, of_left, of_right, c = rest
        m = c.b1 * m + c.not_b1 * g
        x, y = self.whole(rotated, g, m, of_left, of_right, results=2)
        v = c.b2 * v + c.not_b2 * (x * x)
        u = self.whole(rotated_back, y / (self.sqrt(v) / c.root + c.eps), of_left, of_right)
        return u, m, v, *self.whole(averaged, g, left, right, of_left, of_right, c.not_b, c.refresh, results=4)
