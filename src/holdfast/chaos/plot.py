"""The timeline of a run: what was served, and when things died and went on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from holdfast.chaos.config import FAULTS
from holdfast.chaos.report import Report


def timeline(report: Report, path: Path) -> None:
    """A PNG with three panels: text served over time, with faults as spans until all is whole again; how long each
    took to be noticed, to get the first request going on, and to be whole; and the moments at which they struck."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    served, delays, moments = figure.subplots(3, 1, sharex=True)
    colours = {kind: colormaps["turbo"](index / len(FAULTS)) for index, kind in enumerate(FAULTS)}
    ends = [at for at, _ in report.load.tokens_at] + [fault.at for fault in report.faults]
    begin = min(ends, default=0.0)
    seconds = np.array([at - begin for at, _ in report.load.tokens_at])
    edges = np.arange(0, (seconds.max() if len(seconds) else 0) + 2)
    counts, _ = np.histogram(seconds, edges, weights=[count for _, count in report.load.tokens_at])
    served.stairs(counts, edges, fill=True, alpha=0.6)
    labelled = set()
    for fault in report.faults:
        label = None if fault.kind in labelled else fault.kind
        labelled.add(fault.kind)
        until = fault.whole_again or fault.at
        served.axvspan(fault.at - begin, until - begin, color=colours[fault.kind], alpha=0.25, label=label)
    good = "every reply as undisturbed" if not report.load.wrong else f"{len(report.load.wrong)} replies wrong"
    served.set(title=f"{len(report.faults)} faults, {report.load.num_done} requests: {good}", ylabel="characters/s")
    seen = [(fault.at, fault.detected) for fault in report.faults if fault.detected is not None]
    gone_on = [(fault.at, min(times)) for fault in report.faults if (times := fault.after("first_token"))]
    points_by_name = (
        ("noticed", "v", seen),
        ("first request goes on", "o", gone_on),
        ("whole again", "s", [(f.at, f.whole_again - f.at) for f in report.faults if f.whole_again is not None]),
    )
    for name, marker, points in points_by_name:
        times = [at - begin for at, _ in points]
        delays.scatter(times, [delay for _, delay in points], s=18, marker=marker, alpha=0.7, label=name)
    delays.set(ylabel="s after the fault")
    for fault in report.faults:
        colour = colours[fault.kind]
        moments.scatter(fault.at - begin, fault.phase, color=colour if fault.in_phase else "none", edgecolors=colour)
    moments.set(xlabel="s", ylabel="moment (hollow: missed)")
    if report.faults:
        delays.set_yscale("log")
        figure.legend(loc="outside right upper")
    for panel in (served, delays, moments):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
