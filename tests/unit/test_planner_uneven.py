"""Ranks that do not divide a layer evenly: what the fullest of them has is what the runtime gives it."""

from __future__ import annotations

import pytest

from holdfast.hardware.cluster import cluster_of
from holdfast.parallel.cuts import make_plan
from holdfast.planner.candidates import Candidate, device_groups
from holdfast.planner.coefficients import coefficients
from holdfast.planner.estimate import Question, shares_of, stages_of
from holdfast.planner.goal import Goal
from holdfast.planner.memory.shares import shares_of_replica
from holdfast.planner.shapes.load import load_shape, load_spec
from holdfast.planner.timing import StepBatch, plain_work, step_time
from holdfast.planner.uneven import fullest

MODELS = [
    "Llama-3.1-70B", "Llama-3.2-1B", "Mixtral-8x7B", "Qwen2.5-32B", "GPT-3 175B", "Falcon-180B",
    "Qwen3-30B-A3B", "Qwen2.5-7B", "Qwen2.5-1.5B", "Qwen2.5-3B",
]  # fmt: skip
"""The last four have 4 and 2 KV heads, whose query heads ranks cut; of 28 query heads they cut unequal parts."""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8])
def test_the_fullest_share_is_that_of_the_plan_that_runs(model: str, ranks: int) -> None:
    shape, spec = load_shape(model), load_spec(model)
    cluster = cluster_of(f"{ranks}xH100")
    question = Question.of(shape, cluster, Goal(), coefficients())
    candidate = Candidate((tuple(device_groups(cluster, cluster.devices[0], ranks)),), (shape.num_layers,))
    (mine,) = shares_of(question, candidate)
    plan = make_plan(spec, tensor=ranks).replicas[0]
    theirs = shares_of_replica(shape, plan)
    assert mine.query_heads == pytest.approx(max(share.query_heads for share in theirs))
    if spec.moe is None:
        assert mine.columns == pytest.approx(max(share.columns for share in theirs))
    else:
        held = [share.experts * share.expert_columns for share in theirs]
        assert mine.experts * mine.expert_columns == pytest.approx(max(held))


def test_even_ranks_change_nothing() -> None:
    for model in MODELS:
        for layer, _ in load_shape(model).kinds:
            for ranks in (1, 2, 4, 8):
                if layer.attention and layer.attention.num_heads % ranks:
                    continue
                whole = fullest(layer, ranks)
                assert plain_work(whole, ranks, 1) == pytest.approx(plain_work(layer, ranks, 1), rel=1e-6), model


def test_seven_ranks_read_as_long_as_four_where_there_are_eight_kv_heads() -> None:
    """Two of eight KV heads and two of eight shards each: what four ranks have, and all seven wait for it."""
    shape, cluster = load_shape("Llama-3.1-70B"), cluster_of("7xH100")
    known = coefficients()
    question = Question.of(shape, cluster, Goal(), known)

    def memory_side(ranks: int) -> float:
        (group, *_) = device_groups(cluster_of(f"{ranks}xH100"), cluster.devices[0], ranks)
        (stage,) = stages_of(question, Candidate(((group,),), (shape.num_layers,)))
        return step_time(stage, StepBatch(8, 1024), known.engines["vllm"], known.efficiency).linear_memory

    assert memory_side(7) == pytest.approx(memory_side(4), rel=1e-3)
    assert memory_side(4) == pytest.approx(2 * memory_side(8), rel=1e-3)
    assert memory_side(3) == pytest.approx(3 * memory_side(8), rel=1e-3)


def test_a_prompt_waits_for_the_rank_with_most_query_heads() -> None:
    """Two of eight KV heads, as of four ranks; of four KV heads seven ranks leave some rank a whole one."""
    known = coefficients()

    def attention(model: str, ranks: int) -> float:
        cluster = cluster_of(f"{ranks}xH100")
        question = Question.of(load_shape(model), cluster, Goal(), known)
        (group,) = device_groups(cluster, cluster.devices[0], ranks)
        (stage,) = stages_of(question, Candidate(((group,),), (question.shape.num_layers,)))
        return step_time(stage, StepBatch(0, 0, 4096, 2048), known.engines["vllm"], known.efficiency).attention

    assert attention("Llama-3.1-70B", 7) == pytest.approx(attention("Llama-3.1-70B", 4))
    assert attention("Llama-3.1-70B", 7) == pytest.approx(2 * attention("Llama-3.1-70B", 8))
    assert attention("Qwen3-30B-A3B", 7) == pytest.approx(attention("Qwen3-30B-A3B", 4))


def test_whole_experts_on_ranks_that_do_not_divide_them() -> None:
    """Eight experts on three ranks: one has three of them."""
    (layer, _), *_ = load_shape("Mixtral-8x7B").kinds
    assert layer.experts is not None
    wider = fullest(layer, 3, 3).experts
    assert wider is not None
    assert wider.params / 3 == pytest.approx(layer.experts.params * 3 / 8, rel=1e-3)
