"""The Plan: which rank of which replica holds what. Data, the same for who makes it, who runs it and who mends it.

    Plan ─▶ replicas ─▶ stages (layers first … last - 1) ─▶ ranks, each with its shard of every layer of the stage

A range is (first, last): first … last - 1. What the ranges count, and which are possible, says `parallel.shards`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from holdfast.core.errors import ConfigError

Range = tuple[int, int]
PipelineBatching = Literal["synchronous", "asynchronous", "hybrid"]


class RankShard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank holds of each layer of its stage. `rank`: its number within the replica."""

    rank: int
    query_heads: Range
    kv_heads: Range
    """Those that the query heads read. Several ranks may hold the same one."""
    mlp_shards: Range
    """Of the virtual shards of an MLP's columns."""
    vocab: Range
    """Rows of the embeddings and of the head."""
    experts: tuple[int, ...] = ()
    """Ids, ascending: those this rank holds, of every layer whose experts are not placed otherwise."""
    expert_shards: Range = (0, 0)
    """Of the virtual shards of the columns of each."""


Owners = tuple[tuple[int, ...], ...]
"""Of each expert: the groups of ranks that hold it and take its rows by turns."""


class ExpertPlacement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who holds and computes the experts of one layer; see `parallel.placement`."""

    layer: int
    owners: Owners


class StagePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Consecutive layers and the ranks that share each of them. Together the ranks hold everything once, but for
    KV heads that several read and experts that are placed twice."""

    layers: Range
    ranks: tuple[RankShard, ...]
    placements: tuple[ExpertPlacement, ...] = ()
    """Of layers whose experts are not placed as `ranks` say."""


class ReplicaPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One copy of the model, in the order of its layers."""

    stages: tuple[StagePlan, ...]

    @property
    def num_ranks(self) -> int:
        return sum(len(stage.ranks) for stage in self.stages)


class PlanEstimates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What chose a plan: what the planner expects of it. Seconds; tokens."""

    requests: int
    """At once, in all replicas."""
    ttft: float
    tpot: float
    tokens_per_second: float
    kv_tokens: int
    """Room of one replica's KV cache."""
    memory_used: float
    """Share of the fullest device's memory that all but the KV cache takes."""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is cut."""

    replicas: tuple[ReplicaPlan, ...]
    pipeline_batching: PipelineBatching = "asynchronous"
    microbatches: int = 0
    """Steps in flight in a pipeline; 0: as many as it has stages."""
    shard_weights: bool = False
    """Replicas, all cut alike, hold their weights once between them: each rank 1/n of what its place has."""

    devices: tuple[tuple[int, ...], ...] = ()
    """Of each replica, rank by rank: the number of its device on the machine. (): ranks take devices in order. Of a
    replica that is on another machine: ()."""
    links: tuple[tuple[str, ...], ...] = ()
    """Of each replica, stage by stage: what joins its ranks, by the catalogue's name. Told, not used."""
    estimates: PlanEstimates | None = None
    """Told, not used."""

    @property
    def devices_in_order(self) -> tuple[tuple[int, ...], ...]:
        """What `devices` is when it is not said."""
        counts = [replica.num_ranks for replica in self.replicas]
        return tuple(tuple(range(sum(counts[:index]), sum(counts[: index + 1]))) for index in range(len(counts)))

    @property
    def devices_here(self) -> tuple[tuple[int, ...], ...]:
        """Of each replica, rank by rank; of those on other machines none."""
        return self.devices or self.devices_in_order

    @property
    def here(self) -> list[int]:
        """Numbers of the replicas on this machine."""
        return [number for number, devices in enumerate(self.devices_here) if devices]

    def device_of(self, replica: int, rank: int) -> int:
        """The number of a rank's device on its machine."""
        return self.devices_here[replica][rank]

    def steps_in_flight(self, replica: int) -> int:
        return self.microbatches or len(self.replicas[replica].stages)


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in its replica."""

    replica: ReplicaPlan
    stage: int
    index: int
    """Among the ranks of its stage."""

    @property
    def name(self) -> str:
        """stage.index, as in the names of processes."""
        return f"{self.stage}.{self.index}"

    @property
    def stage_plan(self) -> StagePlan:
        return self.replica.stages[self.stage]

    @property
    def layers(self) -> Range:
        return self.stage_plan.layers

    @property
    def ranks(self) -> tuple[RankShard, ...]:
        """Those of its stage."""
        return self.stage_plan.ranks

    @property
    def shard(self) -> RankShard:
        return self.ranks[self.index]

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.replica.stages) - 1

    @property
    def is_alone(self) -> bool:
        return self.replica.num_ranks == 1

    @property
    def speaks(self) -> bool:
        """Whether it is the one that tells the engine what a step has sampled."""
        return self.is_last and self.index == 0


def places(replica: ReplicaPlan) -> list[Place]:
    """Of every rank, stage by stage."""
    return [
        Place(replica, stage, index) for stage, plan in enumerate(replica.stages) for index in range(len(plan.ranks))
    ]


def read_plan(path: str) -> Plan:
    """A plan from its JSON file; whether it fits a model, `parallel.cuts.check_plan` says. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Plan)
    except OSError as error:
        raise ConfigError(f"--plan {path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:  # ValidationError is one: it names the field
        raise ConfigError(f"--plan {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--plan {path}: is not UTF-8: {error}") from error
