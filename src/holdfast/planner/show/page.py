"""A found plan as one HTML page that needs nothing else: pictures, the ranking with its reasons, the formulas."""

from __future__ import annotations

from html import escape
from itertools import groupby

from holdfast.planner.estimate import Estimate
from holdfast.planner.quantities import count, of_seconds, percent, requests
from holdfast.planner.search import Found
from holdfast.planner.show.explain import why
from holdfast.planner.show.formulas import formulas
from holdfast.planner.show.pictures import memory_bars, token_bars
from holdfast.planner.show.placement_picture import placement
from holdfast.planner.show.report import model_named
from holdfast.planner.show.shortfall import label, nothing_fits
from holdfast.planner.show.summary import cluster_named, error_band, marked, of_runtime, runners, short_name, warnings

STYLE = """
:root { color-scheme: light dark; --ink: #1c2329; --soft: #5b6670; --paper: #ffffff; --panel: #f3f5f7;
  --edge: #c9d0d6; --fast: #2e8b57; --slow: #c77700; --slowest: #c0392b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --soft: #9aa5ae; --paper: #15191d; --panel: #1f252b;
  --edge: #3b454e; --fast: #57c785; --slow: #f0a73a; --slowest: #ff7b6b; --bad: #ff8a80; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 34px 0 10px; }
p { margin: 6px 0; } .soft, small { color: var(--soft); } .bad { color: var(--bad); font-weight: 600; }
p.slow { color: var(--slow); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 0; }
.tiles div { background: var(--panel); border-radius: 8px; padding: 10px 14px; min-width: 90px; }
.tiles b { display: block; font-size: 21px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg text.small, svg text.kind { fill: var(--soft); } svg text.title { font-weight: 600; font-size: 12px; }
svg text.name { font-size: 12px; } svg text.inside, svg text.number { fill: #14191d; }
svg text.kind { fill: #3a444c; font-size: 9px; }
.node { fill: var(--panel); stroke: var(--edge); } .device { fill: var(--edge); }
.group { fill: none; stroke-width: 2; } .group.unused { stroke: var(--edge); stroke-dasharray: 3 3; }
.group.alone { stroke: none; }
.group.fast { stroke: var(--fast); } .group.slow { stroke: var(--slow); stroke-dasharray: 7 3; }
.group.slowest { stroke: var(--slowest); stroke-dasharray: 3 3; }
.network { stroke: var(--slow); stroke-width: 3; }
.limit { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 4 3; }
svg text.note { fill: var(--soft); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); margin: 6px 0 0; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.legend i.key { background: none; border: 2px solid; } .legend i.fast { border-color: var(--fast); }
.legend i.slow { border: 2px dashed var(--slow); } .legend i.slowest { border: 2px dotted var(--slowest); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--soft); font-size: 13px; }
td { text-align: right; padding: 5px 0 0 12px; white-space: nowrap; } th { padding-left: 12px; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; padding-left: 0; }
tr.why td { color: var(--soft); font-size: 13.5px; padding: 0 0 7px; border-bottom: 1px solid var(--edge);
  white-space: normal; }
td:nth-child(2) { white-space: normal; } td:first-child { padding-right: 8px; }
tr.best td { font-weight: 600; }
details { margin: 8px 0; } summary { cursor: pointer; font-weight: 600; }
dl { margin: 6px 0 12px 16px; font-size: 13.5px; } dt { margin-top: 7px; }
dd { margin: 0 0 0 18px; font-family: ui-monospace, monospace; font-size: 12.5px; overflow-wrap: anywhere; }
"""
COLOURS = (
    "#7aa6d6", "#f2a65a", "#e58a86", "#8cc17f", "#e3cd62", "#b99bd0", "#77c4bf", "#c9a18b", "#f0a9c0", "#b5bcc2",
    "#a5c0e8", "#d9b98f", "#c7e0a0",
)  # fmt: skip
"""Of the parts of bars: light enough for dark letters, on white and on black."""


def html(found: Found) -> str:
    """The page."""
    question, best = found.question, found.best
    name = label(question, best.candidate)
    problem = nothing_fits(found)
    title = "The nearest plan" if problem else "Plan"
    sections = [
        f"<h1>{escape(title)}: {escape(name)}</h1>",
        f"<p>{escape(model_named(question))} on {escape(cluster_named(question.cluster))}</p>",
        f'<p class="soft">{escape(_goal(found))}</p>',
        f'<p class="bad">{escape(problem[0].upper() + problem[1:])}.</p>' if problem else "",
        f'<p class="slow">{escape(said)}</p>' if (said := of_runtime(found)) else "",
        _tiles(found),
        "<h2>Where it lies</h2>",
        placement(question, best),
        "<h2>Memory of a rank</h2>",
        memory_bars(question, best),
    ]
    if best.served is not None:
        sections += ["<h2>A token's time</h2>", token_bars(found)]
    sections += ["<h2>Ranking</h2>", _ranking(found), "<h2>Formulas</h2>", _formulas(found), _notes(found)]
    colours = "".join(f".c{i} {{ fill: {c}; background: {c}; }}" for i, c in enumerate(COLOURS))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{colours}</style></head>\n<body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _goal(found: Found) -> str:
    goal = found.question.goal
    limits = [f"{name} ≤ {of_seconds(limit)}" for name, limit in (("TTFT", goal.ttft), ("TPOT", goal.tpot)) if limit]
    asked = [f"Best {goal.objective}", f"{goal.input_len:,} tokens in", f"{goal.output_len:,} out", *limits]
    if goal.concurrency:
        asked.append(f"{requests(goal.concurrency)} at once")
    return ", ".join([*asked, f"KV cache in {goal.kv_format}"]) + "."


def _tiles(found: Found) -> str:
    question, best = found.question, found.best
    tiles = [(f"{best.kv_tokens:,}", "tokens of KV cache")]
    if served := best.served:
        bands = {metric: f"±{percent(error_band(question, metric))}" for metric in ("tpot", "ttft", "throughput")}
        tiles = [
            (count(best.throughput), f"tokens/s {bands['throughput']}"),
            (of_seconds(served.tpot), f"TPOT {bands['tpot']}"),
            (of_seconds(served.ttft), f"TTFT {bands['ttft']}"),
            (f"{best.concurrency:,}", "requests at once"),
            *tiles,
            (percent(best.spare), "left when a rank is lost"),
        ]
        if best.cost is not None:
            tiles.append((f"{best.cost:.3g}", "for a million tokens"))
    shown = "".join(f"<div><b>{escape(value)}</b><small>{escape(what)}</small></div>" for value, what in tiles)
    return f'<div class="tiles">{shown}</div>'


def _ranking(found: Found) -> str:
    each = "of a device" if found.best.cost is None else "a million tokens"
    head = "".join(
        f"<th>{name}</th>"
        for name in ("", "plan", "at once", "TTFT", "TPOT", "tokens/s", each, "at a loss", "KV tokens")
    )
    rows = "".join(_rank(found, number, some) for number, some in enumerate(runners(found), 1))
    note = (
        f"◆ no other is better in throughput, TPOT, TTFT and what is left at a loss, all at once. "
        f"Plans judged: {len(found.ranking)}."
        f"{' ✗ Holdfast does not run it yet.' if any(map(found.refuses, runners(found))) else ''}"
    )
    return f'<table><tr>{head}</tr>{rows}</table><p class="soft">{note}</p>'


def _rank(found: Found, number: int, some: Estimate) -> str:
    served = some.served
    figures = ["–"] * 5 if served is None else [
        f"{some.concurrency:,}", of_seconds(served.ttft), of_seconds(served.tpot), count(some.throughput),
        count(some.throughput_per_device) if some.cost is None else f"{some.cost:.3g}",
    ]  # fmt: skip
    name = short_name(found.question, some.candidate)
    cells = [marked(found, some, number), name, *figures, percent(some.spare), f"{some.kv_tokens:,}"]
    kind = ' class="best"' if number == 1 else ""
    row = f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    reason = why(found, some)
    return row + f'<tr class="why"><td></td><td colspan="8">{escape(reason)}</td></tr>'


def _formulas(found: Found) -> str:
    sections = []
    for section, lines in groupby(formulas(found), key=lambda line: line.section):
        entries = "".join(
            f"<dt>{escape(line.name)} = {escape(line.formula)}</dt>"
            f"<dd>= {escape(line.numbers)}<br>= <b>{escape(line.result)}</b></dd>"
            for line in lines
        )
        sections.append(f"<details><summary>{escape(section)}</summary><dl>{entries}</dl></details>")
    return "".join(sections)


def _notes(found: Found) -> str:
    said = [*warnings(found), *(f"Assumed: {said}." for said in found.question.cluster.assumptions)]
    return "<h2>Notes</h2>" + "".join(f'<p class="soft">{escape(sentence)}</p>' for sentence in said)
