"""Tables of how far predictions are from measurements, and of what they would have chosen."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from holdfast.planner.coefficients import Coefficients
from holdfast.planner.estimate import MARGIN
from holdfast.planner.rows.predict import predict

LIMITS_MS = (10, 15, 20, 30, 50)
Row = Mapping[str, str]


@dataclass(frozen=True)
class Judged:
    """One row with what was predicted for it."""

    row: Row
    kind: str
    value: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.value - 1

    @property
    def source(self) -> str:
        """Short: who published it, and the engine or series where one publisher has several."""
        text = self.row["source"]
        series = re.search(r"\[(.*?)[;\]]", text)
        name = re.sub(r"^https?://", "", text).split()[0].rstrip(",;")
        name = "/".join(name.split("/")[:2])
        return f"{name} [{series[1]}]" if series and "aiconfigurator" in name else name


def judge(rows: Iterable[Row], known: Coefficients) -> tuple[list[Judged], dict[str, int]]:
    """Predictions of those that can be made, and how often each reason stood against one."""
    judged, refused = [], defaultdict(int)
    for row in rows:
        prediction = predict(row, known)
        if prediction.value is None:
            refused[prediction.note] += 1
        elif prediction.kind not in {"collective", "out_of_memory"}:
            judged.append(Judged(row, prediction.kind, float(row["value"]), prediction.value))
    return judged, dict(refused)


def figures(errors: Iterable[float]) -> tuple[int, float, float, float, float]:
    """How many; mean, median, 90th percentile of the absolute errors and the median of the signed, in per cent."""
    signed = 100 * np.array(list(errors))
    size = np.abs(signed)
    return (
        len(size),
        float(size.mean()),
        float(np.median(size)),
        float(np.quantile(size, 0.9)),
        float(np.median(signed)),
    )


def print_errors(
    console: Console, title: str, groups: Mapping[tuple[str, ...], list[float]], names: tuple[str, ...]
) -> None:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name)
    for name in ("rows", "mean %", "median %", "90th %", "bias %"):
        table.add_column(name, justify="right")
    for key, errors in sorted(groups.items()):
        count, mean, median, tail, bias = figures(errors)
        table.add_row(*key, str(count), f"{mean:.1f}", f"{median:.1f}", f"{tail:.1f}", f"{bias:+.1f}")
    console.print(table)


def group_errors(judged: Iterable[Judged], *, by_device: bool) -> dict[tuple[str, ...], list[float]]:
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in judged:
        key = (one.kind, one.source, one.row["gpu"]) if by_device else (one.kind, "all", "")
        groups[key].append(one.error)
    return groups


def print_worst(console: Console, judged: list[Judged], count: int = 10) -> None:
    table = Table(title=f"the {count} furthest off", title_justify="left")
    for name in ("kind", "source", "model", "gpu", "tp×pp", "batch", "in/out", "measured", "predicted"):
        table.add_column(name)
    for one in sorted(judged, key=lambda one: -abs(math.log(one.predicted / one.value)))[:count]:
        row = one.row
        table.add_row(
            one.kind, one.source, row["model"].split("/")[-1], row["gpu"], f"{row['tp']}×{row['pp']}", row["batch"],
            f"{row['input_len']}/{row['output_len']}", f"{one.value:.4g}", f"{one.predicted:.4g}",
        )  # fmt: skip
    console.print(table)


@dataclass(frozen=True)
class Pick:
    """What was chosen in one scenario under one limit."""

    exact: bool
    regret: float
    """Of the throughput per device that the best measured choice has; below 0 for one that breaks the limit."""
    broken: bool
    """The choice's measured TPOT is above the limit."""


def scenarios(judged: Iterable[Judged]) -> dict[tuple[str, ...], list[Judged]]:
    """Rows of TPOT that differ in TP degree and requests at once only, where there are several."""
    groups: dict[tuple[str, ...], list[Judged]] = defaultdict(list)
    for one in judged:
        if one.kind == "tpot" and one.row["batch"]:
            row = one.row
            groups[row["source"], row["model"], row["gpu"], row["dtype"], row["input_len"], row["output_len"]].append(
                one
            )
    return {key: group for key, group in groups.items() if len(group) >= 3}


def picks(groups: Mapping[tuple[str, ...], list[Judged]], limit: float, margin: float = MARGIN) -> list[Pick]:
    """For each scenario that has a measured answer, what `holdfast plan` chooses against the truth: of the rows whose
    predicted TPOT, times `margin`, is within `limit` (ms) the one of the highest predicted tokens per second and
    device; the quickest where none is."""

    def rate(one: Judged, tpot: float) -> float:
        return float(one.row["batch"]) / tpot / int(one.row["n_gpus"] or 1)

    chosen = []
    for group in groups.values():
        possible = [one for one in group if one.value <= limit]
        if not possible:
            continue
        best = max(possible, key=lambda one: rate(one, one.value))
        allowed = [one for one in group if one.predicted * margin <= limit]
        if allowed:
            pick = max(allowed, key=lambda one: rate(one, one.predicted))
        else:
            pick = min(group, key=lambda one: one.predicted)
        broken = pick.value > limit
        regret = 1 - rate(pick, pick.value) / rate(best, best.value)
        chosen.append(Pick(pick is best, regret, broken))
    return chosen


def print_picks(console: Console, judged: list[Judged], margin: float = MARGIN) -> None:
    groups = scenarios(judged)
    table = Table(title=f"best (TP, batch) under a TPOT limit, margin {margin:g}", title_justify="left")
    for name in ("limit ms", "scenarios", "exact", "limit broken", "mean regret of the others %"):
        table.add_column(name, justify="right")
    for limit in LIMITS_MS:
        made = picks(groups, limit, margin)
        if made:
            kept = [pick.regret for pick in made if not pick.broken]
            regret = 100 * sum(kept) / max(len(kept), 1)
            exact, broken = sum(pick.exact for pick in made), sum(pick.broken for pick in made)
            table.add_row(str(limit), str(len(made)), str(exact), str(broken), f"{regret:.1f}")
    console.print(table)
