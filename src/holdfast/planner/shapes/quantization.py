"""How many bits a checkpoint gives its weights, from what `quantization_config` says.

Formats: FP8 with a scale per tensor, channel or block; MXFP4 (OCP Microscaling 1.0: 4 bits, one byte per 32); NVFP4
(4 bits, one byte per 16); integers in groups (compressed-tensors, GPTQ, AWQ); bitsandbytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from holdfast.core.errors import ModelError
from holdfast.models.config import Config
from holdfast.planner.shapes.shape import Matrix, ModelShape

_MXFP4 = 4 + 8 / 32
_NVFP4 = 4 + 8 / 16


def with_stored_bits(shape: ModelShape, checkpoint: Config) -> ModelShape:
    """`shape` with the bits per weight that the `quantization_config` of its checkpoint says. Raises `ModelError` for
    a method that is not known."""
    config = Config(f"{checkpoint.path}: quantization_config", checkpoint.mapping("quantization_config").values)
    if not config.values:
        return shape
    bits, left_out = _bits(config), _left_out(config)
    plain = _average(shape, bits, left_out, shape.num_layers // 2)
    routed = 16.0 if _matches(left_out, f"model.layers.{shape.num_layers // 2}.mlp.experts.0.down_proj") else bits
    if checkpoint.values.get("expert_dtype") == "fp4":  # DeepSeek V4's word for experts in another format
        routed = _MXFP4
    return replace(shape, weight_bits=plain, expert_bits=routed)


def _average(shape: ModelShape, bits: float, left_out: Sequence[str], layer: int) -> float:
    """Over the plain matrices, of which some may be left in 16 bits."""
    kept = {
        part: _matches(left_out, f"model.layers.{layer}.{part}")
        for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.shared_experts.gate_proj")
    }
    total = stored = 0.0
    for one, count in shape.kinds:
        for matrix in one.matrices:
            numbers = matrix.params * count
            total += numbers
            stored += numbers * (16 if kept[_part(matrix)] or matrix.name == "router" else bits)
    # routers stay in 16 bits in most checkpoints; they are small, and a round number is worth more than their share
    return stored / total if any(kept.values()) and total else bits


def _part(matrix: Matrix) -> str:
    """What a checkpoint would call the module of a matrix, roughly."""
    if matrix.name.startswith("shared "):
        return "mlp.shared_experts.gate_proj"
    return "mlp.gate_proj" if matrix.name in {"gate_up", "up", "down", "router"} else "self_attn.q_proj"


def _bits(config: Config) -> float:
    method = str(config.values.get("quant_method") or ("modelopt" if config.has("quant_algo") else None))
    if method == "fp8":
        block = config.sequence("weight_block_size", int)
        return 8 + (32 / (block[0] * block[1]) if len(block) == 2 and min(block) > 0 else 0)
    if method == "mxfp4":
        return _MXFP4
    if method in {"fbgemm_fp8", "quark_fp8"}:
        return 8
    if method in {"gptq", "awq"}:  # groups with a scale of 16 bits and a zero point of as many bits as a code
        codes, group = config.integer("bits"), _group_size(config)
        return codes + ((16 + codes) / group if group else 0)
    if method == "bitsandbytes":  # 4 bits: a scale of 32 bits per 64, or of 8 where the scales are quantized again
        if config.flag("load_in_4bit", False):
            return 4 + (8 if config.flag("bnb_4bit_use_double_quant", False) else 32) / 64
        return 8
    if method in {"compressed-tensors", "modelopt"}:
        return _grouped_bits(config)
    raise ModelError(f"{config.path}: not supported: quant_method {method!r}")


def _grouped_bits(config: Config) -> float:
    """compressed-tensors and ModelOpt: what the first group of modules says of its weights, or the algorithm."""
    algorithm = str(config.values.get("quant_algo", "")).upper()
    groups = list(config.mapping("config_groups").values.values())
    if not groups:
        known = {
            "FP8": 8.0,
            "FP8_PB_WO": 8 + 32 / 128**2,
            "NVFP4": _NVFP4,
            "MXFP4": _MXFP4,
            "W4A16_AWQ": 4 + 16 / 128,
        }
        if algorithm not in known:
            raise ModelError(f"{config.path}: not supported: quant_algo {algorithm!r} (known: {', '.join(known)})")
        return known[algorithm]
    first = groups[0] if isinstance(groups[0], dict) else {}
    weights = Config(f"{config.path}: weights", first.get("weights") or {})
    codes, group = weights.integer("num_bits"), _group_size(weights)
    scale = 8 if weights.values.get("type") == "float" and codes == 4 else 16
    return codes + (scale / group if group else 0)


def _group_size(config: Config) -> int:
    """Weights that share a scale; 0 where it is a whole row's or more, which is next to nothing (also written -1)."""
    return (
        0 if config.values.get("group_size") == -1 or not config.has("group_size") else config.integer("group_size")
    )


def _left_out(config: Config) -> list[str]:
    found: list[str] = []
    for name in ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers"):
        found += config.sequence(name, str)
    return found


def _matches(patterns: Sequence[str], module: str) -> bool:
    """Whether a list of modules names this one: by a regular expression ("re:…"), with *, as a whole name or the
    beginning of one, or as one of its parts."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                if re.match(pattern[3:], module):
                    return True
            except re.error as error:
                raise ModelError(f"quantization_config: {pattern!r} is no regular expression: {error}") from error
        elif fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*") or pattern in module.split("."):
            return True
    return False
