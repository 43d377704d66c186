"""More than a service can do, for long, with all detectors watching: slow is not dead, and nobody is taken for it.

`--overload-seconds 3600` (a flag of pytest) makes it an hour.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path

import httpx
import pytest

from support.service import Service
from support.tiny import tiny_model

STREAMS = 48
FLAGS = (
    *("--served-model-name", "m", "--max-model-len", "512", "--max-num-seqs", "8", "--max-queued-seqs", "32"),
    *("--kv-cache-memory-bytes", "120K", "--checkpoint-memory-bytes", "1200K", "--leak-window", "5"),
    *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--cpu-threads", "1"),
)


def body(index: int) -> dict[str, object]:
    """Long prompts and short ones, mostly prefill or mostly decode."""
    return {
        "model": "m",
        "prompt": f"{index} boats went out to sea. " * (1 + index % 9),
        "max_tokens": 250 if index % 3 else 20,
        "temperature": 0.8,
        "seed": index,
        "ignore_eos": True,
    }


def ask_and_never_read(url: httpx.URL) -> socket.socket:
    """A client that stands still: its reply is more than the sockets' buffers hold."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((url.host, url.port))
    sent = json.dumps(body(1) | {"stream": True, "logprobs": 20, "max_tokens": 450, "prompt": "sea"}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}"
    )
    client.sendall(head.encode() + b"\r\n\r\n" + sent)
    return client


async def overload(url: str, seconds: float) -> tuple[int, int]:
    """Replies and refusals. The same request is answered the same each time."""
    texts: dict[int, str] = {}
    counts, until = {200: 0, 429: 0}, time.monotonic() + seconds
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def stream(first: int) -> None:
            index = first
            while time.monotonic() < until:
                reply = await client.post("/v1/completions", json=body(index % 60))
                counts[reply.status_code] += 1
                if reply.status_code == 200:
                    text = reply.json()["choices"][0]["text"]
                    assert texts.setdefault(index % 60, text) == text
                    index += 7
                else:
                    await asyncio.sleep(0.05)

        await asyncio.gather(*[stream(first) for first in range(STREAMS)])
    return counts[200], counts[429]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_an_overload_is_no_fault(tmp_path: Path, request: pytest.FixtureRequest):
    """Six times the streams that run at once, a cache for half of those, a store that is soon full, a queue that
    refuses, four ranks on whatever cores there are, a client that does not read: no incident."""
    seconds = request.config.getoption("--overload-seconds")
    service = Service(tiny_model(tmp_path), *FLAGS, log=tmp_path / "log").wait_ready()
    try:
        with ask_and_never_read(httpx.URL(service.url)):
            num_replies, num_refused = asyncio.run(overload(service.url, seconds))
        metrics = service.metrics()
        preemptions = metrics["holdfast:num_preemptions_total"]
        print(f"{num_replies} replies, {num_refused} refusals, {preemptions:g} preemptions in {seconds:g} s")
        assert num_replies > STREAMS
        assert num_refused > 0, "the queue was meant to be too short"
        assert preemptions > 0, "the cache was meant to be too small"
        assert service.incidents() == []
        [replica] = httpx.get(f"{service.url}/cluster").json()["replicas"]
        assert (replica["status"], replica["epoch"]) == ("ready", 0)
    finally:
        assert service.stop() == 0, service.text()[-3000:]
    assert "error:" not in service.text()
