"""Weights that change in memory are found on demand, and the replica that has them is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from pathlib import Path

import httpx
import pytest

from holdfast.core.errors import ConfigError
from holdfast.operate.check import run
from holdfast.operate.config import CheckConfig, CheckedConfig
from support.service import Service, wait_for
from support.tiny import tiny_model

FLAGS = ("--served-model-name", "m", "--max-model-len", "512", "--kv-cache-memory-bytes", "4M", "--cpu-threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


async def ask(url: str, max_tokens: int = 200, start: str = "") -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        replies = await asyncio.gather(
            *[
                client.post(
                    "/v1/completions",
                    json={"model": "m", "prompt": start + f"{i} boats " * 20, "max_tokens": max_tokens, "seed": i}
                    | {"temperature": 0.7, "ignore_eos": True},
                )
                for i in range(6)
            ]
        )
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:2]
    return [reply.json()["choices"][0]["text"] for reply in replies]


def checked(url: str) -> tuple[int, dict[str, object]]:
    """What `holdfast check` makes of it: its exit code, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run(url, CheckConfig(service=CheckedConfig(json=True)))
    return code, json.loads(printed.getvalue())


def whole(service: Service) -> bool:
    cluster = httpx.get(f"{service.url}/cluster").json()
    return cluster["status"] == "ready" and all(incident["back"] for incident in cluster["incidents"])


def test_a_changed_byte_is_found_and_its_replica_replaced(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Under load; with what it has computed since, in whichever cache, wherever it went from there. Requests that are
    under way go on, and afterwards the text is as before."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("HOLDFAST_FAULTS", str(folder))
    disk = ("--checkpoint-disk", str(tmp_path / "disk"), "--checkpoint-disk-bytes", "65M")
    service = Service(model, *FLAGS, "--data-parallel-size", "2", *disk, log=tmp_path / "log").wait_ready()

    async def disturbed() -> tuple[int, dict[str, object]]:
        asking = asyncio.create_task(ask(service.url, start="New to both: "))  # so both have some of them
        (folder / "0.0.0").write_text("flip")
        await asyncio.to_thread(wait_for, "it has happened", lambda: not (folder / "0.0.0").exists(), 60)
        found = await asyncio.to_thread(checked, service.url)
        await asking  # every request ends, though what the rank said meanwhile was wrong
        return found

    try:
        code, found = checked(service.url)
        assert (code, found["wrong"], found["lost"]) == (0, [], [])
        assert [rank["rank"] for rank in found["ranks"]] == ["0.0.0", "1.0.0"]
        assert found["ranks"][0]["bytes"] == found["ranks"][1]["bytes"] > 100_000
        calm = asyncio.run(ask(service.url))
        code, found = asyncio.run(disturbed())
        assert (code, found["wrong"]) == (1, ["0.0.0"])
        assert any(name.endswith("attn.qkv") for name in found["ranks"][0]["wrong"])
        wait_for("all are back", lambda: service.incidents() and whole(service), 60)
        first = service.incidents()[0]
        assert (first["loss"]["kind"], first["loss"]["process"]) == ("corruption", "worker 0.0.0")
        assert asyncio.run(ask(service.url)) == calm
        assert asyncio.run(ask(service.url)) == calm, "from caches, too"
        assert checked(service.url)[0] == 0
    finally:
        assert service.stop() == 0, service.text()[-3000:]


def test_weights_are_looked_at_again_and_again(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With --check-weights-interval, of a replica of two ranks, without anybody's asking."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("HOLDFAST_FAULTS", str(folder))
    flags = ("--tensor-parallel-size", "2", "--check-weights-interval", "0.5")
    service = Service(model, *FLAGS, *flags, log=tmp_path / "log").wait_ready()
    try:
        calm = asyncio.run(ask(service.url, 20))
        (folder / "0.0.1").write_text("flip")
        asyncio.run(ask(service.url, 20))
        wait_for("it is found", lambda: service.incidents() and whole(service), 60)
        assert service.incidents()[0]["loss"]["kind"] == "corruption"
        assert service.incidents()[0]["loss"]["process"] == "worker 0.0.1"
        assert asyncio.run(ask(service.url, 20)) == calm
    finally:
        assert service.stop() == 0, service.text()[-3000:]
    with pytest.raises(ConfigError, match="no answer"):
        run(service.url, CheckConfig())
