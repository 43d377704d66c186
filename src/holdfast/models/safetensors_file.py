"""The tensor directory of safetensors checkpoints, single or sharded, read from the headers alone.

Format: eight bytes of little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import msgspec

from holdfast.core.errors import ModelError

_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LONGEST_HEADER = 100_000_000
"""Bytes, as the safetensors library has it."""

_Natural = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[_Natural, ...]
    data_offsets: tuple[_Natural, _Natural]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, its data unread. `file`: path of the .safetensors that holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


def read_safetensors(folder: str) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`.

    Raises `ModelError` for no checkpoint, a missing shard or one outside the folder, a damaged or truncated file.
    """
    index = Path(folder, _INDEX)
    if not index.exists():
        single = Path(folder, _SINGLE)
        if not single.is_file():
            raise ModelError(f"{folder}: has neither {_SINGLE} nor {_INDEX}")
        return _read_header(str(single))
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict):
        raise ModelError(f"{index}: weight_map is missing")
    files = {shard: _shard(folder, index, shard) for shard in placed.values()}
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        tensors |= _read_header(file)
    for name, shard in placed.items():
        if name not in tensors or tensors[name].file != files[shard]:
            raise ModelError(f"{index}: places tensor {name} in {shard}, where it is not")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ModelError` when the file is not one."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return value


def _shard(folder: str, index: Path, shard: Any) -> str:
    """The path of a file that the index names."""
    # the name only: hub caches consist of links to files elsewhere
    if not isinstance(shard, str) or PurePath(shard).is_absolute() or ".." in PurePath(shard).parts:
        raise ModelError(f"{index}: names {shard!r}, which is no file within {folder}")
    path = str(Path(folder, shard))
    if not os.path.isfile(path):
        raise ModelError(f"{index}: names {shard}, which is not in {folder}")
    return path


def _read_header(file: str) -> dict[str, StoredTensor]:
    """The tensors of one file; their data fill it exactly, as the library demands when it opens it."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if 8 + length > size:
                raise ModelError(f"{file}: truncated: the header does not fit in {size} bytes")
            if length > _LONGEST_HEADER:
                raise ModelError(f"{file}: a header of {length} bytes: must be at most {_LONGEST_HEADER}")
            header = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: damaged safetensors header: {error!r}") from error
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, previous = entry.data_offsets[0], end
        end = entry.data_offsets[1]
        if begin != previous or end < begin:
            raise ModelError(
                f"{file}: damaged safetensors header: tensor {name} lies at {begin} … {end}, not at {previous}"
            )
        num_bytes = math.prod(entry.shape) * _ITEM_BYTES.get(entry.dtype, 0)
        if entry.dtype in _ITEM_BYTES and end - begin != num_bytes:
            raise ModelError(f"{file}: tensor {name}: {end - begin} bytes for {entry.dtype} {entry.shape}")
    if 8 + length + end != size:
        state = "truncated" if 8 + length + end > size else "damaged"
        raise ModelError(f"{file}: {state}: its tensors end at byte {8 + length + end}, the file at {size}")
    return {name: StoredTensor(name, entry.shape, entry.dtype, file) for name, entry in entries.items()}
