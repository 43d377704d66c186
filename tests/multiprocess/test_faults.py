"""What a process does not die of by itself: a device that breaks, a rank that is slow, memory that runs out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from support.service import Service, wait_for
from support.tiny import tiny_model

FLAGS = ("--served-model-name", "m", "--max-model-len", "512", "--kv-cache-memory-bytes", "4M", "--cpu-threads", "1")
TOKENS = "holdfast:generation_tokens_total"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


async def ask(url: str, max_tokens: int = 300) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        replies = await asyncio.gather(
            *[
                client.post(
                    "/v1/completions",
                    json={"model": "m", "prompt": f"{i} boats", "max_tokens": max_tokens, "seed": i}
                    | {"temperature": 0.7, "ignore_eos": True},
                )
                for i in range(6)
            ]
        )
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:2]
    return [reply.json()["choices"][0]["text"] for reply in replies]


@pytest.mark.slow
def test_what_is_wrong_with_a_device_is_found_and_got_over(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A broken device: the replica is started again. A slow one: is waited for. Memory
    that was overwritten: is found where there are no numbers any more. A leak: the replica is started anew
    before the memory is gone. The text is the same each time."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("HOLDFAST_FAULTS", str(folder))
    flags = ("--tensor-parallel-size", "2", "--leak-window", "2")
    service = Service(model, *FLAGS, *flags, log=tmp_path / "log").wait_ready()

    async def disturbed(fault: str) -> list[str]:
        begun = service.metrics()[TOKENS]
        asking = asyncio.create_task(ask(service.url))
        await asyncio.to_thread(wait_for, "tokens", lambda: service.metrics()[TOKENS] > begun + 300, 30)
        (folder / "0.0.1").write_text(fault)
        if fault == "slow":
            await asyncio.to_thread(wait_for, "more", lambda: service.metrics()[TOKENS] > begun + 600, 60)
            (folder / "0.0.1").unlink()
        return await asking

    def pids() -> list[int]:
        service.wait_ready()
        return [service.child(f"holdfast worker 0.0.{rank}").pid for rank in range(2)]

    def kinds() -> list[object]:
        return [incident["loss"]["kind"] for incident in service.incidents()]

    try:
        calm, before = asyncio.run(ask(service.url)), pids()
        assert asyncio.run(disturbed("error")) == calm
        assert kinds() == ["error"]
        assert service.incidents()[0]["loss"]["process"] == "worker 0.0.1"
        wait_for("back", lambda: service.health()[0] == 200, 30)
        after = pids()
        assert (after[0] == before[0], after[1] == before[1]) == (True, False), "whose device is broken does not stay"
        assert asyncio.run(disturbed("slow")) == calm
        assert kinds() == ["error"], "slow is not dead"
        assert asyncio.run(disturbed("corrupt")) == calm
        assert service.metrics()["holdfast:retries_total"] > 0
        assert kinds() == ["error"], "it is computed once more"
        assert asyncio.run(ask(service.url)) == calm, "and nothing of it is left in a cache"
        assert asyncio.run(disturbed("leak")) == calm
        while kinds() == ["error"]:  # it leaks with every step
            assert asyncio.run(ask(service.url)) == calm
        assert kinds() == ["error", "leak"]
        assert "MB/s more" in service.incidents()[1]["reason"]
        wait_for("back", lambda: service.health()[0] == 200, 30)
        before, after = after, pids()
        assert (after[0] == before[0], after[1] == before[1]) == (True, False), "the one that leaks does not stay"
        assert asyncio.run(ask(service.url)) == calm
    finally:
        assert service.stop() == 0, service.text()[-3000:]
