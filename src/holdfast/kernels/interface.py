"""What a kernel backend offers to the decoder and the sampler: one interface, several backends.

Shapes: T tokens in the step, B requests, H query heads, G KV heads, D head dim, M hidden, V vocabulary, R rows of
logits, E experts, P blocks in the cache, S tokens per block; a matrix is [N, K] (outputs, inputs).

Shapes, dtypes and limits named here are the caller's to keep: a backend asserts them, and knows no other errors than
a device's own (out of memory).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from holdfast.core.spec import Activation

Derived = TypeVar("Derived")
W = TypeVar("W")

GROUP = 32
"""Numbers of a quantized row that share a scale."""
GROUP_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
"""What such a group takes, scale (and minimum) included."""


FP8_GROUP = 128
"""Numbers of an FP8 row that share a scale."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [N, K]. As GGUF stores it: groups of 32 numbers along K, code · scale (+ minimum). FP8: numbers of 8
    bits (e4m3), and apart from them a scale for every 128 along K."""

    format: Literal["Q8_0", "Q4_0", "Q4_1", "FP8"]
    blocks: Tensor
    """uint8 [N, K / 32 * bytes of a group], or [N, K]; rows contiguous."""
    scales: Tensor | None = None
    """FP8: float32 [N, K / 128], rounded up."""

    @property
    def shape(self) -> tuple[int, int]:
        rows, num_bytes = self.blocks.shape
        return rows, num_bytes if self.format == "FP8" else num_bytes // GROUP_BYTES[self.format] * GROUP


Matrix = Tensor | Quantized


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

    def derive(self, key: str, make: Callable[[BatchLayout], Derived]) -> Derived:
        """What a backend works out from this layout once per step: made on the first layer, kept for the rest."""
        if key not in self.derived:
            self.derived[key] = make(self)
        return cast(Derived, self.derived[key])


@dataclass(frozen=True, slots=True)
class Heads:
    """How a fused q-k-v row is made of heads, and what q and k go through before they are used."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Tensor | None = None
    """float32 [positions, 2, rotary_dim / 2]: cosines and sines; the first rotary_dim numbers of a head are
    rotated in two halves."""
    q_norm: Tensor | None = None
    """float32 [D]: RMS norm of every head, before the rotation."""
    k_norm: Tensor | None = None
    eps: float = 0.0


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


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router's logits choose experts."""

    experts_per_token: int
    renormalize: bool
    """The chosen experts' shares are made to sum to 1."""


Forward = Callable[[Tensor, BatchLayout], Tensor]
"""(token ids int64 [T], layout) → hidden states [T, M]."""


@runtime_checkable
class Capturing(Protocol):
    """A `Forward` that can be made ready for steps in which every request computes one token."""

    def __call__(self, token_ids: Tensor, batch: BatchLayout) -> Tensor: ...

    def capture(
        self,
        max_requests: int,
        max_context: int,
        block_size: int,
        progress: Callable[[float], None],
        agree: Callable[[bool], bool] | None = None,
    ) -> int:
        """Of up to `max_requests`, each of up to `max_context` tokens; returns for how many kinds of steps.
        `progress` gets the fraction done. `agree`, where several ranks capture the same steps: whether all of them
        say yes; each rank asks it equally often."""
        ...

    def drop(self) -> None:
        """Undo `capture`. From any thread."""
        ...


W_contra = TypeVar("W_contra", contravariant=True)


@runtime_checkable
class ExpertPairs(Protocol[W_contra]):
    """Kernels whose experts can be shared out over ranks that share no memory: `Kernels.experts` in three steps, of
    which every rank does the second for its own pairs (row, expert)."""

    def route(self, router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The experts that router_logits [T, E] choose, int64 [T, K], ascending, and their shares, float32 [T, K]."""
        ...

    def expert_pairs(
        self, x: Tensor, ids: Tensor, up: Sequence[W_contra], down: Sequence[Sequence[W_contra]], out: Tensor
    ) -> None:
        """Row t of x through up[i], for each i of ids int64 [T, K], then through down[p][i], whose columns are the
        p-th of those of a whole matrix: into `out`, float32 [pieces, T · K, M]. Where i is len(up), it stays as it
        is."""
        ...

    def combine(self, pairs: Tensor, shares: Tensor, dtype: torch.dtype, *, add_to: Tensor | None = None) -> Tensor:
        """What pairs, float32 [T · K, M], times their shares [T, K] come to, added in order, in float32 → [T, M]."""
        ...


class Kernels(Protocol[W]):
    """One backend; W is its form of a matrix that was packed for `linear`.

    `x` is [T, …] in the model's dtype unless said otherwise. The residual stream is float32 [T, M]: calls with
    `add_to` add their result to it in place, in float32, and return it. No other call changes its inputs except
    where named. Backends accumulate in float32.
    """

    name: str
    exact: bool
    """Whether a row's result is the same bits whatever rows share the call: contract 1 in docs/architecture.md."""
    max_head_dim: int
    sharded: bool
    """Whether `pack` heeds virtual shards."""

    def pack(
        self,
        parts: Sequence[Matrix],
        biases: Sequence[Tensor] = (),
        *,
        activation: Activation | None = None,
        gated: bool = False,
        shards: Sequence[int] = (),
    ) -> W:
        """Matrices [N_i, K], stacked to one [N, K] and laid out for `linear`; what the call needs of them is copied.

        The parts are all of one dtype (float32 or the model's) or all quantized alike. `biases` [N_i]: one per part
        or none. `activation` is applied to the result; with `gated` the parts are (gate, up), and the result is
        activation(x · gateᵀ) * (x · upᵀ) [T, N_0]. `shards`: ends of the virtual shards of K, ascending to K, none
        empty (contract 1); () for one.
        """
        ...

    def linear(
        self, x: Tensor, weight: W, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x [T, K] → [T, N] in `dtype`, by default x's."""
        ...

    def embedding(
        self, ids: Tensor, table: W, *, scale: float = 1.0, offset: int = 0, add_to: Tensor | None = None
    ) -> Tensor:
        """Rows ids + offset of a packed table [V, M], for ids int64 [T], times scale → float32 [T, M]. Rows the
        table does not have are zeros, and -0 becomes 0: so the rows of a table that is cut can be added up."""
        ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *, add_to: Tensor | None = None
    ) -> Tensor:
        """Over rows of x [T, M] of any dtype; weight is float32, the result in `dtype`."""
        ...

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Over rows of x [T, M] of any dtype; weight and bias float32, the result in `dtype`."""
        ...

    def convert(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [T, M] in another dtype."""
        ...

    def store_kv(self, qkv: Tensor, heads: Heads, k_pages: Tensor, v_pages: Tensor, batch: BatchLayout) -> Tensor:
        """Split qkv [T, (H + 2G) · D] into heads; norm and rotate q and k; write k and v into the pages
        [P, G, S, D] at the batch's slots (how a (block, head) cell orders its S · D numbers is the backend's own);
        → q [T, H · D]. Changes qkv and the pages. D is at most `max_head_dim`."""
        ...

    def attention(  # noqa: PLR0917 - five tensors and what to do with them
        self,
        q: Tensor,
        heads: Heads,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: BatchLayout,
        options: AttentionOptions,
    ) -> Tensor:
        """Causal attention of q [T, H · D] over each request's pages → [T, H · D]. Query head h reads KV head
        h // (H / G); H is a multiple of G."""
        ...

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        up: Sequence[W],
        down: Sequence[W],
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Each row of x through the experts that its router_logits [T, E] choose, x → down[e](up[e](x)), times
        their shares, added in expert-id order in float32 → [T, M] in x's dtype. Ties between experts go to the lowest
        id."""
        ...

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """tanh(x / cap) * cap, in place."""
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """float32 [R, V] → int64 [R]; ties go to the lowest id."""
        ...

    def add_gumbel_noise(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """Add standard Gumbel noise to float32 [R, V] in place: a pure function of (seed int64 [R], position int64
        [R], token id).

        Philox 4x32-10 (Salmon et al., SC'11) with key = seed and counter = (token id // 4, position, 0, 0);
        token id % 4 picks the output word w; noise = -log(-log1p(-(w + ½) · 2⁻³²)).
        """
        ...

    def filter_logits(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """Set logits float32 [R, V] (temperature applied) outside min_p, top_k, top_p to -inf, in place.

        top_k int64 [R] (0: off), top_p and min_p float32 [R] (1 and 0: off). The filters apply in this order: min_p,
        top_k, top_p, each as a threshold (equal logits stay or go together); top_p counts the mass of the softmax of
        what the others left. The most likely token always stays.
        """
        ...

    def record(self, forward: Forward, max_tokens: int) -> Forward:
        """`forward` made cheap to call for any step of up to `max_tokens` tokens; it may call nothing but these
        kernels and views of what they return. The result's rows are valid until the next call."""
        ...
