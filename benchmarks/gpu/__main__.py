"""One GPU against its limits, cuBLAS and vLLM: `make bench-gpu` (ARGS="--help" tells more).

Each part takes a few minutes and can be run by itself; what the others have found stays in the JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

from holdfast.kernels.interface import Kernels
from holdfast.kernels.select import Exactness, select_kernels

from . import kernels as single
from . import report
from .engine import Engine
from .limits import Job, Roof, Work, facts, measure
from .models import LLAMA_8B, SMALL, spec_of

FOLDER = Path(__file__).parents[1]
PARTS = ("kernels", "plan", "batch", "off", "fp8", "vllm")


def main() -> None:
    options = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    options.add_argument("--part", default=",".join(PARTS), help=f"which, with commas between: {', '.join(PARTS)}")
    options.add_argument("--small", action="store_true", help="a tiny model, to try the benchmark itself, on CPU too")
    options.add_argument("--max-num-seqs", type=int, default=512, help="requests at once at most")
    options.add_argument("--vllm", default=sys.executable, help="a Python that has vLLM")
    options.add_argument("--json", type=Path, default=FOLDER / "results" / "gpu.json", help="where the results go")
    options.add_argument("--write", action="store_true", help="put them into benchmarks/RESULTS.md, too")
    chosen = options.parse_args()
    parts = chosen.part.split(",")
    if unknown := set(parts) - set(PARTS):
        options.error(f"--part {','.join(unknown)}: there are {', '.join(PARTS)}")
    if chosen.write and chosen.small:
        options.error("--write: not what --small finds")
    if not (torch.cuda.is_available() or chosen.small):
        sys.exit("bench-gpu: torch finds no CUDA device (--small tries the benchmark on CPU)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SMALL if chosen.small else LLAMA_8B
    result = opened(chosen.json, facts(device))
    roof = measure(device)
    result["limits"] = asdict(roof)
    print(report.text("limits", [result["facts"] | result["limits"]]), flush=True)
    for part in parts:
        jobs = jobs_of(small=chosen.small)
        for title, rows in tables(part, config, jobs, roof, device, chosen).items():
            print(report.text(title, rows), flush=True)
            result["tables"][title] = rows
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    print(report.text("whole jobs, seconds", report.side_by_side(result["tables"])))
    if chosen.write:
        report.write(result, FOLDER / "RESULTS.md")


def opened(path: Path, found: dict[str, object]) -> dict[str, Any]:
    """What earlier parts have measured on this device."""
    if path.exists() and (earlier := json.loads(path.read_text()))["facts"] == found:
        return dict(earlier)
    return {"facts": found, "tables": {}}


def tables(  # noqa: PLR0917
    part: str,
    config: dict[str, Any],
    jobs: list[Job],
    roof: Roof,
    device: torch.device,
    chosen: argparse.Namespace,
) -> dict[str, list[report.Row]]:
    if part == "kernels":
        return kernel_tables(config, roof, device, small=chosen.small)
    if part == "vllm":
        return {"vLLM": vllm_rows(config, jobs, chosen.vllm)}
    way: Exactness = "plan" if part == "fp8" else part  # type: ignore[assignment]
    title = "FP8 weights, exactness plan" if part == "fp8" else f"bf16, exactness {way}"
    return {title: engine_rows(config, way, jobs, roof, device, chosen.max_num_seqs, fp8=part == "fp8")}


def kernels_of(way: Exactness, device: torch.device) -> Kernels[Any]:
    """The service's; on CPU, with TRITON_INTERPRET=1, those for GPUs."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        from holdfast.kernels.cuda.close import CloseCudaKernels  # noqa: PLC0415
        from holdfast.kernels.cuda.kernels import CudaKernels  # noqa: PLC0415

        return CloseCudaKernels() if way == "off" else CudaKernels(sharded=way == "plan")
    return select_kernels(device.type, torch.bfloat16, exactness=way)


def kernel_tables(
    config: dict[str, Any], roof: Roof, device: torch.device, *, small: bool
) -> dict[str, list[report.Row]]:
    counts = [1, 20] if small else [1, 8, 64, 256, 2048]
    cases = [(2, 1, 100), (1, 20, 100)] if small else [(1, 1, 8192), (64, 1, 2048), (256, 1, 1024), (1, 2048, 2048)]
    plan, batch = kernels_of("plan", device), kernels_of("batch", device)
    found = {
        "products, exactness plan": single.products(plan, config, counts, roof, device),
        "products, exactness batch": single.products(batch, config, counts, roof, device),
        "attention": single.attention(plan, config, cases, roof, device),
    }
    if plan.name == "cuda":
        found["products, FP8 weights"] = single.products(plan, config, counts, roof, device, fp8=True)
    return found


def jobs_of(*, small: bool) -> list[Job]:
    if small:
        return [Job("decode 2", 2, 8, 3), Job("prefill 30", 1, 30, 1), Job("9 in, 4 out", 3, 9, 4)]
    decodes = [Job(f"decode {n}", n, 128, 256) for n in (1, 8, 64, 256)]
    return [*decodes, Job("prefill 2048", 1, 2048, 1), Job("1000 in, 1000 out", 1000, 1000, 1000)]


def engine_rows(  # noqa: PLR0917
    config: dict[str, Any],
    way: Exactness,
    jobs: list[Job],
    roof: Roof,
    device: torch.device,
    most: int,
    *,
    fp8: bool,
) -> list[report.Row]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the part before has left is not free, as the driver sees it
    kernels, work = kernels_of(way, device), Work.of(spec_of(config), fp8=fp8)
    most = min(most, max(job.count for job in jobs))
    engine = Engine(config, kernels, device, most, max(job.prompt + job.output for job in jobs), fp8=fp8)
    rows: list[report.Row] = []
    for job in jobs:
        together = engine.at_once(job)
        engine.run(Job("warm-up", together, min(job.prompt, 64), min(job.output, 8)))
        if job.output == 1:
            engine.run(job)
        first, whole, made = engine.run(job)
        rate, limit = job.count * job.output / whole, least(work, roof, job, together)
        if job.output == 1:
            rate, limit = job.count * job.prompt / first, job.prompt / work.prefill(roof, job.prompt)
        elif job.count == together:
            rate = made / (whole - first)
            limit = together / work.decode(roof, together, job.prompt + job.output / 2)
        rows.append(
            {
                "job": job.name,
                "at once": together,
                "first token s": first,
                "whole s": whole,
                "tokens/s": rate,
                "share of limit": rate / limit,
                "graphs s": engine.graph_seconds,
            }
        )
    return rows


def least(work: Work, roof: Roof, job: Job, together: int) -> float:
    """Tokens/s that a whole job cannot exceed: every prompt is read, and every token made in a full step."""
    steps = job.count * job.output / together
    seconds = job.count * work.prefill(roof, job.prompt)
    return job.count * job.output / (seconds + steps * work.decode(roof, together, job.prompt + job.output / 2))


def vllm_rows(config: dict[str, Any], jobs: list[Job], python: str) -> list[report.Row]:
    if subprocess.run([python, "-c", "import vllm"], capture_output=True, check=False).returncode:
        print(f"\n{python} has no vLLM: no figures of it")
        return []
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        wanted = json.dumps([astuple(job)[1:] for job in jobs])
        command = [python, "-m", "benchmarks.gpu.vllm_peer", folder, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parent)
    if done.returncode:
        print(done.stderr[-2000:])
        return []
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"job"')]
    return [
        {
            "job": job.name,
            "whole s": row["seconds"],
            "tokens/s, prompts' time included": job.count * job.output / row["seconds"],
        }
        for job, row in zip(jobs, found, strict=True)
    ]


if __name__ == "__main__":
    main()
