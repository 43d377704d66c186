"""Steps that are launched before the one ahead of them is finished, and steps for which there is no memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from holdfast.worker.runner import Runner
from support.local import LocalEngine
from support.tiny import tiny_model


def requests(count: int, vocabulary: int = 128) -> list[tuple[list[int], dict[str, object]]]:
    dice = random.Random(0)
    wishes: list[dict[str, object]] = [
        {},
        {"temperature": 1.0, "top_p": 0.9, "seed": 3},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"logprobs": 3, "temperature": 0.8},
        {"prompt_logprobs": 2, "logprobs": 0},
        {"stop_token_ids": tuple(range(0, vocabulary, 3)), "temperature": 1.0, "min_tokens": 2},
    ]
    return [
        ([dice.randrange(vocabulary) for _ in range(dice.randint(1, 60))], wishes[i % 6] | {"max_tokens": 5 + i})
        for i in range(count)
    ]


def test_running_ahead_changes_no_token(tmp_path: Path):
    """A token that is taken from another row of the step before, or counted twice, or not at all; logprobs of the
    wrong request; and what a request that has ended was still computed for."""
    engine = LocalEngine(tiny_model(tmp_path))
    engine.schedule(max_num_seqs=7, max_num_batched_tokens=50)
    alone = [answer.content for answer in engine.run(requests(24))]
    assert {finish for *_, finish in alone} == {"stop", "length"}
    engine.runner.runs_ahead = True
    for num_blocks in (None, 9):
        engine.schedule(max_num_seqs=7, max_num_batched_tokens=50, num_blocks=num_blocks)
        assert [answer.content for answer in engine.run(requests(24), depth=2)] == alone
    assert engine.scheduler.stats().preemptions > 0


class Crowded:
    """A device whose memory others take at times: of the real forward pass, for steps of too many tokens."""

    def __init__(self, runner: Runner, room: int) -> None:
        self.forward, self.room, self.refused = runner.forward, room, 0

    def __call__(self, token_ids, batch):
        if len(token_ids) > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.forward(token_ids, batch)


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_without_memory_are_tried_again_smaller(depth: int, tmp_path: Path):
    """A service that dies, a request that ends, or a token that changes when the device has no room for a step."""
    engine = LocalEngine(tiny_model(tmp_path))
    calm = [answer.content for answer in engine.run(requests(18))]
    engine.schedule()
    engine.runner.runs_ahead = depth == 2
    engine.runner.forward = crowded = Crowded(engine.runner, 11)
    assert [answer.content for answer in engine.run(requests(18), depth)] == calm
    assert 2 <= crowded.refused <= 30
    engine.schedule()
    crowded.room = 0
    assert {answer.finish for answer in engine.run(requests(3), depth)} == {"error"}
