"""What the fullest rank of a stage has, where the ranks do not divide a layer evenly: the others wait for it.

The runtime cuts attention at whole KV heads, or, with fewer of them than ranks, at parts of their query heads, and
MLPs at `MLP_SHARDS` virtual shards (`parallel.shards`): of seven ranks one or more have two eighths, not a seventh.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from holdfast.parallel.cuts import split
from holdfast.parallel.shards import MLP_SHARDS, group_shards
from holdfast.planner.memory.ranks import is_mlp_matrix
from holdfast.planner.shapes.shape import Attention, Layer, Matrix


def columns_of_fullest(ranks: int) -> float:
    """Of an MLP's columns."""
    return _part(MLP_SHARDS, ranks) if ranks <= MLP_SHARDS else 1 / ranks


def heads_of_fullest(attention: Attention, ranks: int) -> float:
    """Of the query heads."""
    heads, groups = attention.num_heads, attention.num_kv_heads
    if attention.kind != "softmax" or heads % groups:
        return _part(heads, ranks)
    if ranks <= groups:
        return _part(groups, ranks)
    # Of seven ranks on four KV heads three are alone with one.
    per_group, mates = heads // groups, ranks // groups
    borders = (0, *group_shards(per_group, groups, attention.head_dim))
    if mates >= len(borders):
        return _part(per_group, mates) / groups
    cuts = split(len(borders) - 1, [1] * mates)
    return max(borders[last] - borders[first] for first, last in cuts) / heads


def most_heads_of_fullest(layers: Iterable[Layer], ranks: int) -> float:
    """The same where layers differ: of that with the largest part."""
    parts = [heads_of_fullest(layer.attention, ranks) for layer in layers if layer.attention]
    return max(parts, default=1 / ranks)


def fullest(layer: Layer, ranks: int, expert_ranks: int = 1) -> Layer:
    """A layer of which an even part is what the fullest rank has; the same one where ranks divide it evenly.
    `expert_ranks`: have whole experts; 1: each expert is cut over all ranks."""
    heads = heads_of_fullest(layer.attention, ranks) * ranks if layer.attention else 1.0
    columns, experts = columns_of_fullest(ranks) * ranks, layer.experts
    matrices = tuple(_times(matrix, columns if is_mlp_matrix(matrix.name) else heads) for matrix in layer.matrices)
    if experts is not None:
        wider = _part(experts.num_experts, expert_ranks) * expert_ranks if expert_ranks > 1 else columns
        experts = replace(experts, matrices=tuple(_times(matrix, wider) for matrix in experts.matrices))
    if matrices == layer.matrices and experts == layer.experts:
        return layer
    return replace(layer, matrices=matrices, experts=experts)


def _part(count: int, ranks: int) -> float:
    """Of so many things that stay whole."""
    return -(-count // ranks) / count if ranks <= count else 1 / ranks


def _times(matrix: Matrix, factor: float) -> Matrix:
    if matrix.cut == "column":
        return replace(matrix, outputs=round(matrix.outputs * factor))
    return replace(matrix, inputs=round(matrix.inputs * factor)) if matrix.cut == "row" else matrix
