"""Experts that replicas share out: what is sent there and back, how long it takes, and that it is said."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from holdfast.hardware.cluster import cluster_of
from holdfast.hardware.cluster_file import parse_cluster
from holdfast.planner.all_to_all import all_to_all
from holdfast.planner.coefficients import coefficients
from holdfast.planner.communication import Path, imbalance
from holdfast.planner.estimate import Question, dispatch_path, estimate
from holdfast.planner.goal import Goal
from holdfast.planner.runnable import Runtime
from holdfast.planner.search import Found, candidates, search
from holdfast.planner.shapes.load import load_shape, load_spec
from holdfast.planner.show.breakdown import decode_parts, exchanges
from holdfast.planner.show.formulas import formulas
from holdfast.planner.show.report import show

DEEPSEEK = load_shape("DeepSeek-V3")


@pytest.fixture(scope="module")
def found() -> Found:
    return search(DEEPSEEK, cluster_of("4x8xH100"), Goal(weight_bits=8, concurrency=512))


def test_bytes_by_hand() -> None:
    """16 rows on each of 32 ranks, 8 of 256 experts each, hidden 7,168: a row goes to 32·(1 - (31/32)^8) = 7.18
    ranks, once to each."""
    experts = DEEPSEEK.layers[-1].experts
    assert experts is not None
    one = all_to_all(experts, 7168, 16, tensor=1, ranks=32)
    reached = 32 * (1 - (31 / 32) ** 8)
    assert reached == pytest.approx(7.178, abs=1e-3)
    assert one.imbalance == imbalance(256, 32, 16 * 32 * 8) == pytest.approx(1 + math.sqrt(2 * math.log(32) / 128))
    assert one.message == pytest.approx(16 * reached * 7168 * 2 * one.imbalance)
    assert one.sent == pytest.approx(one.message * 31 / 32)
    halved = all_to_all(experts, 7168, 32, tensor=2, ranks=32)
    assert halved.sent == pytest.approx(one.sent)


def test_what_is_sent_is_in_the_step_and_in_the_report(found: Found) -> None:
    """Large expert models on several nodes are best served so (DeepSeek-V3's own deployment)."""
    best = found.best
    assert best.candidate.shared_experts
    assert best.candidate.expert_ranks == 32
    assert best.candidate.name.endswith("EP32")
    parts = decode_parts(found.question, best)
    sent = [some for some in exchanges(found.question, best) if some.what == "all-to-alls"]
    assert sum(some.times for some in sent) == 2 * sum(layer.experts is not None for layer in DEEPSEEK.layers)
    assert {some.link.name for some in sent} == {"infiniband-ndr"}
    assert all(some.imbalance > 1 for some in sent)
    console = Console(file=io.StringIO(), width=100)
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    assert f"the busiest rank sends {sent[0].imbalance:.2f} times the mean" in console.file.getvalue()
    assert parts["all-to-alls"] == pytest.approx(sum(some.seconds for some in sent))
    assert best.served is not None
    assert sum(parts.values()) + best.served.prompt_wait == pytest.approx(best.served.tpot)
    line = next(line for line in formulas(found) if line.name == "all-to-alls")
    assert line.value == pytest.approx(parts["all-to-alls"])


def test_experts_shared_out_leave_more_room_and_a_slow_network_spoils_it() -> None:
    question = Question.of(DEEPSEEK, cluster_of("2x8xH200"), Goal(weight_bits=8, concurrency=64), coefficients())
    by_name = {some.name: some for some in candidates(question)}
    shared, apart = (estimate(question, by_name[name]) for name in ("TP8 × DP2 × EP16", "TP8 × DP2 × EP8"))
    assert shared.stages[0].memory.expert_weights == pytest.approx(
        apart.stages[0].memory.expert_weights / 2, rel=0.01
    )
    assert shared.kv_tokens > apart.kv_tokens
    slow = parse_cluster(
        "network: {kind: ethernet, bandwidth_gb: 1.25, latency_us: 50}\nnodes: [{gpus: 8xH200, count: 2}]"
    )
    question = Question.of(DEEPSEEK, slow, Goal(weight_bits=8, concurrency=64), coefficients())
    over_ethernet = estimate(question, {some.name: some for some in candidates(question)}["TP8 × DP2 × EP16"])
    assert over_ethernet.served is not None
    assert shared.served is not None
    assert over_ethernet.served.tpot > shared.served.tpot + 2 * 58 * 50e-6


def test_measured_paths_are_taken_only_where_the_links_are_those_of_the_measured_machines() -> None:
    """H100s joined by PCIe alone: what was measured over NVLink is not theirs."""

    def path_of_plan(name: str, nodes: str) -> Path:
        question = Question.of(load_shape("Mixtral-8x7B"), parse_cluster(f"nodes: [{nodes}]"), Goal(), coefficients())
        path = dispatch_path(question, {some.name: some for some in candidates(question)}[name], 0)
        assert path is not None
        return path

    for name in ("TP1 × DP8 × EP8", "TP2 × DP4 × EP8"):
        assert path_of_plan(name, "gpus: 8xH100").source == "measured"
        assert path_of_plan(name, "{gpus: 8xH100, link: pcie5}").source == "pcie5"
        assert path_of_plan(name, "gpus: 8xL40S").source == "measured"
    over_nodes = ["{gpus: 8xH100, count: 2}", "{gpus: 8xH100, count: 2, link: pcie5}"]
    fast, slow = (path_of_plan("TP1 × PP2 × DP8 × EP8", nodes).rate_high for nodes in over_nodes)
    assert slow < fast / 2


def test_no_experts_are_shared_over_sites_or_where_nothing_joins_the_nodes() -> None:
    apart = "nodes: [{gpus: 8xH200, site: a}, {gpus: 8xH200, site: b}]"
    question = Question.of(DEEPSEEK, parse_cluster(apart), Goal(weight_bits=8), coefficients())
    for some in candidates(question):
        if some.shared_experts:
            assert len({node for groups in some.replicas for group in groups for node, _ in group.places}) == 1


def test_the_runtime_refuses_it_by_name() -> None:
    question = Question.of(load_shape("Mixtral-8x7B"), cluster_of("8xH100"), Goal(), coefficients())
    runtime = Runtime(load_spec("Mixtral-8x7B"))
    shared = [some for some in candidates(question) if some.shared_experts]
    assert shared
    assert all(some.expert_ranks <= 8 for some in shared)
    assert {runtime.refuses(question.goal, some) for some in shared} == {"replicas do not share out experts so far"}
