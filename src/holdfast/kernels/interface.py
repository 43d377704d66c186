"""What a kernel backend offers to the decoder and the sampler: one interface, several backends.

Shapes: T tokens in the step, B requests, H query heads, G KV heads, D head dim, M hidden, F MLP columns,
V vocabulary, E experts, K experts per token, P blocks in the cache, S tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from holdfast.core.spec import Activation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the T tokens of a step belong: B requests, one stretch of consecutive tokens each, in order."""

    query_lens: tuple[int, ...]
    """Tokens this step computes per request; they sum to T."""
    context_lens: tuple[int, ...]
    """Tokens of each request in the cache once this step's own are written: its last query sits at
    position context_len - 1."""
    positions: Tensor
    """int64 [T], absolute."""
    slots: Tensor
    """int64 [T]: block id * S + offset, where this step's keys and values go."""
    block_tables: Tensor
    """int32 [B, widest]: block ids in order of position; padded with 0."""
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def derive(self, key: str, make: Callable[[BatchLayout], T]) -> T:
        """What a backend works out from this layout once per step: made on the first layer, kept for the rest."""
        if key not in self.derived:
            self.derived[key] = make(self)
        return cast(T, self.derived[key])


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What the score of a (query, key) pair goes through, per layer."""

    scale: float
    softcap: float | None = None
    """tanh(score / cap) * cap, after the scale."""
    window: int | None = None
    """Position p sees p-window+1 … p."""
    alibi_slopes: Tensor | None = None
    """float32 [H]: slope * (key position - query position) is added (after the scale and the cap)."""


class Kernels(Protocol):
    """One backend. `x` is [T, M] in the model's dtype unless said otherwise; no call changes its inputs
    except where named. Backends accumulate in float32."""

    name: str
    exact: bool
    """Whether a row's result is the same bits whatever rows share the call (docs/architecture.md, contract 1)."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] · weightᵀ [out, in] + bias [out] → [T, out]."""
        ...

    def embedding(self, token_ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        """Rows of table [V, M] for int64 [T], times scale → [T, M]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Over the last dim of x (the model's dtype or float32); weight is float32, the result in `dtype`."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        """Over the last dim of x (the model's dtype or float32); weight and bias float32, the result in `dtype`."""
        ...

    def rotate(self, x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x [T, heads, D]: cos_sin float32 [positions, 2, rotary_dim / 2], half-split."""
        ...

    def store_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
        """Write k, v [T, G, D] into pages [P, G, S, D] at `slots`. Changes the pages."""
        ...

    def attention(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: BatchLayout, options: AttentionOptions
    ) -> Tensor:
        """Causal attention of q [T, H, D] over each request's pages → [T, H, D]. Query head h reads KV head
        h // (H / G)."""
        ...

    def activate(self, x: Tensor, kind: Activation) -> Tensor:
        """Elementwise."""
        ...

    def gated_activate(self, gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
        """activation(gate) * up."""
        ...

    def route(self, logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Router logits [T, E] → (weights float32 [T, K], expert ids int64 [T, K] ascending)."""
        ...

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """tanh(x / cap) * cap."""
        ...

    def gumbel_noise(self, seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
        """Standard Gumbel noise float32 [B, V], a pure function of (seed int64 [B], position int64 [B], token id).

        Philox 4x32-10 (Salmon et al., SC'11) with key = seed and counter = (token id // 4, position, 0, 0);
        token id % 4 picks the output word w; noise = -log(-log1p(-(w + ½) · 2⁻³²)).
        """
        ...

    def filter_logits(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """Set logits [B, V] (float32, temperature applied) outside min_p, top_k, top_p to -inf.

        top_k int64 [B] (0: off), top_p and min_p float32 [B] (1 and 0: off). The most likely token always stays.
        """
        ...
