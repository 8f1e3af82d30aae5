"""Files of bitsandbytes: read them and write them, without a model and without transformers. Incomplete weights are refused.

What makes a weight in a file is in `bnbref.checkpoint_weights`. Files are mapped into memory, so listing and checking cost none,
and no size that a file claims is believed unchecked.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bnbref import int8
from bnbref.arguments import checked, dtype_name
from bnbref.blockwise import check_quantizable
from bnbref.checkpoint_weights import STORAGES, Checkpoint, Entry, check_named_tensors, described, scb_key
from bnbref.quant_state import quantize_with_state

__all__ = ["BLOCKSIZES", "Checkpoint", "Entry", "entries", "keys", "open_checkpoint", "read", "write"]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The blocksizes of 4-bit weights that bitsandbytes reads."""

# ---- read -----------------------------------------------------------------------------------------------------------


@checked
def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the checkpoint at a path and checks every weight, dequantizing none. A ValueError names the tensor, or the file.

    path: a .safetensors file, a .bin, .pt or .pth file (`weights_only`), an index of shards (.index.json), or a
    directory with model.safetensors or model.safetensors.index.json.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "model.safetensors.index.json")]
        found = next((file for file in files if file.exists()), None)
        if found is None:
            names = " nor ".join(file.name for file in files)
            raise FileNotFoundError(f"{path} has neither {names}: name the file of the weights itself")
        path = found
    return Checkpoint(_load_shards(path) if path.name.endswith(".index.json") else _load(path))


@checked
def entries(path: str | os.PathLike[str]) -> list[Entry]:
    """The entries of a checkpoint: name, format, shape and size of each weight.

    path: as `open_checkpoint` takes it. ValueError names what is missing or does not fit.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/model.safetensors", {"q.weight": torch.ones(64, 64)}, "int8", where=lambda name: True)
    ...     entries(folder)
    [Entry(name='q.weight', format='int8', shape=(64, 64), dtype=torch.float32, code_bytes=4096, scale_bytes=257)]
    """
    return list(open_checkpoint(path).entries.values())


@checked
def read(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All weights of a checkpoint as plain tensors: `Checkpoint.read` of each.  Exact.

    path: as `open_checkpoint` takes it. dtype: of the result; None for the dtype that each weight had. device: where it is put.

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
        raise ImportError(".safetensors files need the package safetensors: pip install safetensors") from error
    return safetensors


@checked
def keys(path: str | os.PathLike[str]) -> list[str]:
    """The names in one file of a checkpoint; nothing is checked but that the file at this path can be read.

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
            raise ValueError(f"{key} in {path.name} must lie in the file, got {described(tensor)} on {tensor.device}")
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


@checked
def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], quantize: str = "nf4", *, where: Callable[[str], bool],
    blocksize: int = 64, double_quant: bool = False, quant_storage: torch.dtype = torch.uint8,
) -> None:  # fmt: skip
    """Quantize the tensors whose names `where` selects and write all to a safetensors file, as transformers does.

    path: the file, which is replaced, if there is one, when the new one is complete. tensors: by name. quantize: "nf4", "fp4"
    or "int8". What follows is for 4 bits. blocksize: how many weights share a scale. double_quant: whether the scales are kept
    in 8 bits. quant_storage: the dtype that the packed bytes are called, uint8, int8 or a float of 16 bits or more. transformers
    also needs a `quantization_config` in config.json that says the same.

    Raises ValueError that names the tensor or the setting that cannot be written so, TypeError for what is of another kind. The
    file that was there is then left as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/a.safetensors", {"q.weight": torch.eye(64)}, double_quant=True, where=lambda name: True)
    ...     read(f"{folder}/a.safetensors")["q.weight"].equal(torch.eye(64))
    True

    Exact. bitsandbytes writes the same bytes but, on a CPU, for codes of nested scales, which it finds by a table of 65536 bins.
    """
    if quantize not in ("nf4", "fp4", "int8"):
        raise ValueError(f"quantize must be 'nf4', 'fp4' or 'int8', got {quantize!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(
            f"blocksize must be a power of two from 32 to 4096 (bitsandbytes reads no other), got {blocksize}"
        )
    if quant_storage not in STORAGES:
        names = ", ".join(map(dtype_name, STORAGES))
        raise ValueError(f"quant_storage must be one of {names}, which a file may have, got {quant_storage}")
    check_named_tensors(tensors)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} must have numbers to be written, got {described(tensor)} on meta")
    selected = {name: tensor.detach() for name, tensor in tensors.items() if where(name)}
    if not selected:
        raise ValueError(f"where must select some of the {len(tensors)} tensors, got none")
    out: dict[str, Tensor] = {name: tensor.detach() for name, tensor in tensors.items() if name not in selected}
    for name in _progress("quantizing", selected):
        try:
            weight = selected[name]
            check_quantizable("a weight", weight, quantize)
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
        raise ValueError(f"int8 is for matrices called 'weight', got {described(weight)}")
    codes, absmax, _ = int8.quantize(weight)
    layout = torch.zeros((), dtype=torch.uint8, device="cpu")
    return {name: codes, scb_key(name): absmax, scb_key(name, "weight_format"): layout}
