"""The memory that the ranks of one replica share, when they are processes of one machine: what lies where in it.

    head: aborted │ a tally per rank │ counters │ per stage: how often experts were chosen │ per stage: two slots per
    rank │ per border: a ring of slots

A file without a name (memfd): the supervisor makes it and its children inherit it, so nothing is left of it when they
are gone. Only pages that are written to take memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass
from itertools import accumulate

from holdfast.core.config import LOGIT_ROWS, SchedulerConfig
from holdfast.core.errors import StartupError
from holdfast.core.plan import Place, ReplicaPlan
from holdfast.core.spec import DecoderSpec
from holdfast.parallel.placement import groups_of
from holdfast.parallel.shards import Tree, head_shards, num_expert_shards, num_mlp_shards, tree_of

PAGE = 4096
LINE = 64
"""Bytes of a counter and of a tally: each has a cache line of its own."""
ABORTED_AT = 0
SLOTS = 2
"""Of each rank in the exchanges of its stage, used by turns."""


@dataclass(frozen=True, slots=True)
class StageTrees:
    """How the sums of a stage's ranks meet."""

    attention: Tree
    mlp: Tree
    experts: Tree | None
    """Within a group of ranks with the same experts."""
    embedding: Tree

    @classmethod
    def of(cls, replica: ReplicaPlan, stage: int, spec: DecoderSpec) -> StageTrees:
        ranks = replica.stages[stage].ranks
        shard_of = {end: index + 1 for index, end in enumerate(head_shards(spec))} | {0: 0}
        heads = [(shard_of[shard.query_heads[0]], shard_of[shard.query_heads[1]]) for shard in ranks]
        group = [ranks[index] for index in groups_of(replica.stages[stage])[0]]
        experts = None
        if spec.moe is not None:
            experts = tree_of([shard.expert_shards for shard in group], num_expert_shards(spec))
        return cls(
            attention=tree_of(heads, len(head_shards(spec))),
            mlp=tree_of([shard.mlp_shards for shard in ranks], num_mlp_shards(spec)),
            experts=experts,
            embedding=tree_of([(index, index + 1) for index in range(len(ranks))], len(ranks)),
        )


def layout_of(replica: ReplicaPlan, spec: DecoderSpec, config: SchedulerConfig) -> Layout:
    """Of a replica that is served: the same in every process."""
    return Layout(replica, spec, config.max_num_batched_tokens, max(config.max_num_seqs, LOGIT_ROWS))


class Layout:
    """Where everything is, in bytes from the start. Steps have up to `max_tokens` tokens, and up to `max_logits`
    rows of logits are exchanged at once."""

    def __init__(self, replica: ReplicaPlan, spec: DecoderSpec, max_tokens: int, max_logits: int) -> None:
        stages = replica.stages
        self.num_ranks = replica.num_ranks
        self.first_rank = [0, *accumulate(len(stage.ranks) for stage in stages)]
        """Of each stage, counting through all of them."""
        self.row_bytes = spec.hidden_size * 4
        self.max_tokens = max_tokens
        self.depth = 1 << len(stages).bit_length()
        """Slots of a ring: microbatches that a stage may be ahead of the next. A power of two, so that counters,
        which have 32 bits, may wrap."""
        self.trees = [StageTrees.of(replica, index, spec) for index in range(len(stages))]
        end = PAGE + LINE * self.num_ranks
        self.num_counters = 3 * self.num_ranks
        self.counters_at = end
        end = _whole_pages(end + LINE * self.num_counters)
        self.num_experts = spec.moe.num_experts if spec.moe else 0
        self.num_layers = [stage.layers[1] - stage.layers[0] for stage in stages]
        self.chosen_at: list[int] = []
        for stage in stages:
            self.chosen_at.append(end)
            end += _whole_pages(8 * self.num_experts * (stage.layers[1] - stage.layers[0]))
        self.slot_bytes, self.slots_at, self.ring_at = [], [], []
        for index, stage in enumerate(stages):
            vocab = max(last - first for first, last in (shard.vocab for shard in stage.ranks))
            logits = max_logits * vocab * 4 if index == len(stages) - 1 else 0
            self.slot_bytes.append(_whole_pages(max(self._most_rows(index, spec) * self.row_bytes, logits)))
            self.slots_at.append(end)
            end += SLOTS * len(stage.ranks) * self.slot_bytes[-1]
        for _ in stages[1:]:
            self.ring_at.append(end)
            end += self.depth * self.ring_slot_bytes
        self.num_bytes = end

    @property
    def ring_slot_bytes(self) -> int:
        return _whole_pages(self.max_tokens * self.row_bytes)

    def _most_rows(self, stage: int, spec: DecoderSpec) -> int:
        trees = self.trees[stage]
        pieces = [len(some) for tree in (trees.attention, trees.mlp) for some in tree.pieces]
        if trees.experts and spec.moe:
            pieces += [len(some) * spec.moe.experts_per_token for some in trees.experts.pieces]
        return max(pieces) * self.max_tokens

    # a rank counts how often it has met those of its stage, sent to the next, and taken from the one before

    def met_at(self, stage: int, index: int) -> int:
        return self._counter_at(stage, index, 0)

    def sent_at(self, stage: int, index: int) -> int:
        return self._counter_at(stage, index, 1)

    def taken_at(self, stage: int, index: int) -> int:
        return self._counter_at(stage, index, 2)

    def _counter_at(self, stage: int, index: int, kind: int) -> int:
        return self.counters_at + LINE * (3 * (self.first_rank[stage] + index) + kind)

    def tally_at(self, stage: int, index: int) -> int:
        return PAGE + LINE * (self.first_rank[stage] + index)

    def chosen_of(self, stage: int, layer: int) -> int:
        """Of a layer of this stage, counting from its first: how often each expert was chosen, int64 [E]."""
        return self.chosen_at[stage] + 8 * self.num_experts * layer

    def rank_slots_at(self, stage: int, index: int) -> int:
        """Its `SLOTS` slots, one after the other."""
        return self.slots_at[stage] + SLOTS * index * self.slot_bytes[stage]


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def create(num_bytes: int, name: str = "holdfast") -> int:
    """A file descriptor of that much shared memory, all zero. The caller closes it."""
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def attach(descriptor: int, layout: Layout) -> mmap.mmap:
    """The memory of a descriptor, which must be as large as the layout says."""
    found = os.fstat(descriptor).st_size
    if found != layout.num_bytes:
        raise StartupError(f"{found} bytes of shared memory, the plan needs {layout.num_bytes}")
    return mmap.mmap(descriptor, found)


@dataclass(frozen=True, slots=True)
class RankTally:
    """What one rank has done since it started; see `core.wire.RankStats`."""

    steps: int
    exchanges: int
    bytes_read: int
    expert_rows: int
    step_seconds: float
    waited_seconds: float
    idle_seconds: float
    moves: int


def read_tally(memory: mmap.mmap, layout: Layout, stage: int, index: int) -> RankTally:
    at = layout.tally_at(stage, index)
    exchanges, bytes_read, waited, idle, steps, step, expert_rows, moves = struct.unpack_from("<8q", memory, at)
    return RankTally(steps, exchanges, bytes_read, expert_rows, step / 1e9, waited / 1e9, idle / 1e9, moves)


class Moves:
    """What a rank counts so that others see it does not hang: operations in C, and beside them `count`s."""

    def __init__(self, memory: mmap.mmap, layout: Layout, place: Place) -> None:
        self._number = ctypes.c_int64.from_buffer(memory, layout.tally_at(place.stage, place.index) + LINE - 8)
        self.address = ctypes.addressof(self._number)

    def count(self) -> None:
        self._number.value += 1


def read_chosen(memory: mmap.mmap, layout: Layout, stage: int) -> list[list[int]]:
    """How often the experts of a stage's layers were chosen since the start: [layers][E]."""
    experts, at = layout.num_experts, layout.chosen_at[stage]
    counts = struct.unpack_from(f"<{experts * layout.num_layers[stage]}q", memory, at)
    return [list(counts[layer * experts : (layer + 1) * experts]) for layer in range(layout.num_layers[stage])]
