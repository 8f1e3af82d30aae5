"""Quantized layers to test with, what is to survive in them, and everything that they are to survive."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import bnbref
from bnbref.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from bnbref.quant_state import QuantState

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# ---- what survives --------------------------------------------------------------------------------------------------


def raw(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """A tensor as dtype, shape and bytes: codes in a float storage are NaN now and then, which equals nothing."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).tolist())


def raw_state(state: QuantState | None) -> Any:
    if state is None:
        return None
    fields = (state.shape, state.dtype, state.blocksize, state.quant_type, state.nested)
    return fields, [raw(t) for t in state.tensors()]


def raw_weight(layer: nn.Module) -> Any:
    """Class, codes, scales and settings of a layer's weight."""
    weight: Any = layer.weight
    settings = {k: v for k, v in weight.__dict__.items() if k not in ("quant_state", "SCB", "module") and k[0] != "_"}
    scb = getattr(weight, "SCB", None)
    return (
        type(weight),
        raw(weight.data),
        raw_state(getattr(weight, "quant_state", None)),
        scb if scb is None else raw(scb),
        settings,
    )


# ---- layers ---------------------------------------------------------------------------------------------------------


def fill(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Normal weights, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def linear4(n: int = 32, k: int = 64, *, dtype: torch.dtype = F32, seed: int = 0, **options: Any) -> Linear4bit:
    with bnbref.eager():
        return fill(Linear4bit(k, n, **options), seed).to(dtype).to("cpu")  # type: ignore[return-value]


def linear8(n: int = 32, k: int = 64, *, dtype: torch.dtype = F32, seed: int = 0, **options: Any) -> Linear8bitLt:
    options = {"has_fp16_weights": False, **options}
    with bnbref.eager():
        return fill(Linear8bitLt(k, n, **options), seed).to(dtype).to("cpu")  # type: ignore[return-value]


@st.composite
def linear4_layers(draw: st.DrawFn) -> Linear4bit:
    n, k = draw(st.sampled_from([1, 3, 32])), draw(st.sampled_from([1, 7, 64, 96, 130]))
    storages = [t for t in (torch.uint8, BF16, F16, F32) if -(-n * k // 2) % t.itemsize == 0]
    return linear4(
        n,
        k,
        dtype=draw(st.sampled_from([F32, BF16, F16])),
        seed=draw(st.integers(0, 99)),
        bias=draw(st.booleans()),
        quant_type=draw(st.sampled_from(["nf4", "fp4"])),
        compress_statistics=draw(st.booleans()),
        quant_storage=draw(st.sampled_from(storages)),
    )


@st.composite
def linear8_layers(draw: st.DrawFn) -> Linear8bitLt:
    return linear8(
        draw(st.sampled_from([1, 3, 32])),
        draw(st.sampled_from([1, 7, 64, 130])),
        dtype=draw(st.sampled_from([F32, BF16, F16])),
        seed=draw(st.integers(0, 99)),
        bias=draw(st.booleans()),
        threshold=draw(st.sampled_from([0.0, 2.0])),
    )


@st.composite
def embeddings(draw: st.DrawFn) -> Embedding4bit | Embedding8bit:
    size = draw(st.sampled_from([1, 5, 300])), draw(st.sampled_from([2, 32, 33, 64, 96, 100, 128]))
    table: Any
    if draw(st.booleans()):
        table = Embedding8bit(*size)
    else:
        table = Embedding4bit(
            *size, quant_type=draw(st.sampled_from(["nf4", "fp4"])), compress_statistics=draw(st.booleans())
        )
        table.weight.blocksize = draw(st.sampled_from([32, 64, 128]))
    with bnbref.eager():
        return fill(table, draw(st.integers(0, 99))).to(draw(st.sampled_from([F32, BF16, F16]))).to("cpu")  # type: ignore[return-value]


def layers() -> st.SearchStrategy[Any]:
    return linear4_layers() | linear8_layers() | embeddings()


def argument(layer: nn.Module) -> Tensor:
    """What a layer can be called with."""
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)
    return torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))


def unquantized(layer: nn.Module, device: str = "cpu") -> nn.Module:
    """A layer as `layer` was constructed, with other weights."""
    fresh: Any
    if isinstance(layer, nn.Embedding):
        fresh = type(layer)(layer.num_embeddings, layer.embedding_dim, device=device)  # type: ignore[call-arg]
    else:
        fresh = type(layer)(layer.in_features, layer.out_features, layer.bias is not None, device=device)  # type: ignore
    if isinstance(layer, Linear8bitLt):
        state = layer.state
        fresh = Linear8bitLt(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            state.has_fp16_weights,
            state.threshold,
            device=device,
        )
    if layer.weight.is_floating_point() or not hasattr(layer, "dtype"):  # a layer's other floats keep their dtype
        dtype = next((p.dtype for n, p in layer.named_parameters() if n != "weight"), F32)
    else:
        dtype = layer.dtype  # type: ignore[assignment]
    return fresh.to(dtype)  # type: ignore[no-any-return]


# ---- what they survive ----------------------------------------------------------------------------------------------


def _through_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def state_dict_through_file(layer: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def _loaded(into: Callable[[nn.Module], nn.Module], assign: bool = False) -> Callable[[nn.Module], nn.Module]:
    def load(layer: nn.Module) -> nn.Module:
        fresh = into(layer)
        fresh.load_state_dict(state_dict_through_file(layer), assign=assign)
        return fresh

    return load


SURVIVORS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": _through_file,
    "share_memory": lambda layer: copy.deepcopy(layer).share_memory(),
    "to": lambda layer: copy.deepcopy(layer).to("cpu"),
    "cpu": lambda layer: copy.deepcopy(layer).cpu(),
    "eval": lambda layer: copy.deepcopy(layer).eval(),
    "load into float": _loaded(unquantized),
    "load into quantized": _loaded(lambda layer: unquantized(layer).to("cpu")),
    "load into meta": _loaded(lambda layer: unquantized(layer, "meta"), assign=True),
    "assign into float": _loaded(unquantized, assign=True),
}
