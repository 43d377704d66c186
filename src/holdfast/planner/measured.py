"""What a profile says of one rank's work: measured points, and lines between them.

Everything here is interpolation. Nothing is fitted: between two points a straight line, beyond the last the line
through the last two. What a point stands for follows the kernels: a product by the numbers of its matrix and by its
rows; attention by its units, each 16 tokens of up to 4 query heads over tiles of 64 keys (csrc/attention.inc); work
on rows by the rows that a thread has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from holdfast.core.errors import ConfigError
from holdfast.hardware.profile import Attention, Exchanged, Profile, RowOperation, Turn

KEY_TILE, TILE_TOKENS, TILE_HEADS = 64, 16, 4
"""Keys of a tile, tokens and query heads of a unit (csrc/attention.inc)."""

Points = Sequence[tuple[float, float]]
"""(x, y), x ascending."""


def on_line(points: Points, x: float) -> float:
    """y at x, on straight lines between neighbouring points and beyond the first and the last two; never below 0. Of
    a single point: its y."""
    if len(points) == 1:
        return points[0][1]
    after = next((index for index, (there, _) in enumerate(points) if there >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(after, 1) - 1], points[max(after, 1)]
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), 0.0)


@dataclass(frozen=True, slots=True)
class Request:
    """A request's part of a step: `new` tokens are computed, the last of which sees `context` tokens."""

    new: int
    context: int


@dataclass(frozen=True)
class Measured:
    """Of a rank with `threads` threads while `ranks` ranks work at once."""

    profile: Profile
    ranks: int
    threads: int

    # --- products ---

    def product(self, format: str, rows: float, inputs: int, outputs: float, shards: int = 1) -> float:
        """Seconds of rows × inputs times a matrix [outputs, inputs] from memory. Raises `ConfigError` where the
        profile has no such format."""
        curves = self._products.get((format, shards > 1)) or self._products.get((format, False))
        if not curves:
            raise self._lacks(f"products of {format}")
        size = inputs * outputs
        return on_line([(measured, on_line(points, size)) for measured, points in curves.items()], rows)

    @cached_property
    def _products(self) -> Mapping[tuple[str, bool], Mapping[float, Points]]:
        """By format and whether there are shards, by rows: (numbers of the matrix, seconds). The small matrix, which
        shows what a product costs at least, is in both."""
        found: dict[tuple[str, bool], dict[float, list[tuple[float, float]]]] = {}
        for point in self.profile.products:
            if (point.ranks, point.threads) != (self.ranks, self.threads):
                continue
            for sharded in (False, True) if point.cached else (point.shards > 1,):
                curves = found.setdefault((point.format, sharded), defaultdict(list))
                curves[point.rows].append((point.inputs * point.outputs, point.seconds))
        return {
            kind: {rows: sorted(curves[rows]) for rows in sorted(curves)}
            for kind, curves in found.items()
            if any(len(points) > 1 for points in curves.values())
        }

    # --- attention ---

    def attention(self, requests: Sequence[Request], num_heads: int, num_kv_heads: int, head_dim: int) -> float:
        """Seconds of one layer's attention."""
        heads = num_heads / num_kv_heads
        chunks = math.ceil(heads / TILE_HEADS)
        seconds, units = 0.0, 0
        for request in requests:
            if request.new == 1:
                items, each = 1, self._decode_unit(request.context, heads / chunks)
            else:
                items = math.ceil(request.new / TILE_TOKENS)
                each = self._prompt_units(request, heads / chunks) / items
            units += items * chunks * num_kv_heads
            seconds += items * chunks * num_kv_heads * each * head_dim / self._head_dim
        crowd = math.ceil(units / self.threads) * self.threads / units  # of the thread that has most
        return self.row_work("norm", 0, 0) + seconds * crowd / self.threads

    @cached_property
    def _attentions(self) -> Mapping[float, Sequence[Attention]]:
        """By query heads of a KV head, those of a unit."""
        found = defaultdict(list)
        for point in self.profile.attentions:
            if (point.ranks, point.threads) == (self.ranks, self.threads):
                found[point.num_heads / point.num_kv_heads].append(point)
        if not found:
            raise self._lacks("attention")
        return dict(sorted(found.items()))

    @cached_property
    def _head_dim(self) -> int:
        return next(iter(self._attentions.values()))[0].head_dim

    def _decode_unit(self, context: int, heads: float) -> float:
        """Seconds that a thread spends on the keys of one KV head."""
        curves = []
        for measured, points in self._attentions.items():
            decodes = [point for point in points if point.queries == 1]
            most = max(point.requests for point in decodes)
            curve = sorted(
                (point.context, point.seconds * self.threads / (most * point.num_kv_heads))
                for point in decodes
                if point.requests == most
            )
            curves.append((measured, on_line(curve, context)))
        return on_line(curves, heads)

    def _prompt_units(self, request: Request, heads: float) -> float:
        """Seconds of a thread on all units of a prompt for one KV head: so much for each, and for each of its
        tiles of keys."""
        units, tiles = _tiles(request.new, request.context)
        curves = []
        for measured, points in self._attentions.items():
            per_unit = sorted(
                (_tiles(point.queries, point.context)[1], point.seconds * self.threads / point.num_kv_heads)
                for point in points
                if point.queries > 1
            )
            queries = next(point.queries for point in points if point.queries > 1)
            scale = units / _tiles(queries, queries)[0]
            curves.append((measured, scale * on_line(per_unit, tiles / scale)))
        return on_line(curves, heads)

    # --- rows ---

    def row_work(self, operation: RowOperation, rows: float, width: int) -> float:
        """Seconds: what an operation costs at least, and for each of the rows that the busiest thread has."""
        points = sorted(
            (point.rows, point.seconds, point.width)
            for point in self.profile.row_works
            if point.operation == operation and (point.ranks, point.threads) == (self.ranks, self.threads)
        )
        if len(points) < 2:
            raise self._lacks("work on rows")
        (few, short, measured), (many, long, _) = points[0], points[-1]
        turns = [math.ceil(count / self.threads) for count in (few, many)]
        each = max((long - short) / (turns[1] - turns[0]), 0.0)
        return max(short - each * turns[0], 0.0) + math.ceil(rows / self.threads) * each * width / measured

    # --- exchanges ---

    def exchange(self, operation: Exchanged, ranks: int, num_bytes: float) -> float:
        """Seconds, among the `ranks` of a stage; of "send": to the next stage, between 2."""
        points = sorted(
            (point.num_bytes, point.seconds)
            for point in self.profile.exchanges
            if point.operation == operation and point.ranks == ranks
        )
        if not points:
            raise ConfigError(f"the profile has no {operation} of {ranks} ranks: `holdfast probe` measures it")
        return on_line(points, num_bytes)

    def _lacks(self, what: str) -> ConfigError:
        each = f"{self.threads} {'threads' if self.threads > 1 else 'thread'}"
        return ConfigError(
            f"the profile has no {what} of {self.ranks} ranks with {each} each: `holdfast probe` measures them"
        )


def _tiles(new: int, context: int) -> tuple[float, float]:
    """Units of a prompt, and the tiles of keys that they walk, for one KV head."""
    ends = [context - new + min(first + TILE_TOKENS, new) for first in range(0, new, TILE_TOKENS)]
    return new / TILE_TOKENS, sum(math.ceil(end / KEY_TILE) for end in ends)


def turn_seconds(profile: Profile, num_ranks: int, stages: int, requests: Sequence[Request]) -> float:
    """What a step of these requests costs beside its arithmetic in a replica of so many ranks, with all its code and
    data in the caches. Raises `ConfigError` for a profile without any."""
    turns = [turn for turn in turns_of(profile, num_ranks, stages) if not turn.cold]
    if not turns:
        raise ConfigError("the profile has no steps: `holdfast probe` measures them")
    decodes = sorted((turn.requests, turn.seconds) for turn in turns if turn.tokens == 1)
    prompts = sorted((turn.tokens, turn.seconds) for turn in turns if turn.requests == 1)
    decoding = sum(request.new == 1 for request in requests)
    new = sum(request.new for request in requests if request.new > 1)
    if not decoding:
        return on_line(prompts, new)
    return on_line(decodes, decoding) + (on_line(prompts, new) - on_line(prompts, 1) if new else 0.0)


def turns_of(profile: Profile, num_ranks: int, stages: int) -> Sequence[Turn]:
    """Of a replica cut so. Where none of as many ranks was measured (they are more than there are cores), of as many
    stages, or what there is."""
    turns = [turn for turn in profile.turns if turn.stages == stages and turn.ranks == num_ranks]
    return turns or [turn for turn in profile.turns if turn.stages == stages] or profile.turns
