"""`holdfast topo` shows islands and slow edges, warns of a bad order, and refuses what it cannot read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast.cli.main import app
from holdfast.core.errors import ConfigError
from holdfast.hardware.config import MachineConfig, TopoConfig
from holdfast.hardware.report import run
from support.topologies import NVSWITCH, cube_mesh, printed, sockets

CLUSTER = """
nodes:
  - {name: left, count: 2, gpus: 8xH100, nics: 8, site: here}
  - {name: cards, gpus: 4xRTX-4090, link: pcie4, site: there}
"""


def topo(*arguments: str, stdin: str = "") -> str:
    result = CliRunner().invoke(app, ["topo", *arguments], input=stdin)
    if result.exception:
        raise result.exception
    return result.output


def test_a_cube_mesh_is_drawn_with_its_slow_edges_and_a_better_order() -> None:
    shown = topo("--file", "-", "--gpu", "V100", stdin=printed(cube_mesh()))
    assert "8 × V100-16GB-SXM (16.9 GB each)" in shown
    assert "island 1: 3 × NV2 at 50, 3 × NV1 at 25 GB/s per direction" in shown
    assert "island 1 to 2  2 × NV2 at 50, 2 × NV1 at 25, 12 × SYS at 10 GB/s" in shown
    assert "groups of 2 put GPU0+GPU1, GPU4+GPU5 over NV1; in a better one the slowest pair has NV2" in shown
    assert "CUDA_VISIBLE_DEVICES=0,3,1,2,4,7,5,6\n" in shown


def test_without_a_type_there_are_no_rates() -> None:
    shown = topo("--file", "-", stdin=printed(NVSWITCH))
    assert "stdin: 8 GPUs" in shown
    assert "GB/s" not in shown
    assert "Bad order" not in shown


def test_a_cluster_file_is_drawn_once_for_nodes_that_are_alike(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    shown = topo("--file", str(path))
    assert "2 nodes, left0 to …: 8 × H100-80GB-SXM (84.9 GB each), in here" in shown
    assert "Every pair is joined alike, by pcie4 at 31.51 GB/s per direction" in shown
    assert "Between sites  wan at 1.25 GB/s per direction, 10 ms" in shown
    assert "note  network of nodes with H100-80GB-SXM: infiniband-ndr" in shown


def test_the_facts_are_there_as_json(tmp_path: Path) -> None:
    path = tmp_path / "topo.txt"
    path.write_text(printed(sockets((0, 2), (1, 3))))
    [machine] = json.loads(topo("--file", str(path), "--gpu", "l40s", "--json"))["machines"]
    assert machine["islands"] == [["GPU0", "GPU2"], ["GPU1", "GPU3"]]
    assert machine["good_order"] == ["GPU0", "GPU2", "GPU1", "GPU3"]
    assert machine["bad_orders"] == [{"size": 2, "slow": [["GPU0", "GPU1"], ["GPU2", "GPU3"]]}]
    assert machine["pairs"][0]["path"] == "SYS"
    assert machine["pairs"][0]["bandwidth"] == 16e9
    assert machine["devices"][0]["type"] == "L40S"


def test_this_machine_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "1 × cpu" in topo()


@pytest.mark.parametrize(
    ("config", "text", "said"),
    [
        (MachineConfig(file="-"), "hello", "stdin is neither what `nvidia-smi topo -m` prints nor a cluster file"),
        (MachineConfig(file="-"), "nodes: [{gpus: 8xH10O}]", "stdin: nodes[0].gpus: GPU 'H10O' is not known"),
        (MachineConfig(file="-", gpu="L4"), "nodes: [{gpus: L4}]", "--gpu L4: the cluster file stdin names its GPUs"),
        (MachineConfig(file="-", gpu="L5"), printed(NVSWITCH), "--gpu L5: GPU 'L5' is not known; near are L4"),
        (MachineConfig(file="-", gpu="A100"), printed(NVSWITCH), "shows NV18 between devices, but A100-80GB-SXM has"),
        (MachineConfig(file="/"), "", "--file /: Is a directory"),
        (MachineConfig(file="no/where"), "", "--file no/where: No such file"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    config: MachineConfig, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(ConfigError) as refused:
        run(TopoConfig(machine=config))
    assert said in str(refused.value)


def test_a_type_for_this_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpu H100: only together with --file"):
        TopoConfig(machine=MachineConfig(gpu="H100")).check()
