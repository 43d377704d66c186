"""Collectives by torch.distributed: NCCL between GPUs, Gloo between processes that run torch's own kernels, and, by
way of the host's memory, between ranks that share a GPU, which NCCL does not take.

Sums are made in the order of the tree here as well: the pieces of all ranks are gathered and each rank adds them
up. Not by a library's all-reduce, whose order is its own, so the bits are those of a single rank wherever the
kernels' are. What an all-reduce does carry is the results of experts: each number comes from one rank, all others
have zeros in its place, and bits are added as integers, so that the order does not matter.
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
from holdfast.kernels.interface import ExpertPairs, Kernels, Routing
from holdfast.parallel.collectives import LocalExperts
from holdfast.parallel.placement import group_of, groups_of
from holdfast.parallel.segment import StageTrees
from holdfast.parallel.shards import Tree

__all__ = ["DistributedCollectives", "FileStore"]


class DistributedCollectives:
    """`Collectives` of the rank at `place`. The ranks find each other through `store`; `timeout`: seconds that each
    exchange may take. `by_host`: numbers on a GPU go by way of the host's memory. Raises `CollectiveFailed` when the
    ranks do not meet; with NCCL nobody waits on the host: its watchdog ends the process of an exchange that takes too
    long, but for those in CUDA graphs, which it does not see; there it is the engine that finds out (`cluster.hang`).
    Steps are not counted, nor how often experts are chosen."""

    def __init__(  # noqa: PLR0917 - what it stands on
        self,
        kernels: Kernels[Any],
        spec: DecoderSpec,
        place: Place,
        device: torch.device,
        store: Store,
        timeout: float,
        *,
        by_host: bool = False,
    ) -> None:
        self.place = place
        self.trees = StageTrees.of(place.replica, place.stage, spec)
        self._kernels = kernels
        self._spec = spec
        self._device = device
        self._by_nccl = device.type == "cuda" and not by_host
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
        if self._by_nccl:
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
        sources = [everything[rank, index] for rank, pieces in enumerate(tree.pieces) for index in range(len(pieces))]
        total = _joined(sources, tree)
        if bias is not None:
            total = total + bias
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
        mine = self._to_send(x)
        out = mine.new_empty(len(self.place.ranks) * x.shape[0], *x.shape[1:])  # one below the other, Gloo wants it
        self._meet(lambda: self._stage._allgather_base(out, mine))
        return out.to(self._device).view(-1, *x.shape)

    def least(self, number: int) -> int:
        """The least of the numbers that the ranks of this stage bring. Waits for the device."""
        return int(self._gather(torch.tensor([number], device=self._device)).min())

    def all_say(self, yes: bool) -> bool:
        """Whether all ranks of this stage say yes. Waits for the device."""
        return self.least(int(yes)) > 0

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        local: LocalExperts,
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Every pair (row, expert) that is this rank's is computed; then every rank has the results of all, piece by
        piece, and adds up what each of its rows got, in expert-id order."""
        assert isinstance(self._kernels, ExpertPairs), self._kernels.name
        tree = self.trees.experts
        assert tree is not None
        ids, shares = self._kernels.route(router_logits, routing)
        rows, turns = x.shape[0], local.here.shape[0]
        mine = local.here.repeat(-(-rows // turns), 1)[:rows].gather(1, ids)
        groups, number = groups_of(self.place.stage_plan), group_of(self.place)
        index = self.place.index - groups[number].start
        counts = [len(pieces) for pieces in tree.pieces]
        first = sum(counts[:index])
        make = torch.empty if len(groups) == 1 else torch.zeros  # what one group does not write, another adds to
        pieces = make(sum(counts), ids.numel(), x.shape[1], device=x.device)
        own = pieces[first : first + counts[index]]
        self._kernels.expert_pairs(x, mine, local.up, local.down, own)
        pairs = self.all_reduce(list(own), tree) if len(groups) == 1 else _joined(list(self._united(pieces)), tree)
        return self._kernels.combine(pairs, shares, x.dtype, add_to=add_to)

    def _united(self, x: Tensor) -> Tensor:
        """float32 numbers, each of which one rank of the stage has, and the others zeros in its place."""
        bits = self._to_send(x).view(torch.int32)
        self._meet(lambda: self._stage.allreduce([bits]))
        return bits.view(torch.float32).to(self._device)

    # --- the stages beside ---

    def send(self, x: Tensor) -> None:
        """Every rank of this stage has all of x: each of the next gets it from one of them."""
        stage = len(self.place.ranks)
        while len(self._on_their_way) > 2 * self._num_after:
            self._try(self._on_their_way.popleft()[0].wait)
        copy = x.clone() if self._by_nccl else x.cpu().clone()  # x is the next step's as soon as we return
        for receiver in range(self._num_after):
            if receiver % stage == self.place.index:
                self._on_their_way.append((self._after.send([copy], stage + receiver, 0), copy))

    def receive(self, rows: int) -> Tensor:
        x = self._to_send(torch.empty(rows, self._spec.hidden_size, device=self._device))
        sender = self.place.index % self._num_before
        self._meet(lambda: self._before.recv([x], sender, 0))
        return x.to(self._device)

    # --- together ---

    @property
    def can_be_captured(self) -> bool:
        """Whether steps can be recorded as CUDA graphs: by NCCL, with nothing to be sent to another stage, for what
        `send` holds until it has arrived is the host's to let go."""
        return self._by_nccl and len(self.place.replica.stages) == 1

    def set_timeout(self, seconds: float) -> None:
        """That each exchange may take which begins from now on."""
        self._timeout = timedelta(seconds=seconds)
        for group in (self._stage, self._before, self._after):
            if group is not None:
                group.set_timeout(self._timeout)

    def count_step(self, seconds: float) -> None:
        pass

    def abort(self) -> None:
        for group in (self._stage, self._before, self._after):
            if group is not None:
                group.abort()

    def _to_send(self, x: Tensor) -> Tensor:
        """Where the process groups can read and write it: x itself, or a copy on the host."""
        return x if self._by_nccl else x.cpu()

    def _meet(self, begin: Callable[[], Any]) -> None:
        """An exchange, to its end: NCCL's on the stream, for a wait with a timeout would hold up the host and could
        not be captured; Gloo's here."""
        self._try(lambda: begin().wait() if self._by_nccl else begin().wait(self._timeout))

    def _try(self, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except RuntimeError as error:  # DistBackendError is one
            raise CollectiveFailed(f"ranks did not meet: {error}") from error


def _joined(sources: Sequence[Tensor], tree: Tree) -> Tensor:
    """The sum of all ranks' pieces, in order, as the tree says."""
    sums: list[Tensor] = []
    for source, joins in zip(sources, tree.joins, strict=True):
        sums.append(source)
        for _ in range(joins):
            right = sums.pop()
            sums[-1] = sums[-1] + right
    return sums[0]
