"""`holdfast chaos` itself: it finds what is wrong, and refuses what it cannot do."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from holdfast.chaos.load import Load, bodies
from support.tiny import tiny_model

SMALL = ("--cpu-threads", "1", "--kv-cache-memory-bytes", "8M")


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "holdfast.cli.main", "chaos", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_faults_are_got_over_and_reported(tmp_path: Path):
    (tmp_path / "model").mkdir()
    model, report, plot = tiny_model(tmp_path / "model"), tmp_path / "report.json", tmp_path / "plot.png"
    options = ("--kills", "3", "--faults", "kill-worker,kill-engine", "--max-tokens", "60", "--streams", "4")
    options += ("--phase", "sampled")
    flags = ("--data-parallel-size", "2", "--cpu-threads", "1", "--kv-cache-memory-bytes", "8M")
    ran = chaos(model, *options, "--json", str(report), "--plot", str(plot), "--", *flags)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "lost requests: 0; changed replies: 0" in ran.stdout
    found = json.loads(report.read_bytes())
    assert len(found["faults"]) == 3
    assert found["requests"] > 0
    for fault in found["faults"]:
        assert fault["incidents"], "every fault was noticed"
        assert fault["whole_again"] > fault["at"]
        assert 0 <= fault["incidents"][0]["loss"]["detected"] - fault["at"] < 1.0
        assert fault["in_phase"]
        assert fault["held"] in fault["victims"], "who is held between two tokens is the one to die"
    assert found["by_phase"]["sampled"]["struck_in_phase"] == 3
    assert found["files_left"] == []
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_supervisor_dies_and_another_service_goes_on(tmp_path: Path):
    """With requests of all kinds under way, and while a worker is being started again."""
    (tmp_path / "model").mkdir()
    model, report = tiny_model(tmp_path / "model"), tmp_path / "report.json"
    options = ("--kills", "4", "--faults", "kill-supervisor", "--phase", "decode,loading", "--max-tokens", "60")
    flags = ("--tensor-parallel-size", "2", "--cpu-threads", "1", "--kv-cache-memory-bytes", "8M")
    ran = chaos(model, *options, "--json", str(report), "--", *flags, "--token-log-dir", str(tmp_path / "tokens"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(report.read_bytes())
    assert (found["wrong"], found["processes_left"]) == ([], [])
    assert found["came_back"] > 0, "connections broke, and their clients got the rest"
    died = [fault for fault in found["faults"] if fault["kind"] == "kill-supervisor"]
    assert {fault["phase"] for fault in died} == {"decode", "loading"}
    assert all(fault["at"] < fault["ended"] < fault["whole_again"] for fault in died)
    assert (tmp_path / "tokens" / "tokens.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phases", "memory"),
    [
        ("queued,chunk,decode,prefill", "0"),
        ("loading,recovery,drain", "0"),
        ("reshape", "100M"),
        ("sampled,logged", "100M"),
        ("checkpoint,restore", "100M"),
    ],
)
def test_faults_strike_at_the_chosen_moment(tmp_path: Path, phases: str, memory: str):
    """Each of them in it. Prompts are read in many steps; without a checkpoint store where none is needed."""
    (tmp_path / "model").mkdir()
    model, report = tiny_model(tmp_path / "model"), tmp_path / "report.json"
    options = ("--kills", "6", "--streams", "3", "--phase", phases, "--pair-percent", "0")
    options += ("--faults", "kill-worker,kill-engine,kill-gateway,stop-worker")
    flags = (*SMALL, "--data-parallel-size", "2", "--max-num-batched-tokens", "16", "--max-num-seqs", "8")
    flags += ("--tensor-parallel-size", "2", "--checkpoint-memory-bytes", memory)
    ran = chaos(model, *options, "--json", str(report), "--", *flags)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    struck = [fault for fault in json.loads(report.read_bytes())["faults"] if fault["phase"] in phases.split(",")]
    assert len(struck) >= 3, "some kill a worker first"
    assert all(fault["in_phase"] for fault in struck), ran.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--faults", "kill-cat"), "'kill-cat' is not one of kill-worker, kill-engine, kill-gateway, kill-store"),
        (("--phase", "restore", "--", *SMALL, "--checkpoint-memory-bytes", "0"), "restore needs a checkpoint store"),
        (
            ("--phase", "chunk", "--", *SMALL, "--max-num-batched-tokens", "4096"),
            "is read in one step; --max-num-batch",
        ),
        (("--kills", "-1"), "--kills -1: must be at least 0"),
        (("--faults", "stop-store", "--", *SMALL, "--checkpoint-memory-bytes", "0"), "has none (--checkpoint-memory"),
        (("--", "--tensor-parallel-size", "0"), "--tensor-parallel-size 0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, arguments: tuple[str, ...], complaint: str):
    ran = chaos(tiny_model(tmp_path), *arguments)
    assert ran.returncode != 0
    assert complaint in " ".join((ran.stdout + ran.stderr).split())


def reply(text: str) -> httpx.Response:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    return httpx.Response(200, json={"choices": [choice]})


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (lambda: reply("as it was"), None),
        (lambda: reply("as it wasas it was"), "changed"),
        (lambda: httpx.Response(500, text="no"), "lost"),
        (lambda: httpx.Response(503, json={"error": {"code": "recovering"}}), None),
        (lambda: httpx.Response(503, json={"error": {"code": None, "message": "worker 0.0.0 died"}}), "lost"),
        (lambda: httpx.Response(503, text="later"), "lost"),
    ],
)
def test_a_reply_that_is_not_as_undisturbed_is_wrong(answer, wrong: str | None):
    asked = bodies("m", 1, 10, 0)
    expected = [{0: {"text": "as it was", "tokens": [], "logprobs": [], "finish_reason": "length"}}]

    async def one() -> Load:
        transport = httpx.MockTransport(lambda request: answer())
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            load = Load(client, asked, expected)
            await load._once(0)
            return load

    load = asyncio.run(one())
    assert [each.what.split(":")[0] for each in load.wrong] == ([wrong] if wrong else [])
