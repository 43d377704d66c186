"""Who runs in the next step. Pure: state in, `Step` out; no clock, no sockets, no tensors.

    add / abort ──▶ waiting (by rank) ──admit──▶ running ──update──▶ finished
                        ▲───────preempt─────────────┘

A request's rank is `arrival + priority · priority_aging_steps`, in steps: it is fixed for life, smaller goes first.
Everybody ages alike, so an old request of low priority has a smaller rank than any newcomer in the end: nothing
starves. Preemption takes the largest rank, so the smallest always makes progress.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nsmallest

from holdfast.cache.blocks import ROOT, BlockPool
from holdfast.core.config import SchedulerConfig
from holdfast.core.request import TokenLogprobs
from holdfast.core.wire import (
    NO_NUMBERS,
    ContinuedRequest,
    EngineStats,
    NewRequest,
    Step,
    StepResult,
    Submit,
    TokenOutput,
)
from holdfast.schedule.batching import AllAtOnce, Batching
from holdfast.schedule.budget import StepBudget
from holdfast.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Part:
    """What a step in flight does for a sequence, in one of its lives."""

    sequence: Sequence
    life: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class _InFlight:
    step_id: int
    lane: int
    parts: list[_Part]


class Scheduler:
    """The queue and the cache of one replica.

    Steps come out of `schedule` and are done, in that order, with `update`, `shrink` or `fail`. Several may be in
    flight: a later one computes tokens that the earlier ones are still to sample, for requests that will need them
    whatever those are. If one of them then ends its request, what the later step computed for it is void. Workers run
    steps in order, so blocks can be given to another request while a step that writes to them is in flight.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        prefix_caching: bool = True,
        batching: Batching | None = None,
    ) -> None:
        assert max_model_len <= pool.num_blocks * pool.block_size, "one request alone must fit"
        self.config = config
        self.pool = pool
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.prefix_caching = prefix_caching
        self.batching = batching or AllAtOnce(1, config.max_num_seqs)
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []
        """Heap of (rank, order of submission, sequence)."""
        self._sequences: dict[str, tuple[int, Sequence]] = {}
        """Every live request: request id → (order of submission, sequence)."""
        self._forming: dict[Sequence, int] = {}
        """Tokens each sequence computes in the step that is being made."""
        self._in_flight: deque[_InFlight] = deque()
        self._budget = StepBudget(config.max_num_batched_tokens)
        self._published: list[tuple[bytes, bytes]] = []
        self._distrusted, self._unclean = list[bytes](), list[int]()
        self._dropped: list[str] = []
        """Requests the worker still holds but must forget."""
        self._steps = self._submitted = self._preemptions = self._retries = 0
        self._prefix_queries = self._prefix_hits = 0

    # --- requests come and go ---

    def add(self, submit: Submit) -> Sequence:
        """Queue a request. The gateway has validated it: 1 ≤ prompt tokens < max_model_len, id not in use, and tokens
        still to come."""
        assert submit.request_id not in self._sequences, f"request id {submit.request_id} is in use"
        num_prompt, num_output = len(submit.prompt_token_ids), len(submit.output_token_ids)
        assert num_prompt > 0
        assert num_prompt + num_output < self.max_model_len
        assert num_output < submit.params.max_tokens
        rank = self._steps + submit.priority * self.config.priority_aging_steps
        sequence = Sequence(submit, rank, self.pool.block_size)
        self._submitted += 1
        self._sequences[submit.request_id] = (self._submitted, sequence)
        heappush(self._waiting, (rank, self._submitted, sequence))
        return sequence

    def abort(self, request_ids: list[str]) -> None:
        """Forget requests and release their blocks. Unknown ids are ignored."""
        for request_id in request_ids:
            if request_id in self._sequences:
                self._remove(self._sequences[request_id][1])

    def abort_all(self) -> None:
        """Forget every request."""
        self.abort(list(self._sequences))

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Steps."""
        return len(self._in_flight)

    # --- one step ---

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to compute (until a step in flight is done). Running requests
        go before waiting ones; among them those that need one token before those in mid-prompt, so a long prompt
        stalls nobody."""
        tries = 0
        while tries < self.batching.num_lanes:  # a lane may find no room for any of its own
            preemptions = self._preemptions
            self._form()
            if self._forming:
                return self._step()
            tries = tries + 1 if self._preemptions == preemptions else 0
        return None

    def _form(self) -> None:
        """Put into the step what the batching mode picks for it, as far as blocks and budget reach."""
        preemptions = self._preemptions
        budget = self._budget.tokens
        lanes = [step.lane for step in self._in_flight]
        ready, room = self.batching.pick(self.running, len(self._waiting), lanes)
        for sequence in sorted(ready, key=lambda s: (s.num_missing > 1, s.rank)):
            count = 0 if sequence.ends_by_itself(self.max_model_len) else min(sequence.num_missing, budget)
            if count and sequence.block_ids and (freed := self._make_room(sequence, count)) is not None:
                self._forming[sequence] = count
                budget += freed - count
        while self._waiting and budget and room > 0 and self._preemptions == preemptions:
            sequence = self._waiting[0][2]
            count = self._admit(sequence, budget)
            if not count:
                break
            heappop(self._waiting)
            self.batching.let_in(sequence)
            budget -= count
            room -= 1

    def _make_room(self, sequence: Sequence, count: int) -> int | None:
        """Give `sequence` the blocks for `count` more tokens, preempting the largest ranks if need be.

        Returns the step tokens that preempted requests gave back, or None if `sequence` had to go itself.
        """
        freed = 0
        wanted = self.pool.blocks_for(sequence.num_scheduled + count) - len(sequence.block_ids)
        while wanted > self.pool.num_available:
            victim = max(self.running, key=lambda s: (s.rank, self._sequences[s.request_id][0]))
            freed += self._forming.pop(victim, 0)
            self._preempt(victim)
            if victim is sequence:
                return None
        sequence.block_ids += self.pool.allocate(max(wanted, 0))
        return freed

    def _preempt(self, victim: Sequence) -> None:
        self._preemptions += 1
        self.running.remove(victim)
        self._dropped.append(victim.request_id)
        self.pool.release(victim.reset())
        heappush(self._waiting, (victim.rank, self._sequences[victim.request_id][0], victim))

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Start a waiting sequence if it fits; returns the tokens it computes in this step, 0 if it must wait.

        It is let in only if all its tokens fit, and a block more for every running request: else it would soon
        preempt or be preempted.
        """
        if sequence.held_back:
            return 0
        cached = self._cached_prefix(sequence)
        num_cached = len(cached) * self.pool.block_size
        wanted = self.pool.blocks_for(sequence.num_tokens) - len(cached) + self.pool.num_idle(cached)
        if wanted + len(self.running) > self.pool.num_available:  # what is being restored for another takes room, too
            return 0
        count = min(sequence.num_tokens - num_cached, budget)
        self.pool.take(cached)
        new = self.pool.allocate(self.pool.blocks_for(num_cached + count) - len(cached))
        sequence.block_ids = cached + new
        sequence.num_computed = sequence.num_scheduled = num_cached
        if sequence.num_output_tokens == 0 or not sequence.life:
            sequence.num_cached_tokens = num_cached
        if self.prefix_caching:
            self._prefix_queries += sequence.num_tokens
            self._prefix_hits += num_cached
        self.running.append(sequence)
        self._forming[sequence] = count
        return count

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Known blocks that begin the sequence; at least its last token stays to be computed, for its logits."""
        if not self.prefix_caching or sequence.wants_prompt_logprobs:
            return []
        full_blocks = (sequence.num_tokens - 1) // self.pool.block_size
        return self.pool.match(sequence.hashes(full_blocks), sequence.token_ids)

    def _step(self) -> Step:
        self._steps += 1
        forming, self._forming = self._forming, {}
        new: list[tuple[NewRequest, int]] = []
        continued: list[tuple[ContinuedRequest, int]] = []
        parts = []
        for sequence, count in forming.items():
            parts.append(_Part(sequence, sequence.life, count, samples=count == sequence.num_missing))
            news = sequence.take(count)
            if isinstance(news, NewRequest):
                new.append((news, count))
            else:
                continued.append((news, count))
        self._in_flight.append(_InFlight(self._steps, self.batching.lane, parts))
        dropped, self._dropped = self._dropped, []
        counts = [count for _, count in new] + [count for _, count in continued]
        return Step(
            self._steps, [request for request, _ in new], [request for request, _ in continued], counts, dropped
        )

    # --- its result ---

    def update(self, result: StepResult) -> list[TokenOutput]:
        """The oldest step in flight is done; what it added to each request that got a token."""
        parts = self._oldest(result.step_id)
        sampled = {token.request_id: token for token in result.sampled}
        prompt_logprobs = {chunk.request_id: chunk.entries for chunk in result.prompt_logprobs}
        outputs = []
        for part in parts:
            sequence, token = part.sequence, sampled.get(part.sequence.request_id)
            assert (token is not None) == part.samples, "sampled exactly when all tokens are computed"
            sequence.prompt_logprobs += prompt_logprobs.get(sequence.request_id, [])
            if token is not None and token.token_id == NO_NUMBERS:
                outputs += self._distrust(part)
                continue
            self._advance(sequence, part.count)
            if token is not None:
                sequence.num_pending -= 1
                outputs.append(self._append(sequence, token.token_id, token.logprobs))
        self._budget.went_well()
        return outputs

    def shrink(self, step_id: int, error: str) -> list[TokenOutput]:
        """The oldest step in flight did not fit the device's memory: it is tried again in smaller steps, half as
        large for a while. The request of a step that could be no smaller ends with `error`."""
        tokens = sum(part.count for part in self._in_flight[0].parts)
        parts = self._oldest(step_id)
        if tokens <= 1:
            return self._fail(parts, error)
        self._budget.was_too_large(tokens)
        for part in parts:
            part.sequence.rewind()
        return []

    def fail(self, step_id: int, error: str) -> list[TokenOutput]:
        """The oldest step in flight raised: its requests end with this error, the others go on."""
        return self._fail(self._oldest(step_id), error)

    def _distrust(self, part: _Part) -> list[TokenOutput]:
        """Its logits were no numbers: memory may be broken. What is cached of it is forgotten, and it is computed
        once more from its first token; the second time is its end."""
        sequence = part.sequence
        self._distrusted += sequence.hashes(sequence.num_computed // self.pool.block_size)
        blocks = sequence.block_ids
        for block in blocks:
            self.pool.forget(block)
        error = "the model's logits are not finite numbers, computed twice"
        outputs = self._fail([part], error) if sequence.is_retried else []
        if not outputs:
            sequence.is_retried = True
            self._retries += 1
            self._preempt(sequence)
        self._unclean += [block for block in blocks if self.pool.num_idle([block])]
        return outputs

    def _fail(self, parts: list[_Part], error: str) -> list[TokenOutput]:
        outputs = []
        for part in parts:
            outputs.append(
                TokenOutput(
                    part.sequence.request_id, part.sequence.num_output_tokens, [], finish="error", error=error
                )
            )
            self._remove(part.sequence)
        return outputs

    def _oldest(self, step_id: int) -> list[_Part]:
        """What the oldest step in flight has computed that still counts."""
        step = self._in_flight.popleft()
        assert step.step_id == step_id, f"a result of step {step_id}, the oldest in flight is {step.step_id}"
        return [part for part in step.parts if part.life == part.sequence.life]

    def _advance(self, sequence: Sequence, count: int) -> None:
        """`count` tokens more are in the cache; blocks that they completed may be shared."""
        size = self.pool.block_size
        first, last = sequence.num_computed // size, (sequence.num_computed + count) // size
        sequence.num_computed += count
        if self.prefix_caching and last > first:
            hashes = [ROOT, *sequence.hashes(last)]
            for index in range(first, last):
                tokens = sequence.token_ids[index * size : (index + 1) * size]
                if self.pool.publish(sequence.block_ids[index], hashes[index + 1], tokens):
                    self._published.append((hashes[index + 1], hashes[index]))

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        num_cached, sequence.num_cached_tokens = sequence.num_cached_tokens, 0
        prompt_logprobs = sequence.prompt_logprobs if sequence.wants_prompt_logprobs else None
        sequence.token_ids.append(token_id)
        finish = sequence.finish_after(token_id, self.eos_token_ids, self.max_model_len)
        if finish:
            self._remove(sequence)
        return TokenOutput(
            sequence.request_id,
            sequence.num_output_tokens - 1,
            [token_id],
            logprobs=[logprobs] if logprobs else None,
            prompt_logprobs=prompt_logprobs,
            finish=finish,
            stop_token_id=token_id if finish == "stop" else None,
            num_cached_tokens=num_cached,
        )

    def _remove(self, sequence: Sequence) -> None:
        """Forget a live request wherever it is."""
        del self._sequences[sequence.request_id]
        if sequence.resident:
            self._dropped.append(sequence.request_id)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            heapify(self._waiting)
        self.pool.release(sequence.reset())

    # --- looking in ---

    def take_news(self) -> tuple[list[tuple[bytes, bytes]], list[bytes], list[int]]:
        """Since this was last called: hashes of blocks that were published, each with that of the one before; hashes
        of blocks that may be broken; and free blocks to be cleared before the next step, for 0 · NaN is NaN."""
        news = self._published, self._distrusted, self._unclean
        self._published, self._distrusted, self._unclean = [], [], []
        return news

    def upcoming(self, count: int) -> list[Sequence]:
        """Those that will be let in next, at most so many."""
        return [entry[2] for entry in nsmallest(count, self._waiting)] if self._waiting else []

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self._waiting),
            num_blocks=self.pool.num_blocks,
            num_used_blocks=self.pool.num_blocks - self.pool.num_available,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
            retries=self._retries,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, sequences and block accounting agree."""
        waiting = [entry[2] for entry in self._waiting]
        assert {s.request_id for s in self.running + waiting} == set(self._sequences)
        assert len(self.running) + len(waiting) == len(self._sequences)
        assert len(self.running) <= self.config.max_num_seqs
        for sequence in waiting:
            assert not sequence.block_ids
            assert not sequence.num_scheduled
            assert not sequence.num_pending
            assert not sequence.resident
        for sequence in self.running:
            assert sequence.num_computed <= sequence.num_scheduled <= sequence.num_tokens + sequence.num_pending
            assert sequence.num_tokens + sequence.num_pending <= self.max_model_len
            assert len(sequence.block_ids) >= self.pool.blocks_for(sequence.num_scheduled)
        for step in self._in_flight:
            for part in step.parts:
                assert part.life < part.sequence.life or part.sequence in self.running
        self.pool.check_integrity(sequence.block_ids for sequence in self.running)
