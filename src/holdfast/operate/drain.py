"""`holdfast drain`: replicas of a running service are started anew, one after another, while it serves on."""

from __future__ import annotations

import time

from holdfast.core.errors import ConfigError, ProcessDied, StartupError
from holdfast.operate.client import Client
from holdfast.operate.config import DrainConfig

_LOOK_SECONDS = 0.1


def run(url: str, config: DrainConfig) -> int:
    """Start the replicas anew. Raises `ConfigError` for a replica that is not there or does not serve, `ProcessDied`
    or `StartupError` when one does not come back."""
    client = Client(url, config.service.api_key)
    found = client.replicas()
    lost = [number for number, replica in found.items() if replica["status"] == "lost"]
    for number in lost if not config.service.replica else ():
        print(f"replica {number} is lost: it is not started again", flush=True)
    for number in config.service.replica or sorted(found.keys() - lost):
        if number not in found:
            raise ConfigError(f"--replica {number}: there are {', '.join(map(str, sorted(found)))}")
        begun, epoch = time.monotonic(), client.replicas()[number]["epoch"]
        client.ask("POST", f"/cluster/replicas/{number}/restart")
        while True:
            now = client.replicas()[number]
            if now["status"] == "lost":
                raise ProcessDied(f"replica {number} is lost")
            if now["status"] == "ready" and now["epoch"] > epoch:
                break
            if time.monotonic() - begun > config.service.timeout:
                raise StartupError(f"replica {number} does not serve after --timeout {config.service.timeout:g} s")
            time.sleep(_LOOK_SECONDS)
        print(
            f"replica {number} serves again after {time.monotonic() - begun:.1f} s, on {now['ranks']} ranks",
            flush=True,
        )
    return 0
