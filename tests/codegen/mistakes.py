"""Kernels with one mistake each, and a right one: what the tools must find. In the place of `calls`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bnbref.kernels import REGISTRY, Kernel, formulation, fused, ordered

ROWS = {"x": (0,), "y": (0,)}


@fused(dynamic=ROWS)
def right(x: Tensor, y: Tensor) -> Tensor:
    """A product, a sum and a quotient, each rounded."""
    return (x * y + y) / x


@fused(dynamic=ROWS)
def contracted(x: Tensor, y: Tensor) -> Tensor:
    """A product and a sum, rounded once."""
    return x * y + y


formulation("contracted", gpu={"emulate_precision_casts": False})(contracted.definition)


@fused(dynamic=ROWS)
def approximate(x: Tensor, y: Tensor) -> Tensor:
    """A quotient of 2 ulp."""
    return x / y


formulation("approximate", gpu={"eager_numerics.division_rounding": False})(approximate.definition)


@fused(dynamic=ROWS)
def in_two(x: Tensor, y: Tensor) -> Tensor:
    """A reduction of everything, and what needs its result."""
    return x - y.amax()


@fused(dynamic=ROWS)
def narrow(x: Tensor, y: Tensor) -> Tensor:
    """Every second element: a load each."""
    return x[:, ::2] + y[:, ::2]


@fused(dynamic={"total": (0, 1), "a": (0,), "b": (1,)})
def spilled(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """More numbers than registers, in blocks for kernels with fewer."""
    return ordered.add_products.definition(total, a, b)


@fused(dynamic=ROWS)
def other_bits(x: Tensor, y: Tensor) -> Tensor:
    """On a GPU another order of the same sum."""
    return x + (y + y / 3) if x.device.type == "cuda" else (x + y) + y / 3


KERNELS: tuple[Kernel[..., Tensor], ...] = (right, contracted, approximate, in_two, narrow, spilled, other_bits)
for _kernel in KERNELS:
    del REGISTRY[_kernel.name]  # none of the package's


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Each kernel on numbers of no special kind."""
    x, y = torch.rand(2, 512, 64, generator=torch.Generator().manual_seed(0)) + 1
    for kernel in KERNELS:
        args = (x[:, :32].clone(), x, y[:64, :32].clone()) if kernel is spilled else (x, y)
        yield kernel.name, lambda kernel=kernel, args=args: kernel(*args)
