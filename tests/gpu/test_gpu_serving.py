"""A real service on a real GPU: many streams at once, and a device whose memory is taken away."""

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


@pytest.fixture(params=[(), ("--enforce-eager",), ("--no-async-scheduling",), ("--exactness", "off")], ids=str)
def service(request: pytest.FixtureRequest, tmp_path: Path):
    service = Service(demo_model(), *FLAGS, "--kv-cache-memory-bytes", "50M", *request.param, log=tmp_path / "log")
    try:
        yield service.wait_ready()
    finally:
        assert service.stop() == 0, service.text()[-3000:]


def test_200_concurrent_streams_each_end_once(service: Service):
    ends = asyncio.run(burst(service.url, range(200)))
    assert ends.count("done") > 100
    assert ends.count("cancelled") > 20
    wait_for("all blocks free", lambda: settled(service), 10)
    assert service.metrics()["holdfast:num_preemptions_total"] > 0, "the cache was meant to be too small"


async def answers(url: str, count: int) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        prompts = [f"Once upon a time, {i} boats went out to sea. " * 40 for i in range(count)]
        asked = [
            client.post("/v1/completions", json={"model": "m", "prompt": p, "max_tokens": 40, "temperature": 0})
            for p in prompts
        ]
        replies = await asyncio.gather(*asked)
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:3]
    return [reply.json()["choices"][0]["text"] for reply in replies]


def test_memory_that_others_take_costs_no_request(tmp_path: Path):
    """Steps that no longer fit are made smaller; every request ends with the tokens it would have had."""
    service = Service(
        demo_model(), *FLAGS, "--gpu-memory-utilization", "0.3", "--enforce-eager", log=tmp_path / "log"
    )
    try:
        service.wait_ready()
        calm = asyncio.run(answers(service.url, 48))
        held = []
        while (free := torch.cuda.mem_get_info()[0]) > 24 << 20:
            held.append(torch.empty(max(free - (16 << 20), 1 << 20), dtype=torch.uint8, device="cuda"))
        assert asyncio.run(answers(service.url, 48)) == calm
        assert "tried again in smaller steps" in service.text()
        del held
        torch.cuda.empty_cache()
        assert asyncio.run(answers(service.url, 48)) == calm
    finally:
        assert service.stop() == 0, service.text()[-3000:]
