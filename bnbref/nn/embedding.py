"""Embeddings with a table in four or eight bits, and float embeddings whose optimizer state stays in 32 bits.

Only the rows that are looked up are dequantized. A row of four-bit codes may begin or end inside a block. So it is split into
pieces of gcd(embedding_dim, blocksize) elements, each of which lies in one block:

    scale of piece j of row i = absmax[(i * embedding_dim + j * piece) // blocksize]

A table is quantized by `.to(device)`, and saved and loaded like the weight of a linear layer. Rows come out in the layer's
`dtype`, which is that of the float table and follows the casts of the module, `.half()` for example, as the table of
`nn.Embedding` does.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbref import fourbit, int8, nested
from bnbref.arguments import check_memory
from bnbref.codebooks import Codebook
from bnbref.context import as_bytes, plain
from bnbref.nn.four_and_eight_bits import EightBitLayer, FourBitLayer, absmax_of, state_of
from bnbref.nn.params import Int8Params, Params4bit
from bnbref.nn.quantized_layer import QuantizedLayer, node_of
from bnbref.nn.quantized_parameter import QuantizedParameter
from bnbref.optim import GlobalOptimManager
from bnbref.quant_state import QuantState, present

logger = logging.getLogger(__name__)


class _QuantizedEmbedding(QuantizedLayer):
    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if isinstance(param, QuantizedParameter):
            state = getattr(param, "quant_state", None)
            dtype = param.dtype if not param.holds_codes() else None if state is None else state.dtype
            self.dtype = dtype or self.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_QuantizedEmbedding":
        dtype = self.dtype
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=dtype, device="cpu")).dtype  # the dtype that a float table would have now
        return self

    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim


def scales_at(state: QuantState, index: Tensor) -> Tensor:
    """The float32 scales of the blocks that `index` names: `state.scales()[index]`, without computing the others.  Exact.

    >>> from bnbref.functional import quantize_4bit
    >>> scales_at(quantize_4bit(torch.arange(4.0), blocksize=2)[1], torch.tensor([1, 1, 0]))
    tensor([3., 3., 1.])
    """
    if state.state2 is None:
        return state.absmax[index].float()
    second, values = state.state2, present(state.state2.code, "state2.code")
    absmax2 = second.absmax[index.reshape(-1) // present(second.blocksize, "state2.blocksize")]
    return nested.dequantize(state.absmax[index], absmax2, values, present(state.offset, "offset"), blocksize=1)


class Embedding4bit(_QuantizedEmbedding, FourBitLayer, nn.Embedding):
    """`nn.Embedding` with a `Params4bit`: rows are `dtype(fl(values[code] * absmax))`.  Exact.

    >>> import bnbref
    >>> table = Embedding4bit(3, 64, quant_type="nf4")
    >>> table.load_state_dict({"weight": torch.arange(3.0)[:, None].expand(3, 64)})
    <All keys matched successfully>
    >>> with bnbref.eager():
    ...     table.to("cpu")(torch.tensor([2, 1]))[:, 0]
    tensor([2., 1.])
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype | None = None,
        quant_type: str | Codebook = "fp4", quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None, *, compress_statistics: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.weight = Params4bit(
            self.weight, compress_statistics=compress_statistics, quant_type=quant_type, quant_storage=quant_storage
        )
        if embedding_dim % self.weight.blocksize != 0:
            logger.warning(
                "embedding_dim %d is no multiple of the block size %d: this will lead to slow inference",
                embedding_dim,
                self.weight.blocksize,
            )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The rows of the table that `input`, integers `[...]`, names: `[..., embedding_dim]` in the layer's `dtype`."""
        if (node := node_of(self, Embedding4bit.forward, input)) is not None:
            return node  # type: ignore[no-any-return]
        state = state_of(self)
        if state is None:
            raise RuntimeError(f"the table of {self} is not quantized yet: move the layer to a device, .to(device)")
        dim, blocksize = self.embedding_dim, present(state.blocksize, "blocksize")
        if dim % 2 != 0:  # a byte may belong to two rows
            return F.embedding(input, state.dequantize(self.weight, self.dtype))
        check_memory("weight", plain(self.weight))
        rows = as_bytes(self.weight).view(-1, dim // 2)
        codes = F.embedding(input, rows)
        piece = math.gcd(dim, blocksize)
        start = input.long()[..., None] * dim + torch.arange(0, dim, piece, device=input.device)
        scales = scales_at(state, start // blocksize)
        shape = (*input.shape, dim)
        return fourbit.dequantize(codes, scales, state.codebook, piece, shape, self.dtype)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` in FP4."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` in NF4."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class Embedding8bit(_QuantizedEmbedding, EightBitLayer, nn.Embedding):
    """`nn.Embedding` with an `Int8Params`: rows are `dtype(fl(fl(code * absmax) * RN(1 / 127)))`.  Exact.

    >>> table = Embedding8bit(3, 4)
    >>> table.load_state_dict({"weight": torch.arange(3.0)[:, None].expand(3, 4)})
    <All keys matched successfully>
    >>> table.to("cpu")(torch.tensor([2, 1]))[:, 0]
    tensor([2., 1.])
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.weight = Int8Params(self.weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The rows of the table that `input`, integers `[...]`, names: `[..., embedding_dim]` in the layer's `dtype`."""
        if (node := node_of(self, Embedding8bit.forward, input)) is not None:
            return node  # type: ignore[no-any-return]
        absmax = absmax_of(self)
        if absmax is None:
            raise RuntimeError(f"the table of {self} is not quantized yet: move the layer to a device, .to(device)")
        check_memory("weight", plain(self.weight))
        rows = F.embedding(input, plain(self.weight))
        flat = int8.dequantize(rows.view(-1, self.embedding_dim), absmax[input.reshape(-1)], self.dtype)
        return flat.view(rows.shape)


# ---- float tables ---------------------------------------------------------------------------------------------------


class Embedding(nn.Embedding):
    """`nn.Embedding` with Xavier initialisation, whose optimizer state stays in 32 bits: see `optim_bits`."""

    optim_bits = 32
    """Bits of the optimizer state of this module's weight, whatever the optimizer's default is."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False, _weight: Tensor | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, device=device,
            dtype=dtype,
        )  # fmt: skip
        self._override()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._override()  # a copy is another module, for which nothing is registered yet

    def _override(self) -> None:
        manager = GlobalOptimManager.get_instance()
        manager.register_module_override(self, "weight", {"optim_bits": self.optim_bits})

    def reset_parameters(self) -> None:
        """Fills the table with Xavier-uniform numbers, and its row `padding_idx` with zeros."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """`Embedding` followed by a layer norm (8-bit Optimizers, 2110.02861, section 2.3), in the dtype of the table."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The rows that `input`, integers `[...]`, names, normalised: `[..., embedding_dim]` in the dtype of the table.

        The norm is computed in the dtype of its own weight.
        """
        rows = super().forward(input)
        return self.norm(rows.to(self.norm.weight.dtype)).to(self.weight.dtype)  # type: ignore[no-any-return]
