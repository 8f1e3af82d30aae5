"""Look-ups in a table of 64-bit entries by its address: on NVIDIA GPUs one load, and nothing around it.

Triton's load of a gathered entry has a mask, a hint for the cache and a layout of its own. These two instructions of PTX do not:

    mad.wide.u32 a, index, 8, address        @p ld.global.nc.b64 entry, [a]

The address is data and no part of what is compiled: the last entry of a table is the address of its first. Code on disk so serves
every process, and code for one GPU the next one; and what holds the address holds the memory too, as they are one tensor. Tables
are kept for good, and never written again. A copy of one, as CUDA graph trees make of inputs, points at the original.

p says that the address is not 0. In a kernel with a reduction, Inductor sets to 0 what lanes beyond the end of the tensors have
loaded, the address too, and these lanes must not load from there.

Elsewhere the same operator is a plain look-up.
What this gains: docs/content/reading.md, table "formulations".
"""

from typing import Any

import torch
from torch import Tensor

from bnbref.kernels import floats
from bnbref.kernels.taught import digest_of, expression, instructions, is_taught, operator

_LOAD = "{ .reg .b64 a; .reg .pred p; setp.ne.b64 p, $1, 0; mad.wide.u32 a, $2, 8, $1; @p ld.global.nc.b64 $0, [a]; }"

REAL_INPUTS = {
    "cpp_wrapper": False,
    "triton.autotune_at_compile_time": False,
    "benchmark_fusion": False,
    "benchmark_combo_kernel": False,
}
"""Options of kernels that look up by address: Inductor must not time them on inputs of its own, with an address at random."""

_TEXT = digest_of(__name__)


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
    if table.device.type == "cuda" and torch.compiler.is_compiling() and is_taught("entry_at"):
        native: Tensor = torch.ops.bnbref.entry_at(table, index, _TEXT)
        return native
    return floats.look_up(table, index)


@operator(
    "entry_at(Tensor table, Tensor index, str text='') -> Tensor",
    lambda table, index, text="": index.new_empty(index.shape, dtype=torch.int64),
)
def _(table: Tensor, index: Tensor, text: str = "") -> Tensor:
    return floats.look_up(table, index)


@expression("entry_at", torch.int64)
def _(ops: Any, table: Any, index: Any, text: str = "") -> Any:
    load_table, load_index, last = table.make_loader(), index.make_loader(), int(table.get_size()[0]) - 1

    def element(at: Any) -> Any:
        return instructions(ops, _LOAD, load_table([last]), load_index(at), kinds="llr", dtype=torch.int64)

    return index, index.get_size(), element
