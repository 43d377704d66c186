"""Groups for tensor parallelism stay on the fast links of a machine, and a bad order of its devices is named."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import ConfigError
from holdfast.hardware import islands as rooms
from holdfast.hardware.islands import bad_orders, good_order, group_of, groups_of, islands, slow_edges
from holdfast.hardware.topology import Path, Topology, drawn, parse_topology, uniform
from support.data import data
from support.topologies import NVSWITCH, cube_mesh, sockets


def members(topology: Topology, size: int) -> list[tuple[int, ...]]:
    return [group.devices for group in groups_of(topology, size)]


def test_behind_a_switch_all_are_one_island() -> None:
    assert islands(NVSWITCH) == (tuple(range(8)),)
    assert slow_edges(NVSWITCH) == ()
    assert members(NVSWITCH, 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert bad_orders(NVSWITCH, (0, 5, 2, 7, 1, 3, 4, 6)) == ()


def test_a_cube_mesh_is_two_quads_and_pairs_take_the_double_links() -> None:
    mesh = cube_mesh()
    assert islands(mesh) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert len(slow_edges(mesh)) == 12
    assert members(mesh, 2) == [(0, 3), (1, 2), (4, 7), (5, 6)]
    assert {str(group.worst) for group in groups_of(mesh, 2)} == {"NV2"}
    assert members(mesh, 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    [whole] = groups_of(mesh, 8)
    assert str(whole.worst) == "SYS"  # some pairs are not joined,
    assert str(whole.ring) == "NV2"  # but a ring through all need not use them
    assert good_order(mesh) == (0, 3, 1, 2, 4, 7, 5, 6)
    [pairs] = bad_orders(mesh, range(8))
    assert (pairs.size, [group.devices for group in pairs.slow]) == (2, [(0, 1), (4, 5)])


def test_cards_of_two_sockets_that_are_numbered_by_turns() -> None:
    """Even cards on one socket, odd ones on the other: every consecutive pair would cross."""
    turns = sockets((0, 2, 4, 6), (1, 3, 5, 7))
    assert islands(turns) == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert members(turns, 4) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert [order.size for order in bad_orders(turns, range(8))] == [2, 4]
    assert good_order(turns) == (0, 2, 4, 6, 1, 3, 5, 7)
    assert bad_orders(turns, good_order(turns)) == ()
    assert bad_orders(turns, (0, 2)) == ()  # only these are visible
    [crossing] = bad_orders(turns, (1, 2, 3, 4))
    assert [group.devices for group in crossing.slow] == [(1, 2), (3, 4)]


def test_an_island_that_does_not_divide_costs_one_group_only() -> None:
    uneven = sockets((0, 1, 2, 3, 4, 5), (6, 7))
    assert sorted(str(group.worst) for group in groups_of(uneven, 4)) == ["PHB", "SYS"]
    assert bad_orders(uneven, range(8)) == ()  # it cannot be avoided
    assert members(uneven, 5) == [(0, 1, 2, 3, 4)]


def test_bridged_pairs() -> None:
    bridged = drawn(4, {(0, 2): Path("NV", 12), (1, 3): Path("NV", 12)}, Path("NODE"))
    assert islands(bridged) == ((0, 2), (1, 3))
    assert members(bridged, 2) == [(0, 2), (1, 3)]
    assert good_order(bridged) == (0, 2, 1, 3)


def test_where_all_pairs_are_alike_any_order_is_good() -> None:
    alike = uniform(8, Path("SYS"))
    assert islands(alike) == tuple((i,) for i in range(8))
    assert slow_edges(alike) == ()
    assert bad_orders(alike, (7, 0, 6, 1, 5, 2, 4, 3)) == ()
    assert islands(uniform(1, Path("SYS"))) == ((0,),)


def test_types_are_mixed_only_where_they_must_be() -> None:
    labels = ["a", "b", "a", "b"]
    assert [group.devices for group in groups_of(uniform(4, Path("PHB")), 2, labels)] == [(0, 2), (1, 3)]


def test_impossible_groups_and_orders_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"group of 9 devices is impossible: the machine has 8"):
        groups_of(NVSWITCH, 9)
    with pytest.raises(ConfigError, match=r"device 8 is not there: the devices are 0 to 7"):
        bad_orders(NVSWITCH, (0, 8))
    with pytest.raises(ConfigError, match=r"appears twice in the order 0,1,0"):
        bad_orders(NVSWITCH, (0, 1, 0))


@st.composite
def graphs(draw: st.DrawFn, most: int) -> Topology:
    count = draw(st.integers(2, most))
    kinds = st.sampled_from([Path("NV", 2), Path("NV", 1), Path("PHB"), Path("SYS")])
    pairs = {pair: draw(kinds) for pair in combinations(range(count), 2)}
    return drawn(count, pairs, Path("SYS"))


@settings(max_examples=40, deadline=None)
@given(graphs(7), st.data())
def test_no_other_partition_has_a_faster_slowest_group(graph: Topology, draws: st.DataObject) -> None:
    count = len(graph.devices)
    size = draws.draw(st.integers(2, count))
    order = draws.draw(st.permutations(range(count)))
    tried = [order[at : at + size] for at in range(0, count - size + 1, size)]
    best = groups_of(graph, size)
    grouped = [device for group in best for device in group.devices]
    assert len(set(grouped)) == len(grouped) == count - count % size
    assert sorted(g.worst.speed for g in best) >= sorted(group_of(graph, devices).worst.speed for devices in tried)


@settings(max_examples=40, deadline=None)
@given(graphs(7))
def test_islands_are_cliques_of_the_fast_kind_and_cover_all(graph: Topology) -> None:
    found = islands(graph)
    assert sorted(device for island in found for device in island) == list(range(len(graph.devices)))
    slow = {(i, j) for i, j, _ in slow_edges(graph)}
    assert all(pair not in slow for island in found for pair in combinations(island, 2))


def test_many_devices_are_grouped_without_trying_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen cards numbered by turns on two sockets: 2.6 million partitions into fours."""
    turns = sockets(tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
    for size in (2, 4, 8):
        assert all(str(group.worst) == "PHB" for group in groups_of(turns, size))
    exact = groups_of(cube_mesh(), 2)
    monkeypatch.setattr(rooms, "EXACT_DEVICES", 4)
    assert groups_of(cube_mesh(), 2) == exact


def test_in_all_real_machines_groups_stay_inside_an_island_that_fits() -> None:
    for file in sorted(data("topo").glob("*.txt")):
        topology = parse_topology(file.read_text())
        found = islands(topology)
        slow = {(i, j) for i, j, _ in slow_edges(topology)}
        for size in (2, 4, 8):
            if size > len(topology.devices):
                continue
            fits = sum(len(island) // size for island in found)
            clean = [g for g in groups_of(topology, size) if not slow & set(combinations(g.devices, 2))]
            assert len(clean) >= min(fits, len(topology.devices) // size), (file.name, size)
