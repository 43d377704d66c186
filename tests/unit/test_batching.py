"""How a pipeline's steps share the requests: every request is served whatever the mode, and each mode keeps its
word."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.cache.blocks import BlockPool
from holdfast.core.config import SchedulerConfig
from holdfast.core.request import SamplingParams
from holdfast.core.wire import SampledToken, Step, StepResult, Submit
from holdfast.schedule.batching import batching_of
from holdfast.schedule.scheduler import Scheduler

MODES = ("synchronous", "asynchronous", "hybrid")
EOS = 2


def scheduler_of(mode: str, stages: int, num_blocks: int = 64, most: int = 16) -> Scheduler:
    return Scheduler(
        SchedulerConfig(max_num_seqs=most, max_num_batched_tokens=32),
        BlockPool(num_blocks, 4),
        max_model_len=min(200, num_blocks * 4),
        eos_token_ids=frozenset({EOS}),
        batching=batching_of(mode, stages, stages, most),
    )


def submit(index: int, prompt: int, tokens: int) -> Submit:
    params = SamplingParams(seed=0, max_tokens=tokens)
    return Submit(f"r{index}", [3 + (index + at) % 50 for at in range(prompt)], params)


class Pipeline:
    """Runs steps in order, `stages` at a time, and samples for whatever a step completes."""

    def __init__(self, scheduler: Scheduler, stages: int) -> None:
        self.scheduler = scheduler
        self.stages = stages
        self.steps: deque[Step] = deque()
        self.missing: dict[str, int] = {}
        """Tokens that each request held by the workers has not had computed."""
        self.outputs: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    def fill(self) -> None:
        while len(self.steps) < self.stages and (step := self.scheduler.schedule()):
            self.steps.append(step)

    def finish_one(self) -> None:
        step = self.steps.popleft()
        sampled = []
        named = [*step.new, *step.continued]
        for request, count in zip(named, step.num_tokens, strict=True):
            sequence = self.scheduler._sequences.get(request.request_id)
            if sequence is None:
                continue
            if request.num_computed + count == self._length(request):
                sampled.append(SampledToken(request.request_id, 7))
        for output in self.scheduler.update(StepResult(step.step_id, sampled, [])):
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish:
                self.ended.add(output.request_id)
        self.scheduler.check_integrity()

    def _length(self, request) -> int:
        """Tokens the request had when it was put into the step: nothing of it is in two steps unless mid-prompt."""
        if hasattr(request, "token_ids"):
            self.missing[request.request_id] = len(request.token_ids)
        else:
            self.missing[request.request_id] = request.first_new + len(request.new_token_ids)
        return self.missing[request.request_id]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MODES),
    st.integers(2, 5),
    st.sampled_from([12, 24, 64]),
    st.integers(0, 10_000),
)
def test_every_request_gets_all_its_tokens(mode: str, stages: int, num_blocks: int, seed: int):
    """With blocks for few of them too: then they preempt each other. Some leave on the way."""
    dice = random.Random(seed)
    scheduler = scheduler_of(mode, stages, num_blocks)
    pipeline = Pipeline(scheduler, stages)
    wanted: dict[str, int] = {}
    left: set[str] = set()
    coming = [(dice.randint(1, 30), dice.randint(1, 12)) for _ in range(dice.randint(1, 25))]
    for _ in range(5000):
        while coming and dice.random() < 0.4:
            prompt, tokens = coming.pop()
            index = len(wanted)
            wanted[f"r{index}"] = tokens
            scheduler.add(submit(index, prompt, tokens))
        if wanted and dice.random() < 0.03:
            gone = dice.choice(sorted(wanted))
            scheduler.abort([gone])
            left.add(gone)
        pipeline.fill()
        if pipeline.steps:
            pipeline.finish_one()
        elif not coming:
            break
    assert not scheduler.has_work
    for request_id, tokens in wanted.items():
        if request_id not in left:
            assert len(pipeline.outputs[request_id]) == tokens
            assert request_id in pipeline.ended


@pytest.mark.parametrize("mode", MODES)
def test_no_request_is_in_two_steps_while_its_token_is_unknown(mode: str):
    scheduler = scheduler_of(mode, 4)
    for index in range(10):
        scheduler.add(submit(index, 3, 8))
    pipeline = Pipeline(scheduler, 4)
    while scheduler.has_work:
        pipeline.fill()
        ids = [r.request_id for step in pipeline.steps for r in (*step.new, *step.continued)]
        assert len(ids) == len(set(ids))
        pipeline.finish_one()


@pytest.mark.parametrize("mode", MODES)
def test_steps_share_the_requests_evenly(mode: str):
    scheduler = scheduler_of(mode, 4)
    for index in range(8):
        scheduler.add(submit(index, 3, 8))
    pipeline = Pipeline(scheduler, 4)
    for _ in range(4):
        pipeline.fill()
        assert [len(step.num_tokens) for step in pipeline.steps] == [2, 2, 2, 2]
        for _ in range(4 if mode == "synchronous" else 1):
            pipeline.finish_one()


def newcomer_enters_after(mode: str) -> int:
    """Steps that end before a request that comes in the midst is in one."""
    scheduler = scheduler_of(mode, 4)
    for index in range(8):
        scheduler.add(submit(index, 3, 30))
    pipeline = Pipeline(scheduler, 4)
    pipeline.fill()
    scheduler.add(submit(100, 3, 8))
    for finished in range(1, 20):
        pipeline.finish_one()
        pipeline.fill()
        if any(new.request_id == "r100" for step in pipeline.steps for new in step.new):
            return finished
    raise AssertionError("it never entered")


def test_when_a_newcomer_enters():
    """In a synchronous pipeline once it is empty, in the others with the next step."""
    assert newcomer_enters_after("synchronous") == 4
    assert newcomer_enters_after("asynchronous") == 1
    assert newcomer_enters_after("hybrid") == 1


def test_a_lane_keeps_its_requests():
    scheduler = scheduler_of("hybrid", 3)
    dice = random.Random(1)
    lanes: dict[str, int] = {}
    for index in range(12):
        scheduler.add(submit(index, 3, dice.randint(3, 20)))
    pipeline = Pipeline(scheduler, 3)
    while scheduler.has_work:
        while len(pipeline.steps) < 3 and (step := scheduler.schedule()):
            pipeline.steps.append(step)
            for request in (*step.new, *step.continued):
                assert lanes.setdefault(request.request_id, scheduler.batching.lane) == scheduler.batching.lane
        pipeline.finish_one()
    assert set(lanes.values()) == {0, 1, 2}


@pytest.mark.parametrize("mode", MODES)
def test_a_long_prompt_stalls_no_decode(mode: str):
    """One that came before, and needs many steps: what decodes gets a token in every lap nevertheless."""
    scheduler = scheduler_of(mode, 2)
    scheduler.add(submit(0, 160, 4))
    scheduler.add(submit(1, 3, 8))
    pipeline = Pipeline(scheduler, 2)
    while "r0" not in pipeline.outputs:
        pipeline.fill()
        pipeline.finish_one()
    assert len(pipeline.outputs["r1"]) >= 3, "its prompt takes five steps"
