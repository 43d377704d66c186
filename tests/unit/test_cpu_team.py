"""Around the CPU kernels: recorded steps, the threads that run them, and finding the library."""

from __future__ import annotations

import gc
import logging
import os
import resource
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64
from pathlib import Path

import pytest
import torch
from torch import Tensor

from holdfast.core.errors import ConfigError
from holdfast.kernels.cpu import library
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.cpu.library import ISA_VARIABLE, LIBRARY_VARIABLE
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Forward, Heads, Routing
from holdfast.kernels.select import select_kernels
from support.attention import Cached, Part
from support.cpu import ISAS, Build, every_build, every_isa, generator, matrix, same_bits

# --- recorded steps ---

HEADS = Heads(6, 2, 16)
HIDDEN, VOCABULARY, MAX_TOKENS = 64, 50, 90


class Model:
    """Two layers that call every kernel there is, the second one with experts."""

    def __init__(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        random_ = generator(0)
        self.kernels, self.dtype = kernels, dtype
        self.norm, self.norm_bias = (
            torch.rand(HIDDEN, generator=random_) + 0.5,
            torch.randn(HIDDEN, generator=random_),
        )
        angles = torch.rand(3000, 6, generator=random_)
        rope = torch.stack((angles.cos(), angles.sin()), dim=1)
        self.heads = Heads(6, 2, 16, rope, q_norm=torch.ones(16), k_norm=torch.ones(16), eps=1e-5)

        def pack(kind: str, rows: int, columns: int, parts: int = 1, **options: object):
            bias = [torch.randn(rows, generator=random_) for _ in range(parts)]
            return kernels.pack([matrix(kind, rows, columns, random_)[0] for _ in range(parts)], bias, **options)

        self.table, self.places = pack("Q8_0", VOCABULARY, HIDDEN), pack("bfloat16", 3002, HIDDEN)
        self.qkv, self.o = pack("Q4_1", 160, HIDDEN), pack("bfloat16", HIDDEN, 96, shards=(3, 48, 96))
        self.up, self.down = pack("Q4_0", 96, HIDDEN, 2, gated=True, activation="silu"), pack("Q8_0", HIDDEN, 96)
        self.router = pack("bfloat16", 5, HIDDEN)
        self.ups = [pack("Q4_0", 32, HIDDEN, 2, gated=True, activation="gelu") for _ in range(5)]
        self.downs = [pack("bfloat16", HIDDEN, 32) for _ in range(5)]

    def forward(self, cached: Cached) -> Forward:
        """Over the pages of `cached`."""
        kernels, pages = self.kernels, (cached.k_pages, cached.v_pages)

        def run(ids: Tensor, batch: BatchLayout) -> Tensor:
            x = kernels.embedding(ids, self.table, scale=2.0)
            kernels.embedding(batch.positions, self.places, offset=2, add_to=x)
            for window in (None, 20):
                normed = kernels.layer_norm(x, self.norm, self.norm_bias, 1e-5, self.dtype)
                q = kernels.store_kv(kernels.linear(normed, self.qkv), self.heads, *pages, batch)
                out = kernels.attention(q, self.heads, *pages, batch, AttentionOptions(0.25, window=window))
                kernels.linear(out, self.o, add_to=x)
                normed = kernels.rms_norm(x, self.norm, 1e-5, self.dtype)
                kernels.linear(kernels.linear(normed, self.up), self.down, add_to=x)
                scores = kernels.softcap(kernels.linear(normed, self.router, dtype=torch.float32), 5.0)
                kernels.experts(normed, scores, Routing(2, True), self.ups, self.downs, add_to=x)
            return kernels.convert(x, self.dtype)

        return run


STEPS: list[list[Part]] = [
    [(0, 0, MAX_TOKENS)],
    [(0, 90, 91)],
    [(1, 0, 7), (0, 91, 92), (2, 0, 30)],
    [(2, 30, 60), (1, 7, 8), (0, 92, 144)],
    *[[(3, start, start + MAX_TOKENS)] for start in range(0, 1080, MAX_TOKENS)],
    [(3, 1080, 1081), (1, 8, 9), (2, 60, 61)],
]


@every_build
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 16)], ids=str)
def test_a_recorded_step_is_the_step(build: Build, dtype: torch.dtype, bits: int):
    """What depends on a step's rows, requests or blocks and was fixed while recording; workspace given away early."""
    model = Model(build.kernels(dtype, bits=bits), dtype)
    direct, replayed = (Cached(model.kernels, HEADS, [150, 20, 70, 1100], dtype=dtype) for _ in range(2))
    forward = model.forward(direct)
    program = model.kernels.record(model.forward(replayed), MAX_TOKENS)
    for number, parts in enumerate(STEPS):
        count = sum(stop - start for _, start, stop in parts)
        ids = torch.randint(0, VOCABULARY, (count,), generator=generator(number))
        result = program(ids, replayed.layout(parts))
        assert result.shape == (count, HIDDEN)
        assert same_bits(result, forward(ids, direct.layout(parts))), parts
    assert same_bits(replayed.k_pages, direct.k_pages)
    assert same_bits(replayed.v_pages, direct.v_pages)


def one_request(count: int) -> BatchLayout:
    zeros = torch.zeros(count, dtype=torch.int64)
    return BatchLayout((count,), (count,), zeros, zeros, torch.zeros(1, 1, dtype=torch.int32))


def test_a_recording_that_fails_leaves_the_kernels_as_they_were():
    """Calls that go on being put down instead of being run; a step that is larger than the recorded one."""
    kernels = CpuKernels(torch.float32)

    def failing(ids: Tensor, batch: BatchLayout) -> Tensor:
        raise KeyError("weights")

    with pytest.raises(KeyError):
        kernels.record(failing, 4)
    x = torch.ones(2, 3)
    assert torch.equal(kernels.convert(x, torch.float32), x)
    table = kernels.pack([torch.ones(2, 3)])
    program = kernels.record(lambda ids, batch: kernels.embedding(ids, table), 4)
    with pytest.raises(AssertionError, match="5 tokens in a step recorded for 4"):
        program(torch.zeros(5, dtype=torch.int64), one_request(5))


def test_another_threads_calls_run_while_a_step_is_recorded():
    """Put down in the recording, so that the caller gets numbers that nobody has computed."""
    kernels = CpuKernels(torch.float32, 2)
    table, x = kernels.pack([torch.ones(2, 3)]), torch.ones(2, 3)

    def forward(ids: Tensor, batch: BatchLayout) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(kernels.convert, x, torch.float32).result(), x)
        return kernels.embedding(ids, table)

    program = kernels.record(forward, 4)
    assert torch.equal(program(torch.zeros(3, dtype=torch.int64), one_request(3)), torch.ones(3, 3))


def test_what_a_recording_cannot_hold_is_noticed():
    """A view of some rows would be run over all of the step's; a recording within another would end up empty."""
    kernels = CpuKernels(torch.float32)
    table = kernels.pack([torch.ones(2, 3)])
    with pytest.raises(AssertionError, match="3 rows cannot be recorded"):
        kernels.record(lambda ids, batch: kernels.embedding(ids[:3], table), 4)
    with pytest.raises(AssertionError, match="within a recording"):
        kernels.record(lambda ids, batch: kernels.record(lambda *_: ids, 4)(ids, batch), 4)


def test_sampling_can_be_recorded():
    """Chosen ids, seeds and limits that are gone when the recording is run."""
    kernels = CpuKernels(torch.float32, 2)
    weight = kernels.pack([torch.randn(50, 8, generator=generator(3))])
    table = kernels.pack([torch.randn(20, 8, generator=generator(4))])

    def choose(ids: Tensor, batch: BatchLayout) -> Tensor:
        logits, rows = kernels.linear(kernels.embedding(ids, table), weight), len(ids)
        kernels.filter_logits(logits, torch.full((rows,), 5), torch.full((rows,), 0.9), torch.full((rows,), 0.01))
        kernels.add_gumbel_noise(logits, torch.full((rows,), 7), torch.full((rows,), 11))
        return kernels.argmax(logits)[:, None]

    program, ids = kernels.record(choose, 16), torch.arange(16)
    gc.collect()
    assert torch.equal(program(ids, one_request(16)), choose(ids, one_request(16)))


def test_wrong_operands_are_noticed():
    """What C would read beyond its end, or as numbers of another kind."""
    kernels = CpuKernels(torch.bfloat16)
    x, weight = torch.ones(2, 8, dtype=torch.bfloat16), kernels.pack([torch.ones(4, 8)])
    half = torch.ones(8, dtype=torch.bfloat16)
    heads, pages = Heads(2, 1, 8), torch.zeros(1, 1, 16, 8)
    plain = AttentionOptions(1.0)
    for wrong in (
        lambda: kernels.linear(x[:, :6], weight),
        lambda: kernels.linear(x, weight, add_to=torch.zeros(2, 3)),
        lambda: kernels.embedding(torch.zeros(2, dtype=torch.int32), weight),
        lambda: kernels.rms_norm(x, half, 1e-5, torch.float32),
        lambda: kernels.rms_norm(x, half.float()[:6], 1e-5, torch.float32),
        lambda: kernels.store_kv(torch.ones(2, 32, dtype=torch.bfloat16), heads, pages, pages, one_request(2)),
        lambda: kernels.store_kv(torch.ones(2, 30), heads, pages, pages, one_request(2)),
        lambda: kernels.attention(
            torch.ones(2, 16, dtype=torch.bfloat16), heads, pages, pages, one_request(2), plain
        ),
        lambda: kernels.attention(torch.ones(3, 16), heads, pages, pages, one_request(2), plain),
        lambda: kernels.argmax(x),
        lambda: kernels.add_gumbel_noise(torch.ones(2, 8), torch.ones(1, dtype=torch.int64), torch.ones(2)),
        lambda: kernels.pack([torch.ones(4, 8)], shards=(4, 6)),
        lambda: kernels.pack([torch.ones(4, 8)], shards=(4, 4, 8)),
        lambda: kernels.pack([torch.ones(4, 8)], [torch.ones(3)]),
        lambda: kernels.pack([torch.ones(4, 8), torch.ones(5, 8)], gated=True),
        lambda: kernels.experts(
            x, torch.ones(2, 2), Routing(1, True), [weight] * 2, [kernels.pack([torch.ones(8, 4)]), weight]
        ),
    ):
        with pytest.raises(AssertionError):
            wrong()


# --- the team ---


def test_denormals_are_every_threads():
    """A caller that has them flushed to zero: his share of the rows alone would differ."""
    x = torch.full((64, 33), 1e-40)
    kernels = CpuKernels(torch.float32, 2)
    cap = kernels.softcap(x.clone(), 1.0)
    assert torch.set_flush_denormal(True)
    try:
        flushed = kernels.softcap(x.clone(), 1.0)
        assert float(x[0, 0] * 1.0) == 0.0, "the caller's own arithmetic is as before"
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(flushed, cap)
    assert (cap != 0).all()


def test_a_child_that_lets_go_of_its_parents_kernels():
    """It has none of the team's threads: waiting for them to end is a crash."""
    x = torch.ones(40, 33)
    kernels = CpuKernels(torch.float32, 3)
    expected = kernels.convert(x, torch.bfloat16)
    child = os.fork()
    if child == 0:
        del kernels
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(kernels.convert(x, torch.bfloat16), expected)


@pytest.mark.skipif(LIBRARY_VARIABLE in os.environ, reason="a sanitizer needs all the addresses there are")
def test_threads_that_cannot_be_had():
    """A limit of the system met in the middle of starting."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20), limits[1]))
    try:
        with pytest.raises(ConfigError, match="cannot start 500 CPU threads"):
            CpuKernels(torch.float32, 500)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@every_isa
def test_thousands_of_tiny_operations(isa: str):
    """A unit that is run twice or never, a stage that opens before the last has ended, a thread that sleeps on."""
    random_ = generator(1)
    ids, x = torch.randint(0, 40, (30,), generator=random_), torch.randn(40, 16, generator=random_)
    weights, norm = torch.randn(3, 16, 16, generator=random_), torch.ones(16)
    expected: dict[int, Tensor] = {}
    for threads in (1, 2, 3, 4):
        kernels = CpuKernels(torch.float32, threads, isa=isa)
        table, *packed = [kernels.pack([x]), *(kernels.pack([weight]) for weight in weights)]

        def forward(
            ids: Tensor, _: BatchLayout, *, kernels: CpuKernels = kernels, table=table, packed=packed
        ) -> Tensor:
            y = kernels.embedding(ids, table)
            for round_ in range(20):
                kernels.linear(kernels.rms_norm(y, norm, 1e-5, torch.float32), packed[round_ % 3], add_to=y)
                kernels.softcap(y, 30.0)
            return y

        program = kernels.record(forward, 30)
        for turn in range(150):
            count = turn * 7 % 30 + 1
            out = program(ids[:count], one_request(count))
            assert torch.equal(out, expected.setdefault(count, out.clone())), (threads, turn)
        for turn in range(300):
            count = turn % 30 + 1
            assert torch.equal(kernels.embedding(ids[:count], table), x[ids[:count]]), (threads, turn)


def test_more_units_than_a_range_has_bits_for():
    """Claims that lose their upper bits, or of which the last goes beyond the end."""
    memory = torch.full((2_100_100, 1), 100.0)
    x = memory[:2_100_001]
    CpuKernels(torch.float32, 2).softcap(x, 3.0)
    assert (x == 3.0).all()
    assert (memory[2_100_001:] == 100.0).all()


@every_isa
def test_threads_may_share_the_kernels(isa: str):
    """Two runs at once, and an attention that overwrites what another has put aside between its two passes."""
    kernels = CpuKernels(torch.bfloat16, 2, isa=isa)
    weight = kernels.pack([torch.randn(70, 64).bfloat16()])

    def work(seed: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        cached = Cached(kernels, HEADS, [2300], seed=seed)
        x = torch.randn(20, 64, generator=generator(seed)).bfloat16()
        return (
            lambda: kernels.linear(x, weight),
            lambda: cached.run([(0, 2299, 2300)], AttentionOptions(0.25)),
        )

    works = [work(seed) for seed in range(2)]
    expected = [[run() for run in runs] for runs in works]

    def repeat(index: int) -> int:
        pairs = [(run(), right) for _ in range(150) for run, right in zip(works[index], expected[index], strict=True)]
        return sum(not torch.equal(out, right) for out, right in pairs)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(repeat, range(2))) == [0, 0]


def thread_ids() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def wait_until_gone(threads: set[int]) -> None:
    deadline = time.monotonic() + 60
    while threads & thread_ids():  # a joined thread is in this list for a moment longer
        assert time.monotonic() < deadline, "threads are left over"
        os.sched_yield()


def test_a_team_ends_with_its_kernels():
    """Threads that outlive a model."""
    before = thread_ids()
    kernels = CpuKernels(torch.float32, 4)
    started = thread_ids() - before
    assert len(started) == 3
    kernels.convert(torch.ones(50, 3), torch.float32)
    del kernels
    gc.collect()
    wait_until_gone(started)


def test_a_program_keeps_its_kernels():
    """A recorded step that runs on threads that have ended."""
    before = thread_ids()
    kernels, x = CpuKernels(torch.float32, 3), torch.randn(9, 5)
    table = kernels.pack([x])
    program = kernels.record(lambda ids, batch, kernels=kernels: kernels.embedding(ids, table), 9)
    started = thread_ids() - before
    del kernels
    gc.collect()
    assert started <= thread_ids()
    assert torch.equal(program(torch.arange(9), one_request(9)), x)
    del program
    gc.collect()
    wait_until_gone(started)


def test_pinned_threads_have_a_core_each():
    """The caller's thread, once it calls, and the others; not the thread that made the kernels."""
    usable = os.sched_getaffinity(0)
    before = thread_ids()
    kernels = CpuKernels(torch.float32, 2, pinned=True)
    started = thread_ids() - before
    assert [os.sched_getaffinity(thread) for thread in started] == [{(sorted(usable) * 2)[1]}]

    def call() -> set[int]:
        kernels.convert(torch.ones(3, 3), torch.float32)
        return os.sched_getaffinity(0)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call).result() == {min(usable)}
    assert os.sched_getaffinity(0) == usable


def test_pinned_threads_keep_to_the_cores_they_may_use():
    """A thread for which no core is left, pinned to one that belongs to others."""

    def start() -> list[bool]:
        last = max(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {last})  # this thread's
        before = thread_ids()
        kernels = CpuKernels(torch.float32, 3, pinned=True)
        found = [os.sched_getaffinity(thread) == {last} for thread in thread_ids() - before]
        del kernels
        return found

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(start).result() == [True, True]


# --- the library ---


def test_the_best_build_serves_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    """An instruction set that is not the one tested, or that is not there."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert CpuKernels().name == f"cpu-{ISAS[0]}"
    for isa in ISAS:
        monkeypatch.setenv(ISA_VARIABLE, isa)
        assert CpuKernels().name == select_kernels("cpu").name == f"cpu-{isa}"
    monkeypatch.setenv(ISA_VARIABLE, "")
    assert CpuKernels().name == f"cpu-{ISAS[0]}"
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(ConfigError) as error:
        select_kernels("cpu")
    assert str(error.value) == f"{ISA_VARIABLE}=sse9: must be one of {', '.join(ISAS)} on this processor"


def test_without_the_library_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    """A machine without a compiler that does not serve at all, or serves slowly and does not say so."""
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    (tmp_path / "_library.cpython-39-x86_64-linux-gnu.so").write_bytes(b"another Python's")
    with pytest.raises(FileNotFoundError, match="was a C compiler there"):
        CpuKernels()
    with caplog.at_level(logging.WARNING):
        assert select_kernels("cpu", torch.bfloat16, 2).name == "reference"
        (tmp_path / f"_library{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"cut off while it was copied")
        assert select_kernels("cpu", torch.bfloat16, 2).name == "reference"
        monkeypatch.setenv(LIBRARY_VARIABLE, "libm.so.6")
        assert select_kernels("cpu", torch.bfloat16, 2).name == "reference"
    assert caplog.text.count("not exact") == 3


def test_float16_is_the_references(caplog: pytest.LogCaptureFixture):
    """A dtype that the kernels would read as another."""
    with caplog.at_level(logging.WARNING):
        assert select_kernels("cpu", torch.float16, 2).name == "reference"
    assert "torch.float16 runs on torch's" in caplog.text


def test_structs_that_differ_from_the_librarys_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """Fields that C reads at another place than Python wrote them to."""

    class Longer(library.Batch):
        _fields_ = [("more", c_int64)]  # noqa: RUF012 - ctypes'

    monkeypatch.setattr(library, "Batch", Longer)
    with pytest.raises(AssertionError, match="Longer: C has"):
        CpuKernels()
