"""`make bench-planner`: how well the planner predicts what others measured.

python -m benchmarks.planner [--data FOLDER] [--without GPU] [--write]

Half of the rows (by a hash of the row) are fitted, the other half is reported: errors by metric, source and device,
the worst ten, and what the planner would have chosen under a limit of TPOT. --without: no row of that device is
fitted, and only its rows are reported. --write: fit on all rows, and write coefficients.toml and collectives.csv.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np
from benchmarks.planner import collectives
from benchmarks.planner.fit import fit, toml_of
from benchmarks.planner.report import group_errors, judge, print_errors, print_picks, print_worst
from rich.console import Console

from holdfast.planner.coefficients import parse_coefficients

ROOT = Path(__file__).resolve().parents[2]
PLANNER = ROOT / "src" / "holdfast" / "planner"
GOALS = {"tpot": "10", "ttft": "15"}


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def is_fitted(row: dict[str, str]) -> bool:
    return hashlib.sha256(",".join(row.values()).encode()).digest()[0] % 2 == 1


def report_collectives(console: Console, rows: list[dict[str, str]], write: bool) -> float:
    """Returns the factor within which nine in ten of the rows that were not fitted are."""
    fitted = collectives.fit(collectives.points_of([row for row in rows if is_fitted(row)]))
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    unknown = 0
    for point in collectives.points_of([row for row in rows if not is_fitted(row)]):
        if point.key not in fitted:
            unknown += 1
            continue
        software, device, nodes, _, operation = point.key
        error = fitted[point.key].time(point.wire) / point.time - 1
        groups["all", "", ""].append(error)
        groups[operation, "all", ""].append(error)
        groups[software, device, f"{nodes} node{'s' * (nodes > 1)}"].append(error)
    print_errors(
        console, "collectives: rows not fitted (all-reduce: goal median 10, 90th 25)", groups, ("of", "device", "")
    )
    console.print(f"{len(fitted)} paths of 4 numbers; {unknown} rows of a path without any fitted row")
    if write:
        collectives.write(collectives.fit(collectives.points_of(rows)), PLANNER / "collectives.csv")
    return float(np.exp(np.quantile(np.abs(np.log1p(groups["all", "", ""])), 0.9)))


def report_serving(console: Console, rows: list[dict[str, str]], chosen: argparse.Namespace, band: float) -> None:
    without = chosen.without
    tables = tomllib.loads((PLANNER / "coefficients.toml").read_text(encoding="utf-8"))
    judged, refused = judge(rows, parse_coefficients(tables))
    usable = [one.row for one in judged]
    learn = [row for row in usable if (without not in row["gpu"] if without else is_fitted(row))]
    rest = [row for row in usable if (without in row["gpu"] if without else not is_fitted(row))]
    fitted = fit(tables, learn)
    known = parse_coefficients(fitted)
    judged, _ = judge(rest, known)
    print_errors(
        console,
        f"serving: {len(rest)} rows not fitted ({len(learn)} fitted; goal: mean of tpot 10, of ttft 15)",
        group_errors(judged, by_device=False),
        ("kind", "", ""),
    )
    print_errors(console, "by source and device", group_errors(judged, by_device=True), ("kind", "source", "gpu"))
    print_worst(console, judged)
    for margin in (1.0, 1.03, 1.05, 1.1):
        print_picks(console, judged, margin)
    print_picks(console, judge(usable, known)[0])
    console.print(f"{sum(refused.values())} rows that cannot be predicted:")
    for reason, count in sorted(refused.items(), key=lambda item: -item[1])[:12]:
        console.print(f"  {count:4} {reason}")
    console.print(toml_of(fitted))
    if chosen.write:
        bands = defaultdict(list)
        for one in judged:
            bands[one.kind].append(abs(np.log(one.predicted / one.value)))
        whole = fit(fitted, usable)
        whole["bands"] = {
            kind: round(float(np.exp(np.quantile(off, 0.9))), 2) for kind, off in bands.items() if len(off) > 9
        }
        every = [off for some in bands.values() for off in some]
        whole["bands"] |= {"collective": round(band, 2), "other": round(float(np.exp(np.quantile(every, 0.9))), 2)}
        (PLANNER / "coefficients.toml").write_text(toml_of(whole), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--without", help="a word of the gpu column")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    console = Console(width=150)
    files = [chosen.data / name for name in ("measured_collectives.csv", "measured_serving.csv")]
    if not all(file.exists() for file in files):
        raise SystemExit(
            f"{chosen.data}: measured_collectives.csv and measured_serving.csv are not there; --data FOLDER"
        )
    band = 1.0 if chosen.without else report_collectives(console, read(files[0]), chosen.write)
    report_serving(console, read(files[1]), chosen, band)


if __name__ == "__main__":
    main()
