"""The GPU backend: `Kernels` in Triton.

Results are the same bits whatever rows share a call; each module says how. Nothing here waits for the device: every
size that a launch needs is known on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.core.spec import Activation
from holdfast.kernels.cuda import attention, linear, rows, sample
from holdfast.kernels.cuda.formats import Codes, split
from holdfast.kernels.cuda.graphs import GraphProgram, prefill_tiles, step_tensors
from holdfast.kernels.cuda.linear import ACTIVATIONS, FEW_ROWS, FUSED_SHARDS, MAX_SHARDS, DeviceMatrix
from holdfast.kernels.dequantize import numbers_of
from holdfast.kernels.interface import (
    FP8_GROUP,
    GROUP,
    AttentionOptions,
    BatchLayout,
    Forward,
    Heads,
    Matrix,
    Quantized,
    Routing,
)

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
DOT_TYPES = TYPES | ({torch.bfloat16: tl.float32} if triton.knobs.runtime.interpret else {})
"""In which matrix instructions are fed. Triton's interpreter multiplies the bits of bfloat16 as integers; the numbers
themselves fit float32, and so do their products."""
QUERY_ROWS = 64
"""Of a prefill tile: tokens times the query heads that share a KV head. Fewer where registers would not do."""
JOIN_BLOCKS = {"BLOCK_N": 64, "BLOCK_T": 16, "BLOCK_K": 64, "num_warps": 4}
"""Of tiles that only add up what shards have left: small, for the sums that wait are many."""
ROW_BLOCK = 1024
ROUNDED = {"enable_fp_fusion": False}
"""Compiled so that a product and a sum are rounded one by one, as written: alike in every kernel that does them."""


class CudaKernels:
    """`dtype`: the model's; quantized matrices are held as they are, but in a float32 model dequantized. `sharded`:
    sum row-parallel matrices by their virtual shards, so that every plan gives the same bits. `num_stages`: tiles
    that a product has in shared memory or on their way there."""

    name = "cuda"
    exact = True
    max_head_dim = 256

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, sharded: bool = True, num_stages: int = 3) -> None:
        self.dtype = dtype
        self._num_stages = num_stages
        self.sharded = sharded
        self._tables: dict[tuple[DeviceMatrix, ...], Tensor] = {}
        """Where the experts of a layer are. Held with them, so that no address is of what is gone, and by the
        program whose graphs read it, for experts may be moved."""

    # --- matrices ---

    def pack(
        self,
        parts: Sequence[Matrix],
        biases: Sequence[Tensor] = (),
        *,
        activation: Activation | None = None,
        gated: bool = False,
        shards: Sequence[int] = (),
    ) -> DeviceMatrix:
        shards = shards if self.sharded else ()
        assert len(shards) <= MAX_SHARDS
        assert not (gated and shards), "gate and up are cut by columns"
        group = FP8_GROUP if isinstance(parts[0], Quantized) and parts[0].format == "FP8" else GROUP
        if self.dtype == torch.float32 or any(end % group for end in shards):
            parts = [numbers_of(part, self.dtype) for part in parts]
        total, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
        codes = _stack([_codes(part) for part in parts])
        device = codes.codes.device
        return DeviceMatrix(
            codes,
            rows=total // 2 if gated else total,
            columns=width,
            bias=torch.cat(list(biases)).float().to(device) if biases else None,
            activation=ACTIVATIONS[activation],
            gated=gated,
            shard_ends=torch.tensor(shards or (width,), dtype=torch.int32, device=device),
            align=math.gcd(16, *shards, width),
        )

    def linear(
        self, x: Tensor, weight: DeviceMatrix, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        count, shards = x.shape[0], weight.num_shards
        y = add_to if add_to is not None else self._new(x, count, weight.rows, dtype or x.dtype)
        by_memory = shards > FUSED_SHARDS or (shards > 1 and count <= FEW_ROWS)
        sums = x.new_empty(shards * count * weight.rows, dtype=torch.float32) if by_memory else x
        for stage in (linear.ONE_SHARD, linear.JOIN) if by_memory else (linear.WHOLE,):
            blocks = JOIN_BLOCKS if stage is linear.JOIN else _blocks(x, count, self._num_stages)
            tiles = (triton.cdiv(count, blocks["BLOCK_T"]), triton.cdiv(weight.rows, blocks["BLOCK_N"]))
            linear.linear_kernel[(*tiles, shards if stage is linear.ONE_SHARD else 1)](
                *_operands(weight), weight.shard_ends, x, x.stride(0), y, y.stride(0), sums, count, weight.rows,
                weight.columns, STAGE=stage, **_constants(weight, x), GATED=weight.gated, ADD=add_to is not None,
                **blocks, **ROUNDED,
            )  # fmt: skip
        return y

    def embedding(
        self, ids: Tensor, table: DeviceMatrix, *, scale: float = 1.0, offset: int = 0, add_to: Tensor | None = None
    ) -> Tensor:
        y = add_to if add_to is not None else self._new(table.codes.codes, ids.shape[0], table.columns, torch.float32)
        codes, scales, minima, _ = _operands(table)
        rows.embed_row[(ids.shape[0],)](
            ids, codes, scales, minima, y, y.stride(0), table.rows, table.columns, scale, offset,
            FORMAT=table.codes.format, ADD=add_to is not None, BLOCK=max(32, triton.next_power_of_2(table.columns)),
            **ROUNDED,
        )  # fmt: skip
        return y

    # --- rows ---

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *, add_to: Tensor | None = None
    ) -> Tensor:
        return self._norm(x, weight, None, eps, dtype, add_to, centered=False)

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
        return self._norm(x, weight, bias, eps, dtype, add_to, centered=True)

    def _norm(  # noqa: PLR0917
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        add_to: Tensor | None,
        *,
        centered: bool,
    ) -> Tensor:
        y = add_to if add_to is not None else self._new(x, x.shape[0], x.shape[1], dtype)
        rows.norm_row[(x.shape[0],)](
            x, y, weight, weight if bias is None else bias, x.stride(0), y.stride(0), x.shape[1], eps,
            CENTERED=centered, BIASED=bias is not None, ADD=add_to is not None,
            BLOCK=triton.next_power_of_2(x.shape[1]), **ROUNDED,
        )  # fmt: skip
        return y

    def convert(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._convert(x, self._new(x, x.shape[0], x.shape[1], dtype), None)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return self._convert(x, x, cap)

    def _convert(self, x: Tensor, y: Tensor, cap: float | None) -> Tensor:
        grid = (x.shape[0], triton.cdiv(x.shape[1], ROW_BLOCK))
        at = (x, y, x.stride(0), y.stride(0), x.shape[1], cap or 1.0)
        rows.convert_row[grid](*at, CAPPED=cap is not None, BLOCK=ROW_BLOCK, **ROUNDED)
        return y

    # --- attention ---

    def store_kv(self, qkv: Tensor, heads: Heads, k_pages: Tensor, v_pages: Tensor, batch: BatchLayout) -> Tensor:
        H, G, S, D = heads.num_heads, heads.num_kv_heads, k_pages.shape[2], heads.head_dim
        q = self._new(qkv, qkv.shape[0], H * D, qkv.dtype)
        nothing = batch.positions  # a pointer that is not followed
        attention.place_head[(qkv.shape[0], H + 2 * G)](
            qkv, q, k_pages, v_pages, batch.slots, batch.positions,
            *(nothing if x is None else x for x in (heads.rope, heads.q_norm, heads.k_norm)),
            qkv.stride(0), q.stride(0), heads.eps, H=H, G=G, S=S, D=D,
            HALF=0 if heads.rope is None else heads.rope.shape[2], NORMED=heads.q_norm is not None,
            BLOCK=triton.next_power_of_2(D), num_warps=1, **ROUNDED,
        )  # fmt: skip
        return q

    def attention(  # noqa: PLR0917 - the protocol's
        self,
        q: Tensor,
        heads: Heads,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: BatchLayout,
        options: AttentionOptions,
    ) -> Tensor:
        H, G, D = heads.num_heads, heads.num_kv_heads, heads.head_dim
        out = self._new(q, q.shape[0], H * D, q.dtype)
        rows_at_once = 16 if q.dtype == torch.float32 else 32 if D > 128 else QUERY_ROWS
        group = min(triton.next_power_of_2(H // G), rows_at_once)
        tokens = rows_at_once // group
        step = batch.derive("cuda", step_tensors)
        shape = {
            "H": H, "G": G, "S": k_pages.shape[2], "D": D, "WINDOW": options.window or 0,
            "CAPPED": options.softcap is not None, "SLOPED": options.alibi_slopes is not None,
            "BLOCK_D": max(16, triton.next_power_of_2(D)), "TILE": attention.KEY_TILE, "SPLIT_KEYS": attention.SPLIT,
            "DOT": DOT_TYPES[q.dtype], "num_stages": 1 if D > 128 else self._num_stages - 1,
        }  # fmt: skip
        slopes = q if options.alibi_slopes is None else options.alibi_slopes
        splits = max(step.num_splits, 1)
        num_requests = step.lens.shape[0]
        tiles = batch.derive(f"cuda tiles of {tokens}", partial(prefill_tiles, tokens)) if step.prefills else None
        states = q.new_empty(num_requests * H * splits * (D + 2) if splits > 1 else 1, dtype=torch.float32)
        at = (
            q, out, k_pages, v_pages, batch.block_tables, batch.block_tables.shape[1], step.starts, step.lens,
            step.lens if tiles is None else tiles, states, slopes, q.stride(0), out.stride(0), options.scale,
            options.softcap or 1.0, splits,
        )  # fmt: skip
        if tiles is not None:
            chunks = triton.cdiv(H // G, group)
            attention.attend[(tiles.shape[0], G * chunks)](
                *at, **shape, DECODE=False, TOKENS=tokens, HEADS=group, **ROUNDED
            )
        if step.num_splits:
            few = max(16, group)
            grid = (num_requests, G * triton.cdiv(H // G, few), splits)
            attention.attend[grid](*at, **shape, DECODE=True, TOKENS=1, HEADS=few, **ROUNDED)
        if splits > 1:
            attention.merge[(num_requests, H)](
                out, step.starts, step.lens, states, out.stride(0), splits, H=H, D=D, WINDOW=shape["WINDOW"],
                BLOCK_D=shape["BLOCK_D"], TILE=shape["TILE"], SPLIT_KEYS=shape["SPLIT_KEYS"], **ROUNDED,
            )  # fmt: skip
        return out

    # --- experts ---

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        up: Sequence[DeviceMatrix],
        down: Sequence[DeviceMatrix],
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        ids, shares = self.route(router_logits, routing)
        pairs = torch.empty(1, ids.numel(), down[0].rows, dtype=torch.float32, device=x.device)
        self.expert_pairs(x, ids, up, [down], pairs)
        return self.combine(pairs[0], shares, x.dtype, add_to=add_to)

    def route(self, router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        (count, experts), chosen = router_logits.shape, routing.experts_per_token
        ids = torch.empty(count, chosen, dtype=torch.int64, device=router_logits.device)
        shares = torch.empty(count, chosen, dtype=torch.float32, device=router_logits.device)
        rows.route_row[(count,)](
            router_logits, ids, shares, router_logits.stride(0), experts, CHOSEN=chosen,
            RENORMALIZE=routing.renormalize, BLOCK=triton.next_power_of_2(experts), **ROUNDED,
        )  # fmt: skip
        return ids, shares

    def expert_pairs(
        self, x: Tensor, ids: Tensor, up: Sequence[DeviceMatrix], down: Sequence[Sequence[DeviceMatrix]], out: Tensor
    ) -> None:
        sorted_ids, order = ids.flatten().sort(stable=True)
        offsets = torch.searchsorted(sorted_ids, torch.arange(len(up) + 1, device=x.device))
        hidden, chosen, first = self._new(x, ids.numel(), up[0].rows, x.dtype), ids.shape[1], 0
        self._grouped(x, hidden, up, offsets, order, chosen, gather=True)
        for matrices, y in zip(down, out, strict=True):
            columns = slice(first, first := first + matrices[0].columns)
            self._grouped(hidden[:, columns], y, matrices, offsets, order, chosen, gather=False)

    def combine(self, pairs: Tensor, shares: Tensor, dtype: torch.dtype, *, add_to: Tensor | None = None) -> Tensor:
        count, chosen = shares.shape
        y = add_to if add_to is not None else self._new(pairs, count, pairs.shape[1], dtype)
        rows.combine_row[(count, triton.cdiv(y.shape[1], ROW_BLOCK))](
            pairs, shares, y, y.stride(0), y.shape[1], CHOSEN=chosen, ADD=add_to is not None, BLOCK=ROW_BLOCK,
            **ROUNDED,
        )  # fmt: skip
        return y

    def _grouped(  # noqa: PLR0917
        self,
        x: Tensor,
        y: Tensor,
        experts: Sequence[DeviceMatrix],
        offsets: Tensor,
        order: Tensor,
        per_row: int,
        *,
        gather: bool,
    ) -> None:
        one, pairs = experts[0], y.shape[0]
        blocks = _blocks(x, triton.cdiv(pairs, len(experts)), self._num_stages)
        tiles = min(triton.cdiv(pairs, blocks["BLOCK_T"]) + len(experts), pairs)
        linear.experts_kernel[(triton.cdiv(one.rows, blocks["BLOCK_N"]), tiles)](
            self._table(experts), one.shard_ends, offsets, order, x, x.stride(0), y, y.stride(0), one.rows,
            one.columns, len(experts), per_row, HELD=TYPES[one.codes.codes.dtype], **_constants(one, x),
            GATED=one.gated, GATHER=gather, BLOCK_E=max(2, triton.next_power_of_2(len(experts))), **blocks, **ROUNDED,
        )  # fmt: skip

    def _table(self, experts: Sequence[DeviceMatrix]) -> Tensor:
        """Made once: within a CUDA graph nothing can come from the host."""
        key = tuple(experts)
        if key not in self._tables:
            addresses = [expert.addresses for expert in experts]
            self._tables[key] = torch.tensor(addresses, dtype=torch.int64, device=experts[0].codes.codes.device)
        return self._tables[key]

    # --- sampling ---

    def argmax(self, logits: Tensor) -> Tensor:
        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        sample.argmax_row[(logits.shape[0],)](
            logits, out, logits.stride(0), logits.shape[1], BLOCK=ROW_BLOCK, **ROUNDED
        )
        return out

    def add_gumbel_noise(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        grid = (logits.shape[0], triton.cdiv(logits.shape[1], 4 * ROW_BLOCK))
        sample.noise_block[grid](
            logits, seeds, positions, logits.stride(0), logits.shape[1], BLOCK=ROW_BLOCK, **ROUNDED
        )
        return logits

    def filter_logits(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        at = (logits, top_k, top_p, min_p, logits.stride(0), logits.shape[1])
        sample.filter_row[(logits.shape[0],)](*at, BLOCK=4 * ROW_BLOCK, **ROUNDED)
        return logits

    # --- running ---

    def record(self, forward: Forward, max_tokens: int) -> GraphProgram:
        self._tables = {}
        return GraphProgram(forward, torch.device("cuda" if torch.cuda.is_available() else "cpu"), self._tables)

    @staticmethod
    def _new(like: Tensor, count: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, width, dtype=dtype, device=like.device)


def _codes(part: Matrix) -> Codes:
    return split(part) if isinstance(part, Quantized) else Codes(0, part)


def _stack(parts: list[Codes]) -> Codes:
    """One below the other, contiguous."""

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(found).contiguous() if found else None

    assert len({part.format for part in parts}) == 1, "parts of one matrix are stored alike"
    codes = joined([part.codes for part in parts])
    assert codes is not None
    scales, minima = joined([part.scales for part in parts]), joined([part.minima for part in parts])
    return Codes(parts[0].format, codes, scales, minima)


def _operands(weight: DeviceMatrix) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, minima, bias; where there is none, a pointer that is not followed."""
    codes = weight.codes
    return tuple(codes.codes if x is None else x for x in (codes.codes, codes.scales, codes.minima, weight.bias))  # type: ignore[return-value]


def _constants(weight: DeviceMatrix, x: Tensor) -> dict[str, Any]:
    dense = weight.codes.format == 0
    common = torch.promote_types(x.dtype, weight.codes.codes.dtype) if dense else x.dtype
    return {
        "FORMAT": weight.codes.format,
        "DOT": DOT_TYPES[common],
        "SHARDS": weight.num_shards,
        "ALIGN": weight.align,
        "BIASED": weight.bias is not None,
        "ACTIVATION": weight.activation,
    }


def _blocks(x: Tensor, count: int, num_stages: int) -> dict[str, int]:
    """The size of a tile, by the number of rows; the step along K is the same for all. Tiles of few rows wait for
    memory alone: more of them are on their way."""
    block_t = min(max(16, triton.next_power_of_2(count)), 128)
    wide = block_t == 128
    return {
        "BLOCK_N": 128 if wide else 64,
        "BLOCK_T": block_t,
        "BLOCK_K": 32 if x.dtype == torch.float32 else 64,
        "num_warps": 8 if wide else 4,
        "num_stages": num_stages * 2 if block_t <= 32 else num_stages,
    }
