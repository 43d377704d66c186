"""`holdfast bench serve` as a process of its own, against a small HTTP server that knows the truth."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from holdfast.bench.workload import gamma_arrivals

PAUSE = 0.02
"""Seconds the server thinks before each chunk."""


@dataclass
class Seen:
    """One request as the server saw it; times of `time.perf_counter()`, which all processes share."""

    path: str
    body: dict[str, Any]
    received: float
    sent: list[float] = field(default_factory=list)


class Server:
    """Any OpenAI-compatible server: streams as many tokens as asked for, `tokens_per_chunk` at a time.

    `gate`, awaited before a request is answered, and `fault`, by number of the request, are for the tests.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.tokens_per_chunk = 1
        self.api_key: str | None = None
        self.faults: dict[int, str] = {}
        self.gate: asyncio.Barrier | asyncio.Event | None = None
        self.num_gated = 0
        self.arrived = asyncio.Condition()
        self.url = ""

    async def models(self, request: Request) -> Response:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": {"message": "wrong API key"}}, 401)
        return JSONResponse({"object": "list", "data": [{"id": "truth"}, {"id": "other"}]})

    async def tokenize(self, request: Request) -> Response:
        words = (await request.json())["prompt"].split()
        return JSONResponse({"tokens": [5000 + len(word) for word in words], "count": len(words)})

    async def generate(self, request: Request) -> Response:
        number = len(self.seen)
        seen = Seen(request.url.path, await request.json(), time.perf_counter())
        self.seen.append(seen)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        async with self.arrived:
            self.arrived.notify_all()
        if self.gate is not None and number < self.num_gated:
            await self.gate.wait()
        if self.faults.get(number) == "refuse":
            self.in_flight -= 1
            return JSONResponse({"error": {"message": "the queue is full [/INST]"}}, 429)
        return StreamingResponse(self.stream(seen, self.faults.get(number)), media_type="text/event-stream")

    async def stream(self, seen: Seen, fault: str | None) -> AsyncIterator[bytes]:
        chat = seen.path.endswith("chat/completions")
        count = seen.body["max_tokens"]
        try:
            for start in range(0, count, self.tokens_per_chunk):
                await asyncio.sleep(PAUSE)
                text = " word" * min(self.tokens_per_chunk, count - start)
                choice = {"delta": {"content": text}} if chat else {"text": text}
                last = "length" if start + self.tokens_per_chunk >= count else None
                seen.sent.append(time.perf_counter())
                yield _event({"choices": [{"index": 0, "finish_reason": last, **choice}]})
                if fault == "garbage":
                    yield b'data: {"choices":[{"text":"\xff\xfe"}]}\n\n'
                if fault == "error":
                    yield _event({"error": {"message": "the device is gone"}})
                if fault is not None:
                    return
            if seen.body["stream_options"]["include_usage"]:
                prompt = seen.body.get("prompt", "one two")
                usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
                yield _event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        finally:
            self.in_flight -= 1

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        routes = [
            Route("/v1/models", self.models),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/completions", self.generate, methods=["POST"]),
            Route("/v1/chat/completions", self.generate, methods=["POST"]),
        ]
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield
        finally:
            server.should_exit = server.force_exit = True
            await serving


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    truth = Server()
    async with truth.run():
        yield truth


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "holdfast.cli.main", "bench", "serve", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100"},
    )


@dataclass
class Ran:
    code: int
    stdout: str
    stderr: str
    result: dict[str, Any]


async def finish(process: asyncio.subprocess.Process, json_path: Path) -> Ran:
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return Ran(process.returncode, stdout.decode(), stderr.decode(), read_result(json_path))


def read_result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


async def bench(server: Server, tmp_path: Path, *arguments: str) -> Ran:
    path = tmp_path / "out.json"
    return await finish(await start("--base-url", server.url, "--json", str(path), *arguments), path)


async def test_what_it_reports_is_what_the_server_did(server: Server, tmp_path: Path) -> None:
    plot = tmp_path / "out.png"
    ran = await bench(
        server,
        tmp_path,
        *("--num-prompts", "6", "--max-concurrency", "2", "--random-input-len", "33", "--random-output-len", "8"),
        *("--goodput", "ttft:1000000 tpot:1000000", "--plot", str(plot), "--ignore-eos"),
    )
    assert ran.code == 0, ran.stderr
    assert ran.stderr == "", "no progress bar where there is no terminal"
    summary = ran.result["summary"]
    assert (summary["ok"], summary["failed"], summary["unfinished"], summary["short"]) == (6, 0, 0, 0)
    assert (summary["input_tokens"], summary["output_tokens"]) == (6 * 33, 6 * 8)
    assert summary["tokens_per_chunk"] == 1
    assert summary["output_tokens_per_s"] == pytest.approx(48 / summary["duration_s"], rel=1e-3)
    assert (summary["good"], summary["itl_ms"]["count"]) == (6, 6 * 7)

    assert len(server.seen) == 1 + 6, "a warm-up, and what was asked for"
    for seen in server.seen:
        assert len(seen.body["prompt"]) == 33
        assert set(seen.body["prompt"]) <= set(range(5000, 5020)), "only ids the server's /tokenize gave"
        assert (seen.body["model"], seen.body["max_tokens"], seen.body["ignore_eos"]) == ("truth", 8, True)
    assert len({tuple(seen.body["prompt"]) for seen in server.seen}) == 7

    rounding = 0.002
    truths = sorted(server.seen[1:], key=lambda seen: seen.received)
    for request, truth in zip(sorted(ran.result["requests"], key=lambda r: r["started_s"]), truths, strict=True):
        # the client sends before the server receives, and receives after the server sends
        assert request["ttft_ms"] >= 1000 * (truth.sent[0] - truth.received) - rounding
        assert request["e2el_ms"] >= 1000 * (truth.sent[-1] - truth.received) - rounding
        assert request["ttft_ms"] + sum(request["itl_ms"]) <= request["e2el_ms"] + 8 * rounding
        assert request["tpot_ms"] == pytest.approx((request["e2el_ms"] - request["ttft_ms"]) / 7, abs=rounding)
    machine = ran.result["machine"]
    assert machine["cpu"]
    assert machine["threads"] >= 1
    assert ran.result["config"]["load"]["max_concurrency"] == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    for word in ("TTFT", "TPOT", "ITL", "E2EL", "Goodput", "p99", "own CPU"):
        assert word in ran.stdout


async def test_the_concurrency_limit_is_reached_and_kept(server: Server, tmp_path: Path) -> None:
    server.gate, server.num_gated = asyncio.Barrier(3), 3  # the first three wait until all three are there
    flags = ["--num-prompts", "9", "--max-concurrency", "3", "--random-output-len", "2", "--num-warmups", "0"]
    ran = await bench(server, tmp_path, *flags)
    assert ran.code == 0, ran.stderr
    assert server.most_in_flight == 3


async def test_requests_come_at_the_rate_that_was_asked_for(server: Server, tmp_path: Path) -> None:
    flags = ["--num-prompts", "20", "--request-rate", "100", "--seed", "3", "--random-output-len", "1"]
    ran = await bench(server, tmp_path, *flags)
    assert ran.code == 0, ran.stderr
    arrivals = {request["index"]: request["arrival_s"] for request in ran.result["requests"]}
    assert [arrivals[index] for index in range(20)] == pytest.approx(gamma_arrivals(20, 100.0, 1.0, 3), abs=1e-6)
    # timers of the event loop may fire up to a millisecond early
    assert all(request["started_s"] > request["arrival_s"] - 0.002 for request in ran.result["requests"])


async def test_chunks_of_several_tokens(server: Server, tmp_path: Path) -> None:
    server.tokens_per_chunk = 4
    ran = await bench(server, tmp_path, "--num-prompts", "2", "--random-output-len", "12")
    summary = ran.result["summary"]
    assert (summary["output_tokens"], summary["tokens_per_chunk"], summary["itl_ms"]["count"]) == (24, 4, 4)
    assert summary["itl_ms"]["mean"] > summary["tpot_ms"]["mean"]
    assert "a chunk holds 4.00 tokens" in ran.stdout


async def test_failures_are_counted_told_apart_and_end_in_exit_1(server: Server, tmp_path: Path) -> None:
    server.faults = {1: "refuse", 2: "error", 3: "cut", 4: "refuse", 6: "garbage"}
    flags = ["--num-prompts", "7", "--max-concurrency", "1", "--random-output-len", "3"]
    ran = await bench(server, tmp_path, *flags)
    assert ran.code == 1
    summary = ran.result["summary"]
    assert (summary["ok"], summary["failed"]) == (2, 5)
    [garbage] = [error for error in summary["errors"] if "utf-8" in error.lower()]
    assert summary["errors"] == {
        garbage: 1,
        "HTTP 429: the queue is full [/INST]": 2,
        "error in the stream: the device is gone": 1,
        "the stream ended early": 1,
    }
    assert summary["output_tokens"] == 6, "tokens of failed requests do not count"
    assert "2 failed: HTTP 429: the queue is full [/INST]" in ran.stdout


async def test_chat_sends_messages(server: Server, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["Hello?", "And now?"], "output_len": 2}\nPlain\n')
    flags = f"--endpoint chat --dataset-name prompts --dataset-path {prompts} --num-warmups 0".split()
    ran = await bench(server, tmp_path, *flags, "--random-output-len", "3", "--model", "other")
    assert ran.code == 0, ran.stderr
    bodies = sorted((seen.body for seen in server.seen), key=lambda body: body["max_tokens"])
    assert [body["messages"][0]["content"] for body in bodies] == ["Hello?", "Plain"]
    assert [body["max_tokens"] for body in bodies] == [2, 3]
    assert {body["model"] for body in bodies} == {"other"}


async def test_ctrl_c_shows_what_was_measured_so_far(server: Server, tmp_path: Path) -> None:
    server.faults = {}
    server.gate, server.num_gated = asyncio.Event(), 0
    path = tmp_path / "out.json"
    flags = ["--num-prompts", "50", "--max-concurrency", "1", "--random-output-len", "2", "--num-warmups", "0"]
    process = await start("--base-url", server.url, "--json", str(path), *flags)
    async with server.arrived:
        await asyncio.wait_for(server.arrived.wait_for(lambda: len(server.seen) == 2), 30)
        server.num_gated = 50  # the third request is never answered
        await asyncio.wait_for(server.arrived.wait_for(lambda: len(server.seen) == 3), 30)
    process.send_signal(signal.SIGINT)
    ran = await finish(process, path)
    server.gate.set()
    assert ran.code == 130
    assert "interrupted; 48 of 50 requests are left out" in ran.stdout
    assert (ran.result["summary"]["ok"], ran.result["summary"]["unfinished"]) == (2, 48)
    assert "Traceback" not in ran.stderr


async def test_a_server_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with socket.socket() as bound:  # bound, but nobody listens
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        ran = await finish(await start("--base-url", url), tmp_path / "none")
    assert ran.code == 2
    assert ran.stderr.startswith(f"holdfast: --base-url {url}: no answer from there")
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


async def test_a_key_the_server_wants(server: Server, tmp_path: Path) -> None:
    server.api_key = "sesame"
    ran = await bench(server, tmp_path)
    assert ran.code == 2
    assert "wrong API key" in ran.stderr
    assert "--api-key" in ran.stderr
    ran = await bench(server, tmp_path, "--api-key", "sesame", "--num-prompts", "1", "--random-output-len", "1")
    assert ran.code == 0, ran.stderr
    assert "sesame" not in json.dumps(ran.result)


async def test_a_warm_up_that_fails_is_exit_2(server: Server, tmp_path: Path) -> None:
    server.faults = {0: "refuse"}
    ran = await bench(server, tmp_path, "--vocab-size", "100")
    assert ran.code == 2
    assert (
        ran.stderr
        == "holdfast: the warm-up request failed, nothing was measured: HTTP 429: the queue is full [/INST]\n"
    )
    assert set(server.seen[0].body["prompt"]) <= set(range(25, 90)), "the inner part of the vocabulary"
