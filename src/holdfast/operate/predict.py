"""`holdfast predict`: a file of measurements is read, and written again with what the planner says to it."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from holdfast.core.errors import ConfigError
from holdfast.planner.config import PredictConfig
from holdfast.planner.rows.predictions import as_csv, as_json, predict_row, read_rows, show, summarise


def run(config: PredictConfig) -> int:
    """Read the rows, write them with predictions, say on stderr how good these were. Returns the exit code."""
    name, output = config.rows.rows, config.rows.output
    assert name is not None, "checked"
    columns, rows = read_rows(_text_of(name), "stdin" if name == "-" else name)
    predicted = [predict_row(row) for row in rows]
    text = as_json(predicted) if config.rows.json else as_csv(columns, predicted)
    if output is None:
        sys.stdout.write(text)
    else:
        try:
            Path(output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {output}: {error.strerror}") from error
    show(summarise(predicted), Console(stderr=True))
    return 0


def _text_of(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--rows {name}: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError) as error:  # a zero byte in the name is the latter
        raise ConfigError(f"--rows {name}: is no text in UTF-8") from error
