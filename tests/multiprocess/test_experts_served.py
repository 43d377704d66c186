"""Experts that move between ranks while their model is served."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from support.builds import builds
from support.checkpoints import save
from support.crowd import Answers, ask
from support.service import Service, wait_for
from support.skewed import EXPERTS, SHAPE, skewed_mixtral
from support.tiny import byte_tokenizer

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")

FLAGS = ("--served-model-name", "m", "--max-model-len", "512", "--max-num-batched-tokens", "128")
TWO_GROUPS = ("--tensor-parallel-size", "2", "--expert-parallel-size", "2")
BALANCED = ("--enable-eplb", "--num-redundant-experts", "4", "--eplb-step-interval", "40")


def write(folder: Path) -> str:
    return save(skewed_mixtral(**SHAPE, **EXPERTS, vocab_size=byte_tokenizer(folder)), folder)


def expert_rows(service: Service) -> dict[str, float]:
    """By rank."""
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    rows = [line for line in lines if line.startswith("holdfast:rank_expert_rows_total")]
    return {line.split('rank="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in rows}


def busiest(before: dict[str, float], after: dict[str, float], stage: int) -> float:
    """The largest rank's rows over the mean, of a stage."""
    grown = [rows - before.get(rank, 0.0) for rank, rows in after.items() if rank.split(".")[1] == str(stage)]
    return max(grown) / (sum(grown) / len(grown))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("skewed"))


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    service = Service(model, *FLAGS, log=tmp_path_factory.mktemp("alone") / "log").wait_ready()
    try:
        return asyncio.run(ask(service.url))
    finally:
        assert service.stop() == 0


@pytest.mark.parametrize(
    ("stages", "plan"),
    [
        (1, ("--tensor-parallel-size", "4", "--expert-parallel-size", "4")),
        pytest.param(
            2,
            ("--tensor-parallel-size", "4", "--expert-parallel-size", "2", "--pipeline-parallel-size", "2"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["EP4", "EP2 x TP2 x PP2"],
)
def test_a_skewed_load_is_spread_while_serving(
    model: str, alone: Answers, stages: int, plan: tuple[str, ...], tmp_path: Path
):
    service = Service(model, *FLAGS, *plan, *BALANCED, log=tmp_path / "log").wait_ready()
    try:
        for _ in range(5):  # moved in the midst of one of these
            assert asyncio.run(ask(service.url)) == alone
            if "experts moved" in service.text():
                break
        text = service.text()
        assert "experts moved" in text
        said = float(text.split("the busiest ranks compute ")[1].split(" ")[0])
        assert said > 1.15, "the load was to be skewed"
        before = expert_rows(service)
        for _ in range(3):
            assert asyncio.run(ask(service.url)) == alone
        spread = [busiest(before, expert_rows(service), stage) for stage in range(stages)]
        assert max(spread) <= 1.15, (said, spread)
    finally:
        assert service.stop() == 0, service.text()[-3000:]
        assert not service.living_children()


@pytest.mark.parametrize("change", ["gone", "rewritten"])
def test_experts_that_cannot_be_read_stay_where_they_are(alone: Answers, change: str, tmp_path: Path):
    """The checkpoint is gone, or another, by the time they are to move: served on, the same."""
    model = write(tmp_path)
    service = Service(model, *FLAGS, *TWO_GROUPS, *BALANCED, log=tmp_path / "log").wait_ready()
    try:
        (file,) = tmp_path.glob("*.safetensors")
        if change == "gone":
            file.unlink()
        else:
            content = file.read_bytes()
            file.write_bytes(content[:-4096] + bytes(4096))
        assert asyncio.run(ask(service.url)) == alone
        wait_for("experts stay", lambda: "experts stay where they are" in service.text(), 10)
        assert asyncio.run(ask(service.url)) == alone
        assert "experts moved" not in service.text()
    finally:
        assert service.stop() == 0, service.text()[-3000:]


def test_stop_while_experts_are_read(model: str, alone: Answers, tmp_path: Path):
    """With moves all the time: every worker ends as it was told to, none is aborted."""
    flags = (
        "--tensor-parallel-size",
        "4",
        "--expert-parallel-size",
        "4",
        "--enable-eplb",
        "--eplb-step-interval",
        "1",
    )
    service = Service(model, *FLAGS, *flags, log=tmp_path / "log").wait_ready()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(lambda: asyncio.run(ask(service.url)))
        wait_for("a move", lambda: "moving some" in service.text(), 20)
        assert service.stop() == 0
        assert asking.result() == alone
    for sign in ("terminate called", "Traceback", "died", "killed"):
        assert sign not in service.text(), service.text()[-3000:]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--enable-eplb",), "no ranks share out experts"),
        (("--num-redundant-experts", "2"), "works with --enable-eplb"),
        (
            (*TWO_GROUPS, "--enable-eplb", "--num-redundant-experts", "17"),
            "--num-redundant-experts 17: must be at most 16",
        ),
        (("--eplb-step-interval", "10"), "--eplb-step-interval: works with --enable-eplb"),
        (("--eplb-step-interval", "0"), "--eplb-step-interval 0: must be at least 1"),
    ],
)
def test_what_cannot_be_balanced_is_refused(model: str, flags: tuple[str, ...], complaint: str, tmp_path: Path):
    service = Service(model, *flags, log=tmp_path / "log")
    assert service.wait_end() == 2
    assert complaint in " ".join(service.text().split()), service.text()
