"""Every family through scheduler and runner against transformers: prefix hits, preemption, chunks, crowds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from support.cases import CASES
from support.checkpoints import oracle_logits, random_model, save
from support.local import LocalEngine


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_logprobs_through_hits_preemption_and_chunks(config: dict[str, Any], device: str, tmp_path: Path):
    """Two waves of requests that share prompts, in a cache too small for them: every logprob of every prompt and
    output token is transformers', and the cache really was hit and exhausted."""
    model = random_model(**config)
    engine = LocalEngine(save(model, tmp_path), device=device, num_blocks=24, block_size=4)
    engine.schedule(num_blocks=18, max_num_batched_tokens=13, max_num_seqs=5)
    dice = random.Random(2)
    shared = [dice.randrange(3, 97) for _ in range(14)]
    prompts = [shared[: dice.randint(3, 14)] + [dice.randrange(3, 97) for _ in range(n)] for n in (1, 9, 4, 13, 6)]
    params = {"max_tokens": 17, "logprobs": 4, "ignore_eos": True}
    first = engine.run([(prompt, params) for prompt in prompts])
    scored = {"prompt_logprobs": 2, "temperature": 1.0}
    second = engine.run([(prompt, params | (scored if index % 2 else {})) for index, prompt in enumerate(prompts)])
    stats = engine.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    for prompt, answer in zip(prompts + prompts, first + second, strict=True):
        expected = oracle_logits(model, prompt + answer.token_ids).log_softmax(-1)
        entries = [None] * len(prompt) + answer.logprobs
        if answer.prompt_logprobs:
            entries = [None, *answer.prompt_logprobs, *answer.logprobs]
        assert len(entries) == len(prompt) + 17
        for position, entry in enumerate(entries):
            if entry is not None:
                row = expected[position - 1]
                assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
                for token_id, logprob in entry.top:
                    assert logprob == pytest.approx(row[token_id].item(), abs=1e-4)
                assert [logprob for _, logprob in entry.top] == pytest.approx(
                    row.topk(len(entry.top)).values.tolist(), abs=1e-4
                )
