"""What ranks do together over shared memory: right sums, counted bytes, and nobody who waits for the dead. The
ranks are threads here, each with kernels of its own; as processes they are in tests/multiprocess."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import spec

from holdfast.core.errors import CollectiveFailed
from holdfast.core.plan import Place, Plan, places
from holdfast.core.spec import DecoderSpec
from holdfast.kernels.cpu import structs
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.interface import BatchLayout
from holdfast.kernels.reference import ReferenceKernels
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.distributed import DistributedCollectives
from holdfast.parallel.segment import Layout, attach, create, read_tally
from holdfast.parallel.shards import tree_of
from holdfast.parallel.shared import SharedCollectives
from support.builds import builds
from support.checkpoints import random_model, run_interleaved, save

MOE = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")


class Ranks:
    """The collectives of every rank of a plan's first replica."""

    def __init__(self, model: DecoderSpec, plan: Plan, timeout: float = 30.0, max_tokens: int = 64) -> None:
        self.replica = plan.replicas[0]
        self.layout = Layout(self.replica, model, max_tokens, max_tokens)
        self.descriptor = create(self.layout.num_bytes)
        self.memories = [attach(self.descriptor, self.layout) for _ in places(self.replica)]
        self.all = [
            SharedCollectives(CpuKernels(threads=1), model, place, self.layout, memory, timeout)
            for place, memory in zip(places(self.replica), self.memories, strict=True)
        ]

    def run(self, *bodies) -> list[object]:
        """One body per rank, at once; what each returned or raised."""
        results: list[object] = [None] * len(bodies)

        def call(index: int) -> None:
            try:
                results[index] = bodies[index]()
            except CollectiveFailed as error:
                results[index] = error

        threads = [threading.Thread(target=call, args=(index,)) for index in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@contextmanager
def ranks_of(model: DecoderSpec, plan: Plan, **options: float) -> Iterator[Ranks]:
    ranks = Ranks(model, plan, **options)
    try:
        yield ranks
    finally:
        os.close(ranks.descriptor)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 70), st.integers(0, 1000))
def test_a_sum_over_ranks(degree: int, total: int, width: int, seed: int):
    """In the order of the tree, twice in a row with other numbers, for ranks that come early and late."""
    dice, total = random.Random(seed), max(total, degree)
    cuts = sorted(dice.sample(range(1, total), degree - 1))
    tree = tree_of(list(pairwise((0, *cuts, total))), total)
    torch.manual_seed(seed)
    model = spec()
    numbers = {
        (turn, rank, index): torch.randn(7, width)
        for turn in range(3)
        for rank, pieces in enumerate(tree.pieces)
        for index in range(len(pieces))
    }
    bias, residual = torch.randn(width), torch.randn(7, width)

    def expected(turn: int) -> torch.Tensor:
        sums: list[torch.Tensor] = []
        joins = iter(tree.joins)
        for rank, pieces in enumerate(tree.pieces):
            for index in range(len(pieces)):
                sums.append(numbers[turn, rank, index])
                for _ in range(next(joins)):
                    right = sums.pop()
                    sums[-1] = sums[-1] + right
        return sums[0] + bias + residual

    def body(rank: int):
        def run() -> list[torch.Tensor]:
            results = []
            for turn in range(3):
                mine = [numbers[turn, rank, index].clone() for index in range(len(tree.pieces[rank]))]
                y = residual.clone()
                results.append(ranks.all[rank].all_reduce(mine, tree, bias=bias, add_to=y))
            return results

        return run

    # room for as many pieces: the layout's is for the model's own trees
    with ranks_of(model, make_plan(model, tensor=degree), max_tokens=640) as ranks:
        for results in ranks.run(*[body(rank) for rank in range(degree)]):
            for turn, y in enumerate(results):
                assert torch.equal(y, expected(turn))


def test_bytes_are_counted():
    """One-shot: each rank reads every piece that is another's, 4 · T · M bytes each."""
    model = spec()
    with ranks_of(model, make_plan(model, tensor=4)) as ranks:
        tree = ranks.all[0].trees.mlp
        partials = [torch.zeros(5, 64) for _ in range(4)]
        ranks.run(*[lambda rank=rank: ranks.all[rank].all_reduce([partials[rank]], tree) for rank in range(4)])
        for place in places(ranks.replica):
            tally = read_tally(ranks.memories[0], ranks.layout, place.stage, place.index)
            assert tally.bytes_read == 3 * 4 * 5 * 64
            assert tally.exchanges == 1


def test_nobody_waits_for_a_rank_that_gives_up():
    """Within 0.1 s; and nothing goes on afterwards."""
    model = spec()
    with ranks_of(model, make_plan(model, tensor=3)) as ranks:
        tree = ranks.all[0].trees.mlp
        left: list[float] = []

        def wait(rank: int):
            def run() -> object:
                partials = [torch.zeros(1, 64) for _ in tree.pieces[rank]]
                try:
                    return ranks.all[rank].all_reduce(partials, tree)
                finally:
                    left.append(time.perf_counter())

            return run

        def give_up() -> float:
            time.sleep(0.3)  # the others are asleep by then, or will find the flag
            begun = time.perf_counter()
            ranks.all[2].abort()
            return begun

        *failed, begun = ranks.run(wait(0), wait(1), give_up)
        assert all(isinstance(error, CollectiveFailed) for error in failed)
        assert max(left) - begun < 0.1
        with pytest.raises(CollectiveFailed, match="gave up"):
            ranks.all[0].all_reduce([torch.zeros(1, 64)] * len(tree.pieces[0]), tree)


def test_nobody_waits_longer_than_the_deadline():
    model = spec()
    with ranks_of(model, make_plan(model, pipeline=2), timeout=0.2) as ranks:
        begun = time.perf_counter()
        with pytest.raises(CollectiveFailed, match=r"within 0\.2 s"):
            ranks.all[1].receive(3)
        assert 0.2 <= time.perf_counter() - begun < 1.0


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_rows_cross_stages(degrees: tuple[int, int]):
    """More messages than the ring has slots, with a receiver that is late; each rank sends its share of the rows."""
    model = spec(9, 3)
    with ranks_of(model, make_plan(model, tensor=degrees, pipeline=2)) as ranks:
        rows = [torch.full((1 + turn % 5, 64), float(turn)) for turn in range(20)]

        def send(rank: int):
            return lambda: [ranks.all[rank].send(x) for x in rows]

        def receive(rank: int):
            def run() -> list[torch.Tensor]:
                time.sleep(0.05)  # so that the ring is full
                return [ranks.all[rank].receive(x.shape[0]).clone() for x in rows]

            return run

        senders = [send(rank) for rank in range(degrees[0])]
        receivers = [receive(rank) for rank in range(degrees[0], sum(degrees))]
        for received in ranks.run(*senders, *receivers)[degrees[0] :]:
            assert all(torch.equal(x, y) for x, y in zip(rows, received, strict=True))


@pytest.mark.parametrize("options", [{"tensor": 3}, {"tensor": (2, 1, 3), "pipeline": 3}, {"pipeline": 2}])
def test_torch_distributed_gives_the_same_bits(options: dict[str, object], tmp_path: Path):
    """Gloo between ranks whose kernels are the CPU's, against one rank: the order of the sums is ours."""
    info = inspect_model(
        save(random_model(model_type="llama", num_key_value_heads=3, num_attention_heads=9, hidden_size=72), tmp_path)
    )
    plan, store = make_plan(info.spec, **options), dist.HashStore()
    requests, held = [[5, 6, 7, 8, 9, 10, 11], [20] * 17], []

    def run(place: Place) -> list[torch.Tensor]:
        kernels, collectives = CpuKernels(threads=1), None
        if not place.is_alone:
            collectives = DistributedCollectives(kernels, info.spec, place, torch.device("cpu"), store, 30.0)
            held.append(collectives)  # who leaves early closes what the others still read from
        decoder = load_decoder(info, kernels, torch.float32, "cpu", place=place, collectives=collectives)
        return run_interleaved(decoder, requests)

    def everywhere(plan: Plan) -> list[list[torch.Tensor]]:
        with ThreadPoolExecutor(8) as pool:
            return [logits for logits in pool.map(run, places(plan.replicas[0])) if logits]

    (alone,) = everywhere(make_plan(info.spec))
    for logits in everywhere(plan):
        assert all(torch.equal(x, y) for x, y in zip(alone, logits, strict=True))


@pytest.mark.parametrize("options", [{"tensor": 2, "expert": 2}, {"tensor": 2}, {"tensor": 4, "expert": 2}])
def test_torch_distributed_shares_out_experts(options: dict[str, int], tmp_path: Path):
    """Torch's kernels, which are close and no more; ours are in tests/parity/test_cuda_plans.py."""
    info = inspect_model(save(random_model(model_type="mixtral", **MOE), tmp_path))
    store, held = dist.HashStore(), []

    def run(place: Place) -> list[torch.Tensor]:
        kernels, collectives = ReferenceKernels(), None
        if not place.is_alone:
            collectives = DistributedCollectives(kernels, info.spec, place, torch.device("cpu"), store, 30.0)
            held.append(collectives)
        decoder = load_decoder(info, kernels, torch.float32, "cpu", place=place, collectives=collectives)
        return run_interleaved(decoder, [[5, 6, 7, 8, 9, 10, 11], [20] * 17])

    (alone,) = [run(place) for place in places(make_plan(info.spec).replicas[0])]
    ranks = places(make_plan(info.spec, **options).replicas[0])
    with ThreadPoolExecutor(len(ranks)) as pool:
        for logits in pool.map(run, ranks):
            torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_ranks_agree_on_what_all_can_do():
    """What is captured together: with an answer that differs between ranks, a step would never end."""
    store, ranks = dist.HashStore(), places(make_plan(spec(), tensor=3).replicas[0])

    def run(place: Place) -> tuple[DistributedCollectives, int, bool, bool]:
        some = DistributedCollectives(CpuKernels(threads=1), spec(), place, torch.device("cpu"), store, 30.0)
        return some, some.least(7 + place.index), some.all_say(yes=True), some.all_say(yes=place.index != 1)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, ranks))
    assert [answers for _, *answers in found] == [[7, True, False]] * 3
    assert not any(some.can_be_captured for some, *_ in found), "by Gloo"


def test_torch_distributed_ends_at_the_deadline():
    place = places(make_plan(spec(), tensor=2).replicas[0])[0]
    with pytest.raises(CollectiveFailed):
        DistributedCollectives(CpuKernels(threads=1), spec(), place, torch.device("cpu"), dist.HashStore(), 0.3)


def test_ranks_of_torch_distributed_get_a_shorter_deadline_once_they_stand():
    store, ranks = dist.HashStore(), places(make_plan(spec(), tensor=2).replicas[0])

    def run(place: Place) -> DistributedCollectives:
        some = DistributedCollectives(CpuKernels(threads=1), spec(), place, torch.device("cpu"), store, 600.0)
        assert some.least(place.index) == 0
        some.set_timeout(0.3)
        return some

    with ThreadPoolExecutor(2) as pool:
        one, _other = pool.map(run, ranks)
    begun = time.monotonic()
    with pytest.raises(CollectiveFailed):
        one.least(0)
    assert time.monotonic() - begun < 30


def test_a_step_may_take_longer_than_a_wait():
    """The deadline is that of an exchange: ranks that compute for long are not late."""
    model = spec()
    with ranks_of(model, make_plan(model, tensor=2), timeout=0.15) as ranks:
        tree = ranks.all[0].trees.mlp

        def run(rank: int):
            kernels = ranks.all[rank]._kernels
            place = structs.Pause(ns=int(0.1e9), row_ns=0)

            def body() -> object:
                def forward(token_ids: torch.Tensor, batch: BatchLayout) -> torch.Tensor:
                    for _ in range(4):
                        kernels.executor.run(place, token_ids.shape[0])
                        y = ranks.all[rank].all_reduce(
                            [kernels.executor.new(token_ids.shape[0], 64, torch.float32)], tree
                        )
                    return y

                program = kernels.record(forward, 4)
                positions, tables = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32)
                return program(positions, BatchLayout((1,), (1,), positions, positions, tables))

            return body

        assert not any(isinstance(result, CollectiveFailed) for result in ranks.run(run(0), run(1)))
