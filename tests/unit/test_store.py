"""The checkpoint store: what is found again is what was put there, or it is not found."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from holdfast.cache.pages import KVPages
from holdfast.cache.store import HASH_BYTES, StoreIndex, StoreLayout, StoreMemory
from holdfast.cluster import plans
from holdfast.cluster import slots as process
from holdfast.cluster.plans import with_checkpoint_memory
from holdfast.cluster.slots import Store
from holdfast.core.checkpoints import Find, Forget, Found, Keep
from holdfast.core.config import CacheConfig, ServeConfig
from holdfast.core.errors import ConfigError
from holdfast.core.plan import Place, places
from holdfast.core.spec import DecoderSpec, LayerSpec, ModelInfo, RopeSpec
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.segment import create
from holdfast.worker.copier import BlockCopier

BLOCK = 4
SPEC = DecoderSpec(
    family="llama",
    vocab_size=256,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_size=512,
    max_positions=1024,
    layers=(LayerSpec(),) * 5,
    ropes=(RopeSpec(theta=10_000.0, rotary_dim=8),),
    attention_scale=1.0,
)


def name(number: int) -> bytes:
    return number.to_bytes(HASH_BYTES, "little")


@contextmanager
def memory_for(num_slots: int) -> Iterator[tuple[int, StoreLayout]]:
    one = StoreLayout(1, SPEC.num_layers, SPEC.num_kv_heads, BLOCK * SPEC.head_dim * 4)
    layout = StoreLayout(num_slots, one.num_layers, one.num_kv_heads, one.cell_bytes)
    descriptor = create(layout.num_bytes)
    try:
        yield descriptor, layout
    finally:
        os.close(descriptor)


def pages_at(place: Place, num_blocks: int, whole: torch.Tensor | None = None) -> KVPages:
    """Of a rank; its part of `whole` [K and V, L, P, G, S, D], or zeros."""
    (first, last), (first_head, last_head) = place.layers, place.shard.kv_heads
    pages = KVPages.allocate(
        num_layers=last - first,
        num_blocks=num_blocks,
        num_kv_heads=last_head - first_head,
        head_dim=SPEC.head_dim,
        block_size=BLOCK,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    if whole is not None:
        pages.data.copy_(whole[:, first:last, :, first_head:last_head])
    return pages


def whole_cache(num_blocks: int) -> torch.Tensor:
    shape = (2, SPEC.num_layers, num_blocks, SPEC.num_kv_heads, BLOCK, SPEC.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_layout_fills_what_it_is_given():
    for num_bytes in (10**5, 10**6, 12_345_678):
        layout = StoreLayout.within(num_bytes, SPEC, BLOCK, 4)
        more = StoreLayout(layout.num_slots + 1, layout.num_layers, layout.num_kv_heads, layout.cell_bytes)
        assert layout.num_bytes <= num_bytes
        assert more.num_bytes > num_bytes
        assert StoreLayout.within(layout.num_bytes, SPEC, BLOCK, 4) == layout
    assert StoreLayout.within(0, SPEC, BLOCK, 4).num_slots == 0


@pytest.mark.parametrize(
    ("writers", "readers"),
    [
        ({}, {}),
        ({"tensor": 2, "pipeline": 2}, {}),
        ({}, {"tensor": 2}),
        ({"pipeline": 3}, {"tensor": 4, "pipeline": 2}),
    ],
)
def test_what_one_plan_saves_another_restores(writers: dict[str, int], readers: dict[str, int]):
    whole = whole_cache(6)
    with memory_for(8) as (descriptor, layout):
        for place in places(make_plan(SPEC, **writers).replicas[0]):
            copier = BlockCopier(pages_at(place, 6, whole), StoreMemory(descriptor, layout), place)
            copier.save([(block, 7 - block, name(block)) for block in (0, 2, 5)])
        for place in places(make_plan(SPEC, **readers).replicas[0]):
            pages = pages_at(place, 3)
            copier = BlockCopier(pages, StoreMemory(descriptor, layout), place)
            assert copier.load([(0, 2, name(5)), (1, 7, name(0)), (2, 5, name(2))]) == []
            assert torch.equal(pages.data, pages_at(place, 6, whole).data[:, :, [5, 0, 2]])


def test_a_block_that_is_not_what_it_should_be_is_not_restored():
    [place] = places(make_plan(SPEC).replicas[0])
    with memory_for(4) as (descriptor, layout):
        memory = StoreMemory(descriptor, layout)
        pages = pages_at(place, 4, whole_cache(4))
        copier, before = BlockCopier(pages, memory, place), pages.data.clone()
        entries = [(block, block, name(block + 1)) for block in range(3)]
        copier.save(entries)
        assert copier.load(entries) == []
        assert copier.load([(3, 0, name(2))]) == [0], "another block's name"
        assert copier.load([(3, 3, name(4))]) == [0], "a slot that nobody wrote"
        dice = random.Random(0)
        flat = memory.slots[1].reshape(-1)
        for _ in range(20):  # any byte of it
            at = dice.randrange(flat.size)
            flat[at] ^= 1 << dice.randrange(8)
            assert copier.load(entries) == [1]
            copier.save(entries[1:2])
        memory.slots[1, 0, 0], memory.slots[1, 0, 1] = memory.slots[1, 0, 1].copy(), memory.slots[1, 0, 0].copy()
        assert copier.load(entries) == [1], "cells of two heads, exchanged"
        assert torch.equal(pages.data, before), "what is not good does not get into the cache"
        half = make_plan(SPEC, tensor=2).replicas[0]
        first = places(half)[0]
        BlockCopier(pages_at(first, 4, whole_cache(4)), memory, first).save([(3, 3, name(9))])
        assert copier.load([(3, 3, name(9))]) == [0], "a rank has died before it wrote its cells"


def test_blocks_go_from_the_end_of_what_was_asked_for_longest_ago():
    with memory_for(6) as (descriptor, layout):
        index = StoreIndex(StoreMemory(descriptor, layout).names)
        for slot, (block, before) in enumerate([(1, 0), (2, 1), (3, 2), (10, 0), (11, 10), (20, 0)]):
            index.add(name(block), name(before) if before else b"", slot)
        assert index.find([name(1), name(2), name(3)]) == [0, 1, 2]
        assert [index.drop_last() for _ in range(6)] == [4, 3, 5, 2, 1, 0]
        assert index.drop_last() is None
        assert not len(index)


def test_an_index_is_read_from_the_memory():
    with memory_for(5) as (descriptor, layout):
        index = StoreIndex(StoreMemory(descriptor, layout).names)
        for slot, (block, before) in enumerate([(1, 0), (2, 1), (3, 2), (9, 1)]):
            index.add(name(block), name(before) if before else b"", slot)
        index.remove(name(9))
        again = StoreIndex(StoreMemory(descriptor, layout).names)
        assert again.find([name(1), name(2), name(3), name(4)]) == [0, 1, 2]
        assert again.find([name(9)]) == []
        assert [again.drop_last() for _ in range(3)] == [2, 1, 0]


def test_the_index_against_a_plain_one():
    """Blocks come, go and are asked for at random; nothing is in two slots, and what is found has been written."""
    dice = random.Random(3)
    with memory_for(12) as (descriptor, layout):
        store = Store(descriptor, layout)
        parents = {number: dice.choice([0, *range(max(1, number - 3), number)]) for number in range(1, 60)}
        for _ in range(2000):
            number = dice.randrange(1, 60)
            written = {
                block
                for block in range(1, 60)
                if (slots := store.index.find([name(block)])) and store.memory.checksums[slots[0]].all()
            }
            if dice.random() < 0.6:
                before = name(parents[number]) if parents[number] else b""
                [(_, slot)] = store.answer(Keep([(name(number), before)])).slots
                assert name(number) in store.index
                assert (slot == -1) == (number in written)
                if dice.random() < 0.8 and slot >= 0:
                    store.memory.checksums[slot] = 1
            elif dice.random() < 0.9:
                chain = [number]
                while parents[chain[0]]:
                    chain.insert(0, parents[chain[0]])
                found = store.answer(Find("x", [name(block) for block in chain]))
                assert isinstance(found, Found)
                expected = [block in written for block in [*chain, 0]]
                assert len(found.slots) == expected.index(False)
                assert len(set(found.slots)) == len(found.slots)
            else:
                store.answer(Forget([name(number)]))
                assert name(number) not in store.index
            used = list(store.index.used())
            assert len(used) == len(set(used)) <= 12
            again = StoreIndex(StoreMemory(descriptor, layout).names)
            assert set(again.used()) == set(used)


def test_memory_that_is_short_is_left_to_others(monkeypatch: pytest.MonkeyPatch):
    """Slots are taken as there is room, and given back from the end when there is none."""
    free = 10 * process.RESERVE
    monkeypatch.setattr(process, "available_memory", lambda: free)
    with memory_for(8) as (descriptor, layout):
        monkeypatch.setattr(process, "GROWTH", 2 * layout.slot_bytes)
        store = Store(descriptor, layout)
        store.memory.slots[...] = 1
        kept = store.answer(Keep([(name(1), b""), (name(2), name(1)), (name(3), name(2))]))
        assert [slot for _, slot in kept.slots] == [0, 1, 2]
        free = 0
        kept = store.answer(Keep([(name(number), b"") for number in range(4, 8)]))
        assert [slot for _, slot in kept.slots] == [3, 2, 1, 0], "blocks make way when there is no memory"
        taken = os.stat(descriptor).st_blocks
        for slot in (0, 1):
            store.memory.checksums[slot] = 1
        store.give_back()
        assert os.stat(descriptor).st_blocks < taken
        assert store.answer(Find("x", [name(7)])) == Found("x", [0])
        store.give_back()
        assert len(store.index) == 0
        assert store.answer(Keep([(name(1), b"")])).slots == [(name(1), -1)]


def test_a_system_that_has_no_memory_is_no_error():
    [place] = places(make_plan(SPEC).replicas[0])
    with memory_for(4) as (descriptor, layout):
        memory = StoreMemory(descriptor, layout)
        copier = BlockCopier(pages_at(place, 4, whole_cache(4)), memory, place)
        memory._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)  # it refuses, whatever the reason
        try:
            copier.save([(0, 0, name(1))])
        finally:
            os.close(memory._descriptor)
        assert not memory.is_complete(0)
        assert copier.load([(1, 0, name(1))]) == [0]


def test_the_size_of_a_store_is_known_before_anything_starts(monkeypatch: pytest.MonkeyPatch):
    """What is of no use is refused by name; what would hold no block by default is no store."""
    model = ModelInfo(path="/m", format="gguf", spec=SPEC, dtype="float32", eos_token_ids=())

    def size(**cache: object) -> int | None:
        config = ServeConfig(cache=CacheConfig(block_size=BLOCK, **cache))
        return with_checkpoint_memory(config, model).cache.checkpoint_memory_bytes

    monkeypatch.setattr(plans, "available_memory", lambda: 10**9)
    assert size() == int(plans.STORE_SHARE * 10**9)
    assert size(enable_prefix_caching=False) == 0
    assert size(checkpoint_memory_bytes=0) == 0
    with pytest.raises(ConfigError, match="--checkpoint-memory-bytes 100: a block needs"):
        size(checkpoint_memory_bytes=100)
    with pytest.raises(ConfigError, match="prefix caching"):
        size(checkpoint_memory_bytes=10**8, enable_prefix_caching=False)
    disk = {"checkpoint_disk": "/d", "checkpoint_disk_bytes": 10**6}
    with pytest.raises(ConfigError, match=r"--checkpoint-disk-bytes 1000000: must be at least 64\d{6} "):
        size(**disk)
    assert size(**disk | {"checkpoint_disk_bytes": 65_000_000})
    with pytest.raises(ConfigError, match=r"--checkpoint-disk-bytes 10{18}: the disk of /d has \d+ in all"):
        size(**disk | {"checkpoint_disk_bytes": 10**18})
    with pytest.raises(ConfigError, match="--checkpoint-disk: must name a folder"):
        size(checkpoint_disk="", checkpoint_disk_bytes=10**9)
    with pytest.raises(ConfigError, match=r"--checkpoint-disk: .*--checkpoint-memory-bytes"):
        size(**disk, checkpoint_memory_bytes=0)
    for given in disk.items():
        with pytest.raises(ConfigError, match=r"--checkpoint-disk.*: needs --checkpoint-disk"):
            ServeConfig(cache=CacheConfig(**dict([given]))).check()
    monkeypatch.setattr(plans, "available_memory", lambda: 1000)
    assert size() == 0
