"""What a run of `holdfast chaos` has shown: tables for people, JSON for programs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from holdfast.chaos.faults import Fault, key_of
from holdfast.chaos.load import Load

_MOMENTS: dict[str, Callable[[Fault], float | None]] = {
    "detected": lambda fault: fault.detected,
    "decided": lambda fault: min(fault.after("decided"), default=None),
    "first token": lambda fault: min(fault.after("first_token"), default=None),
    "all go on": lambda fault: max(fault.after("last_token"), default=None),
    "restored": lambda fault: None if fault.whole_again is None else fault.whole_again - fault.at,
}
"""Seconds from a fault to: its detection; what is done was decided; the first of the requests it hit got a token
again; the last of them did; all that it hit served again."""


@dataclass(slots=True)
class Report:
    """All that is known in the end."""

    faults: list[Fault]
    load: Load
    seconds: float
    status: int
    left: list[int]
    """Pids."""
    files_left: list[str]

    @property
    def is_good(self) -> bool:
        return not self.load.wrong and not self.left and not self.files_left and self.status == 0

    def sums(self) -> dict[str, Any]:
        """Of all faults, by kind and by the moment they were to hit."""
        kinds, phases = {fault.kind for fault in self.faults}, {fault.phase for fault in self.faults}
        return {
            "by_kind": {kind: _sums_of([f for f in self.faults if f.kind == kind]) for kind in sorted(kinds)},
            "by_phase": {phase: _sums_of([f for f in self.faults if f.phase == phase]) for phase in sorted(phases)},
        }


def _sums_of(faults: list[Fault]) -> dict[str, Any]:
    incidents = list({key_of(each): each for fault in faults for each in fault.incidents}.values())
    return {
        "faults": len(faults),
        "struck_in_phase": sum(fault.in_phase for fault in faults),
        "seconds": {name: _median_and_p99(map(of, faults)) for name, of in _MOMENTS.items()},
        "requests_hit": sum(incident["requests"] for incident in incidents),
        "recomputed_tokens": sum(incident["recomputed"] for incident in incidents),
        "recomputed_tokens_most": max((incident["recomputed_most"] for incident in incidents), default=0),
        "rungs": dict(Counter(incident["rung"] for incident in incidents)),
    }


def _median_and_p99(seconds: Iterable[float | None]) -> list[float] | None:
    ordered = sorted(each for each in seconds if each is not None)
    return [statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]] if ordered else None


def show(report: Report, console: Console) -> None:
    """Tables, and the verdict."""
    sums, load = report.sums(), report.load
    for title, rows in (("fault", sums["by_kind"]), ("--phase", sums["by_phase"])):
        console.print(_table(title, rows))
    every = _sums_of(report.faults)
    rungs = ", ".join(f"{rung} {count} times" for rung, count in sorted(every["rungs"].items()))
    console.print(
        f"{len(report.faults)} faults in {report.seconds:.0f} s; {load.num_done} requests served, "
        f"{load.num_refused} refused at the door, {load.num_unheard} never heard of; {every['requests_hit']} were "
        f"hit; {load.num_returns} came back for the rest; {rungs or 'no incident'}"
    )
    tokens, most = every["recomputed_tokens"], every["recomputed_tokens_most"]
    console.print(f"tokens computed again: {tokens}; of one request at most {most}")
    lost = sum(wrong.what.startswith("lost") for wrong in load.wrong)
    console.print(f"lost requests: {lost}; changed replies: {len(load.wrong) - lost}")
    texts = [sum(getattr(wrong, name) for wrong in load.wrong) for name in ("lost", "duplicated", "changed")]
    console.print("characters lost: {}; duplicated: {}; changed: {}".format(*texts))
    console.print(
        f"exit status {report.status}, processes left: {len(report.left)}, files left: {len(report.files_left)}"
    )
    for wrong in load.wrong[:5]:
        console.print(f"request {wrong.index}: {wrong.what[:600]}", markup=False)


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="seconds after the fault: median, 99th percentile", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column(title, no_wrap=True)
    for column in ("n", "in it", *_MOMENTS, "computed again", "rungs"):
        table.add_column(column)
    for name, row in rows.items():
        times = ["-" if pair is None else "{:.2f}, {:.2f}".format(*pair) for pair in row["seconds"].values()]
        rungs = ", ".join(f"{rung} {count}" for rung, count in sorted(row["rungs"].items()))
        counts = (str(row["faults"]), str(row["struck_in_phase"]))
        table.add_row(name, *counts, *times, str(row["recomputed_tokens"]), rungs or "-")
    return table


def as_json(report: Report) -> bytes:
    """Every single fault, and the sums."""
    return msgspec.json.encode(
        {
            "faults": report.faults,
            **report.sums(),
            "seconds": report.seconds,
            "requests": report.load.num_done,
            "refused": report.load.num_refused,
            "unheard": report.load.num_unheard,
            "came_back": report.load.num_returns,
            "wrong": report.load.wrong,
            "exit_status": report.status,
            "processes_left": report.left,
            "files_left": report.files_left,
        }
    )
