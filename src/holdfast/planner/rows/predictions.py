"""The text of a file of measurements, each row written again with what the planner says to it."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from holdfast.core.errors import ConfigError
from holdfast.planner.coefficients import Coefficients
from holdfast.planner.rows.predict import Prediction, predict
from holdfast.planner.rows.questions import Row, plain_row

ADDED = ("prediction", "prediction_low", "prediction_high", "prediction_error", "prediction_note")
"""Columns that are written behind those of the file."""
_TOO_MANY = "\0more"
"""Where `csv` puts the cells of a row beyond its columns."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """A row of the file, as it was, with the planner's answer. `error`: predicted / measured - 1."""

    row: Row
    prediction: Prediction
    error: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Of the rows of one kind: how many there are, and the absolute errors of those with a value (shares)."""

    kind: str
    count: int
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


def read_rows(text: str, name: str) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a CSV file's text; `name` is for what is said of it. Raises `ConfigError` for one that
    is none, or has no column that says what was measured."""
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=_TOO_MANY, restval="", strict=True)
    try:
        columns = list(reader.fieldnames or [])
        rows: list[dict[str, str]] = [dict(row) for row in reader]
    except csv.Error as error:
        raise ConfigError(f"--rows {name}: after line {reader.line_num}: {error}") from error
    if not any(column.strip() for column in columns):
        raise ConfigError(f"--rows {name}: is empty; it must begin with the names of its columns")
    plain = [column.strip().lower() for column in columns]
    if not {"metric", "op"} & set(plain):
        other = next((sign for sign in ";\t|" if len(columns) == 1 and sign in columns[0]), None)
        if other:
            raise ConfigError(f"--rows {name}: its columns are parted by {other!r}; they must be by commas")
        shown = ", ".join(columns[:20])[:200]
        raise ConfigError(f"--rows {name}: has neither a column metric nor a column op; its columns: {shown}")
    twice = next((column for column in plain if column and plain.count(column) > 1), None)
    if twice:
        raise ConfigError(f"--rows {name}: has two columns {twice!r}")
    return columns, rows


def predict_row(row: Row, known: Coefficients | None = None) -> Predicted:
    """One row of `read_rows`. One with more cells than columns is not guessed at."""
    if _TOO_MANY in row:
        return Predicted(row, Prediction(None, note="the row has more cells than there are columns"), None)
    answer = predict(row, known)
    if answer.value is None:
        return Predicted(row, answer, None)
    plain = plain_row(row)
    return Predicted(row, answer, answer.error(plain.get("value") or plain.get("latency_us")))


def summarise(predicted: Sequence[Predicted]) -> list[Summary]:
    """By kind of question."""
    groups: dict[str, list[Predicted]] = defaultdict(list)
    for one in predicted:
        groups[one.prediction.kind or "not predicted"].append(one)
    return [
        Summary(kind, len(group), tuple(abs(one.error) for one in group if one.error is not None))
        for kind, group in sorted(groups.items())
    ]


# -- what is written -------------------------------------------------------------------------------------------------


def _texts(one: Predicted) -> dict[str, str]:
    answer = one.prediction
    numbers = (answer.value, answer.low, answer.high, one.error)
    texts = ["" if number is None else f"{number:.5g}" for number in numbers]
    return dict(zip(ADDED, [*texts, answer.note], strict=True))


def as_csv(columns: Sequence[str], predicted: Sequence[Predicted]) -> str:
    """The file again, with `ADDED` behind its columns."""
    out = io.StringIO()
    # Predictions of an earlier run give way to these.
    names = [*(column for column in columns if column.strip().lower() not in ADDED), *ADDED]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**one.row, **_texts(one)} for one in predicted)
    return out.getvalue()


def as_json(predicted: Sequence[Predicted]) -> str:
    """rows: as they were, with what is predicted; summary: of each kind of question."""
    rows = [
        {
            **{name: value for name, value in one.row.items() if name != _TOO_MANY},
            "kind": one.prediction.kind,
            **{name: text if name == "prediction_note" else _number(text) for name, text in _texts(one).items()},
        }
        for one in predicted
    ]
    summary = [
        {"kind": some.kind, "rows": some.count, "with_value": len(some.errors)}
        | ({"mean": some.mean, "median": some.median, "p90": some.tail} if some.errors else {})
        for some in summarise(predicted)
    ]
    return json.dumps({"rows": rows, "summary": summary}, indent=1) + "\n"


def _number(text: str) -> float | None:
    return float(text) if text and math.isfinite(float(text)) else None


def show(summaries: Sequence[Summary], console: Console) -> None:
    """A table: of each kind how many rows, and how far predictions are from what was measured."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("predicted", header_style="bold")
    for column in ("rows", "with a value", "mean error", "median", "90th percentile"):
        table.add_column(column, justify="right", header_style="bold")
    for some in summaries:
        errors = [f"{100 * share:.1f} %" for share in (some.mean, some.median, some.tail)] if some.errors else []
        table.add_row(some.kind, str(some.count), str(len(some.errors)), *errors)
    console.print(table)
