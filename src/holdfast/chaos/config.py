"""Flags of `holdfast chaos`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from holdfast.core.errors import ConfigError
from holdfast.core.options import option

FAULTS = (
    "kill-worker",
    "kill-engine",
    "kill-gateway",
    "kill-store",
    "kill-supervisor",
    "kill-worker+store",
    "stop-worker",
    "stop-engine",
    "stop-gateway",
    "stop-store",
    "spoil-worker",
    "error-worker",
    "gone-worker",
    "slow-worker",
    "leak-worker",
    "corrupt-worker",
    "kill-node",
    "stop-node",
    "cut-node",
    "drop-node",
    "leave-node",
    "kill-hub",
    "stop-hub",
    "kill-outpost",
)
"""SIGKILL or SIGSTOP of a worker, an engine, the gateway, the checkpoint store; SIGKILL of the supervisor, and the
service started again. `spoil`: bytes of the store's memory are changed, then the worker is killed. `error`, `gone`,
`slow`, `leak`, `corrupt`: as `worker.faults` has it. Of another machine: SIGKILL of its supervisor, or of its
outpost; all its processes stand still, or nobody reaches it, until that is noticed; all its connections end, once;
SIGTERM of its supervisor."""

OF_MACHINES = FAULTS[FAULTS.index("kill-node") :]
"""Those that a service on one machine cannot have."""

OF_THE_STORE = ("kill-store", "kill-worker+store", "stop-store", "spoil-worker")
"""Those that a service without a checkpoint store cannot have."""

POINTS = {
    "queued": ("engine",),
    "prefill": ("worker",),
    "chunk": ("worker",),
    "decode": ("worker",),
    "sampled": ("worker", "engine"),
    "logged": ("gateway",),
    "checkpoint": ("worker",),
    "restore": ("worker",),
    "loading": ("worker",),
    "recovery": ("engine",),
}
"""Points of the code (`core.points`), each a moment of its own, and whose code it is."""

PHASES = ("any", *POINTS, "reshape", "drain")
"""See `chaos.phases`."""

PHASES_OF_THE_STORE = ("checkpoint", "restore")

_OF_ONE = ("sampled", "logged", "checkpoint", "restore")
"""Moments that matter to the process that is held, to the store, and when all are gone."""

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """Faults"""

    kills: int = option(20, "How many faults; each waits until some replica serves after the one before.")
    faults: str = option(
        ALL, f"Kinds to draw from, with commas between: {', '.join(FAULTS)}. all: those this service can have."
    )
    phase: str = option(
        "any",
        "Moments to draw from, with commas between; all: those this service can have. any: a random one; queued: a "
        "request waits for a place; prefill, chunk, decode: a worker begins a prompt, is in its midst, gets on; "
        "sampled: the token is not in the log; logged: it is, and not sent; checkpoint, restore: a block is "
        "being copied into the store, or back; loading: a worker starts again; recovery: requests are going on "
        "elsewhere; reshape: a replica is cut anew without a rank; drain: one is started anew on demand.",
    )
    seed: int = option(0, "Of the draw: which fault, of which process, when; and of the requests.")
    pair_percent: int = option(10, "Of the faults, so many in 100 come with a second one at the same moment.")

    machines: int = option(
        0,
        "Machines beside the first that share the --data-parallel-size copies of the service evenly with it: as many "
        "more services on this one, over a network that can be cut.",
    )

    def kinds(self, *, has_store: bool = True) -> list[str]:
        """`--faults`, parsed, for a service with a checkpoint store or without. Raises `ConfigError`."""
        lacks = (() if has_store else OF_THE_STORE) + (() if self.machines else OF_MACHINES)
        if ALL in self.faults.split(","):
            return [kind for kind in FAULTS if kind not in lacks]
        found = _among(FAULTS, "--faults", self.faults)
        for kind in found:
            if kind in OF_MACHINES and not self.machines:
                raise ConfigError(f"--faults {self.faults}: {kind} needs --machines")
            if kind in OF_THE_STORE and not has_store:
                raise ConfigError(
                    f"--faults {self.faults}: {kind} needs a checkpoint store, and this service has none "
                    "(--checkpoint-memory-bytes)"
                )
        return found

    def phases(self, *, has_store: bool = True, num_ranks: int = 2) -> list[str]:
        """`--phase`, parsed, in the same way; `num_ranks`: of a replica. Raises `ConfigError`."""
        lacks = (
            {} if has_store else dict.fromkeys(PHASES_OF_THE_STORE, "a checkpoint store (--checkpoint-memory-bytes)")
        )
        if num_ranks < 2:
            lacks["reshape"] = "a replica of several ranks (--tensor-parallel-size, --pipeline-parallel-size)"
        if ALL in self.phase.split(","):
            return [phase for phase in PHASES if phase not in lacks]
        found = _among(PHASES, "--phase", self.phase)
        for phase in found:
            if phase in lacks:
                raise ConfigError(f"--phase {self.phase}: {phase} needs {lacks[phase]}, and this service has none")
        return found


def kinds_at(phase: str, kinds: list[str], role: str) -> list[str]:
    """Those of `kinds` that make sense at a moment in which a process of this role is held."""
    if phase not in _OF_ONE:
        return kinds
    roles = {role, "store", "supervisor"}
    return [kind for kind in kinds if roles & set(kind.partition("-")[2].split("+"))] or kinds


def _among(known: tuple[str, ...], flag: str, given: str) -> list[str]:
    """The words of `given`. Raises `ConfigError` for one that is not known."""
    found = given.split(",")
    for word in found:
        if word not in known:
            raise ConfigError(f"{flag} {given}: {word!r} is not one of {', '.join(known)}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Load"""

    streams: int = option(8, "Requests that are under way at any time.")
    requests: int = option(24, "Different requests, of all kinds, over and over.")
    max_tokens: int = option(120, "Tokens of each reply.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Report"""

    json: str | None = option(None, "File for the report with every single fault.")
    plot: str | None = option(None, "File for the timeline as a PNG.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosConfig:
    """Everything `holdfast chaos` can be told, beside MODEL and the flags of the service."""

    fault: FaultConfig = FaultConfig()
    load: LoadConfig = LoadConfig()
    report: ReportConfig = ReportConfig()

    def check(self) -> None:
        """Raise `ConfigError` for a value out of range, naming the flag, the value and the range, and for a library
        that is not installed."""
        for flag, value, least, most in (
            ("--kills", self.fault.kills, 0, 1_000_000),
            ("--pair-percent", self.fault.pair_percent, 0, 100),
            ("--machines", self.fault.machines, 0, 16),
            ("--streams", self.load.streams, 1, 1000),
            ("--requests", self.load.requests, 1, 10_000),
            ("--max-tokens", self.load.max_tokens, 1, 100_000),
        ):
            if not least <= value <= most:
                raise ConfigError(f"{flag} {value}: must be at least {least} and at most {most}")
        self.fault.kinds()
        self.fault.phases()
        for module, what in (("httpx", "holdfast chaos"), ("matplotlib", "--plot")):
            if find_spec(module) is None and (what != "--plot" or self.report.plot is not None):
                raise ConfigError(f"{what} needs {module}: pip install 'holdfast[bench]'")
