"""The tensor directory of safetensors checkpoints, single or sharded, read from the headers alone.

Format: eight bytes of little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.errors import ModelError

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, its data unread. `file`: path of the .safetensors that holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


def read_safetensors(folder: str) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`.

    Raises `ModelError` for no checkpoint, a missing shard, a damaged or truncated file.
    """
    index = Path(folder, _INDEX)
    if not index.exists():
        single = Path(folder, _SINGLE)
        if not single.exists():
            raise ModelError(f"{folder}: has neither {_SINGLE} nor {_INDEX}")
        return _read_header(single)
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict):
        raise ModelError(f"{index}: weight_map is missing")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(placed.values())):
        file = Path(folder, shard)
        if not file.exists():
            raise ModelError(f"{index}: names {shard}, which is not in {folder}")
        tensors |= _read_header(file)
    for name, shard in placed.items():
        if name not in tensors or Path(tensors[name].file).name != shard:
            raise ModelError(f"{index}: places tensor {name} in {shard}, where it is not")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ModelError` when the file is not one."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return value


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ModelError(f"{file}: truncated: the header does not fit in {size} bytes")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            shape, dtype = tuple(int(dim) for dim in entry["shape"]), str(entry["dtype"])
            begin, end = map(int, entry["data_offsets"])
            at = 8 + length + end
            if at > size:
                raise ModelError(f"{file}: truncated: tensor {name} ends at byte {at}, the file at {size}")
            if dtype in _ITEM_BYTES and end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
                raise ModelError(f"{file}: tensor {name}: {end - begin} bytes for {dtype} {shape}")
            tensors[name] = StoredTensor(name, shape, dtype, str(file))
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: damaged safetensors header: {error!r}") from error
