"""Tiny configurations of every family: shapes and switches that real checkpoints have, chosen to differ."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
FALCON: dict[str, Any] = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 8}

CASES: dict[str, dict[str, Any]] = {
    "llama, grouped queries, llama3 rope": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": False,
    },
    "llama, multi-query, odd heads, biases, yarn rope, tied": {
        "model_type": "llama",
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": YARN,
        "tie_word_embeddings": True,
    },
    "llama, linear rope": {"model_type": "llama", "num_key_value_heads": 3, "rope_parameters": LINEAR},
    "llama, yarn with a stated temperature, untruncated": {
        "model_type": "llama",
        "rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
    },
    "mistral, window, wide heads": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": 7,
    },
    "mistral, no window": {"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": None},
    "qwen2, upper layers windowed": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2, tied": {"model_type": "qwen2", "num_key_value_heads": 3, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3, biases": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "gemma3, one KV head, soft-cap": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 9,
        "final_logit_softcapping": 3.0,
    },
    "gpt2": {"model_type": "gpt2", "n_inner": 72},
    "gpt2, untied": {"model_type": "gpt2", "tie_word_embeddings": False, "activation_function": "gelu"},
    "opt": {"model_type": "opt", "ffn_dim": 56, "word_embed_proj_dim": 48},
    "opt, norms after": {
        "model_type": "opt",
        "ffn_dim": 56,
        "word_embed_proj_dim": 48,
        "do_layer_norm_before": False,
    },
    "opt, no biases": {
        "model_type": "opt",
        "ffn_dim": 56,
        "word_embed_proj_dim": 48,
        "enable_bias": False,
        "activation_function": "gelu",
    },
    "bloom, heads not a power of two": {"model_type": "bloom"},
    "falcon 7b: multi-query": FALCON | {"multi_query": True},
    "falcon 40b: grouped, two norms": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon 11b: grouped, one norm": FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    "falcon rw: alibi, in sequence, biases": FALCON
    | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon, parallel, not multi-query": FALCON | {"multi_query": False, "bias": True, "ffn_hidden_size": 80},
    "mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral, window": {
        "model_type": "mixtral",
        "num_key_value_heads": 3,
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "sliding_window": 6,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "qwen3_moe, some layers dense": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
    },
}

WHOLE_GROUPS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
QUANTIZED: dict[str, dict[str, Any]] = {
    "whole groups: llama": WHOLE_GROUPS | {"model_type": "llama"},
    "whole groups: gemma3": WHOLE_GROUPS
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 9,
    },
    "whole groups: mixtral": WHOLE_GROUPS | {"model_type": "mixtral", "num_local_experts": 5, "sliding_window": None},
    "whole groups: qwen3_moe": WHOLE_GROUPS
    | {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "whole groups: gpt2": {"model_type": "gpt2", "hidden_size": 64, "num_attention_heads": 2},
    "whole groups: bloom": {"model_type": "bloom", "hidden_size": 96, "num_attention_heads": 3},
}
"""Sizes that quantized matrices can have: whole groups of 32 columns, also in every virtual shard."""

NINE_HEADS = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 64, 49,152 tokens": NINE_HEADS | {"head_dim": 64, "vocab_size": 49152},
    "heads of 80": NINE_HEADS | {"head_dim": 80},
    "heads of 96, 151,936 tokens": NINE_HEADS | {"head_dim": 96, "vocab_size": 151936},
    "heads of 128": NINE_HEADS | {"head_dim": 128},
    "heads of 256": NINE_HEADS | {"head_dim": 256},
}
"""Heads and vocabularies of real models; the rest is small."""

LONG: dict[str, dict[str, Any]] = {
    "one KV head": {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 1},
    "alibi": {"model_type": "bloom", "num_hidden_layers": 2},
    "wide window": {
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "sliding_window": 1100,
    },
}
"""For requests of thousands of tokens."""

WIDE: dict[str, dict[str, Any]] = {
    "wide experts": {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 4224,
        "num_local_experts": 2,
        "sliding_window": None,
    }
}
"""Products over thousands of columns. Experts, because other matrices are cut into virtual shards."""
