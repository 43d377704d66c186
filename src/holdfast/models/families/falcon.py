"""Falcon: multi-query with one norm (7B), grouped queries with two (40B, 180B), or ALiBi in sequence (RW)."""

from __future__ import annotations

from typing import Any, Literal

from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.models.config import Config, head_size, rope_spec
from holdfast.models.families.family import ACTIVATIONS, Family, fused_qkv
from holdfast.models.families.llama import GGUF_NAMES
from holdfast.models.parameters import Names


def falcon_spec(config: Config) -> DecoderSpec:
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = head_size(config)
    alibi = config.flag("alibi", False)
    bias = config.flag("bias", False)
    return DecoderSpec(
        family="falcon",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=num_heads,
        head_dim=head_dim,
        mlp_size=config.integer("intermediate_size", 4 * hidden),
        max_positions=config.integer("max_position_embeddings", 2048),
        layers=(LayerSpec(rope=None if alibi else 0),) * config.integer("num_hidden_layers"),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        ropes=() if alibi else (rope_spec(config, head_dim),),
        alibi=alibi,
        alibi_scaled=alibi,
        attention_scale=head_dim**-0.5,
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated_mlp=False,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=config.flag("tie_word_embeddings", True),
        **_architecture(config, num_heads),
    )


def _architecture(config: Config, num_heads: int) -> dict[str, Any]:
    """KV heads and the arrangement of a block, which three generations of Falcon do differently."""
    block: Literal["pre", "parallel"] = "parallel"
    # GGUF files do not name the generation, but the newest one's terms describe the 7B as well
    if config.flag("new_decoder_architecture", config.is_gguf):
        num_kv_heads = config.integer("num_key_value_heads", num_heads)
        shared = config.integer("num_ln_in_parallel_attn", 2) == 1
    else:
        num_kv_heads = 1 if config.flag("multi_query", True) else num_heads
        shared = True
        if not config.flag("parallel_attn", True):
            block = "pre"
    return {"num_kv_heads": num_kv_heads, "block": block, "shared_parallel_norm": shared}


def _hf_names(spec: DecoderSpec) -> Names:
    layer = "transformer.h.{layer}"
    two_norms = spec.block == "parallel" and not spec.shared_parallel_norm
    return {
        "embed": "transformer.word_embeddings",
        "layers.*.attn_norm": f"{layer}.ln_attn" if two_norms else f"{layer}.input_layernorm",
        **fused_qkv(f"{layer}.self_attention.query_key_value", spec, groups=spec.num_kv_heads),
        "layers.*.attn.o": f"{layer}.self_attention.dense",
        "layers.*.mlp_norm": f"{layer}.ln_mlp" if two_norms else f"{layer}.post_attention_layernorm",
        "layers.*.mlp.up": f"{layer}.mlp.dense_h_to_4h",
        "layers.*.mlp.down": f"{layer}.mlp.dense_4h_to_h",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }


def _gguf_names(spec: DecoderSpec) -> Names:
    # the converter gave the 40B's MLP norm the name of the 7B's only one
    return {
        **GGUF_NAMES,
        **fused_qkv("blk.{layer}.attn_qkv", spec, groups=1),
        "layers.*.attn_norm": "blk.{layer}.attn_norm" if spec.shared_parallel_norm else "blk.{layer}.attn_norm_2",
        "layers.*.mlp_norm": "blk.{layer}.attn_norm",
    }


FALCON = Family(
    falcon_spec,
    _hf_names,
    _gguf_names,
    base_prefix="transformer.",
    ignored=(r"\.rotary_emb\.inv_freq$", r"\.maybe_rotary\.inv_freq$"),
)
