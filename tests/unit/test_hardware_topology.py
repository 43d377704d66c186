"""The table of `nvidia-smi topo -m` comes back as the graph it was printed from, whatever happened to its blanks."""

from __future__ import annotations

import contextlib
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import find_device
from holdfast.hardware.topology import SELF, Path, Topology, link_of, parse_topology
from support.data import data
from support.topologies import NVSWITCH, cube_mesh, printed, sockets

PATHS = st.one_of(
    st.builds(Path, st.just("NV"), st.integers(1, 18)),
    st.sampled_from([Path(kind) for kind in ("PIX", "PXB", "PHB", "NODE", "SYS")]),
)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    devices, nics = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    count = devices + nics
    rows = [[SELF] * count for _ in range(count)]
    for i, j in combinations(range(count), 2):
        rows[i][j] = rows[j][i] = draw(PATHS)
    names = tuple(f"GPU{i}" for i in range(devices))
    numa = draw(st.lists(st.sampled_from(["", "0", "1", "0,3-9"]), min_size=devices, max_size=devices))
    return Topology(names, tuple(f"mlx5_{i}" for i in range(nics)), tuple(map(tuple, rows)), tuple(numa))


@given(topologies(), st.data())
def test_what_is_printed_is_read_back(topology: Topology, draws: st.DataObject) -> None:
    """Tabs, any number of blanks, indents, empty lines, colours, prompts around it, lines ending in CR."""
    lines = printed(topology).splitlines()
    mangled = []
    for line in lines:
        indent = draws.draw(st.sampled_from(["", "    ", "\t"]))
        gap = draws.draw(st.sampled_from(["\t", "  ", "        ", " \t "]))
        coloured = line.startswith("\t") and draws.draw(st.booleans())
        text = gap.join(f"\x1b[4m{word}\x1b[0m" if coloured else word for word in line.split("\t"))
        mangled.append(indent + text + draws.draw(st.sampled_from(["", "  ", "\r"])))
        mangled += draws.draw(st.sampled_from([[], [], [""]]))
    text = "\n".join(["$ nvidia-smi topo -m", *mangled, "$"])
    assert parse_topology(text) == topology


@given(topologies(), st.data())
def test_rows_that_are_cut_short_are_completed_from_the_other_side(topology: Topology, draws: st.DataObject) -> None:
    lines = printed(topology, gap=" ").splitlines()
    for i in range(len(topology.paths)):
        kept = draws.draw(st.integers(i + 1, len(topology.paths)))  # the lower triangle stays whole
        lines[1 + i] = " ".join(lines[1 + i].split()[: 1 + kept])
    assert parse_topology("\n".join(lines)).paths == topology.paths


@given(st.text(alphabet="GPU01NIC XSYV2\t\n", max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but a topology or a ConfigError comes of it."""
    with contextlib.suppress(ConfigError):
        assert parse_topology(text).devices


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not what `nvidia-smi topo -m` prints: no line begins with the columns"),
        ("GPU 0: NVIDIA H100 (UUID: GPU-1)", "no line begins with the columns"),
        ("GPU0 GPU1", "it has a header and no row"),
        ("GPU0 GPU1\nGPU0 X", "ends before it says what is between GPU0 and GPU1"),
        ("GPU0 GPU1\nGPU0 X FOO", "between GPU0 and GPU1 stands 'FOO'"),
        ("GPU0 GPU1\nGPU0 X NV4\nGPU1 NV2 X", "GPU0 to GPU1 is NV4, but the other way it is NV2"),
        ("GPU0 GPU1\nGPU0 X X", "are two devices, but between them stands X"),
        ("GPU0 GPU1\nGPU0 NV4 X", "GPU0 has NV4 to itself"),
        ("GPU0 GPU0\nGPU0 X NV4", "a column appears twice"),
        ("GPU0 NIC0 GPU1\nGPU0 X SYS NV4", "network cards stand between devices"),
    ],
)
def test_what_is_no_table_is_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_topology(text, "notes.txt")
    assert str(refused.value).startswith("notes.txt: ")
    assert said in str(refused.value)


def test_network_cards_have_the_names_of_the_legend() -> None:
    text = "GPU0 NIC0 CPU Affinity\nGPU0 X PIX 0-7\nNIC0 PIX X\n\nNIC Legend:\n\n  NIC0: mlx5_2\n"
    topology = parse_topology(text)
    assert topology.nics == ("mlx5_2",)
    assert topology.numa == ("0-7",)


def test_a_switch_is_told_from_a_mesh() -> None:
    assert NVSWITCH.switched
    assert not cube_mesh().switched
    assert not sockets((0, 1), (2, 3)).switched


def test_a_path_has_the_bandwidth_of_the_device() -> None:
    assert link_of(Path("NV", 2), find_device("V100")).bandwidth == pytest.approx(50e9)
    assert link_of(Path("NV", 18), find_device("H100")).bandwidth == pytest.approx(450e9)
    assert link_of(Path("NV", 4), find_device("RTX 3090")).bandwidth == pytest.approx(56.25e9)
    near, far = (link_of(Path(kind), find_device("L40S")) for kind in ("PHB", "SYS"))
    assert near.bandwidth == pytest.approx(31.5e9, rel=1e-3)
    assert (far.bandwidth, far.kind) == (16e9, "socket")
    assert far.latency > near.latency
    # GeForce cards may not read each other: what passes between them goes by way of host memory.
    assert link_of(Path("PHB"), find_device("RTX 4090")).latency == 2 * near.latency
    with pytest.raises(ConfigError, match=r"shows NV18 between devices, but A100-80GB-SXM has 12 NVLinks"):
        link_of(Path("NV", 18), find_device("A100"))
    with pytest.raises(ConfigError, match=r"L40S has no NVLink"):
        link_of(Path("NV", 4), find_device("L40S"))


def test_all_real_tables_are_read() -> None:
    files = sorted(data("topo").glob("*.txt"))
    for file in files:
        topology = parse_topology(file.read_text(), file.name)
        assert topology.devices[0] == "GPU0"
        assert parse_topology(printed(topology)).paths == topology.paths
    assert len(files) >= 12
