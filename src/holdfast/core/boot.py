"""What every process of a service is given when it starts: where the others are, and what is served."""

from __future__ import annotations

import msgspec

from holdfast.core.config import ServeConfig
from holdfast.core.machines import Network
from holdfast.core.plan import Plan
from holdfast.core.spec import ModelInfo

RECONNECT_MS = 10
"""Between two attempts to reach a process that is not there yet. libzmq's own 100 ms, twice, would be a good part of
what a replica takes to come back."""


class Endpoints(msgspec.Struct, frozen=True):
    """Where the processes of one `holdfast serve` meet: ipc:// addresses inside its private folder."""

    folder: str

    @property
    def supervisor(self) -> str:
        """ROUTER bound by the supervisor; every child connects a DEALER named after itself."""
        return f"ipc://{self.folder}/supervisor"

    @property
    def gateway(self) -> str:
        """PULL bound by the gateway; every engine pushes `ToGateway`."""
        return f"ipc://{self.folder}/gateway"

    def engine(self, replica: int) -> str:
        """PULL bound by the engine; the gateway pushes `ToEngine`."""
        return f"ipc://{self.folder}/engine-{replica}"

    def results(self, replica: int, epoch: int) -> str:
        """PULL bound by the engine; its workers push `ToEngineFromWorker`. `epoch`: the replica's: a worker that was
        in an earlier one cannot be heard in this."""
        return f"ipc://{self.folder}/results-{replica}-{epoch}"

    def worker(self, rank: str, epoch: int) -> str:
        """PULL bound by the worker; its engine pushes `ToWorker`."""
        return f"ipc://{self.folder}/worker-{rank}-{epoch}"

    @property
    def store(self) -> str:
        """ROUTER bound by the checkpoint store; every engine connects a DEALER."""
        return f"ipc://{self.folder}/store"

    def meeting(self, replica: int, epoch: int) -> str:
        """File through which the ranks of a replica find each other, where they share no memory."""
        return f"{self.folder}/meeting-{replica}-{epoch}"


class Boot(msgspec.Struct, frozen=True):
    """What every child is told with each order."""

    config: ServeConfig
    model: ModelInfo
    endpoints: Endpoints
    plan: Plan
    stamp: list[tuple[str, int, int, int]] = []
    """Of the checkpoint, see `models.inspect.stamp_of`: who reads it later must find the same."""
    network: Network | None = None
    """None: this machine is the only one."""

    @property
    def is_first(self) -> bool:
        """Whether the gateway is on this machine."""
        return self.network is None or self.network.is_first
