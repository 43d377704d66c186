"""Predictions for rows of measurements, each with a band and, where the row has a value, the error.

row → what it asks (`rows`) → the planner's answer (`answers`) → a value in the row's unit
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from holdfast.core.errors import ConfigError, UserError
from holdfast.planner.answers import KINDS, kind_of, time_of_collective
from holdfast.planner.rows import Row, collective_in_metric, collective_of, serving_of
from holdfast.planner.timing import Coefficients, coefficients

TIMES = MappingProxyType({"s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "ns": 1e9})
SIZES = MappingProxyType({"b": 1.0, "gb": 1e-9, "gib": 2.0**-30, "tokens": 1.0, "blocks": 1 / 16})
_PLAIN = frozenset({"throughput", "decode_throughput", "out_of_memory"})
_SIZED = frozenset({"weights", "memory_used", "kv_tokens"})
ADDED = ("prediction", "prediction_low", "prediction_high", "prediction_error", "prediction_note")
"""Columns that `predict_file` adds."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """In the row's unit; nine in ten measurements like it are between `low` and `high`. `kind`: what was asked, in
    the planner's words (tpot, ttft, collective, …). `note` says why there is no value."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    kind: str = ""

    def error(self, measured: str | None) -> float | None:
        """predicted / measured - 1; None where either is missing."""
        try:
            value = float(measured or "")
        except ValueError:
            return None
        return self.value / value - 1 if self.value is not None and value else None


def predict(row: Row, known: Coefficients | None = None) -> Prediction:
    """The planner's answer to one row; never raises for what is in it."""
    known = known or coefficients()
    try:
        kind, value = _answer(row, known)
    except UserError as error:
        return Prediction(None, note=str(error))
    band = known.bands.get(kind, known.bands["other"])
    if kind == "out_of_memory":
        return Prediction(value, 0, 1, kind=kind)
    return Prediction(value, value / band, value * band, kind=kind)


def _answer(row: Row, known: Coefficients) -> tuple[str, float]:
    metric = (row.get("metric") or "").strip().lower()
    if (row.get("op") or "").strip() or metric.startswith("nccl"):
        asked = collective_in_metric(row) if metric else collective_of(row)
        sent, seconds = time_of_collective(asked)
        unit = (row.get("unit") or "us").strip().lower()
        return "collective", sent / seconds / 1e9 if unit == "gb/s" else seconds * _factor("collective", unit)
    kind = kind_of(metric)
    if kind is None:
        raise ConfigError(f"metric {metric!r} is not one the planner predicts")
    factor = _factor(kind, (row.get("unit") or "ms").strip().lower())
    return kind, KINDS[kind](serving_of(row), known) * factor


def _factor(kind: str, unit: str) -> float:
    """From seconds, bytes or tokens into the row's unit."""
    if kind in _PLAIN:
        return 1
    if kind == "memory_used" and unit == "gb":
        unit = "gib"  # what shows the memory in use counts in MiB, and who rounds it says GB
    units = SIZES if kind in _SIZED else TIMES
    if unit not in units:
        raise ConfigError(f"unit {unit!r} is not known; known are {', '.join(units)}")
    return units[unit]


# -- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """Of the rows of one kind: how many were predicted, and the absolute errors of those with a value (shares)."""

    kind: str
    predicted: int
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.errors)

    @property
    def median(self) -> float:
        return statistics.median(self.errors)

    @property
    def tail(self) -> float:
        """The 90th percentile."""
        ordered = sorted(self.errors)
        return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


def read_rows(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a CSV file. Raises `ConfigError` for one that is none."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            rows = [{key: value for key, value in row.items() if isinstance(key, str)} for row in reader]
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--rows {file}: {error}") from error
    if "metric" not in columns and "op" not in columns:
        raise ConfigError(
            f"--rows {file}: has neither a column metric nor a column op; columns: {', '.join(columns)}"
        )
    return columns, rows


def write_predictions(
    columns: Sequence[str], rows: Iterable[Row], out: TextIO, known: Coefficients | None = None
) -> list[Summary]:
    """Writes each row with what is predicted for it; returns what it came to, by kind."""
    writer = csv.DictWriter(out, [*columns, *ADDED], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    predicted: dict[str, int] = defaultdict(int)
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        answer = predict(row, known)
        error = answer.error(row.get("value") or row.get("latency_us"))
        kind = answer.kind or "not predicted"
        predicted[kind] += 1
        if error is not None:
            errors[kind].append(abs(error))
        numbers = (answer.value, answer.low, answer.high, error)
        texts = ["" if number is None else f"{number:.5g}" for number in numbers]
        writer.writerow({**row, **dict(zip(ADDED, [*texts, answer.note], strict=True))})
    return [Summary(kind, count, tuple(errors[kind])) for kind, count in sorted(predicted.items())]
