"""`make bench`: serve a model on this machine and measure it at 1, 8 and 32 streams.

    python benchmarks/serve_demo.py MODEL [flags of `holdfast serve`]

Prints a table, with the share of what memory and arithmetic of this machine allow, and writes it, with every
request and the machine's facts, to benchmarks/out/serve_demo.json.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from limits import Limits, measure_limits
from rich.console import Console
from rich.table import Table

from holdfast.bench.config import BenchConfig, LoadConfig, RequestsConfig, TargetConfig
from holdfast.bench.load import Run, measure
from holdfast.bench.measure import Summary
from holdfast.bench.report import machine_facts, progress_bar, summary_of
from holdfast.models.inspect import inspect_model

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


def decode_limit(limits: Limits, model: str, flags: list[str], streams: int) -> float:
    """Output tokens/s this machine cannot exceed, in the dtype that is served."""
    info = inspect_model(model)
    name = flags[flags.index("--dtype") + 1] if "--dtype" in flags else info.dtype
    return limits.decode_rate(info.spec, getattr(torch, name), streams)


def table_of(summaries: dict[int, Summary], limit: dict[int, float], title: str) -> Table:
    """A row per load; medians and 99th percentiles in ms. The limit is compared with 1 / TPOT of all streams."""
    table = Table(title=title)
    for heading in (
        "n",
        "ok",
        "tok/s",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "limit",
        "share",
    ):
        table.add_column(heading, justify="right")
    for streams, summary in summaries.items():
        cells = [str(streams), f"{summary.ok}/{summary.ok + summary.failed}", f"{summary.output_rate:.1f}"]
        for metric in ("ttft", "tpot"):
            found = summary.latencies[metric]
            cells += [f"{1000 * found.percentiles[p]:.1f}" if found else "" for p in (50, 99)]
        tpot = summary.latencies["tpot"]
        reached = streams / tpot.percentiles[50] / limit[streams] if tpot else 0.0
        table.add_row(*cells, f"{limit[streams]:.0f}", f"{reached:.0%}")
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
    measured = measure_limits()
    limit = {streams: decode_limit(measured, model, flags, streams) for streams in summaries}
    facts = machine_facts() | asdict(measured)
    title = f"{Path(model).name}: {INPUT_LEN} tokens in, {OUTPUT_LEN} out"
    Console().print(table_of(summaries, limit, title))
    Console().print(f"{facts['cpu']}, {facts['usable_threads']} threads, {facts['platform']}", highlight=False)
    OUT.parent.mkdir(exist_ok=True)
    record = {"model": Path(model).name, "flags": flags, "machine": facts, "loads": results}
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {OUT}")
    return 1 if any(summary.failed for summary in summaries.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
