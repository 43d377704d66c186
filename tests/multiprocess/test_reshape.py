"""A replica that cannot have a rank back goes on without it: fewer ranks, the same tokens."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from support.builds import builds
from support.checkpoints import save
from support.service import Service, wait_for
from support.skewed import EXPERTS, SHAPE, skewed_mixtral
from support.tiny import byte_tokenizer, tiny_model

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")
FLAGS = ("--served-model-name", "m", "--max-model-len", "512", "--kv-cache-memory-bytes", "2M", "--cpu-threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


async def ask(url: str, seed: int) -> list[tuple[int, str]]:
    """Status and text of a few requests."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        replies = await asyncio.gather(
            *[
                client.post(
                    "/v1/completions",
                    json={"model": "m", "prompt": f"{i} boats " * (3 + i), "max_tokens": 250, "seed": 10 * seed + i}
                    | {"temperature": 0.7, "ignore_eos": True},
                )
                for i in range(6)
            ]
        )
    return [(reply.status_code, reply.text if reply.is_error else choice_of(reply)) for reply in replies]


def choice_of(reply: httpx.Response) -> str:
    text: str = reply.json()["choices"][0]["text"]
    return text


async def killed_amid(service: Service, seed: int, victim: str) -> list[tuple[int, str]]:
    begun = service.metrics().get("holdfast:generation_tokens_total", 0)
    asking = asyncio.create_task(ask(service.url, seed))
    await asyncio.to_thread(
        wait_for, "tokens", lambda: service.metrics()["holdfast:generation_tokens_total"] > begun + 300, 30
    )
    service.child(f"holdfast {victim}").send_signal(signal.SIGKILL)
    return await asking


def ranks(service: Service) -> list[int]:
    cluster = httpx.get(f"{service.url}/cluster").json()
    return [replica["ranks"] for replica in cluster["replicas"]]


def test_rank_after_rank_is_lost_until_none_is_left(model: str, tmp_path: Path):
    """4, 3, 2, 1: served exactly. 0: a definite error, and the service ends."""
    calm = Service(model, *FLAGS, log=tmp_path / "calm").wait_ready()
    try:
        expected = [asyncio.run(ask(calm.url, seed)) for seed in range(3)]
    finally:
        calm.stop()
    flags = ("--tensor-parallel-size", "4", "--max-restarts", "0", "--regrow-interval", "0")
    service = Service(model, *FLAGS, *flags, log=tmp_path / "log").wait_ready()
    try:
        pids = {child.pid for child in service.living_children()}
        for seed, (left, victim) in enumerate([(3, "worker 0.0.2"), (2, "worker 0.0.0"), (1, "worker 0.0.1")]):
            assert asyncio.run(killed_amid(service, seed, victim)) == expected[seed]
            assert ranks(service) == [left]
            assert service.incidents()[-1]["rung"] == "reshape"
            service.wait_ready()
            workers = {service.child(f"holdfast worker 0.0.{rank}").pid for rank in range(left)}
            assert workers <= pids, "they are the same processes"
        statuses = [status for status, _ in asyncio.run(killed_amid(service, 0, "worker 0.0.0"))]
        assert set(statuses) == {503}
        assert service.wait_end() == 1
    finally:
        service.stop()


@pytest.mark.slow
def test_a_rank_whose_device_is_gone_is_not_waited_for(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However often others may be started again."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("HOLDFAST_FAULTS", str(folder))
    flags = ("--tensor-parallel-size", "2", "--max-restarts", "100", "--regrow-interval", "0")
    service = Service(model, *FLAGS, *flags, log=tmp_path / "log").wait_ready()
    try:
        expected = asyncio.run(ask(service.url, 0))
        (folder / "0.0.1").write_text("gone")  # with its next step
        assert asyncio.run(ask(service.url, 0)) == expected
        assert [incident["rung"] for incident in service.incidents()] == ["reshape"]
        assert ranks(service) == [1]
    finally:
        assert service.stop() == 0, service.text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "victims"),
    [
        (("--pipeline-parallel-size", "2", "--tensor-parallel-size", "2"), ("worker 0.1.1", "worker 0.1.0")),
    ],
    ids=["a rank of a stage, then the stage"],
)
def test_a_stage_that_is_lost_leaves_its_layers_to_the_others(
    model: str, plan: tuple[str, ...], victims: tuple[str, ...], tmp_path: Path
):
    flags = (*plan, "--max-restarts", "0", "--regrow-interval", "0")
    service = Service(model, *FLAGS, *flags, log=tmp_path / "log").wait_ready()
    [before] = ranks(service)
    try:
        expected = [asyncio.run(ask(service.url, seed)) for seed in range(len(victims))]
        for seed, victim in enumerate(victims):
            assert asyncio.run(killed_amid(service, seed, victim)) == expected[seed]
            assert ranks(service) == [before - 1 - seed]
            service.wait_ready()
    finally:
        assert service.stop() == 0, service.text()[-3000:]


@pytest.mark.slow
def test_experts_are_shared_out_among_those_left_and_all_ranks_come_back(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    """EP4 loses a rank, serves on with three, and has four again after a while."""
    folder = tmp_path_factory.mktemp("mixtral")
    model = save(skewed_mixtral(**SHAPE, **EXPERTS, vocab_size=byte_tokenizer(folder)), folder)
    flags = ("--tensor-parallel-size", "4", "--expert-parallel-size", "4", "--max-restarts", "0")
    service = Service(model, *FLAGS, *flags, "--regrow-interval", "2", log=tmp_path / "log").wait_ready()
    try:
        expected = asyncio.run(ask(service.url, 0))
        assert asyncio.run(killed_amid(service, 0, "worker 0.0.3")) == expected
        wait_for("all ranks", lambda: ranks(service) == [4], 30)
        assert "0 serves again" in service.text()
        assert [each["loss"]["kind"] for each in service.incidents()] == ["death", "planned"]
        assert asyncio.run(ask(service.url, 0)) == expected
    finally:
        assert service.stop() == 0, service.text()[-3000:]
