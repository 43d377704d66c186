"""Models with random weights, made on the device: no checkpoint is read."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.core.plan import places
from holdfast.core.spec import DecoderSpec
from holdfast.kernels.interface import FP8_GROUP, Kernels, Matrix, Quantized
from holdfast.models.config import hf_config
from holdfast.models.decoder import Decoder
from holdfast.models.families.registry import FAMILIES
from holdfast.models.layers import Weights
from holdfast.models.parameters import packings, parameters
from holdfast.parallel.cuts import make_plan

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
"""Llama-3.1-8B's shape."""
SMALL = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
"""To try the benchmark itself."""


def make_decoder(
    config: dict[str, Any], kernels: Kernels[Any], device: torch.device, *, fp8: bool = False
) -> Decoder:
    """In bfloat16, or with the layers' matrices in FP8; norms of ones, matrices so small that the residual stream
    stays near 1."""
    spec = spec_of(config)
    wanted = parameters(spec)

    def draw(name: str) -> Matrix:
        numbers = torch.randn(wanted[name].shape, dtype=torch.bfloat16, device=device)
        return to_fp8(numbers, 0.02) if fp8 and name.startswith("layers.") else numbers * 0.02

    packed = {
        name: kernels.pack(
            [draw(f"{module}.weight") for module in packing.modules],
            activation=packing.activation,
            gated=packing.gated,
            shards=packing.shards,
        )
        for name, packing in packings(spec).items()
    }
    norms = {name: torch.ones(p.shape, device=device) for name, p in wanted.items() if p.norm}
    place = places(make_plan(spec).replicas[0])[0]
    return Decoder(Weights(spec, kernels, torch.bfloat16, device, packed, norms, place))


def to_fp8(numbers: torch.Tensor, scale: float) -> Quantized:
    """Numbers [N, K] near 1, times `scale`."""
    rows, columns = numbers.shape
    scales = torch.full((rows, -(-columns // FP8_GROUP)), scale, device=numbers.device)
    return Quantized("FP8", numbers.to(torch.float8_e4m3fn).view(torch.uint8), scales)


def spec_of(config: dict[str, Any]) -> DecoderSpec:
    return FAMILIES[config["model_type"]].spec(hf_config("config.json", config))
