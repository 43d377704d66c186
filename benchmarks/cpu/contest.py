"""Side by side: all peers alive at once, one at work, the others held still; round after round, job by job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from .bounds import Gauge
from .llama_cpp import LlamaCpp
from .processes import ChildPeer, Peer, PeerError, Timing
from .quiet import ENOUGH, Watch, wait_until_quiet
from .work import Job, Model

GREETING = [504, 3575, 282, 4649, 314]
"""\"The capital of France is\" in SmolLM2's tokens."""
GREETING_LEN = 24
PATIENCE_SECONDS = 300.0
"""How long, over all jobs of a model, others' work on the machine is waited out."""
TRIES = 3


@dataclass
class ModelResult:
    """What was measured of one model."""

    model: Model
    timings: dict[str, dict[str, list[Timing]]] = field(default_factory=dict)
    """Job → peer → round."""
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    greetings: dict[str, list[int]] = field(default_factory=dict)
    """Peer → greedy tokens after a real prompt: peers that do the same work say about the same."""
    problems: list[str] = field(default_factory=list)


def make_peer(name: str, model: Model) -> Peer:
    return LlamaCpp(model) if name == "llama.cpp" else ChildPeer(name, model)


class Contest:
    """The peers of one model."""

    def __init__(self, model: Model, peers: list[str], jobs: list[Job], gauge: Gauge) -> None:
        self.jobs = jobs
        self.gauge = gauge
        self.result = ModelResult(model)
        self.patience = PATIENCE_SECONDS
        self.peers = [make_peer(name, model) for name in peers]

    def run(self, rounds: int) -> ModelResult:
        """Start all, measure `rounds` times, stop all. A peer that fails is left out from there on."""
        try:
            for peer in list(self.peers):
                self._try(peer, partial(self._start, peer))
            for number in range(rounds):
                for job in self.jobs:
                    self._round(job, number)
        finally:
            for peer in self.peers:
                peer.stop()
        return self.result

    def _start(self, peer: Peer) -> None:
        _say(f"{self.result.model.name}: starting {peer.name}")
        peer.start(self.jobs)
        self.result.versions[peer.name], self.result.how[peer.name] = peer.versions, peer.how
        if self.result.model.is_real:
            self.result.greetings[peer.name] = peer.greedy_tokens(GREETING, GREETING_LEN)
        peer.hold()

    def _round(self, job: Job, number: int) -> None:
        prompts = job.prompts(self.result.model.vocab_size, number)
        start = number % max(1, len(self.peers))  # nobody is always first
        for peer in self.peers[start:] + self.peers[:start]:
            self._try(peer, partial(self._measure, peer, job, prompts))

    def _measure(self, peer: Peer, job: Job, prompts: list[list[int]]) -> None:
        """Once; when others took the cores meanwhile, again, and the least disturbed counts."""
        tries: list[Timing] = []
        while not tries or (self.patience > 0 and len(tries) < TRIES and tries[-1].others > ENOUGH):
            self.patience -= wait_until_quiet(max(0.0, self.patience))
            peer.resume()
            with Watch(peer.pid) as watch:
                timing = peer.run(job, prompts)
            peer.hold()
            tries.append(replace(timing, others=watch.others, limits=self.gauge.read()))
        best = min(tries, key=lambda timing: timing.others)
        self.result.timings.setdefault(job.name, {}).setdefault(peer.name, []).append(best)
        note = f"  others used {best.others:.1f} cores" if best.others > ENOUGH else ""
        _say(f"{self.result.model.name:14}{job.name:13}{peer.name:13}{best.seconds:8.3f} s{note}")

    def _try(self, peer: Peer, work: Callable[[], None]) -> None:
        """Do it, or note the peer's problem and go on without it."""
        try:
            work()
        except PeerError as error:
            _say(str(error))
            self.result.problems.append(str(error))
            self.peers.remove(peer)
            peer.stop()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
