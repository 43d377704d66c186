"""Prometheus metrics, with vLLM's names under the prefix `holdfast:`, in a registry of their own."""

from __future__ import annotations

from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from holdfast.core.lifecycle import CopiesKept, DiskTier
from holdfast.core.wire import EngineStats

CONTENT_TYPE = CONTENT_TYPE_LATEST

Kind = TypeVar("Kind", Gauge, Counter, Histogram)

_TTFT_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_PER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST_SECONDS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)

_CHECKPOINTS = {
    "saved_blocks": ("checkpoint_blocks_saved", "Blocks copied into the checkpoint store"),
    "restored_blocks": ("checkpoint_blocks_restored", "Blocks filled from the checkpoint store"),
    "broken_blocks": ("checkpoint_blocks_broken", "Blocks of the checkpoint store that were not what they should be"),
}
_DISK = {
    "written": ("checkpoint_disk_blocks_written", "Blocks copied from the checkpoint store to disk"),
    "read": ("checkpoint_disk_blocks_read", "Blocks copied back from disk"),
    "broken": ("checkpoint_disk_blocks_broken", "Blocks on disk that were not what was written"),
}
_COPIES = {
    "kept": ("checkpoint_copies_kept", "Blocks of other machines that the first one's checkpoint store took"),
    "given": ("checkpoint_copies_given", "Blocks that it gave to other machines"),
    "broken": ("checkpoint_copies_broken", "Blocks of other machines that were not what they should be"),
}
_RANKS = {
    "steps": ("steps", "Steps of a rank that has others beside it"),
    "step_seconds": ("step_seconds", "Time in these steps, waits included"),
    "waited_seconds": ("waited_seconds", "Of it: waiting for the ranks of the same stage"),
    "idle_seconds": ("idle_seconds", "Of it: waiting for the stage before, or for room in the next"),
    "exchanges": ("exchanges", "Collectives, and messages between stages"),
    "bytes_read": ("exchanged_bytes", "Bytes of other ranks' numbers that were read"),
    "expert_rows": ("expert_rows", "Rows that went through experts of the rank, once for each"),
}
"""By the fields of `core.wire.RankStats`."""


class Metrics:
    """All metrics of one gateway, labelled with the model's name."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self.num_running = self._new(Gauge, "num_requests_running", "Requests the engine runs")
        self.num_waiting = self._new(Gauge, "num_requests_waiting", "Requests that wait for the engine")
        self.kv_cache_usage = self._new(Gauge, "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1")
        self.prefix_queries = self._new(
            Counter, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache"
        )
        self.prefix_hits = self._new(Counter, "prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.preemptions = self._new(Counter, "num_preemptions", "Requests preempted for want of KV blocks")
        self.prompt_tokens = self._new(Counter, "prompt_tokens", "Prompt tokens of requests that started to answer")
        self.generation_tokens = self._new(Counter, "generation_tokens", "Tokens generated")
        self._success = Counter(
            "holdfast:request_success",
            "Requests ended, by reason",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "Time to first token", _TTFT_SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Time between tokens", _PER_TOKEN_SECONDS)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first", _PER_TOKEN_SECONDS
        )
        self.latency = self._histogram("e2e_request_latency_seconds", "Time from arrival to end", _REQUEST_SECONDS)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens per request", _TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", "Output tokens per request", _TOKENS)
        self._ranks = {
            field: Counter(f"holdfast:rank_{name}", text, ("model_name", "rank"), registry=self._registry)
            for field, (name, text) in _RANKS.items()
        }
        self.retries = self._new(Counter, "retries", "Requests computed anew, since their logits were not finite")
        self._checkpoints = {field: self._new(Counter, *described) for field, described in _CHECKPOINTS.items()}
        self.disk_blocks = self._new(Gauge, "checkpoint_disk_blocks", "Blocks of the checkpoint store on disk")
        self._disk = {field: self._new(Counter, *described) for field, described in _DISK.items()}
        self._last_disk: DiskTier | None = None
        self._copies = {field: self._new(Counter, *described) for field, described in _COPIES.items()}
        self._last_copies: CopiesKept | None = None
        self._losses = Counter(
            "holdfast:replica_losses",
            "Replicas lost, by what happened and what their requests did",
            ("model_name", "kind", "rung"),
            registry=self._registry,
        )
        self.recovery = self._histogram(
            "recovery_seconds", "From the loss of a replica to the next token of each request it had", _TTFT_SECONDS
        )
        self.machines = self._new(Gauge, "machines", "Other machines that have joined and are there")
        self._last_stats: dict[int, EngineStats] = {}
        """Of replicas that serve."""
        self._counted: dict[int, tuple[int, EngineStats]] = {}
        """Of each replica: the epoch of its engine, and up to where its counters were taken over. An engine whose
        machine was lost may come back and count on."""

    def request_ended(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()

    def engine_stats(self, replica: int, epoch: int, stats: EngineStats) -> None:
        """Take over an engine's gauges, and what its counters grew since its last message."""
        counted = self._counted.get(replica)
        last = counted[1] if counted is not None and counted[0] == epoch else None
        self._last_stats[replica], self._counted[replica] = stats, (epoch, stats)
        self._set_gauges()
        self.prefix_queries.inc(_grown(last, stats, "prefix_queries"))
        self.prefix_hits.inc(_grown(last, stats, "prefix_hits"))
        self.preemptions.inc(_grown(last, stats, "preemptions"))
        self.retries.inc(_grown(last, stats, "retries"))
        for field, counter in self._checkpoints.items():
            counter.inc(_grown(last, stats, field))
        before = {rank.rank: rank for rank in last.ranks} if last else {}
        for rank in stats.ranks:
            for field, counter in self._ranks.items():
                counter.labels(self._model_name, rank.rank).inc(_grown(before.get(rank.rank), rank, field))

    def disk_tier(self, state: DiskTier) -> None:
        """Take over its gauge, and what its counters grew; those of a new process begin at 0."""
        last, self._last_disk = self._last_disk, state
        self.disk_blocks.set(state.blocks)
        for field, counter in self._disk.items():
            counter.inc(_grown(last, state, field))

    def copies(self, state: CopiesKept) -> None:
        """The same, of blocks of other machines."""
        last, self._last_copies = self._last_copies, state
        for field, counter in self._copies.items():
            counter.inc(_grown(last, state, field))

    def restoring(self) -> set[int]:
        """Replicas that have taken blocks from the checkpoint store."""
        return {replica for replica, stats in self._last_stats.items() if stats.restored_blocks}

    def replica_lost(self, kind: str, rung: str) -> None:
        self._losses.labels(self._model_name, kind, rung).inc()

    def engine_lost(self, replica: int) -> None:
        """It holds nothing any more."""
        self._last_stats.pop(replica, None)
        self._set_gauges()

    def exposition(self) -> bytes:
        """The text that GET /metrics answers with."""
        return generate_latest(self._registry)

    def _set_gauges(self) -> None:
        now = self._last_stats.values()
        self.num_running.set(sum(each.num_running for each in now))
        self.num_waiting.set(sum(each.num_waiting for each in now))
        blocks = sum(each.num_blocks for each in now)
        self.kv_cache_usage.set(sum(each.num_used_blocks for each in now) / blocks if blocks else 0.0)

    def _new(self, kind: type[Kind], name: str, text: str, **options: Any) -> Kind:
        metric = kind(f"holdfast:{name}", text, ("model_name",), registry=self._registry, **options)
        return metric.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._new(Histogram, name, text, buckets=buckets)


def _grown(last: object, now: object, field: str) -> float:
    """By how much a counter has, which begins at 0 when whoever counts is another one."""
    before, here = getattr(last, field, 0), getattr(now, field)
    return float(here - before if here >= before else here)
