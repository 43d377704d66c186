"""A checkpoint's configuration under one set of names: transformers' `config.json` spelling.

GGUF metadata is translated into it, so that a family reads one kind of config whatever the file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from holdfast.core.errors import ModelError
from holdfast.core.spec import LayerSpec, RopeSpec
from holdfast.models.gguf_file import GGUFFile, read_floats

T = TypeVar("T")

# other spellings of the same thing: GPT-2, BLOOM and Falcon have their own, which win, as they do in transformers
_ALIASES = {
    "n_embd": "hidden_size",
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "seq_length": "max_position_embeddings",
    "n_head_kv": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_inner": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "ffn_dim": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "num_local_experts": "num_experts",
    "activation_function": "hidden_act",
    "activation": "hidden_act",
    "hidden_activation": "hidden_act",
}

# GGUF metadata key behind "<architecture>." → config.json key
_GGUF_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "value_head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.dimension_count": "rotary_dim",
}
# GGUF metadata that would change the logits if they were ignored → the value that changes nothing
_GGUF_NEUTRAL = {"attention.scale": 0.0, "rope.scale_linear": 1.0}
_MOST = 2**31 - 1
"""No count in a config is larger."""

FP8_BLOCK = 128
"""Rows and columns of an fp8 matrix that share a scale."""


@dataclass(frozen=True, slots=True)
class Config:
    """Typed access to the values; every complaint names the file, the field and the value."""

    path: str
    values: Mapping[str, Any]

    @property
    def is_gguf(self) -> bool:
        return self.path.endswith(".gguf")

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        value: int = self._get(name, int, default)
        if value < 1:
            raise ModelError(f"{self.path}: {name} {value}: must be at least 1")
        if value > _MOST:
            raise ModelError(f"{self.path}: {name} {value}: must be at most {_MOST}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = -math.inf) -> float:
        """A finite number larger than `above`."""
        value: int | float = self._get(name, (int, float), default)
        if not above < value < math.inf or abs(value) > sys.float_info.max:
            bound = "" if above == -math.inf else f" above {above:g}"
            raise ModelError(f"{self.path}: {name} {value}: must be a finite number{bound}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value: bool = self._get(name, bool, default)
        return value

    def mapping(self, name: str) -> Config:
        """An object inside the config; an empty one where there is none."""
        return Config(self.path, self._get(name, dict, {}))

    def sequence(self, name: str, of: type[T]) -> Sequence[T]:
        """A list whose items are all of one type; an empty one where there is none."""
        values: list[T] = self._get(name, list, [])
        if not all(type(value) is of for value in values):
            raise ModelError(f"{self.path}: {name} {values}: wants {of.__name__} only")
        return values

    def choice(self, name: str, options: Mapping[str, T], default: str | None = None) -> T:
        """`options[value]`; refuses a value that is not among them."""
        value = self._get(name, str, default)
        if value not in options:
            raise ModelError(f"{self.path}: {name} {value!r} is not supported (known: {', '.join(options)})")
        return options[value]

    def require(self, name: str, wanted: Any) -> None:
        """Refuse a switch whose other positions Holdfast does not implement. Absent means `wanted`."""
        value = self.values.get(name)
        if value is not None and value != wanted:
            raise ModelError(f"{self.path}: {name} {value!r} is not supported (only {wanted!r} is)")

    def _get(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.path}: {name} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelError(f"{self.path}: {name} {value!r} has the wrong type")
        return value


def hf_config(path: str, raw: Mapping[str, Any]) -> Config:
    """The values of a config.json, aliases resolved. Raises `ModelError` for what no family supports."""
    values = dict(raw)
    values |= {name: values[alias] for alias, name in _ALIASES.items() if alias in values}
    config = Config(path, values)
    if "text_config" in raw:
        raise ModelError(f"{path}: text_config: multimodal models ({raw.get('architectures')}) are not supported")
    quantization = Config(f"{path}: quantization_config", config.mapping("quantization_config").values)
    if quantization.values:
        quantization.require("quant_method", "fp8")
        quantization.require("fmt", "e4m3")
        if quantization.sequence("weight_block_size", int) != [FP8_BLOCK, FP8_BLOCK]:
            raise ModelError(f"{quantization.path}: only weight_block_size {[FP8_BLOCK] * 2} is supported")
    config.require("is_encoder_decoder", False)
    return config


def gguf_config(header: GGUFFile) -> Config:
    """GGUF metadata as a config; what the metadata need not say is read off the tensor directory."""
    path, metadata, tensors = header.path, header.metadata, header.tensors
    arch = metadata["general.architecture"]
    values: dict[str, Any] = {
        name: metadata[f"{arch}.{key}"] for key, name in _GGUF_KEYS.items() if f"{arch}.{key}" in metadata
    }
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{path}: tensor token_embd.weight is missing")
    values["vocab_size"] = tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    values["num_ln_in_parallel_attn"] = 2 if "blk.0.attn_norm_2.weight" in tensors else 1
    if "rope_freqs.weight" in tensors:
        values["rope_frequency_divisors"] = read_floats(header, "rope_freqs.weight")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        per_layer = values.get(name)
        if isinstance(per_layer, list):  # one number per layer
            if len(set(per_layer)) != 1:
                raise ModelError(f"{path}: {name} {per_layer}: layers of different sizes are not supported")
            values[name] = per_layer[0]
    if values.get("value_head_dim") != values.get("head_dim"):
        raise ModelError(f"{path}: {arch}.attention.value_length differs from key_length, which is not supported")
    for key, neutral in _GGUF_NEUTRAL.items():
        if metadata.get(f"{arch}.{key}", neutral) != neutral:
            raise ModelError(f"{path}: {arch}.{key} {metadata[f'{arch}.{key}']} is not supported")
    config = Config(path, values)
    if "rotary_dim" in values:
        values["partial_rotary_factor"] = config.integer("rotary_dim") / head_size(config)
    prefix = f"{arch}.rope.scaling."
    scaling = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if scaling.get("type", "none") != "none":
        values["rope_scaling"] = _gguf_rope_scaling(path, prefix, scaling)
    return config


def _gguf_rope_scaling(path: str, prefix: str, scaling: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "type": "rope_type",
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    neutral = {"finetuned": scaling.get("finetuned"), "attn_factor": 1.0, "yarn_log_multiplier": 0.0}
    for key, value in scaling.items():
        if key not in names and neutral.get(key) != value:
            raise ModelError(f"{path}: {prefix}{key} {value} is not supported")
    return {name: scaling[key] for key, name in names.items() if key in scaling}


def head_size(config: Config) -> int:
    """Dims per head: `head_dim`, or the hidden size shared out among the heads."""
    if config.has("head_dim"):
        return config.integer("head_dim")
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % num_heads:
        raise ModelError(f"{config.path}: hidden_size {hidden} cannot be shared by {num_heads} heads evenly")
    return hidden // num_heads


def layers_by_type(
    config: Config, known: Mapping[str, LayerSpec], default: Callable[[int], str]
) -> tuple[LayerSpec, ...]:
    """One layer per entry of `layer_types` (transformers 5); `default(index)` is its type where there is no list."""
    num_layers = config.integer("num_hidden_layers")
    kinds = config.sequence("layer_types", str) or [default(index) for index in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= set(known):
        raise ModelError(f"{config.path}: layer_types {kinds}: wants {num_layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def rope_spec(config: Config, head_dim: int) -> RopeSpec:
    """The one rotary embedding of a model, from `rope_parameters` (transformers 5) or `rope_theta` and
    `rope_scaling` (4)."""
    found = {"rope_theta": config.values.get("rope_theta")}
    found |= config.mapping("rope_scaling").values
    found |= config.mapping("rope_parameters").values
    rope = parse_rope(config, found, head_dim)
    divisors = tuple(config.values.get("rope_frequency_divisors") or ())
    if divisors and len(divisors) != rope.rotary_dim // 2:
        raise ModelError(f"{config.path}: {len(divisors)} rope frequencies for {rope.rotary_dim // 2} rotated pairs")
    if not all(0 < divisor < math.inf for divisor in divisors):
        raise ModelError(f"{config.path}: rope frequencies {divisors}: must be finite numbers above 0")
    return msgspec.structs.replace(rope, frequency_divisors=divisors)


def max_positions(config: Config, rope: RopeSpec) -> int:
    """Configs often keep the trained length in `max_position_embeddings` when YaRN is switched on."""
    stated = config.integer("max_position_embeddings")
    if rope.scaling != "yarn":
        return stated
    stretched = min(rope.original_max_positions * rope.factor, _MOST)
    return max(stated, int(stretched))


def parse_rope(config: Config, found: Mapping[str, Any], head_dim: int, *, theta: float = 10000.0) -> RopeSpec:
    """One dict of rope parameters as a `RopeSpec`; `theta` is the family's default. Raises `ModelError` for a type
    that is not supported, or a number that makes no sense."""
    rope = Config(config.path, found)
    for place in (config, rope):
        place.require("partial_rotary_factor", 1.0)  # no family here has another
    kind = found.get("rope_type") or found.get("type") or "default"
    common: dict[str, Any] = {"theta": rope.number("rope_theta", theta, above=1.0), "rotary_dim": head_dim}
    if kind in ("default", "none"):
        return RopeSpec(**common)
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelError(f"{config.path}: rope_type {kind!r} is not supported (known: default, linear, llama3, yarn)")
    common |= {"scaling": kind, "factor": rope.number("factor", above=0.0)}
    if kind == "linear":
        return RopeSpec(**common)
    common["original_max_positions"] = (
        rope.integer("original_max_position_embeddings")
        if rope.has("original_max_position_embeddings")
        else config.integer("max_position_embeddings")
    )
    if kind == "llama3":
        low = rope.number("low_freq_factor")
        return RopeSpec(**common, low_freq_factor=low, high_freq_factor=rope.number("high_freq_factor", above=low))
    return RopeSpec(
        **common,
        beta_fast=rope.number("beta_fast", 32.0, above=0.0),
        beta_slow=rope.number("beta_slow", 1.0, above=0.0),
        truncate=rope.flag("truncate", True),
        attention_factor=_yarn_temperature(rope, common["factor"]),
    )


def _yarn_temperature(rope: Config, factor: float) -> float:
    """What YaRN multiplies cos and sin with: sqrt(1/t) = 0.1 ln(factor) + 1 (arXiv:2309.00071, eq. 22),
    DeepSeek's quotient of two of them, or what the config states."""
    if rope.has("attention_factor"):
        return rope.number("attention_factor", above=0.0)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return temperature(rope.number("mscale", above=0.0)) / temperature(rope.number("mscale_all_dim", above=0.0))
    return temperature(1.0)
