"""The tables a run prints."""

from __future__ import annotations

from statistics import median

from rich.console import Console
from rich.table import Table

from ..limits import Limits
from .contest import ModelResult
from .exactness import GOAL_COST, GOAL_ROWS, ExactnessResult
from .quiet import ENOUGH
from .service import ServiceResult
from .verdict import Figures, JobVerdict
from .work import HTTP_GOAL_LOSS, PEERS, READY_GOAL_SECONDS

COLUMNS = ("job", "", "s", "tok/s", "Holdfast", "of limit", "prefill tok/s", "decode tok/s", "Holdfast", "spread")


def print_model(console: Console, result: ModelResult, verdicts: list[JobVerdict]) -> None:
    """A table of one model: a row per job and peer, one for the limit, and the goal."""
    table = Table(title=f"{result.model.title}: whole jobs, prefill included", title_justify="left")
    for index, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for verdict in verdicts:
        job = verdict.job
        heads = [job.name, f"{job.num_requests} × ({job.input_len} → {job.output_len})"]
        for peer in PEERS:
            if peer in verdict.figures:
                table.add_row(heads.pop(0) if heads else "", peer, *_cells(verdict, peer, verdict.figures[peer]))
        table.add_row(
            heads.pop(0) if heads else "", "limit", f"{verdict.limit_seconds:.3f}", f"{verdict.limit_rate:.1f}"
        )
        table.add_section()
    console.print(table)
    for verdict in verdicts:
        if verdict.goal:
            console.print(f"goal for {verdict.job.name}: {_goal(verdict)}", highlight=False)
    for peer, how in result.how.items():
        versions = ", ".join(f"{name} {version}" for name, version in result.versions[peer].items())
        console.print(f"{peer}: {how} ({versions})", highlight=False)
    if len(result.greetings) > 1:
        console.print(_agreement(result.greetings), highlight=False)
    worst = max((f.others for verdict in verdicts for f in verdict.figures.values()), default=0.0)
    if worst > ENOUGH:
        console.print(f"[yellow]disturbed:[/] other processes used up to {worst:.1f} cores", highlight=False)
    for problem in result.problems:
        console.print(f"[red]left out:[/] {problem}", highlight=False)


def _cells(verdict: JobVerdict, peer: str, figures: Figures) -> list[str]:
    ratio, decode_ratio = (verdict.ratio(peer), verdict.decode_ratio(peer)) if peer != "holdfast" else (None, None)
    return [
        f"{figures.seconds:.3f}",
        f"{figures.rate:.1f}",
        f"{ratio:.2f}×" if ratio else "",
        f"{figures.limit_share:.0%}",
        f"{figures.prefill_rate:.0f}",
        f"{figures.decode_rate:.1f}" if figures.decode_rate else "",
        f"{decode_ratio:.2f}×" if decode_ratio else "",
        f"{figures.spread:.0%}",
    ]


def _goal(verdict: JobVerdict) -> str:
    words = {True: "[green]met[/]", False: "[red]NOT met[/]", None: "cannot be told"}
    seen = f", is {verdict.goal_ratio:.2f}×" if verdict.goal_ratio else ""
    if verdict.goal and verdict.goal.share and "holdfast" in verdict.figures:
        seen += f" and {verdict.figures['holdfast'].limit_share:.0%}"
    return f"{verdict.goal}{seen}: {words[verdict.goal_met]}"


def _agreement(greetings: dict[str, list[int]]) -> str:
    """How far the peers' greedy tokens agree with Holdfast's."""
    own = greetings.get("holdfast", [])
    parts = []
    for peer, tokens in greetings.items():
        if peer != "holdfast" and tokens:
            same = next((i for i, pair in enumerate(zip(own, tokens, strict=False)) if pair[0] != pair[1]), len(own))
            parts.append(f"{peer} {same} of {len(own)}")
    return f"greedy tokens after a real prompt that are Holdfast's too: {', '.join(parts)}"


def print_limits(console: Console, limits: Limits) -> None:
    console.print(
        f"limit, the best seen: {limits.read_bytes_per_second / 1e9:.1f} GB/s read, "
        f"{limits.bf16_flop_per_second / 1e9:.0f} GFLOP/s in bf16; shares are of what it did right before and after",
        highlight=False,
    )


def print_extra(console: Console, result: ServiceResult | ExactnessResult) -> None:
    """What is measured beside the contest."""
    if isinstance(result, ServiceResult):
        _print_service(console, result)
    else:
        _print_exactness(console, result)


def _print_service(console: Console, result: ServiceResult) -> None:
    """Start to ready, and HTTP against the bare engine."""
    table = Table(title="Serving", title_justify="left")
    for heading in ("", "median", "rounds", "goal", ""):
        table.add_column(heading)
    for name, seconds in result.ready.items():
        met = _met(median(seconds) <= READY_GOAL_SECONDS) if name == "holdfast" else ""
        goal = f"≤ {READY_GOAL_SECONDS:g} s" if name == "holdfast" else ""
        table.add_row(f"start to ready, {name}", f"{median(seconds):.2f} s", _list(seconds), goal, met)
    for model, found in result.http.items():
        for path, seconds in found.items():
            table.add_row(f"32 requests, {path}, {model}", f"{median(seconds):.3f} s", _list(seconds))
        loss = result.http_loss(model)
        table.add_row(
            f"lost by HTTP, {model}", f"{loss:.1%}", "", f"≤ {HTTP_GOAL_LOSS:.0%}", _met(loss <= HTTP_GOAL_LOSS)
        )
    console.print(table)
    for problem in result.problems:
        console.print(f"[red]left out:[/] {problem}", highlight=False)


def _print_exactness(console: Console, result: ExactnessResult) -> None:
    """Our products against oneDNN's, all of a Llama-1B step."""
    table = Table(title="What exactness costs: all products of a Llama-1B step", title_justify="left")
    for heading in ("rows", "exact, s", "oneDNN prepacked, s", "cost", "goal", ""):
        table.add_column(heading, justify="right")
    for rows, seconds in result.exact.items():
        cost = result.cost(rows)
        goal = (f"≤ {GOAL_COST:.0%}", _met(cost <= GOAL_COST)) if rows in GOAL_ROWS else ("", "")
        cells = (f"{median(seconds):.4f}", f"{median(result.onednn[rows]):.4f}", f"{cost:+.1%}")
        table.add_row(str(rows), *cells, *goal)
    console.print(table)


def _met(good: bool) -> str:
    return "met" if good else "NOT met"


def _list(seconds: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in seconds)
