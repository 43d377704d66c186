"""Look at a checkpoint without loading it: what model it is, and whether every tensor is there.

Free of torch, so that the supervisor can refuse a bad checkpoint before it starts a single process.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from holdfast.core.errors import ModelError
from holdfast.core.spec import DecoderSpec, ModelInfo
from holdfast.models.config import gguf_config, hf_config
from holdfast.models.families import FAMILIES, GGUF_ARCHITECTURES
from holdfast.models.gguf_file import GGUFTensor, read_gguf
from holdfast.models.parameters import Source, locate, parameters
from holdfast.models.safetensors_file import StoredTensor, read_json, read_safetensors

Dtype = Literal["float32", "float16", "bfloat16"]
_DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def inspect_model(path: str) -> ModelInfo:
    """What the checkpoint at `path` (a folder in Hugging Face layout, or a .gguf file) holds.

    Reads configuration and headers, no weights. Raises `ModelError` for an unknown architecture, an unsupported
    switch, a missing, extra or misshapen tensor, a damaged or truncated file, each by name.
    """
    found = Path(path).absolute()
    if found.is_dir():
        return _inspect_folder(str(found))
    if found.is_file() and found.suffix == ".gguf":
        return _inspect_gguf(str(found))
    raise ModelError(f"{path}: neither a folder with config.json nor a .gguf file")


def locate_sources(info: ModelInfo, stored: Collection[str]) -> dict[str, Source]:
    """Parameter name → where it lies among the `stored` tensors of the checkpoint."""
    family = FAMILIES[info.spec.family]
    if info.format == "gguf":
        assert family.gguf_names is not None, f"{info.spec.family} came from a GGUF file"
        names = family.gguf_names(info.spec)
        return {parameter: locate(names, parameter) for parameter in parameters(info.spec)}
    names = family.hf_names(info.spec)
    sources = {parameter: locate(names, parameter) for parameter in parameters(info.spec)}
    if sources["embed.weight"].name in stored:
        return sources
    return {
        parameter: replace(source, name=source.name.removeprefix(family.base_prefix))
        for parameter, source in sources.items()
    }


def _inspect_folder(folder: str) -> ModelInfo:
    path = Path(folder, "config.json")
    if not path.exists():
        raise ModelError(f"{folder}: has no config.json")
    config = hf_config(str(path), read_json(path))
    spec = config.choice("model_type", FAMILIES).spec(config)
    _check_spec(folder, spec)
    tensors = read_safetensors(folder)
    generation_path = Path(folder, "generation_config.json")
    generation = read_json(generation_path) if generation_path.exists() else {}
    info = ModelInfo(
        path=folder,
        format="safetensors",
        spec=spec,
        dtype=_dtype(tensors),
        eos_token_ids=_token_ids(generation.get("eos_token_id"), config.values.get("eos_token_id")),
        sampling_defaults={
            name: float(generation[name]) for name in _SAMPLING if isinstance(generation.get(name), int | float)
        },
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
    spec = FAMILIES[model_type].spec(config)
    _check_spec(path, spec)
    ends = [header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    info = ModelInfo(
        path=path,
        format="gguf",
        spec=spec,
        dtype=_dtype(header.tensors),
        eos_token_ids=_token_ids(*ends),
    )
    _check_tensors(info, header.tensors)
    return info


def _check_spec(path: str, spec: DecoderSpec) -> None:
    """The sizes fit together."""
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(f"{path}: {spec.num_heads} query heads cannot share {spec.num_kv_heads} KV heads evenly")
    if spec.ropes and any(rope.rotary_dim % 2 or rope.rotary_dim > spec.head_dim for rope in spec.ropes):
        raise ModelError(
            f"{path}: rotary dims {[rope.rotary_dim for rope in spec.ropes]}: want even ones within a head"
        )
    if spec.moe and spec.moe.experts_per_token > spec.moe.num_experts:
        raise ModelError(f"{path}: {spec.moe.experts_per_token} experts per token, but only {spec.moe.num_experts}")


def _check_tensors(info: ModelInfo, tensors: Mapping[str, StoredTensor] | Mapping[str, GGUFTensor]) -> None:
    """Every parameter has its tensor, of the right shape, and every tensor a use."""
    spec = info.spec
    num_experts = spec.moe.num_experts if spec.moe else 0
    wanted = parameters(spec)
    used = set()
    for parameter, source in locate_sources(info, tensors.keys()).items():
        shape = source.stored_shape(wanted[parameter].shape, num_experts)
        if source.name not in tensors:
            raise ModelError(f"{info.path}: tensor {source.name} is missing (its shape would be {shape})")
        tensor = tensors[source.name]
        if tensor.shape != shape:
            raise ModelError(f"{info.path}: tensor {source.name} has shape {tensor.shape}, the config says {shape}")
        if isinstance(tensor, StoredTensor) and tensor.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ModelError(f"{info.path}: tensor {source.name} has dtype {tensor.dtype} (known: {known})")
        used.add(source.name)
    ignored = FAMILIES[spec.family].ignored
    extra = [name for name in tensors if name not in used and not any(re.search(p, name) for p in ignored)]
    if spec.tie_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]  # a copy of the embeddings
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ModelError(f"{info.path}: tensor {extra[0]}{more} has no place in a {spec.family} model of this config")


def _dtype(tensors: Mapping[str, StoredTensor] | Mapping[str, GGUFTensor]) -> Dtype:
    """The dtype most of the checkpoint's numbers have. Quantized ones count as bfloat16, which any of them fits."""
    sizes: Counter[Dtype] = Counter()
    for tensor in tensors.values():
        stored = tensor.dtype if isinstance(tensor, StoredTensor) else tensor.type
        sizes[_DTYPES.get(stored, "bfloat16")] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _token_ids(*found: Any) -> tuple[int, ...]:
    """Ids given as an int, a list of them, or None; each once, in order."""
    ids = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    return tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))
