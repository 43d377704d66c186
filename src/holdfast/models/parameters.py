"""The parameters of a decoder under Holdfast's own names, where each lies in a checkpoint, and how they are packed.

All data: the loader reads by them, a rank of a plan only its share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from holdfast.core.plan import Place, Range
from holdfast.core.spec import Activation, DecoderSpec
from holdfast.parallel.placement import experts_at, group_of, groups_of
from holdfast.parallel.segment import StageTrees
from holdfast.parallel.shards import attention_shards, columns_of, mlp_shards


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
    rows: tuple[Range | None, ...] = ()
    """Which rows of each module's matrix a rank holds; (): all of all."""
    pieces: tuple[Range, ...] | None = None
    """Of a row-parallel matrix that is cut: the ranges of virtual shards to pack one by one (see
    `models.layers.Pieces`)."""

    def rows_of(self, index: int) -> Range | None:
        """Of the matrix of `modules[index]`; None: all."""
        return self.rows[index] if self.rows else None


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
        for expert in range(spec.moe.num_experts):
            yield from _mlp_packings(f"{name}.moe.experts.{expert}", spec, mlp_shards(spec.moe.expert_mlp_size))
    if not spec.tie_embeddings:
        yield "head", Packing(("head",))


def _mlp_packings(name: str, spec: DecoderSpec, shards: tuple[int, ...]) -> Iterator[tuple[str, Packing]]:
    up = (f"{name}.gate", f"{name}.up") if spec.gated_mlp else (f"{name}.up",)
    yield f"{name}.up", Packing(up, spec.activation, spec.gated_mlp)
    yield f"{name}.down", Packing((f"{name}.down",), shards=shards)


def packings_at(spec: DecoderSpec, place: Place) -> dict[str, Packing]:
    """Those of `packings` that the rank at `place` holds, with its share of each."""
    tied = spec.tie_embeddings
    trees = StageTrees.of(place.replica, place.stage, spec)
    experts = cache(lambda layer: frozenset(experts_at(place, layer)))
    held = {}
    for name, packing in _packings(spec):
        first, last = place.layers
        parts = name.split(".")
        if parts[0] == "layers":
            here = first <= int(parts[1]) < last
        else:
            here = place.is_last if name == "head" else place.is_first or (name == "embed" and tied and place.is_last)
        if "experts" in parts and here:
            here = int(parts[parts.index("experts") + 1]) in experts(int(parts[1]))
        if here:
            held[name] = _share(spec, place, trees, parts, packing)
    return held


def _share(spec: DecoderSpec, place: Place, trees: StageTrees, parts: list[str], packing: Packing) -> Packing:
    """What of a packing, whose name consists of `parts`, belongs to a rank that has some of it."""
    shard, head_dim = place.shard, spec.head_dim
    if len(place.ranks) == 1:
        return packing
    if parts[0] in {"embed", "head"}:
        return replace(packing, rows=(shard.vocab,))
    if parts[-1] == "qkv":
        q, kv = ((first * head_dim, last * head_dim) for first, last in (shard.query_heads, shard.kv_heads))
        return replace(packing, rows=(q, kv, kv))
    if parts[-1] == "o":
        return replace(packing, pieces=trees.attention.pieces[place.index])
    if "experts" in parts:
        assert spec.moe is not None
        assert trees.experts is not None
        index = place.index - groups_of(place.stage_plan)[group_of(place)].start
        pieces, columns, shards = trees.experts.pieces[index], spec.moe.expert_mlp_size, shard.expert_shards
    elif "mlp" in parts:
        pieces, columns, shards = trees.mlp.pieces[place.index], spec.mlp_size, shard.mlp_shards
    else:
        return packing
    if parts[-1] == "down":
        return replace(packing, pieces=pieces)
    return replace(packing, rows=(columns_of(shards, mlp_shards(columns), columns),) * len(packing.modules))


def share_of(packing: Packing, wanted: Mapping[str, Parameter]) -> int:
    """Numbers, biases counted, that a packing takes of the parameters."""
    total = 0
    for index, module in enumerate(packing.modules):
        rows, columns = wanted[f"{module}.weight"].shape
        if (some := packing.rows_of(index)) is not None:
            rows = some[1] - some[0]
        if packing.pieces is not None:
            borders = (0, *(packing.shards or (columns,)))
            columns = borders[packing.pieces[-1][1]] - borders[packing.pieces[0][0]]
        total += rows * columns + (rows if f"{module}.bias" in wanted else 0)
    return total


def weight_bytes(spec: DecoderSpec, itemsize: int, place: Place) -> int:
    """Bytes of the share of the weights that belongs to `place`, in numbers of so many bytes; norms take 4. A tied
    head counts once."""
    wanted = parameters(spec)
    packed = sum(share_of(packing, wanted) for packing in packings_at(spec, place).values())
    norms = sum(math.prod(wanted[name].shape) for name in norms_at(spec, place))
    return packed * itemsize + 4 * norms


def expert_bytes(spec: DecoderSpec, itemsize: int) -> int:
    """Of one expert, in all layers that have some."""
    if spec.moe is None:
        return 0
    numbers = (3 if spec.gated_mlp else 2) * spec.hidden_size * spec.moe.expert_mlp_size
    return numbers * itemsize * sum(layer.moe for layer in spec.layers)


def packed_room(spec: DecoderSpec, place: Place) -> int:
    """No fewer bytes than the packed matrices of `place` take in any format: rows are padded to whole panels of 32,
    and each shard may be by a number."""
    wanted = parameters(spec)
    total = 0
    for packing in packings_at(spec, place).values():
        pieces = 1 if packing.pieces is None else len(packing.pieces)
        for index, module in enumerate(packing.modules):
            rows, columns = wanted[f"{module}.weight"].shape
            if (some := packing.rows_of(index)) is not None:
                rows = some[1] - some[0]
            total += (rows + 31) * (columns + len(packing.shards)) * 4 + 64 * pieces
    return total


def norms_at(spec: DecoderSpec, place: Place) -> list[str]:
    """Norms that the rank at `place` holds, by the names of `parameters`."""

    def here(name: str) -> bool:
        parts = name.split(".")
        if parts[0] == "layers":
            return place.layers[0] <= int(parts[1]) < place.layers[1]
        return place.is_last if parts[0] == "final_norm" else place.is_first

    return [name for name, parameter in walk_parameters(spec) if parameter.norm and here(name)]


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
