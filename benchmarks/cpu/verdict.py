"""From timings to figures: medians, rates, ratios to each peer and to the limit, and whether a goal is met."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ..limits import Limits
from .bounds import Weights
from .contest import ModelResult
from .processes import Timing
from .work import GOALS, OURS, Goal, Job, Model


@dataclass(frozen=True)
class Figures:
    """One peer at one job: the median of its rounds, by whole seconds. Rates are tokens/s."""

    seconds: float
    rate: float
    """Of the whole job: tokens put out, or of a mere prefill those put in."""
    prefill_rate: float
    decode_rate: float | None
    """While decoding, after the last first token; None for a mere prefill."""
    spread: float
    """(slowest - fastest) / median."""
    limit_share: float
    """The least time the job could take by what the machine did around it, as a share of the time it took."""
    others: float
    """Cores that foreign processes used, in the worst round that counts."""

    @staticmethod
    def of(job: Job, timings: list[Timing], weights: Weights) -> Figures:
        seconds = median(timing.seconds for timing in timings)
        times = [timing.seconds for timing in timings]
        shares = [weights.job_seconds(job, t.limits) / t.seconds for t in timings if t.limits]
        decode = [t.decode_tokens / (t.seconds - t.prefill_seconds) for t in timings if t.decode_tokens]
        return Figures(
            seconds=seconds,
            rate=job.unit_tokens / seconds,
            prefill_rate=job.num_requests * job.input_len / median(t.prefill_seconds for t in timings),
            decode_rate=median(decode) if decode else None,
            spread=(max(times) - min(times)) / seconds,
            limit_share=median(shares),
            others=max(timing.others for timing in timings),
        )


@dataclass(frozen=True)
class JobVerdict:
    """One job of one model: every peer's figures, and what they say about Holdfast."""

    model: Model
    job: Job
    limit_seconds: float
    figures: dict[str, Figures]
    goal: Goal | None

    @property
    def limit_rate(self) -> float:
        return self.job.unit_tokens / self.limit_seconds

    def ratio(self, peer: str) -> float | None:
        """Holdfast : `peer`, whole jobs; None if either is missing."""
        if not {"holdfast", peer} <= self.figures.keys():
            return None
        return self.figures[peer].seconds / self.figures["holdfast"].seconds

    def decode_ratio(self, peer: str) -> float | None:
        """Holdfast : `peer` while decoding."""
        if not {"holdfast", peer} <= self.figures.keys():
            return None
        own, other = self.figures["holdfast"].decode_rate, self.figures[peer].decode_rate
        return own / other if own and other else None

    @property
    def goal_ratio(self) -> float | None:
        """The ratio the goal is about; None if a peer it names is missing."""
        if self.goal is None:
            return None
        others = [name for name in self.figures if name not in OURS]
        if self.goal.against != "best":
            others = [name for name in others if name == self.goal.against]
        of = self.decode_ratio if self.goal.while_decoding else self.ratio
        found = [ratio for ratio in map(of, others) if ratio is not None]
        return min(found) if found else None

    @property
    def goal_met(self) -> bool | None:
        """None: cannot be told."""
        if self.goal is None or self.goal_ratio is None:
            return None
        enough = self.figures["holdfast"].limit_share >= self.goal.share
        return self.goal_ratio >= self.goal.ratio and enough

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "limit_seconds": self.limit_seconds,
            "limit_rate": self.limit_rate,
            "figures": {name: asdict(figures) for name, figures in self.figures.items()},
            "holdfast_ratio": {name: self.ratio(name) for name in self.figures if name != "holdfast"},
            "holdfast_decode_ratio": {name: self.decode_ratio(name) for name in self.figures if name != "holdfast"},
            "goal": str(self.goal) if self.goal else None,
            "goal_ratio": self.goal_ratio,
            "goal_met": self.goal_met,
        }


def judge(result: ModelResult, jobs: list[Job], limits: Limits) -> list[JobVerdict]:
    """A verdict per job that anybody finished."""
    weights = Weights.of(result.model)
    verdicts = []
    for job in jobs:
        timings = result.timings.get(job.name, {})
        limit = weights.job_seconds(job, limits)
        figures = {peer: Figures.of(job, rounds, weights) for peer, rounds in timings.items()}
        verdicts.append(JobVerdict(result.model, job, limit, figures, GOALS.get((result.model.name, job.name))))
    return [verdict for verdict in verdicts if verdict.figures]
