"""`holdfast probe`: measures this machine in processes like those that serve, and keeps the profile."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from holdfast import __version__
from holdfast.core.errors import ConfigError, StartupError
from holdfast.hardware.host import available_memory, usable_cores
from holdfast.hardware.profile import Exchange, Format, Product, Profile, Shared, Turn, default_path, write_profile
from holdfast.kernels.cpu.library import Library
from holdfast.parallel.segment import create
from holdfast.parallel.shards import MLP_SHARDS
from holdfast.probe.computing import FORMATS
from holdfast.probe.config import MeasureConfig, ProbeConfig
from holdfast.probe.job import Found, Job
from holdfast.probe.together import ROWS, layout_of
from holdfast.probe.turns import cold_model, turns

Point = TypeVar("Point", bound=Shared)

PATIENCE = 1200.0
"""Seconds that the ranks of one job may take."""
SIZES = (512, 1536, 4096)
BUSY = 0.5
"""Load average above which a machine is not fit to be measured."""


def run(config: ProbeConfig) -> int:
    """Measure, keep the profile, show it; returns the exit code. Raises ConfigError without kernels,
    StartupError when a rank fails."""
    try:
        Library()
    except OSError as error:
        raise ConfigError(f"our CPU kernels are measured, and they are not there: {error}") from error
    path = Path(config.measure.output) if config.measure.output else default_path()
    with Console(stderr=True).status("measuring") as status:
        profile = measure(config.measure, status.update)
    write_profile(profile, path)
    show(profile, Console())
    print(f"kept in {path}")
    return 0


def measure(
    config: MeasureConfig,
    tell: Callable[[str], object] = lambda _: None,
    formats: tuple[Format, ...] = FORMATS,
) -> Profile:
    """This machine's profile. `tell`: called with what is being measured. `formats`: of the matrices."""
    cores = sorted(os.sched_getaffinity(0))
    most = min(config.max_ranks or usable_cores(), len(cores))
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= most]
    load, found = os.getloadavg()[0], []
    whole: list[Turn] = []
    for ranks in sizes:
        tell(f"measuring with {ranks} {'ranks' if ranks > 1 else 'rank'}")
        found.append(_slowest(_run_ranks(ranks, cores, config, formats)))
    if most >= 2:
        tell("measuring one rank while the others wait, and what passes between two")
        found.append(_slowest(_run_ranks(1, cores, config, formats, of=2)))
        found.append(_slowest(_run_ranks(2, cores, config, formats, staged=True)))
    for tensor, pipeline in _replicas(most):
        tell(f"measuring steps of {tensor} x {pipeline} ranks")
        whole += turns(tensor, pipeline, config.rounds)
    return Profile(
        machine=platform.node(),
        processor=_processor(),
        kernels=found[0].kernels,
        cores=usable_cores(),
        memory_bytes=available_memory(),
        holdfast=__version__,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        load=load,
        readings=tuple(point for part in found for point in part.readings),
        products=tuple(point for part in found for point in part.products),
        attentions=tuple(point for part in found for point in part.attentions),
        exchanges=tuple(point for part in found for point in part.exchanges),
        row_works=tuple(point for part in found for point in part.row_works),
        turns=tuple(whole),
        cold_model=cold_model(),
    )


def _replicas(most: int) -> Iterator[tuple[int, int]]:
    """Ranks of a stage, and stages, of the replicas whose steps are measured: of up to `most` ranks."""
    for tensor in (1, 2, 4, MLP_SHARDS):
        for pipeline in (1, 2, 4):
            if tensor * pipeline <= most:
                yield tensor, pipeline


def _run_ranks(
    ranks: int,
    cores: Sequence[int],
    config: MeasureConfig,
    formats: tuple[Format, ...],
    of: int = 1,
    *,
    staged: bool = False,
) -> list[Found]:
    """What each of the ranks found, which have run at once, each on its share of the cores. `of`: as if there were so
    many more."""
    descriptor = None if ranks == 1 else create(layout_of(ranks, staged=staged).num_bytes)
    jobs = [
        Job(
            rank=rank,
            ranks=ranks,
            threads=max(1, usable_cores() // (ranks * of)),
            cores=tuple(cores[len(cores) * rank // (ranks * of) : len(cores) * (rank + 1) // (ranks * of)]),
            descriptor=descriptor,
            staged=staged,
            sizes=SIZES,
            formats=formats,
            pool_bytes=config.pool_bytes,
            rounds=config.rounds,
        )
        for rank in range(ranks)
    ]
    try:
        with _started(jobs) as processes:
            outcomes = [_outcome(process) for process in processes]
    finally:
        if descriptor is not None:
            os.close(descriptor)
    failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if failed:  # the one that gave up says why; the others only that it did
        why = min(failed, key=lambda said: "CollectiveFailed" in said)
        raise StartupError(f"the probe failed: {why}")
    return [outcome for outcome in outcomes if isinstance(outcome, Found)]


@contextlib.contextmanager
def _started(jobs: Sequence[Job]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process for each job; none is left afterwards, however it went."""
    processes: list[subprocess.Popen[bytes]] = []
    late = threading.Timer(PATIENCE, _kill, [processes])
    late.daemon = True
    late.start()
    try:
        for job in jobs:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "holdfast.probe.rank", msgspec.json.encode(job).decode()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=[] if job.descriptor is None else [job.descriptor],
                )
            )
        yield processes
    finally:
        late.cancel()
        _kill(processes)
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()


def _outcome(process: subprocess.Popen[bytes]) -> Found | str:
    """What a process found, or how it failed."""
    assert process.stdout is not None
    assert process.stderr is not None
    said = process.stdout.read()  # written at once, at the end
    complaint = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.wait() != 0:
        return complaint[-1] if complaint else f"exit status {process.returncode}"
    return msgspec.json.decode(said, type=Found)


def _slowest(found: Sequence[Found]) -> Found:
    """Point by point, the slowest rank's."""
    return Found(
        kernels=found[0].kernels,
        readings=_by_point([part.readings for part in found]),
        products=_by_point([part.products for part in found]),
        attentions=_by_point([part.attentions for part in found]),
        exchanges=_by_point([part.exchanges for part in found]),
        row_works=_by_point([part.row_works for part in found]),
    )


def _by_point(of_ranks: Sequence[Sequence[Point]]) -> tuple[Point, ...]:
    return tuple(max(points, key=lambda point: point.seconds) for points in zip(*of_ranks, strict=True))


def _processor() -> str:
    with contextlib.suppress(OSError):
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if named:
            return named[1]
    return platform.processor() or platform.machine()


def show(profile: Profile, console: Console) -> None:
    """The rates that were reached."""
    console.print(
        f"[bold]{profile.machine}[/]: {profile.cores} cores of {profile.processor}, {profile.kernels} kernels"
    )
    if profile.load > BUSY:
        console.print(f"[yellow]{profile.load:.1f} other processes were running: the rates are too low[/]")
    console.print(f"memory read at {profile.memory_bandwidth / 1e9:.1f} GB/s")
    products = Table("product", "ranks x threads", "GB/s of weights, 1 row", f"GFLOP/s, {max(ROWS)} rows", box=None)
    for ranks, threads in sorted({(product.ranks, product.threads) for product in profile.products}):
        here = [p for p in profile.products if (p.ranks, p.threads) == (ranks, threads)]
        for format in dict.fromkeys(product.format for product in here):
            products.add_row(format, f"{ranks} x {threads}", *_rates(here, format, ranks))
    console.print(products)
    exchanges = Table("exchange", "ranks", "KB", "µs", box=None)
    for exchange in profile.exchanges:
        exchanges.add_row(*_exchange(exchange))
    if profile.exchanges:
        console.print(exchanges)
    steps = Table("step of an empty model", "stages", "requests", "tokens of each", "ms", box=None)
    for turn in profile.turns:
        counts = (turn.stages, turn.requests, turn.tokens)
        steps.add_row(
            f"{turn.ranks} ranks{', caches cold' if turn.cold else ''}",
            *map(str, counts),
            f"{turn.seconds * 1e3:.2f}",
        )
    console.print(steps)


def _rates(products: Sequence[Product], format: Format, ranks: int) -> tuple[str, str]:
    """Of all ranks together, at the largest matrix."""
    bytes_each = {"float32": 4, "bfloat16": 2, "Q8_0": 34 / 32, "Q4_0": 18 / 32, "Q4_1": 20 / 32}[format]
    same = [p for p in products if p.format == format and not p.cached and p.shards == 1]
    one = max(same, key=lambda p: (-p.rows, p.inputs))
    many = max(same, key=lambda p: (p.rows, p.inputs))
    read = bytes_each * one.inputs * one.outputs * ranks / one.seconds
    return f"{read / 1e9:.1f}", f"{2 * many.rows * many.inputs * many.outputs * ranks / many.seconds / 1e9:.0f}"


def _exchange(exchange: Exchange) -> tuple[str, ...]:
    seconds = f"{exchange.seconds * 1e6:.1f}"
    return exchange.operation, str(exchange.ranks), f"{exchange.num_bytes / 1e3:.0f}", seconds
