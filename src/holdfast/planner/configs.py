"""From a published config.json to a `ModelShape`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from holdfast.core.errors import ModelError
from holdfast.models.config import Config, hf_config
from holdfast.models.families import FAMILIES
from holdfast.planner.shape import ModelShape, shape_of_spec

_KIN: Mapping[str, str] = MappingProxyType(
    {
        "mimo": "qwen2",
        "qwen3_vl_text": "qwen3",
        "qwen3_vl_moe_text": "qwen3_moe",
    }
)
"""`model_type` of a decoder that is shaped as one of the runtime's families → that family."""


def shape_of_config(config: Mapping[str, Any], name: str = "") -> ModelShape:
    """The shape of the decoder that a config.json describes.

    Raises `ModelError` for a field that is missing or makes no sense, and "not supported: …" for an architecture
    whose parts are not known here.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):  # a decoder with an encoder of images: what the outer level says of weights holds
        outer = {key: value for key, value in config.items() if key in ("quantization_config", "tie_word_embeddings")}
        return shape_of_config({**outer, **text}, name or str(config.get("model_type", "")))
    path = name or "config.json"
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    checked = hf_config(path, values)
    model_type = str(config.get("model_type"))
    family = _KIN.get(model_type, model_type)
    if family not in FAMILIES:
        raise ModelError(f"{path}: not supported: model_type {model_type!r}")
    _check_sizes(checked)
    return replace(shape_of_spec(FAMILIES[family].spec(checked)), name=name or model_type)


def _check_sizes(config: Config) -> None:
    """A typing slip must not make a tuple of a billion layers."""
    if config.integer("num_hidden_layers") > 10_000:
        raise ModelError(f"{config.path}: num_hidden_layers {config.integer('num_hidden_layers')}: at most 10000")
