"""Look-ups in a table of 64-bit entries by its address: on NVIDIA GPUs one load, and nothing around it.

Triton's load of a gathered entry has a mask, a hint for the cache and a layout of its own. These two instructions of PTX do not:

    mad.wide.u32 a, index, 8, address        @p ld.global.nc.b64 entry, [a]

The address is data and no part of what is compiled: the last entry of a table is the address of its first. Code on disk so serves
every process, and code for one GPU the next one; and what holds the address holds the memory too, as they are one tensor. Tables
are kept for good, and never written again. A copy of one, as CUDA graph trees make of inputs, points at the original.

p says that the address is not 0. In a kernel with a reduction, Inductor sets to 0 what lanes beyond the end of the tensors have
loaded, the address too, and these lanes must not load from there.

Elsewhere (a CPU, another maker's GPU, a torch whose internals look different) the same operator is a plain look-up.
What this gains: docs/content/reading.md, table "formulations".
"""

from typing import Any

import torch
from torch import Tensor, library

from bnbref.context import constant_of_graphs
from bnbref.kernels import floats
from bnbref.kernels.compiler import digest_of, taught

_LOAD = "{ .reg .b64 a; .reg .pred p; setp.ne.b64 p, $1, 0; mad.wide.u32 a, $2, 8, $1; @p ld.global.nc.b64 $0, [a]; }"

REAL_INPUTS = {
    "cpp_wrapper": False,
    "triton.autotune_at_compile_time": False,
    "benchmark_fusion": False,
    "benchmark_combo_kernel": False,
}
"""Options of kernels that look up by address: Inductor must not time them on inputs of its own, with an address at random."""

_native: bool | None = None  # what `_enable` found: None before it was called

_TEXT = digest_of(__name__)

_operators = library.Library("bnbref", "FRAGMENT")
_operators.define("entry_at(Tensor table, Tensor index, str text='') -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def addressed(entries: Tensor, device: torch.device) -> Tensor:
    """A table of these int64 entries on a device, for `look_up`: int64 `[entries + 1]`."""
    table = torch.empty(entries.numel() + 1, dtype=torch.int64, device=device)
    address = table.data_ptr() if device.type == "cuda" else 0  # on XPU no int64; and nobody asks
    last = torch.tensor([address], dtype=torch.int64, device="cpu")
    return table.copy_(torch.cat([entries, last]))  # the host waits for it, so that any stream may read the table


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, int64, of a table that `addressed` made.  Exact.

    index: int32, in the table whatever the lane has read: lanes beyond the end of a tensor load too, and nothing checks them.

    >>> look_up(addressed(torch.tensor([5, 6, 7]), torch.device("cpu")), torch.tensor([[2, 0]], dtype=torch.int32))
    tensor([[7, 5]])
    """
    if table.device.type == "cuda" and torch.compiler.is_compiling() and _enable():
        native: Tensor = torch.ops.bnbref.entry_at(table, index, _TEXT)
        return native
    return floats.look_up(table, index)


@library.impl(_operators, "entry_at", "CompositeExplicitAutograd")
def _(table: Tensor, index: Tensor, text: str = "") -> Tensor:
    return floats.look_up(table, index)


@library.register_fake("bnbref::entry_at", lib=_operators)  # type: ignore[untyped-decorator]
def _(table: Tensor, index: Tensor, text: str = "") -> Tensor:
    return torch.empty(index.shape, dtype=torch.int64, device=index.device)


# ---- teaching Inductor ----------------------------------------------------------------------------------------------


@constant_of_graphs
def _enable() -> bool:
    """Registers the lowering with Inductor, once per process; False where it cannot be, and then a plain look-up is compiled."""
    global _native
    if _native is None:
        _native = taught(_register)
    return _native


def _register() -> None:
    from torch._inductor import ir
    from torch._inductor import lowering as lowerings
    from torch._inductor.ops_handler import OpsHandler
    from torch._inductor.virtualized import ops

    for owner, name in ((ir, "Pointwise"), (lowerings, "register_lowering"), (OpsHandler, "inline_asm_elementwise")):
        getattr(owner, name)

    @lowerings.register_lowering(torch.ops.bnbref.entry_at.default, type_promotion_kind=None)
    def _(table: Any, index: Any, text: str = "") -> Any:
        load_table, load_index, last = table.make_loader(), index.make_loader(), int(table.get_size()[0]) - 1

        def inner(at: Any) -> Any:
            operands = load_table([last]), load_index(at)
            return ops.inline_asm_elementwise(
                *operands, asm=_LOAD, constraints="=l,l,r", dtype=torch.int64, is_pure=True, pack=1
            )

        return ir.Pointwise.create(
            device=index.get_device(), dtype=torch.int64, inner_fn=inner, ranges=list(index.get_size())
        )
