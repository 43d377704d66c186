"""`make bench-plans`: what it costs to cut a model, and what pipelines lose, on the CPU processes of this machine.

    python -m benchmarks.plans [--model FOLDER] [--rounds N] [--part tensor,pipeline,weights,experts]

    tensor       one rank with two threads against two ranks with one, decoding at 1, 8 and 32 streams, and prefill
    weights      two replicas that hold a copy of the weights each, against two that hold one together
    experts      16 experts chosen by Zipf's law on 8 ranks: the busiest rank's load before and after they are moved
    pipeline     the three batching modes on four stages whose time is a calibrated wait: idle time, beside theory

Prints tables; what is worth keeping goes into benchmarks/RESULTS.md by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.bench.config import BenchConfig, LoadConfig, RequestsConfig, TargetConfig
from holdfast.bench.load import measure
from holdfast.bench.measure import Summary
from holdfast.bench.report import summary_of
from holdfast.worker.start import PACE_VARIABLE
from support.checkpoints import save
from support.skewed import skewed_mixtral
from support.tiny import byte_tokenizer

from .cpu.checkpoints import make
from .cpu.processes import free_port
from .cpu.processes import serving as waiting_for
from .cpu.work import all_models

ONE = ("--tensor-parallel-size", "1", "--cpu-threads", "2")
TWO = ("--tensor-parallel-size", "2", "--cpu-threads", "1")
STAGES = 4
PACE = "20000,200"
JOBS = {"decode 1": (1, 32, 96), "decode 8": (8, 32, 64), "decode 32": (32, 32, 64), "prefill": (4, 512, 2)}
"""Streams, tokens in, tokens out."""


def counters(url: str) -> dict[tuple[str, str], float]:
    """(name, rank) → value."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    pattern = r'^holdfast:rank_(\w+)_total\{.*rank="([\d.]+)"\} (\S+)$'
    return {(name, rank): float(value) for name, rank, value in re.findall(pattern, text, re.MULTILINE)}


@contextlib.contextmanager
def paced(pace: str) -> Iterator[None]:
    """Servers that start meanwhile have stages of this pace."""
    os.environ[PACE_VARIABLE] = pace
    try:
        yield
    finally:
        del os.environ[PACE_VARIABLE]


def paced_model(folder: Path) -> str:
    """As many equal layers as stages, so small that they cost nothing."""
    config = LlamaConfig(
        vocab_size=byte_tokenizer(folder),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=STAGES,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def serving(model: str, *flags: str) -> Iterator[str]:
    """`holdfast serve`, as a user starts it; its address."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "holdfast"), "serve", model, "--port", str(port), *flags]
    with waiting_for(command, port):
        yield f"http://127.0.0.1:{port}"


def load(url: str, streams: int, tokens_in: int, tokens_out: int, seed: int) -> Summary:
    """Two requests per stream; new prompts for each seed."""
    config = BenchConfig(
        target=TargetConfig(base_url=url),
        load=LoadConfig(max_concurrency=streams),
        requests=RequestsConfig(
            num_prompts=2 * streams,
            random_input_len=tokens_in,
            random_output_len=tokens_out,
            ignore_eos=True,
            seed=seed,
        ),
    )
    run = measure(config)
    return summary_of(run, config)


def tokens_per_second(url: str, job: str, seed: int) -> float:
    summary = load(url, *JOBS[job], seed)
    assert not summary.failed, summary
    return summary.input_rate if job == "prefill" else summary.output_rate


def compare_degrees(console: Console, model: str, rounds: int) -> None:
    table = Table("job", "1 rank, 2 threads", "2 ranks, 1 thread", "ratio", "all-reduce", title="tokens/s, medians")
    found: dict[str, list[list[float]]] = {job: [[], []] for job in JOBS}
    shares: dict[str, list[float]] = {job: [] for job in JOBS}
    for round_ in range(rounds):
        for index, flags in enumerate((ONE, TWO)):
            with serving(model, "--max-model-len", "1024", *flags) as url:
                tokens_per_second(url, "decode 1", seed=1000)  # warm
                for job in JOBS:
                    before = counters(url)
                    found[job][index].append(tokens_per_second(url, job, round_))
                    after = counters(url)
                    if index:
                        grown = {key: after[key] - before.get(key, 0.0) for key in after}
                        ranks = {rank for _, rank in grown}
                        waited = sum(grown["waited_seconds", rank] for rank in ranks)
                        shares[job].append(waited / sum(grown["step_seconds", rank] for rank in ranks))
    for job, (one, two) in found.items():
        a, b = statistics.median(one), statistics.median(two)
        table.add_row(job, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}", f"{statistics.median(shares[job]):.1%} waiting")
    console.print(table)


def compare_weights(console: Console, model: str, rounds: int) -> None:
    table = Table("weights", *JOBS, "memory of the workers", title="2 replicas, tokens/s, medians")
    for name, flags in (("each its own", ()), ("held together", ("--shard-weights",))):
        found: dict[str, list[float]] = {job: [] for job in JOBS}
        with serving(model, "--max-model-len", "1024", "--data-parallel-size", "2", *flags) as url:
            tokens_per_second(url, "decode 8", seed=1000)  # warm
            for round_, job in product(range(rounds), JOBS):
                found[job].append(tokens_per_second(url, job, round_))
            children = psutil.Process().children(recursive=True)
            workers = [child for child in children if "holdfast worker" in " ".join(child.cmdline())]
            memory = sum(worker.memory_full_info().pss for worker in workers)
        medians = [f"{statistics.median(rates):.1f}" for rates in found.values()]
        table.add_row(name, *medians, f"{memory / 1e9:.2f} GB")
    console.print(table)


def compare_placements(console: Console) -> None:
    """Loads of the ranks before the experts are moved, and after."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 256}
        experts = {"num_local_experts": 16, "num_experts_per_tok": 2, "max_position_embeddings": 1024}
        size = byte_tokenizer(Path(folder))
        model = skewed_mixtral(**config, **experts, num_hidden_layers=4, vocab_size=size)
        path = save(model, Path(folder))
        flags = ("--tensor-parallel-size", "8", "--expert-parallel-size", "8", "--max-model-len", "1024")
        table = Table("redundant experts", "max/mean before", "after", title="16 experts by Zipf's law on 8 ranks")
        for redundant in ("0", "8", "16"):
            balanced = ("--enable-eplb", "--num-redundant-experts", redundant, "--eplb-step-interval", "150")
            spreads = []
            for more in ((), balanced):
                with serving(path, *flags, *more) as url:
                    load(url, 24, 64, 64, seed=0)  # in which they are moved
                    before = counters(url)
                    load(url, 24, 64, 64, seed=1)
                    grown = [rows - before[key] for key, rows in counters(url).items() if key[0] == "expert_rows"]
                    spreads.append(max(grown) / statistics.mean(grown))
            table.add_row(redundant, *(f"{spread:.2f}" for spread in spreads))
        console.print(table)


@contextlib.contextmanager
def sampled(url: str) -> Iterator[list[tuple[float, dict[tuple[str, str], float]]]]:
    """Readings of the counters, with their time, every fifth of a second meanwhile."""
    samples: list[tuple[float, dict[tuple[str, str], float]]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            samples.append((time.perf_counter(), counters(url)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def compare_modes(console: Console) -> None:
    """Four stages of one layer each, which take 20 ms and 0.2 ms per token whatever the processor does."""
    with tempfile.TemporaryDirectory() as folder:
        model = paced_model(Path(folder))
        table = Table("mode", "streams", "tokens/s", "idle", "(p-1)/(m+p-1)", "TTFT p50", "p99", title="4 stages")
        for streams, mode in product((8, 32), ("synchronous", "hybrid", "asynchronous")):
            flags = ("--pipeline-parallel-size", str(STAGES), "--pipeline-batching", mode, "--max-model-len", "1024")
            with paced(PACE), serving(model, *flags) as url:
                load(url, streams, 32, 8, seed=1000)  # warm
                with sampled(url) as samples:
                    summary = load(url, streams, 64, 48, seed=1)
            (begun, before), (ended, after) = samples[len(samples) // 4], samples[3 * len(samples) // 4]
            grown = {key: after[key] - before[key] for key in after}
            busy = sum(
                grown["step_seconds", rank] - grown["idle_seconds", rank] - grown["waited_seconds", rank]
                for rank in {rank for _, rank in grown}
            )
            theory = (STAGES - 1) / (2 * STAGES - 1) if mode == "synchronous" else 0.0
            ttft = summary.latencies["ttft"]
            assert ttft is not None
            table.add_row(
                mode,
                str(streams),
                f"{summary.output_rate:.0f}",
                f"{1 - busy / (ended - begun) / STAGES:.1%}",
                f"{theory:.1%}",
                *(f"{1000 * ttft.percentiles[p]:.0f} ms" for p in (50, 99)),
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder; by default random weights of the shape of Llama 3.2 1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", default="tensor,pipeline,weights,experts")
    chosen = parser.parse_args()
    shape = all_models()["llama-1b"]
    make(shape)
    model = chosen.model or str(shape.holdfast_path)
    console = Console(width=110)
    parts = chosen.part.split(",")
    if "pipeline" in parts:
        compare_modes(console)
    if "experts" in parts:
        compare_placements(console)
    if "weights" in parts:
        compare_weights(console, model, chosen.rounds)
    if "tensor" in parts:
        compare_degrees(console, model, chosen.rounds)


if __name__ == "__main__":
    main()
