"""`holdfast drain`: replicas of a running service are started anew, one after another, while it serves on."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from holdfast.core.errors import ConfigError, ProcessDied, StartupError
from holdfast.operate.config import DrainConfig

_LOOK_SECONDS = 0.1


class _Client:
    """Talks to one service. Raises `ConfigError` when there is none, or it refuses."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def ask(self, method: str, path: str) -> Any:
        """The JSON it answers with."""
        try:
            request = urllib.request.Request(self._url + path, method=method, headers=self._headers)
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            try:
                said = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                said = error.reason
            raise ConfigError(f"{self._url}{path}: {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._url}: no answer ({error})") from error

    def replicas(self) -> dict[int, dict[str, Any]]:
        """As /cluster tells of them, by number."""
        try:
            return {replica["replica"]: replica for replica in self.ask("GET", "/cluster")["replicas"]}
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{self._url}: is not a Holdfast service") from error


def run(url: str, config: DrainConfig) -> int:
    """Start the replicas anew. Raises `ConfigError` for a replica that is not there or does not serve, `ProcessDied`
    or `StartupError` when one does not come back."""
    client = _Client(url, config.service.api_key)
    found = client.replicas()
    for number in config.service.replica or sorted(found):
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
