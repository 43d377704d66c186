"""Weights from disk into a decoder: memory-mapped, converted tensor by tensor, so that the peak is about one copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdfast.core.errors import ModelError
from holdfast.core.spec import DecoderSpec, ModelInfo
from holdfast.kernels.interface import Kernels
from holdfast.models.decoder import Decoder
from holdfast.models.gguf_file import GGUFTensor, read_gguf
from holdfast.models.inspect import source_finder
from holdfast.models.parameters import Parameter, Source, parameters
from holdfast.models.safetensors_file import read_safetensors

_MAX_THREADS = 8
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Read = Callable[[Source], Tensor]
"""The rows a source selects from its tensor, as [out, in], in any float dtype."""


def load_decoder(
    info: ModelInfo,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    progress: Callable[[float], None] = lambda fraction: None,
    max_positions: int | None = None,
) -> Decoder:
    """The model of `info` (from `inspect_model`) in memory: norms in float32, all else in `dtype`, on `device`.

    `progress` is called with the fraction of the weights done, in (0, 1]. `max_positions`: the longest request, when
    that is less than the model allows. Raises `ModelError` for a file that has been damaged since it was inspected.
    """
    weights = load_weights(info, dtype, torch.device(device), progress)
    return Decoder(info.spec, weights, kernels, max_positions)


def load_weights(
    info: ModelInfo, dtype: torch.dtype, device: torch.device, progress: Callable[[float], None]
) -> dict[str, Tensor]:
    """Every parameter by our name. A head that only repeats the embeddings is not held twice."""
    wanted = parameters(info.spec)
    read, stored = _open_gguf(info) if info.format == "gguf" else _open_safetensors(info)
    find = source_finder(info, stored)

    def load(name: str) -> Tensor:
        parameter, source = wanted[name], find(name)
        tensor = read(source)
        if source.plus_one:
            tensor = tensor.float() + 1.0
        out = torch.empty(parameter.shape, dtype=torch.float32 if parameter.norm else dtype, device=device)
        return out.copy_(tensor)

    weights = {}
    total, done = sum(torch.Size(parameter.shape).numel() for parameter in wanted.values()), 0
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for name, tensor in zip(wanted, pool.map(load, wanted), strict=True):
            weights[name] = tensor
            done += tensor.numel()
            progress(done / total)
    if "head.weight" in weights and torch.equal(weights["head.weight"], weights["embed.weight"]):
        weights["head.weight"] = weights["embed.weight"]
    return weights


def weight_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Bytes the weights take once loaded; a tied head counts once."""

    def size(parameter: Parameter) -> int:
        return torch.Size(parameter.shape).numel() * (4 if parameter.norm else dtype.itemsize)

    return sum(size(parameter) for parameter in parameters(spec).values())


def select(tensor: Tensor, source: Source, head_dim: int) -> Tensor:
    """The part of a stored tensor that `source` describes. Only rows are picked and moved, so it works alike on
    numbers and on quantized rows of bytes."""
    if source.stacked is not None:
        tensor = tensor[source.stacked]
    if source.transpose and tensor.dim() == 2:
        tensor = tensor.T
    rest = tensor.shape[1:]
    if source.part is not None:
        part = source.part
        tensor = tensor.reshape(part.groups, part.slots, -1, *rest)[:, part.start : part.stop].reshape(-1, *rest)
    if source.interleaved:
        tensor = tensor.reshape(-1, head_dim // 2, 2, *rest).transpose(1, 2).reshape(-1, *rest)
    return tensor


def _open_safetensors(info: ModelInfo) -> tuple[Read, set[str]]:
    tensors = read_safetensors(info.path)
    try:
        files = {file: safe_open(file, framework="pt") for file in {tensor.file for tensor in tensors.values()}}
    except SafetensorError as error:
        raise ModelError(f"{info.path}: {error}") from error

    def read(source: Source) -> Tensor:
        stored: Tensor = files[tensors[source.name].file].get_tensor(source.name)  # type: ignore[no-untyped-call]
        return select(stored, source, info.spec.head_dim)

    return read, set(tensors)


def _open_gguf(info: ModelInfo) -> tuple[Read, set[str]]:
    tensors = read_gguf(info.path).tensors
    # copy-on-write, only because torch warns of arrays that cannot be written to
    data = torch.from_numpy(np.memmap(info.path, dtype=np.uint8, mode="c"))
    return partial(_read_gguf, data, tensors, info.spec.head_dim), set(tensors)


def _read_gguf(data: Tensor, tensors: dict[str, GGUFTensor], head_dim: int, source: Source) -> Tensor:
    tensor = tensors[source.name]
    raw = data[tensor.offset : tensor.offset + tensor.num_bytes]
    if tensor.type in _PLAIN:
        return select(raw.view(_PLAIN[tensor.type]).view(tensor.shape), source, head_dim)
    rows = select(raw.view(*tensor.shape[:-1], -1), source, head_dim)
    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType[tensor.type]))
