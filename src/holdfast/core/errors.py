"""Every error Holdfast raises on purpose.

HoldfastError
├── UserError               what the user did wrong: names the field, the value, the allowed range
│   ├── ConfigError         a flag, a plan, a contradiction between them, or this machine lacks what they ask
│   ├── ModelError          a checkpoint: unknown architecture, missing tensor, wrong shape, truncated file
│   └── RequestError        one API request; carries an HTTP status
│       ├── InvalidRequest      400
│       ├── Unauthorized        401
│       ├── NotFound            404
│       ├── BodyTooLarge        413
│       ├── QueueFull           429, with a Retry-After
│       └── Unavailable         503, with a Retry-After
└── MachineError            what the machine did wrong: names the rank and the step
    ├── StartupError        a process did not come up
    ├── ProcessDied         a process ended that should not have
    ├── CollectiveFailed    ranks did not meet: one was late
    │   └── RankGaveUp          or gave up
    ├── StepFailed          a step raised on a device
    ├── DeviceGone          a device is lost, and does not come back
    └── ReplicaHangs        no rank comes further
"""

from __future__ import annotations


class HoldfastError(Exception):
    """Root of the tree; never raised itself."""


class UserError(HoldfastError):
    """What the user did wrong. The message names the field, the value and the allowed range."""


class ConfigError(UserError):
    """A flag or plan that cannot be run."""


class ModelError(UserError):
    """A checkpoint that cannot be served. The message names the file or tensor."""


class RequestError(UserError):
    """One API request is refused, at the door.

    `param` is the request field at fault, `code` OpenAI's machine-readable reason,
    `retry_after` seconds for the Retry-After header (None: no header).
    """

    status = 400
    kind = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    """A field has a value outside its range, or is not supported."""


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    status = 401
    kind = "authentication_error"


class NotFound(RequestError):
    """No such model or request."""

    status = 404
    kind = "not_found_error"


class BodyTooLarge(RequestError):
    """The request body is larger than `--max-body-bytes`."""

    status = 413


class QueueFull(RequestError):
    """The waiting queue is at `--max-queued-seqs`."""

    status = 429
    kind = "rate_limit_error"


class Unavailable(RequestError):
    """The service is starting, draining, or has lost its replica."""

    status = 503
    kind = "service_unavailable_error"


class MachineError(HoldfastError):
    """What the machine did wrong. The message names the rank and the step."""


class StartupError(MachineError):
    """A process did not come up, or not in time."""


class ProcessDied(MachineError):
    """A process ended that should not have."""


class CollectiveFailed(MachineError):
    """Ranks did not meet: one of them gave up, or was not there by the deadline. Nothing they share can be used."""


class RankGaveUp(CollectiveFailed):
    """One of them gave up, and says itself why: nothing is wrong with this one."""


class StepFailed(MachineError):
    """A step raised on a device; the requests in it end with this error."""


class DeviceGone(MachineError):
    """A device is lost and does not come back: nobody need try to start its rank again."""


class Dismissed(MachineError):
    """This machine is not part of a service any more. `again`: it is to ask for a place in it anew."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class ReplicaHangs(MachineError):
    """No rank of a replica comes further with its step."""


class TokenLogGap(MachineError):
    """Tokens of a request got lost between the engine and the token log; the request cannot go on."""
