"""`make bench`: serve a model on this machine and measure it at 1, 8 and 32 streams.

    python benchmarks/serve_demo.py MODEL [flags of `holdfast serve`]

Prints a table and writes it, with every request and the machine's facts, to benchmarks/out/serve_demo.json.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from holdfast.bench.config import BenchConfig, LoadConfig, RequestsConfig, TargetConfig
from holdfast.bench.load import Run, measure
from holdfast.bench.measure import Summary
from holdfast.bench.report import machine_facts, progress_bar, summary_of

STREAMS = (1, 8, 32)
INPUT_LEN, OUTPUT_LEN = 128, 64
ROUNDS = 3
"""Requests per stream."""
READY_SECONDS = 120.0
OUT = Path(__file__).parent / "out" / "serve_demo.json"


@contextlib.contextmanager
def serving(model: str, flags: list[str]) -> Iterator[str]:
    """`holdfast serve` on a free port; yields its address once it is healthy, and stops it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "holdfast.cli.main", "serve", model, "--port", str(port), *flags]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not _healthy(url):
            if process.poll() is not None:
                sys.exit(f"holdfast serve ended with {process.returncode}")
            if time.monotonic() > deadline:
                sys.exit(f"holdfast serve was not ready after {READY_SECONDS:g} s")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def run_at(url: str, streams: int) -> tuple[Run, Summary]:
    """Measure `ROUNDS` requests per stream, `streams` of them at a time."""
    config = BenchConfig(
        target=TargetConfig(base_url=url),
        requests=RequestsConfig(
            num_prompts=ROUNDS * streams,
            random_input_len=INPUT_LEN,
            random_output_len=OUTPUT_LEN,
            ignore_eos=True,
            seed=streams,  # other prompts for each load: no prefix is in the cache already
        ),
        load=LoadConfig(max_concurrency=streams),
    )
    with progress_bar() as (on_start, on_end):
        run = measure(config, on_start, on_end)
    return run, summary_of(run, config)


def table_of(summaries: dict[int, Summary], title: str) -> Table:
    """A row per load; medians and 99th percentiles in ms."""
    table = Table(title=title)
    for heading in ("streams", "ok", "output tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "tokens in all, /s"):
        table.add_column(heading, justify="right")
    for streams, summary in summaries.items():
        cells = [str(streams), f"{summary.ok}/{summary.ok + summary.failed}", f"{summary.output_rate:.1f}"]
        for metric in ("ttft", "tpot"):
            found = summary.latencies[metric]
            cells += [f"{1000 * found.percentiles[p]:.1f}" if found else "" for p in (50, 99)]
        table.add_row(*cells, f"{summary.input_rate + summary.output_rate:.1f}")
    return table


def main() -> int:
    """Serve, measure, print, write. Exit code 1 if a request failed."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    model, flags = sys.argv[1], sys.argv[2:]
    summaries: dict[int, Summary] = {}
    results: list[dict[str, Any]] = []
    with serving(model, flags) as url:
        for streams in STREAMS:
            print(f"measuring {ROUNDS * streams} requests, {streams} at a time", file=sys.stderr)
            run, summary = run_at(url, streams)
            summaries[streams] = summary
            requests = [outcome.record() for outcome in run.outcomes]
            results.append({"streams": streams, "summary": summary.record(), "requests": requests})
            if run.interrupted:
                break
    facts = machine_facts()
    title = f"{Path(model).name}: {INPUT_LEN} tokens in, {OUTPUT_LEN} out"
    Console().print(table_of(summaries, title))
    Console().print(f"{facts['cpu']}, {facts['usable_threads']} threads, {facts['platform']}", highlight=False)
    OUT.parent.mkdir(exist_ok=True)
    record = {"model": Path(model).name, "flags": flags, "machine": facts, "loads": results}
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {OUT}")
    return 1 if any(summary.failed for summary in summaries.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
