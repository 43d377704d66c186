"""Encoders of images that stand beside a decoder: their weights take memory on the devices that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.models.config import Config

_QWEN = frozenset({"qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"})


def tower_params(config: Mapping[str, Any], name: str = "") -> int:
    """Numbers of the encoder beside the `text_config` of a config.json; 0 where its kind is not known here."""
    vision = config.get("vision_config")
    if str(config.get("model_type")) not in _QWEN or not isinstance(vision, Mapping):
        return 0
    return _qwen_tower(Config(f"{name or 'config.json'}: vision_config", vision))


def _qwen_tower(config: Config) -> int:
    """Qwen3-VL's: patches of two frames, learned positions, plain blocks with LayerNorms and biases, and mergers of
    2 × 2 patches, one at the end and one after each layer that the decoder's first layers look at."""
    width, columns = config.integer("hidden_size"), config.integer("intermediate_size")
    patch = config.integer("in_channels") * config.integer("temporal_patch_size") * config.integer("patch_size") ** 2
    merged = width * config.integer("spatial_merge_size") ** 2
    embeddings = (patch + 1) * width + config.integer("num_position_embeddings") * width
    block = 4 * width * (width + 1) + 2 * width * columns + columns + width + 4 * width
    merger = merged * (merged + 1) + (merged + 1) * config.integer("out_hidden_size")
    num_deep = len(config.sequence("deepstack_visual_indexes", int))
    # the last merger norms patches before they are merged, the others after
    norms = 2 * width + num_deep * 2 * merged
    return embeddings + config.integer("depth") * block + (1 + num_deep) * merger + norms
