"""The scheduler against a device that checks every claim it makes about the cache.

`Device` plays the worker by the wire contract alone: it keeps what steps tell it, writes "keys" that identify the
whole prefix into slots, and refuses to compute a token unless every earlier position of that request holds exactly
that request's prefix. A wrong block, a stale page, an unmatched diff fails here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.cache.blocks import BlockPool
from holdfast.core.config import SchedulerConfig
from holdfast.core.errors import ConfigError
from holdfast.core.request import SamplingParams
from holdfast.core.wire import NO_NUMBERS, NewRequest, SampledToken, Step, StepResult, Submit, TokenOutput
from holdfast.schedule.budget import RECOVERY_STEPS
from holdfast.schedule.fit import fit_model_len
from holdfast.schedule.scheduler import Scheduler

EOS = 3


def next_token(token_ids: list[int]) -> int:
    """The "model": a pure function of everything so far, over a vocabulary of 11."""
    return hash(tuple(token_ids)) % 11


@dataclass
class Device:
    block_size: int
    max_tokens: int
    held: dict[str, NewRequest] = field(default_factory=dict)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    memory: int = 1000
    """Tokens that a step can have before it runs out of it."""
    bad_steps: frozenset[int] = frozenset()
    """Steps that fail for another reason."""

    def run(self, step: Step) -> StepResult:
        for request_id in step.dropped:
            self.held.pop(request_id, None)
        for new in step.new:
            assert new.request_id not in self.held
            self.held[new.request_id] = new
        for continued in step.continued:
            if state := self.held.get(continued.request_id):
                first, new = continued.first_new, continued.new_token_ids
                assert state.token_ids[first : first + len(new)] == new[: len(state.token_ids) - first], "it said so"
                state.token_ids[first : first + len(new)] = new
                state.block_ids.extend(continued.new_block_ids)
        named = [(r.request_id, r.num_computed) for r in [*step.new, *step.continued]]
        assert len(set(named)) == len(named) == len(step.num_tokens)
        assert 0 < sum(step.num_tokens) <= self.max_tokens
        if sum(step.num_tokens) > self.memory or step.step_id in self.bad_steps:
            for request_id, _ in named:
                self.held.pop(request_id, None)
            raise MemoryError if step.step_id not in self.bad_steps else ValueError
        sampled = []
        for (request_id, start), count in zip(named, step.num_tokens, strict=True):
            if request_id not in self.held:
                continue
            state = self.held[request_id]
            assert count > 0
            for position in range(start, start + count):
                self._compute(state, position)
            if start + count == len(state.token_ids):
                state.token_ids.append(next_token(state.token_ids))
                sampled.append(SampledToken(request_id, state.token_ids[-1]))
        return StepResult(step.step_id, sampled, [])

    def _compute(self, state: NewRequest, position: int) -> None:
        for earlier in range(position):
            block = state.block_ids[earlier // self.block_size]
            written = self.slots.get((block, earlier % self.block_size))
            assert written == hash(tuple(state.token_ids[: earlier + 1])), "the cache holds another prefix"
        block = state.block_ids[position // self.block_size]
        self.slots[block, position % self.block_size] = hash(tuple(state.token_ids[: position + 1]))


def make(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_model_len: int = 40,
    prefix_caching: bool = True,
    **config: int,
) -> Scheduler:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "priority_aging_steps": 8} | config
    return Scheduler(
        SchedulerConfig(**settings),
        BlockPool(num_blocks, block_size),
        max_model_len=max_model_len,
        eos_token_ids=frozenset({EOS}),
        prefix_caching=prefix_caching,
    )


def submit(name: str, prompt: list[int], priority: int = 0, **params: object) -> Submit:
    params = {"seed": 0, "max_tokens": 6} | params
    return Submit(name, prompt, SamplingParams(**params), priority)


def alone(request: Submit, max_model_len: int) -> tuple[list[int], str]:
    """What the request must produce, whatever company it has."""
    tokens, params = list(request.prompt_token_ids), request.params
    output: list[int] = []
    while True:
        token = next_token(tokens)
        tokens.append(token)
        output.append(token)
        ends = (token == EOS and not params.ignore_eos) or token in params.stop_token_ids
        if ends and len(output) >= params.min_tokens:
            return output, "stop"
        if len(output) >= params.max_tokens or len(tokens) >= max_model_len:
            return output, "length"


def run(scheduler: Scheduler, device: Device, step: Step) -> Callable[[], list[TokenOutput]]:
    """Run a step now; the scheduler hears of it when what is returned is called."""
    try:
        return partial(scheduler.update, device.run(step))
    except MemoryError:
        return partial(scheduler.shrink, step.step_id, "no memory")
    except ValueError:
        return partial(scheduler.fail, step.step_id, "boom")


def drive(scheduler: Scheduler, device: Device, depth: int = 1, limit: int = 2000) -> dict[str, list[TokenOutput]]:
    """Until everything has ended, with up to `depth` steps in flight."""
    outputs: dict[str, list[TokenOutput]] = {}
    in_flight: deque[Callable[[], list[TokenOutput]]] = deque()
    while scheduler.has_work:
        while len(in_flight) < depth and (step := scheduler.schedule()):
            in_flight.append(run(scheduler, device, step))
        assert in_flight, "work that is never scheduled"
        for output in in_flight.popleft()():
            outputs.setdefault(output.request_id, []).append(output)
        scheduler.check_integrity()
        limit -= 1
        assert limit, "no progress"
    return outputs


def check(requests: list[Submit], outputs: dict[str, list[TokenOutput]], max_model_len: int) -> None:
    for request in requests:
        expected, finish = alone(request, max_model_len)
        got = outputs[request.request_id]
        assert [token for output in got for token in output.token_ids] == expected
        assert [output.start for output in got] == list(range(len(expected)))
        assert [output.finish for output in got] == [None] * (len(got) - 1) + [finish]


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.tuples(prompts, st.integers(-2, 2), st.integers(1, 20), st.booleans()), max_size=12),
    num_blocks=st.integers(10, 40),
    block_size=st.sampled_from([1, 3, 4]),
    budget=st.integers(3, 40),
    caching=st.booleans(),
    depth=st.integers(1, 3),
    memory=st.sampled_from([1, 2, 5, 1000]),
)
def test_company_chunking_sharing_and_preemption_change_no_token(  # noqa: PLR0917 - a dimension each
    prompts, num_blocks, block_size, budget, caching, depth, memory
):
    max_model_len = min(40, num_blocks * block_size)
    scheduler = make(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        prefix_caching=caching,
        max_num_seqs=3,
        max_num_batched_tokens=budget,
    )
    requests = [
        submit(f"r{i}", prompt[: max_model_len - 1], priority, max_tokens=max_tokens, ignore_eos=ignore_eos)
        for i, (prompt, priority, max_tokens, ignore_eos) in enumerate(prompts)
    ]
    for request in requests:
        scheduler.add(request)
    outputs = drive(scheduler, Device(block_size, budget, memory=memory), depth)
    check(requests, outputs, max_model_len)
    assert scheduler.pool.num_available == num_blocks
    assert scheduler.stats().num_used_blocks == 0


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    arrivals=st.lists(st.tuples(prompts, st.integers(0, 15)), min_size=1, max_size=10),
    depth=st.integers(1, 3),
)
def test_arrivals_and_aborts_between_steps(data, arrivals, depth):
    scheduler, device = make(num_blocks=12), Device(4, 8)
    requests = [(submit(f"r{i}", prompt, max_tokens=9), when) for i, (prompt, when) in enumerate(arrivals)]
    doomed = data.draw(st.sets(st.sampled_from([request.request_id for request, _ in requests])))
    outputs: dict[str, list[TokenOutput]] = {}
    in_flight: deque[Callable[[], list[TokenOutput]]] = deque()
    for tick in range(400):
        for request, when in requests:
            if when == tick:
                scheduler.add(request)
        if tick in (2, 9, 17):
            scheduler.abort([name for name in doomed if data.draw(st.booleans())])
        if step := scheduler.schedule():
            in_flight.append(run(scheduler, device, step))
        if in_flight and (len(in_flight) == depth or not step):
            for output in in_flight.popleft()():
                outputs.setdefault(output.request_id, []).append(output)
        scheduler.check_integrity()
        if tick > 20 and not scheduler.has_work:
            break
    assert not scheduler.has_work
    check([request for request, _ in requests if request.request_id not in doomed], outputs, 40)
    for name in doomed:  # aborted or not: never more than it would have said alone
        expected, _ = alone(next(r for r, _ in requests if r.request_id == name), 40)
        got = [token for output in outputs.get(name, []) for token in output.token_ids]
        assert got == expected[: len(got)]


def test_preemption_happens_and_is_counted():
    scheduler = make(num_blocks=10, max_num_batched_tokens=40)
    requests = [submit(f"r{i}", [i, 1, 2, 1], max_tokens=30, ignore_eos=True) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    outputs = drive(scheduler, Device(4, 40))
    check(requests, outputs, 40)
    assert scheduler.stats().preemptions > 0


def test_a_long_prompt_stalls_no_running_request():
    scheduler, device = make(num_blocks=64, max_num_batched_tokens=4), Device(4, 4)
    scheduler.add(submit("short", [1], max_tokens=20, ignore_eos=True))
    scheduler.update(device.run(scheduler.schedule()))
    scheduler.add(submit("long", [2] * 30, max_tokens=1, ignore_eos=True))
    for _ in range(9):  # 29 prompt tokens at 3 a step, beside one token of the running request
        outputs = scheduler.update(device.run(scheduler.schedule()))
        assert "short" in {output.request_id for output in outputs}


def test_smaller_priority_value_runs_first_and_aging_prevents_starvation():
    scheduler, device = make(max_num_seqs=1, priority_aging_steps=4), Device(4, 8)
    scheduler.add(submit("patient", [1, 2], priority=5, max_tokens=1))
    finished = []
    for tick in range(60):
        scheduler.add(submit(f"urgent{tick}", [2, tick % 3], priority=0, max_tokens=1, ignore_eos=True))
        step = scheduler.schedule()
        assert step is not None
        finished += [output.request_id for output in scheduler.update(device.run(step))]
        if "patient" in finished:
            break
    assert finished[0] == "urgent0"
    assert 15 <= len(finished) <= 25, "5 levels of 4 steps each"


def test_prefix_hits_are_counted_and_reported_once():
    scheduler, device = make(num_blocks=32), Device(4, 8)
    prompt = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    scheduler.add(submit("first", prompt, max_tokens=3, ignore_eos=True))
    first = drive(scheduler, device)["first"]
    scheduler.add(submit("second", prompt, max_tokens=3, ignore_eos=True))
    second = drive(scheduler, device)["second"]
    assert [output.num_cached_tokens for output in first] == [0, 0, 0]
    assert [output.num_cached_tokens for output in second] == [8, 0, 0]
    stats = scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (18, 8)


def test_failed_step_ends_its_requests_and_no_others():
    scheduler, device = make(max_num_seqs=1), Device(4, 8)
    requests = [submit("a", [1, 2], ignore_eos=True), submit("b", [2, 1], ignore_eos=True)]
    for request in requests:
        scheduler.add(request)
    step = scheduler.schedule()
    assert [request.request_id for request in step.new] == ["a"]
    failed = scheduler.fail(1, "step 1 failed on rank 0.0.0: boom")
    assert [(o.request_id, o.start, o.finish, o.error) for o in failed] == [
        ("a", 0, "error", "step 1 failed on rank 0.0.0: boom")
    ]
    scheduler.check_integrity()
    check(requests[1:], drive(scheduler, device), 40)


def test_a_step_that_fails_with_another_behind_it():
    """What the later step says of the failed requests counts no more; who was not in the failed one goes on."""
    scheduler, device = make(max_num_batched_tokens=8), Device(4, 8, bad_steps=frozenset({3}))
    requests = [submit("a", [1, 2], ignore_eos=True), submit("b", [2] * 9, ignore_eos=True)]
    scheduler.add(requests[0])
    first = run(scheduler, device, scheduler.schedule())
    second = run(scheduler, device, scheduler.schedule())
    third = run(scheduler, device, scheduler.schedule())
    scheduler.add(requests[1])
    fourth = run(scheduler, device, scheduler.schedule())
    told = [output for done in (first, second, third, fourth) for output in done()]
    assert [(o.request_id, o.start, o.finish) for o in told] == [("a", 0, None), ("a", 1, None), ("a", 2, "error")]
    scheduler.check_integrity()
    check(requests[1:], drive(scheduler, device, depth=2), 40)


def test_a_step_of_one_token_that_does_not_fit_ends_its_request():
    scheduler, device = make(), Device(4, 8, memory=0)
    scheduler.add(submit("a", [1, 2, 3]))
    outputs = drive(scheduler, device)["a"]
    assert [(output.finish, output.error) for output in outputs] == [("error", "no memory")]
    assert scheduler.pool.num_available == scheduler.pool.num_blocks


def test_steps_grow_again_when_memory_is_back():
    scheduler, device = make(num_blocks=500, max_model_len=300, max_num_seqs=8), Device(4, 8, memory=2)
    for i in range(8):
        scheduler.add(submit(f"r{i}", [i], max_tokens=290, ignore_eos=True))
    sizes = []
    for _ in range(2 * RECOVERY_STEPS + 10):
        step = scheduler.schedule()
        run(scheduler, device, step)()
        sizes.append(sum(step.num_tokens))
        device.memory = 1000 if len(sizes) == 20 else device.memory
    assert sizes[:5] == [8, 4, 2, 2, 2]
    assert max(sizes[2:RECOVERY_STEPS]) == 2
    assert sizes[-1] == 8


def test_min_tokens_and_stop_tokens():
    scheduler, device = make(), Device(4, 8)
    requests = [
        submit("eos", [1, 0], max_tokens=30),
        submit("stop", [1, 0, 2], max_tokens=30, stop_token_ids=(5, 6), ignore_eos=True),
        submit("late", [1, 0, 0], max_tokens=30, stop_token_ids=(0, 1, 2, 4), min_tokens=7),
    ]
    for request in requests:
        scheduler.add(request)
    check(requests, drive(scheduler, device), 40)


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [(None, 32), (32, 32), (7, 7)],
)
def test_model_length_is_what_model_and_cache_allow(wanted, fits):
    assert fit_model_len(wanted, max_positions=100, num_blocks=8, block_size=4) == fits


@pytest.mark.parametrize(
    ("wanted", "said"),
    [(33, "--max-model-len 33: the KV cache holds 32 tokens"), (101, "the model knows 100 positions")],
)
def test_model_length_beyond_either_is_refused(wanted, said):
    with pytest.raises(ConfigError, match=said):
        fit_model_len(wanted, max_positions=100, num_blocks=8, block_size=4)


@pytest.mark.parametrize("depth", [1, 2])
def test_logits_that_are_no_numbers_are_computed_once_more(depth: int):
    """From the first token, nothing cached: the tokens are what they would have been. Twice is an error, of that
    request alone. Blocks that others hold are not cleared."""
    scheduler, device = make(num_blocks=32, max_num_batched_tokens=32), Device(4, 32)
    prompt = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    requests = [submit(name, prompt, max_tokens=12, ignore_eos=True) for name in ("a", "b", "c")]
    seen: dict[str, int] = {}
    bad = {"a": {3}, "c": {2, 4}}

    def spoilt(result: StepResult) -> StepResult:
        sampled = []
        for token in result.sampled:
            count = seen[token.request_id] = seen.get(token.request_id, 0) + 1
            is_bad = count in bad.get(token.request_id, ())
            sampled.append(SampledToken(token.request_id, NO_NUMBERS) if is_bad else token)
        return StepResult(result.step_id, sampled, [])

    scheduler.add(requests[0])
    outputs: dict[str, list[TokenOutput]] = {}
    in_flight: deque[StepResult] = deque()
    cleared: set[int] = set()
    while scheduler.has_work:
        while len(in_flight) < depth and (step := scheduler.schedule()):
            in_flight.append(device.run(step))
        for output in scheduler.update(spoilt(in_flight.popleft())):
            outputs.setdefault(output.request_id, []).append(output)
        _, _, unclean = scheduler.take_news()
        held = {block for sequence in scheduler.running for block in sequence.block_ids}
        assert not held & set(unclean)
        cleared |= set(unclean)
        scheduler.check_integrity()
        if len(outputs.get("a", [])) == 1 and len(seen) == 1:
            scheduler.add(requests[1])
            scheduler.add(requests[2])
    check(requests[:2], {name: outputs[name] for name in ("a", "b")}, 40)
    assert outputs["c"][-1].finish == "error"
    assert "not finite" in outputs["c"][-1].error
    assert scheduler.stats().retries == 2
    assert cleared
