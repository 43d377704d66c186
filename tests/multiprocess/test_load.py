"""Many streams at once with cancels, stops and odd lengths: every one ends exactly once, nothing leaks.

The engine runs at log level debug, where it audits the whole block accounting whenever it falls idle, and dies of
what it finds.
"""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest

from support.service import Service, demo_model, wait_for

FLAGS = ("--kv-cache-memory-bytes", "16M", "--max-model-len", "512", "--max-num-seqs", "48", "--log-level", "debug")
WORDS = ["the", "sea", "was", "calm", "and", "a", "boat", "went", "out", "while", "gulls", "cried", "over", "water"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    service = Service(
        demo_model(), *FLAGS, "--served-model-name", "demo", log=tmp_path_factory.mktemp("load") / "log"
    )
    try:
        yield service.wait_ready()
    finally:
        assert service.stop() == 0, service.text()[-3000:]


async def one(client: httpx.AsyncClient, seed: int) -> str:
    """One request of a random kind; how it ended."""
    rng = random.Random(seed)
    body = {
        "model": "demo",
        "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 120))),
        "max_tokens": rng.choice([1, 3, 20, 150]),
        "temperature": rng.choice([0, 1]),
        "n": rng.choice([1, 1, 1, 3]),
        "stream": True,
        "ignore_eos": True,
    }
    if rng.random() < 0.3:
        body["stop"] = rng.sample(["e", " the", "sea", "\n"], 2)
    cancel_after = rng.randint(0, 5) if rng.random() < 0.3 else None
    finished: dict[int, str] = {}
    seen = 0
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                assert len(finished) == body["n"], "a stream ends when every choice has"
                return "done"
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                assert choice["index"] not in finished, "nothing follows a finish"
                if choice["finish_reason"]:
                    assert choice["finish_reason"] in ("stop", "length")
                    finished[choice["index"]] = choice["finish_reason"]
            seen += 1
            if cancel_after is not None and seen > cancel_after:
                return "cancelled"
    raise AssertionError("the stream ended without a terminal reply")


async def burst(url: str, seeds: range) -> list[str]:
    limits = httpx.Limits(max_connections=len(seeds))
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return list(await asyncio.gather(*[one(client, seed) for seed in seeds]))


def settled(service: Service) -> bool:
    """Nothing runs, nothing waits, no block is held."""
    metrics = service.metrics()
    return all(
        metrics[f"holdfast:{name}"] == 0
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    )


def test_200_concurrent_streams_each_end_once(service: Service):
    ends = asyncio.run(burst(service.url, range(200)))
    assert ends.count("done") > 100
    assert ends.count("cancelled") > 20
    wait_for("all blocks free", lambda: settled(service), 10)
    assert service.metrics()["holdfast:num_preemptions_total"] > 0, "the cache was meant to be too small"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_2000_requests(service: Service):
    """After a warm-up that touches every page, no process grows by more than 2 % or 8 MB."""
    asyncio.run(burst(service.url, range(200)))
    before = {" ".join(child.cmdline()): child.memory_info().rss for child in service.children}
    for start in range(0, 2000, 200):
        asyncio.run(burst(service.url, range(start, start + 200)))
    wait_for("all blocks free", lambda: settled(service), 10)
    for child in service.children:
        name = " ".join(child.cmdline())
        grown = child.memory_info().rss - before[name]
        assert grown < max(0.02 * before[name], 8e6), (
            f"{name} grew by {grown / 1e6:.1f} MB from {before[name] / 1e6:.0f}"
        )
