"""From a published config.json to a `ModelShape`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from holdfast.core.errors import ModelError
from holdfast.core.spec import DecoderSpec
from holdfast.models.config import Config, hf_config
from holdfast.models.families import FAMILIES
from holdfast.planner.shapes import families, latent, states
from holdfast.planner.shapes.quantization import with_stored_bits
from holdfast.planner.shapes.shape import ModelShape, shape_of_spec
from holdfast.planner.shapes.towers import tower_params

_SERVED: Mapping[str, str] = MappingProxyType(
    {name: name for name in FAMILIES}
    | {
        "mimo": "qwen2",
        "phi3": "mistral",
        "qwen3_vl_text": "qwen3",
        "qwen3_vl_moe_text": "qwen3_moe",
    }
)
"""`model_type` of a decoder → the family of the runtime that has its shape."""

_OTHERS: Mapping[str, Callable[[Config], ModelShape]] = MappingProxyType(
    {
        "deepseek_ref": latent.deepseek_v4,
        "deepseek_v2": latent.deepseek,
        "deepseek_v3": latent.deepseek,
        "deepseek_v32": latent.deepseek,
        "deepseek_v4": latent.deepseek_v4,
        "gemma2": families.gemma2,
        "gemma4_text": families.gemma4,
        "glm_moe_dsa": latent.deepseek,
        "gpt_oss": families.gpt_oss,
        "grok-1": families.grok1,
        "kimi_k2": latent.deepseek,
        "kimi_linear": states.kimi_linear,
        "llama4_text": families.llama4,
        "mimo_v2_flash": families.mimo_v2,
        "minimax_m2": families.minimax_m2,
        "minimax_m3": families.minimax_m3,
        "mllama_text_model": families.mllama,
        "nemotron-nas": families.nemotron_nas,
        "nemotron_h": states.nemotron_h,
        "opt": families.opt,
        "qwen3_5_moe_text": states.qwen3_5,
        "qwen3_5_text": states.qwen3_5,
        "qwen3_next": states.qwen3_5,
        "step3p7": families.step3,
    }
)
_MOST_LAYERS = 10_000
_POSITIONS = ("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor")


def shape_of_config(config: Mapping[str, Any], name: str = "") -> ModelShape:
    """The shape of the decoder that a config.json describes; a text model's, or one with an encoder of images.

    Raises `ModelError` for a field that is missing or makes no sense, and "not supported: …" for an architecture
    some part of which is not known here.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):  # what the outer level says of the weights holds for the decoder
        outer = {key: config[key] for key in ("quantization_config", "tie_word_embeddings") if key in config}
        shape = shape_of_config({**outer, **text}, name or str(config.get("model_type", "")))
        return replace(shape, tower_params=tower_params(config, name))
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or (model_type not in _SERVED and model_type not in _OTHERS):
        raise ModelError(f"{name or 'config.json'}: not supported: model_type {model_type!r}")
    checked = hf_config(name or model_type, _without_positions(config))
    if checked.has("num_hidden_layers") and checked.integer("num_hidden_layers") > _MOST_LAYERS:
        # a slip of the pen must not make a tuple of a billion layers
        raise ModelError(
            f"{checked.path}: num_hidden_layers {checked.values['num_hidden_layers']}: at most {_MOST_LAYERS}"
        )
    if model_type in _OTHERS:
        shape = _OTHERS[model_type](checked)
    else:
        shape = shape_of_spec(FAMILIES[_SERVED[model_type]].spec(checked))
    if config.get("tower_params"):
        shape = replace(shape, tower_params=checked.integer("tower_params"))
    _check_fit(shape, checked.path)
    return with_stored_bits(replace(shape, name=checked.path), Config(checked.path, config))


def spec_of_config(config: Mapping[str, Any], name: str = "") -> DecoderSpec:
    """The decoder of a config.json that the runtime serves. Raises `ModelError` for one that it does not."""
    family = _SERVED.get(str(config.get("model_type")))
    if family is None or family != config.get("model_type"):
        raise ModelError(f"{name or 'config.json'}: Holdfast does not serve model_type {config.get('model_type')!r}")
    return FAMILIES[family].spec(hf_config(name or family, dict(config)))


def _without_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are rotated makes no number more; only YaRN is kept, which stretches the context."""
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    stretched = isinstance(rope, Mapping) and "yarn" in (rope.get("rope_type"), rope.get("type"))
    return values if stretched else {key: value for key, value in values.items() if key not in _POSITIONS}


def _check_fit(shape: ModelShape, path: str) -> None:
    """Heads and experts fit together, as `models.inspect` asks of what is served."""
    for layer, _ in shape.kinds:
        attention, experts = layer.attention, layer.experts
        if attention and attention.kind == "softmax" and attention.num_heads % attention.num_kv_heads:
            raise ModelError(
                f"{path}: {attention.num_heads} query heads cannot share {attention.num_kv_heads} KV heads evenly"
            )
        if experts and experts.num_chosen > experts.num_experts:
            raise ModelError(f"{path}: {experts.num_chosen} experts per token, but only {experts.num_experts}")
