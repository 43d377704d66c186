"""What children and their supervisor tell each other: msgspec structs in msgpack, like all messages.

any child ──ToSupervisor──▶ supervisor ──ToChild──▶ any child
"""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.core.message import Message

# --- to the supervisor -----------------------------------------------------------------------------


class Progress(Message, frozen=True):
    """A line for the user while the service starts. `fraction` in [0, 1], or None."""

    text: str
    fraction: float | None = None


class Ready(Message, frozen=True):
    """The child does its work from now on."""

    may_take: int = 0
    """Bytes of memory that it does not have yet and is to have: what a KV cache takes as it is filled."""
    gpu: str = ""
    """UUID of the GPU that it runs on."""
    may_stay: bool = False
    """A worker that can take part in its replica again, in another place too, after another of its processes died."""


class Failed(Message, frozen=True):
    """The child cannot go on and is about to exit."""

    error: str
    user_error: bool
    """What the user did wrong (no traceback shown), or what the machine did."""
    traceback: str = ""
    follows: bool = False
    """Only because another process did."""
    hangs: bool = False
    """Not this process: the replica it speaks for."""
    for_good: bool = False
    """Its device does not come back."""


LossKind = Literal["death", "error", "hang", "leak", "corruption", "device", "machine", "planned"]
"""A process was killed or left; it said why it cannot go on; nobody came further; its memory grew and grew; its
weights have changed; the driver says that its GPU is broken; a machine is gone, or not heard; somebody wanted it."""


class Replace(Message, frozen=True):
    """From the gateway: this replica is to be started anew. Passed on to the machine that has it."""

    replica: int
    reason: str
    kind: LossKind = "planned"
    process: str | None = None
    """That it is because of."""


class Beat(Message, frozen=True):
    """The engine, or the gateway, is there, busy or not: every `BEAT_SECONDS`."""


BEAT_SECONDS = 1.0


class DiskTier(Message, frozen=True):
    """From the checkpoint store with every beat, and on to the gateway: how it is with the blocks on disk. Counters
    begin anew with the store's process."""

    blocks: int
    """That are there now."""
    written: int
    read: int
    broken: int
    """That were not what was written."""
    failure: str | None
    """Why the disk is not used, or takes no more."""


class Distrust(Message, frozen=True):
    """To the checkpoint store: forget every block, on disk too. From the first machine to all others."""


class CopiesKept(Message, frozen=True):
    """From the first machine's checkpoint store with every beat, on to the gateway: blocks that other machines had it
    keep, and that it gave them. Counters begin anew with the store's process."""

    kept: int
    given: int
    broken: int
    """That were not what they should be."""


# --- from the supervisor ---------------------------------------------------------------------------


class Drain(Message, frozen=True):
    """To the gateway: take no new request, finish the live ones within `deadline` seconds, exit."""

    deadline: float


class Loss(msgspec.Struct, frozen=True):
    """What was lost first, and what was lost with it."""

    process: str
    kind: LossKind
    stage: int | None
    """Of the process; None: it belongs to the whole replica."""
    ranks: list[str]
    """That share its stage: a tensor-parallel group."""
    expert_group: list[str]
    """Of them: those that hold the same experts."""
    detected: float
    """Seconds since 1970."""


class Replaces(Message, frozen=True):
    """To a gateway: it stands in for one that was lost."""

    reason: str
    loss: Loss


class ReplicaLost(Message, frozen=True):
    """To the gateway: this replica is gone. Its requests go on in others; without any they wait for one that comes
    back, or, when none does, end with this error."""

    replica: int
    reason: str
    epoch: int = -1
    """Of the engine that is gone; it says nothing any more."""
    comes_back: bool = False
    is_smaller: bool = False
    """With fewer ranks."""
    loss: Loss | None = None
    """None: nothing was lost, the service ends."""


class Spares(Message, frozen=True):
    """To the gateway: so many spare workers wait."""

    ready: int


class StoreLost(Message, frozen=True):
    """To the gateway: the process of the checkpoint store is gone, which hits no request."""

    reason: str
    loss: Loss


class StoreBack(Message, frozen=True):
    """To the gateway: it is there again."""


MachineStatus = Literal["ready", "lost", "stopped"]


class Machine(msgspec.Struct, frozen=True):
    """One of the others, of a service on several."""

    name: str
    replicas: list[int]
    status: MachineStatus


class Machines(Message, frozen=True):
    """To the gateway: those that have joined so far, the last of each name."""

    machines: list[Machine]


class NodeJoined(Message, frozen=True):
    """From the hub, on to the gateway: a machine is there with these replicas. Their engines are to be greeted."""

    node: str
    replicas: list[int]


class Stop(Message, frozen=True):
    """Leave the loop and exit with 0."""


ToChild = (
    Drain
    | Replaces
    | ReplicaLost
    | Spares
    | StoreLost
    | StoreBack
    | DiskTier
    | CopiesKept
    | Distrust
    | Replace
    | Machines
    | NodeJoined
    | Stop
)

# --- of other machines, to the supervisor ----------------------------------------------------------


class NodeLost(Message, frozen=True):
    """From the hub: a machine is not there any more, nor are its replicas."""

    node: str
    replicas: list[int]
    reason: str
    kind: LossKind
    detected: float
    """Seconds since 1970."""


class NodeSays(Message, frozen=True):
    """From the hub: what a machine's supervisor says to the gateway."""

    node: str
    lost: ReplicaLost


class Over(Message, frozen=True):
    """From an outpost: the service has ended, or (`again`) its machine is to ask for a place in it anew."""

    reason: str
    again: bool


ToSupervisor = (
    Progress
    | Ready
    | Failed
    | Replace
    | Beat
    | DiskTier
    | CopiesKept
    | Distrust
    | NodeJoined
    | NodeLost
    | NodeSays
    | Over
)
