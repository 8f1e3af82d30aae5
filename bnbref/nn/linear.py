"""Linear layers with a weight in four or eight bits.

    Linear4bit      y = x @ W~^T + b,    W~ dequantized for each product                     QLoRA (2305.14314)
    Linear8bitLt    y = x @ W~^T + b,    int8 product, outlier columns of x in its own dtype   LLM.int8() (2208.07339)

Both take activations of any rank and return their dtype. A forward changes nothing of the layer: the bias is cast for the
product, never in place. A float weight is quantized by `.to(device)`.
"""

import functools
import logging
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnbref.arguments import check_number, check_one_of, check_tensors, dtype_name
from bnbref.blockwise import FLOATS
from bnbref.codebooks import Codebook
from bnbref.context import plain
from bnbref.kernels import tracing
from bnbref.nn.four_and_eight_bits import EightBitLayer, FourBitLayer, LayerState, absmax_of, state_of, without_scales
from bnbref.nn.graph_arguments import arguments_of
from bnbref.nn.params import Int8Params, Params4bit
from bnbref.nn.quantized_layer import node_of
from bnbref.products import (
    MatmulLtState,
    fits,
    graph_product_4bit,
    graph_product_8bit,
    in_graph,
    matmul,
    matmul_4bit,
    prepared_product,
)
from bnbref.state_fields import DTYPES


@functools.cache
def _say_slow(dtype: torch.dtype) -> None:
    """Warns that a product in float32 is slow, once for each dtype of activations."""
    logging.getLogger(__name__).warning(
        "Input type into Linear4bit is %s, but compute_dtype=torch.float32: this will lead to slow inference or training. "
        "bnb_4bit_compute_dtype=%s computes in the input's dtype.",
        dtype,
        dtype,
    )


class Linear4bit(FourBitLayer, nn.Linear):
    """`nn.Linear` with a `Params4bit`. Bounded: see `bnbref.matmul_4bit`.

    compute_dtype: the dtype of the product, float32, float16 or bfloat16; None for that of the activations.
    compress_statistics: whether the scales are quantized too. quant_type: the name of a codebook, or a Codebook of at most 16
    values. To be saved, it must be in `bnbref.codebooks.FOUR_BIT`. quant_storage: the dtype of the tensor that holds the packed
    bytes, uint8, int8, float64 or one of these floats.

    >>> import bnbref
    >>> layer = Linear4bit(64, 2, bias=False, quant_type="nf4")
    >>> layer.load_state_dict({"weight": torch.ones(2, 64)})
    <All keys matched successfully>
    >>> with bnbref.eager():
    ...     layer = layer.to("cpu")  # quantizes
    ...     layer(torch.ones(3, 64, dtype=torch.bfloat16))[0]
    tensor([64., 64.], dtype=torch.bfloat16)
    """

    _compute = ""
    """The name of compute_dtype: a dtype is not what Dynamo passes over, see `graph_arguments`."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str | Codebook = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )
        self.compute_dtype = compute_dtype
        self.quant_storage = quant_storage

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compute_dtype":
            check_one_of("compute_dtype", value, torch.dtype, NoneType)
            if value not in (None, *FLOATS):
                raise ValueError(f"compute_dtype must be float32, float16, bfloat16 or None, got {value}")
            self.__dict__["_compute"] = dtype_name(value)
        super().__setattr__(name, value)

    @property
    def compute_type_is_set(self) -> bool:
        """Whether the layer has a compute_dtype. Assigning it does nothing: who copies it from layer to layer copies both."""
        return self.compute_dtype is not None

    @compute_type_is_set.setter
    def compute_type_is_set(self, value: bool) -> None:
        pass

    def extra_repr(self) -> str:
        """The text of `nn.Linear`, and the format of the weight."""
        weight = self.weight
        own = (
            f", quant_type={weight.quant_type}, blocksize={weight.blocksize}" if isinstance(weight, Params4bit) else ""
        )
        return f"{super().extra_repr()}{own}, compute_dtype={self.compute_dtype}"

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> `[..., out_features]` in the dtype of x.

        Raises RuntimeError if the weight is not quantized yet, TypeError if x is not floating, ValueError if it has another
        last size than in_features.
        """
        weight, bias = self.weight, self.bias
        if in_graph() and isinstance(weight, Params4bit):
            known = arguments_of(self._known)
            if known is not None and fits(x, known[0], bias, *known[2]):
                dtype = x.dtype if self._compute == "None" else DTYPES.get(self._compute)
                if dtype is not None:
                    return graph_product_4bit(x, weight, known, bias, dtype)
        state = state_of(self)
        if isinstance(x, Tensor) and x.is_floating_point():
            dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
            if dtype == torch.float32 != x.dtype and not tracing():
                _say_slow(x.dtype)
            a = x.to(dtype)
            product = prepared_product(a, weight, state, bias)
            if product is not None:
                y = product(a, bias)
                return y if y.dtype == x.dtype else y.to(x.dtype)
        if (node := node_of(self, Linear4bit.forward, x)) is not None:
            return node  # type: ignore[no-any-return]
        check_tensors(x=x)
        if state is None and not isinstance(weight, Params4bit) and weight.is_floating_point():
            # The weight is tied to a float one: transformers makes a model's embedding the weight of its output head.
            return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
        if state is None:
            raise RuntimeError(f"the weight of {self} is not quantized yet: move the layer to a device, .to(device)")
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating, got {x.dtype}: code that casts it to the dtype of the weight, whose codes are "
                f"{weight.dtype}, cannot have this layer quantized; name it in skip_modules"
            )
        # As wide as the result, x would be multiplied by the transposed weight.
        if state.shape is not None and x.shape[-1:] != state.shape[-1:] and state.shape == self._shape():
            raise ValueError(f"x must be [..., {self.in_features}] for {self}, got {tuple(x.shape)}")
        return matmul_4bit(a, weight, state, bias=bias).to(x.dtype)


class LinearFP4(Linear4bit):
    """`Linear4bit` in FP4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """`Linear4bit` in NF4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class Linear8bitLt(EightBitLayer, nn.Linear):
    """`nn.Linear` with an `Int8Params`. Exact without outliers, else bounded: see `bnbref.matmul`.

    has_fp16_weights: whether the weight stays float, can be trained, and is quantized anew in each product. If not, `.to(device)`
    quantizes it; before that, the layer multiplies by the codes that the move would give.
    threshold: a column of x that holds a magnitude of at least this is an outlier, and multiplied in floats; 0 for no outliers.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_number("threshold", threshold)
        if threshold < 0:
            raise ValueError(f"threshold must be 0 (off) or positive, got {threshold}")
        super().__init__(input_features, output_features, bias, device)
        self.state = LayerState(self._parameters, float(threshold), has_fp16_weights)  # as a graph takes it
        self.weight = Int8Params(self.weight, has_fp16_weights, has_fp16_weights)
        self.index = index

    def _restore(self, weight: nn.Parameter) -> None:
        # bitsandbytes moves the scales from the weight to the state when the layer is first used.
        old: Any = self.__dict__["state"]
        self.state = LayerState(self._parameters, old.threshold, old.has_fp16_weights)
        self.state.remembered = old.SCB
        super()._restore(weight)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "state":
            self.__dict__["_settings"] = vars(value)

    def _remember(self, weight: Tensor | None) -> None:
        super()._remember(weight)
        if "state" in self.__dict__:
            self.__dict__["_settings"] = vars(self.state)

    @property
    def _remembered(self) -> Tensor | None:
        return self.state.remembered

    @_remembered.setter
    def _remembered(self, absmax: Tensor | None) -> None:
        self.state.remembered = absmax

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> `[..., out_features]` in the dtype of x.

        Raises RuntimeError if the int8 weight has no scales, ValueError if x has another last size than in_features.
        """
        weight, bias = self.weight, self.bias
        if in_graph() and isinstance(weight, Int8Params):
            known, settings = arguments_of(self._known), self._settings
            n, k = self.out_features, self.in_features
            if known is not None and settings is not None and fits(x, known[0], bias, n, k):
                return graph_product_8bit(x, weight, known[0], settings["threshold"], bias)
        if not isinstance(x, Tensor) or x.shape[-1:] != self.weight.shape[-1:]:
            if (node := node_of(self, Linear8bitLt.forward, x)) is not None:
                return node  # type: ignore[no-any-return]
            check_tensors(x=x)
            raise ValueError(f"x must be [..., {self.weight.shape[-1]}] for {self}, got {tuple(x.shape)}")
        weight, threshold = plain(self.weight), self.state.threshold
        if weight.dtype != torch.int8:
            return matmul(x, self.weight, threshold=threshold, bias=self.bias)
        absmax = absmax_of(self)
        if absmax is None:
            raise without_scales(self)
        state = MatmulLtState(weight, absmax, threshold=threshold, has_fp16_weights=False)
        return matmul(x, weight, state=state, bias=self.bias)
