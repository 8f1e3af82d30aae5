"""Layers with a weight in four or in eight bits: which keys of a state dict it has, and what is remembered of it.

What both do when they are moved, saved and loaded is in `bnbref.nn.quantized_layer`.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bnbref.checkpoint_weights import Checkpoint
from bnbref.joined_scales import join
from bnbref.nn import graph_arguments
from bnbref.nn.params import Int8Params, Params4bit
from bnbref.nn.quantized_layer import QuantizedLayer
from bnbref.nn.quantized_parameter import in_bytes
from bnbref.packed_weight import layer_arguments
from bnbref.products import MatmulLtState
from bnbref.quant_state import QuantState


class FourBitLayer(QuantizedLayer):
    """A layer with a `Params4bit`."""

    _remembered: QuantState | None = None
    _stored: torch.dtype | None = None
    """The dtype that the codes had when they were remembered."""

    @property
    def quant_state(self) -> QuantState | None:
        """The scales of the weight, and all else that dequantizes it; None while the weight is not quantized."""
        return state_of(self)

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self._remembered = state

    @property
    def _saved(self) -> SimpleNamespace:
        state = self.quant_state
        return SimpleNamespace(weight=self.weight if state is None else Params4bit.of_codes(torch.empty(0), state))

    def _remember(self, weight: Tensor | None) -> None:
        self.__dict__["_known"] = None
        if isinstance(weight, Params4bit) and weight.quant_state is not None:
            self._remembered, self._stored = state, _ = weight.quant_state, weight.dtype
            join(state)
            if state.shape == self._shape() and None not in (state.blocksize, state.quant_type):
                self.__dict__["_known"] = weight.owner.known
                versions = [s.version() for s in (state, state.state2) if s is not None]
                graph_arguments.fill(weight.owner.known, layer_arguments(state), *versions)

    def _restore(self, weight: nn.Parameter) -> None:
        if hasattr(weight, "quant_state"):
            self.weight = Params4bit(weight.data, weight.requires_grad, **weight.__dict__)

    def _move_remembered(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._remembered is not None:
            self._remembered = self._remembered.map(lambda t: in_bytes(function, t))

    def _is_of_weight(self, name: str) -> bool:
        return name == "weight" or name.startswith("weight.")

    def _read(self, entries: Mapping[str, Tensor]) -> Params4bit | None:
        if entries.keys() == {"weight"} and entries["weight"].shape == self._shape():
            return None
        found = Checkpoint(entries).entries["weight"]
        if found.shape != self._shape():
            raise ValueError(f"weight must have the shape {list(self._shape())}, got {list(found.shape)}")
        stats = {name: value for name, value in entries.items() if name != "weight"}
        return Params4bit.from_prequantized(entries["weight"], stats) if stats else None

    def _entries_beside(self, keep_vars: bool) -> dict[str, Tensor]:
        state = self.quant_state
        return {} if state is None else {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def _scales_of(weight: Tensor) -> Tensor | None:
    """The absmax of each row of an int8 weight. None if it has none, or the empty ones of an `Int8Params` that awaits its own."""
    absmax: Tensor | None = getattr(weight, "SCB", None)
    return None if absmax is None or absmax.shape != weight.shape[:1] else absmax


def state_of(layer: "FourBitLayer") -> QuantState | None:
    """`layer.quant_state`. A function, because a graph that reads a property makes sure before each call that its class still has
    it, which on torch 2.11 copies the class's dictionary: half of what Dynamo checks of a layer."""
    weight = layer.weight
    state: QuantState | None = getattr(weight, "quant_state", None)
    if state is not None:
        return state
    # A float weight has no scales, even if the weight before it had some. A packed one without attributes is `[bytes, 1]`.
    lost = not isinstance(weight, Params4bit) and weight.shape[-1:] == (1,)
    if lost and layer._stored is not None and weight.dtype != layer._stored:
        raise TypeError(
            f"codes that are stored as {layer._stored} have become {weight.dtype}, a cast that loses them: under the mixed "
            f"precision of FSDP, quant_storage must be its param_dtype, or torch.uint8"
        )
    return layer._remembered if lost else None


class EightBitLayer(QuantizedLayer):
    """A layer with an `Int8Params`."""

    _remembered: Tensor | None = None

    @property
    def SCB(self) -> Tensor | None:
        """The absmax of each row, under its name in a state dict. torch.func assigns it together with a plain tensor of codes."""
        return absmax_of(self)

    @SCB.setter
    def SCB(self, value: Tensor | None) -> None:
        self._remembered = value

    @property
    def _saved(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.weight, weight_format=None)

    def _remember(self, weight: Tensor | None) -> None:
        self.__dict__["_known"] = None
        if isinstance(weight, Int8Params) and _scales_of(weight) is not None:
            self._remembered = weight.SCB
            if weight.dtype == torch.int8 and weight.shape == self._shape():
                self.__dict__["_known"] = weight.owner.known
                graph_arguments.fill(weight.owner.known, (weight.SCB,))

    def _restore(self, weight: nn.Parameter) -> None:
        if hasattr(weight, "SCB"):
            self.weight = Int8Params(weight.data, weight.requires_grad, **weight.__dict__)

    def _move_remembered(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._remembered is not None:
            self._remembered = in_bytes(function, self._remembered)

    def _is_of_weight(self, name: str) -> bool:
        return name in ("weight", "SCB", "weight_format")

    def _read(self, entries: Mapping[str, Tensor]) -> Int8Params | None:
        if "weight" not in entries:
            raise ValueError(f"weight is missing, but its {sorted(entries)} are there")
        entries = dict(entries)
        layout: Any = entries.pop("weight_format", 0)
        if isinstance(layout, Tensor):
            layout = layout.item() if layout.numel() == 1 else layout.tolist()
        if layout not in (0, "row"):
            raise ValueError(f"weight_format must be 0 or 'row', the only layout left, got {layout!r}")
        if entries.keys() == {"weight"} and entries["weight"].is_floating_point():
            return None
        found = Checkpoint(entries).entries["weight"]
        if found.shape != self._shape():
            raise ValueError(f"weight must have the shape {list(self._shape())}, got {list(found.shape)}")
        if isinstance(self.weight, Int8Params) and self.weight.has_fp16_weights:
            raise ValueError("weight is int8, but this layer keeps a float weight: make it with has_fp16_weights=False")
        return Int8Params(entries["weight"], requires_grad=False, SCB=entries["SCB"])

    def _entries_beside(self, keep_vars: bool) -> dict[str, Tensor]:
        absmax = absmax_of(self)
        if self.weight.dtype != torch.int8 or absmax is None:
            return {}
        layout = torch.zeros((), dtype=torch.uint8, device="cpu")
        return {"SCB": absmax if keep_vars else absmax.detach(), "weight_format": layout}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if _awaits_scales(self.weight):
            raise without_scales(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)


def absmax_of(layer: "EightBitLayer") -> Tensor | None:
    """The absmax of each row of an int8 weight: the weight's own or, if it lost them, those that are remembered. None while it
    awaits its own, or has what cannot be those, because those that are remembered may be of other codes.

    A function for the same reason as `state_of`."""
    weight = layer.weight
    own = _scales_of(weight)
    if own is not None or weight.dtype != torch.int8:
        return own
    return None if _awaits_scales(weight) else layer._remembered


def _awaits_scales(weight: Tensor) -> bool:
    """Whether int8 codes have scales that cannot be theirs: the empty ones that stand for those still to be set, or others."""
    codes = weight.dtype == torch.int8 and weight.numel() > 0
    return codes and getattr(weight, "SCB", None) is not None and _scales_of(weight) is None


def without_scales(layer: "EightBitLayer") -> RuntimeError:
    """What is raised when codes without scales are to be multiplied or saved."""
    return RuntimeError(f"the int8 weight of {layer} has no scales: assign them to weight.SCB")


class LayerState(MatmulLtState):
    """The `MatmulLtState` of a linear layer. CB and SCB are those of its weight. An SCB that is assigned here is used if the
    weight has none."""

    def __init__(self, parameters: dict[str, Any], threshold: float, has_fp16_weights: bool) -> None:
        self._parameters = parameters
        self.remembered: Tensor | None = None
        super().__init__(threshold=threshold, has_fp16_weights=has_fp16_weights)

    @property
    def CB(self) -> Tensor | None:
        """The codes of the weight."""
        weight = self._parameters["weight"]
        return weight.data if weight.dtype == torch.int8 else None

    @CB.setter
    def CB(self, value: Tensor | None) -> None:
        pass

    @property
    def SCB(self) -> Tensor | None:
        """The absmax of each row of the weight."""
        own: Tensor | None = getattr(self._parameters["weight"], "SCB", None)
        return self.remembered if own is None else own

    @SCB.setter
    def SCB(self, value: Tensor | None) -> None:
        self.remembered = value
