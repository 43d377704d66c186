"""What `holdfast chaos` draws from, and what it makes of what the service tells."""

from __future__ import annotations

import pytest

from holdfast.chaos.config import FAULTS, PHASES, ChaosConfig, FaultConfig, kinds_at
from holdfast.chaos.faults import Fault
from holdfast.chaos.flags import value_of
from holdfast.chaos.load import bodies, differences, with_stops
from holdfast.core.errors import ConfigError


def test_without_a_store_no_fault_is_drawn_that_needs_one():
    config = FaultConfig(machines=1)
    without = config.kinds(has_store=False)
    assert set(FAULTS) - set(without) == {kind for kind in FAULTS if "store" in kind} | {"spoil-worker"}
    assert config.kinds(has_store=True) == list(FAULTS)


@pytest.mark.parametrize("kind", ["kill-node", "cut-node", "stop-hub"])
def test_a_fault_of_machines_needs_some(kind: str):
    assert kind not in FaultConfig().kinds()
    assert FaultConfig(faults=kind, machines=1).kinds() == [kind]
    with pytest.raises(ConfigError, match=f"--faults {kind}: {kind} needs --machines"):
        FaultConfig(faults=kind).kinds()


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
        (
            FaultConfig(phase="dusk"),
            "--phase dusk: 'dusk' is not one of any, queued, prefill, chunk, decode, sampled, logged",
        ),
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


def incident(member: str, detected: float, kind: str = "death", **more: object) -> dict[str, object]:
    return {"member": member, "loss": {"detected": detected, "kind": kind}, "back": None, **more}


def test_a_fault_learns_what_it_did_and_keeps_what_a_lost_gateway_knew():
    fault = Fault("kill-worker+gateway", ["worker 1.0.0", "gateway"], at=100.0)
    assert fault.members == {"replica 1", "gateway"}
    told = [incident("replica 1", 99.0), incident("replica 0", 100.1), incident("replica 1", 100.2, "planned")]
    fault.learn(told)
    assert (fault.incidents, fault.was_noticed, fault.detected) == ([], False, None), "others did these"
    fault.learn([*told, incident("replica 1", 100.5), incident("replica 1", 102.0)])
    assert [each["loss"]["detected"] for each in fault.incidents] == [100.5], "the first is its own"
    assert (fault.was_noticed, fault.detected) == (False, 0.5), "not all that it hit"
    fault.learn([incident("gateway", 101.0), incident("replica 1", 102.0)])  # the next one knows of nothing before
    fault.learn([incident("gateway", 101.0, back=103.0)])
    assert [each["loss"]["detected"] for each in fault.incidents] == [100.5, 101.0]
    assert fault.incidents[1]["back"] == 103.0
    assert (fault.was_noticed, fault.whole_again) == (True, None)
    fault.learn([incident("replica 1", 100.5, back=104.0)])
    assert fault.whole_again == 104.0


def test_when_the_supervisor_dies_nobody_tells_of_it():
    fault = Fault("kill-supervisor", ["supervisor"], at=100.0)
    assert (fault.members, fault.detected) == (set(), None)
    fault.ended = 100.25
    assert fault.detected == 0.25


def test_moments_of_one_process_are_for_it_the_store_and_all():
    at_the_log = kinds_at("logged", list(FAULTS), "gateway")
    assert at_the_log == [
        "kill-gateway",
        "kill-store",
        "kill-supervisor",
        "kill-worker+store",
        "stop-gateway",
        "stop-store",
    ]
    assert kinds_at("logged", ["kill-worker"], "gateway") == ["kill-worker"], "rather that than nothing"
    assert kinds_at("decode", list(FAULTS), "worker") == list(FAULTS)


def test_moments_of_the_store_are_not_drawn_where_there_is_none():
    config = FaultConfig(phase="all")
    assert config.phases() == list(PHASES)
    assert set(PHASES) - set(config.phases(has_store=False)) == {"checkpoint", "restore"}
    with pytest.raises(ConfigError, match="--phase any,restore: restore needs a checkpoint store"):
        FaultConfig(phase="any,restore").phases(has_store=False)
    with pytest.raises(ConfigError, match="--phase reshape: reshape needs a replica of several ranks"):
        FaultConfig(phase="reshape").phases(num_ranks=1)


@pytest.mark.parametrize(
    ("found", "counts"),
    [
        ("boats came in", (0, 0, 0)),
        ("boats in", (5, 0, 0)),
        ("boats boats came in", (0, 6, 0)),
        ("goats came in", (0, 0, 1)),
        ("", (13, 0, 0)),
    ],
)
def test_what_is_wrong_with_a_reply_is_counted(found: str, counts: tuple[int, int, int]):
    assert differences({0: {"text": "boats came in"}}, {0: {"text": found}}) == counts


def test_every_kind_of_request_is_streamed_and_not_and_of_every_length():
    asked = bodies("m", 24, 10, 0)
    kinds = [{key: body[key] for key in body if key not in {"prompt", "seed", "stream"}} for body in asked]
    for kind in kinds[:6]:
        alike = [body for body, its in zip(asked, kinds, strict=True) if its == kind]
        assert {body["stream"] for body in alike} == {False, True}
        assert len({body["prompt"].count("harbour") for body in alike}) == 3
    assert {"n", "stop", "logprobs", "frequency_penalty"} < {key for kind in kinds for key in kind}
    assert {kind["temperature"] == 0 for kind in kinds} == {False, True}


def test_stop_strings_are_some_that_occur():
    asked = [{"stop": []}, {"n": 2}]
    [stops, other] = with_stops(asked, [{0: {"text": "boats came in"}}, {0: {"text": "boats"}}])
    assert stops["stop"][0] in "boats came in"
    assert other == {"n": 2}


def test_a_choice_that_is_missing_is_lost():
    assert differences({0: {"text": "ab"}, 1: {"text": "abc"}}, {0: {"text": "ab"}}) == (3, 0, 0)


def test_all_among_others_is_all():
    assert FaultConfig(phase="drain,all").phases() == list(PHASES)
    assert FaultConfig(faults="kill-worker,all").kinds() == FaultConfig().kinds()
