"""The reference backend: plain torch, on any device. Close to every other backend, bit-exact with none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.spec import Activation
from holdfast.kernels.dequantize import numbers_of
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Forward, Heads, Matrix, Routing
from holdfast.kernels.philox import philox

_MAX_GATHERED_TOKENS = 1 << 16
"""Keys, padding included, that one batch of decodes copies out of the pages: bounds the memory of a step."""
_MAX_SCORE_ROWS = 256
"""Query rows whose scores are held in memory at once when torch's fused attention does not fit."""
_MAX_COUNTERS = 1 << 17
"""Philox counters of one call: some dozens of bytes of temporary memory each."""
_FEW_CANDIDATES = 1024
"""Tokens that top-p looks at first."""


@dataclass(frozen=True, slots=True)
class StackedMatrix:
    """The parts of a matrix one below the other, and what follows the product."""

    rows: Tensor
    """[N, K]; [2N, K] if gated, the gate first."""
    bias: Tensor | None
    activation: Activation | None
    gated: bool

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes


@dataclass(frozen=True, slots=True)
class _Group:
    """N requests of one query length L whose attention is one batched call over T padded keys."""

    rows: slice | Tensor
    """The tokens of the step that belong to it, request by request."""
    tables: Tensor
    """int64 [N, 1, blocks]."""
    positions: Tensor
    """int64 [N, L, 1]: of the queries."""
    keys: Tensor
    """int64 [T]: positions of the keys, 0 … T-1."""
    from_start: bool
    """One request whose queries are all its tokens: causal without a mask."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """By window, made when first asked for."""

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[N, 1, L, T] to add to scores: 0 where a query sees a key, -inf elsewhere. Padded keys lie in the
        future, so causality hides them too."""
        if window not in self.masks:
            hidden = self.keys > self.positions
            if window is not None:
                hidden |= self.keys <= self.positions - window
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[window] = zeros.masked_fill_(hidden, -torch.inf)[:, None]
        return self.masks[window]


class ReferenceKernels:
    """`Kernels` in torch; see the protocol for what each call promises. Quantized matrices become ones of `dtype`."""

    name = "reference"
    exact = False
    max_head_dim = 1 << 20
    sharded = False

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def pack(
        self,
        parts: Sequence[Matrix],
        biases: Sequence[Tensor] = (),
        *,
        activation: Activation | None = None,
        gated: bool = False,
        shards: Sequence[int] = (),
    ) -> StackedMatrix:
        rows = torch.cat([numbers_of(part, self.dtype) for part in parts])
        return StackedMatrix(rows, torch.cat(list(biases)) if biases else None, activation, gated)

    def linear(
        self, x: Tensor, weight: StackedMatrix, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        common = torch.promote_types(x.dtype, weight.rows.dtype)
        bias = None if weight.bias is None else weight.bias.to(common)
        out = F.linear(x.to(common), weight.rows.to(common), bias)
        if weight.gated:
            gate, up = out.chunk(2, dim=-1)
            out = activate(gate, weight.activation) * up
        else:
            out = activate(out, weight.activation)
        return _deliver(out, dtype or x.dtype, add_to)

    def embedding(
        self, ids: Tensor, table: StackedMatrix, *, scale: float = 1.0, offset: int = 0, add_to: Tensor | None = None
    ) -> Tensor:
        rows = ids + offset
        here = (rows >= 0) & (rows < table.rows.shape[0])
        found = F.embedding(rows.where(here, 0), table.rows).float() * scale
        return _deliver(found.where(here[:, None], 0.0) + 0.0, torch.float32, add_to)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *, add_to: Tensor | None = None
    ) -> Tensor:
        return _deliver(F.rms_norm(x.float(), weight.shape, weight, eps), dtype, add_to)

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
        return _deliver(F.layer_norm(x.float(), weight.shape, weight, bias, eps), dtype, add_to)

    def convert(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype, copy=True)  # or in float32 the residual stream would go by two names

    def store_kv(self, qkv: Tensor, heads: Heads, k_pages: Tensor, v_pages: Tensor, batch: BatchLayout) -> Tensor:
        sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
        q, k, v = torch.split(qkv.view(qkv.shape[0], -1, heads.head_dim), sizes, dim=1)
        block_size = k_pages.shape[2]
        blocks, offsets = batch.slots // block_size, batch.slots % block_size
        k_pages[blocks, :, offsets] = _place(k, heads, heads.k_norm, batch.positions).to(k_pages.dtype)
        v_pages[blocks, :, offsets] = v.to(v_pages.dtype)
        return _place(q, heads, heads.q_norm, batch.positions).to(qkv.dtype).flatten(1)

    def attention(  # noqa: PLR0917 - the protocol's
        self,
        q: Tensor,
        heads: Heads,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: BatchLayout,
        options: AttentionOptions,
    ) -> Tensor:
        out = torch.empty_like(q)
        for group in batch.derive("reference groups", partial(_groups, block_size=k_pages.shape[2])):
            count, length, _ = group.positions.shape
            queries = q[group.rows].view(count, length, heads.num_heads, heads.head_dim).transpose(1, 2)
            keys, values = _gather(k_pages, group.tables), _gather(v_pages, group.tables)
            if options.softcap is None and options.alibi_slopes is None:
                result = _fused_attention(queries, keys, values, group, options)
            else:
                result = _explicit_attention(queries, keys, values, group, options)
            out[group.rows] = result.transpose(1, 2).reshape(count * length, -1)
        return out

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        up: Sequence[StackedMatrix],
        down: Sequence[StackedMatrix],
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        chosen, shares = self.route(router_logits, routing)
        out = torch.zeros(x.shape[0], down[0].rows.shape[0], device=x.device)
        for expert in torch.unique(chosen).tolist():  # ascending
            tokens, choice = torch.nonzero(chosen == expert, as_tuple=True)
            result = self.linear(self.linear(x[tokens], up[expert]), down[expert], dtype=torch.float32)
            out.index_add_(0, tokens, result * shares[tokens, choice, None])
        return _deliver(out, x.dtype, add_to)

    def route(self, router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        probabilities = router_logits.float().softmax(dim=-1)
        # a stable sort, unlike topk, gives ties to the lowest expert
        ranked = probabilities.sort(dim=-1, descending=True, stable=True).indices
        ids = ranked[:, : routing.experts_per_token].sort(dim=-1).values
        shares = probabilities.gather(1, ids)
        return ids, shares / shares.sum(dim=-1, keepdim=True) if routing.renormalize else shares

    def expert_pairs(
        self,
        x: Tensor,
        ids: Tensor,
        up: Sequence[StackedMatrix],
        down: Sequence[Sequence[StackedMatrix]],
        out: Tensor,
    ) -> None:
        for index, matrix in enumerate(up):
            pairs = torch.nonzero(ids.flatten() == index).flatten()
            hidden, first = self.linear(x[pairs // ids.shape[1]], matrix), 0
            for matrices, y in zip(down, out, strict=True):
                columns = slice(first, first := first + matrices[index].rows.shape[1])
                y[pairs] = self.linear(hidden[:, columns], matrices[index], dtype=torch.float32)

    def combine(self, pairs: Tensor, shares: Tensor, dtype: torch.dtype, *, add_to: Tensor | None = None) -> Tensor:
        return _deliver((pairs.view(*shares.shape, -1) * shares[:, :, None]).sum(dim=1), dtype, add_to)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return x.div_(cap).tanh_().mul_(cap)

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)  # torch returns the first of equal maxima

    def add_gumbel_noise(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        vocab_size = logits.shape[1]
        rows_at_once = max(1, _MAX_COUNTERS * 4 // vocab_size)
        parts = (torch.split(tensor, rows_at_once) for tensor in (logits, seeds, positions))
        for rows, row_seeds, row_positions in zip(*parts, strict=True):
            rows.add_(_gumbel_rows(row_seeds, row_positions, vocab_size))
        return logits

    def filter_logits(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        if (min_p > 0).any():
            _drop_below(logits, logits.amax(dim=-1, keepdim=True) + min_p.log()[:, None])
        if (top_k > 0).any():
            ranked = logits.topk(min(int(top_k.max()), logits.shape[1]), dim=-1).values
            kth = ranked.gather(1, (top_k.clamp(1, ranked.shape[1]) - 1)[:, None])
            _drop_below(logits, kth.masked_fill_((top_k == 0)[:, None], -torch.inf))
        if (top_p < 1).any():
            _drop_below(logits, _nucleus(logits, top_p))
        return logits

    def record(self, forward: Forward, max_tokens: int) -> Forward:
        return forward


def _deliver(result: Tensor, dtype: torch.dtype, add_to: Tensor | None) -> Tensor:
    return result.to(dtype) if add_to is None else add_to.add_(result)


def activate(x: Tensor, kind: Activation | None) -> Tensor:
    if kind is None:
        return x
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _place(x: Tensor, heads: Heads, norm: Tensor | None, positions: Tensor) -> Tensor:
    """Heads x [T, heads, D] → normed and rotated, in float32 where anything is done to them."""
    if norm is not None:
        x = F.rms_norm(x.float(), norm.shape, norm, heads.eps)
    if heads.rope is None:
        return x
    cos, sin = heads.rope[positions][:, None].unbind(2)  # [T, 1, rotary_dim / 2] each
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _drop_below(logits: Tensor, threshold: Tensor) -> None:
    logits.masked_fill_(logits < threshold, -torch.inf)


def _nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """The least logit of each row's top-p set, [B, 1]; -inf where top_p is off."""
    vocab_size, count = logits.shape[1], _FEW_CANDIDATES
    total = logits.logsumexp(dim=-1, keepdim=True)
    while True:  # sorting the whole vocabulary costs ten times the first few, which mostly hold the mass
        ranked = logits.topk(min(count, vocab_size), dim=-1).values
        probabilities = (ranked - total).exp()
        if count >= vocab_size or not ((probabilities.sum(dim=-1) < top_p) & (top_p < 1)).any():
            break
        count *= 8
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    size = (mass_before < top_p[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
    return ranked.gather(1, size - 1).masked_fill_((top_p >= 1)[:, None], -torch.inf)


def _groups(batch: BatchLayout, *, block_size: int) -> list[_Group]:
    """The batched calls of a step: single-token queries together, by context length; longer ones alone."""
    starts = [0, *accumulate(batch.query_lens)]
    decodes = [index for index, length in enumerate(batch.query_lens) if length == 1]
    cuts: list[list[int]] = [[index] for index, length in enumerate(batch.query_lens) if length > 1]
    if len(decodes) * max((batch.context_lens[i] for i in decodes), default=0) > _MAX_GATHERED_TOKENS:
        decodes.sort(key=lambda index: batch.context_lens[index])
    members: list[int] = []
    for index in decodes:
        if members and (len(members) + 1) * batch.context_lens[index] > _MAX_GATHERED_TOKENS:
            cuts.append(members)
            members = []
        members.append(index)
    return [_group(batch, cut, starts, block_size) for cut in (*cuts, members) if cut]


def _group(batch: BatchLayout, members: list[int], starts: list[int], block_size: int) -> _Group:
    first, count, length = members[0], len(members), batch.query_lens[members[0]]
    device = batch.positions.device
    num_blocks = -(-max(batch.context_lens[index] for index in members) // block_size)
    consecutive = (
        members == list(range(first, first + count)) and starts[first + count] - starts[first] == count * length
    )
    if consecutive:
        rows: slice | Tensor = slice(starts[first], starts[first] + count * length)
        tables = batch.block_tables[first : first + count, :num_blocks]
    else:
        rows = torch.tensor([starts[index] for index in members], device=device)
        tables = batch.block_tables[torch.tensor(members, device=device), :num_blocks]
    keys = torch.arange(num_blocks * block_size, device=device)
    positions = batch.positions[rows].view(count, length, 1)
    from_start = count == 1 and length == batch.context_lens[first]
    return _Group(rows, tables.long()[:, None], positions, keys, from_start)


def _gather(pages: Tensor, tables: Tensor) -> Tensor:
    """Pages [P, G, S, D] at tables [N, 1, W] → [N, G, W·S, D]: one copy of whole (block, head) cells."""
    num_blocks, num_kv_heads, block_size, head_dim = pages.shape
    cells = tables * num_kv_heads + torch.arange(num_kv_heads, device=tables.device)[:, None]
    rows = pages.view(num_blocks * num_kv_heads, block_size * head_dim).index_select(0, cells.flatten())
    return rows.view(tables.shape[0], num_kv_heads, tables.shape[2] * block_size, head_dim)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, group: _Group, options: AttentionOptions) -> Tensor:
    """q [N, H, L, D], k and v [N, G, T, D] → [N, H, L, D]."""
    count, num_heads, length, head_dim = q.shape
    if length == 1:
        mask = group.mask(options.window, q.dtype)
        # the H / G query heads of a KV head become rows of one query: no copy of k and v per head
        grouped = q.reshape(count, k.shape[1], num_heads // k.shape[1], head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, mask, scale=options.scale).view(q.shape)
    if group.from_start and options.window is None:
        k, v = k[:, :, :length], v[:, :, :length]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scale, enable_gqa=True)
    mask = group.mask(options.window, q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=options.scale, enable_gqa=True)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, group: _Group, options: AttentionOptions) -> Tensor:
    """As `_fused_attention`, with soft-cap and ALiBi, in float32."""
    count, num_heads, length, head_dim = q.shape
    num_kv_heads = k.shape[1]
    k, v = k.float()[:, :, None], v.float()[:, :, None]
    grouped = q.float().view(count, num_kv_heads, num_heads // num_kv_heads, length, head_dim)
    mask = group.mask(options.window, q.dtype)[:, None]
    out = torch.empty_like(grouped)
    for start in range(0, length, _MAX_SCORE_ROWS):
        rows = slice(start, start + _MAX_SCORE_ROWS)
        scores = grouped[:, :, :, rows] @ k.transpose(-1, -2) * options.scale
        if options.softcap is not None:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        if options.alibi_slopes is not None:
            slopes = options.alibi_slopes.view(num_kv_heads, -1, 1, 1)
            scores += slopes * (group.keys - group.positions[:, None, None, rows])
        scores += mask[:, :, :, rows]
        out[:, :, :, rows] = scores.softmax(dim=-1) @ v
    return out.view(q.shape).to(q.dtype)


def _gumbel_rows(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    blocks = torch.arange(-(-vocab_size // 4), device=seeds.device)
    zeros = torch.zeros_like(blocks)
    mask = 0xFFFFFFFF
    seeds, positions = seeds[:, None], positions[:, None]
    words = philox((blocks, positions & mask, zeros, zeros), (seeds & mask, (seeds >> 32) & mask))
    # float64: in float32 the largest words round to a uniform of 1, whose noise is -inf
    uniform = (torch.stack(words, dim=-1).flatten(1)[:, :vocab_size].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform)).float()
