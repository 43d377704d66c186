"""The door while the service cannot serve: it says so, on every path but those that operators watch it by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from holdfast.core.boot import Endpoints
from holdfast.core.config import ServeConfig, ServerConfig
from holdfast.core.lifecycle import DiskTier, Replace
from holdfast.gateway.app import Service, build_app
from holdfast.gateway.calls import Calls
from holdfast.gateway.checks import WeightChecks
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.router import Router
from holdfast.gateway.tokenlog import TokenLog


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    metrics = Metrics("m")
    log = TokenLog()
    router = Router(Endpoints(str(tmp_path)), log, metrics, max_live=1)
    config, told = ServeConfig(server=ServerConfig(api_key=("key",))), asyncio.Queue[Replace]()
    checks = WeightChecks(router, metrics, told.put, shared=False)
    yield Service(router, Calls(log, router, 1.0), metrics, config, told.put, checks)
    router.close()


@pytest_asyncio.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as http:
        yield http


@pytest.mark.parametrize("path", ["/v1/models", "/openapi.json", "/nothing"])
async def test_a_starting_service_says_when_to_come_back(http: httpx.AsyncClient, path: str) -> None:
    reply = await http.get(path, headers={"Authorization": "Bearer key"})
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["code"] == "starting"


async def test_operators_get_an_answer_in_every_state(http: httpx.AsyncClient, service: Service) -> None:
    health = await http.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "starting", "requests": 0})
    service.disk = DiskTier(3, 5, 2, 0, "No space left on device")
    assert (await http.get("/health")).json()["checkpoint_disk"] == "No space left on device"
    assert (await http.post("/cluster/check", headers={"Authorization": "Bearer key"})).status_code == 503
    assert (await http.post("/cluster/check")).status_code == 401
    for status in ("starting", "draining"):
        assert (await http.get("/health")).json()["status"] == status
        for path in ("/version", "/metrics"):
            assert (await http.get(path, headers={"Authorization": "Bearer key"})).status_code == 200
            assert (await http.get(path)).status_code == 401
        service.router.end_all("stopped")


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", "Bearer keys", "Basic key", "key", "Bearer k\u00e9y"])
async def test_only_the_key_opens(http: httpx.AsyncClient, sent: str) -> None:
    reply = await http.get("/v1/models", headers={"Authorization": sent.encode()})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("sent", "kept"), [("mine-1", True), ("", False), ("x" * 201, False), ("a\u00e9", False)])
async def test_request_ids_are_printable_and_short(http: httpx.AsyncClient, sent: str, kept: bool) -> None:
    reply = await http.get("/health", headers={"X-Request-Id": sent.encode()})
    assert (reply.headers["x-request-id"] == sent) == kept
    assert reply.headers["x-request-id"]
