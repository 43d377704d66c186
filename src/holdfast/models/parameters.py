"""The parameters of a decoder under Holdfast's own names, where each lies in a checkpoint, and how they are packed.

All data: the loader reads by them today, a tensor-parallel rank will read only its slices by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from holdfast.core.spec import Activation, DecoderSpec

MLP_SHARDS = 8
"""Virtual shards of an MLP's columns: as many ranks as can share them without a change of sums (contract 1)."""
_SHARD_UNIT = 32
"""Columns that stay together where they can: quantized ones share a scale, and vectors are whole."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """`norm`: kept in float32, whatever the model's dtype."""

    shape: tuple[int, ...]
    norm: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A share of a fused tensor: its rows are seen as [groups, slots, rows per slot]; slots start … stop-1 of
    every group belong to the parameter."""

    groups: int
    slots: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter lies in a checkpoint and how it becomes ours."""

    name: str
    """The tensor's name; in a family's table without .weight/.bias, with {layer} and {expert} to fill in."""
    part: Part | None = None
    transpose: bool = False
    """Matrices are stored [in, out]."""
    interleaved: bool = False
    """The rows of each head come as rotary pairs (0, D/2, 1, D/2 + 1, …), as llama.cpp permutes them."""
    stacked: int | None = None
    """Which expert to take from a tensor [E, …]."""
    plus_one: bool = False
    """The checkpoint stores w where the formula uses 1 + w (Gemma's norms)."""

    def stored_shape(self, shape: tuple[int, ...], num_experts: int = 0) -> tuple[int, ...]:
        """Shape of the whole tensor in the checkpoint, given the parameter's."""
        if self.part is not None:
            rows_per_slot = shape[0] // (self.part.groups * (self.part.stop - self.part.start))
            shape = (self.part.groups * self.part.slots * rows_per_slot, *shape[1:])
        if self.transpose:
            shape = shape[::-1]
        return shape if self.stacked is None else (num_experts, *shape)


Names = Mapping[str, str | Source]
"""A family's table: our module name, with * for layer and expert → the checkpoint's."""


def parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """Every parameter of the decoder with its shape, matrices as [out, in]. A tied head has no parameter."""
    return dict(walk_parameters(spec))


def walk_parameters(spec: DecoderSpec) -> Iterator[tuple[str, Parameter]]:
    """`parameters` one by one: a config that names a billion experts is found out at the first that is not there."""
    hidden = spec.hidden_size
    yield "embed.weight", Parameter((spec.vocab_size, hidden))
    if spec.learned_positions:
        yield "positions.weight", Parameter((spec.learned_positions, hidden))
    if spec.embedding_norm:
        yield from _norm(spec, "embed_norm", hidden)
    for index, layer in enumerate(spec.layers):
        yield from _layer(spec, f"layers.{index}", layer.moe)
    if spec.final_norm:
        yield from _norm(spec, "final_norm", hidden)
    if not spec.tie_embeddings:
        yield "head.weight", Parameter((spec.vocab_size, hidden))


def _layer(spec: DecoderSpec, layer: str, moe: bool) -> Iterator[tuple[str, Parameter]]:
    hidden, head_dim = spec.hidden_size, spec.head_dim
    q_size, kv_size = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    yield from _norm(spec, f"{layer}.attn_norm", hidden)
    if not (spec.block == "parallel" and spec.shared_parallel_norm):
        yield from _norm(spec, f"{layer}.mlp_norm", hidden)
    if spec.block == "sandwich":
        yield from _norm(spec, f"{layer}.attn_post_norm", hidden)
        yield from _norm(spec, f"{layer}.mlp_post_norm", hidden)
    yield from _linear(f"{layer}.attn.q", q_size, hidden, spec.qkv_bias)
    yield from _linear(f"{layer}.attn.k", kv_size, hidden, spec.qkv_bias)
    yield from _linear(f"{layer}.attn.v", kv_size, hidden, spec.qkv_bias)
    yield from _linear(f"{layer}.attn.o", hidden, q_size, spec.attention_out_bias)
    if spec.qk_norm:
        yield f"{layer}.attn.q_norm.weight", Parameter((head_dim,), norm=True)
        yield f"{layer}.attn.k_norm.weight", Parameter((head_dim,), norm=True)
    if not moe:
        yield from _mlp(f"{layer}.mlp", spec, spec.mlp_size)
        return
    assert spec.moe is not None, "a layer with experts needs DecoderSpec.moe"
    yield f"{layer}.moe.router.weight", Parameter((spec.moe.num_experts, hidden))
    for expert in range(spec.moe.num_experts):
        yield from _mlp(f"{layer}.moe.experts.{expert}", spec, spec.moe.expert_mlp_size)


def _mlp(name: str, spec: DecoderSpec, columns: int) -> Iterator[tuple[str, Parameter]]:
    if spec.gated_mlp:
        yield from _linear(f"{name}.gate", columns, spec.hidden_size, spec.mlp_bias)
    yield from _linear(f"{name}.up", columns, spec.hidden_size, spec.mlp_bias)
    yield from _linear(f"{name}.down", spec.hidden_size, columns, spec.mlp_bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Parameter]]:
    yield f"{name}.weight", Parameter((rows, columns))
    if bias:
        yield f"{name}.bias", Parameter((rows,))


def _norm(spec: DecoderSpec, name: str, size: int) -> Iterator[tuple[str, Parameter]]:
    yield f"{name}.weight", Parameter((size,), norm=True)
    if spec.norm == "layer":
        yield f"{name}.bias", Parameter((size,), norm=True)


@dataclass(frozen=True, slots=True)
class Packing:
    """Modules whose matrices (and biases) go into one `kernels.pack`; see there for the rest."""

    modules: tuple[str, ...]
    activation: Activation | None = None
    gated: bool = False
    shards: tuple[int, ...] = ()


def packings(spec: DecoderSpec) -> dict[str, Packing]:
    """Every packed matrix of the decoder by its own name: "layers.0.attn.qkv", "layers.0.mlp.up" (with its gate), …

    Together they take every parameter of the spec but the norms, each once. A tied head has none.
    """
    return dict(_packings(spec))


def _packings(spec: DecoderSpec) -> Iterator[tuple[str, Packing]]:
    yield "embed", Packing(("embed",))
    if spec.learned_positions:
        yield "positions", Packing(("positions",))
    for index, layer in enumerate(spec.layers):
        name = f"layers.{index}"
        yield f"{name}.attn.qkv", Packing(tuple(f"{name}.attn.{part}" for part in "qkv"))
        yield f"{name}.attn.o", Packing((f"{name}.attn.o",), shards=attention_shards(spec))
        if not layer.moe:
            yield from _mlp_packings(f"{name}.mlp", spec, mlp_shards(spec.mlp_size))
            continue
        assert spec.moe is not None, "a layer with experts needs DecoderSpec.moe"
        yield f"{name}.moe.router", Packing((f"{name}.moe.router",))
        for expert in range(spec.moe.num_experts):  # an expert is never cut: ranks own whole ones
            yield from _mlp_packings(f"{name}.moe.experts.{expert}", spec, ())
    if not spec.tie_embeddings:
        yield "head", Packing(("head",))


def _mlp_packings(name: str, spec: DecoderSpec, shards: tuple[int, ...]) -> Iterator[tuple[str, Packing]]:
    up = (f"{name}.gate", f"{name}.up") if spec.gated_mlp else (f"{name}.up",)
    yield f"{name}.up", Packing(up, spec.activation, spec.gated_mlp)
    yield f"{name}.down", Packing((f"{name}.down",), shards=shards)


def attention_shards(spec: DecoderSpec) -> tuple[int, ...]:
    """Ends of the virtual shards of the attention output: the query heads of one KV head each."""
    width = spec.num_heads // spec.num_kv_heads * spec.head_dim
    return _several([width * (group + 1) for group in range(spec.num_kv_heads)])


def mlp_shards(columns: int) -> tuple[int, ...]:
    """Ends of the `MLP_SHARDS` virtual shards of F columns: even, in whole units of 32 when F is made of them."""
    unit = _SHARD_UNIT if columns % _SHARD_UNIT == 0 else 1
    return _several([columns // unit * (index + 1) // MLP_SHARDS * unit for index in range(MLP_SHARDS)])


def _several(ends: list[int]) -> tuple[int, ...]:
    """Without the empty shards of a small matrix; () for a single one."""
    kept = tuple(sorted(set(ends) - {0}))
    return kept if len(kept) > 1 else ()


def locate(names: Names, parameter: str) -> Source:
    """The source of one parameter: "layers.3.attn.q.weight" → names["layers.*.attn.q"], filled in."""
    module, kind = parameter.rsplit(".", 1)
    numbers = [int(number) for number in re.findall(r"\.(\d+)(?=\.)", module)]
    found = names[re.sub(r"\.\d+(?=\.)", ".*", module)]
    source = found if isinstance(found, Source) else Source(found)
    places = dict(zip(("layer", "expert"), numbers, strict=False))
    return replace(
        source,
        name=source.name.format_map(places) + f".{kind}",
        stacked=None if source.stacked is None else places["expert"],
    )
