"""Draws a run: how latencies are distributed, and how latency and throughput went over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from holdfast.bench.config import BenchConfig
from holdfast.bench.load import Run
from holdfast.bench.measure import Summary, throughput_over_time


def write_plot(path: str, run: Run, summary: Summary, config: BenchConfig) -> None:
    """A PNG with four panels."""
    ok = [outcome for outcome in run.outcomes if outcome.ok]
    limits = config.report.limits()
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (ttft, tpot), (latency, throughput) = figure.subplots(2, 2)
    figure.suptitle(
        f"{run.model}: {summary.ok} requests ok, {summary.failed} failed, {summary.output_rate:.0f} output tokens/s",
        parse_math=False,
    )
    _cumulative(ttft, [o.ttft for o in ok if o.ttft is not None], "TTFT", limits.get("ttft"))
    _cumulative(tpot, [o.tpot for o in ok if o.tpot is not None], "TPOT", limits.get("tpot"))

    started = [outcome.started for outcome in ok]
    latency.scatter(started, [o.e2el for o in ok], s=10, alpha=0.7, label="end to end")
    latency.scatter(started, [np.nan if o.ttft is None else o.ttft for o in ok], s=10, alpha=0.7, label="TTFT")
    failed = [outcome for outcome in run.outcomes if not outcome.ok]
    if failed:
        latency.scatter(
            [o.started for o in failed], [o.e2el for o in failed], s=24, marker="x", color="red", label="failed"
        )
    latency.set(title="Latency over time", xlabel="request sent, s", ylabel="s")
    if run.outcomes:
        latency.set_yscale("log")  # which has no place for nothing
    latency.legend()

    width = max(1.0, run.duration / 60) if run.duration > 10 else max(run.duration / 20, 1e-3)
    rates = throughput_over_time(ok, width)
    edges = np.arange(len(rates) + 1) * width
    throughput.stairs(rates, edges, fill=True, alpha=0.6)
    throughput.axhline(summary.output_rate, color="black", linewidth=1, linestyle="--", label="mean")
    throughput.set(title="Output tokens over time", xlabel="s", ylabel="tokens/s")
    throughput.legend(loc="lower right")
    for panel in (ttft, tpot, latency, throughput):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _cumulative(panel: Any, seconds: Sequence[float], name: str, limit: float | None) -> None:
    """Share of requests at or below each latency, with the limit if there is one."""
    if seconds:
        panel.ecdf([1000 * value for value in seconds])
    if limit is not None:
        panel.axvline(1000 * limit, color="red", linewidth=1, linestyle="--", label=f"limit {1000 * limit:g} ms")
        panel.legend(loc="lower right")
    panel.set(title=f"{name}, cumulative", xlabel="ms", ylabel="share of requests", ylim=(0, 1.02))
