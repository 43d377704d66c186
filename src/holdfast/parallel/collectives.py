"""What the ranks of a replica do together, as the layers of a model see it. Every rank calls the same, in the same
order.

Raises `CollectiveFailed` when a rank gives up or does not come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from holdfast.core.plan import Place
from holdfast.kernels.interface import Routing
from holdfast.parallel.segment import StageTrees
from holdfast.parallel.shards import Tree


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """Experts of one layer as a rank has them."""

    layer: int
    ids: tuple[int, ...]
    """Ascending: those that are here."""
    up: Sequence[Any]
    """Packed, of each."""
    down: Sequence[Sequence[Any]]
    """Piece by piece of the tree `StageTrees.experts`: packed, of each."""
    table: Tensor
    """int64 [TURNS, E], of all: see `placement.table_of`."""
    here: Tensor
    """The same, as a rank needs it that sorts its own pairs out, on its device: where in `ids` the expert is if the
    pair is this rank's, else len(ids)."""


class Collectives(Protocol):
    """One rank's way to the others of its stage, and of the stages beside it."""

    place: Place
    trees: StageTrees

    def all_reduce(
        self,
        partials: Sequence[Tensor],
        tree: Tree,
        *,
        bias: Tensor | None = None,
        add_to: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The sum of all ranks' pieces as the tree says, plus bias float32 [M]: added to `add_to`, or → [T, M].
        `partials`: float32 [T, M], this rank's."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """The logits of all ranks' rows of the vocabulary, x float32 [R, rows of this rank] → [R, V]."""
        ...

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        local: LocalExperts,
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """`Kernels.experts` over the experts of all ranks."""
        ...

    def send(self, x: Tensor) -> None:
        """The residual stream, float32 [T, M], to the next stage."""
        ...

    def receive(self, rows: int) -> Tensor:
        """It, from the stage before."""
        ...

    def count_step(self, seconds: float) -> None:
        """Note how long a step of this rank took, waits included."""
        ...

    def abort(self) -> None:
        """End every exchange, on every rank, from any thread; for good."""
        ...
