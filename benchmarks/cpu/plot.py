"""The picture of a run: per model, every peer's rate against the best peer's, and where the limit lies."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .verdict import JobVerdict
from .work import OURS, PEERS

COLOURS = {
    "holdfast": "#c0392b",
    "holdfast-int8": "#e59a92",
    "llama.cpp": "#2c3e50",
    "vllm": "#2980b9",
    "transformers": "#a6acaf",
}
LIMIT_COLOUR = "#e67e22"
GROUP_WIDTH = 0.8


def draw(path: Path, verdicts: list[JobVerdict], caption: str) -> None:
    """Write a PNG: one chart per model, a group of bars per job. 1 is the best peer that is not Holdfast."""
    models = list(dict.fromkeys(verdict.model.title for verdict in verdicts))
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(7.5 * columns, 4.2 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axis, title in zip(axes.flat, models, strict=False):
        _chart(axis, title, [verdict for verdict in verdicts if verdict.model.title == title])
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    handles = [Patch(color=COLOURS[peer]) for peer in PEERS]
    limit = Line2D([], [], color=LIMIT_COLOUR, linewidth=2)
    figure.legend(
        [*handles, limit], [*PEERS, "limit of the machine"], loc="outside upper center", ncols=6, frameon=False
    )
    figure.supxlabel(caption, fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _chart(axis: Axes, title: str, verdicts: list[JobVerdict]) -> None:
    peers = [peer for peer in PEERS if any(peer in verdict.figures for verdict in verdicts)]
    width = GROUP_WIDTH / len(peers)
    highest = 1.0
    for group, verdict in enumerate(verdicts):
        rates = {peer: figures.rate for peer, figures in verdict.figures.items()}
        unit = max((rate for peer, rate in rates.items() if peer not in OURS), default=rates.get("holdfast", 1.0))
        limit = verdict.limit_rate / unit
        highest = max(highest, *(rate / unit for rate in rates.values()), min(limit, 4.0))
        for index, peer in enumerate(peers):
            if peer in rates:
                at = group - GROUP_WIDTH / 2 + (index + 0.5) * width
                axis.bar(at, rates[peer] / unit, width * 0.94, color=COLOURS[peer])
                axis.annotate(
                    f"{rates[peer]:.3g}",
                    (at, rates[peer] / unit),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        ends = (group - GROUP_WIDTH / 2 - 0.04, group + GROUP_WIDTH / 2 + 0.04)
        axis.plot(ends, (limit, limit), color=LIMIT_COLOUR, linewidth=2)
        axis.annotate(
            f"{verdict.limit_rate:.3g}",
            (ends[1], limit),
            (0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=LIMIT_COLOUR,
            annotation_clip=True,
        )
    axis.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
    axis.set_ylim(0, highest * 1.12)
    axis.set_xticks(range(len(verdicts)), [_label(verdict) for verdict in verdicts])
    axis.set_title(title, loc="left")
    axis.set_ylabel("rate / best peer's")
    axis.spines[["top", "right"]].set_visible(False)


def _label(verdict: JobVerdict) -> str:
    job = verdict.job
    return f"{job.name}\n{job.num_requests} × ({job.input_len} → {job.output_len})"
