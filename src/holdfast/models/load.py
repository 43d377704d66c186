"""Weights from disk into a decoder, matrix by matrix: read, converted, packed and let go, so that the peak is about
one copy of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from holdfast.core.spec import DecoderSpec, ModelInfo
from holdfast.kernels.interface import GROUP, Kernels, Matrix
from holdfast.models.checkpoint import Checkpoint, Format
from holdfast.models.decoder import Decoder
from holdfast.models.layers import Weights
from holdfast.models.parameters import Packing, Parameter, packings, parameters

_MAX_THREADS = 8


def load_decoder(
    info: ModelInfo,
    kernels: Kernels[Any],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    progress: Callable[[float], None] = lambda fraction: None,
    max_positions: int | None = None,
) -> Decoder:
    """The model of `info` (from `inspect_model`) in memory, on `device`: norms in float32, all else in `dtype`,
    except what is quantized in a way that kernels take.

    `progress` is called with the fraction of the weights done, in (0, 1]. `max_positions`: the longest request, when
    that is less than the model allows. Raises `ModelError` for a file that has been damaged since it was inspected.
    """
    return Decoder(load_weights(info, kernels, dtype, torch.device(device), progress), max_positions)


def load_weights(
    info: ModelInfo,
    kernels: Kernels[Any],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None],
) -> Weights:
    """Every matrix packed, and every norm. A head that only repeats the embeddings is not held twice."""
    checkpoint = Checkpoint(info)
    wanted, packs = parameters(info.spec), packings(info.spec)
    repeated = "head" in packs and checkpoint.equal("embed.weight", "head.weight")
    if repeated:
        del packs["head"]
    norms = [name for name, parameter in wanted.items() if parameter.norm]

    def load(name: str) -> Any:
        if name not in packs:
            return torch.empty(wanted[name].shape, device=device).copy_(checkpoint.dense(name, torch.float32))
        packing = packs[name]
        biases = [bias for module in packing.modules if (bias := f"{module}.bias") in wanted]
        return kernels.pack(
            _parts(checkpoint, packing, dtype, device),
            [checkpoint.dense(bias, dtype).to(device) for bias in biases],
            activation=packing.activation,
            gated=packing.gated,
            shards=packing.shards,
        )

    sizes = {name: sum(_numel(wanted[part]) for part in _matrices(packing)) for name, packing in packs.items()}
    sizes |= {name: _numel(wanted[name]) for name in norms}
    loaded: dict[str, Any] = {}
    total, done = sum(sizes.values()), 0
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for name, result in zip(sizes, pool.map(load, sizes), strict=True):
            loaded[name] = result
            done += sizes[name]
            progress(done / total)
    packed = {name: loaded[name] for name in packs}
    if repeated:
        packed["head"] = packed["embed"]
    return Weights(info.spec, kernels, dtype, device, packed, {name: loaded[name] for name in norms})


def _parts(checkpoint: Checkpoint, packing: Packing, dtype: torch.dtype, device: torch.device) -> list[Matrix]:
    """The matrices of a packing, all quantized alike or all in `dtype`; on the CPU they may be views of the file."""
    kind = _format(checkpoint, packing)
    if kind is None:
        return [checkpoint.dense(name, dtype).to(device) for name in _matrices(packing)]
    return [checkpoint.quantized(name, kind, device) for name in _matrices(packing)]


def _format(checkpoint: Checkpoint, packing: Packing) -> Format | None:
    """In which the packed matrices stay quantized: if they have one in common, and no shard ends within a group of
    numbers that share a scale."""
    if any(end % GROUP for end in packing.shards):
        return None
    return checkpoint.format(_matrices(packing))


def _matrices(packing: Packing) -> list[str]:
    return [f"{module}.weight" for module in packing.modules]


def weight_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Bytes the weights take when none is quantized; a tied head counts once."""
    return sum(_numel(parameter) * _itemsize(parameter, dtype) for parameter in parameters(spec).values())


def _numel(parameter: Parameter) -> int:
    return torch.Size(parameter.shape).numel()


def _itemsize(parameter: Parameter, dtype: torch.dtype) -> int:
    return 4 if parameter.norm else dtype.itemsize
