"""bitsandbytes' bytes on disk: read them, write them, refuse what is half there. No model, no transformers.

A quantized weight is several tensors of a file:

    4 bits   W                                  the packed codes [bytes / itemsize, 1], uint8 or a float quant_storage
             W.absmax                           scales [blocks]: float32, or their uint8 codes (double quantization)
             W.quant_map                        float32 [16], the values of the codes
             W.nested_absmax                    double quantization: float32 [ceil(blocks / 256)]
             W.nested_quant_map                 double quantization: float32 [256]
             W.quant_state.bitsandbytes__nf4    JSON as uint8: quant_type, blocksize, dtype, shape
                                                (nested_blocksize, nested_dtype, nested_offset)
    int8     P.weight                           int8 codes [n, k]
             P.SCB                              float32 [n], absmax of each row
             P.weight_format                    uint8 [] = 0, the only layout left

Everything else is plain. Source: state dicts of bitsandbytes 0.50.2, files of transformers 5.23.

Files are mapped into memory, so listing and checking cost none, and no size that a file claims is believed unchecked.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bnbref import int8
from bnbref.blockwise import FLOATS, check_float
from bnbref.quant_state import BLOB, TENSORS, QuantState, dtype_name, present, quantize_with_state

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Those of 4-bit weights that bitsandbytes reads."""

_OF_4BIT = re.compile(rf"(?s)(.+)\.({'|'.join(TENSORS)}|{re.escape(BLOB)}[^.]+)")
_OF_INT8 = re.compile(r"(?s)(|.*\.)(SCB|weight_format)")


@dataclass(frozen=True)
class Entry:
    """One weight of a checkpoint: what `read` returns, and the bytes in the file.

    format: "plain", "int8" or the 4-bit quant_type. code_bytes: of the weight itself. scale_bytes: of all beside it.

    >>> Entry("q_proj.weight", "nf4", (128, 128), torch.bfloat16, code_bytes=8192, scale_bytes=1168).bits
    4.5703125
    """

    name: str
    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    code_bytes: int
    scale_bytes: int

    @property
    def bits(self) -> float:
        """Bits per parameter, scales and tables included."""
        return 8 * (self.code_bytes + self.scale_bytes) / max(math.prod(self.shape), 1)


class Checkpoint:
    """The weights of a state dict, quantized or not: `entries` by name, `read` one. It is whole, or ValueError.

    >>> Checkpoint({"q.weight": torch.zeros(64, 64, dtype=torch.int8)})
    Traceback (most recent call last):
    ValueError: q.weight: int8 [64, 64] is a quantized weight, but its scales are missing
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.entries: dict[str, Entry] = {}
        self._tensors = tensors
        self._states: dict[str, QuantState] = {}
        beside: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, companion = _split(key)
            beside.setdefault(name, {}).update({companion: tensor} if companion else {})
        quantized = {name for name, group in beside.items() if group}
        for name, group in sorted(beside.items()):
            if name not in tensors:
                raise ValueError(f"{name} is missing, but its {sorted(group)} are there")
            weight = tensors[name]
            form, shape, dtype = "plain", weight.shape, weight.dtype
            if not group:
                _check_plain(name, weight, quantized)
            elif group.keys() & {"SCB", "weight_format"}:
                _check_int8(name, weight, group)
                form, dtype = "int8", torch.float32
            else:
                state = self._states[name] = _check_4bit(name, weight, group)
                form, dtype = present(state.quant_type, "quant_type"), present(state.dtype, "dtype")
                shape = present(state.shape, "shape")
            scale_bytes = sum(tensor.nbytes for tensor in group.values())
            self.entries[name] = Entry(name, form, tuple(shape), dtype, weight.nbytes, scale_bytes)

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A weight as a plain tensor, dequantized on the device.  Exact.

        4 bits: `dtype(fl(values[code] * absmax))`; int8: `dtype(fl(fl(code * SCB) * RN(1 / 127)))`.
        dtype: of floating tensors; None: the one that was quantized, float32 for int8, which does not record it.
        """
        if name not in self.entries:
            raise ValueError(f"name must be one of the {len(self.entries)} weights of the checkpoint, got {name!r}")
        if dtype not in (None, *FLOATS):
            raise ValueError(f"dtype must be float32, float16, bfloat16 or None, got {dtype}")
        entry, tensor = self.entries[name], self._tensors[name].to(device)
        if entry.format == "plain":
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if entry.format == "int8":
            return int8.dequantize(tensor, self._tensors[_scb(name)].to(device), dtype or entry.dtype)
        return self._states[name].map(lambda t: t.to(device)).dequantize(tensor, dtype or entry.dtype)


# ---- what a whole weight is -----------------------------------------------------------------------------------------


def _split(key: str) -> tuple[str, str]:
    """The weight that a key belongs to, and the key's name beside it, empty for the weight itself."""
    if match := _OF_4BIT.fullmatch(key):
        return match[1], match[2]
    if match := _OF_INT8.fullmatch(key):
        return match[1] + "weight", match[2]
    return key, ""


def _scb(name: str, key: str = "SCB") -> str:
    return name.removesuffix("weight") + key


def _describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _check_plain(name: str, weight: Tensor, quantized: set[str]) -> None:
    for dot in re.finditer(r"\.", name):
        if name[: dot.start()] in quantized:
            raise ValueError(f"{name}: unknown key under the quantized weight {name[: dot.start()]}")
    if name.rpartition(".")[2] == "weight" and weight.dtype in (torch.uint8, torch.int8):
        raise ValueError(f"{name}: {_describe(weight)} is a quantized weight, but its scales are missing")


def _check_4bit(name: str, packed: Tensor, group: Mapping[str, Tensor]) -> QuantState:
    blobs = {key for key in group if key.startswith(BLOB)}
    needed = set(TENSORS if group.keys() & set(TENSORS[:2]) else TENSORS[2:])
    if len(blobs) != 1 or group.keys() - blobs != needed:
        needs = ", ".join([*sorted(needed), f"{BLOB}<quant_type>"])
        raise ValueError(f"{name}: a 4-bit weight needs {needs} beside it, got {', '.join(sorted(group))}")
    try:
        state = QuantState.from_dict(group, device="cpu")
        n_bytes = state.code_bytes
    # The others: sizes and offsets that no int64 or float holds, JSON that is nested too deeply.
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
    if packed.nbytes != n_bytes or packed.shape[1:] != (1,) or packed.dtype not in (torch.uint8, *FLOATS):
        raise ValueError(
            f"{name} must be {n_bytes} bytes [bytes / itemsize, 1] of uint8 or floats for the shape "
            f"{list(state.shape or ())}, got {packed.nbytes} bytes, {_describe(packed)}"
        )
    return state


def _check_int8(name: str, codes: Tensor, group: Mapping[str, Tensor]) -> None:
    if "SCB" not in group or group.keys() - {"SCB", "weight_format"}:
        raise ValueError(
            f"{name}: an int8 weight needs SCB and weight_format beside it, got {', '.join(sorted(group))}"
        )
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"{name} must be int8 [n, k], as there is {_scb(name)}, got {_describe(codes)}")
    scales, layout = group["SCB"], group.get("weight_format")  # layers older than weight_format have rows too
    if scales.dtype != torch.float32 or scales.shape != codes.shape[:1]:
        raise ValueError(f"{_scb(name)} must be float32 [{codes.shape[0]}], got {_describe(scales)}")
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise ValueError(f"{_scb(name)} has scales that are NaN, infinite or negative")
    if layout is not None and (layout.dtype != torch.uint8 or layout.numel() != 1 or layout.item() != 0):
        got = f"{_describe(layout)} {layout.flatten()[:1].tolist()}"
        raise ValueError(f"{_scb(name, 'weight_format')} must be uint8 0 (rows, the only layout left), got {got}")


# ---- read -----------------------------------------------------------------------------------------------------------


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path: every weight checked, none dequantized. ValueError names the tensor, or the file.

    path: a .safetensors file, a .bin, .pt or .pth file (`weights_only`), an index of shards (.index.json), or a
    directory with model.safetensors or model.safetensors.index.json.
    """
    path = Path(path)
    if path.is_dir():
        single = path / "model.safetensors"
        path = single if single.exists() else path / "model.safetensors.index.json"
    return Checkpoint(_load_shards(path) if path.name.endswith(".index.json") else _load(path))


def entries(path: str | os.PathLike[str]) -> list[Entry]:
    """What is in a checkpoint, by name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/model.safetensors", {"q.weight": torch.ones(64, 64)}, "int8", where=lambda name: True)
    ...     entries(folder)
    [Entry(name='q.weight', format='int8', shape=(64, 64), dtype=torch.float32, code_bytes=4096, scale_bytes=257)]
    """
    return list(open_checkpoint(path).entries.values())


def read(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All weights of a checkpoint as plain tensors: `Checkpoint.read` of each.  Exact.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/a.safetensors", {"q.weight": torch.eye(2)}, "nf4", where=lambda name: True)
    ...     read(f"{folder}/a.safetensors", torch.float16)
    {'q.weight': tensor([[1., 0.],
            [0., 1.]], dtype=torch.float16)}
    """
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name, dtype, device) for name in _progress("reading", checkpoint.entries)}


def _progress(what: str, names: Iterable[str]) -> Iterable[str]:
    names = list(names)
    return tqdm(names, desc=what, leave=False, disable=None if len(names) >= 64 else True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(".safetensors files need the package safetensors: pip install 'bnbref[hf]'") from error
    return safetensors


def keys(path: str | os.PathLike[str]) -> list[str]:
    """The names in one file of a checkpoint; nothing is checked but that the file can be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/a.safetensors", {"q.weight": torch.eye(2)}, "int8", where=lambda name: True)
    ...     keys(f"{folder}/a.safetensors")
    ['q.SCB', 'q.weight', 'q.weight_format']
    """
    return sorted(_load(Path(path)))


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix in (".bin", ".pt", ".pth"):
        return _load_torch(path)
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file: {error}{_cut_off(path)}") from error


def _cut_off(path: Path) -> str:
    """The first tensor that ends beyond the end of the file, in words."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= size else {}
        ends = [(8 + length + t["data_offsets"][1], name) for name, t in header.items() if name != "__metadata__"]
        end, name = min(pair for pair in ends if pair[0] > size)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error):
        return ""
    return f"; {name} ends at byte {end} of {size}"


def _load_torch(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged bytes make the zip reader and the unpickler raise anything
        what = f"is not a whole file of torch.save with nothing but tensors: {type(error).__name__}"
        raise ValueError(f"{path.name} {what}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path.name} must hold a dict of tensors, got {type(tensors).__name__}")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{key!r} in {path.name} must be a dense tensor with a name, got {type(tensor).__name__}")
        if tensor.device.type != "cpu" or tensor.nbytes > size:  # strides of 0 claim any size
            raise ValueError(f"{key} in {path.name} must lie in the file, got {_describe(tensor)} on {tensor.device}")
    return tensors


def _load_shards(index: Path) -> dict[str, Tensor]:
    try:
        where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if any(name != Path(name).name for name in where.values()):
            raise ValueError("weight_map names files elsewhere")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index of shards: {error!r}") from error
    shards = {name: _load(index.parent / name) for name in sorted(set(where.values()))}
    found = [(key, name) for name, shard in shards.items() for key in shard]
    wrong = sorted(set(found) ^ set(where.items()))
    if wrong:
        there = "there" if wrong[0] in found else "not there"
        raise ValueError(f"{wrong[0][0]} in {wrong[0][1]}: the index and the file disagree, it is {there}")
    return {key: shards[name][key] for key, name in found}


# ---- write ----------------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], quantize: str = "nf4", *, where: Callable[[str], bool],
    blocksize: int = 64, double_quant: bool = False, quant_storage: torch.dtype = torch.uint8,
) -> None:  # fmt: skip
    """Quantize the tensors whose names `where` selects and write all to a safetensors file, as transformers does.

    quantize: "nf4", "fp4" or "int8"; what follows `where` is for 4 bits. A file that exists is replaced when the new
    one is complete. transformers also needs a `quantization_config` in config.json that says the same.

    Exact, in the reference dialect. bitsandbytes on CPU differs in the codes of nested scales: a table of 65536 bins.
    """
    if quantize not in ("nf4", "fp4", "int8"):
        raise ValueError(f"quantize must be 'nf4', 'fp4' or 'int8', got {quantize!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(
            f"blocksize must be a power of two from 32 to 4096 (bitsandbytes reads no other), got {blocksize}"
        )
    selected = {name: tensor.detach() for name, tensor in tensors.items() if where(name)}
    if not selected:
        raise ValueError(f"where must select some of the {len(tensors)} tensors, got none")
    out: dict[str, Tensor] = {name: tensor.detach() for name, tensor in tensors.items() if name not in selected}
    for name in _progress("quantizing", selected):
        try:
            weight = check_float("a weight to quantize", selected[name])
            if not bool(weight.isfinite().all()):
                raise ValueError("a weight to quantize must be finite, got NaN or infinite elements")
            if quantize == "int8":
                parts = _to_int8(name, weight)
            else:
                packed, state = quantize_with_state(weight, quantize, blocksize, double_quant, quant_storage)
                beside = state.as_dict(packed=True)
                parts = {name: packed} | {f"{name}.{key}": part for key, part in beside.items()}
            clash = sorted(tensors.keys() & parts.keys() - {name})
            if clash:
                raise ValueError(f"{clash[0]} is among the tensors already")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        out |= {key: part.clone() for key, part in parts.items()}  # tables are shared, which safetensors refuses
    Checkpoint(out)
    unfinished = Path(f"{os.fspath(path)}.unfinished")
    try:
        whole = {key: tensor.cpu().contiguous() for key, tensor in out.items()}
        _safetensors().torch.save_file(whole, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _to_int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.dim() != 2 or name.rpartition(".")[2] != "weight":
        raise ValueError(f"int8 is for matrices called 'weight', got {_describe(weight)}")
    codes, absmax, _ = int8.quantize(weight)
    layout = torch.zeros((), dtype=torch.uint8, device="cpu")
    return {name: codes, _scb(name): absmax, _scb(name, "weight_format"): layout}
