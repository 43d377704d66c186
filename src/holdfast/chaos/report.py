"""What a run of `holdfast chaos` has shown: tables for people, JSON for programs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from holdfast.chaos.faults import Fault, key_of
from holdfast.chaos.load import Load


@dataclass(slots=True)
class Report:
    """All that is known in the end."""

    faults: list[Fault]
    load: Load
    seconds: float
    status: int
    left: list[int]

    @property
    def is_good(self) -> bool:
        return not self.load.wrong and not self.left and self.status == 0


def show(report: Report, console: Console) -> None:
    """Tables, and the verdict."""
    title = "seconds after the fault: median, 99th percentile"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("fault", no_wrap=True)
    for column in ("n", "detected", "first token", "all go on", "whole again"):
        table.add_column(column)
    for kind in sorted({fault.kind for fault in report.faults}):
        faults = [fault for fault in report.faults if fault.kind == kind]
        table.add_row(
            kind,
            str(len(faults)),
            _times([fault.detected for fault in faults if fault.was_noticed]),
            _times([min(found) for fault in faults if (found := fault.after("first_token"))]),
            _times([max(found) for fault in faults if (found := fault.after("last_token"))]),
            _times([fault.whole_again - fault.at for fault in faults if fault.whole_again is not None]),
        )
    console.print(table)
    incidents = {key_of(incident): incident for fault in report.faults for incident in fault.incidents}.values()
    recomputed = [incident["recomputed_most"] for incident in incidents]
    tokens = sum(incident["recomputed"] for incident in incidents)
    hit = sum(incident["requests"] for incident in incidents)
    rungs = [incident["rung"] for incident in incidents]
    counts = ", ".join(f"{rung} {rungs.count(rung)} times" for rung in sorted(set(rungs)))
    console.print(
        f"{len(report.faults)} faults in {report.seconds:.0f} s; {report.load.num_done} requests served, "
        f"{report.load.num_refused} refused at the door, {report.load.num_unheard} never heard of; {hit} were hit; "
        f"{report.load.num_returns} came back for the rest; {counts or 'no incident'}"
    )
    for phase in sorted({fault.phase for fault in report.faults} - {"any"}):
        met = [fault.in_phase for fault in report.faults if fault.phase == phase]
        console.print(f"--phase {phase}: {sum(met)} of {len(met)} faults hit in it")
    console.print(f"tokens computed again: {tokens}; of one request at most {max(recomputed, default=0)}")
    lost = sum(wrong.what.startswith("lost") for wrong in report.load.wrong)
    console.print(f"lost requests: {lost}; changed replies: {len(report.load.wrong) - lost}")
    console.print(f"exit status {report.status}, processes left: {len(report.left)}")
    for wrong in report.load.wrong[:5]:
        console.print(f"request {wrong.index}: {wrong.what[:600]}", markup=False)


def _times(seconds: list[float]) -> str:
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    return f"{statistics.median(ordered):.2f}, {ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]:.2f}"


def as_json(report: Report) -> bytes:
    """Every single fault, and the sums."""
    return msgspec.json.encode(
        {
            "faults": report.faults,
            "seconds": report.seconds,
            "requests": report.load.num_done,
            "refused": report.load.num_refused,
            "unheard": report.load.num_unheard,
            "came_back": report.load.num_returns,
            "wrong": report.load.wrong,
            "exit_status": report.status,
            "processes_left": report.left,
        }
    )
