"""A real service on a real GPU: many streams at once, a device whose memory is taken away, ranks that share one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch

from multiprocess.test_load import burst, settled
from support.service import Service, demo_model, wait_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]
FLAGS = ("--device", "cuda", "--max-model-len", "2048", "--served-model-name", "m", "--log-level", "debug")
START_SECONDS = 600.0
"""The first start compiles every kernel."""


@pytest.fixture(
    params=[(), ("--enforce-eager",), ("--no-async-scheduling",), ("--exactness", "batch"), ("--exactness", "off")],
    ids=str,
)
def service(request: pytest.FixtureRequest, tmp_path: Path):
    service = Service(demo_model(), *FLAGS, "--kv-cache-memory-bytes", "50M", *request.param, log=tmp_path / "log")
    try:
        yield service.wait_ready(START_SECONDS)
    finally:
        assert service.stop() == 0, service.text()[-3000:]


def test_200_concurrent_streams_each_end_once(service: Service):
    ends = asyncio.run(burst(service.url, range(200)))
    assert ends.count("done") > 100
    assert ends.count("cancelled") > 20
    wait_for("all blocks free", lambda: settled(service), 10)
    assert service.metrics()["holdfast:num_preemptions_total"] > 0, "the cache was meant to be too small"


async def answers(url: str, count: int, at_once: int) -> list[str]:
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(index: int) -> str:
            prompt = f"Once upon a time, {index} boats went out to sea. " * 40
            async with gate:
                body = {"model": "m", "prompt": prompt, "max_tokens": 40, "temperature": 0}
                reply = await client.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()["choices"][0]["text"]

        return list(await asyncio.gather(*map(one, range(count))))


def take_all_memory() -> list[torch.Tensor]:
    """All but some 16 MB."""
    held, size = [], 1 << 30
    while size >= 16 << 20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return held


def test_memory_that_others_take_costs_no_request(tmp_path: Path):
    """Steps that no longer fit are made smaller; every request ends with the tokens it would have had. Those of one
    request at a time are small, so that there is no memory left from them that a large step could use."""
    flags = ("--gpu-memory-utilization", "0.3", "--enforce-eager", "--max-num-batched-tokens", "4096")
    service = Service(demo_model(), *FLAGS, *flags, "--no-enable-prefix-caching", log=tmp_path / "log")
    try:
        service.wait_ready(START_SECONDS)
        calm = asyncio.run(answers(service.url, 48, at_once=1))
        held = take_all_memory()
        assert asyncio.run(answers(service.url, 48, at_once=48)) == calm
        assert "tried again in smaller steps" in service.text()
        del held
        torch.cuda.empty_cache()
        assert asyncio.run(answers(service.url, 48, at_once=48)) == calm
    finally:
        assert service.stop() == 0, service.text()[-3000:]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of one rank."""
    return served(tmp_path_factory.mktemp("calm") / "log")


def served(log: Path, *flags: str) -> list[str]:
    service = Service(demo_model(), *FLAGS, "--kv-cache-memory-bytes", "200M", *flags, log=log)
    try:
        return asyncio.run(answers(service.wait_ready(START_SECONDS).url, 24, at_once=24))
    finally:
        assert service.stop() == 0, service.text()[-3000:]


@pytest.mark.parametrize("size", ["--data-parallel-size", "--tensor-parallel-size", "--pipeline-parallel-size"])
def test_ranks_that_share_a_gpu_answer_as_one(size: str, calm: list[str], tmp_path: Path):
    assert served(tmp_path / "log", size, "2", "--allow-shared-gpu") == calm
