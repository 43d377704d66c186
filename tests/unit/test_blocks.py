"""Block accounting: who owns what, what is shared, what is evicted first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from holdfast.cache.blocks import ROOT, BlockPool, chain

SIZE = 4


def hashes(tokens: list[int]) -> list[bytes]:
    result = [ROOT]
    for start in range(0, len(tokens) - len(tokens) % SIZE, SIZE):
        result.append(chain(result[-1], tokens[start : start + SIZE]))
    return result[1:]


def publish(pool: BlockPool, blocks: list[int], tokens: list[int]) -> None:
    for index, prefix_hash in enumerate(hashes(tokens)):
        pool.publish(blocks[index], prefix_hash, tokens[index * SIZE : (index + 1) * SIZE])


def test_prefix_is_found_after_release_and_shared_while_held():
    pool, tokens = BlockPool(8, SIZE), list(range(10))
    blocks = pool.allocate(3)
    publish(pool, blocks, tokens)
    assert pool.match(hashes(tokens), tokens) == blocks[:2]
    pool.release(blocks)
    found = pool.match(hashes(tokens), tokens)
    assert found == blocks[:2]
    assert pool.num_idle(found) == 2
    pool.take(found)
    pool.take(found)
    assert pool.num_available == 6
    pool.check_integrity([found, found])
    pool.release(found)
    assert pool.num_available == 6
    pool.release(found)
    assert pool.num_available == 8


def test_a_hash_collision_does_not_serve_foreign_tokens():
    pool, tokens = BlockPool(4, SIZE), [1, 2, 3, 4]
    blocks = pool.allocate(1)
    publish(pool, blocks, tokens)
    assert pool.match(hashes(tokens), [1, 2, 3, 5]) == [], "same hash, other tokens"


def test_same_block_after_another_parent_is_another_prefix():
    pool = BlockPool(8, SIZE)
    blocks = pool.allocate(2)
    publish(pool, blocks, [1, 1, 1, 1, 7, 7, 7, 7])
    other = [2, 2, 2, 2, 7, 7, 7, 7]
    assert pool.match(hashes(other), other) == []


def test_worthless_blocks_go_first_then_the_tail_of_the_oldest():
    pool = BlockPool(4, SIZE)
    tokens = list(range(8))
    known = pool.allocate(2)
    publish(pool, known, tokens)
    pool.release(known)
    assert set(pool.allocate(2)).isdisjoint(known), "free blocks are taken before cached ones"
    assert pool.allocate(1) == [known[1]], "of a cached prefix the last block goes first"
    assert pool.match(hashes(tokens), tokens) == [known[0]]


def test_releasing_twice_is_caught():
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


class Pool(RuleBasedStateMachine):
    """Random holders with prefixes over a tiny alphabet, so that they collide and share often."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, SIZE)
        self.holders: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def hold(self, tokens: list[int]) -> None:
        found = self.pool.match(hashes(tokens), tokens)
        wanted = self.pool.blocks_for(len(tokens)) - len(found)
        if wanted + self.pool.num_idle(found) > self.pool.num_available:
            return
        self.pool.take(found)
        blocks = found + self.pool.allocate(wanted)
        publish(self.pool, blocks, tokens)
        self.holders.append(blocks)

    @rule(index=st.integers(0, 100))
    def let_go(self, index: int) -> None:
        if self.holders:
            self.pool.release(self.holders.pop(index % len(self.holders)))

    @invariant()
    def accounting_balances(self) -> None:
        self.pool.check_integrity(self.holders)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
