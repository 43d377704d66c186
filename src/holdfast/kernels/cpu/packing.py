"""Matrices in the order `linear` reads them: panels of 32 output columns (csrc/ops.h, struct weight)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from holdfast.core.spec import Activation
from holdfast.kernels.cpu.library import Library
from holdfast.kernels.cpu.memory import WeightMemory
from holdfast.kernels.cpu.structs import ACTIVATIONS, FORMATS, PANEL, Weight
from holdfast.kernels.interface import GROUP, GROUP_BYTES, Matrix, Quantized


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """[N, K] packed; `columns`: N, of one half if gated. Holds the memory that `c` points to."""

    c: Weight
    columns: int
    format: str
    memory: np.ndarray
    bias: np.ndarray | None
    shards: np.ndarray | None

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


def pack(
    library: Library,
    store: WeightMemory,
    parts: Sequence[Matrix],
    biases: Sequence[Tensor],
    *,
    activation: Activation | None,
    gated: bool,
    shards: Sequence[int],
) -> PackedMatrix:
    """See `Kernels.pack`; all parts are tensors of one dtype (float32 or bfloat16) or quantized alike. Panels that
    are not the store's share are left as they are."""
    halves = [[part] for part in parts] if gated else [list(parts)]
    rows, k = sum(part.shape[0] for part in halves[0]), parts[0].shape[1]
    kind = _format_of(parts[0])
    assert all(_format_of(part) == kind for part in parts), "parts of one matrix are stored alike"
    assert all(part.shape[1] == k for part in parts), "parts of one matrix have one K"
    assert not gated or (len(parts) == 2 and parts[0].shape == parts[1].shape), "gate and up"
    assert not biases or [len(bias) for bias in biases] == [part.shape[0] for part in parts], "a bias for each part"
    ends = np.array(shards or (k,), dtype=np.int64)
    assert ends[-1] == k, f"shards end at {shards}, K is {k}"
    assert (np.diff(ends, prepend=0) > 0).all(), f"shards end at {shards}: one is empty"
    panel_bytes = _panel_bytes(kind, np.diff(ends, prepend=0))
    panels = -(-rows // PANEL)
    memory = store.take(panels * (1 + gated) * panel_bytes)
    bias = _bias(biases, gated, rows, panels) if biases else None
    weight = Weight(
        data=memory.ctypes.data,
        bias=bias.ctypes.data if bias is not None else None,
        shards=ends.ctypes.data if shards else None,
        n=rows,
        k=k,
        panel_bytes=panel_bytes,
        format=FORMATS[kind],
        num_shards=len(ends),
        activation=ACTIVATIONS[activation],
        gated=gated,
    )
    first, last = store.share(panels)
    if first < last:
        some = range(first * PANEL, min(last * PANEL, rows))
        for index, half in enumerate(halves):
            _fill(library, weight, half, index, some)
    return PackedMatrix(weight, rows, kind, memory, bias, ends if shards else None)


def weight_array(matrices: Sequence[PackedMatrix]) -> ctypes.Array[Weight]:
    """Side by side, as an operation over experts wants them."""
    return (Weight * len(matrices))(*(matrix.c for matrix in matrices))


def _format_of(part: Matrix) -> str:
    return part.format if isinstance(part, Quantized) else str(part.dtype).removeprefix("torch.")


def _panel_bytes(kind: str, shard_sizes: np.ndarray) -> int:
    if kind == "float32":
        return int(shard_sizes.sum()) * PANEL * 4
    if kind == "bfloat16":
        return int((-(-shard_sizes // 2)).sum()) * PANEL * 4
    assert not (shard_sizes % GROUP).any(), "a shard of quantized weights ends with a group"
    return int(shard_sizes.sum()) // GROUP * PANEL * GROUP_BYTES[kind]


def _fill(library: Library, weight: Weight, parts: list[Matrix], half: int, some: range) -> None:
    """Pack `some` rows, whole panels, of the stacked parts."""
    here = Weight.from_buffer_copy(weight)
    here.data = weight.data + some.start // PANEL * (1 + weight.gated) * weight.panel_bytes
    here.n = len(some)
    if isinstance(parts[0], Quantized):
        blocks = _rows([part.blocks for part in parts if isinstance(part, Quantized)], some).contiguous()
        library.pack_groups(here, blocks.data_ptr(), blocks.shape[1], half)
        return
    numbers = _rows([part for part in parts if isinstance(part, Tensor)], some)
    if numbers.stride(1) != 1:
        numbers = numbers.contiguous()
    library.pack_dense(here, numbers.data_ptr(), numbers.stride(0), half)


def _rows(parts: list[Tensor], some: range) -> Tensor:
    """Of the parts, stacked."""
    found, at = [], 0
    for part in parts:
        first, last = max(some.start - at, 0), min(some.stop - at, part.shape[0])
        if first < last:
            found.append(part[first:last])
        at += part.shape[0]
    return torch.cat(found) if len(found) > 1 else found[0]


def _bias(biases: Sequence[Tensor], gated: bool, rows: int, panels: int) -> np.ndarray:
    """float32 [panels * 32], or gate and up panel by panel."""
    halves = [[bias] for bias in biases] if gated else [list(biases)]
    out = np.zeros((panels, len(halves), PANEL), dtype=np.float32)
    for index, half in enumerate(halves):
        flat = np.zeros(panels * PANEL, dtype=np.float32)
        flat[:rows] = torch.cat(half).float().numpy()
        out[:, index] = flat.reshape(panels, PANEL)
    return out
