"""Gemma 3, text only: sandwich norms with 1 + w, local and global layers with a rotary embedding each."""

from __future__ import annotations

import math

from holdfast.core.spec import DecoderSpec, LayerSpec, RopeSpec
from holdfast.models.config import Config, layers_by_type, parse_rope
from holdfast.models.families.family import ACTIVATIONS, Family
from holdfast.models.families.llama import GGUF_NAMES
from holdfast.models.parameters import Names, Source

_GLOBAL, _LOCAL = 0, 1
_LAYERS_OF_27B = 62


def gemma3_spec(config: Config) -> DecoderSpec:
    config.require("use_bidirectional_attention", False)
    config.require("attn_logit_softcapping", None)  # Gemma 2 had it; of Gemma 3, nothing says what it would mean
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", 256)
    attention_bias = config.flag("attention_bias", False)
    return DecoderSpec(
        family="gemma3_text",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=head_dim,
        mlp_size=config.integer("intermediate_size"),
        max_positions=config.integer("max_position_embeddings", 131072),
        layers=_layers(config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        block="sandwich",
        qk_norm=True,
        ropes=_ropes(config, head_dim),
        attention_scale=_query_scalar(config, head_dim) ** -0.5,
        logit_softcap=config.number("final_logit_softcapping", above=0.0)
        if config.has("final_logit_softcapping")
        else None,
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        embedding_scale=math.sqrt(hidden),
        tie_embeddings=config.flag("tie_word_embeddings", True),
    )


def _query_scalar(config: Config, head_dim: int) -> float:
    if not config.is_gguf:
        return config.number("query_pre_attn_scalar", 256, above=0.0)
    # GGUF metadata leave it out: the 27B model divides by its width per head, all others by the head's size
    if config.integer("num_hidden_layers") == _LAYERS_OF_27B:
        return config.integer("hidden_size") / config.integer("num_attention_heads")
    return head_dim


def _layers(config: Config) -> tuple[LayerSpec, ...]:
    """`layer_types` (transformers 5), or every n-th layer global (4, and GGUF)."""
    local = LayerSpec(window=config.integer("sliding_window", 4096), rope=_LOCAL)
    known = {"sliding_attention": local, "full_attention": LayerSpec(rope=_GLOBAL)}
    period = config.integer("sliding_window_pattern", 6)
    return layers_by_type(config, known, lambda i: "sliding_attention" if (i + 1) % period else "full_attention")


def _ropes(config: Config, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """Global and local; scaling concerns the global one alone."""
    nested = config.mapping("rope_parameters")
    if nested.values:
        full, sliding = nested.mapping("full_attention").values, nested.mapping("sliding_attention").values
    else:
        full = {"rope_theta": config.values.get("rope_theta"), **config.mapping("rope_scaling").values}
        sliding = {"rope_theta": config.values.get("rope_local_base_freq")}
    return parse_rope(config, full, head_dim, theta=1e6), parse_rope(config, sliding, head_dim, theta=1e4)


_HF: Names = {
    "embed": "model.embed_tokens",
    "layers.*.attn_norm": Source("model.layers.{layer}.input_layernorm", plus_one=True),
    "layers.*.attn.q": "model.layers.{layer}.self_attn.q_proj",
    "layers.*.attn.k": "model.layers.{layer}.self_attn.k_proj",
    "layers.*.attn.v": "model.layers.{layer}.self_attn.v_proj",
    "layers.*.attn.o": "model.layers.{layer}.self_attn.o_proj",
    "layers.*.attn.q_norm": Source("model.layers.{layer}.self_attn.q_norm", plus_one=True),
    "layers.*.attn.k_norm": Source("model.layers.{layer}.self_attn.k_norm", plus_one=True),
    "layers.*.attn_post_norm": Source("model.layers.{layer}.post_attention_layernorm", plus_one=True),
    "layers.*.mlp_norm": Source("model.layers.{layer}.pre_feedforward_layernorm", plus_one=True),
    "layers.*.mlp.gate": "model.layers.{layer}.mlp.gate_proj",
    "layers.*.mlp.up": "model.layers.{layer}.mlp.up_proj",
    "layers.*.mlp.down": "model.layers.{layer}.mlp.down_proj",
    "layers.*.mlp_post_norm": Source("model.layers.{layer}.post_feedforward_layernorm", plus_one=True),
    "final_norm": Source("model.norm", plus_one=True),
    "head": "lm_head",
}
# the converter has added the 1 to the norms already
_GGUF: Names = {
    **GGUF_NAMES,
    "layers.*.attn_post_norm": "blk.{layer}.post_attention_norm",
    "layers.*.mlp_post_norm": "blk.{layer}.post_ffw_norm",
}

GEMMA3 = Family(
    gemma3_spec,
    lambda _: _HF,
    lambda _: _GGUF,
    ignored=(r"\.rotary_emb(_local)?\.inv_freq$",),
)
