"""`make bench-cpu`: Holdfast, llama.cpp, vLLM and transformers side by side on this machine's CPU.

    python -m benchmarks.cpu [--model NAME,…] [--job NAME,…] [--peers NAME,…] [--rounds N] [--extras yes|no|only]

A whole run is written to benchmarks/results/cpu.json and cpu.png; one of a part only, to benchmarks/out/cpu.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.bench.report import machine_facts

from . import report
from .bounds import Gauge
from .checkpoints import make
from .contest import Contest, ModelResult
from .exactness import ExactnessResult, measure_exactness
from .install import install
from .plot import draw
from .service import ServiceResult, measure_http, measure_ready
from .verdict import JobVerdict, judge
from .work import BENCHMARKS, JOBS, OURS, OUT, PEERS, RESULTS, THREADS, Job, Model, all_models

HTTP_MODELS = ("smollm2-q4_1", "llama-1b")


def choice(known: Collection[str]) -> Any:
    """An argparse type: comma-separated names out of `known`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: must be some of {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def arguments(models: dict[str, Model]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-cpu", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=choice(models), help=f"some of {','.join(models)}")
    parser.add_argument("--job", type=choice(JOBS), help=f"some of {','.join(JOBS)}")
    parser.add_argument("--peers", type=choice(PEERS), help=f"some of {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each; the median counts")
    parser.add_argument(
        "--extras",
        choices=("yes", "no", "only"),
        help="start to ready, HTTP against the engine, the cost of exactness; default: no if a part is chosen",
    )
    found = parser.parse_args()
    if found.rounds < 1:
        parser.error(f"--rounds {found.rounds}: must be at least 1")
    return found


def measure_models(
    models: list[Model], peers: list[str], jobs: list[Job], rounds: int, gauge: Gauge
) -> list[ModelResult]:
    """Every model with the chosen peers that can read it."""
    problems = {peer: problem for peer in peers if peer not in OURS and (problem := install(peer))}
    for problem in problems.values():
        print(problem, file=sys.stderr)
    results = []
    for model in models:
        taking_part = [peer for peer in model.peers if peer in peers and peer not in problems]
        result = Contest(model, taking_part, jobs, gauge).run(rounds)
        result.problems += [problem for peer, problem in problems.items() if peer in model.peers]
        results.append(result)
    return results


def measure_service(models: dict[str, Model], rounds: int) -> ServiceResult:
    result = ServiceResult()
    measure_ready(models["smollm2-q4_1"], rounds, result)
    for name in HTTP_MODELS:
        measure_http(models[name], rounds, result)
    return result


def commit() -> str:
    """What was measured; `+` when files differ from it."""
    command = ["git", "-C", str(BENCHMARKS.parent)]
    try:
        name = subprocess.run([*command, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*command, "status", "--porcelain", "src"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changes.stdout else "")


def record(
    results: list[ModelResult],
    verdicts: dict[str, list[JobVerdict]],
    gauge: Gauge,
    extras: dict[str, ServiceResult | ExactnessResult],
    rounds: int,
) -> dict[str, Any]:
    """Everything, for JSON: facts, limits, figures, every single timing."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine_facts(),
        "threads": THREADS,
        "rounds": rounds,
        "limits": asdict(gauge.best),
        "limit_readings": [asdict(reading) for reading in gauge.readings],
        "jobs": {name: asdict(job) for name, job in JOBS.items()},
        "models": {
            result.model.name: {
                "title": result.model.title,
                "versions": result.versions,
                "how": result.how,
                "greedy_tokens": result.greetings,
                "problems": result.problems,
                "verdicts": {verdict.job.name: verdict.record() for verdict in verdicts[result.model.name]},
                "timings": {
                    job: {peer: [_timing(timing) for timing in timings] for peer, timings in found.items()}
                    for job, found in result.timings.items()
                },
            }
            for result in results
        },
    } | {name: extra.record() for name, extra in extras.items()}


def _timing(timing: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(timing).items() if name != "tokens"}


def write(folder: Path, found: dict[str, Any], verdicts: list[JobVerdict], console: Console) -> None:
    """`cpu.json` and `cpu.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    written = [folder / "cpu.json"]
    if verdicts:
        facts = found["machine"]
        caption = (
            f"numbers: tokens/s of whole jobs · {facts['cpu']}, {THREADS} threads · commit {found['commit']} · "
            f"median of {found['rounds']}"
        )
        draw(folder / "cpu.png", verdicts, caption)
        written.append(folder / "cpu.png")
    console.print("written:", *(str(path.relative_to(BENCHMARKS.parent)) for path in written), highlight=False)


def main() -> int:
    """Set up, measure, print, write."""
    models = all_models()
    args = arguments(models)
    partial = bool(args.model or args.job or args.peers)
    wanted = args.extras or ("no" if partial else "yes")
    chosen = [] if wanted == "only" else [models[name] for name in args.model or models]
    needed = {model.name: model for model in chosen}
    if wanted != "no":
        needed |= {name: models[name] for name in HTTP_MODELS}
    for model in needed.values():
        make(model)
    jobs = [JOBS[name] for name in args.job or JOBS]
    gauge = Gauge()
    gauge.read()
    results = measure_models(chosen, args.peers or list(PEERS), jobs, args.rounds, gauge)
    extras: dict[str, ServiceResult | ExactnessResult] = {}
    if wanted != "no":
        extras = {"service": measure_service(models, args.rounds), "exactness": measure_exactness(args.rounds)}
    verdicts = {result.model.name: judge(result, jobs, gauge.best) for result in results}
    console = Console(width=None if sys.stdout.isatty() else 132)
    for result in results:
        report.print_model(console, result, verdicts[result.model.name])
    report.print_limits(console, gauge.best)
    for extra in extras.values():
        report.print_extra(console, extra)
    found = record(results, verdicts, gauge, extras, args.rounds)
    whole = not partial and wanted == "yes"
    write(RESULTS if whole else OUT, found, [one for some in verdicts.values() for one in some], console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
