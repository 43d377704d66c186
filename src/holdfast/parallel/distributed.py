"""Collectives by torch.distributed: NCCL between GPUs, Gloo between processes that run torch's own kernels.

Sums are made in the order of the tree here as well: the pieces of all ranks are gathered and each rank adds them
up. Not one library's all-reduce, whose order is its own, so the bits are those of a single rank wherever the
kernels' are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from holdfast.core.errors import CollectiveFailed
from holdfast.core.plan import Place
from holdfast.core.spec import DecoderSpec
from holdfast.kernels.interface import Routing
from holdfast.parallel.collectives import LocalExperts
from holdfast.parallel.segment import StageTrees
from holdfast.parallel.shards import Tree

__all__ = ["DistributedCollectives", "FileStore", "takes"]


class DistributedCollectives:
    """`Collectives` of the rank at `place`. The ranks find each other through `store`; `timeout`: seconds that each
    exchange may take. Raises `CollectiveFailed` when they do not meet; between GPUs nobody waits on the host, and
    what ends an exchange there is NCCL's own watchdog, with the process. Steps are not counted."""

    def __init__(self, spec: DecoderSpec, place: Place, device: torch.device, store: Store, timeout: float) -> None:
        self.place = place
        self.trees = StageTrees.of(place.replica, place.stage, spec)
        self._spec = spec
        self._device = device
        self._timeout = timedelta(seconds=timeout)
        self._on_their_way: deque[tuple[Any, Tensor]] = deque()
        sizes = [len(stage.ranks) for stage in place.replica.stages]
        self._stage = self._group(store, f"stage {place.stage}", place.index, sizes[place.stage])
        self._before: Any = None
        self._after: Any = None
        for border in (
            place.stage - 1,
            place.stage,
        ):  # all in the same order: none waits for a group nobody else makes
            if not 0 <= border < len(sizes) - 1:
                continue
            number = place.index + (sizes[border] if border < place.stage else 0)
            group = self._group(store, f"border {border}", number, sizes[border] + sizes[border + 1])
            if border < place.stage:
                self._before, self._num_before = group, sizes[border]
            else:
                self._after, self._num_after = group, sizes[border + 1]

    def _group(self, store: Store, name: str, rank: int, size: int) -> Any:
        """None for a single rank."""
        if size == 1:
            return None
        where = PrefixStore(name, store)
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            return self._try(lambda: dist.ProcessGroupNCCL(where, rank, size, options))
        return self._try(lambda: dist.ProcessGroupGloo(where, rank, size, self._timeout))

    # --- the ranks of a stage ---

    def all_reduce(
        self,
        partials: Sequence[Tensor],
        tree: Tree,
        *,
        bias: Tensor | None = None,
        add_to: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        rows, width = partials[0].shape
        most = max(len(pieces) for pieces in tree.pieces)
        mine = partials[0].new_zeros(most, rows, width)
        for place, partial in zip(mine, partials, strict=False):
            place.copy_(partial)
        everything = self._gather(mine)
        sums: list[Tensor] = []
        joins = iter(tree.joins)
        for rank, pieces in enumerate(tree.pieces):
            for index in range(len(pieces)):
                sums.append(everything[rank, index])
                for _ in range(next(joins)):
                    right = sums.pop()
                    sums[-1] = sums[-1] + right
        total = sums[0] if bias is None else sums[0] + bias
        return total.to(dtype) if add_to is None else add_to.add_(total)

    def all_gather(self, x: Tensor) -> Tensor:
        widths = [shard.vocab[1] - shard.vocab[0] for shard in self.place.ranks]
        padded = x.new_zeros(x.shape[0], max(widths))
        padded[:, : x.shape[1]] = x
        everything = self._gather(padded)
        return torch.cat([part[:, :width] for part, width in zip(everything, widths, strict=True)], dim=1)

    def _gather(self, x: Tensor) -> Tensor:
        """[…] → [ranks, …]."""
        if self._stage is None:
            return x[None]
        out = x.new_empty(len(self.place.ranks), *x.shape)
        self._try(lambda: self._stage.allgather([list(out)], [x]).wait(self._timeout))
        return out

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        local: LocalExperts,
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        raise AssertionError("refused at the start: see `takes`")

    # --- the stages beside ---

    def send(self, x: Tensor) -> None:
        """Every rank of this stage has all of x: each of the next gets it from one of them."""
        stage = len(self.place.ranks)
        while len(self._on_their_way) > 2 * self._num_after:
            self._try(self._on_their_way.popleft()[0].wait)
        copy = x.clone()  # x is the next step's as soon as we return
        for receiver in range(self._num_after):
            if receiver % stage == self.place.index:
                self._on_their_way.append((self._after.send([copy], stage + receiver, 0), copy))

    def receive(self, rows: int) -> Tensor:
        x = torch.empty(rows, self._spec.hidden_size, device=self._device)
        sender = self.place.index % self._num_before
        self._try(lambda: self._before.recv([x], sender, 0).wait(self._timeout))
        return x

    # --- together ---

    def count_step(self, seconds: float) -> None:
        pass

    def abort(self) -> None:
        for group in (self._stage, self._before, self._after):
            if group is not None:
                group.abort()

    def _try(self, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except RuntimeError as error:  # DistBackendError is one
            raise CollectiveFailed(f"ranks did not meet: {error}") from error


def takes(spec: DecoderSpec, place: Place) -> bool:
    """Whether these collectives can run a plan: not yet one that cuts or shares out experts."""
    return spec.moe is None or all(len(stage.ranks) == 1 for stage in place.replica.stages)
