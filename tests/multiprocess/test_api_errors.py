"""The door and the ends: refusals in OpenAI's shape, limits, keys, clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.service import Service, demo_model, wait_for

COMPLETION = {"prompt": "Once upon a time", "max_tokens": 4}


@pytest.fixture
def http(server: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, whose shape is OpenAI's whatever went wrong."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", COMPLETION | {"warp": 9}, "warp"),
        ("/v1/completions", COMPLETION | {"max_tokens": 2000}, "max_tokens"),
        ("/v1/completions", {"prompt": [49152]}, "prompt"),
        ("/v1/completions", COMPLETION | {"logprobs": 21}, "logprobs"),
        ("/v1/completions", COMPLETION | {"logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/tokenize", {}, "prompt"),
    ],
)
def test_bad_fields_are_named(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert refusal(http.post(path, json=body), 400)["param"] == param


def test_too_long_a_prompt_says_both_numbers(http: httpx.Client) -> None:
    error = refusal(http.post("/v1/completions", json={"prompt": [5] * 1024}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "1024 tokens; the prompt has 1024" in error["message"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"", b"[1]"])
def test_what_is_not_json_is_a_bad_request(http: httpx.Client, content: bytes) -> None:
    refusal(http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}), 400)


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    refusal(http.get("/v1/nothing"), 404)
    reply = http.get("/v1/completions")
    refusal(reply, 405)
    assert reply.headers["allow"] == "POST"
    refusal(http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}), 400)


def test_a_large_body_is_refused_however_it_is_sent(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "a" * 1_000_000}).encode()
    headers = {"Content-Type": "application/json"}
    refusal(http.post("/v1/completions", content=body, headers=headers), 413)
    parts = (body[start : start + 65536] for start in range(0, len(body), 65536))
    refusal(http.post("/v1/completions", content=parts, headers=headers), 413)


def test_request_ids_are_kept(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "mine"})
    assert reply.headers["x-request-id"] == "mine"
    assert "mine" in reply.json()["id"]
    assert http.get("/health").headers["x-request-id"]


async def test_requests_of_one_name_do_not_mix(server: Service) -> None:
    """Neither at the same time, nor when one's last tokens are on their way while the other starts."""
    bodies = [
        {"prompt": prompt, "max_tokens": 8, "temperature": 0} for prompt in ("One, two, three,", "Paris is the")
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

        async def text(body: dict[str, Any]) -> str:
            reply = await http.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            found: str = reply.json()["choices"][0]["text"]
            return found

        alone = [await text(body) for body in bodies]
        assert alone[0] != alone[1]
        assert await asyncio.gather(*(text(body | {"request_id": "same"}) for body in bodies * 3)) == alone * 3


def test_tokenize_and_back(http: httpx.Client) -> None:
    reply = http.post("/tokenize", json={"prompt": "Hello \U0001f642", "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": "Hello \U0001f642"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hello"}]}).json()
    assert chat["tokens"][0] == 1


def test_operator_routes(http: httpx.Client, server: Service) -> None:
    assert server.health() == (200, {"status": "ready", "requests": 0})
    assert set(http.get("/version").json()) == {"version"}
    http.post("/v1/completions", json=COMPLETION)
    metrics = server.metrics()
    assert metrics["holdfast:generation_tokens_total"] >= 4
    assert metrics["holdfast:time_to_first_token_seconds_count"] >= 1
    assert http.get("/openapi.json").json()["info"]["title"] == "Holdfast"


def nothing_held(server: Service) -> bool:
    """No live request, and every KV block given back."""
    metrics = server.metrics()
    return metrics["holdfast:num_requests_running"] == metrics["holdfast:kv_cache_usage_perc"] == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_blocks(server: Service, stream: bool) -> None:
    body = COMPLETION | {"max_tokens": 900, "ignore_eos": True, "n": 3, "stream": stream}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        await asyncio.to_thread(
            wait_for, "three running", lambda: server.metrics()["holdfast:num_requests_running"] == 3, 30
        )
        task.cancel()  # closes the connection
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(wait_for, "blocks freed", lambda: nothing_held(server), 10)
    assert server.health()[1]["requests"] == 0


async def test_a_full_queue_refuses_and_recovers(server: Service) -> None:
    body = COMPLETION | {"max_tokens": 20, "ignore_eos": True, "n": 4}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(12)))
        done = [reply for reply in replies if reply.status_code == 200]
        full = [reply for reply in replies if reply.status_code == 429]
        assert len(done) + len(full) == 12
        assert len(done) >= 8, "8 × 4 sequences fit"
        for reply in full:
            assert refusal(reply, 429)["type"] == "rate_limit_error"
            assert int(reply.headers["retry-after"]) > 0
        assert full, "12 × 4 sequences do not fit into 32"
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        error = refusal(await http.post("/v1/completions", json=body | {"n": 33}), 400)
        assert "at most 32" in error["message"]


def test_the_api_key_guards_all_but_health(tmp_path: Path) -> None:
    flags = ("--api-key", "secret", "--api-key", "second", "--kv-cache-memory-bytes", "64M", "--max-model-len", "512")
    service = Service(demo_model(), *flags, log=tmp_path / "log")
    try:
        service.wait_ready()
        with httpx.Client(base_url=service.url, timeout=60) as http:
            assert http.get("/health").status_code == 200
            for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
                assert refusal(http.get(path), 401)["code"] == "invalid_api_key"
                refusal(http.get(path, headers={"Authorization": "Bearer wrong"}), 401)
            for key in ("secret", "second"):
                assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    finally:
        assert service.stop() == 0


def test_a_sampling_default_out_of_range_is_refused_at_the_start(tmp_path: Path) -> None:
    flags = ("--override-generation-config", '{"repetition_penalty": 0}', "--max-model-len", "512")
    service = Service(demo_model(), *flags, log=tmp_path / "log")
    assert service.wait_end() == 2
    assert "--override-generation-config: `repetition_penalty`: should be greater" in service.text()
    assert "Traceback" not in service.text()


def test_a_head_without_end_is_cut(server: Service) -> None:
    """Heads come before any key is checked: they may not fill the memory."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with pytest.raises(OSError, match=r"[Rr]eset|pipe"):
            raw.sendall(b"x" * 20_000_000)
    assert server.health()[0] == 200


def test_a_large_body_may_follow_a_short_head(http: httpx.Client) -> None:
    words = "word " * 30_000
    assert http.post("/tokenize", json={"prompt": words}).json()["count"] > 30_000


def test_a_bad_text_part_is_told_what_it_lacks(http: httpx.Client) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": [{"type": "text"}]}]}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert "text" in error["param"]
    assert "only 'text' is" not in error["message"]


def test_offsets_of_an_echoed_text_count_its_special_tokens(http: httpx.Client) -> None:
    prompt = "<|im_start|>user\nHello"
    body = {"model": "demo", "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"].startswith(prompt)
    assert choice["logprobs"]["text_offset"] == [0, 12, 16, 17, 22]
