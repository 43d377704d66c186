"""Blocks on disk outlive what had no room in memory, the store's process, and the service."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from support.service import Service, wait_for
from support.tiny import tiny_model

FLAGS = ("--served-model-name", "m", "--max-model-len", "800", "--cpu-threads", "1", "--max-restarts", "20")
SMALL = ("--kv-cache-memory-bytes", "500K", "--checkpoint-memory-bytes", "500K")
"""Each holds one long prompt."""
BLOCK = 16
PROMPTS = [f"{number} boats " * 60 for number in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


def disk(folder: Path) -> tuple[str, ...]:
    return ("--checkpoint-disk", str(folder), "--checkpoint-disk-bytes", "200M")


def blocks(service: Service, what: str) -> float:
    return service.metrics()[f"holdfast:checkpoint_disk_blocks{what}"]


def _backs(service: Service) -> list[object]:
    """When what was lost served again, of every incident so far."""
    return [incident["back"] for incident in service.incidents()]


def ask(service: Service, prompt: str, max_tokens: int = 20) -> tuple[str, int, int]:
    """Text, tokens of the prompt that were not computed, all of them."""
    body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "seed": 1, "temperature": 0.7}
    reply = httpx.post(f"{service.url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60).json()
    usage = reply["usage"]
    return reply["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def test_a_prefix_is_restored_after_the_service_was_started_again(model: str, tmp_path: Path):
    """Stopped as it should be, then killed; by another plan. The text is the same, and little is computed."""
    folder = tmp_path / "disk"
    service = Service(model, *FLAGS, *SMALL, *disk(folder), log=tmp_path / "log").wait_ready()
    try:
        calm = [ask(service, prompt)[0] for prompt in PROMPTS]
        again = ask(service, PROMPTS[0])
        assert again[0] == calm[0]
        assert again[2] - again[1] <= BLOCK, "it had to make way in memory"
        wait_for("told", lambda: blocks(service, "_read_total") > 0, 10)
    finally:
        assert service.stop() == 0, service.text()[-3000:]
    assert (folder / "blocks").stat().st_mode & 0o777 == 0o600
    fresh = "Once more " * 50

    def served_again(*plan: str, kill: bool) -> int:
        """Tokens of `fresh` that are computed."""
        service = Service(model, *FLAGS, *SMALL, *plan, *disk(folder), log=tmp_path / "log").wait_ready()
        try:
            for prompt, text in zip(PROMPTS, calm, strict=True):
                found, cached, asked = ask(service, prompt)
                assert found == text
                assert asked - cached <= BLOCK
            wait_for("told", lambda: blocks(service, "_read_total") > 150, 10)
            assert blocks(service, "_broken_total") == 0
            _, cached, asked = ask(service, fresh)
            if kill:
                wait_for("it is on disk", lambda: blocks(service, "_written_total") > 30, 10)
                service.process.kill()
                service.process.wait()
            return asked - cached
        finally:
            service.stop()

    assert served_again(kill=True) > 400
    assert served_again("--tensor-parallel-size", "2", kill=False) <= BLOCK, "written by the one that was killed"


@pytest.mark.slow
def test_a_store_that_is_killed_while_it_writes_loses_nothing_that_counts(model: str, tmp_path: Path):
    """Under load, time and again; then a byte of every thousand in its file is changed. The text is the same."""
    folder, dice = tmp_path / "disk", random.Random(0)
    bodies = [
        {"model": "m", "prompt": prompt, "max_tokens": 200, "seed": seed, "temperature": 0.7, "ignore_eos": True}
        for seed, prompt in enumerate(PROMPTS)
    ]

    async def all_of(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            replies = await asyncio.gather(*[client.post("/v1/completions", json=body) for body in bodies])
        assert {reply.status_code for reply in replies} == {200}
        return [reply.json()["choices"][0]["text"] for reply in replies]

    service = Service(model, *FLAGS, *SMALL, *disk(folder), log=tmp_path / "log").wait_ready()
    try:
        calm = asyncio.run(all_of(service.url))
        for turn in range(1, 6):
            written = blocks(service, "_written_total")

            def heard(written: float = written) -> bool:
                """A request on its own may be over before an engine asks a store again that was gone."""
                return (
                    bool(ask(service, f"{dice.random()} boats " * 5)) and blocks(service, "_written_total") > written
                )

            wait_for("the engine asks the store again", heard, 30)
            written = blocks(service, "_written_total")

            async def killed(written: float = written) -> list[str]:
                asking = asyncio.create_task(all_of(service.url))
                more = lambda: blocks(service, "_written_total") > written  # noqa: E731
                await asyncio.to_thread(wait_for, "it writes", more, 30)
                service.wait_ready().child("holdfast store").send_signal(signal.SIGKILL)
                return await asking

            for body in bodies:
                body["prompt"] = f"{dice.random()} {body['prompt']}"
            texts = asyncio.run(killed())
            wait_for("it is back", lambda turn=turn: _backs(service)[turn - 1 :] and all(_backs(service)), 30)
            assert asyncio.run(all_of(service.url)) == texts
        assert blocks(service, "_broken_total") == 0, "what is named is whole"
    finally:
        assert service.stop() == 0, service.text()[-3000:]
    with (folder / "blocks").open("r+b") as file:
        for at in range(4096, file.seek(0, os.SEEK_END) - 1000, 1000):
            os.pwrite(file.fileno(), bytes([dice.randrange(256)]), at + dice.randrange(1000))
    for body, prompt in zip(bodies, PROMPTS, strict=True):
        body["prompt"] = prompt
    service = Service(model, *FLAGS, *SMALL, *disk(folder), log=tmp_path / "log").wait_ready()
    try:
        assert asyncio.run(all_of(service.url)) == calm
    finally:
        assert service.stop() == 0, service.text()[-3000:]


def test_a_folder_of_another_model_or_service_is_refused(model: str, tmp_path: Path):
    """In a sentence, at the start; what is there stays."""
    folder = tmp_path / "disk"

    def refused(model: str, *flags: str) -> str:
        command = [sys.executable, "-m", "holdfast.cli.main", "serve", model, "--port", "0", *FLAGS, *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert ended.returncode == 2, ended.stderr
        return ended.stderr.splitlines()[-1]

    service = Service(model, *FLAGS, *disk(folder), log=tmp_path / "log").wait_ready()
    try:
        ask(service, PROMPTS[0])
        assert "another service writes it" in refused(model, *disk(folder))
    finally:
        assert service.stop() == 0, service.text()[-3000:]
    other = tmp_path / "other"
    other.mkdir()
    assert "another model or other settings" in refused(tiny_model(other), *disk(folder))
    assert "another model or other settings" in refused(model, *disk(folder), "--block-size", "32")


def test_a_full_disk_is_told_and_harms_nobody(model: str, tmp_path: Path):
    """The store may write no larger files; then it may again."""
    folder = tmp_path / "disk"
    service = Service(model, *FLAGS, *SMALL, *disk(folder), log=tmp_path / "log").wait_ready()
    try:
        store = service.child("holdfast store").pid
        before = resource.prlimit(store, resource.RLIMIT_FSIZE, (10_000_000, resource.RLIM_INFINITY))
        calm = [ask(service, prompt)[0] for prompt in PROMPTS]
        wait_for("it is told", lambda: "large" in str(service.health()[1].get("checkpoint_disk")), 10)
        assert service.health()[0] == 200
        resource.prlimit(store, resource.RLIMIT_FSIZE, before)
        assert [ask(service, prompt)[0] for prompt in PROMPTS] == calm
        wait_for("it is tried again", lambda: "checkpoint_disk" not in service.health()[1], 20)
        assert [ask(service, prompt)[0] for prompt in PROMPTS] == calm
        wait_for("it is of use", lambda: blocks(service, "_written_total") > 0, 10)
    finally:
        assert service.stop() == 0, service.text()[-3000:]
