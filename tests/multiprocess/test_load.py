"""Many streams at once with cancels, stops and odd lengths: every one ends exactly once, nothing leaks.

The engine runs at log level debug, where it audits the whole block accounting whenever it falls idle, and dies of
what it finds.
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import httpx
import pytest

from support.service import Service, demo_model, wait_for
from support.tiny import tiny_model

FLAGS = ("--max-model-len", "512", "--max-num-seqs", "48", "--log-level", "debug", "--served-model-name", "m")
WORDS = ["the", "sea", "was", "calm", "and", "a", "boat", "went", "out", "while", "gulls", "cried", "over", "water"]


def run_service(model: str, memory: str, log: Path, *more: str):
    service = Service(model, *FLAGS, "--kv-cache-memory-bytes", memory, *more, log=log)
    try:
        yield service.wait_ready()
    finally:
        assert service.stop() == 0, service.text()[-3000:]


@pytest.fixture
def demo(tmp_path: Path):
    """The demo model with room for 1,000 tokens."""
    yield from run_service(demo_model(), "24M", tmp_path / "log")


@pytest.fixture
def tiny(tmp_path: Path):
    """A model that computes next to nothing, with room for 1,500 tokens, and for twice as many in the checkpoint
    store, which is soon full."""
    more = ("--checkpoint-memory-bytes", "1200K")
    yield from run_service(tiny_model(tmp_path), "600K", tmp_path / "log", *more)


async def one(client: httpx.AsyncClient, seed: int) -> str:
    """One request of a random kind; how it ended."""
    rng = random.Random(seed)
    body = {
        "model": "m",
        "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 60))),
        "max_tokens": rng.choice([1, 3, 20, 120]),
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
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(metrics[f"holdfast:{name}"] == 0 for name in gauges)


def test_200_concurrent_streams_each_end_once(demo: Service):
    ends = asyncio.run(burst(demo.url, range(200)))
    assert ends.count("done") > 100
    assert ends.count("cancelled") > 20
    wait_for("all blocks free", lambda: settled(demo), 10)
    assert demo.metrics()["holdfast:num_preemptions_total"] > 0, "the cache was meant to be too small"


@pytest.mark.slow
def test_memory_is_flat_over_1000_requests(tiny: Service):
    """After a warm-up, no process grows by more than 2 % or 4 MB (allocators keep some)."""
    asyncio.run(burst(tiny.url, range(400)))
    before = {child.pid: child.memory_info().rss for child in tiny.children}
    for start in range(0, 1000, 200):
        asyncio.run(burst(tiny.url, range(start, start + 200)))
    wait_for("all blocks free", lambda: settled(tiny), 10)
    for child in tiny.children:
        grown = child.memory_info().rss - before[child.pid]
        print(f"{child.cmdline()[0]}: {before[child.pid] / 1e6:.1f} MB, grown by {grown / 1e6:.2f} MB")
        assert grown < max(0.02 * before[child.pid], 4e6), f"{child.cmdline()[0]} grew by {grown / 1e6:.1f} MB"
