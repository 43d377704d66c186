"""Clusters from words and from files: what is told is taken, what is not is said, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.core.errors import ConfigError
from holdfast.hardware.cluster import cluster_of
from holdfast.hardware.cluster_file import parse_cluster, read_cluster
from holdfast.hardware.islands import islands
from support.topologies import cube_mesh, printed

TWO_SITES = """
network: infiniband-ndr
between_sites: {kind: wan, bandwidth_gb: 1.25, latency_us: 12000}
nodes:
  - name: left
    count: 2
    gpus: 8xH100-80GB-SXM
    nics: 8
    memory_gb: 2048
    site: frankfurt
    price_per_hour: 98.32
  - name: mixed
    gpus: [4xA100-40GB-SXM, 4xA100-80GB-SXM]
    network: {kind: roce, bandwidth_gb: 25, latency_us: 6}
    site: dublin
"""


@pytest.mark.parametrize(
    ("text", "nodes", "first"),
    [
        ("8xA100-80GB", [8], "A100-80GB-SXM"),
        ("2x8xH100", [8, 8], "H100-80GB-SXM"),
        ("H100", [1], "H100-80GB-SXM"),
        ("2xRTX3090", [2], "RTX-3090"),
        ("RTX5090+RTX3090Ti", [2], "RTX-5090"),
        ("2 x 3090", [2], "RTX-3090"),
        ("4xA100-40GB-SXM,4xA100-80GB-SXM", [8], "A100-40GB-SXM"),
        ("20xL4", [8, 8, 4], "L4"),  # more than stand in a machine
        ("72xGB200", [72], "GB200-186GB"),  # their switch joins them
        ("8xH100,2x4xL40S", [8, 4, 4], "H100-80GB-SXM"),
    ],
)
def test_a_few_words_make_a_cluster(text: str, nodes: list[int], first: str) -> None:
    cluster = cluster_of(text)
    assert [len(node.devices) for node in cluster.nodes] == nodes
    assert cluster.devices[0].name == first
    assert len(cluster.devices) == len(cluster.places) == sum(nodes)
    assert bool(cluster.assumptions) == (sum(nodes) > 1)


def test_devices_are_joined_as_their_machines_are_built() -> None:
    """The per-direction rate between devices 0 and 1, and 0 and the last one."""
    rates = {
        "8xH100": (450, 450),
        "8xV100": (25, 10),  # a cube mesh: one NVLink, and a way over the sockets
        "4xV100": (50, 50),
        "8xMI300X": (64, 64),
        "4xL40S": (31.508, 31.508),
        "8xL40S": (31.508, 16),
        "4xA100 pairwise NVLink": (300, 31.508),
        "4xA100-PCIe": (31.508, 31.508),  # a bridge is an option
        "4xH200 NVL": (150, 150),
        "4xA100-40GB-SXM,4xA100-80GB-SXM": (300, 16),
        "2xH100,1xL40S": (450, 31.508),
    }
    for text, (near, far) in rates.items():
        [node] = cluster_of(text).nodes
        found = (node.link_between(0, 1).bandwidth, node.link_between(0, len(node.devices) - 1).bandwidth)
        assert found == pytest.approx((near * 1e9, far * 1e9)), text


def test_between_nodes_is_the_network_of_the_time() -> None:
    cluster = cluster_of("2x8xA100")
    assert cluster.link_between((0, 0), (1, 0)).name == "infiniband-hdr"
    assert cluster.nodes[0].network_share == 25e9  # a card for each GPU
    assert cluster_of("2x4xL4").nodes[0].network_share == 25e9 / 4
    assert any("between nodes: 8 × infiniband-hdr" in said for said in cluster.assumptions)
    assert len({node.name for node in cluster.nodes}) == 2


def test_a_thousand_devices_are_described() -> None:
    cluster = cluster_of("128x8xH100")
    assert len(cluster.places) == 1024
    assert cluster.places[1023] == (127, 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not GPU, COUNTxGPU or NODESxCOUNTxGPU"),
        ("8xH100,", "'' is not GPU"),
        ("2x3x4xH100", "is not GPU, COUNTxGPU"),
        ("0xH100", "there must be 1 to 65,536"),
        ("99999x99xH100", "there must be 1 to 65,536"),
        ("8xH10O", "'H10O' is not known; near are H100-80GB-SXM"),
    ],
)
def test_words_that_mean_no_cluster_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cluster_of(text)


def test_a_file_describes_nodes_sites_and_what_joins_them() -> None:
    cluster = parse_cluster(TWO_SITES)
    left, right, mixed = cluster.nodes
    assert (left.name, right.name, mixed.name) == ("left0", "left1", "mixed")
    assert (left.memory_bytes, left.price_per_hour, left.nics) == (2048 * 10**9, 98.32, 8)
    assert cluster.link_between((0, 0), (1, 7)).name == "infiniband-ndr"
    assert cluster.link_between((0, 0), (2, 0)) == cluster.between_sites
    assert cluster.between_sites.latency == pytest.approx(0.012)
    assert mixed.network is not None
    assert mixed.network.bandwidth == 25e9
    assert islands(mixed.topology) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert cluster.assumptions == ("nodes[1]: 8 network cards",)


def test_what_a_file_leaves_open_is_said() -> None:
    cluster = parse_cluster("nodes: [{gpus: 8xH100, site: a}, {gpus: 4xL4, site: b}]")
    assert cluster.assumptions == (
        "nodes[0]: 8 network cards",
        "nodes[1]: 1 network cards",
        "network of nodes with H100-80GB-SXM: infiniband-ndr",
        "network of nodes with L4: infiniband-hdr",
        f"between sites: {cluster.between_sites.source}",
    )
    assert parse_cluster("nodes: [{gpus: 8xH100}]").assumptions == ()


def test_a_node_may_have_a_topology_or_one_link(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").write_text(printed(cube_mesh()))
    (tmp_path / "cluster.yaml").write_text("nodes: [{gpus: 8xV100, topology: topo.txt}]")
    [node] = read_cluster(str(tmp_path / "cluster.yaml")).nodes
    assert node.topology == cube_mesh()
    [node] = parse_cluster("nodes: [{gpus: 4xRTX-4090, link: pcie5}]").nodes
    assert node.link_between(0, 3).name == "pcie5"
    with pytest.raises(ConfigError, match=r"nodes\[0\]: the topology has 8 devices, but 4 are named"):
        parse_cluster("nodes: [{gpus: 4xV100, topology: topo.txt}]", folder=tmp_path)
    with pytest.raises(
        ConfigError, match=r"nodes\[0\]: the topology shows NV1 between devices, but L4 has no NVLink"
    ):
        parse_cluster("nodes: [{gpus: 8xL4, topology: topo.txt}]", folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a mapping with nodes, network, between_sites is needed, not nothing"),
        ("nodes: []", "nodes: a list of at least one node is needed"),
        ("nodes: 3", "nodes: a list is needed, not 3"),
        ("nodes: [1]", "nodes[0]: a mapping with name, count"),
        ("nodes: [{}]", "nodes[0].gpus: needed, as 8xH100"),
        ("nodes: [{gpus: [8xH100, 3]}]", "nodes[0].gpus: needed, as 8xH100"),
        ("nodes: [{gpus: 8xH10O}]", "nodes[0].gpus: GPU 'H10O' is not known; near are H100-80GB-SXM"),
        ("nodes: [{gpus: 2x8xH100}]", "nodes[0].gpus: '2x8xH100' names several nodes; say nodes[0].count instead"),
        ("nodes: [{gpu: 8xH100}]", "nodes[0].gpu: no such field; gpus is near"),
        ("nodes: [{gpus: H100, count: true}]", "nodes[0].count: a whole number is needed, not True"),
        ("nodes: [{gpus: H100, count: 0}]", "nodes[0].count: 0 is not within 1 to 65,536"),
        ("nodes: [{gpus: 8xH100, count: 60000}]", "nodes[0]: more than 65,536 devices"),
        ("nodes: [{gpus: H100, memory_gb: .nan}]", "nodes[0].memory_gb: nan is not within 1 to 1e+06"),
        ("nodes: [{gpus: H100, memory_gb: lots}]", "nodes[0].memory_gb: a number is needed, not 'lots'"),
        ("nodes: [{gpus: H100, link: nvlink9}]", "nodes[0].link: link 'nvlink9' is not known"),
        ("nodes: [{gpus: H100, link: {kind: pcie}}]", "nodes[0].link.bandwidth_gb: needed"),
        ("nodes: [{gpus: H100, topology: nowhere.txt}]", "nodes[0].topology: nowhere.txt: No such file"),
        ("nodes: [{gpus: H100, topology: t, link: pcie5}]", "topology and link both say"),
        ("nodes: [{gpus: H100, name: a}, {gpus: H100, name: a}]", "two nodes are named 'a'"),
        ("network: 5\nnodes: [{gpus: H100}]", "network: text or a mapping is needed, not 5"),
        ("nodes: [{gpus: H100}]\nnodes: [{gpus: L4}]", "line 1: not YAML: nodes is given twice"),
        ("nodes: [{gpus: H100", "not YAML"),
        ("&a [*a]", "a mapping with nodes"),
        ("[" * 5000, "not YAML: it is nested too deeply"),
        ("!!python/object/apply:os.getpid []", "not YAML: could not determine a constructor"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_cluster(text, "c.yaml")
    assert str(refused.value).startswith("c.yaml: ")
    assert said in str(refused.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cluster file nowhere\.yaml: No such file"):
        read_cluster("nowhere.yaml")
