"""How long a step of our own runtime takes on CPUs, from what `holdfast probe` measured of this very machine.

    step = for each stage  Σ layers  (attention's half: what the slowest rank computes + all-reduce)
                                   + (the MLP's half:   what the slowest rank computes + all-reduce)
                           + what passes to the next stage
           on the last one + head, logits of all ranks gathered, the choice of tokens
         + the turn: engine, messages, Python of the workers, with cold caches

The operations are those that the decoder records (models.decoder, models.layers, parallel.shared), each looked up in
the profile by `measured`. In a pipeline the requests are dealt to as many steps as are in flight: until each has had
its turn it takes as long as one step takes through all stages, or as the slowest stage takes for all steps, or, where
there are fewer cores than ranks, as all the work takes on the cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from holdfast.core.errors import ConfigError
from holdfast.core.plan import Place, Plan, ReplicaPlan, places
from holdfast.core.spec import DecoderSpec
from holdfast.hardware.profile import Profile
from holdfast.models.parameters import Packing, Parameter, packings_at, parameters
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.segment import StageTrees
from holdfast.planner.measured import Measured, Request, turn_seconds, turns_of
from holdfast.planner.memory.runtime_format import RuntimeFormat, format_of
from holdfast.planner.memory.runtime_memory import packed_shape


@dataclass(frozen=True, slots=True)
class RuntimeStep:
    """Seconds by part, on the ranks that the others wait for."""

    products: float = 0.0
    attention: float = 0.0
    rows: float = 0.0
    """Norms, keys and values stored, experts routed, tokens chosen."""
    exchanges: float = 0.0
    turn: float = 0.0
    """Engine, messages, Python of the workers."""
    waiting: float = 0.0
    """Of a request in a pipeline for its next turn, while the stages are at other requests."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, part) for part in PARTS))

    def __add__(self, other: RuntimeStep) -> RuntimeStep:
        return RuntimeStep(*(getattr(self, part) + getattr(other, part) for part in PARTS))


COLD_CONTEXT = 64
"""Tokens that the decodes of the cold model see, about."""
PARTS = tuple(part.name for part in fields(RuntimeStep))


def runtime_step(
    profile: Profile, spec: DecoderSpec, plan: Plan, how: RuntimeFormat, requests: Sequence[Request]
) -> RuntimeStep:
    """Of the first replica of `plan`: until each of `requests` has had its tokens computed and got one more.

    Raises `ConfigError` for a profile that lacks what is asked for, for a step of no requests, and for dtypes that
    are not measured.
    """
    if not requests:
        raise ConfigError("a step of no requests takes no time: there must be 1 at least")
    if len(plan.replicas) > 1:
        raise ConfigError(f"a plan of {len(plan.replicas)} replicas: how they share a machine was not measured")
    if how.itemsize != 2 or how.activation_bits != 16:
        raise ConfigError("steps are predicted in bfloat16 and with 16-bit activations only: no other is probed")
    replica = plan.replicas[0]
    computed, waiting = _through_stages(profile, spec, plan, how, requests)
    turn = turn_seconds(profile, replica.num_ranks, len(replica.stages), requests)
    return replace(computed, turn=turn + _cold_seconds(profile, replica), waiting=waiting)


def _through_stages(
    profile: Profile, spec: DecoderSpec, plan: Plan, how: RuntimeFormat, requests: Sequence[Request]
) -> tuple[RuntimeStep, float]:
    """A step through all stages, and how long requests wait in between."""
    replica = plan.replicas[0]
    steps = min(plan.steps_in_flight(0), len(requests)) if len(replica.stages) > 1 else 1
    some = requests[: math.ceil(len(requests) / steps)]
    stages, work = [], 0.0
    for index, stage in enumerate(replica.stages):
        busy = replica.num_ranks if steps > 1 else len(stage.ranks)
        threads = max(1, profile.cores // replica.num_ranks)
        measured = Measured(profile, min(busy, profile.cores), threads)
        members = [place for place in places(replica) if place.stage == index]
        stages.append(stage_step(measured, spec, members, how, some))
        work += steps * stages[-1].total * len(members) * threads
    through = sum(stages, RuntimeStep())
    cycle = max(through.total, steps * max(stage.total for stage in stages), work / profile.cores)
    return through, cycle - through.total


def _cold_seconds(profile: Profile, replica: ReplicaPlan) -> float:
    """What a turn costs more when the weights have pushed everything else out of the caches: a decode of the
    profile's cold model, less its arithmetic, less the turn of an empty model."""
    spec, stages = profile.cold_model, len(replica.stages)
    turns = [turn for turn in turns_of(profile, replica.num_ranks, stages) if turn.cold]
    if spec is None or not turns:
        return 0.0
    turn, one = turns[0], [Request(1, COLD_CONTEXT)]
    plan = make_plan(spec, tensor=turn.ranks // turn.stages, pipeline=turn.stages)
    computed, waiting = _through_stages(profile, spec, plan, RuntimeFormat(), one)
    empty = turn_seconds(profile, turn.ranks, turn.stages, one)
    return max(turn.seconds - computed.total - waiting - empty, 0.0)


def stage_step(
    measured: Measured, spec: DecoderSpec, members: Sequence[Place], how: RuntimeFormat, requests: Sequence[Request]
) -> RuntimeStep:
    """Of one stage, whose ranks are `members`: they meet after each half of a layer, when the slowest has come."""
    halves = [list(_Rank(measured, spec, place, how, requests).halves()) for place in members]
    return sum((max(each, key=lambda half: half.total) for each in zip(*halves, strict=True)), RuntimeStep())


class _Rank:
    """One rank's operations, as the decoder calls them."""

    def __init__(
        self, measured: Measured, spec: DecoderSpec, place: Place, how: RuntimeFormat, requests: Sequence[Request]
    ) -> None:
        self.measured, self.spec, self.place, self.how, self.requests = measured, spec, place, how, requests
        self.rows = sum(request.new for request in requests)
        self.packs: Mapping[str, Packing] = packings_at(spec, place)
        self.wanted: Mapping[str, Parameter] = parameters(spec)
        self.trees = StageTrees.of(place.replica, place.stage, spec)

    def halves(self) -> Iterator[RuntimeStep]:
        """Between two meetings of the ranks each; the same number on every rank of a stage."""
        hidden = self.spec.hidden_size
        yield self._passed_on() if not self.place.is_first else self._embedding()
        for layer in range(*self.place.layers):
            name = f"layers.{layer}"
            yield self._norm() + self._attention(name, self.spec.layers[layer].window)
            if self.spec.layers[layer].moe:
                yield self._norm() + self._experts(f"{name}.moe")
            else:
                products = self._product(f"{name}.mlp.up", self.rows) + self._product(f"{name}.mlp.down", self.rows)
                pieces = len(self.packs[f"{name}.mlp.down"].pieces or ())
                yield self._norm() + RuntimeStep(products) + self._reduced(hidden * pieces)
        if self.place.is_last:
            yield self._norm() + self._head()

    # --- the ends ---

    def _passed_on(self) -> RuntimeStep:
        """From the stage before; both its ends are measured together."""
        return RuntimeStep(exchanges=self.measured.exchange("send", 2, self.rows * self.spec.hidden_size * 4))

    def _embedding(self) -> RuntimeStep:
        summed = self.spec.hidden_size if len(self.place.ranks) > 1 else 0
        return RuntimeStep(rows=self._on_rows(self.spec.hidden_size)) + self._reduced(summed)

    def _head(self) -> RuntimeStep:
        """Of the last token of each request."""
        samples, vocabulary = len(self.requests), self.spec.vocab_size
        tied = self.spec.tie_embeddings or (self.how.repeated_head and self.place.is_first)
        products = self._product("embed" if tied else "head", samples)
        choice = self.measured.row_work("argmax", samples, vocabulary)
        ranks, gathered = len(self.place.ranks), samples * vocabulary * 4
        exchanges = self.measured.exchange("all_gather", ranks, gathered) if ranks > 1 else 0.0
        return RuntimeStep(products, rows=choice, exchanges=exchanges)

    # --- a layer ---

    def _norm(self) -> RuntimeStep:
        count = 2 if self.spec.block == "sandwich" else 1
        return RuntimeStep(rows=count * self._on_rows(self.spec.hidden_size))

    def _attention(self, name: str, window: int | None) -> RuntimeStep:
        spec, shard = self.spec, self.place.shard
        queries, keys = (last - first for first, last in (shard.query_heads, shard.kv_heads))
        products = self._product(f"{name}.attn.qkv", self.rows) + self._product(f"{name}.attn.o", self.rows)
        seen = [
            request if window is None else replace(request, context=min(request.context, window + request.new))
            for request in self.requests
        ]
        attention = self.measured.attention(seen, queries, keys, spec.head_dim)
        stored = self.measured.row_work("store_kv", self.rows, (queries + 2 * keys) * spec.head_dim)
        pieces = len(self.packs[f"{name}.attn.o"].pieces or ())
        return RuntimeStep(products, attention, stored) + self._reduced(spec.hidden_size * pieces)

    def _experts(self, name: str) -> RuntimeStep:
        """Tokens that choose K of E experts evenly touch E·(1 - (1 - K/E)^rows) of them (coupon collector); a rank
        has its part of these. Each is a product of its own, of as many rows as come to it."""
        moe = self.spec.moe
        assert moe is not None, "a layer with experts needs DecoderSpec.moe"
        chosen, hidden = moe.experts_per_token, self.spec.hidden_size
        touched = moe.num_experts * (1 - (1 - chosen / moe.num_experts) ** self.rows)
        rows_each = self.rows * chosen / touched
        held = [pack for pack in self.packs if pack.startswith(f"{name}.experts.") and pack.endswith(".up")]
        products = self._product(f"{name}.router", self.rows)
        if held:
            mine = touched * len(held) / moe.num_experts
            products += self._product(held[0], rows_each, mine)
            products += self._product(held[0].removesuffix("up") + "down", rows_each, mine)
        pairs = self.rows * chosen
        rows = self._on_rows(moe.num_experts) + self.measured.row_work("norm", 0, 0)  # routed, and sorted
        rows += self.measured.row_work("norm", pairs, hidden) + self._on_rows(chosen * hidden)  # gathered, joined
        exchanged = 0
        if len(self.place.ranks) > 1:
            assert self.trees.experts is not None
            rows += self.measured.row_work("norm", pairs, hidden)  # dealt
            exchanged = chosen * hidden * max(len(pieces) for pieces in self.trees.experts.pieces)
        return RuntimeStep(products, rows=rows) + self._reduced(exchanged)

    def _product(self, name: str, rows: float, times: float = 1.0) -> float:
        """Of all pieces of a packed matrix, or of `times` matrices like it in one operation."""
        packing = self.packs[name]
        outputs, inputs = packed_shape(packing, self.wanted)
        format = format_of(packing, self.how)
        if format == "dense":
            format = "bfloat16"
        if packing.pieces is None:
            return self.measured.product(format, rows, inputs, times * outputs, len(packing.shards))
        borders, seconds = (0, *(packing.shards or (inputs,))), 0.0
        for first, last in packing.pieces:
            columns = borders[last] - borders[first]
            seconds += self.measured.product(format, rows, columns, times * outputs, last - first)
        return seconds

    def _on_rows(self, width: int) -> float:
        return self.measured.row_work("norm", self.rows, width)

    def _reduced(self, width: int) -> RuntimeStep:
        """The sums of rows of so many numbers, of all ranks; nothing for a rank that is alone in its stage."""
        if not width or len(self.place.ranks) == 1:
            return RuntimeStep()
        return RuntimeStep(
            exchanges=self.measured.exchange("all_reduce", len(self.place.ranks), self.rows * width * 4)
        )
