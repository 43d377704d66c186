"""Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts: RMSNorm, rotary positions, gated MLPs."""

from __future__ import annotations

from typing import Any

from holdfast.core.spec import DecoderSpec, LayerSpec, MoeSpec
from holdfast.models.config import Config, head_size, layers_by_type, max_positions, rope_spec
from holdfast.models.families.family import ACTIVATIONS, Family
from holdfast.models.parameters import Names, Source


def _spec(config: Config, family: str, **switches: Any) -> DecoderSpec:
    """What the kin share; `switches` are what each sets differently."""
    num_heads = config.integer("num_attention_heads")
    head_dim = switches.pop("head_dim", None) or head_size(config)
    rope = rope_spec(config, head_dim)
    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": config.integer("hidden_size"),
        "num_heads": num_heads,
        "num_kv_heads": config.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "mlp_size": config.integer("intermediate_size"),
        "max_positions": max_positions(config, rope),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "ropes": (rope,),
        "attention_scale": head_dim**-0.5,
        "activation": config.choice("hidden_act", ACTIVATIONS, "silu"),
        "tie_embeddings": config.flag("tie_word_embeddings", False),
        "layers": _layers(config, LayerSpec()),
    }
    return DecoderSpec(**fields | switches)


def llama_spec(config: Config) -> DecoderSpec:
    config.require("sliding_window", None)
    attention_bias = config.flag("attention_bias", False)
    return _spec(
        config,
        "llama",
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def mistral_spec(config: Config) -> DecoderSpec:
    # a config that does not mention the window means 4096; one that says null means none
    window = _window(config) if "sliding_window" in config.values else 4096
    return _spec(config, "mistral", layers=_layers(config, LayerSpec(window=window)))


def qwen2_spec(config: Config) -> DecoderSpec:
    return _spec(config, "qwen2", qkv_bias=True, layers=_qwen_layers(config))


def qwen3_spec(config: Config) -> DecoderSpec:
    attention_bias = config.flag("attention_bias", False)
    return _spec(
        config,
        "qwen3",
        head_dim=config.integer("head_dim", 128),
        qk_norm=True,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        layers=_qwen_layers(config),
    )


def mixtral_spec(config: Config) -> DecoderSpec:
    moe = MoeSpec(
        num_experts=config.integer("num_experts", 8),
        experts_per_token=config.integer("num_experts_per_tok", 2),
        expert_mlp_size=config.integer("intermediate_size"),
    )
    layers = _layers(config, LayerSpec(window=_window(config), moe=True))
    return _spec(config, "mixtral", moe=moe, layers=layers)


def qwen3_moe_spec(config: Config) -> DecoderSpec:
    attention_bias = config.flag("attention_bias", False)
    moe = MoeSpec(
        num_experts=config.integer("num_experts"),
        experts_per_token=config.integer("num_experts_per_tok", 8),
        expert_mlp_size=config.integer("moe_intermediate_size"),
        # GGUF files do not say; every published checkpoint, and llama.cpp, renormalizes
        renormalize=config.flag("norm_topk_prob", config.is_gguf),
    )
    step = config.integer("decoder_sparse_step", 1)
    dense = set(config.sequence("mlp_only_layers", int))
    layers = tuple(
        LayerSpec(window=layer.window, moe=index not in dense and (index + 1) % step == 0)
        for index, layer in enumerate(_qwen_layers(config))
    )
    return _spec(
        config,
        "qwen3_moe",
        qk_norm=True,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        moe=moe,
        layers=layers,
    )


def _layers(config: Config, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    return (layer,) * config.integer("num_hidden_layers")


def _window(config: Config) -> int | None:
    return config.integer("sliding_window") if config.has("sliding_window") else None


def _qwen_layers(config: Config) -> tuple[LayerSpec, ...]:
    """Windows only where `layer_types` (transformers 5) or `max_window_layers` (4) say so."""
    if not config.flag("use_sliding_window", False) or not config.has("sliding_window"):
        return _layers(config, LayerSpec())
    window = config.integer("sliding_window")
    first = config.integer("max_window_layers", 28)
    known = {"sliding_attention": LayerSpec(window=window), "full_attention": LayerSpec()}
    return layers_by_type(config, known, lambda i: "sliding_attention" if i >= first else "full_attention")


_HF: Names = {
    "embed": "model.embed_tokens",
    "layers.*.attn_norm": "model.layers.{layer}.input_layernorm",
    "layers.*.attn.q": "model.layers.{layer}.self_attn.q_proj",
    "layers.*.attn.k": "model.layers.{layer}.self_attn.k_proj",
    "layers.*.attn.v": "model.layers.{layer}.self_attn.v_proj",
    "layers.*.attn.o": "model.layers.{layer}.self_attn.o_proj",
    "layers.*.attn.q_norm": "model.layers.{layer}.self_attn.q_norm",
    "layers.*.attn.k_norm": "model.layers.{layer}.self_attn.k_norm",
    "layers.*.mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "layers.*.mlp.gate": "model.layers.{layer}.mlp.gate_proj",
    "layers.*.mlp.up": "model.layers.{layer}.mlp.up_proj",
    "layers.*.mlp.down": "model.layers.{layer}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_MIXTRAL_EXPERTS: Names = {
    "layers.*.moe.router": "model.layers.{layer}.block_sparse_moe.gate",
    "layers.*.moe.experts.*.gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
    "layers.*.moe.experts.*.up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
    "layers.*.moe.experts.*.down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
}
_QWEN_EXPERTS: Names = {
    "layers.*.moe.router": "model.layers.{layer}.mlp.gate",
    "layers.*.moe.experts.*.gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj",
    "layers.*.moe.experts.*.up": "model.layers.{layer}.mlp.experts.{expert}.up_proj",
    "layers.*.moe.experts.*.down": "model.layers.{layer}.mlp.experts.{expert}.down_proj",
}
GGUF_NAMES: Names = {
    "embed": "token_embd",
    "layers.*.attn_norm": "blk.{layer}.attn_norm",
    "layers.*.attn.q": "blk.{layer}.attn_q",
    "layers.*.attn.k": "blk.{layer}.attn_k",
    "layers.*.attn.v": "blk.{layer}.attn_v",
    "layers.*.attn.o": "blk.{layer}.attn_output",
    "layers.*.attn.q_norm": "blk.{layer}.attn_q_norm",
    "layers.*.attn.k_norm": "blk.{layer}.attn_k_norm",
    "layers.*.mlp_norm": "blk.{layer}.ffn_norm",
    "layers.*.mlp.gate": "blk.{layer}.ffn_gate",
    "layers.*.mlp.up": "blk.{layer}.ffn_up",
    "layers.*.mlp.down": "blk.{layer}.ffn_down",
    "layers.*.moe.router": "blk.{layer}.ffn_gate_inp",
    "layers.*.moe.experts.*.gate": Source("blk.{layer}.ffn_gate_exps", stacked=0),
    "layers.*.moe.experts.*.up": Source("blk.{layer}.ffn_up_exps", stacked=0),
    "layers.*.moe.experts.*.down": Source("blk.{layer}.ffn_down_exps", stacked=0),
    "final_norm": "output_norm",
    "head": "output",
}
# llama.cpp rotates neighbouring dims, so its converter permutes the rows of q and k of this architecture
_GGUF_LLAMA: Names = {
    **GGUF_NAMES,
    "layers.*.attn.q": Source("blk.{layer}.attn_q", interleaved=True),
    "layers.*.attn.k": Source("blk.{layer}.attn_k", interleaved=True),
}
_IGNORED = (r"\.rotary_emb\.inv_freq$", r"^rope_freqs\.weight$")  # the latter is in the spec already

LLAMA = Family(llama_spec, lambda _: _HF, lambda _: _GGUF_LLAMA, ignored=_IGNORED)
MISTRAL = Family(mistral_spec, lambda _: _HF, ignored=_IGNORED)  # its GGUF files call themselves "llama"
MIXTRAL = Family(mixtral_spec, lambda _: {**_HF, **_MIXTRAL_EXPERTS}, lambda _: _GGUF_LLAMA, ignored=_IGNORED)
QWEN2 = Family(qwen2_spec, lambda _: _HF, lambda _: GGUF_NAMES, ignored=_IGNORED)
QWEN3 = Family(qwen3_spec, lambda _: _HF, lambda _: GGUF_NAMES, ignored=_IGNORED)
QWEN3_MOE = Family(qwen3_moe_spec, lambda _: {**_HF, **_QWEN_EXPERTS}, lambda _: GGUF_NAMES, ignored=_IGNORED)
