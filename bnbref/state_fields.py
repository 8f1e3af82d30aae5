"""The fields of a quant state in a state dict, packed or not: everything in them is checked, for bytes come from strangers."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref import nested
from bnbref.arguments import check_tensors, dtype_name, is_shape
from bnbref.blockwise import FLOATS, block_count
from bnbref.codebooks import DYNAMIC, FOUR_BIT, four_bit, is_table_of, value_table

BLOB = "quant_state.bitsandbytes__"
"""Key of the JSON blob, followed by the quant_type."""

ENTER = " (a codebook of your own has to be entered in bnbref.codebooks.FOUR_BIT first)"
"""Ends the message about a quant_type that is unknown: its codebook may exist, but not be registered in this process."""

TENSORS = ("nested_absmax", "nested_quant_map", "absmax", "quant_map")
"""Keys of what a state dict has as tensors; the first two if the scales are quantized."""

DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}
"""The dtypes that a quantized tensor may have had, by name."""

_LARGEST = torch.finfo(torch.float32).max
_ANY_SIZE = 2**63 - 1
_NESTED_KEYS = ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")
_PLAIN_KEYS = ("absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape")


def checked_fields(qs_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The arguments of a `QuantState` and, if its scales are quantized, those of its state2: see `QuantState.from_dict`."""
    fields = _unpack(qs_dict)
    nested_keys = [key for key in _NESTED_KEYS if key in fields]
    expected = set(_PLAIN_KEYS) | (set(_NESTED_KEYS) if nested_keys else set())
    _require(set(fields) == expected, "keys of a quant state", sorted(expected), sorted(fields))

    quant_type, blocksize, shape = fields["quant_type"], fields["blocksize"], fields["shape"]
    known_type = quant_type is None or (isinstance(quant_type, str) and quant_type in FOUR_BIT)
    _require(known_type, "quant_type", f"{sorted(FOUR_BIT)} or None, for 8 bits{ENTER}", quant_type)
    if shape is not None:
        ok = isinstance(shape, (list, tuple, torch.Size)) and all(type(n) is int and n >= 0 for n in shape)
        _require(ok and is_shape(shape), "shape", "a list of sizes", shape)
        shape = torch.Size(shape)
    known_dtype = isinstance(fields["dtype"], str) and fields["dtype"] in DTYPES
    _require(known_dtype, "dtype", sorted(DTYPES), fields["dtype"])

    code = _tensor(fields, "quant_map", torch.float32, 256 if quant_type is None else 16)
    if quant_type is not None:
        known = value_table(four_bit(quant_type), torch.device("cpu"))
        # By value, not by bits: writers differ in the sign of FP4's second zero.
        if code.device.type != "meta" and not bool((code.cpu() == known).all()):
            raise ValueError(f"quant_map is not the codebook {quant_type!r}: {code.tolist()}")

    # A state of 8 bits does not say how many elements its tensor has.
    of_any = _ANY_SIZE if quant_type is None else 0
    _check_blocksize("blocksize", blocksize, of_any if shape is None else math.prod(shape))
    blocks = None if shape is None else block_count(math.prod(shape), blocksize)
    absmax = _tensor(fields, "absmax", torch.uint8 if nested_keys else torch.float32, blocks)
    own = {"absmax": absmax, "shape": shape, "code": code, "blocksize": blocksize, "quant_type": quant_type}
    own["dtype"] = DTYPES[fields["dtype"]]
    if not nested_keys:
        _check_scales("absmax", absmax)
        return own, None
    own["offset"], second = _nested_fields(fields, quant_type, absmax.numel(), of_any)
    return own, second


def _nested_fields(
    fields: Mapping[str, Any], quant_type: str | None, blocks: int, of_any: int
) -> tuple[Tensor, dict[str, Any]]:
    """The offset and the arguments of the state2 of so many scales."""
    inner_size = fields["nested_blocksize"]
    _check_blocksize("nested_blocksize", inner_size, max(of_any, blocks))
    _require(quant_type is None or inner_size == nested.BLOCKSIZE, "nested_blocksize", nested.BLOCKSIZE, inner_size)
    _require(fields["nested_dtype"] == "float32", "nested_dtype", "float32", fields["nested_dtype"])
    value = fields["nested_offset"]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(is_number and abs(value) <= _LARGEST, "nested_offset", "a finite float32 number", value)
    _require(value >= 0, "nested_offset", "the mean of magnitudes, at least 0", value)
    offset = torch.tensor(float(value), dtype=torch.float32, device="cpu")
    inner = _tensor(fields, "nested_absmax", torch.float32, block_count(blocks, inner_size))
    _check_scales("nested_absmax", inner)
    code2 = _tensor(fields, "nested_quant_map", torch.float32, 256)
    if code2.device.type != "meta" and not is_table_of(code2, DYNAMIC):
        raise ValueError("nested_quant_map is not the dynamic map, by which scales are coded: codes mean other scales")
    known = inner.numel() > 0 and not inner.is_meta and not code2.is_meta
    if known and not (inner.max().cpu() * code2.max().cpu()).item() + value <= _LARGEST:
        raise ValueError("nested_absmax and nested_offset give scales that overflow float32")
    return offset, {"absmax": inner, "code": code2, "blocksize": inner_size, "dtype": torch.float32}


def largest_blocksize(numel: int) -> int:
    """The largest blocksize that a state dict may say of so many elements: all of them, but at least bitsandbytes' largest, 4096.

    Kernels pad to whole blocks, so that a larger one would only ask for memory.
    """
    return max(4096, numel)


def _unpack(qs_dict: Mapping[str, Any]) -> dict[str, Any]:
    for key in qs_dict:
        _require(isinstance(key, str), "keys of a quant state", "strings", key)
    blobs = [key for key, value in qs_dict.items() if BLOB in f".{key}" and isinstance(value, Tensor)]
    fields = _without_repetition((key.rpartition(".")[2], qs_dict[key]) for key in qs_dict if key not in blobs)
    if "quant_type" in fields and not blobs:
        return fields
    if len(blobs) != 1:
        raise ValueError(
            f"a quant state needs exactly one key '{BLOB}<quant_type>' or unpacked fields, got {sorted(qs_dict)}"
        )
    blob = qs_dict[blobs[0]]
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() > 65536:
        raise ValueError(
            f"{blobs[0]} must be one-dimensional uint8 of a few bytes, got {blob.dtype} {tuple(blob.shape)}"
        )
    try:
        text = bytes(blob.cpu().tolist()).decode("utf-8")
        rest = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{blobs[0]} is not UTF-8 JSON: {error}") from error
    if not isinstance(rest, dict) or rest.get("quant_type") != f".{blobs[0]}".rpartition(BLOB)[2]:
        raise ValueError(f"{blobs[0]} must be a JSON object of that quant_type, got {rest!r}")
    twice = sorted(set(rest) & set(fields))
    if twice:
        raise ValueError(f"{twice} are in the JSON of {blobs[0]} and beside it")
    return {**fields, **rest}


def _without_repetition(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"{key!r} is given twice")
        fields[key] = value
    return fields


def _tensor(fields: Mapping[str, Any], name: str, dtype: torch.dtype, numel: int | None) -> Tensor:
    value = fields[name]
    if isinstance(value, Tensor):
        check_tensors(**{name: value})
    if not isinstance(value, Tensor) or value.dtype != dtype or (numel is not None and value.numel() != numel):
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be {dtype} with {numel} elements, got {found}")
    if dtype.is_floating_point and value.device.type != "meta" and not bool(value.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite elements")
    return value


def _check_scales(name: str, scales: Tensor) -> None:
    if scales.device.type != "meta" and not bool((scales >= 0).all()):
        raise ValueError(f"{name} has scales that are negative")


def _require(condition: bool, name: str, allowed: Any, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _check_blocksize(name: str, blocksize: Any, numel: int) -> None:
    most = largest_blocksize(numel)
    _require(type(blocksize) is int and 1 <= blocksize <= most, name, f"an integer from 1 to {most}", blocksize)
