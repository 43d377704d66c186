"""A found plan for a terminal: what was asked, where everything lies, memory, time, communication, why no other."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from holdfast.planner.estimate import Estimate, Question
from holdfast.planner.memory.ranks import RankMemory
from holdfast.planner.quantities import (
    billions,
    bytes_per_second,
    count,
    of_bytes,
    of_seconds,
    percent,
    requests,
)
from holdfast.planner.search import Found
from holdfast.planner.show.alternatives import longest_context
from holdfast.planner.show.breakdown import exchanges, first_token_parts, parts
from holdfast.planner.show.explain import why
from holdfast.planner.show.shortfall import label, nothing_fits
from holdfast.planner.show.summary import (
    MOST_STAGES,
    alike_replicas,
    cluster_named,
    devices_named,
    error_band,
    marked,
    of_runtime,
    runners,
    short_name,
    stage_runs,
    warnings,
)

WIDTH = 100
"""Columns at most."""


def show(found: Found, console: Console) -> None:
    """Print all of it. Where no plan does what is asked, that is said first, and the nearest one is shown."""
    question, best = found.question, found.best
    width = min(console.width, WIDTH)
    _show_question(found, console, width)
    if sentence := nothing_fits(found):
        _paragraph(console, Text(sentence[0].upper() + sentence[1:] + ".", style="bold red"), width)
    if said := of_runtime(found):
        _paragraph(console, Text(said, style="bold yellow"), width)
    title = "The plan" if not sentence else "The nearest plan"
    _heading(console, f"{title}: {label(question, best.candidate)}")
    _show(console, _placement(question, best))
    _heading(console, "Memory of a rank, GB")
    _show(console, _memory(question, best))
    if best.served is not None:
        _heading(console, f"Time, with {requests(best.concurrency)} at once")
        _show(console, _times(question, best))
        _show_communication(question, best, console)
    _heading(console, "Ranking")
    _show(console, _ranking(found))
    _show_reasons(found, console, width)
    for warning in warnings(found):
        _paragraph(console, Text(warning, style="dim"), width)


def _heading(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"), soft_wrap=True)


def _show(console: Console, what: RenderableType) -> None:
    console.print(Padding(what, (0, 0, 0, 2), expand=False), width=min(console.width, WIDTH))


def _paragraph(console: Console, text: Text, width: int) -> None:
    console.print()
    console.print(text, width=width)


def _table(*columns: str, left: int = 1) -> Table:
    """The first `left` columns hold words, the others numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


# --- what was asked ---


def _show_question(found: Found, console: Console, width: int) -> None:
    goal, cluster = found.question.goal, found.question.cluster
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row("model", Text(model_named(found.question)))
    facts.add_row("devices", cluster_named(cluster))
    limits = [f"{name} ≤ {of_seconds(limit)}" for name, limit in (("TTFT", goal.ttft), ("TPOT", goal.tpot)) if limit]
    together = f"{requests(goal.concurrency)} at once" if goal.concurrency else "as many at once as serve best"
    lengths = f"{goal.input_len:,} tokens in, {goal.output_len:,} out, sequences of up to {goal.longest:,}"
    facts.add_row("goal", "; ".join([f"best {goal.objective}", lengths, together, *limits]))
    facts.add_row("KV cache", goal.kv_format)
    if cluster.assumptions:
        facts.add_row("assumed", Text("\n".join(cluster.assumptions)))
    console.print(facts, width=width)


def model_named(question: Question) -> str:
    """Name, parameters, layers, bits."""
    shape = question.shape
    active = f" ({billions(shape.active_params)} for a token)" if shape.active_params < 0.9 * shape.params else ""
    bits = f"{shape.weight_bits:.3g}"
    if shape.expert_bits != shape.weight_bits:
        bits += f" (experts {shape.expert_bits:.3g})"
    parameters = f"{billions(shape.params)} parameters{active}"
    return f"{shape.name}: {parameters}, {shape.num_layers} layers, weights of {bits} bits"


def _placement(question: Question, best: Estimate) -> Table:
    table = _table("replicas", "stage", "layers", "ranks", "devices", "joined by", left=6)
    for replica, number in alike_replicas(best.candidate):
        which = str(replica) if number == 1 else f"{number}, as {replica}"
        for run in stage_runs(best.candidate, replica):
            group = run.groups[0]
            where = escape(f"{group.device.name}, {devices_named(question.cluster, run.groups)}")
            link = group.slowest_link
            joined = f"{link.name}, {bytes_per_second(link.bandwidth)}" if group.degree > 1 else "–"
            table.add_row(which, run.name, run.layer_range, str(group.degree), where, joined)
            which = ""
    return table


# --- memory ---


def memory_parts(memory: RankMemory) -> list[tuple[str, int]]:
    """(what, bytes) of a rank without its KV cache, in order, those that are there."""
    named = [
        ("attention", memory.attention_weights),
        ("MLP", memory.mlp_weights),
        ("experts", memory.expert_weights),
        ("embeddings, norms", memory.embedding_weights + memory.other_weights),
        ("gathered", memory.gathered_weights),
        ("activations", memory.activations + memory.logits),
        ("buffers", memory.communication),
        ("reserve", memory.reserve),
    ]
    return [(name, size) for name, size in named if size]


def _memory(question: Question, best: Estimate) -> Table:
    """Each kind of stage once: a column; what its ranks hold: rows."""
    runs = stage_runs(best.candidate)[:MOST_STAGES]
    stages = [best.stages[run.first] for run in runs]
    table = _table("", *(f"stage {run.name}" if len(best.stages) > 1 else "each rank" for run in runs))
    names = dict.fromkeys(name for stage in stages for name, _ in memory_parts(stage.memory))
    sizes = [dict(memory_parts(stage.memory)) for stage in stages]
    for name in names:
        table.add_row(name, *(f"{some.get(name, 0) / 1e9:.2f}" for some in sizes))
    table.add_row("room for KV", *(f"{stage.kv_room / 1e9:.2f}" for stage in stages), style="bold")
    table.add_row("device", *(f"{stage.device_bytes / 1e9:.2f}" for stage in stages), style="dim")
    context = longest_context(question, best)
    table.add_row("tokens, all layers", f"{best.kv_tokens:,}")
    table.add_row("longest context", f"{context:,}")
    return table


# --- time ---


def _times(question: Question, best: Estimate) -> Table:
    """A token, the first token and the rates side by side."""
    served = best.served
    assert served is not None
    token = _of_total(parts(question, best), "TPOT", served.tpot, error_band(question, "tpot"))
    first = _of_total(first_token_parts(question, best), "TTFT", served.ttft, error_band(question, "ttft"))
    rates = _table("all requests", "")
    rates.add_row(
        "tokens/s", f"{count(best.throughput)} ±{percent(error_band(question, 'throughput'))}", style="bold"
    )
    rates.add_row("of a device", count(best.throughput_per_device))
    rates.add_row("run at once", count(served.running * len(best.candidate.replicas)))
    rates.add_row("left at a loss", percent(best.spare))
    if best.cost is not None:
        rates.add_row("million tokens", f"{best.cost:.3g}")
    side = Table.grid(padding=(0, 2, 0, 0))
    side.add_row(token, first, rates)
    return side


def _of_total(named: list[tuple[str, float]], total: str, seconds: float, band: float) -> Table:
    table = _table("a token" if total == "TPOT" else "the first token", "", "")
    for name, time in named:
        table.add_row(name, of_seconds(time), percent(time / seconds))
    table.add_row(total, of_seconds(seconds), f"±{percent(band)}", style="bold")
    return table


def _show_communication(question: Question, best: Estimate, console: Console) -> None:
    sent = exchanges(question, best)
    if not sent:
        return
    _heading(console, "Communication in a decoding step")
    table = _table("stage", "what", "over", "times", "message", "each rank sends", "takes", "latency", left=3)
    seen: set[tuple[object, ...]] = set()
    for exchange in sent:
        alike = (exchange.what, exchange.link, exchange.times, exchange.ranks, exchange.sent)
        if alike in seen and len(best.stages) > MOST_STAGES:
            continue
        seen.add(alike)
        table.add_row(
            str(exchange.stage), exchange.what, exchange.link.name, f"{exchange.times:g}", of_bytes(exchange.message),
            of_bytes(exchange.sent), of_seconds(exchange.seconds), percent(exchange.latency / exchange.seconds),
        )  # fmt: skip
    _show(console, table)
    busiest = max(exchange.imbalance for exchange in sent)
    if busiest > 1:
        said = f"  all-to-alls: there and back in every layer; the busiest rank sends {busiest:.2f} times the mean."
        console.print(Text(said, style="dim"))


# --- the others ---


def _ranking(found: Found) -> Table:
    priced = found.best.cost is not None
    each = "M tokens" if priced else "a device"
    table = _table("", "plan", "at once", "TTFT", "TPOT", "tokens/s", each, "left", "KV tokens", left=2)
    for number, some in enumerate(runners(found), 1):
        served = some.served
        figures = ["–"] * 5 if served is None else [
            f"{some.concurrency:,}", of_seconds(served.ttft), of_seconds(served.tpot), count(some.throughput),
            count(some.throughput_per_device) if some.cost is None else f"{some.cost:.3g}",
        ]  # fmt: skip
        style = "bold" if number == 1 else "dim" if not some.fits or some.misses else ""
        name = short_name(found.question, some.candidate)
        table.add_row(
            marked(found, some, number), name, *figures, percent(some.spare), f"{some.kv_tokens:,}", style=style
        )
    return table


def _show_reasons(found: Found, console: Console, width: int) -> None:
    rest = len(found.ranking) - len(runners(found))
    console.print(
        Text(
            f"  ◆ no other is better in throughput, TPOT, TTFT and what is left when a rank is lost, all at once "
            f"({len(found.pareto)} of {len(found.ranking)}).{f' {rest} more were judged.' if rest > 0 else ''}"
            f"{' ✗ Holdfast does not run it yet.' if any(map(found.refuses, runners(found))) else ''}",
            style="dim",
        ),
        width=width,
    )
    reasons = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
    for number, some in enumerate(runners(found), 1):
        if reason := why(found, some):
            reasons.add_row(str(number), Text(f"{label(found.question, some.candidate)}: {reason}"))
    if reasons.row_count:
        _heading(console, "Why not the others")
        console.print(reasons, width=width)
