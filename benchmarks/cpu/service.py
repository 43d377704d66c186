"""What serving adds: seconds from the start to ready, and what HTTP with SSE costs against the bare engine."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from holdfast.bench.config import BenchConfig, LoadConfig, RequestsConfig, TargetConfig
from holdfast.bench.load import measure

from .llama_cpp import server_command
from .processes import ChildPeer, PeerError, free_port, serving
from .work import HTTP_GOAL_LOSS, JOBS, READY_GOAL_SECONDS, THREADS, Model

HTTP_JOB = JOBS["decode-32"]


@dataclass
class ServiceResult:
    """Seconds of every round."""

    ready: dict[str, list[float]] = field(default_factory=dict)
    """Server → start to a healthy port."""
    http: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Model → "http" or "engine" → the job of 32 requests."""
    problems: list[str] = field(default_factory=list)

    def http_loss(self, model: str) -> float:
        """The share of the bare engine's rate that is lost."""
        found = self.http[model]
        return 1 - median(found["engine"]) / median(found["http"])

    def record(self) -> dict[str, Any]:
        """For JSON."""
        loss = {model: self.http_loss(model) for model in self.http}
        return {
            "ready_seconds": self.ready,
            "ready_goal_seconds": READY_GOAL_SECONDS,
            "http_seconds": self.http,
            "http_loss": loss,
            "http_goal_loss": HTTP_GOAL_LOSS,
            "problems": self.problems,
        }


def holdfast_command(model: Path, port: int) -> list[str]:
    """`holdfast serve`, as a user starts it."""
    command = str(Path(sys.executable).parent / "holdfast")
    return [command, "serve", str(model), "--port", str(port), "--cpu-threads", str(THREADS)]


def measure_ready(model: Model, rounds: int, result: ServiceResult) -> None:
    """Start each server and wait for `/health`, turn about."""
    for _ in range(rounds):
        port = free_port()
        commands = {
            "holdfast": holdfast_command(model.holdfast_path, port),
            "llama.cpp": server_command(model.gguf, port),
        }
        for name, command in commands.items():
            if command is None:
                continue
            try:
                with serving(command, port) as seconds:
                    result.ready.setdefault(name, []).append(seconds)
                    print(f"{name} is ready after {seconds:.2f} s", file=sys.stderr)
            except (PeerError, OSError) as error:
                result.problems.append(str(error))


def measure_http(model: Model, rounds: int, result: ServiceResult) -> None:
    """32 requests to `holdfast serve`, by Holdfast's own load tool, and to the bare engine, turn about."""
    engine = ChildPeer("holdfast", model)
    port = free_port()
    found: dict[str, list[float]] = {"http": [], "engine": []}
    try:
        engine.start([HTTP_JOB])
        engine.hold()
        with serving(holdfast_command(model.holdfast_path, port), port):
            _load(port, model, seed=-1)
            for number in range(rounds):
                found["http"].append(_load(port, model, seed=number))
                engine.resume()
                timing = engine.run(HTTP_JOB, HTTP_JOB.prompts(model.vocab_size, number))
                engine.hold()
                found["engine"].append(timing.seconds)
                print(f"{model.name}  32 requests: HTTP {found['http'][-1]:.3f} s, bare {timing.seconds:.3f} s")
    except (PeerError, OSError) as error:
        result.problems.append(str(error))
    else:
        result.http[model.name] = found
    finally:
        engine.stop()


def _load(port: int, model: Model, seed: int) -> float:
    """Seconds from the first request to the end of the last; the prompts are token ids, fresh for each seed."""
    config = BenchConfig(
        target=TargetConfig(base_url=f"http://127.0.0.1:{port}"),
        requests=RequestsConfig(
            num_prompts=HTTP_JOB.num_requests,
            random_input_len=HTTP_JOB.input_len,
            random_output_len=HTTP_JOB.output_len,
            vocab_size=model.vocab_size,
            ignore_eos=True,
            seed=1000 + seed,
        ),
        load=LoadConfig(max_concurrency=HTTP_JOB.num_requests),
    )
    run = measure(config)
    failed = [outcome for outcome in run.outcomes if not outcome.ok]
    short = [outcome for outcome in run.outcomes if outcome.output_tokens != HTTP_JOB.output_len]
    if failed or short:
        raise PeerError(f"{len(failed)} of {len(run.outcomes)} requests over HTTP failed, {len(short)} were short")
    return run.duration
