"""What collectives move and how long they take: bytes on the wire, two protocols, measured paths and drawn ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from holdfast.hardware.catalogue import catalogue, find_device, find_link
from holdfast.planner.communication import Fabric, Path, hops, imbalance, measured_paths, path_of, wire_bytes

UNKNOWN = Fabric("a device that nobody measured", find_link("nvlink4"), find_link("infiniband-ndr"))
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")


@pytest.mark.parametrize(
    ("operation", "ranks", "sent"),
    [
        ("all_reduce", 4, 1500),
        ("all_reduce", 2, 1000),
        ("all_gather", 4, 750),
        ("reduce_scatter", 8, 875),
        ("all_to_all", 2, 500),
        ("send_recv", 2, 1000),
        ("all_reduce", 1, 0),
        ("send_recv", 1, 0),
    ],
)
def test_bytes_that_a_rank_sends(operation, ranks: int, sent: float) -> None:
    """Of a message of 1000: all-reduce 2(n-1)/n, the halves of it (n-1)/n, a pair all of it."""
    assert wire_bytes(operation, ranks, 1000) == sent


@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_ranks_never_send_less_nor_hop_less(operation) -> None:
    for fewer, more in itertools.pairwise((2, 3, 4, 8, 16, 72)):
        assert wire_bytes(operation, more, 1e6) >= wire_bytes(operation, fewer, 1e6)
        assert hops(operation, more) >= hops(operation, fewer)


SIZES = [0, *(2**power for power in range(8, 34))]


@pytest.mark.parametrize("key", sorted(measured_paths()), ids=lambda key: "-".join(map(str, key)))
def test_larger_messages_never_take_less_time(key) -> None:
    """Of every measured path, but for a hundredth of a percent where the rounded corner begins and ends."""
    path = measured_paths()[key]
    times = [path.time(size) for size in SIZES]
    assert all(0 < before <= after * 1.0001 for before, after in itertools.pairwise(times))


def test_a_path_is_the_better_of_two_lines() -> None:
    path = Path(10e-6, 1e9, 20e-6, 10e9)
    assert path.time(0) == 10e-6
    assert path.time(1e6) == pytest.approx(20e-6 + 1e6 / 10e9)
    for size in (100, 5_000, 11_111, 50_000, 10**7):
        least = min(10e-6 + size / 1e9, 20e-6 + size / 10e9)
        assert 0.94 * least <= path.time(size) <= least


def test_the_protocol_changes_without_a_jump() -> None:
    """Guards against a corner whose rounding begins or ends with a step."""
    path = Path(10e-6, 1e9, 20e-6, 10e9)
    times = [path.time(size) for size in range(0, 200_000, 10)]
    slopes = [(after - before) * 1e8 for before, after in itertools.pairwise(times)]
    assert max(abs(after - before) / before for before, after in itertools.pairwise(times)) < 2e-3
    assert min(slopes) > -0.1


def test_what_was_measured_is_taken_before_what_is_drawn() -> None:
    a100 = find_device("A100-80GB")
    fabric = Fabric(a100.name, find_link("nvlink3"))
    found = path_of("nccl", fabric, 1, 4, "all_reduce")
    assert found is measured_paths()["nccl", a100.name, 1, 4, "all_reduce"]
    assert found.source == "measured"
    drawn = path_of("nccl", replace(fabric, device="another"), 1, 4, "all_reduce")
    assert drawn.source == "nvlink3"


def test_six_ranks_are_as_the_nearest_number_that_was_measured() -> None:
    a100 = find_device("A100-80GB")
    paths = [path_of("vllm", Fabric(a100.name, find_link("nvlink3")), 1, ranks, "all_reduce") for ranks in (6, 8)]
    assert paths[0] == paths[1]


def test_every_measured_device_is_in_the_catalogue() -> None:
    """Guards against a name that the fit writes and nobody can ask for."""
    assert {device for _, device, *_ in measured_paths()} <= set(catalogue().devices)


@pytest.mark.parametrize("software", ["nccl", "vllm", "vllm-eager", "trtllm", "torch"])
@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "send_recv"])
def test_drawn_paths_take_longer_with_more_ranks_and_slower_links(software, operation) -> None:
    for size in (1_000, 100_000, 10_000_000):
        times = [
            path_of(software, UNKNOWN, 1, ranks, operation).time(wire_bytes(operation, ranks, size))
            for ranks in (2, 4, 8)
        ]
        assert times == sorted(times)
        slow = replace(UNKNOWN, link=find_link("pcie3"))
        assert path_of(software, slow, 1, 8, operation).time(size) > path_of(software, UNKNOWN, 1, 8, operation).time(
            size
        )


def test_drawn_paths_cost_the_wire_when_messages_are_large() -> None:
    """No faster than the link, no slower than half of it."""
    path = path_of("nccl", UNKNOWN, 1, 8, "all_reduce")
    rate = 1e10 / path.time(1e10)
    assert 0.5 * UNKNOWN.link.bandwidth < rate < UNKNOWN.link.bandwidth


def test_what_passes_between_two_stages_crosses_the_link_once() -> None:
    wan = find_link("wan")
    assert path_of("nccl", replace(UNKNOWN, link=wan), 1, 2, "send_recv").latency_low > wan.latency


def test_what_all_to_all_sends_to_other_nodes_no_rank_of_a_node_has_in_common() -> None:
    """Half of what each rank sends goes to the other node, over its own 50 GB/s; of an all-gather an eighth of it."""
    times = [
        path_of("nccl", UNKNOWN, 2, 16, name).time(wire_bytes(name, 16, 1e9)) for name in ("all_to_all", "all_gather")
    ]
    assert times[0] > 0.5e9 / 50e9
    assert times[0] > 3 * times[1]


def test_two_nodes_take_longer_than_one_and_a_slow_network_longer_still() -> None:
    for size in (1_000, 1_000_000, 1_000_000_000):
        wire = wire_bytes("all_reduce", 16, size)
        one = path_of("nccl", UNKNOWN, 1, 8, "all_reduce").time(wire_bytes("all_reduce", 8, size))
        two = path_of("nccl", UNKNOWN, 2, 16, "all_reduce").time(wire)
        slow = path_of("nccl", replace(UNKNOWN, network=find_link("ethernet-10")), 2, 16, "all_reduce").time(wire)
        assert one < two < slow


def test_one_rank_on_each_node_has_the_network_alone() -> None:
    path = path_of("nccl", UNKNOWN, 2, 2, "all_reduce")
    assert 1e9 / path.time(1e9) == pytest.approx(0.72 * 50e9, rel=0.01)


def test_imbalance_of_experts_is_between_even_and_all_on_one() -> None:
    assert imbalance(256, 1, 1000) == imbalance(256, 8, 0) == 1
    loads = [imbalance(256, 8, routed) for routed in (8, 64, 512, 4096, 10**6)]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] <= 8
    assert loads[-1] == pytest.approx(1, abs=0.01)


def test_a_message_takes_the_latency_of_its_link_at_least() -> None:
    """Guards against a hop between datacentres that is there before the light is."""
    link = find_link("wan")
    path = path_of("nccl", Fabric("H100-80GB-SXM", link, as_usual=False), 1, 2, "send_recv")
    assert path.latency_low >= link.latency
