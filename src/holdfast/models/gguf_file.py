"""GGUF files: the header (metadata and tensor directory) read in milliseconds, without torch or numpy.

The `gguf` package's own reader wraps every string of the vocabulary in memory-mapped arrays: 2.1 s for a
49k-token vocabulary, against 3 s that a whole start may take. Walking the header with `struct` takes 50 ms.
Dequantisation is left to the package (`gguf.quants`).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.errors import ModelError

# ggml type id → name, elements per block, bytes per block
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A directory entry. `shape` is in torch order (rows first); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The header of a GGUF file."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_metadata(path: str) -> dict[str, Any]:
    """The key-value pairs of a GGUF header: str, int, float, bool, and lists of them.

    Raises `ModelError` when the file is not GGUF v2 or v3, or ends early.
    """
    with _open(path) as reader:
        return reader.metadata()


def read_gguf(path: str) -> GGUFFile:
    """The whole header. Raises `ModelError` as `read_gguf_metadata`, and for a tensor of an unsupported type
    or one that reaches beyond the end of the file."""
    with _open(path) as reader:
        metadata = reader.metadata()
        split = metadata.get("split.count", 1)
        if split not in (0, 1):  # merged files say 0
            raise ModelError(f"{path}: is part of a GGUF split over {split} files (split.count); merge them first")
        return GGUFFile(path, metadata, reader.tensors(metadata))


def read_floats(header: GGUFFile, name: str) -> tuple[float, ...]:
    """All numbers of a small F32 tensor. Raises `ModelError` for another type."""
    tensor = header.tensors[name]
    if tensor.type != "F32":
        raise ModelError(f"{header.path}: tensor {name} has type {tensor.type}, F32 is wanted")
    with open(header.path, "rb") as file:
        file.seek(tensor.offset)
        return struct.unpack(f"<{tensor.num_bytes // 4}f", file.read(tensor.num_bytes))


def _open(path: str) -> _Reader:
    try:
        if Path(path).stat().st_size < 24:
            raise ModelError(f"{path}: not a GGUF file (shorter than a header)")
        with open(path, "rb") as file:
            return _Reader(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


class _Reader:
    """A cursor over the mapped file; every read is checked against its end."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0
        self.num_tensors = 0

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.data.close()

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}") if count <= self.size else None
        if layout is None or self.at + layout.size > self.size:
            raise ModelError(f"{self.path}: truncated: the header ends early at byte {self.size}")
        values = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return values

    def string(self) -> str:
        (length,) = self.numbers("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) < length:
            raise ModelError(f"{self.path}: truncated: the header ends early at byte {self.size}")
        self.at += length
        return raw.decode("utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        """As `string`, `count` times, with everything local: vocabularies have 10^5 of them."""
        data, at, size = self.data, self.at, self.size
        unpack_length = struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):
            start = at + 8
            if start > size:
                break
            at = start + unpack_length(data, at)[0]
            if at > size:
                break
            out.append(data[start:at].decode("utf-8", "replace"))
        if len(out) < count:
            raise ModelError(f"{self.path}: truncated: the header ends early at byte {size}")
        self.at = at
        return out

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.numbers("I")[0], self.numbers("Q")[0]
            if item == _STRING:
                return self.strings(count)
            if item in _SCALARS:
                return list(self.numbers(_SCALARS[item], count))
            raise ModelError(f"{self.path}: metadata {key} is an array of type {item}, which is not supported")
        raise ModelError(f"{self.path}: metadata {key} has the unknown type {kind}")

    def metadata(self) -> dict[str, Any]:
        if self.data[:4] != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file (it begins with {self.data[:4]!r})")
        self.at = 4
        (version,) = self.numbers("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are)")
        self.num_tensors, num_pairs = self.numbers("Q", 2)
        metadata = {}
        for _ in range(num_pairs):
            key = self.string()
            metadata[key] = self.value(self.numbers("I")[0], key)
        return metadata

    def tensors(self, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
        """The tensor directory; the cursor stands behind the metadata."""
        entries = []
        for _ in range(self.num_tensors):
            name = self.string()
            (num_dims,) = self.numbers("I")
            shape = self.numbers("Q", num_dims)[::-1]  # ggml counts from the fastest dim
            if not 1 <= num_dims <= 4 or not all(shape):
                raise ModelError(f"{self.path}: tensor {name} has shape {shape}: must be one to four dims above 0")
            entries.append((name, shape, *self.numbers("I"), *self.numbers("Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
            raise ModelError(f"{self.path}: general.alignment {alignment!r}: must be a positive multiple of 8")
        data_start = math.ceil(self.at / alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in entries:
            if kind not in TENSOR_TYPES:
                names = ", ".join(known for known, _, _ in TENSOR_TYPES.values())
                raise ModelError(f"{self.path}: tensor {name} has the unsupported type {kind} (known: {names})")
            type_name, block, block_bytes = TENSOR_TYPES[kind]
            num_bytes = math.prod(shape) // block * block_bytes
            if offset % alignment:
                raise ModelError(f"{self.path}: tensor {name}: offset {offset} is no multiple of {alignment}")
            if shape[-1] % block:
                raise ModelError(
                    f"{self.path}: tensor {name}: {type_name} needs rows in blocks of {block}, shape {shape}"
                )
            start = data_start + offset
            if start + num_bytes > self.size:
                raise ModelError(
                    f"{self.path}: truncated: tensor {name} ends at byte {start + num_bytes}, the file at {self.size}"
                )
            tensors[name] = GGUFTensor(name, shape, type_name, start, num_bytes)
        return tensors
