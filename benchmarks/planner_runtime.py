"""`make bench-planner-runtime`: how long steps of our own runtime take on this machine, predicted from what
`holdfast probe` finds and measured in the processes that serve.

    python -m benchmarks.planner_runtime [--part service|worker] [--rounds N] [--models smollm2,llama,mixtral]
                                         [--wait SECONDS] [--json FILE]

Every round probes the machine, then measures every model under every plan: decodes of 1, 8 and 32 requests at some 60
tokens of context, prompts of 64 and 512 tokens. Of both, probe and steps, the fastest round counts, since others may
use the machine meanwhile; within a round a decode is the median of its steps. The engine and the workers are those of
`holdfast serve`; there is no gateway, no HTTP, no checkpoint store. Plans with more ranks than the machine has cores
are reported apart.

That needs a machine of its own. `--part worker` does not: it compares the CPU seconds of one worker with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from holdfast import __version__
from holdfast.cluster.driven import DrivenReplica
from holdfast.core.config import ModelConfig, ServeConfig
from holdfast.core.plan import Plan
from holdfast.core.spec import ModelInfo
from holdfast.core.wire import Step
from holdfast.hardware.host import usable_cores
from holdfast.hardware.profile import Format, Profile, Turn
from holdfast.models.checkpoint import Checkpoint
from holdfast.models.inspect import inspect_model
from holdfast.models.parameters import parameters
from holdfast.parallel.cuts import make_plan
from holdfast.planner.measured import Request
from holdfast.planner.memory.runtime_format import RuntimeFormat
from holdfast.planner.runtime_time import PARTS, RuntimeStep, runtime_step
from holdfast.probe.config import MeasureConfig
from holdfast.probe.job import Job
from holdfast.probe.rank import measure as measure_rank
from holdfast.probe.run import SIZES, measure
from holdfast.probe.turns import (
    COLD,
    CONTEXT,
    SKIPPED,
    STEPS,
    cold_model,
    decode_seconds,
    empty,
    prompt_seconds,
    write_model,
)
from holdfast.worker.runner import Launched
from support.local import LocalEngine

from .cpu.quiet import Watch, wait_until_quiet
from .cpu.work import demo_file

PLANS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
}
DECODES, PROMPTS = (1, 8, 32), (64, 512)
FORMATS: tuple[Format, ...] = ("bfloat16", "Q8_0", "Q4_1")
TURNS = ((1, 1), (4, 1), (16, 1), (32, 1), (1, 64), (1, 512))
"""Requests, new tokens of each."""
GOAL = 0.10


@dataclass(frozen=True)
class Case:
    model: str
    plan: str
    job: str


def write_llama(folder: Path) -> str:
    """A Llama of 33 million random parameters, in bfloat16."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048)
    return _save(LlamaForCausalLM(config), folder)


def write_mixtral(folder: Path) -> str:
    """A Mixtral of 8 experts and 52 million random parameters, in bfloat16."""
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 8192}
    config = MixtralConfig(
        **sizes, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=2048, num_local_experts=8
    )
    return _save(MixtralForCausalLM(config), folder)


def _save(model: Any, folder: Path) -> str:
    model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


MODELS: dict[str, Callable[[Path], str]] = {
    "smollm2": lambda _: str(demo_file()),
    "llama": write_llama,
    "mixtral": write_mixtral,
}


def format_of(model: ModelInfo) -> RuntimeFormat:
    """How the runtime holds it."""
    checkpoint = Checkpoint(model)
    names = [name for name in parameters(model.spec) if name.endswith(".weight")]
    stored = {name: found for name in names if (found := checkpoint.format([name])) is not None}
    tied = model.spec.tie_embeddings
    return RuntimeFormat(stored=stored, repeated_head=not tied and checkpoint.equal("embed.weight", "head.weight"))


def requests_of(job: str) -> list[Request]:
    kind, size = job.split()
    if kind == "prompt":
        return [Request(int(size), int(size))]
    return [Request(1, CONTEXT + (SKIPPED + STEPS) // 2)] * int(size)


def measure_steps(model: ModelInfo, plan: Plan) -> dict[str, float]:
    """Seconds of every job."""
    with DrivenReplica(model, plan, ServeConfig(model=ModelConfig(max_model_len=1024, dtype="bfloat16"))) as replica:
        vocabulary = model.spec.vocab_size
        decode_seconds(replica, 1, CONTEXT, vocabulary)  # warm
        found = {f"decode {count}": decode_seconds(replica, count, CONTEXT, vocabulary) for count in DECODES}
        for tokens in PROMPTS:
            found[f"prompt {tokens}"] = min(prompt_seconds(replica, tokens, vocabulary) for _ in range(3))
    return found


def fastest(profiles: Sequence[Profile]) -> Profile:
    """Point by point; they were measured alike."""
    kinds = ("readings", "products", "attentions", "exchanges", "row_works", "turns")
    points = {
        kind: tuple(min(same, key=lambda point: point.seconds) for same in zip(*parts, strict=True))
        for kind in kinds
        for parts in [[getattr(profile, kind) for profile in profiles]]
    }
    return msgspec.structs.replace(profiles[0], **points)


def run(
    models: dict[str, ModelInfo], rounds: int, wait: float, console: Console
) -> tuple[Profile, dict[Case, float]]:
    """Probe and steps by turns, each begun when the machine is quiet, if it is within `wait` seconds."""
    profiles, found, others = [], dict[Case, float](), []
    for round_ in range(rounds):
        with Watch(os.getpid()) as watch:
            profiles.append(measure(MeasureConfig(rounds=2), lambda _: wait_until_quiet(wait), FORMATS))
        console.print(f"round {round_}: probed; others used {watch.others:.2f} cores meanwhile")
        for name, model in models.items():
            for cut, degrees in PLANS.items():
                wait_until_quiet(wait)
                with Watch(os.getpid()) as watch:
                    for job, seconds in measure_steps(model, make_plan(model.spec, **degrees)).items():
                        case = Case(name, cut, job)
                        found[case] = min(seconds, found.get(case, seconds))
                others.append(watch.others)
        console.print(
            f"  steps; others used {statistics.mean(others):.2f} cores in the mean, {min(others):.2f} at least"
        )
    return fastest(profiles), found


# --- a worker alone, by its CPU time ---


class Worker:
    """One worker with one thread, in this process, timed by the CPU seconds of that thread: what else runs on the
    machine does not count. What a step takes the engine and the sockets is left out, of the profile as well."""

    def __init__(self, path: str) -> None:
        self.engine = LocalEngine(path, dtype="bfloat16", num_blocks=600, cpu_threads=1)
        self.steps: list[tuple[list[int], float]] = []
        launch = self.engine.runner._launch

        def timed(step: Step) -> Launched:
            begun = time.thread_time()
            launched = launch(step)
            self.steps.append((step.num_tokens, time.thread_time() - begun))
            return launched

        self.engine.runner._launch = timed

    def seconds(self, job: str) -> float:
        """In the median of the steps of a job."""
        self.engine.schedule(prefix_caching=False)
        self.steps.clear()
        (kind, size), vocabulary = (job.split(maxsplit=1)[0], int(job.split()[1])), self.engine.info.spec.vocab_size
        wanted = [1] * size if kind == "decode" else [size]
        for _ in range(1 if kind == "decode" else 4):
            prompts = [random.choices(range(vocabulary), k=CONTEXT if kind == "decode" else size) for _ in wanted]
            tokens = STEPS if kind == "decode" else 1
            self.engine.run([(prompt, {"max_tokens": tokens, "ignore_eos": True}) for prompt in prompts])
        found = [seconds for tokens, seconds in self.steps if tokens == wanted]
        return statistics.median(found[SKIPPED if kind == "decode" else 1 :])


def worker_profile() -> Profile:
    """Of one thread, by its CPU seconds."""
    job = Job(
        rank=0,
        ranks=1,
        threads=1,
        cores=(0,),
        descriptor=None,
        staged=False,
        sizes=SIZES,
        formats=FORMATS,
        pool_bytes=MeasureConfig().pool_bytes,
        rounds=2,
    )
    with torch.inference_mode():
        found = measure_rank(job, time.thread_time)
    turns = []
    for config in (empty(1, 1), COLD):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), config)
            worker = Worker(folder)
            for count, tokens in TURNS[:1] if config is COLD else TURNS:
                seconds = worker.seconds(f"decode {count}" if tokens == 1 else f"prompt {tokens}")
                how = {"requests": count, "tokens": tokens, "stages": 1, "ranks": 1, "threads": 1}
                turns.append(Turn(**how, cold=config is COLD, seconds=seconds))
    return Profile(
        machine="",
        processor="",
        kernels=found.kernels,
        cores=1,
        memory_bytes=0,
        holdfast=__version__,
        measured_at="",
        load=0.0,
        readings=found.readings,
        products=found.products,
        attentions=found.attentions,
        exchanges=(),
        row_works=found.row_works,
        turns=tuple(turns),
        cold_model=cold_model(),
    )


def run_worker(models: dict[str, ModelInfo]) -> tuple[Profile, dict[Case, float]]:
    torch.set_num_threads(1)
    profile, found = worker_profile(), {}
    for name, model in models.items():
        worker = Worker(model.path)
        for job in (*(f"decode {count}" for count in DECODES), *(f"prompt {tokens}" for tokens in PROMPTS)):
            found[Case(name, "1 rank", job)] = worker.seconds(job)
    return profile, found


# --- both compared ---


def predict(profile: Profile, models: dict[str, ModelInfo], cases: Iterable[Case]) -> dict[Case, RuntimeStep]:
    held = {name: format_of(model) for name, model in models.items()}
    return {
        case: runtime_step(
            profile,
            models[case.model].spec,
            make_plan(models[case.model].spec, **PLANS[case.plan]),
            held[case.model],
            requests_of(case.job),
        )
        for case in cases
    }


def show(console: Console, title: str, found: dict[Case, float], said: dict[Case, RuntimeStep]) -> float:
    """A table; returns the median error."""
    table = Table("model", "plan", "step", "predicted, ms", "measured, ms", "error", *PARTS, title=title)
    errors = {case: said[case].total / seconds - 1 for case, seconds in found.items()}
    for case, seconds in found.items():
        parts = (f"{getattr(said[case], part) * 1e3:.2f}" for part in PARTS)
        times = (f"{said[case].total * 1e3:.2f}", f"{seconds * 1e3:.2f}", f"{errors[case]:+.0%}")
        table.add_row(case.model, case.plan, case.job, *times, *parts)
    console.print(table)
    sizes = sorted(abs(error) for error in errors.values())
    median, tail = statistics.median(sizes), sizes[int(0.9 * (len(sizes) - 1))]
    console.print(f"{title}: error {median:.1%} in the median, {tail:.1%} at the 90th percentile, {len(sizes)} steps")
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("service", "worker"), default="service")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for a quiet machine, each round")
    parser.add_argument("--json", type=Path, help="where to put the profile and all figures")
    chosen = parser.parse_args()
    console = Console(width=160)
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        wanted = chosen.models.split(",")
        models = {name: inspect_model(MODELS[name](Path(folder, name))) for name in wanted}
        if chosen.part == "worker":
            profile, found = run_worker(models)
        else:
            profile, found = run(models, chosen.rounds, chosen.wait, console)
        said = predict(profile, models, found)
    crowded = {case for case in found if ranks_of(case) > usable_cores()}
    title = "one thread, by its CPU time" if chosen.part == "worker" else "as many cores as ranks"
    median = show(console, title, {c: s for c, s in found.items() if c not in crowded}, said)
    if crowded:
        show(console, "more ranks than cores", {c: s for c, s in found.items() if c in crowded}, said)
    if chosen.part == "service":
        console.print(f"goal: ≤ {GOAL:.0%} in the median: {'met' if median <= GOAL else 'missed'}")
    if chosen.json:
        rows = [
            {"model": c.model, "plan": c.plan, "step": c.job, "measured": s, **msgspec.to_builtins(said[c])}
            for c, s in found.items()
        ]
        chosen.json.write_text(json.dumps({"profile": msgspec.to_builtins(profile), "steps": rows}, indent=1))


def ranks_of(case: Case) -> int:
    degrees = PLANS[case.plan]
    return int(degrees.get("tensor", 1) * degrees.get("pipeline", 1))


if __name__ == "__main__":
    main()
