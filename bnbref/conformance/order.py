"""In which order a backend's float product adds up, found by calling it: FPRev (Xie, Gao and Xue, USENIX ATC 2025).

    a = 1, 1, ..., M, 1, ..., -M, ..., 1        M at i, -M at j; so large that M + n = M in any accumulator
    y = how many ones are added after M and -M have met

The ones that are lost are those under the node at which i and j meet: n - y leaves. These numbers for pairs give the tree. What
multiplies must be constant along the sum, so the weight is all ones, or all another number. An order depends on the shape of a
call and not on its numbers; it may depend on the place of the row in its batch, which is why the first row alone is asked.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Backend
from bnbref.conformance.trees import Tree, in_words

LARGE = 2.0**100
"""M: with it a one is lost in float64 too."""

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Probe:
    """Asks the first of `rows` rows of a product of `size` columns under how many leaves two elements meet."""

    product: Product
    size: int
    rows: int
    dtype: torch.dtype

    def meet(self, i: int, others: Sequence[int]) -> list[int]:
        """The number of leaves under the node where element i meets each of the others."""
        found, one = [], self.one
        a = torch.ones(self.rows, self.size, dtype=self.dtype)
        a[0, i] = LARGE
        for j in others:
            a[0, j] = -LARGE
            y = float(self.product(a)[0, 0])
            if not math.isfinite(y):
                raise ValueError(f"{LARGE:g} and {-LARGE:g} do not cancel: the product with them and ones is {y}")
            found.append(self.size - round(y / one))
            a[0, j] = 1
        return found

    @functools.cached_property
    def one(self) -> float:
        """The product with a single one: 1, or the number that the backend has made of the ones of the weight."""
        a = torch.zeros(self.rows, self.size, dtype=self.dtype)
        a[:, 0] = 1
        one = float(self.product(a)[0, 0])
        if one == 0 or not math.isfinite(one):
            raise ValueError(f"the product with a single one is {one}, must be a number that is not 0")
        return one

    def tree(self) -> Tree:
        """The order of the sum. Raises ValueError where the answers are those of no tree."""
        return self._within(list(range(self.size)))

    def _within(self, elements: list[int]) -> Tree:
        """The tree of elements that are one subtree."""
        first, rest = elements[0], elements[1:]
        by_size: dict[int, list[int]] = {}
        for element, n in zip(rest, self.meet(first, rest), strict=True):
            by_size.setdefault(n, []).append(element)
        tree: Tree = first
        size = 1
        for n in sorted(by_size):
            size += len(by_size[n])
            if n != size:
                raise ValueError(f"element {first} meets {by_size[n]} among {n} elements, must be among {size}")
            tree = (tree, *self._siblings(by_size[n], n))
        return tree

    def _siblings(self, elements: list[int], n: int) -> Iterator[Tree]:
        """The subtrees of elements that all are added at a node of n leaves: more than one where it adds several at once."""
        while elements:
            first, rest = elements[0], elements[1:]
            together = [e for e, found in zip(rest, self.meet(first, rest), strict=True) if found < n]
            yield self._within([first, *together])
            elements = [e for e in rest if e not in together]


CPU = torch.device("cpu")


def product(backend: Backend, n: int, k: int, device: torch.device = CPU) -> Product:
    """The backend's product on a device with a 4-bit weight of ones `[n, k]`; it takes and returns tensors of the CPU.

    Raises ValueError where it has none there.
    """
    if backend.product_of_ones is not None:
        if device.type != "cpu":
            raise ValueError(f"backend {backend.name!r} multiplies on the CPU, got device {str(device)!r}")
        made: Product = backend.product_of_ones(n, k)
        return made
    if "gemm_4bit" not in backend.functions:
        raise ValueError(f"backend {backend.name!r} has no gemm_4bit")
    packed = torch.full((n * k // 2,), 0xFF, dtype=torch.uint8, device=device)  # NF4's code 15 is 1
    weight: dict[str, Any] = {"packed": packed, "absmax": torch.ones(n * k // 64, device=device), "bias": None}
    return lambda a: backend.functions["gemm_4bit"](
        a=a.to(device), **weight, blocksize=64, quant_type="nf4", shape=(n, k)
    ).view(-1, n).cpu()  # fmt: skip


BATCHES = (1, 2, 3, 4, 7, 8, 16, 17, 33, 64)
"""Numbers of rows: a kernel may be another one for a single row, for few, and for more than its tile has."""

TRIALS = 8
"""Rows of random numbers whose bits are compared. All columns of the weight being ones, each gives one number."""


def orders(multiply: Product, k: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The order of the first row's sum, with the sizes of batches that have it and give the row the same bits.

    anywhere: of these, the batches in which a row has the same bits in every place.
    """
    given = torch.randn(TRIALS, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    found: list[tuple[Tensor, dict[str, Any]]] = []
    for m in BATCHES:
        rows = torch.stack([multiply(a.expand(m, k).contiguous()) for a in given])
        try:
            order = in_words(Probe(multiply, k, m, dtype).tree())
        except ValueError as error:
            order = f"no tree: {error}"
        same = [entry for first, entry in found if order == entry["order"] and torch.equal(rows[:, 0], first)]
        if not same:
            same = [{"order": order, "batches": [], "anywhere": []}]
            found.append((rows[:, 0], same[0]))
        same[0]["batches"].append(m)
        if bool((rows == rows[:, :1]).all()):
            same[0]["anywhere"].append(m)
    return [entry for _, entry in found]


def report(
    backend: Backend, device: torch.device = CPU, n: int = 64, sizes: Sequence[int] = (128, 256)
) -> list[dict[str, Any]]:
    """For each dtype and number of columns the orders of the sum, each with the batches that have it.

    bfloat16 has whole numbers up to 256, so that no more columns can be asked for in it.
    """
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for k in sizes:
            try:
                made = orders(product(backend, n, k, device), k, dtype)
            except NotImplementedError:  # the backend has no such dtype
                continue
            found += [{"dtype": str(dtype).removeprefix("torch."), "columns": k, **entry} for entry in made]
    return found


def as_text(backend: Backend, device: torch.device, found: Sequence[dict[str, Any]]) -> str:
    """The report for a terminal."""
    lines = [
        f"{backend.name} on {device}: the order in which its product adds up, by batches that give a row the same bits"
    ]
    for entry in found:
        sizes = " ".join(f"{m}{'' if m in entry['anywhere'] else '*'}" for m in entry["batches"])
        lines += [f"{entry['dtype']}, {entry['columns']} columns, batches of {sizes}", f"    {entry['order']}"]
    if any(entry["batches"] != entry["anywhere"] for entry in found):
        lines.append("* a row has other bits in another place of the batch")
    return "\n".join(lines)


def as_json(backend: Backend, device: torch.device, found: Sequence[dict[str, Any]]) -> str:
    """The report, and what was asked: where, and its versions."""
    body = {"backend": backend.name, "device": str(device), "versions": backend.versions, "orders": found}
    return json.dumps(body, indent=1) + "\n"
