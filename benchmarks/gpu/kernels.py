"""Single kernels against the device's limits, and products against cuBLAS."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads, Kernels

from .limits import Roof, seconds_of
from .models import to_fp8

Row = dict[str, object]


def products(
    kernels: Kernels[Any],
    config: dict[str, Any],
    counts: list[int],
    roof: Roof,
    device: torch.device,
    *,
    fp8: bool = False,
) -> list[Row]:
    """The matrices of one layer and the head, for a few numbers of rows. `fp8`: against the time that cuBLAS takes
    for bf16 weights."""
    hidden, mlp, heads, kv, dim = (
        config[name]
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    )
    shapes = {
        "qkv": ((heads + 2 * kv) * dim, hidden, ()),
        "o": (hidden, heads * dim, tuple(heads * dim * (i + 1) // kv for i in range(kv))),
        "gate, up": (2 * mlp, hidden, ()),
        "down": (hidden, mlp, tuple(mlp * (i + 1) // 8 for i in range(8))),
        "head": (config["vocab_size"], hidden, ()),
    }
    rows: list[Row] = []
    for name, (n, k, shards) in shapes.items():
        weight = torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.02
        gated = name == "gate, up"
        parts = [to_fp8(part, 1.0) if fp8 else part for part in weight.chunk(1 + gated)]
        packed = kernels.pack(parts, activation="silu" if gated else None, gated=gated, shards=shards)
        for count in counts:
            x = torch.randn(count, k, dtype=torch.bfloat16, device=device)
            ours = seconds_of(partial(kernels.linear, x, packed), device)
            cublas = seconds_of(partial(torch.matmul, x, weight.T), device)
            num_bytes = n * k * (1 + 4 / 128 if fp8 else 2) + 2 * count * (n / (1 + gated) + k)
            limit = roof.seconds(num_bytes, 2 * count * n * k)
            rows.append(
                {
                    "product": name,
                    "rows": count,
                    "µs": ours * 1e6,
                    "share of limit": limit / ours,
                    "times cuBLAS": cublas / ours,
                }
            )
    return rows


def attention(
    kernels: Kernels[Any],
    config: dict[str, Any],
    cases: list[tuple[int, int, int]],
    roof: Roof,
    device: torch.device,
) -> list[Row]:
    """(requests, tokens each, context) → time against reading the keys and values once, or the products' FLOP."""
    heads = Heads(config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"])
    rows: list[Row] = []
    for requests, tokens, context in cases:
        width = -(-context // 16)
        shape = (requests * width, heads.num_kv_heads, 16, heads.head_dim)
        k_pages, v_pages = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        q = torch.randn(requests * tokens, heads.num_heads * heads.head_dim, dtype=torch.bfloat16, device=device)
        positions = torch.arange(context - tokens, context, device=device).repeat(requests)
        tables = torch.randperm(requests * width, device=device).int().view(requests, width)
        batch = BatchLayout((tokens,) * requests, (context,) * requests, positions, positions, tables)
        options = AttentionOptions(heads.head_dim**-0.5)
        ours = seconds_of(partial(kernels.attention, q, heads, k_pages, v_pages, batch, options), device)
        num_bytes = requests * context * 2 * heads.num_kv_heads * heads.head_dim * 2
        seen = requests * tokens * (2 * context - tokens + 1) // 2
        limit = roof.seconds(num_bytes, 4 * seen * heads.num_heads * heads.head_dim)
        rows.append(
            {
                "attention": f"{requests} × {tokens} of {context}",
                "µs": ours * 1e6,
                "share of limit": limit / ours,
            }
        )
    return rows
