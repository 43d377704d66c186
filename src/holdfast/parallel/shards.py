"""The virtual shards a model is made of, and the tree in which their sums meet.

Contract 1: what is summed over a row-parallel matrix's K is cut into virtual shards that depend on the model
alone. Each is summed by itself; the sums meet in one binary tree. A rank owns consecutive shards, sums the largest
subtrees it owns whole (its *pieces*), and the pieces of all ranks are joined as the tree says: the same additions
whatever the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from holdfast.core.errors import ConfigError
from holdfast.core.plan import Range
from holdfast.core.spec import DecoderSpec

MLP_SHARDS = 8
"""Virtual shards of an MLP's columns, and at least of the attention output where it has so many query heads: the
largest tensor-parallel degree."""
_SHARD_UNIT = 32
"""Columns that stay together where they can: quantized ones share a scale, and vectors are whole."""


# --- virtual shards ---


def head_shards(spec: DecoderSpec) -> tuple[int, ...]:
    """Ends of the virtual shards of the attention output, in query heads: those of one KV head each, and, with few KV
    heads, cut further, but not within 32 columns where quantized ones share a scale."""
    per_group = spec.num_heads // spec.num_kv_heads
    ends = group_shards(per_group, spec.num_kv_heads, spec.head_dim)
    return tuple(group * per_group + end for group in range(spec.num_kv_heads) for end in ends)


def group_shards(per_group: int, groups: int, head_dim: int) -> tuple[int, ...]:
    """The same of one KV head alone, which `per_group` query heads share, one of so many KV heads."""
    unit = _SHARD_UNIT // math.gcd(_SHARD_UNIT, head_dim) if per_group * head_dim % _SHARD_UNIT == 0 else 1
    cuts = min(-(-MLP_SHARDS // groups), per_group // unit)
    return tuple(per_group // unit * (cut + 1) // cuts * unit for cut in range(cuts))


def attention_shards(spec: DecoderSpec) -> tuple[int, ...]:
    """The same in columns; () for a single one."""
    ends = tuple(end * spec.head_dim for end in head_shards(spec))
    return ends if len(ends) > 1 else ()


def mlp_shards(columns: int) -> tuple[int, ...]:
    """Ends of the `MLP_SHARDS` virtual shards of F columns: even, in whole units of 32 when F is made of them; ()
    for a single one."""
    unit = _SHARD_UNIT if columns % _SHARD_UNIT == 0 else 1
    ends = sorted({columns // unit * (index + 1) // MLP_SHARDS * unit for index in range(MLP_SHARDS)} - {0})
    return tuple(ends) if len(ends) > 1 else ()


def num_mlp_shards(spec: DecoderSpec) -> int:
    """Of the layers without experts; as many as can be, when there are none."""
    if all(layer.moe for layer in spec.layers):
        return MLP_SHARDS
    return len(mlp_shards(spec.mlp_size)) or 1


def num_expert_shards(spec: DecoderSpec) -> int:
    return 0 if spec.moe is None else len(mlp_shards(spec.moe.expert_mlp_size)) or 1


def columns_of(shards: Range, ends: tuple[int, ...], columns: int) -> Range:
    """The columns of a range of the virtual shards that end at `ends`."""
    borders = (0, *(ends or (columns,)))
    return borders[shards[0]], borders[shards[1]]


def check_ranges(ranges: Sequence[Range], total: int, what: str) -> None:
    """Raise `ConfigError`, which names `what`, unless the ranges are 0 … total - 1, in order, none empty."""
    at = 0
    for first, last in ranges:
        if first != at or last <= first:
            raise ConfigError(f"{what} {first} to {last}: must begin at {at} and have one at least")
        at = last
    if at != total:
        raise ConfigError(f"{what} end at {at}: the model has {total}")


# --- the tree ---


@dataclass(frozen=True, slots=True)
class Tree:
    """How the pieces of all ranks, in order, are joined."""

    pieces: tuple[tuple[Range, ...], ...]
    """Of each rank: ranges of virtual shards."""
    joins: tuple[int, ...]
    """After each piece, over all ranks: how often the two latest sums become one."""


def tree_of(ranges: Sequence[Range], total: int) -> Tree:
    """The tree over `total` virtual shards, of which each rank owns a range; together all, in order."""
    pieces = tuple(tuple(_pieces(owned, (0, total))) for owned in ranges)
    joins: list[int] = []
    _count_joins((0, total), {piece for some in pieces for piece in some}, joins)
    return Tree(pieces, tuple(joins))


def _halves(node: Range) -> tuple[Range, Range]:
    """To the left the largest power of two that leaves something to the right: a binary counter's tree."""
    middle = node[0] + (1 << (node[1] - node[0] - 1).bit_length() - 1)
    return (node[0], middle), (middle, node[1])


def _pieces(owned: Range, node: Range) -> Iterator[Range]:
    if owned[0] <= node[0] and node[1] <= owned[1]:
        yield node
    elif owned[0] < node[1] and node[0] < owned[1]:
        for half in _halves(node):
            yield from _pieces(owned, half)


def _count_joins(node: Range, pieces: set[Range], joins: list[int]) -> None:
    if node in pieces:
        joins.append(0)
        return
    for half in _halves(node):
        _count_joins(half, pieces, joins)
    joins[-1] += 1
