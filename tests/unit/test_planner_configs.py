"""Shapes of published configs: against transformers' own modules, number by number, and against published figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from holdfast.core.errors import ModelError
from holdfast.planner.shapes.configs import shape_of_config

CONFIGS = Path(__file__).parents[2].parent / "shared" / "data" / "configs"

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 20, "num_experts": 7, "num_experts_per_tok": 3}
MLA = {
    "num_key_value_heads": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
INDEXER = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 3}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention", "linear_attention"],
}
MAMBA = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 5,
    "conv_kernel": 4,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
}
TINY: dict[str, dict[str, Any]] = {
    "deepseek_v2": MLA | {"model_type": "deepseek_v2", "topk_method": "greedy"},
    "deepseek_v2, queries not compressed": MLA | {"model_type": "deepseek_v2", "q_lora_rank": None},
    "deepseek_v3": MLA | {"model_type": "deepseek_v3"},
    "deepseek_v32": MLA | INDEXER | {"model_type": "deepseek_v32"},
    "glm_moe_dsa, indexers shared": MLA
    | INDEXER
    | {
        "model_type": "glm_moe_dsa",
        "qk_head_dim": 20,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
        "indexer_types": ["full", "full", "shared", "shared", "full"],
    },
    "deepseek_v4": INDEXER
    | {
        "model_type": "deepseek_v4",
        "num_key_value_heads": 1,
        "head_dim": 128,
        "q_lora_rank": 24,
        "o_lora_rank": 10,
        "o_groups": 3,
        "intermediate_size": 20,
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "num_hash_layers": 1,
        "hc_mult": 4,
        "sliding_window": 8,
        "qk_rope_head_dim": 8,
        "compress_ratios": [0, 4, 128, 4, 128],
    },
    "gemma2": {"model_type": "gemma2", "sliding_window": 8, "layer_types": HYBRID},
    "gemma4_text": {
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "num_experts": 7,
        "top_k_experts": 3,
        "moe_intermediate_size": 20,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 0,
        "sliding_window": 8,
        "layer_types": HYBRID,
        "vocab_size_per_layer_input": 97,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": HYBRID,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 72,
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
    },
    "minimax_m2": {"model_type": "minimax_m2", "num_local_experts": 6, "num_experts_per_tok": 2},
    "mimo_v2_flash": {
        "model_type": "mimo_v2_flash",
        "num_attention_heads": 8,
        "v_head_dim": 6,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 8,
        "swa_v_head_dim": 6,
        "hybrid_layer_pattern": [0, 1, 1, 1, 1],
        "moe_layer_freq": [0, 1, 1, 1, 1],
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": 8,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 8},
    "opt, narrow embeddings, norms after": {
        "model_type": "opt",
        "ffn_dim": 56,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "qwen3_5_text": DELTA_NET | {"model_type": "qwen3_5_text"},
    "qwen3_5_moe_text": DELTA_NET
    | EXPERTS
    | {"model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 12},
    "qwen3_next": DELTA_NET
    | EXPERTS
    | {"model_type": "qwen3_next", "shared_expert_intermediate_size": 12, "mlp_only_layers": []},
    "nemotron_h": MAMBA | {"model_type": "nemotron_h"},
    "nemotron_h, latent experts": MAMBA | {"model_type": "nemotron_h", "moe_latent_size": 16},
    "kimi_linear": MLA
    | {
        "model_type": "kimi_linear",
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_shared_experts": 2,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3, 5],
            "head_dim": 10,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    },
}


@pytest.mark.parametrize("name", TINY)
def test_a_shape_counts_the_numbers_of_the_published_code(name: str):
    """A matrix forgotten or counted twice shows at any size."""
    config = COMMON | TINY[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert shape_of_config(config).params == sum(parameter.numel() for parameter in model.parameters())


def test_a_tower_counts_the_numbers_of_the_published_code():
    text = COMMON | {"tie_word_embeddings": False}
    vision = {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 9,
        "out_hidden_size": 48,
        "deepstack_visual_indexes": [0, 2],
    }
    config = {
        "model_type": "qwen3_vl",
        "text_config": text | {"model_type": "qwen3_vl_text"},
        "vision_config": vision,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    shape = shape_of_config(config)
    assert shape.params + shape.tower_params == sum(parameter.numel() for parameter in model.parameters())


def test_latent_attention_caches_one_vector_and_an_index_key():
    """DeepSeek V3.2's own figures: 512 + 64 numbers per token and layer, and 128 for its indexer."""
    shape = shape_of_config(COMMON | TINY["glm_moe_dsa, indexers shared"])
    cached = [layer.attention and layer.attention.kv_numbers_per_token() for layer in shape.layers]
    assert cached == [24 + 16, 24 + 16, 24, 24, 24 + 16]


def test_states_do_not_grow_with_the_context():
    shape = shape_of_config(COMMON | TINY["nemotron_h"])
    state = 4 * 6 * 5 + (24 + 2 * 2 * 5) * 3
    assert shape.kv_numbers(0) == 2 * state
    assert shape.kv_numbers(100) == 2 * state + 100 * 2 * 2 * 8


MODEL_CARD = "model card"
PUBLISHED = {
    "BLOOM-176B": ("176.247B", "arXiv:2211.05100, table 3"),
    "DeepSeek-R1": ("671B", "arXiv:2412.19437, without the MTP layer"),
    "DeepSeek-V3": ("671B", "arXiv:2412.19437, without the MTP layer"),
    "DeepSeek-V4-Flash": ("284B", MODEL_CARD),
    "DeepSeek-V4-Flash-FP8": ("284B", MODEL_CARD),
    "DeepSeek-V4-Pro": ("1.6T", MODEL_CARD),
    "DeepSeek-V4-Pro-FP8": ("1.6T", MODEL_CARD),
    "Falcon-180B": ("180B", "arXiv:2311.16867"),
    "GLM-5": ("744B", "GLM-5 technical report, without the MTP layer"),
    "GLM-5-FP8": ("744B", "GLM-5 technical report"),
    "GLM-5.1": ("744B", MODEL_CARD),
    "GLM-5.1-FP8": ("744B", MODEL_CARD),
    "GLM-5.2": ("744B", MODEL_CARD),
    "GLM-5.2-FP8": ("744B", MODEL_CARD),
    "Grok-1": ("314B", "xai-org/grok-1, README"),
    "Llama-3_3-Nemotron-Super-49B-v1": ("49.9B", "the hub's count of the checkpoint"),
    "Llama-4-Maverick-17B-128E-Instruct": ("400B", MODEL_CARD),
    "Meta-Llama-3.1-405B": ("405.9B", "the hub's count of the checkpoint"),
    "Meta-Llama-3.1-70B": ("70.6B", "the hub's count of the checkpoint"),
    "Llama-3.1-70B-Instruct-FP8": ("70.6B", "the hub's count of the checkpoint"),
    "Meta-Llama-3.1-8B": ("8.03B", "the hub's count of the checkpoint"),
    "MiMo-V2-Flash": ("309B", MODEL_CARD),
    "MiniMax-M2.5": ("229B", "the hub's count of the checkpoint"),
    "MiniMax-M2.7": ("229B", "the hub's count of the checkpoint"),
    "Mixtral-8x22B-v0.1": ("141B", "mistral.ai, Cheaper, Better, Faster, Stronger, 2024"),
    "Mixtral-8x7B-v0.1": ("46.7B", "mistral.ai, Mixtral of experts, 2023"),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("31.6B", "research.nvidia.com, NVIDIA Nemotron 3"),
    "NVIDIA-Nemotron-3-Super-120B-A12B-FP8": ("120B", "Nemotron 3 Super technical report"),
    "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": ("550B", "Nemotron 3 Ultra technical report"),
    "NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8": ("550B", "Nemotron 3 Ultra technical report"),
    "Nemotron-H-56B-Base-8K": ("56B", "arXiv:2504.03624"),
    "OPT-175B": ("175B", "arXiv:2205.01068"),
    "Qwen3-0.6B": ("0.6B", "arXiv:2505.09388"),
    "Qwen3-1.7B": ("1.7B", "arXiv:2505.09388"),
    "Qwen3-8B": ("8.2B", MODEL_CARD),
    "Qwen3-32B": ("32.8B", MODEL_CARD),
    "Qwen3-32B-FP8": ("32.8B", MODEL_CARD),
    "Qwen3-32B-FP8-Static-PerTensor": ("32.8B", MODEL_CARD),
    "Qwen3-30B-A3B": ("30.5B", MODEL_CARD),
    "Qwen3-30B-A3B-FP8": ("30.5B", MODEL_CARD),
    "Qwen3-235B-A22B": ("235B", MODEL_CARD),
    "Qwen3-235B-A22B-FP8": ("235B", MODEL_CARD),
    "Qwen3-Coder-480B-A35B-Instruct": ("480B", MODEL_CARD),
    "Qwen3-VL-235B-A22B-Instruct": ("235B", MODEL_CARD),
    "Qwen3.5-122B-A10B": ("122B", MODEL_CARD),
    "Qwen3.5-27B": ("27B", MODEL_CARD),
    "Qwen3.5-35B-A3B": ("35B", MODEL_CARD),
    "Qwen3.5-397B-A17B": ("397B", MODEL_CARD),
    "Step-3.7-Flash": ("196B", f"{MODEL_CARD} of Step 3.5 Flash, of the same decoder"),
    "Step-3.7-Flash-FP8": ("196B", f"{MODEL_CARD} of Step 3.5 Flash, of the same decoder"),
    "gemma-4-26B-A4B": ("25.2B", f"{MODEL_CARD}, without the tower"),
    "gpt-oss-120b": ("116.83B", "arXiv:2508.10925, table 1"),
    "gpt-oss-20b": ("20.91B", "arXiv:2508.10925, table 1"),
}
"""Figures as they are printed: total parameters of the decoder unless the source says more."""

ACTIVE = {
    "DeepSeek-V3": "37B",
    "DeepSeek-V4-Flash": "13B",
    "DeepSeek-V4-Pro": "49B",
    "GLM-5.2": "40B",
    "Kimi-K2-Instruct": "32B",
    "MiMo-V2-Flash": "15B",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "3.2B",
    "NVIDIA-Nemotron-3-Super-120B-A12B-FP8": "12B",
    "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": "55B",
    "gpt-oss-120b": "5.13B",
    "gpt-oss-20b": "3.61B",
}
"""Parameters per token where the source says so (same sources), the embedding table not counted."""

COUNTED = {
    "DeepSeek-V3.2": 671_877_929_216,
    "Kimi-K2-Instruct": 1_026_408_209_408,
    "Kimi-K2.5": 1_026_408_209_408,
    "MiniMax-M3": 426_174_565_632,
    "Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
    "Qwen3-VL-32B-Instruct": 33_357_390_064,
    "Qwen3-VL-32B-Thinking": 33_357_390_064,
    "Llama-4-Scout-17B-16E-Instruct": 107_769_861_120,
    "MiMo-7B-Base": 7_622_619_136,
}
"""Where only a rounded name is published: what the modules of transformers 5.23 hold, made of that config on the meta
device. Towers of Qwen3-VL are included, Llama 4's is not (its card's 109B count 0.87B of it). MiMo-7B has no module
there: Qwen2's, which it is but for its MTP layer. Kimi K2's report says 1.04T, which its config does not give."""

REFUSED = {"Kimi-K3": "routed_expert_hidden_size 3584"}


def number(text: str) -> tuple[float, float]:
    """A printed figure, and how far off it may be: 1 %, or half of its last digit."""
    digits, unit = text[:-1], {"B": 1e9, "T": 1e12}[text[-1]]
    places = len(digits.partition(".")[2])
    value = float(digits) * unit
    return value, max(0.01 * value, 0.5 * 10**-places * unit)


def config_files() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


@pytest.mark.skipif(not CONFIGS.exists(), reason=f"{CONFIGS} is not there")
@pytest.mark.parametrize("name", config_files())
def test_published_models_have_their_published_size(name: str):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    if name in REFUSED:
        with pytest.raises(ModelError, match=f"not supported: {REFUSED[name]}"):
            shape_of_config(config, name)
        return
    shape = shape_of_config(config, name)
    if name in COUNTED:
        assert shape.params + shape.tower_params == COUNTED[name]
    else:
        value, off = number(PUBLISHED[name][0])
        assert shape.params == pytest.approx(value, abs=off)
    if name in ACTIVE:
        value, off = number(ACTIVE[name])
        assert shape.active_params == pytest.approx(value, abs=off)


@pytest.mark.skipif(not CONFIGS.exists(), reason=f"{CONFIGS} is not there")
def test_the_cache_of_a_million_tokens_is_as_published():
    """9.62 GiB in bf16 for DeepSeek V4 Pro, 8.7 times less than V3.2's (news on its release, April 2026)."""
    pro, v32 = (
        shape_of_config(json.loads((CONFIGS / f"{name}.json").read_text())).kv_numbers(2**20) * 2 / 2**30
        for name in ("DeepSeek-V4-Pro", "DeepSeek-V3.2")
    )
    assert pro == pytest.approx(9.62, abs=0.02)
    assert v32 / pro == pytest.approx(8.7, abs=0.05)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "not supported: model_type None"),
        ({"model_type": ["llama"]}, "not supported: model_type"),
        ({"model_type": "rwkv"}, "not supported: model_type 'rwkv'"),
        ({"model_type": "llama"}, "is missing"),
        ({"model_type": "gpt_oss", **COMMON}, "is missing"),
        ({"model_type": "llama", **COMMON, "num_hidden_layers": 10**9}, "at most 10000"),
        ({"model_type": "llama", **COMMON, "hidden_size": "big"}, "hidden_size 'big' has the wrong type"),
        ({"model_type": "minimax_m2", **COMMON, "num_local_experts": 2, "num_experts_per_tok": 3}, "only 2"),
        ({"model_type": "qwen3", **COMMON, "num_key_value_heads": 4}, "6 query heads cannot share 4 KV heads"),
        ({"model_type": "llama", **COMMON, "quantization_config": [4]}, "quantization_config"),
        ({"model_type": "gemma2", **COMMON, "layer_types": ["full_attention"]}, "wants 5 of"),
        ({"model_type": "nemotron_h", **COMMON, "hybrid_override_pattern": "M?"}, "hybrid_override_pattern"),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "no"}}, "not supported: model_type 'no'"),
        ({"model_type": "llama", **COMMON, "quantization_config": {"quant_method": "hqq"}}, "not supported: quant"),
    ],
)
def test_what_is_not_known_is_refused_by_name(config: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        shape_of_config(config)


INT4 = {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}
QUANTIZED = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2, 8 + 32 / 128**2),
    ({"quant_method": "fp8"}, 8, 8),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, None, 4.25),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128, 4 + 20 / 128),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, 4.5),
    ({"quant_algo": "NVFP4"}, 4.5, 4.5),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": INT4},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        },
        16,
        4.5,
    ),
]


@pytest.mark.parametrize(("quantization", "plain", "experts"), QUANTIZED)
def test_bits_of_quantized_weights(quantization: dict[str, Any], plain: float | None, experts: float):
    config = COMMON | EXPERTS | {"model_type": "qwen3_moe", "mlp_only_layers": [0]}
    shape = shape_of_config(config | {"quantization_config": quantization})
    assert shape.expert_bits == experts
    if plain is not None:
        assert shape.weight_bits == plain
        return
    # attention, and routers, are left as they were, the one MLP is not: the average of both
    attention = 5 * (48 * 80 + 48 * 48) + 4 * 48 * 7
    dense = 3 * 48 * 56
    assert shape.weight_bits == pytest.approx((16 * attention + 4.25 * dense) / (attention + dense))


def test_weight_bytes_are_matrices_in_their_format_and_the_rest_in_16_bits():
    config = COMMON | {"model_type": "llama"}
    shape = shape_of_config(config | {"quantization_config": {"quant_method": "fp8"}})
    matrices = sum(matrix.params for layer in shape.layers for matrix in layer.matrices)
    assert shape.weight_bytes == matrices + 2 * (shape.params - matrices)
    assert math.isclose(shape_of_config(config).weight_bytes, 2 * shape.params)
