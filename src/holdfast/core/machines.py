"""A service on several machines: the flags, and where they meet."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from holdfast.core.errors import ConfigError
from holdfast.core.options import option

MISSED_BEATS = 3
"""Signs of life that are missing when a machine is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinesConfig:
    """Several machines"""

    data_parallel_size_local: int | None = option(
        None,
        "Of --data-parallel-size, copies of the model on this machine; the others are on machines that join with "
        "--headless. Default: all; with --headless: 1.",
    )
    headless: bool = option(
        False,
        "Join the service at --data-parallel-address with copies of the model, instead of serving by itself. What "
        "tokens depend on, and how the model is cut, the service says.",
    )
    data_parallel_address: str | None = option(
        None, "Address of the first machine, that of the service, at which the others reach it."
    )
    data_parallel_rpc_port: int = option(29550, "Port of that address; the next one is used, too.")
    node_key_file: str | None = option(
        None,
        "File with a secret, the same on each machine: they know each other by it, and it encrypts what passes "
        "between them. 32 random bytes will do: head -c 32 /dev/urandom > node.key",
    )
    heartbeat_interval: float = option(
        1.0, f"Seconds between signs of life of machines; one that misses {MISSED_BEATS} is taken for lost."
    )

    @property
    def are_several(self) -> bool:
        """Whether this machine is to be one of them."""
        return self.headless or self.data_parallel_address is not None

    def check(self, data_parallel_size: int | None) -> None:
        """`data_parallel_size`: None where a plan says it. Raises `ConfigError` for what cannot work together."""
        local, size = self.data_parallel_size_local, data_parallel_size
        if local is not None and not 1 <= local <= 64:
            raise ConfigError(f"--data-parallel-size-local {local}: must be at least 1 and at most 64")
        if not 1 <= self.data_parallel_rpc_port <= 65534:
            raise ConfigError(f"--data-parallel-rpc-port {self.data_parallel_rpc_port}: must be 1 to 65534")
        if not 0.1 <= self.heartbeat_interval <= 600:
            raise ConfigError(f"--heartbeat-interval {self.heartbeat_interval}: must be at least 0.1 and at most 600")
        if self.headless:
            needs = "--headless"
        elif local is not None and size is not None and local > size:
            raise ConfigError(f"--data-parallel-size-local {local}: is more than --data-parallel-size {size}")
        elif local is not None and local != size:
            needs = f"--data-parallel-size-local {local}"
        else:
            for flag, value in (
                ("--data-parallel-address", self.data_parallel_address),
                ("--node-key-file", self.node_key_file),
            ):
                if value is not None:
                    raise ConfigError(f"{flag}: works with --headless, or a smaller --data-parallel-size-local")
            return
        for flag, value in (
            ("--data-parallel-address", self.data_parallel_address),
            ("--node-key-file", self.node_key_file),
        ):
            if not value:
                raise ConfigError(f"{needs}: needs {flag}")


class Network(msgspec.Struct, frozen=True):
    """Where the machines of one service meet: the first one listens, the others connect."""

    address: str
    port: int
    key: bytes
    """The secret that all of them have."""
    is_first: bool
    heartbeat: float
    """Seconds."""
    service: str
    """This run of it: nobody else's."""
    node: str = ""
    """What this machine is called, if it is not the first."""
    session: str = ""
    """Of its supervisor: nobody else's."""

    @property
    def hub(self) -> str:
        """ROUTER bound by the hub of the first machine; every other machine's outpost connects a DEALER."""
        return self._tcp(self.port)

    @property
    def store(self) -> str:
        """ROUTER bound by the first machine's checkpoint store; every other machine's store connects a DEALER."""
        return self._tcp(self.port + 1)

    def _tcp(self, port: int) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"tcp://{host}:{port}"
