"""Flags of `holdfast drain` and `holdfast check`."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.core.errors import ConfigError
from holdfast.core.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Service"""

    replica: tuple[int, ...] = option((), "Number of a replica; may be repeated. Default: all, one after another.")
    api_key: str | None = option(None, "Key of the service, if it has one.")
    timeout: float = option(600.0, "Seconds that one replica may take until it serves again.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedConfig:
    """Service"""

    api_key: str | None = option(None, "Key of the service, if it has one.")
    timeout: float = option(600.0, "Seconds that the check may take.")
    json: bool = option(False, "Print what was found as JSON.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """Everything `holdfast check` can be told, beside URL."""

    service: CheckedConfig = CheckedConfig()

    def check(self) -> None:
        """Raise `ConfigError` for a value out of range, naming the flag, the value and the range."""
        if not 1 <= self.service.timeout <= 1e6:
            raise ConfigError(f"--timeout {self.service.timeout}: must be at least 1 and at most 1000000")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainConfig:
    """Everything `holdfast drain` can be told, beside URL."""

    service: ServiceConfig = ServiceConfig()

    def check(self) -> None:
        """Raise `ConfigError` for a value out of range, naming the flag, the value and the range."""
        if not 1 <= self.service.timeout <= 1e6:
            raise ConfigError(f"--timeout {self.service.timeout}: must be at least 1 and at most 1000000")
        for replica in self.service.replica:
            if not 0 <= replica < 1_000_000:
                raise ConfigError(f"--replica {replica}: must be at least 0")
