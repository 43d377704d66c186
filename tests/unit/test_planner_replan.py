"""Plans that come of others: of a replica that lost a rank, of what the search found, of a machine."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from holdfast.cluster import plans
from holdfast.core.config import DeviceConfig, ModelConfig, ServeConfig
from holdfast.core.errors import ConfigError, ModelError
from holdfast.core.plan import Plan, places, read_plan
from holdfast.core.spec import DecoderSpec, ModelInfo
from holdfast.hardware.cluster import cluster_of
from holdfast.parallel.cuts import check_plan, make_plan
from holdfast.planner import emit
from holdfast.planner.goal import Goal
from holdfast.planner.replan import replan, slowest_stage
from holdfast.planner.search import search
from holdfast.planner.shapes.load import load_shape, load_spec, runtime_of

LLAMA_8B, LLAMA_70B, MIXTRAL = (load_spec(name) for name in ("Llama-3.1-8B", "Llama-3.1-70B", "Mixtral-8x7B"))


def info(spec: DecoderSpec) -> ModelInfo:
    return ModelInfo(path="", format="safetensors", spec=spec, dtype="bfloat16", eos_token_ids=(2,))


def test_layers_go_to_where_the_ranks_are() -> None:
    """TP4 × PP2 without one rank: three and four ranks share 80 layers as 34 and 46."""
    replica = make_plan(LLAMA_70B, tensor=4, pipeline=2).replicas[0]
    smaller = replan(LLAMA_70B, places(replica)[1])
    assert smaller is not None
    assert [len(stage.ranks) for stage in smaller.stages] == [3, 4]
    assert [stage.layers for stage in smaller.stages] == [(0, 34), (34, 80)]
    check_plan(Plan((smaller,)), LLAMA_70B, "what is left")


def test_any_rank_can_be_lost_until_the_last_and_no_stage_is_slower_than_it_must_be() -> None:
    for spec, degrees in ((LLAMA_8B, (2, 2, 2)), (LLAMA_70B, (3, 1, 2)), (MIXTRAL, (4, 4))):
        replica = make_plan(spec, tensor=list(degrees), pipeline=len(degrees)).replicas[0]
        while replica.num_ranks > 1:
            smaller = replan(spec, places(replica)[-1])
            assert smaller is not None
            assert smaller.num_ranks == replica.num_ranks - 1
            check_plan(Plan((smaller,)), spec, "what is left")
            assert slowest_stage(smaller) < spec.num_layers / smaller.num_ranks + 1
            replica = smaller
        assert replan(spec, places(replica)[0]) is None


@pytest.mark.parametrize("gpus", ["8xA100-80GB", "4xA100-40GB-SXM,4xA100-80GB-SXM", "2xH100,4xL40S"])
def test_what_the_search_finds_is_a_plan_that_can_be_run(gpus: str, tmp_path: Path) -> None:
    best = search(load_shape("Llama-3.1-70B"), cluster_of(gpus), Goal()).best
    plan = emit.plan_of(LLAMA_70B, best)
    check_plan(plan, LLAMA_70B, "the plan")
    assert tuple(len(stage.ranks) for stage in plan.replicas[0].stages) == best.candidate.degrees
    taken = sorted(number for devices in plan.devices for number in devices)
    assert taken == list(range(len(taken)))
    assert plan.estimates is not None
    assert plan.estimates.kv_tokens == best.kv_tokens
    file = tmp_path / "plan.json"
    file.write_bytes(msgspec.json.encode(plan))
    assert read_plan(str(file)) == plan


def test_a_plan_over_several_nodes_is_not_written() -> None:
    best = search(load_shape("GPT-3 175B"), cluster_of("2x4xA100-80GB"), Goal()).best
    refused = runtime_of("GPT-3 175B").refuses(Goal(), best.candidate)
    assert refused == "it runs plans of one node so far, this one has 2"


def test_experts_are_cut_or_whole_as_the_candidate_says() -> None:
    found = search(load_shape("Mixtral-8x7B"), cluster_of("4xH100"), Goal())
    for some in found.ranking:
        if some.served is None or max(some.candidate.degrees) == 1:
            continue
        plan = emit.plan_of(MIXTRAL, some)
        shard = plan.replicas[0].stages[0].ranks[0]
        assert (len(shard.experts) < 8) == some.candidate.expert_parallel


def test_without_sizes_a_machine_with_gpus_is_planned_for_and_cpus_have_one_rank() -> None:
    config = ServeConfig()
    assert config.device.says_no_sizes
    plan = plans.planned(config, info(LLAMA_70B), cluster_of("8xH100"))
    assert sum(replica.num_ranks for replica in plan.replicas) == 8
    assert plan.estimates is not None
    assert plans.planned(config, info(LLAMA_70B), None).replicas[0].num_ranks == 1
    assert plans.planned(config, info(LLAMA_8B), cluster_of("1xH100")).replicas[0].num_ranks == 1
    experts = plans.planned(config, info(MIXTRAL), cluster_of("8xH100"))
    assert max(len(stage.ranks) for replica in experts.replicas for stage in replica.stages) > 1
    assert not experts.shard_weights, "the worker refuses that on GPUs"
    long = replace(config, model=replace(ModelConfig(), max_model_len=131_072))
    with pytest.raises(ConfigError, match="does not fit the 2 GPUs of this machine with 131072 tokens"):
        plans.planned(long, info(LLAMA_70B), cluster_of("2xL40S"))


def test_sizes_win_over_the_planner() -> None:
    for given in ({"tensor_parallel_size": 1}, {"data_parallel_size": 2}, {"plan": "x"}, {"pipeline_layers": "4,4"}):
        assert not replace(DeviceConfig(), **given).says_no_sizes
    two = ServeConfig(device=replace(DeviceConfig(), tensor_parallel_size=2))
    plan = plans.plan_of(two, info(LLAMA_8B))
    assert plan.replicas[0].num_ranks == 2
    assert plan.devices == ((0, 1),)


def test_every_rank_has_a_device_of_its_own_whatever_became_of_other_replicas() -> None:
    plan = make_plan(LLAMA_8B, tensor=2, data=2)
    assert plan.devices_in_order == ((0, 1), (2, 3))
    assert plan.device_of(1, 0) == 2
    said = msgspec.structs.replace(plan, devices=((3, 1), (0, 2)))
    assert said.device_of(0, 0) == 3
    check_plan(said, LLAMA_8B, "the plan")
    with pytest.raises(ConfigError, match="devices: must be one number for each rank"):
        check_plan(msgspec.structs.replace(plan, devices=((3, 1),)), LLAMA_8B, "the plan")


def test_a_model_that_is_only_planned_for_is_not_written_as_a_plan() -> None:
    with pytest.raises(ModelError, match="does not serve model_type"):
        load_spec("DeepSeek-V3")
