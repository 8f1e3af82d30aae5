"""A matrix product whose order of summation is written down: the same bits for any batch, number of threads and compiler.

    y[i, j] = ((t_0 + t_1) + t_2) + ...      t_b = the 64 products a[i, l] b[l, j], l = 64 b .. 64 b + 63,
                                             added in pairs, the pairs in pairs, ... as neighbours: a tree of six levels

in float32, every product and every sum rounded. A library's product is faster because it chooses: the order by the shape of
the operands, the split by the number of threads, a fused multiply-add where there is one. So a row of a batch may have other
bits than the same row alone. Here nothing is left to choose, and each element sees only its own row and column.

Source of the problem: He et al., Defeating Nondeterminism in LLM Inference (Thinking Machines Lab, 2025).
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bnbref.kernels.door import fused
from bnbref.kernels.taught import operator

WIDTH = 64  # products that are added as a tree

_entered: list[None] = []
"""An element for each `batch_invariant()` that is entered; a list, for the reason that `kernels/modes.py` has."""


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Products with 4-bit weights in a fixed order inside the block, in all threads of the process.

    Each row of the result then depends on its own row of activations alone: its bits are the same in any batch, with any
    number of threads, eager and compiled, and inside a graph of your own. The gradients of a product that was made inside
    the block are in a fixed order too. The price is in `docs/content/exactness.md`.

    >>> import bnbref
    >>> layer = bnbref.nn.Linear4bit(64, 64, bias=False).to("cpu")
    >>> batch = torch.randn(8, 64)
    >>> with bnbref.batch_invariant():
    ...     torch.equal(layer(batch)[3:4], layer(batch[3:4]))
    True
    """
    _entered.append(None)
    try:
        yield
    finally:
        _entered.pop()


def batch_invariant_enabled() -> bool:
    """Whether this runs inside `batch_invariant()`."""
    return bool(_entered)


@fused(dynamic={"total": (0, 1), "a": (0,), "b": (1,)})
def add_products(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total` plus the tree of 64 products, float32 `[m, n]`.  Exact.

    total: float32 `[m, n]`. a: float32 `[m, 64]`. b: float32 `[64, n]`.
    """

    def tree(first: int, count: int) -> Tensor:
        if count == 1:
            return rearrange(a[:, first], "m -> m 1") * b[first]
        return tree(first, count // 2) + tree(first + count // 2, count // 2)

    return total + tree(0, b.shape[0])


# This many columns of zeros are put beside the n columns: 64 rows that begin a multiple of 4096 bytes apart would share one set
# of a CPU's cache (docs: How to read the code, table "formulations").
_APART = 16


@operator(
    "ordered_product(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]),
)
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    (m, k), (rows_of_b, n) = a.shape, b.shape
    if rows_of_b != k:
        raise ValueError(f"a must have as many columns as b has rows, got shapes {list(a.shape)} and {list(b.shape)}")
    # Padded by zeros to whole trees of columns, and to at least two rows, because Dynamo would compile once more for one row.
    columns = F.pad(a.float(), (0, -k % WIDTH, 0, max(2 - m, 0)))
    total = columns.new_zeros(columns.shape[0], n + _APART)
    slab = columns.new_zeros(WIDTH, n + _APART)
    b = b.contiguous()
    for block, left in enumerate(rearrange(columns, "m (b s) -> b m s", s=WIDTH).contiguous().unbind()):
        rows = b[block * WIDTH : (block + 1) * WIDTH]
        if len(rows) < WIDTH:
            slab = torch.zeros_like(slab)
        slab[: len(rows), :n].copy_(rows)
        total = add_products(total, left, slab)
    y = total[:m, :n] if bias is None else total[:m, :n] + bias.float()
    return y.to(a.dtype).contiguous()  # as the sketch says: graphs are compiled for those strides


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias`, summed in float32 in the order at the head of this file: a `[m, k]`, b `[k, n]`, bias `[n]`.  Exact.

    Bias is added last, before the one rounding to the dtype of a. Without that rounding the result is within
    (8 + ceil(k / 64)) u (sum |a b| + |bias|) of the real number, u = 2^-24, to first order; a library's may be k u off.
    ValueError where k is not the same. An operator of its own, so that no graph around it is fused with its sums or leaves out
    its roundings.

    >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
    tensor([[11.]])
    """
    result: Tensor = torch.ops.bnbref.ordered_product(a, b, bias)
    return result
