"""Requests of all kinds at once, to a service that calls its model m."""

from __future__ import annotations

import asyncio

import httpx

Answers = list[dict[str, object]]


def bodies() -> Answers:
    """24 at once, of all kinds; some share their beginning."""
    kinds = (
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.8, "logprobs": 1},
        {"n": 2, "temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"echo": True, "logprobs": 1, "temperature": 0},
    )
    return [
        {"model": "m", "prompt": "a ship and its boats " * (1 + i % 9) + str(i), "max_tokens": 60, "seed": i}
        | kinds[i % 5]
        for i in range(24)
    ]


async def ask(url: str) -> Answers:
    async with httpx.AsyncClient(base_url=url, timeout=240) as client:
        replies = await asyncio.gather(*[client.post("/v1/completions", json=body) for body in bodies()])
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:2]
    return [reply.json()["choices"] for reply in replies]
