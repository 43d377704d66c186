"""The GGUF file that llama.cpp's converter would make of a tiny checkpoint, written with the `gguf` package.

Tensor names come from the package's own maps, so they check ours. What the converter does to the numbers
is done here: rotary rows of the "llama" architecture permuted, fused q-k-v split apart, experts stacked, Gemma's
norms raised by 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "bloom": gguf.MODEL_ARCH.BLOOM,
    "falcon": gguf.MODEL_ARCH.FALCON,
}


def write_twin(
    config: Any, folder: Path, path: Path, *, kind: str = "F32", exceptions: Mapping[str, str] | None = None
) -> str:
    """The checkpoint saved in `folder`, whose transformers config is given, as a GGUF file with matrices of a type
    that `gguf` can quantize to; `exceptions`: another type for tensors with this in their name."""
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_metadata(writer, config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in _converted(config, load_file(folder / "model.safetensors")).items():
        if config.model_type == "bloom":
            name = name.removeprefix("transformer.")  # noqa: PLW2901 - as the converter does
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        data = tensor.contiguous().numpy()
        kinds = [other for part, other in (exceptions or {}).items() if part in mapped]
        quant = gguf.GGMLQuantizationType[kinds[0] if kinds else kind]
        if tensor.dim() > 1:
            writer.add_tensor(mapped, gguf.quants.quantize(data, quant), raw_dtype=quant)
        else:
            writer.add_tensor(mapped, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _write_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    num_heads = config.num_attention_heads
    plain = config.model_type in ("gpt2", "bloom", "falcon")
    writer.add_context_length(getattr(config, "max_position_embeddings", 2048))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(4 * config.hidden_size if plain else config.intermediate_size)
    writer.add_head_count(num_heads)
    writer.add_eos_token_id(2)
    if config.model_type == "falcon":
        writer.add_head_count_kv(_falcon_groups(config))
    elif config.model_type not in ("gpt2", "bloom"):
        writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    head_dim = getattr(config, "head_dim", None)
    if head_dim and config.model_type != "falcon":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = getattr(config, "rope_parameters", None)
    if rope:
        writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
        scaled = rope.get("full_attention") or rope
        if scaled["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(scaled["rope_type"]))
            writer.add_rope_scaling_factor(scaled["factor"])
        if scaled["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaled["original_max_position_embeddings"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _falcon_groups(config: Any) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


def _converted(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    experts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        if expert := re.search(r"\.experts\.(\d+)\.", name):
            stacked = name.replace(expert.group(0), ".experts.")
            experts.setdefault(stacked, []).append((int(expert.group(1)), tensor))
        else:
            out[name] = _convert(config, name, tensor)
    for name, parts in experts.items():
        out[name] = torch.stack([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
    if config.model_type == "llama" and config.rope_parameters["rope_type"] == "llama3":
        out["rope_freqs.weight"] = _llama3_divisors(config)
    return out


def _convert(config: Any, name: str, tensor: Tensor) -> Tensor:
    kind, heads = config.model_type, config.num_attention_heads
    if kind in ("llama", "mistral", "mixtral") and (match := re.search(r"\.([qk])_proj\.", name)):
        count = heads if match.group(1) == "q" else config.num_key_value_heads
        halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if kind == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
        return tensor.T
    if kind == "gemma3_text" and name.endswith("norm.weight"):
        return tensor + 1
    if "query_key_value" in name:
        groups = heads if kind == "bloom" else _falcon_groups(config)
        rows = tensor.reshape(groups, heads // groups + 2, -1, *tensor.shape[1:])
        parts = (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])
        return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])
    return tensor


def _llama3_divisors(config: Any) -> Tensor:
    """transformers' own llama3 frequencies as divisors of the plain ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dims = 2 * len(frequencies)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dims, 2) / dims)
    return plain / frequencies
