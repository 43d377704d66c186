"""Who owns what: shards, the tree of their sums, and what a plan must be."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import ConfigError
from holdfast.core.plan import Plan, Range, places
from holdfast.core.spec import DecoderSpec, LayerSpec, MoeSpec
from holdfast.models.parameters import packings, packings_at, weight_bytes
from holdfast.parallel.cuts import check_plan, make_plan, max_degree, replan, split
from holdfast.parallel.segment import PAGE, Layout
from holdfast.parallel.shards import head_shards, num_mlp_shards, tree_of


def spec(heads: int = 8, kv_heads: int = 8, layers: int = 6, mlp: int = 512, experts: int = 0) -> DecoderSpec:
    moe = MoeSpec(num_experts=experts, experts_per_token=2, expert_mlp_size=256) if experts else None
    return DecoderSpec(
        family="llama",
        vocab_size=1000,
        hidden_size=64,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        mlp_size=mlp,
        max_positions=512,
        layers=tuple(LayerSpec(moe=bool(experts)) for _ in range(layers)),
        attention_scale=0.25,
        moe=moe,
    )


def by_counter(total: int) -> str:
    """The tree that a rank with all shards makes: after shard s, equal subtrees join while s ends in ones."""
    levels: list[str] = []
    for shard in range(total):
        levels.append(str(shard))
        bits = shard
        while len(levels) > 1 and (shard + 1 == total or bits & 1):
            right = levels.pop()
            levels[-1] = f"({levels[-1]}+{right})"
            bits >>= 1
    return levels[0]


def by_ranks(ranges: list[Range], total: int) -> str:
    """The same, each piece summed by its rank, and joined as `Tree` says."""
    tree = tree_of(ranges, total)
    sums: list[str] = []
    pieces = [piece for some in tree.pieces for piece in some]
    for (first, last), joins in zip(pieces, tree.joins, strict=True):
        sums.append(_shifted(by_counter(last - first), first))
        for _ in range(joins):
            right = sums.pop()
            sums[-1] = f"({sums[-1]}+{right})"
    (result,) = sums
    return result


def _shifted(text: str, by: int) -> str:
    return re.sub(r"\d+", lambda number: str(int(number[0]) + by), text)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n)))))
def test_ranks_add_in_the_order_of_one(case: tuple[int, set[int]]):
    total, cuts = case
    borders = sorted({0, total} | cuts)
    ranges = list(pairwise(borders))
    assert by_ranks(ranges, total) == by_counter(total)


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_even_degrees_pay_nothing(degree: int):
    tree = tree_of(split(8, [1] * degree), 8)
    assert [len(pieces) for pieces in tree.pieces] == [1] * degree


@given(st.integers(0, 100), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_a_split_is_complete_and_fair(count: int, weights: list[int]):
    parts = split(count, weights)
    assert parts[0][0] == 0
    assert parts[-1][1] == count
    sizes = [last - first for first, last in parts]
    assert all(one[1] == other[0] for one, other in pairwise(parts))
    if count >= len(weights):
        assert min(sizes) >= 1
    if len(set(weights)) == 1:
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == max(sizes)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "count"),
    [(9, 3, 9), (8, 8, 8), (32, 8, 8), (71, 1, 8), (14, 2, 8), (96, 96, 96), (1, 1, 1)],
)
def test_few_kv_heads_are_cut_further(heads: int, kv_heads: int, count: int):
    ends = head_shards(spec(heads, kv_heads))
    assert len(ends) == count
    assert ends[-1] == heads
    assert {heads // kv_heads * (group + 1) for group in range(kv_heads)} <= set(ends)


@settings(deadline=None)
@given(
    st.sampled_from([(9, 3), (8, 8), (8, 2), (32, 8), (71, 1), (16, 1), (12, 12)]),
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
    st.sampled_from([0, 16]),
)
def test_every_plan_that_is_made_holds_everything_once(heads: tuple[int, int], degrees: list[int], experts: int):
    """Every matrix, and no more than once but for shared KV heads."""
    model = spec(*heads, experts=experts)
    degrees = [min(degree, max_degree(model)) for degree in degrees]
    plan = make_plan(model, tensor=degrees, pipeline=len(degrees))
    held: dict[str, int] = {}
    for place in places(plan.replicas[0]):
        for name, packing in packings_at(model, place).items():
            rows = packing.rows or (None,)
            assert all(row is None or row[0] < row[1] for row in rows)
            held[name] = held.get(name, 0) + 1
    assert set(packings(model)) <= set(held) | {"head"}
    decoded = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    assert decoded == plan


def test_weights_are_the_arithmetic_of_the_shards():
    """Two ranks of three KV heads: 6 and 3 of the 9 query heads, 4 of 8 MLP shards each."""
    model = spec(9, 3)
    for place, heads, kv_heads in zip(places(make_plan(model, tensor=2).replicas[0]), (6, 3), (2, 1), strict=True):
        packs = packings_at(model, place)
        qkv = packs["layers.0.attn.qkv"].rows
        assert [last - first for first, last in qkv if first is not None] == [
            heads * 16,
            kv_heads * 16,
            kv_heads * 16,
        ]
        up = packs["layers.0.mlp.up"].rows
        assert [last - first for first, last in up] == [256, 256]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tensor": 9}, "--tensor-parallel-size 9"),
        ({"pipeline": 7}, "--pipeline-parallel-size 7: the model has 6 layers"),
        ({"pipeline": 2, "layers": (6, 0)}, "--pipeline-layers 6,0"),
        ({"expert": 2}, "the model has no experts"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        make_plan(spec(), **options)


def test_experts_too_small_to_be_cut_are_shared_out():
    small = msgspec.structs.replace(
        spec(experts=16), moe=MoeSpec(num_experts=16, experts_per_token=2, expert_mlp_size=32)
    )
    shards = make_plan(small, tensor=4).replicas[0].stages[0].ranks
    assert [shard.experts for shard in shards] == [tuple(range(at, at + 4)) for at in (0, 4, 8, 12)]


@pytest.mark.parametrize(
    ("experts", "complaint"),
    [
        (tuple(range(8, 15)), "each of 16 must be in one group"),
        ((), "rank 1: has no experts"),
        (tuple(range(15, 7, -1)), "not in ascending order"),
    ],
)
def test_a_plan_that_lacks_experts_is_refused(experts: tuple[int, ...], complaint: str):
    model = spec(experts=16)
    plan = make_plan(model, tensor=2, expert=2)
    stage = plan.replicas[0].stages[0]
    ranks = (stage.ranks[0], msgspec.structs.replace(stage.ranks[1], experts=experts))
    broken = msgspec.structs.replace(stage, ranks=ranks)
    replica = msgspec.structs.replace(plan.replicas[0], stages=(broken,))
    with pytest.raises(ConfigError, match=complaint):
        check_plan(msgspec.structs.replace(plan, replicas=(replica,)), model, "p")


def test_nothing_shares_a_byte():
    """In the memory of a replica."""
    model = spec(9, 3, experts=16)
    replica = make_plan(model, tensor=(2, 1, 3), pipeline=3).replicas[0]
    layout = Layout(replica, model, 128, 64)
    spans = [(0, PAGE)]
    for place in places(replica):
        at = (place.stage, place.index)
        spans += [(start, start + 64) for start in (layout.met_at(*at), layout.sent_at(*at), layout.taken_at(*at))]
        spans += [(layout.tally_at(*at), layout.tally_at(*at) + 64)]
        start = layout.rank_slots_at(*at)
        spans += [(start, start + 2 * layout.slot_bytes[place.stage])]
    spans += [(start, start + layout.depth * layout.ring_slot_bytes) for start in layout.ring_at]
    spans.sort()
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert spans[-1][1] == layout.num_bytes
    assert num_mlp_shards(model) == 8


@settings(deadline=None)
@given(
    st.sampled_from([(9, 3), (8, 8), (8, 2), (16, 1)]),
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
    st.sampled_from([0, 16]),
)
def test_shares_of_the_weights_sum_to_all(heads: tuple[int, int], degrees: list[int], experts: int):
    """To the byte: all of the matrices, but that KV heads which several ranks hold count for each, and the router and
    norms for every rank of the stage."""
    model = spec(*heads, experts=experts)
    degrees = [min(degree, max_degree(model)) for degree in degrees]
    plan = make_plan(model, tensor=degrees, pipeline=len(degrees))
    whole = weight_bytes(model, 2, places(make_plan(model).replicas[0])[0])
    together = sum(weight_bytes(model, 2, place) for place in places(plan.replicas[0]))
    expected, hidden = whole, model.hidden_size
    for stage in plan.replicas[0].stages:
        layers = stage.layers[1] - stage.layers[0]
        shared = sum(last - first for first, last in (rank.kv_heads for rank in stage.ranks)) - model.num_kv_heads
        others = len(stage.ranks) - 1
        expected += layers * (shared * 2 * model.head_dim * hidden * 2 + others * 2 * hidden * 4)
        expected += layers * others * experts * hidden * 2  # routers
    expected += (len(plan.replicas[0].stages[-1].ranks) - 1) * hidden * 4  # the final norm
    assert together == expected


@pytest.mark.parametrize(
    ("shape", "degrees"),
    [
        ({}, {"tensor": 8}),
        ({"heads": 9, "kv_heads": 3}, {"tensor": 4, "pipeline": 2}),
        ({"layers": 7}, {"tensor": [3, 1, 2], "pipeline": 3}),
        ({"experts": 8}, {"tensor": 4, "expert": 4}),
        ({"experts": 8}, {"tensor": 4, "expert": 2, "pipeline": 2}),
        ({"experts": 3}, {"tensor": 3, "expert": 3}),
    ],
)
def test_a_replica_can_lose_any_rank_until_the_last(shape: dict[str, int], degrees: dict[str, object]):
    """What is left is a plan that holds all of the model, with a rank less; the stages that were not hit are as they
    were."""
    model, dice = spec(**shape), random.Random(1)
    replica = make_plan(model, **degrees).replicas[0]
    for left in range(replica.num_ranks - 1, 0, -1):
        lost = dice.choice(places(replica))
        smaller = replan(model, lost)
        assert smaller is not None
        assert smaller.num_ranks == left
        check_plan(Plan((smaller,)), model, "what is left")
        if len(lost.ranks) > 1:
            others = [stage.layers for stage in replica.stages]
            assert [stage.layers for stage in smaller.stages] == others
        replica = smaller
    assert replan(model, places(replica)[0]) is None
