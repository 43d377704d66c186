"""`holdfast plan`: from its flags to a report and a plan file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from holdfast.core.errors import ConfigError
from holdfast.hardware.cluster import Cluster, cluster_of
from holdfast.hardware.cluster_file import read_cluster
from holdfast.hardware.detect import this_machine
from holdfast.hardware.profile import default_path, read_profile, with_profile
from holdfast.planner import emit
from holdfast.planner.config import PlanConfig
from holdfast.planner.goal import Goal
from holdfast.planner.runnable import nodes_of
from holdfast.planner.search import Found, search
from holdfast.planner.shapes.load import load_shape, runtime_of
from holdfast.planner.show import page, report
from holdfast.planner.show.facts import as_json
from holdfast.planner.show.formulas import show_formulas


def run(model: str, config: PlanConfig) -> int:
    """Exit code: 0 when there is a plan that fits and keeps the limits, 1 when there is none."""
    shape, goal = load_shape(model), goal_of(config)
    if goal.longest > shape.max_context:
        asked = (
            f"--context {goal.context}"
            if goal.context
            else f"--input-len {goal.input_len} and --output-len {goal.output_len}"
        )
        raise ConfigError(f"{asked}: {shape.name} knows {shape.max_context} tokens at most")
    found = search(shape, cluster_from(config), goal, runtime=runtime_of(model))
    chosen = found.best_that_runs
    if config.out.output is not None and chosen is not None:
        found = found.choosing(chosen)  # what is shown is what is written
    good = found.best.served is not None and not found.best.misses
    console = Console(width=100 if not sys.stdout.isatty() else None)
    if config.out.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        report.show(found, console)
        if config.out.explain and found.best.served is not None:
            show_formulas(found, console)
    if config.out.html is not None:
        _write(Path(config.out.html), page.html(found), "--html")
    if config.out.output is not None:
        _write_plan(model, found, Path(config.out.output))
    return 0 if good else 1


def cluster_from(config: PlanConfig) -> Cluster:
    if config.where.cluster is not None:
        cluster = read_cluster(config.where.cluster)
        unpriced = [node.name for node in cluster.nodes if node.price_per_hour is None]
        if config.what.objective == "cost" and unpriced:
            raise ConfigError(f"--objective cost: node {unpriced[0]} of --cluster has no price_per_hour")
        return cluster
    if config.where.gpus is not None:
        try:
            return cluster_of(config.where.gpus)
        except ConfigError as error:
            raise ConfigError(f"--gpus: {error}") from error
    machine, profile = this_machine(), default_path()
    return with_profile(machine, read_profile(profile)) if profile.exists() else machine


def goal_of(config: PlanConfig) -> Goal:
    what = config.what
    return Goal(
        objective=what.objective,
        input_len=what.input_len,
        output_len=what.output_len,
        concurrency=what.concurrency,
        ttft=None if what.ttft is None else what.ttft / 1e3,
        tpot=None if what.tpot is None else what.tpot / 1e3,
        context=what.context,
        weight_bits=what.weight_bits,
        kv_format="bfloat16" if what.kv_cache_dtype == "auto" else what.kv_cache_dtype,
        engine=what.engine,
    )


def _write_plan(model: str, found: Found, file: Path) -> None:
    """Of the best that fits and that the runtime runs."""
    best, runtime = found.best, found.runtime
    assert runtime is not None
    if best.served is None:
        raise ConfigError(f"--output {file}: no plan fits, so none is written")
    if reason := found.refuses(best):
        raise ConfigError(f"--output {file}: Holdfast runs none of these plans yet, so none is written: {reason}")
    assert runtime.spec is not None
    plan = emit.plan_of(runtime.spec, best)
    _write(file, msgspec.json.format(msgspec.json.encode(plan), indent=1).decode(), "--output")
    (number,) = nodes_of(best.candidate)
    cluster = found.question.cluster
    where = f" on {cluster.nodes[number].name}" if len(cluster.nodes) > 1 else ""
    print(f"the plan is in {file}; holdfast serve {model} --plan {file} runs it{where}", file=sys.stderr)
    if bits := found.question.goal.weight_bits:
        print(f"it is reckoned with weights of {bits:g} bits: serve a checkpoint that has them", file=sys.stderr)


def _write(file: Path, text: str, flag: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {file}: cannot be written: {error.strerror}") from error
