"""Look at a checkpoint without loading it: what model it is, and whether every tensor is there.

Free of torch, so that the supervisor can refuse a bad checkpoint before it starts a single process.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from holdfast.core.errors import ModelError
from holdfast.core.spec import DecoderSpec, ModelInfo
from holdfast.models.config import FP8_BLOCK, Config, gguf_config, hf_config
from holdfast.models.families import FAMILIES, GGUF_ARCHITECTURES, Family
from holdfast.models.gguf_file import GGUFTensor, read_gguf
from holdfast.models.parameters import Source, locate, walk_parameters
from holdfast.models.safetensors_file import StoredTensor, read_json, read_safetensors

Dtype = Literal["float32", "float16", "bfloat16"]
FP8 = "F8_E4M3"
_DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_Tensors = Mapping[str, StoredTensor] | Mapping[str, GGUFTensor]
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

log = logging.getLogger(__name__)


def inspect_model(path: str) -> ModelInfo:
    """What the checkpoint at `path` (a folder in Hugging Face layout, or a .gguf file) holds.

    Reads configuration and headers, no weights. Raises `ModelError` for an unknown architecture, an unsupported
    switch, a missing, extra or misshapen tensor, a damaged or truncated file, each by name.
    """
    found = str(Path(path).absolute())
    if os.path.isdir(found):
        return _inspect_folder(found)
    if os.path.isfile(found) and found.endswith(".gguf"):
        return _inspect_gguf(found)
    raise ModelError(f"{path}: neither a folder with config.json nor a .gguf file")


def source_finder(info: ModelInfo, stored: Collection[str]) -> Callable[[str], Source]:
    """What tells, for a parameter's name, where it lies among the `stored` tensors of the checkpoint."""
    family = FAMILIES[info.spec.family]
    if info.format == "gguf":
        assert family.gguf_names is not None, f"{info.spec.family} came from a GGUF file"
        return partial(locate, family.gguf_names(info.spec))
    names = family.hf_names(info.spec)
    prefix = "" if locate(names, "embed.weight").name in stored else family.base_prefix

    def find(parameter: str) -> Source:
        source = locate(names, parameter)
        return replace(source, name=source.name.removeprefix(prefix))

    return find


def _inspect_folder(folder: str) -> ModelInfo:
    path = Path(folder, "config.json")
    if not path.exists():
        raise ModelError(f"{folder}: has no config.json")
    config = hf_config(str(path), read_json(path))
    tensors = read_safetensors(folder)
    spec = _spec(config, config.choice("model_type", FAMILIES), tensors)
    if "lm_head.weight" in tensors:  # whatever the config says of tying: what was trained is what was stored
        spec = msgspec.structs.replace(spec, tie_embeddings=False)
    generation_path = Path(folder, "generation_config.json")
    generation = Config(str(generation_path), read_json(generation_path) if generation_path.exists() else {})
    ends = [generation.values.get("eos_token_id"), config.values.get("eos_token_id")]
    info = ModelInfo(
        path=folder,
        format="safetensors",
        spec=spec,
        dtype=_dtype(tensors),
        eos_token_ids=_token_ids(folder, spec.vocab_size, ends),
        sampling_defaults={name: generation.number(name) for name in _SAMPLING if generation.has(name)},
    )
    _check_tensors(info, tensors)
    return info


def _inspect_gguf(path: str) -> ModelInfo:
    header = read_gguf(path)
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise ModelError(f"{path}: general.architecture {architecture!r} is not supported (known: {known})")
    config = gguf_config(header)
    model_type = GGUF_ARCHITECTURES[architecture]
    if model_type == "llama" and config.values.get("num_experts"):
        model_type = "mixtral"
    spec = _spec(config, FAMILIES[model_type], header.tensors)
    ends = [header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    info = ModelInfo(
        path=path,
        format="gguf",
        spec=spec,
        dtype=_dtype(header.tensors),
        eos_token_ids=_token_ids(path, spec.vocab_size, ends),
    )
    _check_tensors(info, header.tensors)
    return info


def _spec(config: Config, family: Family, tensors: _Tensors) -> DecoderSpec:
    """What the config describes; its sizes fit together."""
    num_layers, path = config.integer("num_hidden_layers"), config.path
    if num_layers > len(tensors):  # the spec has an entry per layer, so this comes first
        raise ModelError(f"{path}: num_hidden_layers {num_layers}: the checkpoint has only {len(tensors)} tensors")
    spec = family.spec(config)
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(f"{path}: {spec.num_heads} query heads cannot share {spec.num_kv_heads} KV heads evenly")
    if spec.ropes and spec.head_dim % 2:
        raise ModelError(f"{path}: heads of {spec.head_dim} dims cannot be rotated in pairs")
    if spec.moe and spec.moe.experts_per_token > spec.moe.num_experts:
        raise ModelError(f"{path}: {spec.moe.experts_per_token} experts per token, but only {spec.moe.num_experts}")
    return spec


def _check_tensors(info: ModelInfo, tensors: _Tensors) -> None:
    """Every parameter has its tensor, of the right shape, and every tensor a use."""
    spec = info.spec
    num_experts = spec.moe.num_experts if spec.moe else 0
    find = source_finder(info, tensors.keys())
    used = set()
    for name, parameter in walk_parameters(spec):
        source = find(name)
        shape = source.stored_shape(parameter.shape, num_experts)
        if source.name not in tensors:
            raise ModelError(f"{info.path}: tensor {source.name} is missing (its shape would be {shape})")
        tensor = tensors[source.name]
        if tensor.shape != shape:
            raise ModelError(f"{info.path}: tensor {source.name} has shape {tensor.shape}, the config says {shape}")
        if isinstance(tensor, StoredTensor) and tensor.dtype == FP8 and len(shape) == 2:
            used.add(_check_scales(info, source, tensors))
        elif isinstance(tensor, StoredTensor) and tensor.dtype not in _DTYPES:
            known = ", ".join([*_DTYPES, f"{FP8} for matrices"])
            raise ModelError(f"{info.path}: tensor {source.name} has dtype {tensor.dtype} (known: {known})")
        used.add(source.name)
    ignored = FAMILIES[spec.family].ignored
    extra = [name for name in tensors if name not in used and not any(re.search(p, name) for p in ignored)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ModelError(f"{info.path}: tensor {extra[0]}{more} has no place in a {spec.family} model of this config")


def scales_of(name: str) -> str:
    """Where the scales of an fp8 matrix are: one for every block of 128 x 128."""
    return f"{name}_scale_inv"


def _check_scales(info: ModelInfo, source: Source, tensors: _Tensors) -> str:
    """The name of an fp8 matrix's scales, which are there and fit it."""
    name, shape = scales_of(source.name), tensors[source.name].shape
    wanted = tuple(-(-size // FP8_BLOCK) for size in shape)
    found = tensors.get(name)
    if not isinstance(found, StoredTensor) or found.shape != wanted or found.dtype not in _DTYPES:
        raise ModelError(f"{info.path}: tensor {source.name} is {FP8}, and its scales {name} {wanted} are not there")
    if source.part or source.stacked is not None or source.transpose or source.plus_one or source.interleaved:
        raise ModelError(f"{info.path}: tensor {source.name} is {FP8}: not supported where rows are split or moved")
    return name


def _dtype(tensors: _Tensors) -> Dtype:
    """The dtype most of the checkpoint's numbers have. Quantized ones count as bfloat16, which any of them fits."""
    sizes: Counter[Dtype] = Counter()
    for tensor in tensors.values():
        stored = tensor.dtype if isinstance(tensor, StoredTensor) else tensor.type
        sizes[_DTYPES.get(stored, "bfloat16")] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _token_ids(path: str, vocab_size: int, found: list[Any]) -> tuple[int, ...]:
    """Ids given as an int, a list of them, or None; each once, in order. Some published lists name tokens that the
    model does not have; it can never say them."""
    entries = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    given = list(dict.fromkeys(token for token in entries if type(token) is int))
    known = tuple(token for token in given if 0 <= token < vocab_size)
    if len(known) < len(given):
        beyond = [token for token in given if token not in known]
        log.warning("%s: eos token ids %s are left out: the vocabulary has %d tokens", path, beyond, vocab_size)
    return known


def fingerprint_of(info: ModelInfo) -> str:
    """What tells that a checkpoint is the same on another machine: the sizes of its files, and samples of what is in
    them, 64 kB at the beginning and 4 kB at each of 256 places."""
    path, digest = Path(info.path), hashlib.blake2b(digest_size=8)
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as data:
            digest.update(size.to_bytes(8, "little") + data.read(1 << 16))
            for place in range(256):
                data.seek(size * place // 256)
                digest.update(data.read(1 << 12))
    return digest.hexdigest()


def stamp_of(info: ModelInfo) -> list[tuple[str, int, int, int]]:
    """What tells that the files of a checkpoint are still the same: names, inodes, sizes, times of change. Raises
    `OSError` when they are gone."""
    path = Path(info.path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    stats = [(file.name, file.stat()) for file in files]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
