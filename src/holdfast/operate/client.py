"""What commands ask of a running service."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from holdfast.core.errors import ConfigError


class Client:
    """Talks to one service. Raises `ConfigError` when there is none, or it refuses."""

    def __init__(self, url: str, api_key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url}: must be a URL with http:// or https://")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def ask(self, method: str, path: str, timeout: float = 30.0) -> Any:
        """The JSON it answers with."""
        try:
            request = urllib.request.Request(self.url + path, method=method, headers=self._headers)
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            try:
                said = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                said = error.reason
            raise ConfigError(f"{self.url}{path}: {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.url}: no answer ({error})") from error

    def replicas(self) -> dict[int, dict[str, Any]]:
        """As /cluster tells of them, by number."""
        try:
            return {replica["replica"]: replica for replica in self.ask("GET", "/cluster")["replicas"]}
        except (KeyError, TypeError) as error:
            raise self.stranger() from error

    def stranger(self) -> ConfigError:
        return ConfigError(f"{self.url}: is not a Holdfast service")
