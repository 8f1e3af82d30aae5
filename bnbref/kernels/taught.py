"""Operators of bnbref's own, `torch.ops.bnbref.NAME`, which a graph holds as one node, and what Inductor is taught of them.

An operator is a function, which runs on any device, and a sketch of its result, by which a graph is traced. For NVIDIA GPUs it
may have an expression as well: the instructions that Inductor writes into a kernel for one element of the result. Elsewhere
(another maker's GPU, a torch whose internals look different) the function is compiled.
"""

import functools
import hashlib
import inspect
import marshal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import library

from bnbref.context import constant_of_graphs

F = TypeVar("F", bound=Callable[..., Any])

_operators = library.Library("bnbref", "FRAGMENT")
_expressions: dict[str, tuple[torch.dtype | None, Callable[..., Any]]] = {}


def operator(schema: str, sketch: Callable[..., Any]) -> Callable[[F], F]:
    """Decorator: the function is the operator of that schema, on every device.

    sketch: a function of the same arguments. It returns tensors like the results, with no values. ImportError if there is an
    operator of that name, as there is for a second copy of bnbref in a process.
    """

    def define(function: F) -> F:
        name = schema.partition("(")[0]
        try:
            _operators.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        except RuntimeError as error:
            if "multiple times" not in str(error):
                raise
            raise ImportError(
                f"bnbref is in this process already, with its operator bnbref::{name}, of which torch has one: a second copy or "
                "version of it needs a process of its own"
            ) from error
        _operators.impl(name, function, "CompositeExplicitAutograd")
        library.register_fake(f"bnbref::{name}", sketch, lib=_operators)
        return function

    return define


def expression(name: str, dtype: torch.dtype | None = None) -> Callable[[F], F]:
    """Decorator: the function says how a GPU computes an element of the operator of that name.

    It takes Inductor's operations `ops` and the operator's arguments as Inductor has them, and returns an argument that is on the
    device of the result, the result's shape, and a function from an index to the element. dtype: the result's; None is that of
    the argument returned.
    """

    def attach(function: F) -> F:
        _expressions[name] = dtype, function
        return function

    return attach


@constant_of_graphs
def is_taught(name: str) -> bool:
    """Whether Inductor knows the expression of the operator of that name: it is taught it when this is first asked."""
    return _taught(name)


@functools.cache
def _taught(name: str) -> bool:
    if torch.version.hip is not None:
        return False
    dtype, element_of = _expressions[name]
    try:
        from torch._inductor.ir import Pointwise
        from torch._inductor.lowering import register_lowering
        from torch._inductor.ops_handler import OpsHandler
        from torch._inductor.virtualized import ops

        OpsHandler.inline_asm_elementwise  # noqa: B018, an AttributeError if Inductor has none

        @register_lowering(getattr(torch.ops.bnbref, name).default, type_promotion_kind=None)
        def _(*args: Any) -> Any:
            like, size, element = element_of(ops, *args)
            return Pointwise.create(
                device=like.get_device(), dtype=dtype or like.get_dtype(), inner_fn=element, ranges=list(size)
            )
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def instructions(ops: Any, text: str, *operands: Any, kinds: str, dtype: torch.dtype) -> Any:
    """A line of PTX as an operation on elements: $0 is its result, $1 the first operand.

    kinds: the register of the result and of each operand, by the letters of inline assembly: "r" has 32 bits, "l" has 64, "f" is
    for a float.
    """
    constraints = "=" + ",".join(kinds)
    return ops.inline_asm_elementwise(*operands, asm=text, constraints=constraints, dtype=dtype, is_pure=True, pack=1)


def digest_of(*modules: str) -> str:
    """A digest of the texts of modules of ours that teach Inductor operators, for an argument of these operators.

    Inductor's cache on disk knows an operator by its name and arguments, and not by what it was taught. Without the digest it
    would return the code of another version of bnbref.
    """
    return hashlib.sha256(b"".join(map(_text, (__name__, *modules)))).hexdigest()[:16]


def _text(module: str) -> bytes:
    try:
        return inspect.getsource(sys.modules[module]).encode()
    except OSError:  # installed without sources
        loader: Any = sys.modules[module].__loader__
        return marshal.dumps(loader.get_code(module))
