"""Numbers that are the same for all lanes of a kernel, such as coefficients and addresses: each is loaded once, without a mask.

A program takes some rows of a tensor at a time, and the last one may have rows too many: a mask says which lanes are beyond
the end. If the kernel's configuration is fixed (`configured`), Inductor sets uniform numbers to 0 in these lanes. So each lane
selects between every number and 0, which takes registers, and fewer programs run at a time.

It does not do so with a number whose place is not constant. So the place that is written here depends on how many rows there
are: for the number at k, and n rows, it is k + n (n + 1) mod 2. Of two numbers in a row one is even, so that this is k, but
Inductor does not know it.
What this gains: docs/content/gpu.md, section "Optimizers".
"""

from typing import Any

import torch
from torch import Tensor

from bnbref.kernels.taught import digest_of, expression, is_taught, operator

_TEXT = digest_of(__name__)


def uniform(numbers: Tensor, rows: Tensor) -> Tensor:
    """The same numbers, `[k]`, of which a kernel over those rows, `[n, ...]`, loads each without a mask.  Exact.

    >>> uniform(torch.tensor([0.5, 2.0]), torch.ones(3, 256))
    tensor([0.5000, 2.0000])
    """
    if numbers.device.type == "cuda" and torch.compiler.is_compiling() and is_taught("uniform"):
        native: Tensor = torch.ops.bnbref.uniform(numbers, rows, _TEXT)
        return native
    return numbers


def place_of(k: Any, n: Any) -> Any:
    """k, in an expression of which Inductor does not know it."""
    from torch.utils._sympy.functions import ModularIndexing

    return k + ModularIndexing(n * (n + 1), 1, 2)


@operator(
    "uniform(Tensor numbers, Tensor rows, str text='') -> Tensor",
    lambda numbers, rows, text="": torch.empty_like(numbers),
)
def _(numbers: Tensor, rows: Tensor, text: str = "") -> Tensor:
    return numbers.clone()


@expression("uniform")
def _(ops: Any, numbers: Any, rows: Any, text: str = "") -> Any:
    load, n = numbers.make_loader(), rows.get_size()[0]
    return numbers, numbers.get_size(), lambda at: load([place_of(at[0], n)])
