"""Why a plan is not chosen, and what it would take: the sentences name what binds, and what they propose is true."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from holdfast.hardware.cluster import Cluster, cluster_of
from holdfast.planner.coefficients import coefficients
from holdfast.planner.estimate import Estimate, Question, estimate, stages_of
from holdfast.planner.goal import Goal
from holdfast.planner.quantities import of_seconds
from holdfast.planner.search import Found, candidates, search
from holdfast.planner.serving import Replica
from holdfast.planner.shapes.load import load_shape
from holdfast.planner.show.alternatives import fits, larger_clusters, most_requests
from holdfast.planner.show.breakdown import at_concurrency, step_parts
from holdfast.planner.show.explain import weights_read, why
from holdfast.planner.show.levers import faster_by, needed, request_time
from holdfast.planner.show.shortfall import nothing_fits, shortfall
from holdfast.planner.timing import StepBatch

LLAMA = "Llama-3.1-70B"


def found_for(model: str, cluster: str | Cluster, goal: Goal | None = None) -> Found:
    where = cluster_of(cluster) if isinstance(cluster, str) else cluster
    return search(load_shape(model), where, goal or Goal())


def named(found: Found, name: str) -> Estimate:
    return next(some for some in found.ranking if some.candidate.name == name)


def test_tensor_parallelism_over_pcie_is_beaten_by_its_all_reduces() -> None:
    found = found_for(LLAMA, "8xL40S")
    reason = why(found, named(found, "TP8"))
    assert "all-reduces over pcie4 and the link between sockets (16 GB/s per direction)" in reason
    link = re.search(r"needs a link of (\d+) GB/s per direction instead of 16 GB/s", reason)
    assert link is not None
    assert 16 < int(link[1]) < 2000


def test_the_link_that_is_said_to_be_needed_levels_the_plan() -> None:
    found = found_for(LLAMA, "8xL40S")
    question, best = found.question, found.best
    assert best.served is not None
    same = estimate(at_concurrency(question, best.concurrency), named(found, "TP8").candidate)
    target = request_time(best.served, question.goal.output_len)
    factor = needed(question, same, "all-reduces", target)
    assert factor is not None
    assert faster_by(question, same, "all-reduces", factor) <= target
    assert faster_by(question, same, "all-reduces", factor / 1.02) > target


def test_where_latency_is_all_no_bandwidth_is_proposed() -> None:
    goal = Goal(objective="latency", concurrency=4, weight_bits=16)
    found = found_for("DeepSeek-V3", "4x8xA100-80GB", goal)
    reason = why(found, named(found, "TP32"))
    assert "latency alone is" in reason
    assert "no bandwidth of this link would help" in reason


def test_few_ranks_are_beaten_by_the_weights_they_read() -> None:
    found = found_for(LLAMA, "8xH100", Goal(objective="latency", concurrency=1))
    reason = why(found, named(found, "TP1 × PP8"))
    assert "reading weights (137 GB stage after stage)" in reason
    assert "of memory instead of 3.35 TB/s" in reason


def test_experts_of_other_bits_are_counted_in_theirs() -> None:
    """A request alone reads all plain weights in 16 bits, and of each layer the chosen experts in some 4, which
    a B200 reads at another rate."""
    found = found_for("gpt-oss-120b", "1xB200", Goal(concurrency=1))
    shape = found.question.shape
    assert shape.expert_bits < 5 < shape.weight_bits
    plain = sum(count * matrix.params for layer, count in shape.kinds for matrix in layer.matrices)
    experts = [(layer.experts, count) for layer, count in shape.kinds if layer.experts]
    chosen = sum(count * some.num_chosen * some.params_each for some, count in experts)
    expected = (plain * shape.weight_bits + chosen * shape.expert_bits) / 8
    assert weights_read(found.question, named(found, "TP1")) == pytest.approx(expected, rel=1e-6)


def test_products_of_experts_alone_are_all_experts() -> None:
    """On Blackwell too, where an engine's kernels reach less."""
    question = Question.of(load_shape("Mixtral-8x7B"), cluster_of("1xB200"), Goal(), coefficients())
    (candidate, *_) = candidates(question)
    replica = Replica(stages_of(question, candidate), 1, question.known.engines["vllm"], question.known)
    (stage,) = replica.stages
    stage = replace(stage, kinds=tuple((replace(layer, matrices=()), count) for layer, count in stage.kinds))
    parts = step_parts(stage, StepBatch(0, 0, 8192, 4096), replica)
    assert parts["weights"] == pytest.approx(0, abs=parts["experts"] * 1e-6)


def test_little_room_for_kv_is_named() -> None:
    found = found_for(LLAMA, "8xL40S")
    assert "its KV cache has room for" in why(found, named(found, "TP2 × PP2 × DP2"))


def test_gathering_weights_is_named() -> None:
    found = found_for(LLAMA, "8xH100", Goal(concurrency=16))
    assert "gathering other replicas' weights" in why(found, named(found, "TP2 × DP4 × sharded weights"))


def test_stages_are_beaten_by_what_the_scheduler_takes_for_each() -> None:
    found = found_for("Llama-3.1-8B", "8xH100", Goal(objective="cost"))
    assert "no device or link would change that" in why(found, named(found, "TP1 × PP4 × DP2"))


def test_a_broken_limit_says_how_many_requests_would_keep_it() -> None:
    found = found_for(LLAMA, "8xA100-80GB", Goal(tpot=0.05, concurrency=32))
    other = named(found, "TP2 × DP4")
    reason = why(found, other)
    assert re.match(r"TPOT 5[\d.]+ ms is above 50 ms: reading weights \(68\.5 GB a rank\) takes", reason)
    most = most_requests(found.question, other)
    assert f"it would be kept with {most} requests at once" in reason
    assert not estimate(at_concurrency(found.question, most), other.candidate).misses
    assert estimate(at_concurrency(found.question, most + 4), other.candidate).misses


def test_what_does_not_fit_names_the_bytes_and_ways_that_work() -> None:
    found = found_for(LLAMA, "8xL40S")
    other = named(found, "TP2 × DP4")
    reason = why(found, other)
    assert "a rank needs 72.8 GB (weights 70.6 GB" in reason
    assert "weights of 8 bits or devices of 80.8 GB would make it fit" in reason
    asked = Question.of(
        found.question.shape, found.question.cluster, replace(found.question.goal, weight_bits=8), coefficients()
    )
    assert fits(asked, other.candidate)
    assert shortfall(found.question, other)[1] == pytest.approx(29.9e9, rel=0.01)


def test_the_objective_decides_what_is_compared() -> None:
    spare = found_for("Llama-3.1-8B", "8xH100", Goal(objective="spare"))
    assert "tokens/s left when a rank is lost against" in why(spare, named(spare, "TP8"))
    memory = found_for("Llama-3.1-8B", "8xH100", Goal(objective="memory"))
    assert "on the fullest rank before any KV cache" in why(memory, named(memory, "TP1 × DP8"))


def test_kinds_of_devices_left_idle_are_counted() -> None:
    found = found_for(LLAMA, "2xH100,4xL40S", Goal(tpot=0.2))
    alone = next(some for some in found.ranking if some.candidate.num_devices == 2)
    assert "leaves 4 of 6 devices idle" in why(found, alone)


def test_everything_has_a_reason_but_the_best() -> None:
    for cluster, goal in (("8xA100-80GB", Goal(tpot=0.05)), ("2xA100-40GB-SXM,4xA100-80GB-SXM", Goal(concurrency=8))):
        found = found_for(LLAMA, cluster, goal)
        assert why(found, found.best) == ""
        for other in found.ranking[1:15]:
            assert len(why(found, other)) > 20


def test_a_model_too_large_is_told_what_would_hold_it() -> None:
    found = found_for("Llama-3.1-8B", "1xL4", Goal(context=131072))
    sentence = nothing_fits(found)
    assert "13.5 GB more than the 21.3 GB it may use" in sentence
    assert "2 devices (TP2)" in sentence
    context = re.search(r"a context of ([\d,]+) tokens", sentence)
    assert context is not None
    length = int(context[1].replace(",", ""))
    assert found_for("Llama-3.1-8B", "1xL4", Goal(context=length)).best.fits
    assert not found_for("Llama-3.1-8B", "1xL4", Goal(context=length + 16)).best.fits


def test_an_impossible_limit_is_told_what_can_be_reached() -> None:
    found = found_for("Llama-3.1-8B", "8xA100-80GB", Goal(tpot=0.005, concurrency=100))
    sentence = nothing_fits(found)
    assert found.best.served is not None
    assert f"a TPOT of {of_seconds(found.best.served.tpot)} allowed" in sentence
    fewer = re.search(r"with (\d+) requests at once instead of 100", sentence)
    assert fewer is not None
    assert nothing_fits(found_for("Llama-3.1-8B", "8xA100-80GB", Goal(tpot=0.005, concurrency=int(fewer[1])))) == ""


def test_nothing_is_said_where_a_plan_does_it() -> None:
    assert nothing_fits(found_for(LLAMA, "8xA100-80GB")) == ""


def test_larger_clusters_of_several_kinds_are_more_nodes() -> None:
    sizes = [len(cluster.devices) for cluster in larger_clusters(cluster_of("2xH100,4xL40S"))]
    assert sizes[:3] == [12, 24, 48]
    assert [len(cluster.devices) for cluster in larger_clusters(cluster_of("1xL4"))][:3] == [2, 4, 8]
