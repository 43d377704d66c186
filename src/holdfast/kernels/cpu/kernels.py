"""The CPU backend: `Kernels` as operations of a step program that a team of threads runs in C.

Every call makes one or a few operations. They run at once, or, while a step is being recorded, are put down to be
run again and again without Python. Results are the same bits whatever rows share a call: see the comments in csrc.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from holdfast.core.spec import Activation
from holdfast.kernels.cpu import structs
from holdfast.kernels.cpu.library import Library
from holdfast.kernels.cpu.memory import Arena, new_tensor
from holdfast.kernels.cpu.packing import PackedMatrix, pack, weight_array
from holdfast.kernels.cpu.program import Program, Recording
from holdfast.kernels.cpu.step import PARTIAL_FLOATS, StepBatch
from holdfast.kernels.cpu.structs import DTYPES, Pages, Rows
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

MAX_HEAD_DIM = 512
MAX_SHARDS = 256


class CpuKernels:
    """`dtype`: the model's, float32 or bfloat16; in float32 quantized matrices are held dequantized, since their
    products round the rows, to `activation_bits` (8 or 16). `pinned`: bind each thread to a core, the caller's too.

    Raises what `Library` raises; `OSError` when there are no threads to be had.
    """

    exact = True

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        *,
        pinned: bool = False,
        activation_bits: int = 8,
        isa: str | None = None,
    ) -> None:
        assert dtype in (torch.float32, torch.bfloat16), dtype
        assert activation_bits in (8, 16), activation_bits
        self.dtype = dtype
        self._digits = activation_bits // 8
        self._library = Library(isa)
        self.name = f"cpu-{self._library.isa}"
        cores = sorted(os.sched_getaffinity(0))  # more threads than that share them
        cpus = [cores[i % len(cores)] for i in range(threads)] if pinned else None
        self._team = self._library.start_team(threads, cpus)
        weakref.finalize(self, self._library.stop_team, self._team)
        self._arena = Arena()
        self._partial = np.empty(PARTIAL_FLOATS, dtype=np.float32)
        self._recording: Recording | None = None

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
        assert len(shards) <= MAX_SHARDS
        if self.dtype == torch.float32 or any(end % GROUP for end in shards):
            parts = [_dense(part, self.dtype) for part in parts]
        return pack(self._library, self._arena, parts, biases, activation=activation, gated=gated, shards=shards)

    def linear(
        self, x: Tensor, weight: PackedMatrix, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        y = add_to if add_to is not None else self._new(x.shape[0], weight.columns, dtype or x.dtype)
        x = self._as_operand(x, weight)
        self._product(x, y, weight, ctypes.pointer(weight.c), keep=(weight,), add=add_to is not None)
        return y

    def embedding(
        self, ids: Tensor, table: PackedMatrix, *, scale: float = 1.0, offset: int = 0, add_to: Tensor | None = None
    ) -> Tensor:
        y = add_to if add_to is not None else self._new(ids.shape[0], table.c.k, torch.float32)
        add = add_to is not None
        operation = structs.Embedding(ids.data_ptr(), ctypes.pointer(table.c), _rows(y), offset, add, scale)
        self._run(operation, ids.shape[0], keep=(table,))
        return y

    def _as_operand(self, x: Tensor, weight: PackedMatrix) -> Tensor:
        """x in a dtype that `_product` takes with `weight`."""
        dtype = self._operand_dtype(x.dtype, weight)
        return x if x.dtype == dtype else self.convert(x, dtype)

    def _operand_dtype(self, dtype: torch.dtype, weight: PackedMatrix) -> torch.dtype:
        dense = weight.format in DTYPES
        return torch.float32 if dense and not (self._library.dots_bf16 and weight.format == "bfloat16") else dtype

    def _product(
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
        if weight.format not in DTYPES:
            factors = self._new(x.shape[0], k // GROUP * 2, torch.float32, dense=True)
            codes = self._new(x.shape[0], self._digits * k, torch.int8)
            offset = 128 if weight.format == "Q8_0" else 0
            how = (k, per_row, offset, self._digits)
            self._run(structs.Quantize(_rows(x), _rows(codes), factors.data_ptr(), *how), rows)
            x = codes
        at = (_rows(x), _rows(y), weights, _pointer(offsets), groups, _pointer(factors))
        self._run(structs.Linear(*at, self._digits, add), rows, keep=(weights, *keep))

    # --- rows ---

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *, add_to: Tensor | None = None
    ) -> Tensor:
        y = self._target(x, dtype, add_to)
        self._norm(x, y, weight, None, eps=eps, centered=False, add=add_to is not None)
        return y

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
        y = self._target(x, dtype, add_to)
        self._norm(x, y, weight, bias, eps=eps, centered=True, add=add_to is not None)
        return y

    def _norm(
        self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, centered: bool, add: bool
    ) -> None:
        at = (_rows(x), _rows(y), _pointer(weight), _pointer(bias))
        self._run(structs.Norm(*at, x.shape[1], centered, add, eps), x.shape[0], keep=(weight, bias))

    def convert(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = self._target(x, dtype)
        self._run(structs.Convert(_rows(x), _rows(y), x.shape[1]), x.shape[0])
        return y

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        self._run(structs.Softcap(_rows(x), x.shape[1], cap), x.shape[0])
        return x

    # --- attention ---

    def store_kv(self, qkv: Tensor, heads: Heads, k_pages: Tensor, v_pages: Tensor, batch: BatchLayout) -> Tensor:
        assert heads.head_dim <= MAX_HEAD_DIM
        operation = structs.StoreKV(
            _rows(qkv),
            _pages(k_pages, v_pages),
            _pointer(heads.q_norm),
            _pointer(heads.k_norm),
            _pointer(heads.rope),
            heads.num_heads,
            0 if heads.rope is None else 2 * heads.rope.shape[2],
            heads.eps,
        )
        self._run_step([operation], heads, batch, keep=(heads, k_pages, v_pages))
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
        out = self._target(q, q.dtype)
        operations = [
            kind(
                _rows(q),
                _rows(out),
                _pages(k_pages, v_pages),
                _pointer(options.alibi_slopes),
                heads.num_heads,
                options.window or 0,
                options.scale,
                options.softcap or 0.0,
                self._partial.ctypes.data,
                PARTIAL_FLOATS,
            )
            for kind in (structs.Attention, structs.Merge)
        ]
        # in one run: in between, another thread's attention would overwrite what it left in `_partial`
        self._run_step(operations, heads, batch, keep=(options, k_pages, v_pages))
        return out

    def _run_step(
        self, operations: Sequence[ctypes.Structure], heads: Heads, batch: BatchLayout, keep: tuple[Any, ...]
    ) -> None:
        """Run operations that need to know where the step's rows belong."""
        max_items = PARTIAL_FLOATS // (heads.num_heads * (heads.head_dim + 2))
        if self._recording is not None:
            for operation in operations:
                self._recording.add(operation, keep)
            self._recording.max_items = min(self._recording.max_items, max_items)
            return
        step = batch.derive(f"cpu step {max_items}", lambda layout: StepBatch(layout, max_items))
        ops = (structs.Op * len(operations))(*map(structs.op, operations))
        self._library.run(self._team, ops, step.c)

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
        rows, chosen, count = x.shape[0], routing.experts_per_token, len(up)
        ids, sources, places = (self._new(rows, chosen, torch.int64, dense=True) for _ in range(3))
        shares = self._new(rows, chosen, torch.float32, dense=True)
        offsets = self._new(1, count + 1, torch.int64, dense=True)
        at = [tensor.data_ptr() for tensor in (ids, shares, offsets, sources, places)]
        route = structs.Route(_rows(router_logits), at[0], at[1], count, chosen, routing.renormalize)
        self._run(route, rows)
        self._run(structs.Sort(at[0], *at[2:], count, chosen), rows)
        result_dtype = x.dtype
        x = self._as_operand(x, up[0])
        gathered = self._new(rows * chosen, x.shape[1], x.dtype)
        self._run(structs.Gather(_rows(x), _rows(gathered), at[3], x.shape[1], chosen), rows)
        hidden = self._new(rows * chosen, up[0].columns, self._operand_dtype(x.dtype, down[0]))
        product = partial(self._product, offsets=offsets, groups=count, per_row=chosen)
        product(gathered, hidden, up[0], weight_array(up), keep=(*up,))
        out = self._new(rows * chosen, down[0].columns, torch.float32)
        product(hidden, out, down[0], weight_array(down), keep=(*down,))
        y = add_to if add_to is not None else self._new(rows, down[0].columns, result_dtype)
        add, width = add_to is not None, down[0].columns
        self._run(structs.Combine(_rows(out), _rows(y), at[4], at[1], width, chosen, add), rows)
        return y

    # --- sampling ---

    def argmax(self, logits: Tensor) -> Tensor:
        chosen = torch.empty(logits.shape[0], dtype=torch.int64)
        self._run(structs.Argmax(_rows(logits), chosen.data_ptr(), logits.shape[1]), logits.shape[0])
        return chosen

    def add_gumbel_noise(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        width = logits.shape[1]
        self._run(structs.Noise(_rows(logits), seeds.data_ptr(), positions.data_ptr(), width), logits.shape[0])
        return logits

    def filter_logits(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        limits = [top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr()]
        self._run(structs.Filter(_rows(logits), *limits, logits.shape[1]), logits.shape[0])
        return logits

    # --- running ---

    def record(self, forward: Forward, max_tokens: int) -> Forward:
        recording = Recording(max_tokens)
        recording.kept.append(self)  # its team, and the room that attention needs
        self._recording = recording
        try:
            result = forward(recording.token_ids, recording.layout)
        finally:
            self._recording = None
        return Program(recording, result, self._library, self._team)

    def _target(self, like: Tensor, dtype: torch.dtype, add_to: Tensor | None = None) -> Tensor:
        """`add_to`, or a new tensor of the shape of `like`."""
        return add_to if add_to is not None else self._new(like.shape[0], like.shape[1], dtype)

    def _new(self, rows: int, width: int, dtype: torch.dtype, *, dense: bool = False) -> Tensor:
        """[rows, width], uninitialised; `dense`: without room between the rows."""
        if self._recording is not None:
            return self._recording.workspace.tensor(rows, width, dtype, dense=dense)
        return torch.empty(rows, width, dtype=dtype) if dense else new_tensor(rows, width, dtype)

    def _run(self, operation: ctypes.Structure, rows: int, keep: tuple[Any, ...] = ()) -> None:
        if self._recording is not None:
            self._recording.add(operation, keep)
        else:
            self._library.run(self._team, (structs.Op * 1)(structs.op(operation)), structs.Batch(rows=rows))


def _rows(x: Tensor) -> Rows:
    assert x.dim() == 2, "rows"
    assert x.stride(1) == 1, "numbers side by side"
    return Rows(x.data_ptr(), x.stride(0), DTYPES[str(x.dtype).removeprefix("torch.")])


def _pointer(x: Tensor | None) -> int | None:
    assert x is None or x.is_contiguous()
    return None if x is None else x.data_ptr()


def _pages(k_pages: Tensor, v_pages: Tensor) -> Pages:
    _, kv_heads, block_size, head_dim = k_pages.shape
    dtype = DTYPES[str(k_pages.dtype).removeprefix("torch.")]
    return Pages(k_pages.data_ptr(), v_pages.data_ptr(), kv_heads, block_size, head_dim, dtype)


def _dense(part: Matrix, dtype: torch.dtype) -> Tensor:
    if not isinstance(part, Quantized):
        return part
    return torch.from_numpy(dequantize(part.blocks.numpy(), GGMLQuantizationType[part.format])).to(dtype)
