"""The engine's side of the checkpoint store: full blocks go there, and what begins a request comes back from there.

    keeping    a block is published ─Keep▶ store ─Kept▶ if the pool still has it ─SaveBlocks▶ workers
    restoring  a request is queued ─Find▶ store ─Found▶ if there is room ─LoadBlocks▶ workers ─BlocksLoaded▶ published

Both end in the prefix cache or begin there, so the scheduler knows nothing of it, but that a sequence which is
*held back* is not let in yet. Nothing here is waited for longer than `PATIENCE_SECONDS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from holdfast.cache.blocks import BlockPool
from holdfast.core.checkpoints import Find, Forget, Found, Keep, Kept
from holdfast.core.wire import BlocksLoaded, LoadBlocks, SaveBlocks
from holdfast.schedule.sequence import Sequence

PATIENCE_SECONDS = 0.25
"""That the store may take for an answer; then it is not asked for anything, until it is heard again."""
MOST_SECONDS = 5.0
"""That a sequence may wait, all in all, for blocks that the store has on disk, as long as each answer brings some."""
_AGAIN_SECONDS = 1.0
"""After which slots that were not given are asked for again."""
_MOST_WANTED = 4096
"""Blocks that wait for a slot at once; further ones are not kept."""
_MOST_LOADED = 64
"""Blocks in one message to the workers, who run no step meanwhile."""


@dataclass(slots=True)
class _Missing:
    """Blocks of a sequence that are not in the pool, but in the store: the first of them is its block `first`."""

    life: int
    first: int
    slots: list[int]
    num_had: int
    """Blocks that were in either."""
    since: float
    """When it was first asked for them."""
    more: bool = False
    """Others come from disk: worth asking again."""


@dataclass(slots=True)
class _Load:
    """Blocks that are being filled. `broken`: places of those that a rank has found to be so."""

    sequence: Sequence
    blocks: list[tuple[int, int, bytes]]
    first: int
    known: list[int]
    """Blocks before them, in the pool already, to be let go with them."""
    is_last: bool
    broken: set[int] = field(default_factory=set)
    answers: int = 0


class Keeper:
    """`ask` sends to the store, `tell` to all `num_ranks` workers, in the order of their steps."""

    def __init__(
        self,
        pool: BlockPool,
        num_ranks: int,
        ask: Callable[[Keep | Find | Forget], None],
        tell: Callable[[SaveBlocks | LoadBlocks], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.num_ranks = num_ranks
        self._ask = ask
        self._tell = tell
        self._now = now
        self._wanted: dict[bytes, tuple[bytes, float]] = {}
        """Blocks without a slot: the one before, when it was asked for."""
        self._saves: list[tuple[int, int, bytes]] = []
        self._finding: dict[str, tuple[Sequence, _Missing, float]] = {}
        """By key: what has been asked about whom, when."""
        self._missing: WeakKeyDictionary[Sequence, _Missing] = WeakKeyDictionary()
        self._loading: dict[int, _Load] = {}
        self._num_loads = self._num_finds = 0
        self._is_silent = False
        self.num_saved = self.num_restored = self.num_broken = 0

    # --- keeping ---

    def keep(self, blocks: Iterable[tuple[bytes, bytes]]) -> None:
        """These are full and published; each with the one before it."""
        now, new = self._now(), []
        for block, before in blocks:
            if len(self._wanted) < _MOST_WANTED and block not in self._wanted:
                self._wanted[block] = (before, now)
                new.append((block, before))
        if new and not self._is_silent:
            self._ask(Keep(new))

    def kept(self, message: Kept) -> None:
        """The store has slots for them, or for some."""
        self._is_silent = False
        gone = []
        for prefix_hash, slot in message.slots:
            self._wanted.pop(prefix_hash, None)
            block = self.pool.block_of(prefix_hash)
            if slot >= 0 and block is not None:
                self.pool.take([block])  # until the workers have been told
                self._saves.append((block, slot, prefix_hash))
            elif slot >= 0:
                gone.append(prefix_hash)
        if gone:
            self._ask(Forget(gone))

    def save(self) -> bool:
        """Tell the workers: after the next step, so that they copy while the engine is at work. Whether there was
        something."""
        if not self._saves:
            return False
        self.num_saved += len(self._saves)
        self._tell(SaveBlocks(self._saves))
        self.pool.release([block for block, _, _ in self._saves])
        self._saves = []
        return True

    def forget(self, blocks: list[bytes]) -> None:
        """They may be broken."""
        for block in blocks:
            self._wanted.pop(block, None)
        self._ask(Forget(blocks))

    # --- restoring ---

    @property
    def is_busy(self) -> bool:
        """Whether an answer is due that a sequence waits for."""
        return bool(self._finding or self._loading)

    @property
    def is_overdue(self) -> bool:
        """Whether the store has not answered in time: `look` lets those go that wait for it."""
        now = self._now()
        return any(now - asked > PATIENCE_SECONDS for _, _, asked in self._finding.values())

    @property
    def is_loading(self) -> bool:
        """Whether workers are at it."""
        return bool(self._loading)

    def look_up(self, sequence: Sequence) -> None:
        """What of it is in the store? It is held back until that is known. Asked once in each of its lives, and again
        when some of it that was in the pool is gone from there."""
        if sequence.held_back:
            return
        num_blocks = (sequence.num_tokens - 1) // self.pool.block_size
        hashes = [] if sequence.wants_prompt_logprobs else sequence.hashes(num_blocks)
        first, known = len(self.pool.match(hashes, sequence.token_ids)), self._missing.get(sequence)
        is_same = known is not None and known.life == sequence.life
        if known is not None and is_same and first >= known.num_had and not known.more:
            return
        since = known.since if known is not None and is_same and known.more else self._now()
        missing = self._missing[sequence] = _Missing(sequence.life, first, [], num_had=first, since=since)
        if first == len(hashes) or self._is_silent:
            return
        self._num_finds += 1
        key = str(self._num_finds)
        self._finding[key] = (sequence, missing, self._now())
        sequence.held_back = True
        self._ask(Find(key, hashes[first:]))

    def found(self, message: Found) -> None:
        """So many of its next blocks are there."""
        self._is_silent = False
        if message.key in self._finding:
            sequence, missing, _ = self._finding.pop(message.key)
            missing.slots, missing.num_had = message.slots, missing.first + len(message.slots)
            missing.more = message.more and self._now() - missing.since < MOST_SECONDS
            sequence.held_back = bool(message.slots)

    def prepare(self, upcoming: Iterable[Sequence], num_running: int) -> None:
        """Fill blocks for those that are let in next, in this order, as far as there is room."""
        for sequence in upcoming:
            if self.pool.blocks_for(sequence.num_tokens) + num_running > self.pool.num_available:
                break
            self.look_up(sequence)
            missing = self._missing.get(sequence)
            if missing is None or not missing.slots:
                continue
            slots, missing.slots = missing.slots, []
            hashes = sequence.hashes(missing.first + len(slots))
            known = self.pool.match(hashes[: missing.first], sequence.token_ids)
            self.pool.take(known)  # else they would be the next to make way
            blocks = self.pool.allocate(len(slots))
            entries = list(zip(blocks, slots, hashes[missing.first :], strict=True))
            for start in range(0, len(entries), _MOST_LOADED):
                part = entries[start : start + _MOST_LOADED]
                is_last = start + len(part) == len(entries)
                load = _Load(sequence, part, missing.first + start, known if is_last else [], is_last)
                self._num_loads += 1
                self._loading[self._num_loads] = load
                self._tell(LoadBlocks(self._num_loads, part))

    def loaded(self, message: BlocksLoaded) -> None:
        """A rank has filled its share of some blocks."""
        load = self._loading[message.load_id]
        load.broken |= set(message.broken)
        load.answers += 1
        if load.answers < self.num_ranks:
            return
        del self._loading[message.load_id]
        size, tokens = self.pool.block_size, load.sequence.token_ids
        for place, (block, _, prefix_hash) in enumerate(load.blocks):
            start = (load.first + place) * size
            if place not in load.broken:
                self.pool.publish(block, prefix_hash, tokens[start : start + size])
        self.pool.release([*load.known, *(block for block, _, _ in load.blocks)])
        self.num_restored += len(load.blocks) - len(load.broken)
        if load.broken:  # all of them: what stays there as it is would not be written again
            self.num_broken += len(load.broken)
            self._ask(Forget([load.blocks[place][2] for place in sorted(load.broken)]))
            missing = self._missing[load.sequence]
            missing.num_had = min(missing.num_had, load.first + min(load.broken))
        if load.is_last:
            load.sequence.held_back = False

    # --- when the store is silent ---

    def look(self) -> None:
        """To be called now and then: nobody waits for an answer that is late."""
        now = self._now()
        for key, (sequence, _, asked) in list(self._finding.items()):
            if now - asked > PATIENCE_SECONDS:
                self._is_silent = True
                sequence.held_back = False
                del self._finding[key]
        again = [(block, before) for block, (before, asked) in self._wanted.items() if now - asked > _AGAIN_SECONDS]
        for block, before in again:
            self._wanted[block] = (before, now)
        if again:
            self._ask(Keep(again))
