"""BLOOM: LayerNorm, also on the embeddings, ALiBi, q, k and v interleaved head by head."""

from __future__ import annotations

from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.models.config import Config, head_size
from holdfast.models.families.family import Family, fused_qkv
from holdfast.models.families.llama import GGUF_NAMES
from holdfast.models.parameters import Names


def bloom_spec(config: Config) -> DecoderSpec:
    config.require("apply_residual_connection_post_layernorm", False)
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = head_size(config)
    return DecoderSpec(
        family="bloom",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        mlp_size=4 * hidden,
        max_positions=config.integer("max_position_embeddings", 2048),
        layers=(LayerSpec(rope=None),) * config.integer("num_hidden_layers"),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        alibi=True,
        attention_scale=head_dim**-0.5,
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        embedding_norm=True,
        tie_embeddings=config.flag("tie_word_embeddings", True),
    )


def _hf_names(spec: DecoderSpec) -> Names:
    layer = "transformer.h.{layer}"
    return {
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "layers.*.attn_norm": f"{layer}.input_layernorm",
        **fused_qkv(f"{layer}.self_attention.query_key_value", spec, groups=spec.num_heads),
        "layers.*.attn.o": f"{layer}.self_attention.dense",
        "layers.*.mlp_norm": f"{layer}.post_attention_layernorm",
        "layers.*.mlp.up": f"{layer}.mlp.dense_h_to_4h",
        "layers.*.mlp.down": f"{layer}.mlp.dense_4h_to_h",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }


def _gguf_names(spec: DecoderSpec) -> Names:
    qkv = fused_qkv("blk.{layer}.attn_qkv", spec, groups=1)
    return {**GGUF_NAMES, **qkv, "embed_norm": "token_embd_norm"}


BLOOM = Family(bloom_spec, _hf_names, _gguf_names, base_prefix="transformer.")
