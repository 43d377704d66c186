"""What is found and what Holdfast runs of it: a plan that is written is one that `holdfast serve --plan` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.core.errors import ConfigError
from holdfast.core.plan import read_plan
from holdfast.hardware.cluster import cluster_of
from holdfast.operate.plan import run
from holdfast.parallel.cuts import check_plan
from holdfast.planner.config import OutputConfig, PlanConfig, WhatConfig, WhereConfig
from holdfast.planner.goal import Goal
from holdfast.planner.search import Found, search
from holdfast.planner.shapes.load import load_shape, load_spec, runtime_of
from holdfast.planner.show.explain import why
from holdfast.planner.show.facts import as_json
from holdfast.planner.show.summary import of_runtime, runners


def found_for(model: str, gpus: str, goal: Goal | None = None) -> Found:
    return search(load_shape(model), cluster_of(gpus), goal or Goal(concurrency=32), runtime=runtime_of(model))


def config_for(file: Path, gpus: str, **what: object) -> PlanConfig:
    return PlanConfig(
        where=WhereConfig(gpus=gpus),
        what=WhatConfig(concurrency=32, **what),  # type: ignore[arg-type]
        out=OutputConfig(output=str(file), json=True),
    )


def test_where_all_runs_nothing_is_said() -> None:
    found = found_for("Llama-3.1-70B", "8xH100")
    assert found.best_that_runs is found.best
    assert of_runtime(found) == ""
    held_together = [some for some in found.ranking if some.candidate.shard_weights]
    assert all("weights together on CPUs only" in found.refuses(some) for some in held_together)


def test_experts_shared_by_replicas_are_shown_but_not_written() -> None:
    found = found_for("Mixtral-8x7B", "8xH100", Goal())
    runs = found.best_that_runs
    assert runs is not None
    assert not runs.candidate.shared_experts
    assert found.best.candidate.shared_experts
    cut = next(some for some in found.ranking if some.candidate.name == "TP4 × DP2")
    assert not found.refuses(cut)
    assert any(some is runs for some in runners(found))
    assert "replicas do not share out experts" in of_runtime(found)
    assert runs.candidate.name in of_runtime(found)
    chosen = found.choosing(runs)
    assert chosen.best is runs
    assert chosen.better is found.best
    assert len(chosen.ranking) == len(found.ranking)
    assert found.best.candidate.name in of_runtime(chosen)
    assert "but Holdfast does not run it yet: replicas" in why(chosen, found.best)
    facts = as_json(chosen)
    assert facts["better"]["refused"] == found.refuses(found.best)
    assert facts["best"]["refused"] is None


def test_of_several_nodes_one_is_planned_for_besides() -> None:
    """With the places of the node that it is, in a cluster whose nodes differ."""
    found = found_for("Llama-3.1-70B", "1x2xT4,1x8xH100")
    runs = found.best_that_runs
    assert runs is not None
    places = {place for groups in runs.candidate.replicas for group in groups for place in group.places}
    assert places == {(1, index) for index in range(8)}
    alike = found_for("Llama-3.1-70B", "2x8xH100").best_that_runs
    assert alike is not None
    assert alike.candidate.num_devices == 8
    assert len({some.candidate for some in found.ranking}) == len(found.ranking)
    many = found_for("Llama-3.1-70B", "16x8xH100,16x8xA100-80GB", Goal()).best_that_runs
    assert many is not None, "those of one node are far behind, and stay"
    assert {group.device.name for groups in many.candidate.replicas for group in groups} == {"H100-80GB-SXM"}


@pytest.mark.parametrize(
    ("model", "goal", "reason"),
    [
        ("DeepSeek-V3", Goal(concurrency=8, weight_bits=8), "does not serve model_type 'deepseek_v3'"),
        ("Llama-3.1-8B", Goal(concurrency=8, kv_format="fp8"), "no keys and values in fp8"),
    ],
)
def test_what_holds_for_every_plan_is_said_once(model: str, goal: Goal, reason: str) -> None:
    found = found_for(model, "8xH200", goal)
    assert found.best_that_runs is None
    assert of_runtime(found).count(reason) == 1
    assert all(reason not in why(found, some) for some in runners(found))


@pytest.mark.parametrize(
    ("model", "gpus", "what"),
    [
        ("Mixtral-8x7B", "8xH100", {}),
        ("Llama-3.1-70B", "2x8xH100", {}),
        ("Qwen3-30B-A3B", "4xA100-80GB", {"objective": "latency"}),
        ("Llama-3.1-70B", "2xH100,4xL40S", {}),
    ],
)
def test_what_is_written_is_what_is_shown_and_can_be_served(
    model: str, gpus: str, what: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert run(model, config_for(file, gpus, **what)) == 0
    shown = json.loads(capsys.readouterr().out)["best"]
    plan = read_plan(str(file))
    check_plan(plan, load_spec(model), "it")
    assert not plan.shard_weights
    assert plan.estimates is not None
    assert plan.estimates.tokens_per_second == pytest.approx(shown["throughput"])
    stages = [stage["layers"] for stage in shown["replicas"][0]["stages"]]
    assert [list(stage.layers) for stage in plan.replicas[0].stages] == stages


def test_where_none_runs_none_is_written_and_the_reason_said(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match=r"runs none of these plans yet.*does not serve model_type 'deepseek_v3'"):
        run("DeepSeek-V3", config_for(file, "8xH200", weight_bits=8))
    with pytest.raises(ConfigError, match=r"runs none of these plans yet.*no keys and values in int8"):
        run("Llama-3.1-8B", config_for(file, "2xL4", kv_cache_dtype="int8"))
    with pytest.raises(ConfigError, match="no plan fits, so none is written"):
        run("Llama-3.1-405B", config_for(file, "2xL4"))
    assert not file.exists()
