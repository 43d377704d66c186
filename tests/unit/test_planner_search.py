"""The search: what it finds on known clusters, that it keeps what it promises, and that it is quick."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import find_device, find_link
from holdfast.hardware.cluster import Cluster, Node, cluster_of
from holdfast.hardware.topology import parse_topology
from holdfast.planner import mixed
from holdfast.planner.candidates import Candidate, balanced, device_groups
from holdfast.planner.coefficients import coefficients
from holdfast.planner.communication import path_of, wire_bytes
from holdfast.planner.estimate import MARGIN, Question, estimate, rank_key, worth
from holdfast.planner.goal import Goal
from holdfast.planner.search import candidates, search
from holdfast.planner.shapes.load import load_shape
from holdfast.planner.shapes.shape import Attention, Layer, Matrix, ModelShape
from holdfast.planner.show.alternatives import can_be_timed
from holdfast.planner.show.explain import why
from support.data import data

LLAMA_8B, LLAMA_70B, GPT_3 = (load_shape(name) for name in ("Llama-3.1-8B", "Llama-3.1-70B", "GPT-3 175B"))


def test_every_layer_of_every_replica_is_held_once_by_devices_of_its_own() -> None:
    for text in ("8xA100-80GB", "2xH100,4xL40S", "2x8xH100", "3xRTX-4090"):
        question = Question.of(LLAMA_70B, cluster_of(text), Goal(), coefficients())
        made = list(candidates(question))
        assert made
        for candidate in made:
            places = [place for groups in candidate.replicas for group in groups for place in group.places]
            assert len(places) == len(set(places))
            assert sum(candidate.layers) == LLAMA_70B.num_layers
            assert len({tuple(group.degree for group in groups) for groups in candidate.replicas}) == 1
            assert all(len(groups) == len(candidate.layers) for groups in candidate.replicas)


def test_175b_needs_all_eight_devices_of_80_gb() -> None:
    """350 GB of weights: no replica on four devices (320 GB) unless replicas hold the weights together."""
    found = search(GPT_3, cluster_of("8xA100-80GB"), Goal(concurrency=8))
    assert found.best.candidate.name == "TP8"
    for some in found.ranking:
        whole = len(some.candidate.replicas) == 1 or some.candidate.shard_weights
        assert some.fits == whole, some.candidate.name
    # 349 GB of 16-bit weights over eight ranks
    weights = found.best.stages[0].memory.weights
    assert weights == pytest.approx(GPT_3.params * 2 / 8, rel=0.01)


def test_what_is_chosen_is_best_by_its_own_figures() -> None:
    goal = Goal(tpot=0.05, concurrency=64)
    found = search(LLAMA_70B, cluster_of("8xH100"), goal)
    keeping = [some for some in found.ranking if some.served is not None and not some.misses]
    assert keeping
    best = min(worth(goal, some) for some in keeping)
    assert worth(goal, found.best) == pytest.approx(best, rel=0.021)  # or as good, and simpler
    assert all(some.served.tpot <= 0.05 for some in keeping if some.served)
    rest = [rank_key(goal, some) for some in found.ranking[1:]]
    assert rest == sorted(rest)


@pytest.mark.parametrize("requests", [1, 3, 9, 10])
def test_requests_that_replicas_cannot_share_evenly_are_counted_once(requests: int) -> None:
    """Two replicas have five and four of nine requests: their tokens are not those of ten."""
    found = search(LLAMA_8B, cluster_of("8xH100"), Goal(concurrency=requests))
    for some in found.ranking:
        served = some.served
        assert served is not None
        cycle = served.ttft + (found.question.goal.output_len - 1) * served.tpot
        assert some.throughput * cycle / found.question.goal.output_len == pytest.approx(requests)


def test_more_room_and_more_devices_are_never_worse() -> None:
    def best(text: str) -> float:
        return search(LLAMA_8B, cluster_of(text), Goal(tpot=0.05)).best.throughput

    assert best("1xA100-80GB") < best("2xA100-80GB") < best("4xA100-80GB") < best("8xA100-80GB")
    assert best("8xA100-80GB") < best("8xH100") < best("8xH200")


def test_limits_are_kept_with_a_margin_where_that_can_be() -> None:
    """As many requests as leave the margin, not as many as are just possible; less where nothing else is left."""
    best = search(LLAMA_70B, cluster_of("8xH100"), Goal(tpot=0.03)).best
    assert best.served is not None
    assert not best.tight
    assert 0.9 < best.served.tpot * MARGIN / 0.03 <= 1
    alone = search(LLAMA_70B, cluster_of("8xH100"), Goal(objective="latency", concurrency=1)).best.served
    assert alone is not None
    narrow = search(LLAMA_70B, cluster_of("8xH100"), Goal(tpot=alone.tpot * 1.01, concurrency=1))
    assert narrow.best.tight
    assert not narrow.best.misses
    assert narrow.best.served.tpot <= alone.tpot * 1.01  # type: ignore[union-attr]
    other = next(some for some in narrow.ranking if some.misses)
    assert rank_key(narrow.question.goal, narrow.best) < rank_key(narrow.question.goal, other)


def test_why_says_when_a_plan_keeps_its_limits_too_narrowly() -> None:
    found = search(LLAMA_70B, cluster_of("8xH100"), Goal(concurrency=64))
    second = next(some for some in found.ranking[1:] if some.served is not None)
    narrow = replace(second, tight=True)
    assert f"less than {MARGIN - 1:.0%} to spare" in why(found, narrow)


def test_a_slow_link_inside_a_group_costs_what_it_should() -> None:
    """Many requests on eight PCIe devices over two sockets: all-reduces of their prompts take longer than anything
    else, so stages are cut by layers."""
    found = search(LLAMA_70B, cluster_of("8xL40S"), Goal(concurrency=64))
    assert max(found.best.candidate.degrees) <= 2
    assert len(found.best.candidate.layers) > 1
    tp8 = next(some for some in found.ranking if some.candidate.name == "TP8")
    assert tp8.served is not None
    assert tp8.served.ttft > 3 * found.best.served.ttft  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("gpus", "model", "goal"),
    [
        ("4xA100-40GB-SXM,4xA100-80GB-SXM", "Llama-3.1-70B", Goal(input_len=4096, output_len=512)),
        ("2xH100,4xL40S", "Llama-3.1-70B", Goal()),
        ("RTX 5090,RTX 3090 Ti", "Qwen3-32B", Goal(weight_bits=8)),
    ],
)
def test_mixed_devices_get_unequal_plans_that_beat_the_best_even_one(gpus: str, model: str, goal: Goal) -> None:
    found = search(load_shape(model), cluster_of(gpus), goal)
    assert found.best.fits
    assert not found.best.candidate.is_even
    assert found.best_even is None or found.best.throughput > found.best_even.throughput
    for stage in found.best.stages:
        assert stage.memory.without_kv < stage.device_bytes
        assert stage.kv_room > 0
    # no group mixes kinds of devices
    assert {group.device.name for groups in found.best.candidate.replicas for group in groups} == {
        device.name for device in cluster_of(gpus).devices
    }


def test_groups_for_tensor_parallelism_stay_in_islands() -> None:
    """Devices 0, 2 and 1, 3 are bridged: groups of two are these, not consecutive ones."""
    text = """
        GPU0 GPU1 GPU2 GPU3
GPU0    X    SYS  NV12 SYS
GPU1    SYS  X    SYS  NV12
GPU2    NV12 SYS  X    SYS
GPU3    SYS  NV12 SYS  X
"""
    device = find_device("A100-80GB-PCIe-NVLink")
    node = Node("bridged", (device,) * 4, parse_topology(text))
    cluster = Cluster((node,), find_link("wan"))
    groups = device_groups(cluster, device, 2)
    assert sorted(tuple(index for _, index in group.places) for group in groups) == [(0, 2), (1, 3)]
    assert all(group.link.kind == "nvlink" for group in groups)
    assert device_groups(cluster, device, 4)[0].link.kind != "nvlink"


def test_no_group_reaches_over_sites() -> None:
    one, two = (replace(node, site=site) for node, site in zip(cluster_of("2x8xH100").nodes, "ab", strict=True))
    apart = Cluster((one, two), find_link("wan"))
    device = find_device("H100")
    assert device_groups(apart, device, 16) == []
    assert len(device_groups(cluster_of("2x8xH100"), device, 16)) == 1
    found = search(LLAMA_70B, apart, Goal(concurrency=32, tpot=0.05))
    assert all(len({node for node, _ in group.places}) == 1 for group in found.best.candidate.stages)
    assert len(found.best.candidate.replicas) > 1


def test_devices_of_a_node_share_its_network_cards() -> None:
    """Two nodes of eight: with a card each 50 GB/s a device, with one card between them an eighth of it; half of the
    bytes, reduced within the node first, must cross it twice."""
    usual = cluster_of("2x8xH100")
    one_card = replace(usual, nodes=tuple(replace(node, nics=1) for node in usual.nodes))
    device, sent = find_device("H100"), wire_bytes("all_reduce", 16, 1e9)
    rates, times = [], []
    for cluster in (usual, one_card):
        (group,) = device_groups(cluster, device, 16)
        assert group.network is not None
        rates.append(group.network.bandwidth)
        times.append(path_of("nccl", group.fabric, group.nodes, 16, "all_reduce").time(sent))
    assert rates == [50e9, 50e9 / 8]
    assert times[1] > 1e9 * 2 * (1 / 2) / 50e9 > times[0]


def test_sharded_weights_take_less_memory_and_more_time() -> None:
    question = Question.of(LLAMA_70B, cluster_of("8xA100-80GB"), Goal(concurrency=16), coefficients())
    pairs = {}
    for candidate in candidates(question):
        if candidate.degrees == (4,):
            pairs[candidate.shard_weights] = estimate(question, candidate)
    assert pairs[True].memory_used < pairs[False].memory_used
    assert pairs[True].throughput < pairs[False].throughput


def test_spare_is_what_the_replica_does_without_a_rank() -> None:
    """Seven of eight hold 70B, but one of them has two of eight KV heads, so they do half of what eight do while
    weights take most of the time; a pipeline moves layers instead. Seven of eight do not hold 175B with requests; of
    two replicas one is left, and part of the other."""
    found = search(LLAMA_70B, cluster_of("8xH100"), Goal(concurrency=32))
    by_name = {some.candidate.name: some for some in found.ranking}
    assert 0.5 < by_name["TP8"].spare < 0.7
    assert 0.5 < by_name["TP4 × DP2"].spare < 1
    assert by_name["TP4 × DP2 × sharded weights"].spare == 0.5  # a place that all replicas need
    assert 0.7 < by_name["TP2 × PP4"].spare < 1
    full = search(GPT_3, cluster_of("5xA100-80GB"), Goal(concurrency=1)).best
    assert full.candidate.num_devices == 5
    assert full.spare == 0


@pytest.mark.parametrize("gpus", ["1xH100", "2xH100"])
def test_where_no_plan_has_anything_to_spare_one_is_chosen_all_the_same(gpus: str) -> None:
    """70 B in 8 bits on one device; on two a replica on each is what has."""
    found = search(LLAMA_70B, cluster_of(gpus), Goal(objective="spare", weight_bits=8, concurrency=2))
    assert (found.best.spare > 0) == (gpus == "2xH100")
    assert all(why(found, some) for some in found.ranking[1:])


def test_the_unknown_and_the_impossible_are_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"context 999999: .* knows 131072 tokens at most"):
        search(LLAMA_8B, cluster_of("8xH100"), Goal(context=999_999))
    with pytest.raises(ConfigError, match="engine 'none': must be one of"):
        search(LLAMA_8B, cluster_of("8xH100"), Goal(engine="none"))
    with pytest.raises(ConfigError, match="tpot -1: must be above 0"):
        Goal(tpot=-1)
    too_large = search(GPT_3, cluster_of("2xT4"), Goal())
    assert too_large.best.served is None
    assert not too_large.best.fits
    too_fast = search(LLAMA_70B, cluster_of("8xH100"), Goal(tpot=0.0001, concurrency=1))
    assert too_fast.best.misses
    assert "TPOT" in too_fast.best.misses[0]


def test_a_plan_for_eight_devices_takes_a_second_at_most_and_for_a_thousand_or_seven_kinds_ten() -> None:
    """CPU seconds of this process, so that what else runs does not matter."""
    seven = ",".join(f"2x{gpu}" for gpu in ("H100", "A100-80GB", "L40S", "V100-32GB", "L4", "T4", "H200"))
    for text, limit in (("8xH100", 1.0), ("128x8xH100", 10.0), (seven, 10.0)):
        begin = time.process_time()
        search(LLAMA_70B, cluster_of(text), Goal(tpot=0.05))
        assert time.process_time() - begin < limit


@pytest.mark.parametrize(
    ("gpus", "goal"),
    [
        ("2xH100,2xA100-80GB,2xL40S,2xV100-32GB,2xL4,2xT4,2xH200", Goal(concurrency=16)),
        ("4xH100,4xA100-80GB,4xL40S", Goal()),
        ("4xH100,4xV100-32GB,8xL4", Goal(objective="memory")),
        ("4xH100,4xA100-80GB,4xL40S", Goal(objective="latency", concurrency=4)),
        ("4xH100,4xA100-80GB,4xL40S,4xL4", Goal(ttft=0.5)),
    ],
)
def test_what_promises_most_has_the_best_plan_in_it(gpus: str, goal: Goal, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pipelines through several kinds judged, against a third of those that would be."""
    question = Question.of(LLAMA_70B, cluster_of(gpus), goal, coefficients())

    def best(most: int) -> tuple[int, tuple[object, ...]]:
        monkeypatch.setattr(mixed, "MOST_JUDGED", most)
        made = [some for some in candidates(question) if len({group.device for group in some.stages}) > 1]
        return len(made), min(rank_key(goal, estimate(question, some)) for some in made)

    third = mixed.MOST_JUDGED // 3
    (everyone, wanted), (few, found) = best(10**9), best(third)
    assert few < everyone
    assert found == wanted


def test_a_model_that_caches_no_tokens_is_laid_over_several_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against endless room for tokens taken for a number. 193 GB of weights need both kinds."""
    monkeypatch.setattr(mixed, "MOST_JUDGED", 1)
    attention = Attention("linear", 64, 8, 128, 64, state_numbers=64 * 64 * 128)
    layer = Layer(attention, (Matrix("in", 8192, 65536, "column"), Matrix("out", 65536, 8192, "row")))
    shape = ModelShape("states", 8192, 32000, (layer,) * 90, True, 8192 * 32000, 0, 1 << 17)
    best = search(shape, cluster_of("2xH100,4xL40S"), Goal()).best
    assert best.fits
    assert len({group.device for group in best.candidate.stages}) == 2


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=3),
)
def test_layers_are_balanced_exactly(num_layers: int, stages: list[tuple[int, int, int]]) -> None:
    seconds, fixed, most = ([float(row[i]) for row in stages] for i in range(3))
    rooms = [int(room) for room in most]
    layers = balanced(num_layers, seconds, fixed, rooms)
    if sum(rooms) < num_layers or len(rooms) > num_layers:
        assert layers is None
        return
    assert layers is not None
    assert sum(layers) == num_layers
    assert all(1 <= count <= room for count, room in zip(layers, rooms, strict=True))

    def slowest(some: tuple[int, ...]) -> float:
        return max(f + s * count for f, s, count in zip(fixed, seconds, some, strict=True))

    best = min(slowest(some) for some in _all(num_layers, rooms))
    assert slowest(tuple(layers)) == pytest.approx(best)


def _all(num_layers: int, rooms: list[int]) -> list[tuple[int, ...]]:
    if len(rooms) == 1:
        return [(num_layers,)] if 1 <= num_layers <= rooms[0] else []
    return [
        (first, *rest)
        for first in range(1, min(rooms[0], num_layers) + 1)
        for rest in _all(num_layers - first, rooms[1:])
    ]


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("01_hgx_a100_8x_nvswitch_1nic", "A100-80GB-SXM"),
        ("08_dgx1_v100_hybrid_cube_mesh_4nic_indented", "V100-16GB-SXM"),
        ("07_l40s_4x_pcie_two_sockets", "L40S"),
    ],
)
def test_real_topologies_keep_tensor_parallelism_on_fast_links(name: str, gpu: str) -> None:
    topology = parse_topology(data(f"topo/{name}.txt").read_text())
    device = find_device(gpu)
    cluster = Cluster((Node(name, (device,) * len(topology.devices), topology),), find_link("wan"))
    for degree in (2, 4):
        groups = device_groups(cluster, device, degree)
        assert groups
        if device.scale_up is not None:
            assert all(group.link.kind == "nvlink" for group in groups), degree


def test_candidates_are_named_as_people_write_them() -> None:
    groups = device_groups(cluster_of("8xH100"), find_device("H100"), 2)
    assert Candidate(((groups[0],), (groups[1],)), (80,)).name == "TP2 × DP2"
    assert Candidate(((groups[0], groups[1]),), (50, 30)).name == "TP2 × PP2 × layers 50+30"
    assert Candidate(((groups[0],),), (80,), expert_parallel=True).name == "TP2 × EP2"
    assert all(a.places < b.places for a, b in pairwise(groups))


def test_whole_nodes_of_unlike_sizes_make_groups_of_the_largest_alone() -> None:
    """Guards against a group that counts on more devices than one of its nodes has."""
    nodes = cluster_of("1x5xV100,4x4xV100,2x5xV100").nodes
    device = nodes[0].devices[0]
    groups = device_groups(Cluster(nodes, find_link("wan")), device, 10)
    assert [sorted({node for node, _ in group.places}) for group in groups] == [[0, 5]]
    assert all(len(set(group.places)) == 10 for group in groups)


def test_groups_of_nodes_that_are_built_alike_are_told_apart() -> None:
    cluster = cluster_of("3x4xH100,1x2xH100")
    groups = device_groups(cluster, cluster.devices[0], 2)
    places = [place for group in groups for place in group.places]
    assert sorted(places) == sorted(cluster.places)


def test_what_is_worth_nothing_does_not_stop_the_search() -> None:
    """Guards against a division by the best's worth: a lone rank leaves nothing when it is lost, and nodes may be
    free."""
    assert search(LLAMA_8B, cluster_of("1xH100"), Goal(objective="spare")).best.spare == 0
    free = cluster_of("8xH100")
    free = replace(free, nodes=tuple(replace(node, price_per_hour=0.0) for node in free.nodes))
    assert search(LLAMA_8B, free, Goal(objective="cost")).best.cost == 0


def test_more_kinds_than_one_node_holds_stand_in_nodes_of_their_own() -> None:
    assert [len(node.devices) for node in cluster_of("16xH100,2xL40S").nodes] == [2, 8, 8]
    assert [len(node.devices) for node in cluster_of("4xH100,8xL40S").nodes] == [12]
    with pytest.raises(ConfigError, match="73 GPUs in one node: the largest machines have 72"):
        cluster_of("1x73xH100")


def test_no_more_ranks_hold_whole_experts_than_there_are_experts() -> None:
    mixtral = load_shape("Mixtral-8x7B")
    question = Question.of(mixtral, cluster_of("2x8xH100"), Goal(), coefficients())
    whole = [max(some.degrees) for some in candidates(question) if some.expert_parallel]
    assert whole
    assert max(whole) == 8


def test_what_would_help_is_searched_only_where_that_is_quick() -> None:
    """Guards against many searches over larger and larger clusters of several kinds, for one sentence."""
    assert can_be_timed(cluster_of("256xH100"))
    assert not can_be_timed(cluster_of("257xH100"))
    assert can_be_timed(cluster_of("8xH100,8xL40S"))
    assert not can_be_timed(cluster_of("32xH100,8xL40S"))
