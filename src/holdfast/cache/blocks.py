"""Who owns which block of the KV cache, and which blocks hold which prefix. Pure bookkeeping, no tensors.

A block is in exactly one of three states:

    free      nobody holds it, its content is worthless
    cached    nobody holds it, its content is a known prefix: may be taken again, or evicted
    held      `refs` requests hold it (several, when they share a prefix)

    free ──allocate──▶ held ──release──▶ cached (if published) or free
                        ▲───────take─────── cached ──evicted by allocate──▶ held, by another

Free and cached blocks sit in one queue, the next to be given away first: worthless ones at the front, then
cached ones by time of release.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

ROOT = b""
"""The prefix hash before the first block."""


def chain(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The prefix hash (128 bits) of a block whose predecessor's hash is `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._prefix: list[tuple[bytes, tuple[int, ...]] | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks `allocate` could give: free and cached."""
        return len(self._queue)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill or touch."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Give `count` blocks to one holder. The caller has checked `num_available`."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        blocks = [self._queue.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.forget(block)
            self._refs[block] = 1
        return blocks

    def match(self, hashes: Iterable[bytes], token_ids: Sequence[int]) -> list[int]:
        """The longest run of known blocks that begins `token_ids`, whose full blocks have these prefix hashes.

        The hash finds a block, the comparison of its tokens decides. Takes no ownership: see `take`.
        """
        blocks = []
        for start, prefix_hash in zip(range(0, len(token_ids), self.block_size), hashes, strict=False):
            block = self._by_hash.get(prefix_hash)
            if block is None:
                break
            prefix = self._prefix[block]
            assert prefix is not None
            if prefix[1] != tuple(token_ids[start : start + self.block_size]):
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these known blocks nobody holds: taking them lowers `num_available` by as many."""
        return sum(self._refs[block] == 0 for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Become one more holder of blocks that `match` found."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._queue[block]
            self._refs[block] += 1

    def block_of(self, prefix_hash: bytes) -> int | None:
        """The block that is known by it. Takes no ownership."""
        return self._by_hash.get(prefix_hash)

    def publish(self, block: int, prefix_hash: bytes, token_ids: Sequence[int]) -> bool:
        """A held block is full and computed: others may share it. If its prefix is known already, nothing changes
        (False)."""
        assert self._refs[block] > 0
        assert len(token_ids) == self.block_size
        if prefix_hash not in self._by_hash and self._prefix[block] is None:
            self._by_hash[prefix_hash] = block
            self._prefix[block] = (prefix_hash, tuple(token_ids))
            return True
        return False

    def release(self, blocks: Sequence[int]) -> None:
        """One holder lets go. The last blocks of a sequence are evicted before its first, which others may share."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} released twice"
            if self._refs[block] == 0:
                self._queue[block] = None
                if self._prefix[block] is None:
                    self._queue.move_to_end(block, last=False)

    def forget(self, block: int) -> None:
        """Its content is no known prefix any more."""
        prefix = self._prefix[block]
        if prefix is not None:
            del self._by_hash[prefix[0]]
            self._prefix[block] = None

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless `holders`' blocks account for every reference and every state agrees."""
        held = Counter(block for blocks in holders for block in blocks)
        for block in range(self.num_blocks):
            assert self._refs[block] == held[block], f"block {block}: {self._refs[block]} refs, {held[block]} holders"
            assert (block in self._queue) == (self._refs[block] == 0), f"block {block}: queued and held disagree"
        known = {prefix[0]: block for block, prefix in enumerate(self._prefix) if prefix is not None}
        assert known == self._by_hash, "prefix index and blocks disagree"
