"""GPT-2: LayerNorm, learned positions, one fused and transposed matrix for q, k and v."""

from __future__ import annotations

from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.models.config import Config, head_size
from holdfast.models.families.family import ACTIVATIONS, Family, fused_qkv
from holdfast.models.families.llama import GGUF_NAMES
from holdfast.models.parameters import Names, Source


def gpt2_spec(config: Config) -> DecoderSpec:
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    config.require("add_cross_attention", False)
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = head_size(config)
    max_positions = config.integer("max_position_embeddings")
    return DecoderSpec(
        family="gpt2",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        mlp_size=config.integer("intermediate_size", 4 * hidden),
        max_positions=max_positions,
        layers=(LayerSpec(rope=None),) * config.integer("num_hidden_layers"),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        learned_positions=max_positions,
        attention_scale=head_dim**-0.5,
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_embeddings=config.flag("tie_word_embeddings", True),
    )


def _hf_names(spec: DecoderSpec) -> Names:
    layer = "transformer.h.{layer}"
    return {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "layers.*.attn_norm": f"{layer}.ln_1",
        **fused_qkv(f"{layer}.attn.c_attn", spec, groups=1, transpose=True),
        "layers.*.attn.o": Source(f"{layer}.attn.c_proj", transpose=True),
        "layers.*.mlp_norm": f"{layer}.ln_2",
        "layers.*.mlp.up": Source(f"{layer}.mlp.c_fc", transpose=True),
        "layers.*.mlp.down": Source(f"{layer}.mlp.c_proj", transpose=True),
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }


def _gguf_names(spec: DecoderSpec) -> Names:
    qkv = fused_qkv("blk.{layer}.attn_qkv", spec, groups=1)
    return {**GGUF_NAMES, **qkv, "positions": "position_embd"}


GPT2 = Family(
    gpt2_spec,
    _hf_names,
    _gguf_names,
    base_prefix="transformer.",
    ignored=(r"\.attn\.(bias|masked_bias)$",),  # causal masks
)
