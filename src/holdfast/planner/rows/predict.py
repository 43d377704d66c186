"""Predictions for rows of measurements, each with a band and, where the row has a value, the error.

row → what it asks (`metrics`, `questions`) → the planner's answer (`answers`) → a value in the row's unit
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from holdfast.core.errors import UserError
from holdfast.planner.coefficients import Coefficients, coefficients
from holdfast.planner.rows.answers import KINDS, SERVED, shortage, time_of_collective
from holdfast.planner.rows.metrics import Metric, factor, metric_of
from holdfast.planner.rows.questions import (
    Row,
    ServingRow,
    collective_in_metric,
    collective_of,
    plain_row,
    serving_of,
)

MEDIANS = "the median of a closed loop whose requests are all alike; none such was fitted"
LIKE = MappingProxyType({"itl_median": "tpot", "ttft_median": "ttft"})
"""Medians, and the means whose band theirs is not narrower than."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """In the row's unit; nine in ten measurements like it are between `low` and `high`. `kind`: what was asked, in
    the planner's words (tpot, ttft, collective, …). `note` says why there is no value, or what was assumed."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    kind: str = ""

    def error(self, measured: str | None) -> float | None:
        """predicted / measured - 1 (of yes and no, the difference); None where either is missing."""
        try:
            value = float(measured or "")
        except ValueError:
            return None
        if self.value is None or not math.isfinite(value):
            return None
        if self.kind == "out_of_memory":
            return self.value - value
        return self.value / value - 1 if value > 0 else None


def predict(row: Mapping[str, object], known: Coefficients | None = None) -> Prediction:
    """The planner's answer to one row; never raises for what is in it."""
    known = known or coefficients()
    try:
        return _answer(plain_row(row), known)
    except UserError as error:
        return Prediction(None, note=str(error))


def _answer(row: Row, known: Coefficients) -> Prediction:
    name = row.get("metric") or ""
    if name.lower().startswith("nccl") or row.get("op"):
        return _banded("collective", _collective(row, name), known)
    metric = metric_of(name, row.get("unit") or "")
    asked = serving_of(row)
    value = KINDS[metric.kind](asked, known)
    if metric.kind == "out_of_memory":
        return Prediction(value, 0, 1, asked.assumed, metric.kind)
    if metric.kind == "throughput":
        value *= _counted(metric, asked)
    elif metric.kind == "tpot" and metric.shared_by == "user":
        value = 1 / value
    notes = [
        asked.assumed,
        MEDIANS if metric.kind in LIKE else "",
        shortage(asked, known) if metric.kind in SERVED else "",
    ]
    return _banded(metric.kind, value * factor(metric), known, "; ".join(note for note in notes if note))


def _banded(kind: str, value: float, known: Coefficients, note: str = "") -> Prediction:
    band = known.bands.get(kind, known.bands["other"])
    if kind in LIKE:
        band = max(band, known.bands[LIKE[kind]])
    return Prediction(value, value / band, value * band, note, kind)


def _collective(row: Row, metric: str) -> float:
    """In the row's unit: a time, µs unless it says another, or the rate at which each rank sends (nccl-tests'
    busbw)."""
    asked = collective_in_metric(row) if metric.lower().startswith("nccl") else collective_of(row)
    sent, seconds = time_of_collective(asked)
    unit = row.get("unit") or ("gb/s" if "busbw" in metric.lower() else "us")
    if unit.lower() == "gb/s":
        return sent / seconds / 1e9
    return seconds * factor(metric_of("latency", unit))


def _counted(metric: Metric, asked: ServingRow) -> float:
    """From output tokens of all replicas together to what the metric counts."""
    asked.needs("input_len", "output_len")
    assert asked.input_len is not None
    assert asked.output_len is not None
    requests = 1 / max(asked.output_len, 1)
    counted = {
        "output tokens": 1,
        "requests": requests,
        "prompt tokens": requests * asked.input_len,
        "all tokens": 1 + requests * asked.input_len,
    }[metric.counted]
    if metric.shared_by == "user":
        asked.needs("batch")
    return counted / {"all": 1, "device": asked.devices, "user": asked.batch or 1}[metric.shared_by]
