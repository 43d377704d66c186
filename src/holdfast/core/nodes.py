"""What the hub of the first machine and the other machines (nodes) tell each other.

    node ──ToHub──▶ hub ──ToNode──▶ that node

A node's supervisor asks and is assigned replicas; then its outpost joins, and passes on what engines, gateway and
supervisors say. What anybody says who has not joined is dropped, and answered by `Unknown`.
"""

from __future__ import annotations

from holdfast.core.lifecycle import Distrust, Replace, ReplicaLost
from holdfast.core.message import Message

# --- to the hub ------------------------------------------------------------------------------------


class Ask(Message, frozen=True):
    """A node has room for `count` replicas. Answered by `Assigned` or `Refused`."""

    node: str
    """What its users call it."""
    session: str
    """Of its supervisor: nobody else's."""
    count: int
    identity: dict[str, str]
    """What its tokens would depend on, by names for the user."""


class Join(Message, frozen=True):
    """The node is there, or there again. Answered by `Joined`, `StartOver` or `Refused`."""

    node: str
    session: str
    attempt: int
    """How often it lost the hub before, or was told that it is unknown: what was under way then is lost."""
    service: str
    replicas: list[int]


class NodeBeat(Message, frozen=True):
    """It is there. Answered by the same."""


class FromEngine(Message, frozen=True):
    """An encoded `wire.ToGateway`."""

    data: bytes


class FromSupervisor(Message, frozen=True):
    """A node's supervisor tells the gateway."""

    message: ReplicaLost


class Leave(Message, frozen=True):
    """The node is stopped, by somebody who wants that, or because it cannot serve any more."""

    reason: str
    is_planned: bool


ToHub = Ask | Join | NodeBeat | FromEngine | FromSupervisor | Leave

# --- to a node -------------------------------------------------------------------------------------


class Assigned(Message, frozen=True):
    """These replicas are the node's, of what is served."""

    service: str
    """This run of it: nobody else's."""
    boot: bytes
    """JSON of the first machine's `Boot`."""
    replicas: list[int]


class Refused(Message, frozen=True):
    """Not now, or never (`for_good`)."""

    reason: str
    for_good: bool


class Joined(Message, frozen=True):
    """From now on what it says is passed on, and it is told what engines are to do."""


class Unknown(Message, frozen=True):
    """It has not joined, or was taken for lost: it is to join."""


class StartOver(Message, frozen=True):
    """It is part of something that is no more: it is to ask anew."""

    reason: str


class ForEngine(Message, frozen=True):
    """An encoded `wire.ToEngine`."""

    replica: int
    data: bytes


class Farewell(Message, frozen=True):
    """The service was stopped. Answered by `Leave`."""


ToNode = Assigned | Refused | Joined | Unknown | StartOver | NodeBeat | ForEngine | Replace | Distrust | Farewell
