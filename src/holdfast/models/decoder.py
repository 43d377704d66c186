"""The decoder-only transformer, every family's: embeddings, L blocks, head.

Plain on purpose: no requests, no globals; that a rank holds a share of each layer is its layers' affair
(`models.layers`), and that it holds some of the layers shows at both ends only. What differs between families is in
`DecoderSpec`.
Every number is made by the kernels: a backend may record the calls of a step and run them without this code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.cache.pages import KVPages
from holdfast.core.plan import Place
from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads
from holdfast.models.layers import Weights
from holdfast.models.mlp import MLP, MixtureOfExperts
from holdfast.models.rope import alibi_slopes, rope_table


class Attention:
    """Multi-head, grouped or multi-query attention over paged keys and values."""

    def __init__(self, spec: DecoderSpec, weights: Weights, name: str, layer: LayerSpec, shared: Shared) -> None:
        self.kernels = weights.kernels
        self.qkv = weights.linear(f"{name}.qkv")
        self.o = weights.row_parallel(f"{name}.o", lambda trees: trees.attention)
        queries, keys = weights.place.shard.query_heads, weights.place.shard.kv_heads
        self.heads = Heads(
            queries[1] - queries[0],
            keys[1] - keys[0],
            spec.head_dim,
            rope=None if layer.rope is None else shared.ropes[layer.rope],
            q_norm=weights.norms[f"{name}.q_norm.weight"] if spec.qk_norm else None,
            k_norm=weights.norms[f"{name}.k_norm.weight"] if spec.qk_norm else None,
            eps=spec.norm_eps,
        )
        self.options = AttentionOptions(
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
            window=layer.window,
            alibi_slopes=None if shared.alibi_slopes is None else shared.alibi_slopes[queries[0] : queries[1]],
        )

    def __call__(
        self, x: Tensor, batch: BatchLayout, k_pages: Tensor, v_pages: Tensor, *, add_to: Tensor | None = None
    ) -> Tensor:
        q = self.kernels.store_kv(self.qkv(x), self.heads, k_pages, v_pages, batch)
        out = self.kernels.attention(q, self.heads, k_pages, v_pages, batch, self.options)
        return self.o(out, add_to=add_to)


class Block:
    """Attention and MLP with their norms and residuals, in one of four arrangements."""

    def __init__(self, spec: DecoderSpec, weights: Weights, index: int, shared: Shared) -> None:
        name, layer = f"layers.{index}", spec.layers[index]
        self.kernels = weights.kernels
        self.dtype = weights.dtype
        self.arrangement = spec.block
        self.attention = Attention(spec, weights, f"{name}.attn", layer, shared)
        self.mlp: MLP | MixtureOfExperts
        self.mlp = MixtureOfExperts(spec, weights, index) if layer.moe else MLP(weights, f"{name}.mlp")
        self.attn_norm = weights.norm(f"{name}.attn_norm")
        one_norm = spec.block == "parallel" and spec.shared_parallel_norm
        self.mlp_norm = self.attn_norm if one_norm else weights.norm(f"{name}.mlp_norm")
        if spec.block == "sandwich":
            self.attn_post_norm = weights.norm(f"{name}.attn_post_norm")
            self.mlp_post_norm = weights.norm(f"{name}.mlp_post_norm")

    def __call__(self, x: Tensor, batch: BatchLayout, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        """The residual stream x, float32 [T, M] (changed in place) → the same after this block."""
        kv = (batch, k_pages, v_pages)
        if self.arrangement == "pre":
            self.attention(self.attn_norm(x), *kv, add_to=x)
            return self.mlp(self.mlp_norm(x), add_to=x)
        if self.arrangement == "post":
            self.attention(self.kernels.convert(x, self.dtype), *kv, add_to=x)
            x = self.attn_norm(x, dtype=torch.float32)
            self.mlp(self.kernels.convert(x, self.dtype), add_to=x)
            return self.mlp_norm(x, dtype=torch.float32)
        if self.arrangement == "sandwich":
            self.attn_post_norm(self.attention(self.attn_norm(x), *kv), add_to=x)
            return self.mlp_post_norm(self.mlp(self.mlp_norm(x)), add_to=x)
        normed = self.attn_norm(x)
        mlp_input = normed if self.mlp_norm is self.attn_norm else self.mlp_norm(x)
        self.attention(normed, *kv, add_to=x)
        return self.mlp(mlp_input, add_to=x)


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
    """The blocks of one stage; the first stage has the embeddings before them, the last the head behind.

    `weights` holds every packing of `models.parameters.packings_at` its place and every norm, all on one device.
    `max_positions`: of the longest request; None: as many as the model allows."""

    def __init__(self, weights: Weights, max_positions: int | None = None) -> None:
        spec, place = weights.spec, weights.place
        self.spec = spec
        self.weights = weights
        self.kernels = weights.kernels
        self.collectives = weights.collectives
        self.dtype = weights.dtype
        self.device = weights.device
        if place.is_first:
            self.embed = weights.embedding()
            self.positions = weights.packed["positions"] if spec.learned_positions else None
            self.embed_norm = weights.norm("embed_norm") if spec.embedding_norm else None
        shared = Shared(spec, max_positions or spec.max_positions, weights.device)
        self.blocks = [Block(spec, weights, index, shared) for index in range(*place.layers)]
        if place.is_last:
            self.final_norm = weights.norm("final_norm") if spec.final_norm else None
            self.head = weights.head()

    @property
    def place(self) -> Place:
        return self.weights.place

    def use_experts(self, weights: Weights) -> None:
        """Those of `weights` from now on; all else is the same there as here."""
        self.weights = weights
        for index, block in zip(range(*self.place.layers), self.blocks, strict=True):
            if self.spec.layers[index].moe:
                block.mlp = MixtureOfExperts(self.spec, weights, index)

    def allocate_pages(self, num_blocks: int, block_size: int) -> KVPages:
        """For the layers and KV heads that are here."""
        (first, last), (first_head, last_head) = self.place.layers, self.place.shard.kv_heads
        return KVPages.allocate(
            num_layers=last - first,
            num_blocks=num_blocks,
            num_kv_heads=last_head - first_head,
            head_dim=self.spec.head_dim,
            block_size=block_size,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, batch: BatchLayout, kv: KVPages) -> Tensor:
        """Run int64 [T] through all blocks; their keys and values go into `kv`. → [T, M] after the final norm, in
        the model's dtype; what goes to the next stage, where this is not the last.

        The residual stream x is float32 whatever the model's dtype: L blocks are summed there, and rounding each sum
        to bfloat16 about doubles the error of the logits.
        """
        x = self._enter(token_ids, batch)
        for block, k_pages, v_pages in zip(self.blocks, kv.k, kv.v, strict=True):
            x = block(x, batch, k_pages, v_pages)
        if not self.place.is_last:
            assert self.collectives is not None
            self.collectives.send(x)
            return x
        return self.kernels.convert(x, self.dtype) if self.final_norm is None else self.final_norm(x)

    def _enter(self, token_ids: Tensor, batch: BatchLayout) -> Tensor:
        """The residual stream before the first block."""
        if not self.place.is_first:
            assert self.collectives is not None
            return self.collectives.receive(token_ids.shape[0])
        x = self.embed(token_ids)
        if self.positions is not None:
            x = self.kernels.embedding(batch.positions, self.positions, offset=self.spec.position_offset, add_to=x)
        return x if self.embed_norm is None else self.embed_norm(x, dtype=torch.float32)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token for rows [R, M] of the last stage's result → float32 [R, V]."""
        scores = self.head(hidden)
        cap = self.spec.logit_softcap
        return scores if cap is None else self.kernels.softcap(scores, cap)
