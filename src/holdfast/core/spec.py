"""What a model *is*: the shape and the switches of one decoder, free of any framework.

A family (`holdfast.models.families`) maps its config onto a `DecoderSpec`; one decoder
(`holdfast.models.decoder`) runs every spec. Letters follow docs/architecture.md: H query heads,
G KV heads, D head dim, M hidden, F MLP columns, V vocabulary, E experts, K experts per token, L layers.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding of the first `rotary_dim` dims of a head, half-split ("rotate_half") form.

    Scalings: `linear` divides positions by `factor`; `llama3` is Llama 3.1's frequency-dependent form;
    `yarn` is Peng et al. 2023 (arXiv:2309.00071).
    """

    theta: float
    rotary_dim: int
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cos and sin (YaRN's temperature); already resolved, 1 otherwise."""
    frequency_divisors: tuple[float, ...] = ()
    """One per rotated pair, or none: the form in which GGUF files carry Llama 3's scaling."""


class MoeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A routed mixture of gated MLPs: softmax over E router logits, the K largest, added in expert-id order."""

    num_experts: int
    experts_per_token: int
    expert_mlp_size: int
    renormalize: bool = True
    """Divide the K chosen probabilities by their sum."""


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What may differ from layer to layer."""

    window: int | None = None
    """Sliding window in tokens, the token itself counted: position p sees p-window+1 … p. None: all."""
    rope: int | None = 0
    """Index into `DecoderSpec.ropes`; None for a layer without rotary positions."""
    moe: bool = False


class DecoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only transformer."""

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    layers: tuple[LayerSpec, ...]

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    block: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    """`pre`: x + f(norm(x)). `post`: norm(x + f(x)). `sandwich`: x + norm(f(norm(x))) (Gemma).
    `parallel`: x + attention(norm(x)) + mlp(norm(x)) (Falcon)."""
    shared_parallel_norm: bool = True
    """`parallel` blocks only: attention and MLP read one norm (Falcon-7B) or one each (Falcon-40B)."""
    final_norm: bool = True
    qk_norm: bool = False
    """RMS-norm each query and key head before the rotation (Qwen3, Gemma 3)."""

    ropes: tuple[RopeSpec, ...] = ()
    learned_positions: int = 0
    """Rows of a learned position table; 0: none."""
    position_offset: int = 0
    """Added to the position before the learned table is read (OPT: 2)."""
    alibi: bool = False
    alibi_scaled: bool = False
    """ALiBi bias is added before the scale is applied, so it is scaled too (Falcon with ALiBi)."""
    attention_scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    moe: MoeSpec | None = None

    embedding_scale: float = 1.0
    embedding_norm: bool = False
    """LayerNorm on the embeddings (BLOOM)."""
    tie_embeddings: bool = False
    """The head is the embedding table; the checkpoint stores none of its own."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint on this machine, looked at but not loaded. Everything a process needs to open it."""

    path: str
    """A folder (Hugging Face layout) or a .gguf file, local and absolute."""
    format: Literal["safetensors", "gguf"]
    spec: DecoderSpec
    dtype: Literal["float32", "float16", "bfloat16"]
    """The checkpoint's own dtype; what `--dtype auto` resolves from."""
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, float] = {}
    """temperature, top_p, top_k, min_p, repetition_penalty as generation_config.json recommends."""
