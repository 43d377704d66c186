"""Shows a run: progress while it lasts, tables at its end, everything as JSON."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from holdfast import __version__
from holdfast.bench.config import BenchConfig
from holdfast.bench.load import OnEnd, Run
from holdfast.bench.measure import Outcome, Summary, summarize

_NAMES = {
    "ttft": "TTFT  to the first token",
    "tpot": "TPOT  per token after it",
    "itl": "ITL   between chunks",
    "e2el": "E2EL  end to end",
}


def summary_of(run: Run, config: BenchConfig) -> Summary:
    """The numbers of a run under the limits and percentiles of `config`."""
    return summarize(
        run.outcomes,
        run.duration,
        planned=run.planned,
        limits=config.report.limits(),
        percentiles=config.report.percentiles(),
    )


@contextlib.contextmanager
def progress_bar() -> Iterator[tuple[Callable[[int], None], OnEnd]]:
    """A bar on stderr, nothing if that is not a terminal. Yields what `load.measure` calls back."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[red]{task.fields[failures]}"),
    )
    # few refreshes: drawing takes time from the streams that are measured
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as progress:
        task = progress.add_task("warming up", total=None, failures="")
        failed = 0

        def on_start(count: int) -> None:
            progress.update(task, description="requests", total=count)

        def on_end(outcome: Outcome) -> None:
            nonlocal failed
            failed += not outcome.ok
            progress.update(task, advance=1, failures=f"{failed} failed" if failed else "")

        yield on_start, on_end


def print_report(run: Run, summary: Summary, config: BenchConfig, console: Console) -> None:
    """Tables: what was done and how fast; the latencies; then what a reader should be warned of."""
    console.print(_totals(run, summary, config))
    console.print(_latencies(summary, config))
    for reason, count in summary.errors.items():
        console.print(f"[red]{count} failed:[/] {escape(reason)}", highlight=False)
    for note in _notes(run, summary):
        console.print(f"[yellow]Note:[/] {escape(note)}", highlight=False)


def _totals(run: Run, summary: Summary, config: BenchConfig) -> Table:
    title = escape(f"{run.model} at {config.target.base_url}")
    table = Table(show_header=False, box=None, padding=(0, 2), title=title)
    table.add_column()
    table.add_column(justify="right")
    rows: list[tuple[str, str]] = [
        ("Requests ok", f"{summary.ok}"),
        ("Requests failed", f"{summary.failed}"),
        ("Duration", f"{summary.duration:.2f} s"),
        ("Requests", f"{summary.request_rate:.2f} /s"),
        ("Input tokens", f"{summary.input_tokens} = {summary.input_rate:.1f} /s"),
        ("Output tokens", f"{summary.output_tokens} = {summary.output_rate:.1f} /s"),
    ]
    if summary.goodput is not None and summary.ok + summary.failed:
        share = 100 * (summary.good or 0) / (summary.ok + summary.failed)
        limits = ", ".join(f"{name} {1000 * limit:g} ms" for name, limit in config.report.limits().items())
        rows.append((f"Goodput ({limits})", f"{summary.good} ({share:.1f} %) = {summary.goodput:.2f} /s"))
    rows.append(("This tool's own CPU", f"{100 * run.client_cpu:.0f} % of a core"))
    for row in rows:
        table.add_row(*row)
    return table


def _latencies(summary: Summary, config: BenchConfig) -> Table:
    table = Table(title="Latency in ms")
    table.add_column("")
    for heading in ("mean", *(f"p{percentile:g}" for percentile in config.report.percentiles())):
        table.add_column(heading, justify="right")
    for metric in config.report.metrics():
        found = summary.latencies[metric]
        values = [found.mean, *found.percentiles.values()] if found else []
        table.add_row(_NAMES[metric], *(f"{1000 * value:.2f}" for value in values))
    return table


def _notes(run: Run, summary: Summary) -> Iterator[str]:
    if run.interrupted:
        yield f"interrupted; {summary.unfinished} of {run.planned} requests are left out."
    if summary.short:
        yield (
            f"{summary.short} requests ended with fewer tokens than were asked for; --ignore-eos asks the server to "
            "go on."
        )
    if summary.tokens_per_chunk is not None and not 0.95 <= summary.tokens_per_chunk <= 1.05:
        yield (
            f"a chunk holds {summary.tokens_per_chunk:.2f} tokens on average: ITL is a time between chunks, TPOT "
            "the time per token."
        )
    if summary.lateness is not None and summary.lateness.mean > 0.05:
        yield (
            f"requests were sent {summary.lateness.mean:.2f} s after their time on average (held back by the "
            "concurrency limit or by this tool); latencies count from the sending."
        )
    if run.client_cpu > 0.7:
        yield "this tool was short of CPU: real latencies are lower than these."


def write_json(path: str, run: Run, summary: Summary, config: BenchConfig) -> None:
    """Everything: summary, configuration, machine, every request."""
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": run.model,
        "summary": summary.record() | {"client_cpu_cores": round(run.client_cpu, 3), "interrupted": run.interrupted},
        "config": config.as_dict(),
        "machine": machine_facts(),
        "requests": [outcome.record() for outcome in run.outcomes],
    }
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def machine_facts() -> dict[str, Any]:
    """The machine the load tool ran on (and the server, if it is the same)."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "holdfast": __version__,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
