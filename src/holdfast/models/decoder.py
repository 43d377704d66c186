"""The decoder-only transformer, every family's: embeddings, L blocks, head.

Plain on purpose: no parallel code, no requests, no globals. What differs between families is in `DecoderSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from holdfast.cache.pages import KVPages
from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Kernels
from holdfast.models.layers import Weights
from holdfast.models.mlp import MixtureOfExperts, make_mlp
from holdfast.models.rope import alibi_slopes, rope_table


class Attention:
    """Multi-head, grouped or multi-query attention over paged keys and values."""

    def __init__(self, spec: DecoderSpec, weights: Weights, name: str, layer: LayerSpec, shared: Shared) -> None:
        self.kernels = weights.kernels
        self.head_dim = spec.head_dim
        self.q, self.k, self.v = (weights.linear(f"{name}.{part}") for part in "qkv")
        self.o = weights.linear(f"{name}.o")
        self.q_norm = weights.rms_norm(f"{name}.q_norm") if spec.qk_norm else None
        self.k_norm = weights.rms_norm(f"{name}.k_norm") if spec.qk_norm else None
        self.rope = None if layer.rope is None else shared.ropes[layer.rope]
        self.options = AttentionOptions(
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
            window=layer.window,
            alibi_slopes=shared.alibi_slopes,
        )

    def __call__(self, x: Tensor, batch: BatchLayout, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        heads = (x.shape[0], -1, self.head_dim)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q = self.kernels.rotate(q, self.rope, batch.positions)
            k = self.kernels.rotate(k, self.rope, batch.positions)
        self.kernels.store_kv(k, v, k_pages, v_pages, batch.slots)
        out = self.kernels.attention(q, k_pages, v_pages, batch, self.options)
        return self.o(out.flatten(1))


class Block:
    """Attention and MLP with their norms and residuals, in one of four arrangements."""

    def __init__(self, spec: DecoderSpec, weights: Weights, index: int, shared: Shared) -> None:
        name, layer = f"layers.{index}", spec.layers[index]
        self.arrangement = spec.block
        self.attention = Attention(spec, weights, f"{name}.attn", layer, shared)
        self.mlp = (
            MixtureOfExperts(spec, weights, f"{name}.moe") if layer.moe else make_mlp(spec, weights, f"{name}.mlp")
        )
        self.attn_norm = weights.norm(f"{name}.attn_norm")
        one_norm = spec.block == "parallel" and spec.shared_parallel_norm
        self.mlp_norm = self.attn_norm if one_norm else weights.norm(f"{name}.mlp_norm")
        if spec.block == "sandwich":
            self.attn_post_norm = weights.norm(f"{name}.attn_post_norm")
            self.mlp_post_norm = weights.norm(f"{name}.mlp_post_norm")

    def __call__(self, x: Tensor, batch: BatchLayout, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        kv = (batch, k_pages, v_pages)
        if self.arrangement == "pre":
            x = x + self.attention(self.attn_norm(x), *kv)
            return x + self.mlp(self.mlp_norm(x))
        if self.arrangement == "post":
            x = self.attn_norm(x + self.attention(x, *kv))
            return self.mlp_norm(x + self.mlp(x))
        if self.arrangement == "sandwich":
            x = x + self.attn_post_norm(self.attention(self.attn_norm(x), *kv))
            return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        normed = self.attn_norm(x)
        mlp_input = normed if self.mlp_norm is self.attn_norm else self.mlp_norm(x)
        return x + self.attention(normed, *kv) + self.mlp(mlp_input)


class Shared:
    """What the attention layers have in common: rotary tables and ALiBi slopes."""

    def __init__(self, spec: DecoderSpec, max_positions: int, device: torch.device) -> None:
        self.ropes = [rope_table(rope, max_positions, device) for rope in spec.ropes]
        self.alibi_slopes: Tensor | None = None
        if spec.alibi:
            self.alibi_slopes = alibi_slopes(spec.num_heads).to(device)
            if spec.alibi_scaled:
                self.alibi_slopes *= spec.attention_scale


class Decoder:
    """`weights` holds every parameter of `models.parameters.parameters(spec)`; norms in float32, the rest in the
    model's dtype, all on one device. `max_positions`: of the longest request; None: as many as the model allows."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Mapping[str, Tensor],
        kernels: Kernels,
        max_positions: int | None = None,
    ) -> None:
        self.spec = spec
        self.kernels = kernels
        layers = Weights(weights, spec, kernels)
        self.embed = weights["embed.weight"]
        self.positions = weights.get("positions.weight")
        self.embed_norm = layers.norm("embed_norm") if spec.embedding_norm else None
        shared = Shared(spec, max_positions or spec.max_positions, self.embed.device)
        self.blocks = [Block(spec, layers, index, shared) for index in range(spec.num_layers)]
        self.final_norm = layers.norm("final_norm") if spec.final_norm else None
        self.head = layers.linear("embed" if spec.tie_embeddings else "head")

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, batch: BatchLayout, kv: KVPages) -> Tensor:
        """Run int64 [T] through all blocks; their keys and values go into `kv`. → [T, M] after the final norm.

        The residual stream is float32 whatever the model's dtype: L blocks are summed there, and rounding each sum
        to bfloat16 about doubles the error of the logits.
        """
        x = self.kernels.embedding(token_ids, self.embed, self.spec.embedding_scale)
        if self.positions is not None:
            x = x + self.kernels.embedding(batch.positions + self.spec.position_offset, self.positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.spec.block != "post":  # there every block ends in a norm, so there is no long sum to keep exact
            x = x.float()
        for block, k_pages, v_pages in zip(self.blocks, kv.k, kv.v, strict=True):
            x = block(x, batch, k_pages, v_pages)
        return x.to(self.embed.dtype) if self.final_norm is None else self.final_norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token for rows [R, M] of `forward`'s result → float32 [R, V]."""
        scores = self.head(hidden).float()
        cap = self.spec.logit_softcap
        return scores if cap is None else self.kernels.softcap(scores, cap)
