"""Weights from disk into a decoder, matrix by matrix: read, converted, packed and let go, so that the peak is about
one copy of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.core.plan import Place, Range, places
from holdfast.core.spec import DecoderSpec, ModelInfo
from holdfast.kernels.interface import FP8_GROUP, GROUP, Kernels, Matrix
from holdfast.models.checkpoint import Checkpoint, Format
from holdfast.models.decoder import Decoder
from holdfast.models.layers import Pieces, Weights
from holdfast.models.parameters import Packing, Parameter, norms_at, packings_at, parameters, share_of
from holdfast.parallel.collectives import Collectives
from holdfast.parallel.cuts import make_plan

log = logging.getLogger(__name__)

_MAX_THREADS = 8


def load_decoder(
    info: ModelInfo,
    kernels: Kernels[Any],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    progress: Callable[[float], None] = lambda fraction: None,
    max_positions: int | None = None,
    place: Place | None = None,
    collectives: Collectives | None = None,
    in_order: bool = False,
    held: Held | None = None,
) -> Decoder:
    """The model of `info` (from `inspect_model`) in memory, on `device`: norms in float32, all else in `dtype`,
    except what is quantized in a way that kernels take. `place`: only that rank's share is read; without one, all.

    `progress` is called with the fraction of the weights done, in (0, 1]. `max_positions`: the longest request, when
    that is less than the model allows. Raises `ModelError` for a file that has been damaged since it was inspected.
    """
    weights = load_weights(
        info, kernels, dtype, torch.device(device), progress, place, collectives, in_order=in_order, held=held
    )
    return Decoder(weights, max_positions)


def load_weights(  # noqa: PLR0917
    info: ModelInfo,
    kernels: Kernels[Any],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None],
    place: Place | None = None,
    collectives: Collectives | None = None,
    *,
    in_order: bool = False,
    held: Held | None = None,
) -> Weights:
    """Every matrix packed, and every norm. A head that only repeats the embeddings is not held twice. `in_order`: one
    after the other, in the same order by whoever loads the same. `held`: of the same place, by `Held.at`."""
    place = place or places(make_plan(info.spec).replicas[0])[0]
    loader = _Loader(Checkpoint(info), kernels, dtype, device, parameters(info.spec))
    packs, norms = packings_at(info.spec, place), norms_at(info.spec, place)
    repeated = "head" in packs and "embed" in packs and loader.checkpoint.equal("embed.weight", "head.weight")
    if repeated:
        del packs["head"]
    _tell_of_widened(loader, packs)
    sizes = {name: share_of(packing, loader.wanted) for name, packing in packs.items()}
    sizes |= {name: _numel(loader.wanted[name]) for name in norms}
    loaded: dict[str, Any] = {} if held is None else {**held.packed, **held.norms}

    def load(name: str) -> Any:
        return loader.packed(packs[name]) if name in packs else loader.norm(name)

    lacking = [name for name in sizes if name not in loaded]
    total, done = sum(sizes[name] for name in lacking), 0
    threads = 1 if in_order else min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        try:
            for name, result in zip(lacking, pool.map(load, lacking), strict=True):
                loaded[name] = result
                done += sizes[name]
                progress(done / total)
        finally:
            pool.shutdown(cancel_futures=True)  # `progress` may raise: nobody waits for the rest then
    packed = {name: loaded[name] for name in packs}
    if repeated:
        packed["head"] = packed["embed"]
    held_norms = {name: loaded[name] for name in norms}
    return Weights(info.spec, kernels, dtype, device, packed, held_norms, place, collectives)


def _tell_of_widened(loader: _Loader, packs: Mapping[str, Packing]) -> None:
    """That matrices take more memory than in their file."""
    stored = {name for name, packing in packs.items() if loader.checkpoint.format(_matrices(packing)) is not None}
    widened = sum(loader.format(packs[name]) is None for name in stored)
    if widened:
        log.warning(
            "%d of %d quantized matrices are held in %s: they are cut within groups of numbers that share a scale",
            widened,
            len(stored),
            str(loader.dtype).removeprefix("torch."),
        )


@dataclass(frozen=True, slots=True)
class Held:
    """Weights that stay in memory while the rank that has them changes its place. They belong to the process: nothing
    here knows kernels, pages or other ranks."""

    packings: Mapping[str, Packing]
    packed: Mapping[str, Any]
    norms: Mapping[str, Tensor]

    @classmethod
    def of(cls, weights: Weights) -> Held:
        return cls(packings_at(weights.spec, weights.place), weights.packed, weights.norms)

    def at(self, spec: DecoderSpec, place: Place) -> Held:
        """What the rank at `place` needs exactly as it is here: the same ranges of the same matrices."""
        packings, norms = packings_at(spec, place), set(norms_at(spec, place))
        same = {name for name, packing in packings.items() if self.packings.get(name) == packing}
        return Held(
            packings,
            {name: matrix for name, matrix in self.packed.items() if name in same},
            {name: norm for name, norm in self.norms.items() if name in norms},
        )

    @property
    def nbytes(self) -> int:
        matrices = {id(matrix): matrix for matrix in self.packed.values()}  # a head may be the embeddings
        return sum(_bytes_of(each) for each in (*matrices.values(), *self.norms.values()))


def _bytes_of(matrix: Any) -> int:
    return sum(map(_bytes_of, matrix.packed)) if isinstance(matrix, Pieces) else int(matrix.nbytes)


def move_experts(
    info: ModelInfo, weights: Weights, place: Place, stopped: Callable[[], bool] = lambda: False
) -> Weights:
    """The same weights with experts placed as the plan of `place` says: those that are here are kept, others read,
    unless it is `stopped` on the way. Raises `ModelError` as `load_decoder` does."""
    loader = _Loader(Checkpoint(info), weights.kernels, weights.dtype, weights.device, parameters(info.spec))
    packed = {name: matrix for name, matrix in weights.packed.items() if ".experts." not in name}
    for name, packing in packings_at(info.spec, place).items():
        if ".experts." in name and not stopped():
            held = weights.packed.get(name)
            packed[name] = loader.packed(packing) if held is None else held
    return replace(weights, packed=packed, place=place)


@dataclass(frozen=True, slots=True)
class _Loader:
    """Reads and packs a matrix at a time."""

    checkpoint: Checkpoint
    kernels: Kernels[Any]
    dtype: torch.dtype
    device: torch.device
    wanted: Mapping[str, Parameter]

    def norm(self, name: str) -> Tensor:
        return torch.empty(self.wanted[name].shape, device=self.device).copy_(
            self.checkpoint.dense(name, torch.float32)
        )

    def packed(self, packing: Packing) -> Any:
        """In the kernels' form, or `Pieces` of it."""
        if packing.pieces is None:
            return self._pack(packing, self._biases(packing, self.dtype), packing.shards, None)
        borders = (0, *(packing.shards or (self._columns(packing),)))
        spans = [(borders[first], borders[last]) for first, last in packing.pieces]
        packed = []
        for (first, last), (start, stop) in zip(packing.pieces, spans, strict=True):
            shards = tuple(border - start for border in borders[first + 1 : last + 1])
            packed.append(self._pack(packing, [], shards if len(shards) > 1 else (), (start, stop)))
        biases = [bias.float() for bias in self._biases(packing, self.dtype)]
        columns = tuple((first - spans[0][0], last - spans[0][0]) for first, last in spans)
        return Pieces(packed, columns, biases[0] if biases else None)

    def _columns(self, packing: Packing) -> int:
        return self.wanted[_matrices(packing)[0]].shape[1]

    def _biases(self, packing: Packing, dtype: torch.dtype) -> list[Tensor]:
        return [
            self.checkpoint.dense(name, dtype, packing.rows_of(index)).to(self.device)
            for index, module in enumerate(packing.modules)
            if (name := f"{module}.bias") in self.wanted
        ]

    def _pack(self, packing: Packing, biases: list[Tensor], shards: tuple[int, ...], columns: Range | None) -> Any:
        return self.kernels.pack(
            self._parts(packing, columns),
            biases,
            activation=packing.activation,
            gated=packing.gated,
            shards=shards,
        )

    def format(self, packing: Packing) -> Format | None:
        """In which the packed matrices stay quantized: if they have one in common, and are not cut within a group of
        numbers that share a scale."""
        kind = self.checkpoint.format(_matrices(packing))
        group = FP8_GROUP if kind == "FP8" else GROUP
        return None if any(end % group for end in _borders(packing, sharded=self.kernels.sharded)) else kind

    def _parts(self, packing: Packing, columns: Range | None) -> list[Matrix]:
        """The matrices, all quantized alike or all in `dtype`; on the CPU they may be views of the file."""
        names, kind = _matrices(packing), self.format(packing)
        if kind is None:
            return [
                self.checkpoint.dense(name, self.dtype, packing.rows_of(index), columns).to(self.device)
                for index, name in enumerate(names)
            ]
        return [
            self.checkpoint.quantized(name, kind, self.device, packing.rows_of(index), columns)
            for index, name in enumerate(names)
        ]


def _borders(packing: Packing, *, sharded: bool) -> tuple[int, ...]:
    """Columns at which its matrices are cut: where virtual shards end, or, without these, pieces. All shards count,
    whoever holds them, so that every plan has the same matrices quantized."""
    if sharded or packing.pieces is None or not packing.shards:
        return packing.shards if sharded else ()
    borders = (0, *packing.shards)
    return tuple(borders[shard] for piece in packing.pieces for shard in piece)


def _matrices(packing: Packing) -> list[str]:
    return [f"{module}.weight" for module in packing.modules]


def _numel(parameter: Parameter) -> int:
    return torch.Size(parameter.shape).numel()
