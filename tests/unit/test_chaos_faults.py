"""What `holdfast chaos` draws from, and what it makes of what the service tells."""

from __future__ import annotations

import pytest

from holdfast.chaos.config import FAULTS, ChaosConfig, FaultConfig
from holdfast.chaos.faults import Fault
from holdfast.chaos.service import value_of
from holdfast.core.errors import ConfigError


def test_without_a_store_no_fault_is_drawn_that_needs_one():
    without = FaultConfig().kinds(has_store=False)
    assert set(FAULTS) - set(without) == {kind for kind in FAULTS if "store" in kind} | {"spoil-worker"}
    assert FaultConfig().kinds(has_store=True) == list(FAULTS)


@pytest.mark.parametrize("kind", ["kill-store", "kill-worker+store", "stop-store", "spoil-worker"])
def test_a_fault_of_the_store_by_name_is_refused_where_there_is_none(kind: str):
    config = FaultConfig(faults=f"kill-worker,{kind}")
    assert config.kinds(has_store=True) == ["kill-worker", kind]
    with pytest.raises(ConfigError, match=r"needs a checkpoint store, and this service has none") as refused:
        config.kinds(has_store=False)
    assert str(refused.value).startswith(f"--faults kill-worker,{kind}: {kind} ")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FaultConfig(phase="dusk"), "--phase dusk: 'dusk' is not one of any, prefill, decode, loading, recovery"),
        (FaultConfig(phase="decode,"), "--phase decode,: '' is not one of any"),
        (FaultConfig(faults=""), "--faults : '' is not one of kill-worker"),
    ],
)
def test_words_that_are_not_known_are_refused(config: FaultConfig, said: str):
    with pytest.raises(ConfigError, match="^" + said.replace("'", ".")):
        ChaosConfig(fault=config).check()


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], None),
        (["--x", "1"], "1"),
        (["--x=1", "--x", "2"], "2"),
        (["--x", "2", "--x=1"], "1"),
        (["--xy", "1"], None),
        (["--x"], ""),
    ],
)
def test_what_flags_say_of_one(flags: list[str], value: str | None):
    assert value_of("--x", flags) == value


def incident(member: str, detected: float, **more: object) -> dict[str, object]:
    return {"member": member, "loss": {"detected": detected}, "back": None, **more}


def test_a_fault_learns_what_came_after_it_and_keeps_what_a_lost_gateway_knew():
    fault = Fault("kill-worker", ["worker 1.0.0"], at=100.0)
    assert fault.members == {"replica 1"}
    fault.learn([incident("replica 1", 99.0), incident("replica 1", 100.5)])
    assert [each["loss"]["detected"] for each in fault.incidents] == [100.5]
    assert fault.detected == 0.5
    fault.learn([incident("gateway", 101.0)])  # the next one knows of nothing before
    fault.learn([incident("gateway", 101.0, resumed=3)])
    assert [each["member"] for each in fault.incidents] == ["replica 1", "gateway"]
    assert fault.incidents[1]["resumed"] == 3


def test_when_the_supervisor_dies_nobody_tells_of_it():
    fault = Fault("kill-supervisor", ["supervisor"], at=100.0)
    assert (fault.members, fault.was_noticed) == (set(), False)
    fault.ended = 100.25
    assert (fault.was_noticed, fault.detected) == (True, 0.25)
