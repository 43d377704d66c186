"""One `holdfast serve` of the demo model for all tests of its API."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from support.service import Service, demo_model

MODEL = "demo"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """In float32; at the end it must leave with 0 on SIGTERM, and leave no process behind."""
    flags = ("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "1024")
    limits = ("--kv-cache-memory-bytes", "256M", "--max-num-seqs", "8", "--max-queued-seqs", "24")
    log = tmp_path_factory.mktemp("server") / "log"
    service = Service(demo_model(), *flags, *limits, "--max-body-bytes", "1M", log=log)
    try:
        yield service.wait_ready()
        assert service.stop() == 0, service.text()
    finally:
        if service.process.poll() is None:
            service.process.kill()
        service.wait_end()


@pytest.fixture
def client(server: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client
