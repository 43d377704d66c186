"""Pictures of a plan as inline SVG: where it lies, what fills the memory, where a token's time goes.

Colours are classes and variables of the page's style sheet (`page.STYLE`), so that they follow light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from holdfast.planner.estimate import Estimate, Question
from holdfast.planner.quantities import of_bytes, of_seconds
from holdfast.planner.search import Found
from holdfast.planner.show.breakdown import parts
from holdfast.planner.show.report import memory_parts
from holdfast.planner.show.summary import runners, short_name, stage_runs

WIDTH = 1000
LABELS = 235
"""Pixels for the names of bars."""
CHARACTER = 7.4
"""Pixels of a letter, about: what has no room is left to the tooltip."""
CLIPPED = 4.0
"""Bars end at so many times the best one's."""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, kind: str, *, style: str = "", hint: str = "") -> str:
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" class="{kind}" '
        f'style="{style}" rx="3">{title}</rect>'
    )


def svg(height: float, body: Sequence[str], label: str) -> str:
    """A picture as wide as the page, at most `WIDTH`."""
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'


# --- stacked bars ---


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    segments: tuple[tuple[str, float], ...]
    """(what, how much)."""
    note: str
    """Behind the bar."""


MEMORY = (
    "attention", "MLP", "experts", "embeddings, norms", "gathered", "activations", "buffers", "reserve", "KV cache",
    "not used",
)  # fmt: skip
TIME = (
    "weights", "experts", "attention", "activations", "all-reduces", "gathered weights", "pipeline hops",
    "all-to-alls", "layer overhead", "logits", "scheduler", "others' prompts",
)  # fmt: skip
"""In the order of the colours: a thing has the same one in every picture."""


def stacked(bars: Sequence[Bar], names: tuple[str, ...], most: float, label: str, limit: float | None = None) -> str:
    """Bars below each other, to one scale of which `most` fills the width; `limit`: a line across them."""
    scale = (WIDTH - LABELS - 145) / most
    body, y = [], 6.0
    if limit is not None and limit < most:
        x = LABELS + limit * scale
        end = y + 31 * len(bars) - 4
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{end + 10:.1f}" class="limit"/>')
        body.append(text(x + 4, end + 12, "limit", "small"))
    for bar in bars:
        body.append(text(LABELS - 10, y + 16, _cut(bar.name, LABELS - 30), "name", "end"))
        x, end = float(LABELS), LABELS + most * scale
        for what, size in bar.segments:
            width = min(size * scale, end - x)
            if width <= 0:
                break
            body.append(rectangle(x, y, width, 23, f"c{names.index(what)}", hint=f"{bar.name}: {what}"))
            if width > len(what) * CHARACTER + 4:
                body.append(text(x + width / 2, y + 16, what, "inside", "middle"))
            x += width
        total = sum(size for _, size in bar.segments)
        more = "» " if total > most * 1.001 else ""
        body.append(text(x + 6, y + 16, more + bar.note, "note"))
        y += 31
    there = [name for name in names if any(what == name for bar in bars for what, _ in bar.segments)]
    return svg(y + (16 if limit else 2), body, label) + _legend({name: names.index(name) for name in there})


def _legend(colours: dict[str, int]) -> str:
    entries = "".join(f'<span><i class="c{index}"></i>{escape(what)}</span>' for what, index in colours.items())
    return f'<div class="legend">{entries}</div>'


def _cut(words: str, pixels: float) -> str:
    most = int(pixels / CHARACTER)
    return words if len(words) <= most else words[: most - 1] + "…"


def memory_bars(question: Question, best: Estimate) -> str:
    """What fills a rank of each kind of stage."""
    bars = []
    for run in stage_runs(best.candidate):
        stage = best.stages[run.first]
        held = memory_parts(stage.memory)
        needed = sum(size for _, size in held)
        room = max(stage.kv_room, 0)
        left = max(stage.device_bytes - needed - room, 0)
        segments = [(name, size) for name, size in [*held, ("KV cache", room), ("not used", left)] if size]
        name = f"stage {run.name}, layers {run.layer_range}" if len(best.stages) > 1 else "each rank"
        size = of_bytes(stage.device_bytes)
        note = f"of {size}" if needed <= stage.device_bytes else f"{of_bytes(needed)}, not {size}"
        bars.append(Bar(name, tuple(segments), note))
    most = max(sum(size for _, size in bar.segments) for bar in bars)
    return stacked(bars, MEMORY, most, "Memory of a rank of each stage")


def token_bars(found: Found) -> str:
    """A token's time by what takes it, of the best plan and the runners-up."""
    bars = []
    for some in runners(found):
        if some.served is not None:
            named = tuple(parts(found.question, some))
            bars.append(Bar(short_name(found.question, some.candidate), named, of_seconds(some.served.tpot)))
    if not bars:
        return ""
    totals = [sum(size for _, size in bar.segments) for bar in bars]
    most = min(max(totals), totals[0] * CLIPPED)
    return stacked(bars, TIME, most, "A token's time by what takes it", found.question.goal.tpot)
