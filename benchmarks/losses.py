"""How long a replica is away when its workers are killed: from the kill to the next token of eight streams.

python -m benchmarks.losses [MODEL] [--rounds N] [--src NAME=FOLDER …] [--json FILE]

Each case is a service of its own, whose workers are killed once in each round. With several --src (source trees of
Holdfast, by name) the rounds of a case alternate between them, and times are printed as ratios to the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from support.service import Service, demo_model, wait_for

FLAGS = ("--served-model-name", "m", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M")
TP, PP = "--tensor-parallel-size", "--pipeline-parallel-size"
AGAIN, NEVER = ("--max-restarts", "100"), ("--max-restarts", "0", "--regrow-interval", "0")
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "TP2, a worker": ((TP, "2", *AGAIN), ("worker 0.0.1",), False),
    "TP2, a worker, one spare": ((TP, "2", *AGAIN, "--spare-workers", "1"), ("worker 0.0.1",), True),
    "TP2, the engine": ((TP, "2", *AGAIN), ("engine 0",), False),
    "TP4, a worker": ((TP, "4", *AGAIN), ("worker 0.0.2",), False),
    "TP4, a worker, one spare": ((TP, "4", *AGAIN, "--spare-workers", "1"), ("worker 0.0.2",), True),
    "TP4 to TP3": ((TP, "4", *NEVER), ("worker 0.0.2",), False),
    "TP4 to TP2, two at once": ((TP, "4", *NEVER), ("worker 0.0.1", "worker 0.0.2"), False),
    "PP4 to PP3": ((PP, "4", *NEVER), ("worker 0.2.0",), False),
}
STREAMS, TOKENS, BEFORE = 8, 220, 320


async def ask(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        bodies = [
            {"model": "m", "prompt": f"{i} boats", "max_tokens": TOKENS, "ignore_eos": True} for i in range(STREAMS)
        ]
        for reply in await asyncio.gather(*[client.post("/v1/completions", json=body) for body in bodies]):
            reply.raise_for_status()


async def measure(service: Service, victims: tuple[str, ...]) -> dict[str, float]:
    """Kill them amid the streams; seconds, and bytes of weights."""
    count = "holdfast:generation_tokens_total"
    begun = service.metrics().get(count, 0)
    asking = asyncio.create_task(ask(service.url))
    await asyncio.to_thread(wait_for, "tokens", lambda: service.metrics()[count] > begun + BEFORE, 300)
    processes = [service.child(f"holdfast {victim}") for victim in victims]
    at = time.time()
    for process in processes:
        process.send_signal(signal.SIGKILL)
    await asking
    told: list[dict[str, Any]] = [each for each in service.incidents() if each["loss"]["detected"] > at]
    last = told[-1]
    return {
        "noticed": told[0]["loss"]["detected"] - at,
        "token": min(each["first_token"] for each in told if each["first_token"]) - at,
        "kept": last.get("weights_kept") or 0,
        "loaded": last.get("weights_loaded") or 0,
    }


def run(model: str, case: str, source: str) -> dict[str, float]:
    """One service, one loss."""
    flags, victims, has_spare = CASES[case]
    os.environ["PYTHONPATH"] = source
    with tempfile.TemporaryDirectory() as folder:
        service = Service(model, *FLAGS, *flags, log=Path(folder) / "log").wait_ready()
        try:
            if has_spare:
                told = f"{service.url}/cluster"
                wait_for("a spare", lambda: httpx.get(told).json()["spare_workers"] == 1, 120)
            service.wait_ready()
            return asyncio.run(measure(service, victims))
        finally:
            service.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--src", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--cases", default=",".join(CASES).replace(", ", " "), help="parts of their names")
    parser.add_argument("--json")
    chosen = parser.parse_args()
    model = chosen.model or demo_model()
    sources = dict(each.split("=", 1) for each in chosen.src) or {"here": "src"}
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    print(f"{'case':28}{'tree':>10}{'noticed':>9}{'token':>8}{'ratio':>7}{'kept':>8}{'loaded':>8}  s, MB, medians")
    for case in CASES:
        if not any(part in case.replace(", ", " ") for part in chosen.cases.split(",")):
            continue
        spared = CASES[case][2]
        names = [name for name in sources if not spared or name == list(sources)[-1]]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(chosen.rounds):
            for name in names:
                found[name].append(run(model, case, str(Path(sources[name]).absolute())))
        results[case] = found
        medians = {
            name: {key: statistics.median(r[key] for r in some) for key in some[0]} for name, some in found.items()
        }
        base = medians[names[0]]["token"]
        for name, row in medians.items():
            times = f"{row['noticed']:9.3f}{row['token']:8.2f}{row['token'] / base:7.2f}"
            print(f"{case:28}{name:>10}{times}{row['kept'] / 1e6:8.1f}{row['loaded'] / 1e6:8.1f}", flush=True)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
