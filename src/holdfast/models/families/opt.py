"""OPT: LayerNorm before or after, learned positions that start at row 2."""

from __future__ import annotations

from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.models.config import Config, head_size
from holdfast.models.families.family import ACTIVATIONS, Family
from holdfast.models.parameters import Names

_POSITION_OFFSET = 2


def opt_spec(config: Config) -> DecoderSpec:
    hidden = config.integer("hidden_size")
    config.require("word_embed_proj_dim", hidden)
    config.require("layer_norm_elementwise_affine", True)
    num_heads = config.integer("num_attention_heads")
    head_dim = head_size(config)
    max_positions = config.integer("max_position_embeddings")
    norm_first = config.flag("do_layer_norm_before", True)
    bias = config.flag("enable_bias", True)
    return DecoderSpec(
        family="opt",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        mlp_size=config.integer("intermediate_size"),
        max_positions=max_positions,
        layers=(LayerSpec(rope=None),) * config.integer("num_hidden_layers"),
        norm="layer",
        block="pre" if norm_first else "post",
        final_norm=norm_first and not config.flag("_remove_final_layer_norm", False),
        learned_positions=max_positions + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        attention_scale=head_dim**-0.5,
        activation=config.choice("hidden_act", ACTIVATIONS, "relu"),
        gated_mlp=False,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=config.flag("tie_word_embeddings", True),
    )


_HF: Names = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "layers.*.attn_norm": "model.decoder.layers.{layer}.self_attn_layer_norm",
    "layers.*.attn.q": "model.decoder.layers.{layer}.self_attn.q_proj",
    "layers.*.attn.k": "model.decoder.layers.{layer}.self_attn.k_proj",
    "layers.*.attn.v": "model.decoder.layers.{layer}.self_attn.v_proj",
    "layers.*.attn.o": "model.decoder.layers.{layer}.self_attn.out_proj",
    "layers.*.mlp_norm": "model.decoder.layers.{layer}.final_layer_norm",
    "layers.*.mlp.up": "model.decoder.layers.{layer}.fc1",
    "layers.*.mlp.down": "model.decoder.layers.{layer}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}

OPT = Family(opt_spec, lambda _: _HF)
