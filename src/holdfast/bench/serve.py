"""`holdfast bench serve`: measure an OpenAI-compatible server and show what was found."""

from __future__ import annotations

from importlib.util import find_spec

from holdfast.bench.config import BenchConfig
from holdfast.core.errors import ConfigError


def run(config: BenchConfig) -> int:
    """Measure, write, print. Returns the exit code: 0; 1 if a request failed; 130 after Ctrl-C.

    Raises `ConfigError` when there is nothing to measure, or a file cannot be written (then after the report).
    """
    config.check()
    _require("httpx", "holdfast bench")
    if config.report.plot is not None:
        _require("matplotlib", "--plot")

    # not before this line: the extra may not be installed
    from rich.console import Console  # noqa: PLC0415

    from holdfast.bench.load import measure  # noqa: PLC0415
    from holdfast.bench.report import print_report, progress_bar, summary_of, write_json  # noqa: PLC0415

    with progress_bar() as (on_start, on_end):
        measured = measure(config, on_start, on_end)
    summary = summary_of(measured, config)
    try:
        if config.report.json is not None:
            write_json(config.report.json, measured, summary, config)
        if config.report.plot is not None:
            from holdfast.bench.plot import write_plot  # noqa: PLC0415

            write_plot(config.report.plot, measured, summary, config)
    except OSError as error:
        raise ConfigError(f"--json/--plot: {error}") from error
    finally:
        print_report(measured, summary, config, Console())
    if measured.interrupted:
        return 130
    return 1 if summary.failed else 0


def _require(module: str, what: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(f"{what} needs {module}: pip install 'holdfast[bench]'")
