"""One GPU against its limits, cuBLAS and vLLM: `make bench-gpu` (ARGS="--help" tells more)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from holdfast.kernels.select import Exactness, select_kernels

from ..limits import Limits
from . import kernels as single
from .engine import Engine
from .limits import facts, measure
from .models import LLAMA_8B, SMALL, spec_of

RESULTS = Path(__file__).parents[1] / "results"
WAYS: tuple[Exactness, ...] = ("plan", "batch", "off")
Job = tuple[int, int, int]


def main() -> None:
    options = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    options.add_argument("--small", action="store_true", help="a tiny model, to try the benchmark itself, on CPU too")
    options.add_argument("--json", type=Path, default=RESULTS / "gpu.json", help="where the results go")
    chosen = options.parse_args()
    if not (torch.cuda.is_available() or chosen.small):
        sys.exit("bench-gpu: torch finds no CUDA device (--small tries the benchmark on CPU)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SMALL if chosen.small else LLAMA_8B
    result: dict[str, Any] = facts(device) | {"limits": measure(device)}
    show("limits", [result["limits"]])
    result |= kernel_tables(config, result["limits"], device, small=chosen.small)
    jobs = engine_jobs(small=chosen.small)
    result["engine"] = [row for way in WAYS for row in engine_rows(config, way, jobs, result["limits"], device)]
    show("engine", result["engine"])
    if device.type == "cuda" and find_spec("vllm"):
        result["vllm"] = vllm_rows(config, jobs)
        show("vLLM", result["vllm"])
    else:
        print("\nvLLM is not installed here: no figures of it")
    chosen.json.write_text(json.dumps(result, indent=1) + "\n")


def kernel_tables(
    config: dict[str, Any], limits: dict[str, float], device: torch.device, *, small: bool
) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    counts = [1, 8] if small else [1, 8, 64, 256, 2048]
    cases = [(2, 1, 100), (1, 20, 100)] if small else [(1, 1, 8192), (64, 1, 2048), (256, 1, 1024), (1, 2048, 2048)]
    for way in WAYS[:2]:
        kernels = select_kernels(device.type, torch.bfloat16, exactness=way)
        tables[f"products, {way}"] = single.products(kernels, config, counts, limits, device)
        show(f"products, exactness {way}", tables[f"products, {way}"])
    tables["attention"] = single.attention(kernels, config, cases, limits, device)
    show("attention", tables["attention"])
    return tables


def engine_jobs(*, small: bool) -> dict[str, Job]:
    """(requests, prompt tokens, output tokens)"""
    if small:
        return {"decode 2": (2, 8, 20), "prefill 64": (1, 64, 1)}
    decodes = {f"decode {n}": (n, 128, 256) for n in (1, 8, 64, 256)}
    return decodes | {"prefill 2048": (1, 2048, 1), "1000 in, 1000 out": (500, 1000, 1000)}


def engine_rows(
    config: dict[str, Any], way: Exactness, jobs: dict[str, Job], limits: dict[str, float], device: torch.device
) -> list[dict[str, object]]:
    kernels = select_kernels(device.type, torch.bfloat16, exactness=way)
    most = min(256, max(count for count, _, _ in jobs.values()))
    engine = Engine(config, kernels, device, most, max(prompt + output for _, prompt, output in jobs.values()))
    roof = Limits(limits["copy_bytes_per_second"], limits["bf16_flop_per_second"])
    rows: list[dict[str, object]] = []
    for name, (count, prompt, output) in jobs.items():
        engine.run(min(count, most), min(prompt, 64), min(output, 8))
        first, whole = engine.run(count, prompt, output)
        row: dict[str, object] = {"exactness": way, "job": name, "first token s": first, "whole s": whole}
        if output == 1:
            rate = count * prompt / first
            limit = roof.decode_rate(spec_of(config), torch.bfloat16, prompt)
        else:
            rate = count * (output - 1) / (whole - first) if count <= most else count * output / whole
            limit = roof.decode_rate(spec_of(config), torch.bfloat16, min(count, most))
        rows.append(row | {"tokens/s": rate, "share of limit": rate / limit, "graphs s": engine.graph_seconds})
    return rows


def vllm_rows(config: dict[str, Any], jobs: dict[str, Job]) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "benchmarks.gpu.vllm_peer", folder, json.dumps(list(jobs.values()))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:])
        return []
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"job"')]
    return [{"job": name, "whole s": row["seconds"]} for name, row in zip(jobs, rows, strict=True)]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for row in rows:
        print(
            "  "
            + ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
