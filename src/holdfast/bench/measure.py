"""The arithmetic of a measurement: latencies of one request, their distributions, throughput, goodput. Pure.

Times are what a client sees, in seconds. A *chunk* is an event of the stream that carries text. Servers may put
several tokens into one chunk, or none while a character is incomplete; so

- TTFT is the time from sending the request to its first chunk,
- ITL is the time between two chunks that follow each other, one sample per pair whatever the chunks hold: the
  pauses a reader sees. `tokens_per_chunk` says how far that is from a time per token,
- TPOT = (E2EL - TTFT) / (output tokens - 1) counts tokens as the server's usage does, so it is comparable across
  servers; a request of one token has none,
- E2EL is the time from sending the request to the last event of its stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times in seconds; `arrival` and `started` count from the start of the run."""

    index: int
    arrival: float
    """When it should have been sent."""
    asked_tokens: int
    started: float = 0.0
    """When it was sent: later than `arrival` when the concurrency limit held it back."""
    ttft: float | None = None
    e2el: float = 0.0
    chunk_gaps: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    """Why it failed; None: it did not."""

    @property
    def ok(self) -> bool:
        """Whether it ended as it should."""
        return self.error is None

    @property
    def num_chunks(self) -> int:
        """Chunks that carried text."""
        return 0 if self.ttft is None else 1 + len(self.chunk_gaps)

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None with fewer than two tokens."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    def within(self, limits: Mapping[str, float]) -> bool:
        """Whether it keeps every limit (seconds, by metric). No TPOT, as with a single token, keeps any limit on
        it; no TTFT, as without any text, keeps none."""
        value = {"ttft": np.inf if self.ttft is None else self.ttft, "tpot": self.tpot or 0.0, "e2el": self.e2el}
        return self.ok and all(value[metric] <= limit for metric, limit in limits.items())

    def record(self) -> dict[str, Any]:
        """For the JSON file, with units in the names."""
        return {
            "index": self.index,
            "arrival_s": round(self.arrival, 6),
            "started_s": round(self.started, 6),
            "ttft_ms": _ms(self.ttft),
            "tpot_ms": _ms(self.tpot),
            "e2el_ms": _ms(self.e2el),
            "itl_ms": [_ms(gap) for gap in self.chunk_gaps],
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "asked_tokens": self.asked_tokens,
            "finish_reason": self.finish_reason,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one latency, in seconds."""

    count: int
    mean: float
    percentiles: dict[float, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run comes to. Rates count requests that ended well, over the whole duration."""

    ok: int
    failed: int
    errors: dict[str, int]
    """Reason → how many requests, most frequent first."""
    unfinished: int
    """Requests that Ctrl-C cut off or that were not sent any more."""
    short: int
    """Requests that ended well with fewer tokens than were asked for."""
    duration: float
    input_tokens: int
    output_tokens: int
    request_rate: float
    input_rate: float
    output_rate: float
    tokens_per_chunk: float | None
    lateness: Distribution | None
    """Seconds between the planned and the real sending; None when all were to be sent at once."""
    latencies: dict[str, Distribution | None]
    """By metric; None when no request has it."""
    good: int | None
    """Requests within the limits; None without limits."""
    goodput: float | None
    """Good requests per second."""

    def record(self) -> dict[str, Any]:
        """For the JSON file, with units in the names."""
        return {
            "ok": self.ok,
            "failed": self.failed,
            "errors": self.errors,
            "unfinished": self.unfinished,
            "short": self.short,
            "duration_s": round(self.duration, 6),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "requests_per_s": self.request_rate,
            "input_tokens_per_s": self.input_rate,
            "output_tokens_per_s": self.output_rate,
            "tokens_per_chunk": self.tokens_per_chunk,
            "lateness_ms": _distribution_record(self.lateness),
            **{f"{name}_ms": _distribution_record(found) for name, found in self.latencies.items()},
            "good": self.good,
            "goodput_requests_per_s": self.goodput,
        }


def distribution(values: Iterable[float], percentiles: Sequence[float]) -> Distribution | None:
    """Mean and percentiles by linear interpolation between the closest ranks; None of nothing."""
    array = np.fromiter(values, dtype=np.float64)
    if not len(array):
        return None
    found = np.percentile(array, percentiles, method="linear")
    return Distribution(len(array), float(array.mean()), dict(zip(percentiles, found.tolist(), strict=True)))


def summarize(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    planned: int,
    limits: Mapping[str, float],
    percentiles: Sequence[float],
) -> Summary:
    """Sum up a run of `duration` seconds in which `planned` requests were to be sent."""
    ok = [outcome for outcome in outcomes if outcome.ok]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    input_tokens = sum(outcome.input_tokens for outcome in ok)
    output_tokens = sum(outcome.output_tokens for outcome in ok)
    chunks = sum(outcome.num_chunks for outcome in ok)
    good = sum(outcome.within(limits) for outcome in ok) if limits else None
    timed = any(outcome.arrival > 0 for outcome in outcomes)
    per_second = 1 / duration if duration > 0 else 0.0
    return Summary(
        ok=len(ok),
        failed=sum(errors.values()),
        errors=dict(errors.most_common()),
        unfinished=planned - len(outcomes),
        short=sum(outcome.output_tokens < outcome.asked_tokens for outcome in ok),
        duration=duration,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        request_rate=len(ok) * per_second,
        input_rate=input_tokens * per_second,
        output_rate=output_tokens * per_second,
        tokens_per_chunk=output_tokens / chunks if chunks else None,
        lateness=distribution((o.started - o.arrival for o in outcomes), percentiles) if timed else None,
        latencies={
            "ttft": distribution((o.ttft for o in ok if o.ttft is not None), percentiles),
            "tpot": distribution((o.tpot for o in ok if o.tpot is not None), percentiles),
            "itl": distribution((gap for o in ok for gap in o.chunk_gaps), percentiles),
            "e2el": distribution((o.e2el for o in ok), percentiles),
        },
        good=good,
        goodput=None if good is None else good * per_second,
    )


def throughput_over_time(outcomes: Iterable[Outcome], bin_seconds: float) -> list[float]:
    """Output tokens per second in each bin from the start of the run on. A request's tokens are spread evenly
    over its chunks, each counted when it came."""
    times: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for outcome in outcomes:
        if outcome.ttft is None:
            continue
        first = outcome.started + outcome.ttft
        times.append(first + np.concatenate([[0.0], np.cumsum(outcome.chunk_gaps)]))
        tokens = outcome.output_tokens / outcome.num_chunks
        weights.append(np.full(outcome.num_chunks, tokens))
    if not times:
        return []
    bins = (np.concatenate(times) / bin_seconds).astype(np.int64)
    return [float(tokens) / bin_seconds for tokens in np.bincount(bins, np.concatenate(weights))]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _distribution_record(found: Distribution | None) -> dict[str, Any] | None:
    if found is None:
        return None
    named = {f"p{percentile:g}": _ms(value) for percentile, value in found.percentiles.items()}
    return {"count": found.count, "mean": _ms(found.mean), **named}
