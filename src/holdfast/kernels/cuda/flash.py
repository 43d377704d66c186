"""Attention of prompts by FlashInfer, where exactness is off.

A step in which some request computes several tokens goes to FlashInfer with all its requests. Steps of decodes stay
with our kernels: they are captured as CUDA graphs, and FlashInfer has to plan every step on the host. Both read the
same pages: one layer's, [blocks, KV heads, tokens, head dim], is what FlashInfer calls HND.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.kernels.cuda.close import CloseCudaKernels
from holdfast.kernels.cuda.graphs import step_tensors
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads

HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 128 << 20
"""As its documentation recommends, for all that is split over keys."""
WRAPPERS = 2
"""Of each kind, used by turns: one may still be copying its plan to the device when the next is made."""


@dataclass(frozen=True, slots=True)
class PageTables:
    """Which blocks hold a step's keys, as FlashInfer takes it; on the host, but for `blocks`."""

    queries: Tensor
    """int32 [B + 1]: where a request's tokens begin."""
    begins: Tensor
    """int32 [B + 1]: where its blocks begin in `blocks`."""
    blocks: Tensor
    """int32: block ids, request by request."""
    last: Tensor
    """int32 [B]: tokens in a request's last block, at least one."""


def page_tables(block_size: int, layout: BatchLayout) -> PageTables:
    counts = [-(-length // block_size) for length in layout.context_lens]
    width, device = layout.block_tables.shape[1], layout.block_tables.device
    cells = np.concatenate([row * width + np.arange(count) for row, count in enumerate(counts)])
    places = torch.from_numpy(cells)
    if device.type == "cuda":
        places = places.pin_memory().to(device, non_blocking=True)
    return PageTables(
        _numbers([0, *accumulate(layout.query_lens)]),
        _numbers([0, *accumulate(counts)]),
        layout.block_tables.flatten()[places],
        _numbers([(length - 1) % block_size + 1 for length in layout.context_lens]),
    )


def _numbers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def takes(heads: Heads, options: AttentionOptions, dtype: torch.dtype) -> bool:
    """Whether FlashInfer has a kernel for it that we use."""
    of_16_bits = dtype in {torch.float16, torch.bfloat16}
    return of_16_bits and heads.head_dim in HEAD_DIMS and options.alibi_slopes is None


def plan_arguments(heads: Heads, options: AttentionOptions, block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a plan is told beside the tables. A position sees `window_left` keys before itself."""
    return {
        "num_qo_heads": heads.num_heads,
        "num_kv_heads": heads.num_kv_heads,
        "head_dim_qk": heads.head_dim,
        "page_size": block_size,
        "causal": True,
        "sm_scale": options.scale,
        "window_left": -1 if options.window is None else options.window - 1,
        "logits_soft_cap": options.softcap,
        "q_data_type": dtype,
        "kv_data_type": dtype,
    }


@dataclass(slots=True)
class _Ring:
    """Wrappers of one kind, each with an event after which its last plan has left the host's memory."""

    wrappers: list[tuple[Any, torch.cuda.Event | None]] = field(default_factory=list)
    turn: int = 0


class FlashInferKernels(CloseCudaKernels):
    """`CloseCudaKernels` with prompts by FlashInfer, where it takes them. `wrapper`: its
    `BatchPrefillWithPagedKVCacheWrapper`."""

    name = "cuda-flashinfer"

    def __init__(
        self, wrapper: Callable[..., Any], dtype: torch.dtype = torch.bfloat16, *, num_stages: int = 3
    ) -> None:
        super().__init__(dtype, num_stages=num_stages)
        self._wrapper = wrapper
        self._workspace: Tensor | None = None
        self._rings: dict[tuple[object, ...], _Ring] = {}
        """By what layers ask for."""

    def attention(  # noqa: PLR0917 - the protocol's
        self,
        q: Tensor,
        heads: Heads,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: BatchLayout,
        options: AttentionOptions,
    ) -> Tensor:
        if not batch.derive("cuda", step_tensors).prefills or not takes(heads, options, q.dtype):
            return super().attention(q, heads, k_pages, v_pages, batch, options)
        out = torch.empty_like(q)
        asked = plan_arguments(heads, options, k_pages.shape[2], q.dtype)
        planned = batch.derive(f"flashinfer {asked}", partial(self._planned, asked))
        shape = (q.shape[0], heads.num_heads, heads.head_dim)
        planned.run(q.view(shape), (k_pages, v_pages), out=out.view(shape))
        return out

    def _planned(self, asked: dict[str, Any], batch: BatchLayout) -> Any:
        """A wrapper that is ready for this step. Waits until the device has the plan that it had before."""
        device = batch.positions.device
        if self._workspace is None:
            self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        ring = self._rings.setdefault(tuple(asked.values()), _Ring())
        if len(ring.wrappers) < WRAPPERS:
            event = torch.cuda.Event() if device.type == "cuda" else None
            ring.wrappers.append((self._wrapper(self._workspace, "HND"), event))
        wrapper, event = ring.wrappers[ring.turn]
        ring.turn = (ring.turn + 1) % WRAPPERS
        tables = batch.derive("flashinfer", partial(page_tables, asked["page_size"]))
        if event is not None:
            event.synchronize()  # one that was never recorded is done
        wrapper.plan(tables.queries, tables.begins, tables.blocks, tables.last, **asked)
        if event is not None:
            event.record()
        return wrapper
