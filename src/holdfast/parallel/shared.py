"""Collectives of processes that share memory, as operations of the CPU kernels' step program (csrc/exchange.inc)."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import CollectiveFailed, RankGaveUp
from holdfast.core.plan import Place
from holdfast.core.spec import DecoderSpec
from holdfast.kernels.cpu import structs
from holdfast.kernels.cpu.experts import Ownership, Routed, into_experts, out_of_experts, route
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.cpu.operands import numbers, rows_of
from holdfast.kernels.cpu.packing import PackedMatrix
from holdfast.kernels.interface import Routing
from holdfast.parallel.collectives import LocalExperts
from holdfast.parallel.placement import group_of, groups_of
from holdfast.parallel.segment import ABORTED_AT, LINE, SLOTS, Layout
from holdfast.parallel.shards import Tree

assert ctypes.sizeof(structs.Counter) == ctypes.sizeof(structs.Tally) == LINE


class Watch:
    """`Guard` of the CPU kernels: no exchange waits for longer than `timeout` seconds, or for ranks that gave up."""

    def __init__(self, aborted: int, tally: int, timeout: float) -> None:
        self.end = structs.Endpoint(aborted=aborted, tally=tally, timeout_ns=int(timeout * 1e9))
        self.timeout = timeout

    def arm(self) -> int:
        return ctypes.addressof(self.end) + structs.Endpoint.failed.offset

    def check(self) -> None:
        if self.end.failed == structs.FAILED_ABORTED:
            raise RankGaveUp("another rank gave up")
        if self.end.failed == structs.FAILED_LATE:
            raise CollectiveFailed(f"another rank did not come within {self.timeout:g} s")


class SharedCollectives:
    """`Collectives` of the rank at `place`, over the memory that `layout` describes. `timeout`: seconds that a
    step may wait for other ranks. `pace`: nanoseconds that a stage
    takes beside its work, per step and per token."""

    def __init__(  # noqa: PLR0917 - what it stands on
        self,
        kernels: CpuKernels,
        spec: DecoderSpec,
        place: Place,
        layout: Layout,
        memory: mmap.mmap,
        timeout: float,
        pace: tuple[int, int] | None = None,
    ) -> None:
        self._pace = pace
        self.place = place
        self.trees = layout.trees[place.stage]
        self._kernels = kernels
        self._spec = spec
        self._layout = layout
        self._memory = memory
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._tally = self._base + layout.tally_at(place.stage, place.index)
        self._met = self._base + layout.met_at(place.stage, place.index)
        self._sent = self._base + layout.sent_at(place.stage, place.index)
        self._taken = self._base + layout.taken_at(place.stage, place.index)
        self._watch = Watch(self._base + ABORTED_AT, self._tally, timeout)
        kernels.executor.guard = self._watch

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
        piece_bytes = self._layout.max_tokens * width * 4
        for index, partial in enumerate(partials):
            self._put(partial, self._slots(self.place.index, ahead=1, offset=index * piece_bytes))
        self._meet_stage(rows)
        y = self._kernels.executor.result(rows, width, dtype, add_to)
        sources = _array(
            [
                self._slots(rank, offset=index * piece_bytes)
                for rank, pieces in enumerate(tree.pieces)
                for index in range(len(pieces))
            ]
        )
        joins = np.array(tree.joins, dtype=np.int64)
        join = structs.Join(
            y=rows_of(y),
            sources=sources,
            joins=joins.ctypes.data,
            pieces=len(sources),
            others=len(sources) - len(partials),
            tally=self._tally,
            bias=numbers(bias, torch.float32, width),
            width=width,
            add=add_to is not None,
        )
        self._run(join, rows, keep=(sources, joins, bias))
        return y

    def all_gather(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        self._put(x, self._slots(self.place.index, ahead=1))
        self._meet_stage(rows)
        widths = [shard.vocab[1] - shard.vocab[0] for shard in self.place.ranks]
        starts = np.array([0, *accumulate(widths)], dtype=np.int64)
        y = self._kernels.executor.new(rows, int(starts[-1]), torch.float32)
        sources = _array([self._slots(rank) for rank in range(len(widths))])
        collect = structs.Collect(
            y=rows_of(y),
            sources=sources,
            starts=starts.ctypes.data,
            ranks=len(widths),
            self=self.place.index,
            tally=self._tally,
        )
        self._run(collect, rows, keep=(sources, starts))
        return y

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        local: LocalExperts,
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Every pair (row, expert) that is this rank's is computed and put into shared memory; then every rank
        adds up what each of its rows got, in expert-id order, wherever it was computed."""
        ownership = Ownership(
            local.table,
            group_of(self.place),
            chosen_counts=self._base + self._layout.chosen_of(self.place.stage, local.layer - self.place.layers[0])
            if self.place.index == 0
            else None,
            own_count=self._tally + structs.Tally.expert_rows.offset,
        )
        routed = route(self._kernels, router_logits, routing, ownership)
        up, down = _of_all(local.up, local.ids, routed.experts), local.down
        hidden = into_experts(self._kernels, x, routed, up, down[0][0])
        piece_bytes = self._layout.max_tokens * routed.chosen * self._spec.hidden_size * 4
        first = 0
        for index, piece in enumerate(down):
            columns = slice(first, first := first + piece[0].c.k)
            out = out_of_experts(self._kernels, hidden[:, columns], routed, _of_all(piece, local.ids, routed.experts))
            slots = self._slots(self.place.index, ahead=1, offset=index * piece_bytes)
            self._deal(out, routed, ownership, slots)
        self._meet_stage(routed.rows)
        y = self._kernels.executor.result(routed.rows, down[0][0].columns, x.dtype, add_to)
        self._reunite(y, routed, ownership, piece_bytes, add=add_to is not None)
        return y

    def _deal(self, out: Tensor, routed: Routed, ownership: Ownership, slots: structs.Slots) -> None:
        """Our pairs' results, sorted, to where everyone finds them by row."""
        deal = structs.Deal(
            x=rows_of(out),
            slots=slots,
            ids=routed.ids.data_ptr(),
            owners=ownership.c,
            places=routed.places.data_ptr(),
            width=out.shape[1],
            chosen=routed.chosen,
            self=ownership.mine,
        )
        self._run(deal, routed.rows, keep=(ownership,))

    def _reunite(self, y: Tensor, routed: Routed, ownership: Ownership, piece_bytes: int, *, add: bool) -> None:
        """Of every row, from whoever computed them: its experts' results, piece by piece."""
        tree = self.trees.experts
        assert tree is not None
        holders = [
            (rank, index)
            for group in groups_of(self.place.stage_plan)
            for rank, pieces in zip(group, tree.pieces, strict=True)
            for index in range(len(pieces))
        ]
        sources = _array([self._slots(rank, offset=index * piece_bytes) for rank, index in holders])
        is_mine = np.array([rank == self.place.index for rank, _ in holders], dtype=np.int64)
        joins = np.array(tree.joins, dtype=np.int64)
        reunite = structs.Reunite(
            y=rows_of(y),
            sources=sources,
            is_mine=is_mine.ctypes.data,
            joins=joins.ctypes.data,
            ids=routed.ids.data_ptr(),
            owners=ownership.c,
            shares=routed.shares.data_ptr(),
            width=y.shape[1],
            chosen=routed.chosen,
            pieces=len(joins),
            tally=self._tally,
            add=add,
        )
        self._run(reunite, routed.rows, keep=(sources, is_mine, joins, ownership))

    # --- the stages beside ---

    def send(self, x: Tensor) -> None:
        """Every rank of this stage has all of x; each sends its share of the rows to all ranks of the next."""
        place, layout = self.place, self._layout
        receivers = len(place.replica.stages[place.stage + 1].ranks)
        taken = [self._base + layout.taken_at(place.stage + 1, index) for index in range(receivers)]
        rows = x.shape[0]
        if place.is_first:
            self._pause(rows)
        self._meet(rows, taken, clock=self._sent, ahead=1 - layout.depth, idle=True)
        self._put(x, self._ring(place.stage, self._sent), part=place.index, parts=len(place.ranks))
        self._meet(rows, [], own=self._sent, clock=self._sent)

    def receive(self, rows: int) -> Tensor:
        place, layout = self.place, self._layout
        senders = len(place.replica.stages[place.stage - 1].ranks)
        sent = [self._base + layout.sent_at(place.stage - 1, index) for index in range(senders)]
        x = self._kernels.executor.new(rows, self._spec.hidden_size, torch.float32)
        self._meet(rows, sent, clock=self._taken, ahead=1, idle=True)
        self._put(x, self._ring(place.stage - 1, self._taken), take=True)
        self._meet(rows, [], own=self._taken, clock=self._taken)
        self._pause(rows)
        return x

    def _pause(self, rows: int) -> None:
        if self._pace is not None:
            self._run(structs.Pause(ns=self._pace[0], row_ns=self._pace[1]), rows)

    def _ring(self, stage: int, clock: int) -> structs.Slots:
        """Between `stage` and the next."""
        layout = self._layout
        return structs.Slots(
            data=self._base + layout.ring_at[stage],
            slot_bytes=layout.ring_slot_bytes,
            depth=layout.depth,
            clock=clock,
            ahead=1,
        )

    # --- together ---

    def abort(self) -> None:
        counters = self._base + self._layout.counters_at
        self._kernels.executor.library.give_up(self._watch.end.aborted, counters, self._layout.num_counters)

    def count_step(self, seconds: float) -> None:
        """Keep in the tally that a step took so long, waits included."""
        tally = structs.Tally.from_address(self._tally)
        tally.steps += 1
        tally.step_ns += int(seconds * 1e9)

    def _slots(self, rank: int, *, ahead: int = 0, offset: int = 0) -> structs.Slots:
        """Of a rank of this stage."""
        stage, layout = self.place.stage, self._layout
        return structs.Slots(
            data=self._base + layout.rank_slots_at(stage, rank) + offset,
            slot_bytes=layout.slot_bytes[stage],
            depth=SLOTS,
            clock=self._met,
            ahead=ahead,
        )

    def _put(self, x: Tensor, slots: structs.Slots, *, part: int = 0, parts: int = 1, take: bool = False) -> None:
        assert x.dtype == torch.float32, x.dtype
        move = structs.Move(
            x=rows_of(x), slots=slots, tally=self._tally, width=x.shape[1], part=part, parts=parts, take=take
        )
        self._run(move, x.shape[0])

    def _meet_stage(self, rows: int) -> None:
        others = [
            self._base + self._layout.met_at(self.place.stage, index)
            for index in range(len(self.place.ranks))
            if index != self.place.index
        ]
        self._meet(rows, others, own=self._met, clock=self._met)

    def _meet(
        self,
        rows: int,
        others: list[int],
        *,
        clock: int,
        own: int | None = None,
        ahead: int = 0,
        idle: bool = False,
    ) -> None:
        addresses = np.array(others, dtype=np.uint64)
        meet = structs.Meet(
            end=ctypes.pointer(self._watch.end),
            own=own,
            others=addresses.ctypes.data,
            num_others=len(others),
            clock=clock,
            ahead=ahead,
            idle=idle,
        )
        self._run(meet, rows, keep=(addresses,))

    def _run(self, operation: ctypes.Structure, rows: int, keep: tuple[object, ...] = ()) -> None:
        self._kernels.executor.run(operation, rows, keep=(self, *keep))


def _array(slots: Sequence[structs.Slots]) -> ctypes.Array[structs.Slots]:
    return (structs.Slots * len(slots))(*slots)


def _of_all(held: Sequence[PackedMatrix], ids: Sequence[int], count: int) -> list[PackedMatrix]:
    """A matrix for each of `count` experts: those that are not held get no rows, and another's stands in for them."""
    all_experts = [held[0]] * count
    for index, matrix in zip(ids, held, strict=True):
        all_experts[index] = matrix
    return all_experts
