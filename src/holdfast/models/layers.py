"""The layers with weights, bound to the kernels that run them.

Where a call takes `add_to`, the float32 residual stream [T, M], it adds its result there and returns it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.core.plan import Place, Range
from holdfast.core.spec import DecoderSpec
from holdfast.kernels.interface import Kernels
from holdfast.parallel.collectives import Collectives
from holdfast.parallel.segment import StageTrees
from holdfast.parallel.shards import Tree

PackedMatrix = Any
"""A matrix in the form of the backend that packed it."""


@dataclass(frozen=True, slots=True)
class Linear:
    """x [T, K] → [T, N], with whatever activation its weight was packed with."""

    kernels: Kernels[Any]
    weight: PackedMatrix

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.kernels.linear(x, self.weight, add_to=add_to, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Pieces:
    """A row-parallel matrix [N, K], or a rank's share of one: subtrees of its virtual shards, packed one by one, and
    the bias that their sum gets."""

    packed: Sequence[PackedMatrix]
    columns: tuple[Range, ...]
    """Of x, for each."""
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """Like `Linear`, for a matrix whose columns several ranks hold: each has the columns of x that go with its
    own."""

    kernels: Kernels[Any]
    collectives: Collectives
    tree: Tree
    pieces: Pieces

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        partials = [
            self.kernels.linear(x[:, first:last], piece, dtype=torch.float32)
            for piece, (first, last) in zip(self.pieces.packed, self.pieces.columns, strict=True)
        ]
        dtype = dtype or x.dtype
        return self.collectives.all_reduce(partials, self.tree, bias=self.pieces.bias, add_to=add_to, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token ids int64 [T] → float32 [T, M], from a table whose rows several ranks may hold."""

    kernels: Kernels[Any]
    table: PackedMatrix
    scale: float
    first_row: int
    collectives: Collectives | None

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.kernels.embedding(ids, self.table, scale=self.scale, offset=-self.first_row)
        if self.collectives is None:
            return x
        return self.collectives.all_reduce([x], self.collectives.trees.embedding)


@dataclass(frozen=True, slots=True)
class Head:
    """x [R, M] → logits float32 [R, V], of a vocabulary whose rows several ranks may hold."""

    kernels: Kernels[Any]
    weight: PackedMatrix
    collectives: Collectives | None

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.kernels.linear(x, self.weight, dtype=torch.float32)
        return logits if self.collectives is None else self.collectives.all_gather(logits)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Over the last dim; to the model's dtype unless the call says otherwise."""

    kernels: Kernels[Any]
    weight: Tensor
    eps: float
    dtype: torch.dtype

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps, dtype or self.dtype, add_to=add_to)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Like `RMSNorm`."""

    kernels: Kernels[Any]
    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps, dtype or self.dtype, add_to=add_to)


@dataclass(frozen=True, slots=True)
class Weights:
    """A decoder's weights in memory, handed out as layers."""

    spec: DecoderSpec
    kernels: Kernels[Any]
    dtype: torch.dtype
    """The model's: of everything but the residual stream, the norms and the logits."""
    device: torch.device
    packed: Mapping[str, PackedMatrix]
    """By the names of `models.parameters.packings`; "head" may be the very object that "embed" is."""
    norms: Mapping[str, Tensor]
    """float32, by the names of `models.parameters.parameters`."""

    place: Place
    """The part of the model that is here."""
    collectives: Collectives | None = None
    """None: it is all of it."""

    @property
    def stage_collectives(self) -> Collectives | None:
        """When other ranks have a share of these very layers."""
        return self.collectives if len(self.place.ranks) > 1 else None

    def linear(self, name: str) -> Linear:
        return Linear(self.kernels, self.packed[name])

    def row_parallel(self, name: str, tree: Callable[[StageTrees], Tree]) -> Linear | RowParallelLinear:
        if self.stage_collectives is None:
            return self.linear(name)
        found = tree(self.stage_collectives.trees)
        return RowParallelLinear(self.kernels, self.stage_collectives, found, self.packed[name])

    def embedding(self) -> Embedding:
        first_row = self.place.shard.vocab[0]
        table, scale = self.packed["embed"], self.spec.embedding_scale
        return Embedding(self.kernels, table, scale, first_row, self.stage_collectives)

    def head(self) -> Head:
        weight = self.packed["embed" if self.spec.tie_embeddings else "head"]
        return Head(self.kernels, weight, self.stage_collectives)

    def norm(self, name: str) -> RMSNorm | LayerNorm:
        """The model's kind of norm."""
        weight, eps = self.norms[f"{name}.weight"], self.spec.norm_eps
        if self.spec.norm == "rms":
            return RMSNorm(self.kernels, weight, eps, self.dtype)
        return LayerNorm(self.kernels, weight, self.norms[f"{name}.bias"], eps, self.dtype)
