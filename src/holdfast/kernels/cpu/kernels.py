"""The CPU backend: `Kernels` as operations of a step program that a team of threads runs in C.

Every call makes one or a few operations. They run at once, or, while a step is being recorded, are put down to be
run again and again without Python. Results are the same bits whatever rows share a call: see the comments in csrc.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.core.spec import Activation
from holdfast.kernels.cpu import structs
from holdfast.kernels.cpu.executor import Executor
from holdfast.kernels.cpu.experts import combine, into_experts, out_of_experts, route
from holdfast.kernels.cpu.library import Library
from holdfast.kernels.cpu.memory import Arena, WeightMemory
from holdfast.kernels.cpu.operands import numbers, pages_of, rows_of, shape_of_logits
from holdfast.kernels.cpu.packing import PackedMatrix, pack
from holdfast.kernels.cpu.structs import DTYPES, MAX_HEAD_DIM
from holdfast.kernels.dequantize import numbers_of
from holdfast.kernels.interface import (
    GROUP,
    AttentionOptions,
    BatchLayout,
    Forward,
    Heads,
    Matrix,
    Quantized,
    Routing,
)


class CpuKernels:
    """`dtype`: the model's, float32 or bfloat16; in float32 quantized matrices are held dequantized, since their
    products round the rows, to `activation_bits` (8 or 16). `pinned`: bind each thread to a core, the caller's too.
    `memory`: for packed matrices; by default this process's own.

    Raises what `Library` raises; `ConfigError` when there are no threads to be had.
    """

    exact = True
    max_head_dim = MAX_HEAD_DIM
    sharded = True

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        *,
        pinned: bool = False,
        activation_bits: int = 16,
        isa: str | None = None,
        memory: WeightMemory | None = None,
    ) -> None:
        assert dtype in (torch.float32, torch.bfloat16), dtype
        assert activation_bits in (8, 16), activation_bits
        self.dtype = dtype
        self._digits = activation_bits // 8
        self._library = Library(isa)
        self.name = f"cpu-{self._library.isa}"
        self.executor = Executor(self._library, threads, pinned=pinned)
        self._memory = memory or Arena()

    # --- matrices ---

    def pack(
        self,
        parts: Sequence[Matrix],
        biases: Sequence[Tensor] = (),
        *,
        activation: Activation | None = None,
        gated: bool = False,
        shards: Sequence[int] = (),
    ) -> PackedMatrix:
        if self.dtype == torch.float32 or any(end % GROUP for end in shards):
            parts = [numbers_of(part, self.dtype) for part in parts]
        parts = [numbers_of(part, self.dtype) if _is_fp8(part) else part for part in parts]
        return pack(self._library, self._memory, parts, biases, activation=activation, gated=gated, shards=shards)

    def linear(
        self, x: Tensor, weight: PackedMatrix, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        y = self.executor.result(x.shape[0], weight.columns, dtype or x.dtype, add_to)
        x = self.as_operand(x, weight)
        self.product(x, y, weight, ctypes.pointer(weight.c), keep=(weight,), add=add_to is not None)
        return y

    def embedding(
        self, ids: Tensor, table: PackedMatrix, *, scale: float = 1.0, offset: int = 0, add_to: Tensor | None = None
    ) -> Tensor:
        y = self.executor.result(ids.shape[0], table.c.k, torch.float32, add_to)
        operation = structs.Embedding(
            ids=numbers(ids, torch.int64, ids.shape[0]),
            table=ctypes.pointer(table.c),
            y=rows_of(y),
            offset=offset,
            add=add_to is not None,
            scale=scale,
        )
        self.executor.run(operation, ids.shape[0], keep=(ids, table))
        return y

    def as_operand(self, x: Tensor, weight: PackedMatrix) -> Tensor:
        """x in a dtype that `product` takes with `weight`."""
        dtype = self.operand_dtype(x.dtype, weight)
        return x if x.dtype == dtype else self.convert(x, dtype)

    def operand_dtype(self, dtype: torch.dtype, weight: PackedMatrix) -> torch.dtype:
        if weight.format not in DTYPES or (self._library.dots_bf16 and weight.format == "bfloat16"):
            return dtype
        return torch.float32

    def product(
        self,
        x: Tensor,
        y: Tensor,
        weight: PackedMatrix,
        weights: Any,
        *,
        keep: tuple[Any, ...],
        add: bool = False,
        offsets: Tensor | None = None,
        groups: int = 1,
        per_row: int = 1,
    ) -> None:
        """y = x · weight. With `offsets`: `groups` weights alike, `per_row` rows of x for every row of the step."""
        rows, k, factors = x.shape[0] // per_row, weight.c.k, None
        assert x.shape[1] == k, f"rows of {x.shape[1]} numbers, K is {k}"
        if weight.format not in DTYPES:
            factors = self.executor.new(x.shape[0], k // GROUP * 2, torch.float32, dense=True)
            codes = self.executor.new(x.shape[0], self._digits * k, torch.int8)
            quantize = structs.Quantize(
                x=rows_of(x),
                y=rows_of(codes),
                factors=factors.data_ptr(),
                k=k,
                per_row=per_row,
                offset=128 if weight.format == "Q8_0" else 0,
                digits=self._digits,
            )
            self.executor.run(quantize, rows)
            x = codes
        linear = structs.Linear(
            x=rows_of(x),
            y=rows_of(y),
            weights=weights,
            offsets=None if offsets is None else offsets.data_ptr(),
            groups=groups,
            factors=None if factors is None else factors.data_ptr(),
            digits=self._digits,
            add=add,
        )
        self.executor.run(linear, rows, keep=(weights, *keep))

    # --- rows ---

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *, add_to: Tensor | None = None
    ) -> Tensor:
        return self._norm(x, weight, None, eps, dtype, add_to)

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

    def _norm(  # noqa: PLR0917 - the two above, in one
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        add_to: Tensor | None,
        *,
        centered: bool = False,
    ) -> Tensor:
        rows, width = x.shape
        y = self.executor.result(rows, width, dtype, add_to)
        operation = structs.Norm(
            x=rows_of(x),
            y=rows_of(y),
            weight=numbers(weight, torch.float32, width),
            bias=numbers(bias, torch.float32, width),
            width=width,
            centered=centered,
            add=add_to is not None,
            eps=eps,
        )
        self.executor.run(operation, rows, keep=(weight, bias))
        return y

    def convert(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = self.executor.result(x.shape[0], x.shape[1], dtype)
        self.executor.run(structs.Convert(x=rows_of(x), y=rows_of(y), width=x.shape[1]), x.shape[0])
        return y

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        self.executor.run(structs.Softcap(x=rows_of(x), width=x.shape[1], cap=cap), x.shape[0])
        return x

    # --- attention ---

    def store_kv(self, qkv: Tensor, heads: Heads, k_pages: Tensor, v_pages: Tensor, batch: BatchLayout) -> Tensor:
        assert qkv.shape[1] == (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, "q, k and v side by side"
        rotary = 0 if heads.rope is None else 2 * heads.rope.shape[2]
        assert rotary <= heads.head_dim
        operation = structs.StoreKV(
            qkv=rows_of(qkv),
            pages=pages_of(k_pages, v_pages, heads, qkv),
            q_norm=numbers(heads.q_norm, torch.float32, heads.head_dim),
            k_norm=numbers(heads.k_norm, torch.float32, heads.head_dim),
            cos_sin=numbers(heads.rope, torch.float32),
            heads=heads.num_heads,
            rotary=rotary,
            eps=heads.eps,
        )
        self.executor.run_step([operation], qkv.shape[0], heads, batch, keep=(heads, k_pages, v_pages))
        return qkv[:, : heads.num_heads * heads.head_dim]

    def attention(  # noqa: PLR0917 - the protocol's
        self,
        q: Tensor,
        heads: Heads,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: BatchLayout,
        options: AttentionOptions,
    ) -> Tensor:
        assert q.shape[1] == heads.num_heads * heads.head_dim
        assert heads.num_heads % heads.num_kv_heads == 0
        out = self.executor.result(q.shape[0], q.shape[1], q.dtype)
        operations = [
            kind(
                q=rows_of(q),
                y=rows_of(out),
                pages=pages_of(k_pages, v_pages, heads, q),
                alibi=numbers(options.alibi_slopes, torch.float32, heads.num_heads),
                heads=heads.num_heads,
                window=options.window or 0,
                scale=options.scale,
                softcap=options.softcap or 0.0,
                partial=self.executor.partial,
            )
            for kind in (structs.Attention, structs.Merge)
        ]
        self.executor.run_step(operations, q.shape[0], heads, batch, keep=(options, k_pages, v_pages))
        return out

    # --- experts ---

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        up: Sequence[PackedMatrix],
        down: Sequence[PackedMatrix],
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        assert router_logits.shape == (x.shape[0], len(up)), router_logits.shape
        assert len(up) == len(down)
        routed = route(self, router_logits, routing)
        hidden = into_experts(self, x, routed, up, down[0])
        return combine(self, out_of_experts(self, hidden, routed, down), routed, x.dtype, add_to)

    # --- sampling ---

    def argmax(self, logits: Tensor) -> Tensor:
        rows, width = shape_of_logits(logits)
        chosen = self.executor.new(rows, 1, torch.int64, dense=True)
        self.executor.run(structs.Argmax(logits=rows_of(logits), chosen=chosen.data_ptr(), width=width), rows)
        return chosen[:, 0]

    def add_gumbel_noise(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        rows, width = shape_of_logits(logits)
        operation = structs.Noise(
            logits=rows_of(logits),
            seeds=numbers(seeds, torch.int64, rows),
            positions=numbers(positions, torch.int64, rows),
            width=width,
        )
        self.executor.run(operation, rows, keep=(seeds, positions))
        return logits

    def filter_logits(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        rows, width = shape_of_logits(logits)
        operation = structs.Filter(
            logits=rows_of(logits),
            top_k=numbers(top_k, torch.int64, rows),
            top_p=numbers(top_p, torch.float32, rows),
            min_p=numbers(min_p, torch.float32, rows),
            width=width,
        )
        self.executor.run(operation, rows, keep=(top_k, top_p, min_p))
        return logits

    def record(self, forward: Forward, max_tokens: int) -> Forward:
        return self.executor.record(forward, max_tokens)


def _is_fp8(part: Matrix) -> bool:
    """Of which there are no CPU kernels: it becomes numbers of the model's dtype."""
    return isinstance(part, Quantized) and part.format == "FP8"
