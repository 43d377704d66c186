"""What is computed is not lost with those who computed it: blocks come back from the checkpoint store."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import httpx
import pytest

from holdfast.chaos.service import extents
from support.service import Service, wait_for
from support.tiny import tiny_model

FLAGS = ("--served-model-name", "m", "--max-model-len", "800", "--cpu-threads", "1", "--max-restarts", "20")
BLOCK = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


def bodies(max_tokens: int, seed: int = 0) -> list[dict[str, object]]:
    return [
        {
            "model": "m",
            "prompt": f"{i} boats went out to sea " * (1 + 2 * i),
            "max_tokens": max_tokens,
            "seed": 100 * seed + i,
        }
        | {"temperature": 0.7, "ignore_eos": True}
        for i in range(8)
    ]


async def ask(url: str, asked: list[dict[str, object]]) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        replies = await asyncio.gather(*[client.post("/v1/completions", json=body) for body in asked])
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:2]
    return [reply.json()["choices"][0]["text"] for reply in replies]


def blocks(service: Service, what: str) -> float:
    return service.metrics()[f"holdfast:checkpoint_blocks_{what}_total"]


def spoil(service: Service) -> None:
    """A byte of every thousand in the store's memory."""
    store, dice = service.child("holdfast store"), random.Random(0)
    [path] = [fd for fd in Path(f"/proc/{store.pid}/fd").iterdir() if "holdfast-store" in str(fd.readlink())][:1]
    with path.open("r+b", buffering=0) as memory:
        for begin, end in extents(memory.fileno()):
            for at in range(begin, end - 1000, 1000):
                os.pwrite(memory.fileno(), bytes([dice.randrange(256)]), at + dice.randrange(1000))


@pytest.mark.parametrize(
    ("plan", "rounds"),
    [
        (
            ("--data-parallel-size", "2"),
            (("worker 0.0.0",), ("store",), ("worker 0.0.0",), ("worker 0.0.0", "store"), ("spoil", "engine 0")),
        ),
        (("--tensor-parallel-size", "2"), (("worker 0.0.0",), ("spoil", "worker 0.0.1"))),
    ],
    ids=["two replicas", "one of two ranks"],
)
def test_requests_go_on_from_their_blocks(
    model: str, plan: tuple[str, ...], rounds: tuple[tuple[str, ...], ...], tmp_path: Path
):
    """When a worker dies, a worker and the store together, the store before it; and when the store's memory is not
    what it was, they are computed again. The text is the same each time."""
    service = Service(model, *FLAGS, *plan, log=tmp_path / "log").wait_ready()

    async def disturbed(asked: list[dict[str, object]], *victims: str) -> list[str]:
        begun = service.metrics()["holdfast:generation_tokens_total"]
        asking = asyncio.create_task(ask(service.url, asked))
        await asyncio.to_thread(
            wait_for, "tokens", lambda: service.metrics()["holdfast:generation_tokens_total"] > begun + 800, 30
        )
        if "spoil" in victims:
            spoil(service)
        for victim in victims:
            if victim != "spoil":
                service.child(f"holdfast {victim}").send_signal(signal.SIGKILL)
        return await asking

    def whole() -> bool:
        cluster = httpx.get(f"{service.url}/cluster").json()
        return cluster["status"] == "ready" and all(incident["back"] for incident in cluster["incidents"])

    try:
        for seed, victims in enumerate(rounds):
            asked = bodies(300, seed)
            restored, broken = blocks(service, "restored"), blocks(service, "broken")
            found = asyncio.run(disturbed(asked, *victims))
            wait_for("all are back", whole, 30)
            service.wait_ready()
            assert asyncio.run(ask(service.url, asked)) == found, victims
            incident = [each for each in service.incidents() if each["member"] == "replica 0"][-1:]
            if victims == ("worker 0.0.0",):
                assert blocks(service, "restored") > restored
                assert incident[0]["recomputed_most"] <= 5 * BLOCK, "by far not all"
            if "spoil" in victims:
                assert blocks(service, "broken") > broken
        assert ("blocks of an earlier process are there" in service.text()) == (("store",) in rounds)
    finally:
        assert service.stop() == 0, service.text()[-3000:]


def test_a_prefix_that_was_evicted_comes_back(model: str, tmp_path: Path):
    """The KV cache holds one long request; the store holds them all."""
    service = Service(model, *FLAGS, "--kv-cache-memory-bytes", "500K", log=tmp_path / "log").wait_ready()
    prompts = [f"{number} boats " * 60 for number in range(4)]

    def cached(prompt: str) -> int:
        body = {"model": "m", "prompt": prompt, "max_tokens": 1}
        usage = httpx.post(f"{service.url}/v1/completions", json=body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    try:
        for prompt in prompts:
            assert cached(prompt)[0] == 0
        for prompt in prompts:
            found, asked = cached(prompt)
            assert asked - found <= BLOCK
        assert blocks(service, "restored") > 0
    finally:
        assert service.stop() == 0, service.text()[-3000:]


def test_no_store_is_no_process(model: str, tmp_path: Path):
    service = Service(model, *FLAGS, "--checkpoint-memory-bytes", "0", log=tmp_path / "log").wait_ready()
    try:
        assert not any("store" in " ".join(child.cmdline()) for child in service.living_children())
        assert len(asyncio.run(ask(service.url, bodies(5)))) == 8
    finally:
        assert service.stop() == 0


def test_a_store_that_stands_still_is_not_waited_for(model: str, tmp_path: Path):
    """It is stopped, then asked, by requests that come one at a time to an engine that has nothing else to do."""
    service = Service(model, *FLAGS, log=tmp_path / "log").wait_ready()
    try:
        calm = asyncio.run(ask(service.url, bodies(20)))
        service.child("holdfast store").send_signal(signal.SIGSTOP)
        assert [asyncio.run(ask(service.url, [body]))[0] for body in bodies(20)] == calm, "from the prefix cache"
        fresh = bodies(20, seed=1)
        fresh = [body | {"prompt": f"Once {body['prompt']}"} for body in fresh]
        found = [asyncio.run(ask(service.url, [body]))[0] for body in fresh]
        wait_for("it is killed", lambda: "store has not been heard" in service.text(), 10)
        assert asyncio.run(ask(service.url, fresh)) == found
    finally:
        assert service.stop() == 0, service.text()[-3000:]
