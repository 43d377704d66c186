"""A found plan for people and for programs: all of it is shown, nothing is wider than promised, nothing is loaded."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console

from holdfast.hardware.cluster import cluster_of
from holdfast.hardware.cluster_file import parse_cluster
from holdfast.hardware.detect import this_machine
from holdfast.planner.goal import Goal
from holdfast.planner.search import Found, search
from holdfast.planner.shapes.load import load_shape
from holdfast.planner.show.facts import as_json
from holdfast.planner.show.formulas import show_formulas
from holdfast.planner.show.page import COLOURS, html
from holdfast.planner.show.pictures import MEMORY, TIME
from holdfast.planner.show.placement_picture import MOST_NODES, alike_nodes, parts_by_node
from holdfast.planner.show.report import memory_parts, show
from holdfast.planner.show.summary import devices_named, runners, stage_runs

SITES = """
nodes:
  - {name: "a & [bold]", gpus: 8xA100-80GB-SXM, site: "<here>", price_per_hour: 12}
  - {name: b, gpus: 8xA100-80GB-SXM, site: there, price_per_hour: 12}
"""
CASES = {
    "dense": ("Llama-3.1-70B", "8xL40S", Goal()),
    "mixed": ("Llama-3.1-70B", "2xH100,4xL40S", Goal(tpot=0.06)),
    "experts on many nodes": ("DeepSeek-V3", "2x8xH100", Goal(concurrency=64)),
    "one device": ("Llama-3.1-8B", "1xL4", Goal()),
    "does not fit": ("Llama-3.1-405B", "8xL4", Goal()),
    "too slow": ("Llama-3.1-8B", "2xL4", Goal(tpot=0.001, concurrency=10)),
    "many stages": ("GPT-3", "16xL4", Goal()),
}


@pytest.fixture(scope="module", params=CASES)
def found(request: pytest.FixtureRequest) -> Found:
    model, cluster, goal = CASES[request.param]
    return search(load_shape(model), cluster_of(cluster), goal)


@pytest.fixture(scope="module")
def two_sites() -> Found:
    return search(load_shape("Llama-3.1-8B"), parse_cluster(SITES), Goal(objective="cost", concurrency=64))


def shown(found: Found, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_report_is_at_most_100_columns_wide_and_names_the_plan(found: Found) -> None:
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 100
    assert found.question.shape.name in text
    assert found.best.candidate.name in text
    assert "Memory of a rank" in text
    if found.best.served:
        assert f"{found.best.concurrency:,} request" in text
        assert "TPOT" in text
    else:
        assert "does not fit" in text


def test_names_of_users_are_no_markup(two_sites: Found) -> None:
    assert "a & [bold]" in shown(two_sites)
    page = html(two_sites)
    assert "<here>" not in page
    assert "&lt;here&gt;" in page


def test_tensor_parallelism_over_sites_is_refused_with_the_arithmetic(two_sites: Found) -> None:
    text = " ".join(shown(two_sites).split())
    assert "2 all-reduces a layer × 32 layers × 10 ms of latency = 640 ms for every token" in text
    assert two_sites.best.cost is not None
    assert "million tokens" in text


def test_cpus_are_said_to_be_unmeasured() -> None:
    cluster = this_machine()
    if any(device.pcie.kind != "shared-memory" for device in cluster.devices):
        pytest.skip("this machine has GPUs")
    text = " ".join(shown(search(load_shape("SmolLM2-135M"), cluster, Goal(concurrency=2))).split())
    assert "No CPU was among these measurements" in text


def test_data_is_json_and_adds_up(found: Found) -> None:
    facts = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert set(facts) == {"model", "cluster", "goal", "problem", "best", "ranking", "better", "judged", "warnings"}
    best = facts["best"]
    assert (facts["problem"] is None) == (found.best.fits and not found.best.misses)
    assert facts["ranking"][0]["name"] == best["name"]
    assert all(plan["why"] for plan in facts["ranking"][1:])
    stages = [stage for replica in best["replicas"] for stage in replica["stages"]]
    devices = [tuple(place) for stage in stages for place in stage["devices"]]
    assert len(devices) == len(set(devices)) == found.best.candidate.num_devices
    for replica in best["replicas"]:
        layers = [stage["layers"] for stage in replica["stages"]]
        assert layers[0][0] == 0
        assert layers[-1][1] == facts["model"]["layers"]
        assert all(before[1] == after[0] for before, after in pairwise(layers))
    if best["tpot"] is not None:
        assert sum(best["token"].values()) == pytest.approx(best["tpot"])
        assert sum(best["first_token"].values()) == pytest.approx(best["ttft"], rel=1e-5)
    for stage, memory in zip(found.best.stages, best["memory"], strict=True):
        parts = sum(size for name, size in memory.items() if name not in ("room_for_kv", "device"))
        assert parts == stage.memory.without_kv == sum(size for _, size in memory_parts(stage.memory))


class Page(HTMLParser):
    """Counts what is open, and keeps what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(found: Found) -> None:
    text = html(found)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loaded == []
    assert "http" not in text
    assert "nan" not in re.findall(r'="(\w+)"', text)
    assert len(text) < 200_000
    assert text.count('class="device"') <= 8 * MOST_NODES * 9


def test_equal_nodes_are_drawn_once() -> None:
    found = search(load_shape("DeepSeek-V3"), cluster_of("6x8xH100"), Goal(concurrency=96))
    cluster = found.question.cluster
    alike = alike_nodes(cluster, parts_by_node(cluster, found.best.candidate))
    assert sum(map(len, alike)) == 6
    assert len(alike) <= 3


def test_every_part_has_a_colour(found: Found) -> None:
    for stage in found.best.stages:
        assert {name for name, _ in memory_parts(stage.memory)} <= set(MEMORY)
    assert max(len(MEMORY), len(TIME)) <= len(COLOURS)


def test_many_equal_stages_are_listed_together() -> None:
    found = search(load_shape("GPT-3"), cluster_of("32xL40S"), Goal())
    deep = next(some for some in found.ranking if len(some.candidate.layers) == 32)
    runs = stage_runs(deep.candidate)
    assert len(runs) == 1
    assert (runs[0].first, runs[0].last, runs[0].layers) == (0, 31, (0, 96))
    assert devices_named(found.question.cluster, runs[0].groups) == "node0 … node3: 0–7"


def test_runners_differ_and_the_best_even_plan_is_among_them() -> None:
    found = search(load_shape("Llama-3.1-70B"), cluster_of("4xA100-40GB-SXM,4xA100-80GB-SXM"), Goal(concurrency=32))
    some = runners(found)
    assert some[0] is found.best
    assert found.best_even in some
    names = [(one.candidate.degrees, one.candidate.is_even, len(one.candidate.replicas)) for one in some]
    assert len(set(names)) >= 6


def test_formulas_are_printed_with_their_sections() -> None:
    found = search(load_shape("Llama-3.1-8B"), cluster_of("2xL4"), Goal(concurrency=4))
    console = Console(file=io.StringIO(), width=100)
    show_formulas(found, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for heading in ("Memory of a rank", "A decoding step", "A step with a prompt", "What users see"):
        assert heading in text
