"""Blocks on disk: what is found again is what was written, whatever happened to the writer, the file or the disk."""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from holdfast.cache import disk
from holdfast.cache.disk import DiskFile
from holdfast.cache.store import HASH_BYTES, StoreLayout, sums_of
from holdfast.cluster import tier as tier_module
from holdfast.cluster.slots import Store
from holdfast.core.checkpoints import Find, Forget, Found, Keep
from holdfast.core.errors import ConfigError
from holdfast.parallel.segment import create

LAYOUT = StoreLayout(8, num_layers=3, num_kv_heads=2, cell_bytes=64)
SEGMENT_SLOTS = 4
SEGMENT = -(-SEGMENT_SLOTS * (64 + 8 * LAYOUT.num_cells + LAYOUT.slot_bytes) // 4096) * 4096
"""Bytes on disk."""


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SEGMENT_BYTES", SEGMENT_SLOTS * (64 + 8 * LAYOUT.num_cells + LAYOUT.slot_bytes))


def name(number: int) -> bytes:
    return number.to_bytes(HASH_BYTES, "little")


def content(number: int) -> tuple[np.ndarray, bytes]:
    """Checksums and cells of the block called so."""
    cells, size = random.Random(number).randbytes(LAYOUT.slot_bytes), 2 * LAYOUT.cell_bytes
    sums = sums_of(memoryview(cells), range(0, len(cells), size), size, name(number), range(LAYOUT.num_cells))
    return np.array(sums, np.uint64), cells


def opened(folder: Path, num_segments: int = 3, owner: str = "a model", *, is_distrusted: bool = False) -> DiskFile:
    return DiskFile(folder, owner, LAYOUT, 4096 + num_segments * SEGMENT, is_distrusted)


def put(file: DiskFile, number: int, before: int = 0) -> None:
    if not file.free and file.can_grow:
        file.free += reversed(file.grow())
    slot = file.free.pop() if file.free else file.index.drop_last()
    assert slot is not None
    file.write(slot, name(number), name(before) if before else b"", *content(number))
    file.index.add(name(number), name(before) if before else b"", slot)


def get(file: DiskFile, number: int) -> bool | None:
    """Whether it is found; None: it is there, but not what it was. What is found is right."""
    slot = file.index.slot_of(name(number))
    if slot is None:
        return False
    found = file.read(slot, name(number))
    if found is None:
        return None
    checksums, cells = content(number)
    assert found[1] == cells
    assert found[0].tolist() == checksums.tolist()
    return True


def test_blocks_outlive_their_writer_and_the_oldest_make_way(tmp_path: Path):
    """Their order, too; and the file is never larger than it may be, nor anybody else's to read."""
    file = opened(tmp_path / "new" / "folder")
    for number in range(1, 21):
        put(file, number, before=number - 1 if number % 5 != 1 else 0)  # chains of five
        size = file.path.stat()
        assert size.st_size <= 4096 + 3 * SEGMENT
        assert size.st_blocks * 512 >= size.st_size - 8192, "the disk has room for all of it"
        assert size.st_mode & 0o777 == 0o600
    there = [number for number in range(1, 21) if get(file, number)]
    assert len(there) == 12
    assert set(range(16, 21)) <= set(there)
    assert all(number - 1 in there for number in there if number % 5 != 1), "no block without those before it"
    file.close()
    again = opened(tmp_path / "new" / "folder")
    assert [number for number in range(1, 21) if get(again, number)] == there
    assert [again.index.drop_last() for _ in range(12)] == [file.index.drop_last() for _ in range(12)]
    again.close()
    smaller = opened(tmp_path / "new" / "folder", num_segments=1)
    assert len(smaller.index) <= 4
    assert smaller.path.stat().st_size == 4096 + SEGMENT
    smaller.close()


def test_whatever_byte_is_changed_nothing_wrong_is_read(tmp_path: Path):
    dice, outcomes = random.Random(1), []
    file = opened(tmp_path, num_segments=1)
    for number in range(1, 5):
        put(file, number)
    file.close()
    whole = file.path.read_bytes()
    for _ in range(200):
        at = dice.randrange(4096, len(whole))
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << dice.randrange(8)
        file.path.write_bytes(spoilt)
        file = opened(tmp_path, num_segments=1)
        outcomes.append([get(file, number) for number in range(1, 5)])
        file.close()
    assert all(outcome.count(True) >= 3 for outcome in outcomes)
    assert any(None in outcome for outcome in outcomes), "cells"
    assert any(False in outcome for outcome in outcomes), "names"


def test_a_file_that_was_cut_short_has_what_is_left_of_it(tmp_path: Path):
    dice = random.Random(2)
    for _ in range(30):
        file = opened(tmp_path)
        for number in range(1, 13):
            if not get(file, number):
                put(file, number)
        end = dice.randrange(file.path.stat().st_size)
        os.truncate(file.path, end)  # while it is in use
        before = [get(file, number) for number in range(1, 13)]
        file.close()
        file = opened(tmp_path)
        after = [get(file, number) for number in range(1, 13)]
        assert after.count(True) == (end - 4096) // SEGMENT * SEGMENT_SLOTS if end >= 4096 else not any(after)
        assert before.count(True) >= after.count(True)
        assert None not in after
        file.close()


WRITER = """
import sys
from pathlib import Path
import test_disk_tier as support
from holdfast.cache import disk
disk.SEGMENT_BYTES = int(sys.argv[2])
file = support.opened(Path(sys.argv[1]))
number = int(sys.argv[3])
while True:
    number += 1
    support.put(file, number)
    print(number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_blocks(tmp_path: Path):
    """Every block that is named is all there; and what had been written for certain is not lost."""
    last = 0
    for _ in range(4):
        arguments = [sys.executable, "-c", WRITER, str(tmp_path), str(disk.SEGMENT_BYTES), str(last)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(random.Random(last).randrange(20, 60)):
                last = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            last = int(([last, *writer.stdout.read().split()])[-1])
        file = opened(tmp_path)
        found = [get(file, number) for number in range(1, last + 2)]
        assert None not in found, "half a block"
        assert found.count(True) >= 11, "all but the one that was being written"
        assert found[last - 1] is True or found[last] is True
        last += 1
        file.close()


def test_a_folder_belongs_to_one_model_and_one_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk, "LOCK_SECONDS", 0.1)
    file = opened(tmp_path)
    put(file, 1)
    with pytest.raises(ConfigError, match=r"--checkpoint-disk .*another service writes it"):
        opened(tmp_path)
    file.close()
    with pytest.raises(ConfigError, match=r"--checkpoint-disk .*another model or other settings \(a model\)"):
        opened(tmp_path, owner="another")
    file = opened(tmp_path)
    assert get(file, 1), "who was refused has changed nothing"
    file.close()
    segment = file.path.read_bytes()[4096:]
    other = opened(tmp_path / "other", owner="another")
    put(other, 2)
    other.close()
    other.path.write_bytes(other.path.read_bytes()[:4096] + segment)
    other = opened(tmp_path / "other", owner="another")
    assert get(other, 1) is False, "the same name, of another model's tokens"
    other.close()
    other.path.write_bytes(b"Dear diary\n")
    with pytest.raises(ConfigError, match="no file of blocks"):
        opened(tmp_path / "other")
    assert other.path.read_bytes() == b"Dear diary\n"
    with pytest.raises(ConfigError, match=r"--checkpoint-disk .*/blocks: File exists"):
        opened(file.path)
    with file.path.open("r+b") as damaged:
        damaged.seek(30)
        damaged.write(b"?")
    file = opened(tmp_path)
    assert get(file, 1) is False, "nobody knows whose they were"
    file.close()


# --- behind the store ---


@contextmanager
def store_over(folder: Path, num_segments: int = 3) -> Iterator[Store]:
    descriptor = create(LAYOUT.num_bytes)
    store = Store(descriptor, LAYOUT, lambda anew: opened(folder, num_segments, is_distrusted=anew))
    assert store.tier is not None
    try:
        store.tier.start()
        yield store
    finally:
        store.close()
        os.close(descriptor)


def settle(store: Store, until: Callable[[], object], seconds: float = 10.0) -> list[Found]:
    """Let the store do what it does beside, until something is so; what it told meanwhile."""
    told, deadline = [], time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "not in time"
        assert store.tier is not None
        select.select([store.tier.fd], [], [], 0.01)
        told += [found for _, found in store.look()]
    return told


def keep(store: Store, number: int, before: int) -> None:
    """As a worker does."""
    [(_, slot)] = store.answer(Keep([(name(number), name(before) if before else b"")])).slots
    if slot >= 0:
        checksums, cells = content(number)
        assert store.memory.fill(slot, cells)
        store.memory.checksums[slot] = checksums.reshape(store.memory.checksums[slot].shape)


def find(store: Store, numbers: list[int]) -> Found:
    """The answer, when it comes; what it names is right."""
    answer = store.answer(Find("x", [name(number) for number in numbers]))
    assert store.tier is not None
    while answer is None:
        select.select([store.tier.fd], [], [], 0.01)
        [answer, *_] = [found for _, found in store.look()] or [None]
    assert isinstance(answer, Found)
    for number, slot in zip(numbers, answer.slots, strict=False):
        checksums, cells = content(number)
        found = store.memory.take(slot, name(number))
        assert found is not None
        assert found[1] == cells
        assert found[0].tolist() == checksums.tolist()
    return answer


def on_disk(store: Store) -> int:
    assert store.tier is not None
    return store.tier.state.blocks


def test_what_had_to_make_way_in_memory_comes_back(tmp_path: Path):
    with store_over(tmp_path) as store:
        for number in range(1, 13):  # three chains of four; memory has 8 slots
            keep(store, number, 0 if number % 4 == 1 else number - 1)
            settle(store, lambda number=number: on_disk(store) == number)
        assert name(1) not in store.index
        assert len(find(store, [1, 2, 3, 4, 77]).slots) == 4
        assert store.tier.state.read == 4
        assert len(find(store, [9, 10, 11, 12]).slots) == 4
        longest = find(store, [5, 6, 7, 8])
        assert len(longest.slots) == 4
    with store_over(tmp_path) as store:
        assert on_disk(store) == 12
        for first in (1, 5, 9):
            assert len(find(store, list(range(first, first + 4))).slots) == 4
        store.answer(Forget([name(2)]))
        assert len(find(store, [1, 2, 3, 4]).slots) == 1
        settle(store, lambda: not store.tier._jobs)
    with store_over(tmp_path) as store:
        assert len(find(store, [1, 2, 3, 4]).slots) == 1, "it stays forgotten"


def test_a_chain_longer_than_the_memory_comes_in_parts(tmp_path: Path):
    """Each part is an answer; who wants the rest asks again."""
    with store_over(tmp_path) as store:
        for number in range(1, 13):
            keep(store, number, number - 1)
            settle(store, lambda number=number: on_disk(store) == number or len(store.index) < number)
    with store_over(tmp_path) as store:
        rest, there = list(range(1, 13)), on_disk(store)
        assert there > LAYOUT.num_slots
        first = find(store, rest)
        assert len(first.slots) == LAYOUT.num_slots
        assert first.more
        second = find(store, rest[8:])
        assert len(second.slots) == there - 8
        assert not second.more


def test_a_block_that_was_spoilt_on_disk_is_not_found(tmp_path: Path):
    with store_over(tmp_path) as store:
        for number in range(1, 5):
            keep(store, number, number - 1)
        settle(store, lambda: on_disk(store) == 4)
    data = bytearray((tmp_path / "blocks").read_bytes())
    at = data.index(content(3)[1])
    data[at + 100] ^= 1
    (tmp_path / "blocks").write_bytes(data)
    with store_over(tmp_path) as store:
        assert len(find(store, [1, 2, 3, 4]).slots) == 2
        assert store.tier.state.broken == 1
        keep(store, 3, 2)
        settle(store, lambda: on_disk(store) == 4)
        assert len(find(store, [1, 2, 3, 4]).slots) == 4, "it was computed again"


def test_what_is_used_from_memory_stays_on_disk(tmp_path: Path):
    """It is asked for again and again, while others come and go."""
    with store_over(tmp_path, num_segments=2) as store:
        keep(store, 1, 0)
        for number in range(2, 20):
            assert len(find(store, [1]).slots) == 1
            keep(store, number, 0)
            settle(store, lambda number=number: store.tier.state.written == number)
        assert name(1) in store.index
        assert name(1) in store.tier


def test_what_is_distrusted_is_nowhere_any_more(tmp_path: Path):
    """In memory, on disk, or on its way; what comes after it is kept."""
    with store_over(tmp_path) as store:
        for number in range(1, 5):
            keep(store, number, number - 1)
        settle(store, lambda: on_disk(store) == 4)
        keep(store, 5, 4)
        store.look()
        store.forget_all()
        assert find(store, [1, 2, 3, 4, 5]).slots == []
        settle(store, lambda: store.tier.is_open)
        assert on_disk(store) == 0
        assert find(store, [1, 2, 3, 4, 5]).slots == []
        keep(store, 1, 0)
        settle(store, lambda: on_disk(store) == 1)
        assert store.tier.state.failure is None
    with store_over(tmp_path) as store:
        assert len(find(store, [1, 2, 3]).slots) == 1


def test_what_is_spoilt_in_memory_does_not_get_to_disk(tmp_path: Path):
    """A slot that another worker wrote late has all its checksums, but not those of its block."""
    with store_over(tmp_path) as store:
        [(_, slot)] = store.answer(Keep([(name(1), b"")])).slots
        checksums, cells = content(2)
        assert store.memory.fill(slot, cells)
        store.memory.checksums[slot] = checksums.reshape(store.memory.checksums[slot].shape)
        keep(store, 3, 0)
        settle(store, lambda: on_disk(store) == 1)
        assert name(3) in store.tier
        assert name(1) not in store.tier


def test_a_full_disk_takes_no_more_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is there is of use, the oldest make way; once there is room, it grows."""
    monkeypatch.setattr(tier_module, "RETRY_SECONDS", 0.2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store_over(tmp_path) as store:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 2 * SEGMENT, limit[1]))
            for number in range(1, 13):
                keep(store, number, 0)
                settle(store, lambda number=number: store.tier.state.written == number)
            assert "too large" in store.tier.state.failure
            assert on_disk(store) == 2 * SEGMENT_SLOTS
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        settle(store, lambda: not store.tier._is_full)
        for number in range(13, 17):
            keep(store, number, 0)
        settle(store, lambda: on_disk(store) == 3 * SEGMENT_SLOTS)
        assert store.tier.state.failure is None


def test_a_disk_that_breaks_is_done_without_until_it_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tier_module, "RETRY_SECONDS", 0.2)
    with store_over(tmp_path) as store:
        for number in range(1, 4):
            keep(store, number, number - 1)
        settle(store, lambda: on_disk(store) == 3)
        broken = os.open("/dev/null", os.O_RDONLY)
        os.dup2(broken, store.tier._file._fd)  # as if the device had gone: no write succeeds
        os.close(broken)
        keep(store, 4, 3)
        settle(store, lambda: store.tier.state.failure)
        assert not store.tier.is_open
        assert len(find(store, [1, 2, 3, 4]).slots) == 4, "from memory"
        settle(store, lambda: on_disk(store) == 4)
        assert store.tier.state.failure is None


def test_the_store_over_a_disk_against_a_plain_one(tmp_path: Path):
    """Blocks come, go, are asked for and forgotten at random, while the disk is at work and the store is started
    anew: what is found is what was written, and nothing that was forgotten is found."""
    dice = random.Random(5)
    parents = {number: dice.choice([0, *range(max(1, number - 3), number)]) for number in range(1, 40)}
    written: set[int] = set()
    read = 0
    for _ in range(4):
        with store_over(tmp_path, num_segments=5) as store:
            for _ in range(500):
                number = dice.randrange(1, 40)
                chain = [number]
                while parents[chain[0]]:
                    chain.insert(0, parents[chain[0]])
                if dice.random() < 0.5:
                    keep(store, number, parents[number])
                    written.add(number)
                elif dice.random() < 0.85:
                    found = find(store, chain)
                    assert all(each in written for each in chain[: len(found.slots)])
                    assert len(set(found.slots)) == len(found.slots)
                else:
                    store.answer(Forget([name(number)]))
                    written.discard(number)
                if dice.random() < 0.3:
                    settle(store, lambda: True)
                    store.look()
                used = list(store.index.used())
                assert len(used) == len(set(used)) <= LAYOUT.num_slots
                assert not set(used) & set(store._free)
            read += store.tier.state.read
            assert store.tier.state.broken == 0
            assert on_disk(store) <= 5 * SEGMENT_SLOTS
    assert read > 100


def test_a_file_that_was_removed_or_replaced_is_noticed(tmp_path: Path):
    file = opened(tmp_path)
    file.check()
    file.path.unlink()
    with pytest.raises(FileNotFoundError):
        file.check()
    file.path.write_bytes(b"another")
    with pytest.raises(OSError, match="is another file by now"):
        file.check()
    file.close()
