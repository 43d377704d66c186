"""Tables of what was measured, for the terminal and for RESULTS.md."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GOALS = (
    "Goals: decode of one request ≥ 85 % of the memory's bandwidth; 1000/1000 tokens above 16,200 tokens/s in bf16 "
    "and 17,744 with FP8 weights, on an H200."
)


def cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def text(title: str, rows: list[Row]) -> str:
    lines = ["  " + ", ".join(f"{name} {cell(value)}" for name, value in row.items()) for row in rows]
    return "\n".join(["", title, *lines])


def table(title: str, rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(cell(row.get(name, '')) for name in names)} |" for row in rows]
    return "\n".join([f"{title}:", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|", *lines, ""])


def entry(result: dict[str, Any]) -> str:
    """A section of RESULTS.md."""
    facts = ", ".join(f"{name} {value}" for name, value in result["facts"].items() if name != "device")
    limits = result["limits"]
    return "\n".join(
        [
            f"## One GPU: {result['facts']['device']} (commit {commit()}; `make bench-gpu`)",
            "",
            f"{facts}. Measured limits: copy {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, bf16 product "
            f"{limits['bf16_flop_per_second'] / 1e12:.1f} TFLOP/s. {GOALS}",
            "",
            table("Whole jobs side by side, seconds", side_by_side(result["tables"])),
            *(table(title, rows) for title, rows in result["tables"].items() if rows),
        ]
    )


def side_by_side(tables: dict[str, list[Row]]) -> list[Row]:
    """A row for each job, a column for each way it was run."""
    jobs: dict[str, Row] = {}
    for title, rows in tables.items():
        for row in rows:
            if "whole s" in row:
                jobs.setdefault(row["job"], {"job": row["job"]})[title] = row["whole s"]
    return list(jobs.values())


def commit() -> str:
    """With a + where the tree has changes."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
    ).stdout.strip()


def write(result: dict[str, Any], path: Path) -> None:
    """Put the entry before all others."""
    head, first, rest = path.read_text().partition("\n## ")
    path.write_text(f"{head}\n{entry(result)}{first}{rest}")
