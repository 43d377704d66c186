"""A checkpoint's tensors as our parameters: memory-mapped, selected, dequantised where they must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdfast.core.errors import ModelError
from holdfast.core.plan import Range
from holdfast.core.spec import ModelInfo
from holdfast.kernels.dequantize import numbers_of
from holdfast.kernels.interface import GROUP, GROUP_BYTES, Quantized
from holdfast.models.config import FP8_BLOCK
from holdfast.models.gguf_file import read_gguf
from holdfast.models.inspect import FP8, scales_of, source_finder
from holdfast.models.parameters import Source
from holdfast.models.safetensors_file import read_safetensors

Format = Literal["Q8_0", "Q4_0", "Q4_1", "FP8"]
_FORMATS: dict[str, Format] = {"Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_1": "Q4_1", FP8: "FP8"}
"""Quantizations that kernels take as they are stored."""
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUMBERS_AT_ONCE = 1 << 22
"""That are in memory as float32 before they become the wanted dtype."""


class Checkpoint:
    """The weights of `info`, by the names of `models.parameters`: matrices as [out, in], rows in our order.

    What comes back may be a view of the file: it must be copied before it is changed or kept. Raises `ModelError` for
    a file that has been damaged since it was inspected.
    """

    def __init__(self, info: ModelInfo) -> None:
        self._types, self._whole = _open_gguf(info.path) if info.format == "gguf" else _open_safetensors(info.path)
        self._find = source_finder(info, self._types)
        self._head_dim = info.spec.head_dim

    def format(self, names: Sequence[str]) -> Format | None:
        """The one in which all these matrices are stored, when kernels take it and only rows need to be moved."""
        sources = [self._find(name) for name in names]
        kinds = {self._types[source.name] for source in sources}
        if len(kinds) > 1 or any(source.transpose or source.plus_one for source in sources):
            return None
        return _FORMATS.get(kinds.pop())

    def quantized(
        self, name: str, kind: Format, device: torch.device, rows: Range | None = None, columns: Range | None = None
    ) -> Quantized:
        """A matrix that has a `format`, or some rows and columns of it, as it is stored, rows contiguous. Columns
        begin and end with groups that share a scale."""
        source = self._find(name)
        stored = self._whole(source.name)
        if kind == "FP8":
            return self._fp8(source.name, stored, device, rows, columns)
        if columns is not None:
            stored = stored[..., _in_groups(columns, GROUP, GROUP_BYTES[kind])]
        return Quantized(kind, select(stored, source, self._head_dim, rows).contiguous().to(device))

    def _fp8(
        self, name: str, stored: Tensor, device: torch.device, rows: Range | None = None, columns: Range | None = None
    ) -> Quantized:
        """The scales of blocks of 128 x 128 are repeated for each row: so rows can be stacked and cut anywhere."""
        first, last = rows or (0, stored.shape[0])
        scales = self._whole(scales_of(name)).float()[first // FP8_BLOCK : -(-last // FP8_BLOCK)]
        scales = scales.repeat_interleave(FP8_BLOCK, dim=0)[first % FP8_BLOCK :][: last - first]
        stored = stored[first:last]
        if columns is not None:
            scales, stored = scales[:, _in_groups(columns, FP8_BLOCK, 1)], stored[:, columns[0] : columns[1]]
        codes = stored.view(torch.uint8).contiguous().to(device)
        return Quantized("FP8", codes, scales.contiguous().to(device))

    def dense(self, name: str, dtype: torch.dtype, rows: Range | None = None, columns: Range | None = None) -> Tensor:
        """A parameter, or some rows and columns of it, in numbers, contiguous."""
        source = self._find(name)
        kind, tensor = self._types[source.name], self._whole(source.name)
        if kind == FP8:
            tensor = numbers_of(self._fp8(source.name, tensor, torch.device("cpu"), rows), dtype)
        elif kind in _PLAIN:
            tensor = select(tensor, source, self._head_dim, rows)
        elif source.transpose:
            tensor = select(_dequantize(tensor, kind, dtype), source, self._head_dim, rows)
        else:
            tensor = _dequantize(select(tensor, source, self._head_dim, rows), kind, dtype)
        if columns is not None:
            tensor = tensor[:, columns[0] : columns[1]]
        if source.plus_one:
            tensor = tensor.float() + 1.0
        return tensor.to(dtype).contiguous()

    def equal(self, one: str, other: str) -> bool:
        """Whether two parameters, each a tensor of its own, are stored as the same numbers."""
        first, second = self._find(one).name, self._find(other).name
        pairs = [(first, second)] + ([(scales_of(first), scales_of(second))] if self._types[first] == FP8 else [])
        return self._types[first] == self._types[second] and all(
            torch.equal(self._whole(one), self._whole(other)) for one, other in pairs
        )


def select(tensor: Tensor, source: Source, head_dim: int, rows: Range | None = None) -> Tensor:
    """The part of a stored tensor that `source` describes, or some rows of that. Unless it is transposed, only
    rows are picked and moved, so it works alike on numbers and on quantized rows of bytes. Rows that are not
    wanted are not read."""
    if source.stacked is not None:
        tensor = tensor[source.stacked]
    if source.transpose and tensor.dim() == 2:
        tensor = tensor.T
    if source.part is None and not source.interleaved:
        return tensor if rows is None else tensor[rows[0] : rows[1]]
    order = torch.arange(tensor.shape[0])
    if source.part is not None:
        part = source.part
        order = order.view(part.groups, part.slots, -1)[:, part.start : part.stop].reshape(-1)
    if source.interleaved:
        order = order.view(-1, head_dim // 2, 2).transpose(1, 2).reshape(-1)
    return tensor[order if rows is None else order[rows[0] : rows[1]]]


def _in_groups(columns: Range, group: int, group_bytes: int) -> slice:
    first, last = columns
    assert first % group == last % group == 0, f"columns {first} to {last} are not whole groups of {group}"
    return slice(first // group * group_bytes, last // group * group_bytes)


def _dequantize(rows: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """uint8 […, bytes of a row] → […, numbers of a row]."""
    quantization = GGMLQuantizationType[kind]
    numbers, num_bytes = GGML_QUANT_SIZES[quantization]
    flat = rows.reshape(-1, rows.shape[-1])
    out = torch.empty(flat.shape[0], flat.shape[1] // num_bytes * numbers, dtype=dtype)
    rows_at_once = max(1, _NUMBERS_AT_ONCE // out.shape[1])
    for some, place in zip(torch.split(flat, rows_at_once), torch.split(out, rows_at_once), strict=True):
        place.copy_(torch.from_numpy(dequantize(some.numpy(), quantization)))
    return out.view(*rows.shape[:-1], -1)


_Opened = tuple[dict[str, str], Callable[[str], Tensor]]
"""By a stored tensor's name: its type, and what reads it whole: numbers, or rows of bytes if it is quantized."""


def _open_safetensors(folder: str) -> _Opened:
    tensors = read_safetensors(folder)
    try:
        files = {file: safe_open(file, framework="pt") for file in {tensor.file for tensor in tensors.values()}}
    except SafetensorError as error:
        raise ModelError(f"{folder}: {error}") from error

    def whole(name: str) -> Tensor:
        stored: Tensor = files[tensors[name].file].get_tensor(name)  # type: ignore[no-untyped-call]
        return stored

    return {name: tensor.dtype for name, tensor in tensors.items()}, whole


def _open_gguf(path: str) -> _Opened:
    tensors = read_gguf(path).tensors
    # copy-on-write, only because torch warns of arrays that cannot be written to
    data = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))

    def whole(name: str) -> Tensor:
        tensor = tensors[name]
        raw = data[tensor.offset : tensor.offset + tensor.num_bytes]
        if tensor.type in _PLAIN:
            return raw.view(_PLAIN[tensor.type]).view(tensor.shape)
        return raw.view(*tensor.shape[:-1], -1)

    return {name: tensor.type for name, tensor in tensors.items()}, whole
