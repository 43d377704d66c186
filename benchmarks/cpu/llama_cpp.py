"""llama.cpp as a peer: its own batched benchmark, started per job (its load time is not counted), and its server."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path

from .processes import JOB_SECONDS, PeerError, Timing, free_port, serving
from .work import OUT, THREADS, Job, Model

BIN = OUT / "llama.cpp" / "build" / "bin"
FLASH_ATTENTION = ("on", "off")
TRIES = 2


class LlamaCpp:
    """`llama-batched-bench`: prefills all prompts, then decodes all streams together.

    It draws its own random prompts and leaves sampling out. The first token of a request comes with its prefill, so
    for n tokens out it is asked for n - 1 steps of decoding.
    """

    name = "llama.cpp"
    pid = None  # nothing stays alive between jobs

    def __init__(self, model: Model) -> None:
        self.model = model
        self.versions = {"llama.cpp": _version()}
        self.how = ""
        self._flash_attention: dict[str, str] = {}

    def start(self, jobs: list[Job]) -> None:
        """Try each job with flash attention on and off; the faster stays."""
        for job in jobs:
            tries = [(self._measure(job, choice).seconds, choice) for _ in range(TRIES) for choice in FLASH_ATTENTION]
            self._flash_attention[job.name] = min(tries)[1]
        chosen = ", ".join(f"{job} {choice}" for job, choice in self._flash_attention.items())
        self.how = f"llama-batched-bench, {THREADS} threads, mmap, f16 KV; flash attention: {chosen}"

    def run(self, job: Job, prompts: list[list[int]]) -> Timing:
        return self._measure(job, self._flash_attention[job.name])

    def _measure(self, job: Job, flash_attention: str) -> Timing:
        steps = job.output_len - 1
        context = max(512, job.num_requests * (job.input_len + job.output_len))
        command = [BIN / "llama-batched-bench", "-m", self.model.gguf, "-c", context, "-b", 2048, "-ub", 512]
        command += ["-t", THREADS, "-tb", THREADS, "-fa", flash_attention, "--output-format", "jsonl"]
        command += ["-npp", job.input_len, "-ntg", max(steps, 1), "-npl", job.num_requests]
        line = None
        for _ in range(TRIES):  # sometimes it ends with 0 and says nothing; why is not known
            try:
                done = subprocess.run(
                    [str(part) for part in command], check=False, capture_output=True, timeout=JOB_SECONDS, text=True
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise PeerError(f"llama.cpp on {self.model.name}: {error}") from error
            line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
            if done.returncode or line is not None:
                break
        if done.returncode or line is None:
            what = (done.stdout + done.stderr)[-800:]
            raise PeerError(f"llama.cpp on {self.model.name}, {job.name}, ended with {done.returncode}: {what}")
        found = json.loads(line)
        prefill = found["t_pp"]
        return Timing(prefill + (found["t_tg"] if steps else 0.0), prefill, steps * job.num_requests)

    def greedy_tokens(self, prompt: list[int], count: int) -> list[int]:
        """Asked of its server: the benchmark tool draws its own prompts."""
        port = free_port()
        command = server_command(self.model.gguf, port)
        if command is None:
            return []
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with serving(command, port), urllib.request.urlopen(request, timeout=JOB_SECONDS) as response:
            tokens: list[int] = json.load(response)["tokens"]
        return tokens

    def hold(self) -> None: ...
    def resume(self) -> None: ...
    def stop(self) -> None: ...


def _version() -> str:
    """What it calls itself, with its compiler."""
    try:
        done = subprocess.run(
            [BIN / "llama-bench", "--version"], check=False, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(r"version: (.*)", done.stdout + done.stderr)
    return found[1] if found else "unknown"


def server_command(model: Path, port: int) -> list[str] | None:
    """`llama-server` on 127.0.0.1, or None if it was not built."""
    server = BIN / "llama-server"
    if not server.exists():
        return None
    return [
        *(str(server), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("-t", str(THREADS), "-tb", str(THREADS), "-c", "4096", "--no-webui"),
    ]
