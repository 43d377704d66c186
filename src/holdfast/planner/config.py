"""Flags of the planner's commands."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.core.config import option
from holdfast.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """Measurements"""

    rows: str | None = option(
        None,
        "CSV file of measurements, one a row: of serving (columns model, gpu, tp, pp, dtype, batch, input_len, "
        "output_len, metric, value, unit) or of collectives (gpu, n_gpus, n_nodes, op, message_bytes, latency_us); "
        "- reads stdin.",
    )
    output: str | None = option(None, "Where the rows go, each with its prediction. Default: stdout.")
    json: bool = option(False, "Write JSON, rows and summary, instead of CSV.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Everything `holdfast predict` can be told."""

    rows: RowsConfig = RowsConfig()

    def check(self) -> None:
        """Raise `ConfigError` where there is nothing to predict."""
        if self.rows.rows is None:
            raise ConfigError("--rows: which measurements? Name a CSV file, or - for stdin")
