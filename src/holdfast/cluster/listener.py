"""The socket that a service listens on. The supervisor has it: while a gateway is started again clients wait in its
queue instead of being refused."""

from __future__ import annotations

import socket

from holdfast.core.config import ServerConfig
from holdfast.core.errors import ConfigError


def listen(config: ServerConfig) -> socket.socket:
    """Raises `ConfigError` when the address is unknown or the port is taken."""
    is_v6 = ":" in config.host
    family, both = (socket.AF_INET6, socket.has_dualstack_ipv6()) if is_v6 else (socket.AF_INET, False)
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(f"--host {config.host} --port {config.port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def url_of(config: ServerConfig, listener: socket.socket) -> str:
    """Where clients of this machine find it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{listener.getsockname()[1]}"
