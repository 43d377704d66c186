"""Which family an architecture's name stands for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from holdfast.models.families.bloom import BLOOM
from holdfast.models.families.falcon import FALCON
from holdfast.models.families.family import Family
from holdfast.models.families.gemma import GEMMA3
from holdfast.models.families.gpt2 import GPT2
from holdfast.models.families.llama import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE
from holdfast.models.families.opt import OPT

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": LLAMA,
        "mistral": MISTRAL,
        "mixtral": MIXTRAL,
        "qwen2": QWEN2,
        "qwen3": QWEN3,
        "qwen3_moe": QWEN3_MOE,
        "gemma3_text": GEMMA3,
        "gpt2": GPT2,
        "opt": OPT,
        "bloom": BLOOM,
        "falcon": FALCON,
    }
)
"""`model_type` of config.json, and `DecoderSpec.family` → family."""

GGUF_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "llama",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "qwen3moe": "qwen3_moe",
        "gemma3": "gemma3_text",
        "gpt2": "gpt2",
        "bloom": "bloom",
        "falcon": "falcon",
    }
)
"""`general.architecture` of a GGUF file → `model_type`. A "llama" with experts is a Mixtral."""
