"""What undoes the second quantization of scales, in one piece of memory: so a graph has one input for it and not three.

A graph of torch.compile takes every tensor that it reads as an input, and each input costs: Dynamo and Inductor handle it when
the model is compiled, and before each replay of a CUDA graph it is checked whether it is where it was (docs: GPU, "whole flows").

So absmax2, the values that codes of scales stand for, and the offset of a layer's weight lie one behind the other, and the fields
of its quant state are views of this memory. The codes of the scales stay apart: torch.save takes no memory of two dtypes.
"""

import torch
from torch import Tensor

from bnbref.context import is_lazy
from bnbref.kernels import tracing
from bnbref.quant_state import QuantState

_VALUES = 256
_ALIGNED = 4
"""Elements whose bytes divide the place of each part, as they divide the addresses for which Inductor compiles."""


def join(state: QuantState) -> None:
    """Puts these fields of a state one behind the other, if its scales are nested and plain tensors. Their numbers stay.

    An absmax that is a view becomes the same memory as no view: for a view Dynamo makes its base as well when it traces.
    """
    if tracing():
        return
    if type(state.absmax) is Tensor and state.absmax._is_view() and not state.absmax.requires_grad:
        state.absmax = state.absmax.data
    parts = _parts(state)
    if parts is None or state.state2 is None or memory_of(state) is not None:
        return
    if any(t.is_meta or is_lazy(t) for t in parts):
        return
    blocks2 = parts[0].numel()
    views = split(parts[0].new_zeros(_starts(blocks2)[-1]), blocks2)
    for view, part in zip(views, parts, strict=True):
        view.copy_(part)
    state.state2.absmax, state.state2.code, state.offset = views


def memory_of(state: QuantState) -> Tensor | None:
    """The memory that these fields of a state share, float32; None if they do not lie in one as `join` puts them."""
    parts = _parts(state)
    if parts is None or any(t.is_meta for t in parts):
        return None
    starts, storage = _starts(parts[0].numel()), parts[0].untyped_storage()
    places = [(t.untyped_storage()._cdata, t.storage_offset()) for t in parts]
    if storage.nbytes() != 4 * starts[-1] or places != [(storage._cdata, start) for start in starts[:-1]]:
        return None
    return parts[0].as_strided((starts[-1],), (1,), 0).data  # no view: see `join`


def split(memory: Tensor, blocks2: int) -> tuple[Tensor, Tensor, Tensor]:
    """absmax2, the values of the codes and the offset, from the memory that they share.

    >>> [t.shape for t in split(torch.zeros(264), 2)]
    [torch.Size([2]), torch.Size([256]), torch.Size([])]
    """
    _, values, offset, _ = _starts(blocks2)
    return memory[:blocks2], memory[values : values + _VALUES], memory[offset]


def _parts(state: QuantState) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `split` returns, from a state; None if its scales are not nested, or not of the usual kinds."""
    second = state.state2
    if second is None or second.code is None or state.offset is None:
        return None
    parts = (second.absmax, second.code, state.offset)
    plain = all(type(t) is Tensor and t.dtype == torch.float32 and t.is_contiguous() for t in parts)
    plain = plain and not any(t.requires_grad for t in parts)  # which somebody has, to train them
    fits = plain and (parts[0].dim(), parts[1].shape, parts[2].shape) == (1, (_VALUES,), ())
    return parts if fits and len({t.device for t in parts}) == 1 else None


def _starts(blocks2: int) -> tuple[int, int, int, int]:
    """At which element each part begins, and where the last one ends."""
    values = -(-blocks2 // _ALIGNED) * _ALIGNED
    return 0, values, values + _VALUES, values + _VALUES + _ALIGNED
