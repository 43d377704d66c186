"""The sampler: each parameter does what its docstring says, and a row depends on nothing but its own request."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.request import SamplingParams
from holdfast.core.wire import NO_NUMBERS, NewRequest
from holdfast.kernels.reference import ReferenceKernels
from holdfast.worker.sampler import Sampler, score

VOCAB = 40
sampler = Sampler(ReferenceKernels(), eos_token_ids=(7,))


def request(tokens: list[int] | None = None, num_prompt: int = 2, **params: object) -> NewRequest:
    tokens = [1, 2] if tokens is None else tokens
    params = {"seed": 5, "max_tokens": 100} | params
    return NewRequest("r", tokens, num_prompt, SamplingParams(**params), [], 0)


def draw(logits: torch.Tensor, *requests: NewRequest) -> list[int]:
    rows = logits.expand(len(requests), -1).clone() if logits.dim() == 1 else logits.clone()
    return [token for token, _ in sampler.sample(rows, list(requests)).read()]


def frequencies(logits: torch.Tensor, count: int = 4000, **params: object) -> torch.Tensor:
    """Share of each token over `count` seeds."""
    drawn = draw(logits, *[request(seed=seed, **params) for seed in range(count)])
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / count


def test_greedy_ties_go_to_the_lowest_id():
    logits = torch.zeros(VOCAB)
    logits[[5, 9, 30]] = 2.0
    assert draw(logits, request(temperature=0.0)) == [5]


def test_samples_follow_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    expected = (logits / 0.7).softmax(-1)
    got = frequencies(logits, temperature=0.7)
    # 4,000 draws: five standard deviations of each share
    assert ((got - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()


def test_noise_depends_on_position():
    logits = torch.zeros(VOCAB)
    drawn = {draw(logits, request([1] * length))[0] for length in range(2, 12)}
    assert len(drawn) > 3


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "seed": st.integers(0, 2**63 - 1),
                "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
                "top_p": st.sampled_from([0.1, 0.9, 1.0]),
                "top_k": st.sampled_from([0, 1, 3, 1000]),
                "min_p": st.sampled_from([0.0, 0.2]),
                "presence_penalty": st.sampled_from([0.0, 1.5]),
                "repetition_penalty": st.sampled_from([1.0, 1.3]),
                "logit_bias": st.sampled_from([{}, {3: 5.0, 4: -100.0}]),
                "min_tokens": st.sampled_from([0, 9]),
                "logprobs": st.sampled_from([None, 0, 3]),
            }
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**31),
)
def test_a_row_in_company_is_the_row_alone(params, data_seed):
    logits = torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(data_seed)) * 3
    requests = [request([1, 2, 3, 3, 9], **each) for each in params]
    together = sampler.sample(logits.clone(), requests).read()
    alone = [sampler.sample(logits[i : i + 1].clone(), [requests[i]]).read()[0] for i in range(len(params))]
    assert [token for token, _ in together] == [token for token, _ in alone]
    for (_, a), (_, b) in zip(together, alone, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.token_id, a.rank) == (b.token_id, b.rank)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-6)


def test_top_k_top_p_and_min_p_keep_what_they_should():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert set(frequencies(logits, 500, top_k=2).nonzero().flatten().tolist()) == {0, 1}
    assert set(frequencies(logits, 500, top_p=0.79).nonzero().flatten().tolist()) == {0, 1}
    assert set(frequencies(logits, 500, top_p=0.81).nonzero().flatten().tolist()) == {0, 1, 2}
    assert set(frequencies(logits, 500, min_p=0.2).nonzero().flatten().tolist()) == {0, 1, 2}
    assert draw(logits, *[request(seed=s, top_p=1e-9) for s in range(20)]) == [0] * 20


def test_penalties_by_their_formulas():
    logits = torch.zeros(VOCAB)
    logits[3], logits[4], logits[5] = 2.0, 1.9, -1.0
    history = [3, 1, 4, 4, 3, 3]  # prompt [3, 1], output [4, 4, 3, 3]
    cases = {
        # token: 3 loses 1·0.3 + 2·0.1, 4 the same: 3 stays ahead
        3: {"presence_penalty": 0.3, "frequency_penalty": 0.1},
        # a repetition penalty brings 3 to 1, 4 to 0.95: another bias decides
        6: {"repetition_penalty": 2.0, "logit_bias": {6: 1.01}},
    }
    for expected, params in cases.items():
        assert draw(logits, request(history, 2, temperature=0.0, **params)) == [expected]
    row = logits.clone()
    sampler._adjust(row, request(history, 2, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25))
    assert row[3].item() == pytest.approx(2.0 / 2 - 0.5 - 2 * 0.25)
    assert row[4].item() == pytest.approx(1.9 / 2 - 0.5 - 2 * 0.25)
    assert row[1].item() == 0.0, "prompt tokens: repetition only, and 0 stays 0"
    row = logits.clone()
    sampler._adjust(row, request([5, 1], 2, repetition_penalty=2.0))
    assert row[5].item() == -2.0, "negative logits are multiplied"


def test_min_tokens_masks_every_end():
    logits = torch.zeros(VOCAB)
    logits[7], logits[8] = 10.0, 9.0
    assert draw(logits, request(temperature=0.0)) == [7]
    assert draw(logits, request(temperature=0.0, min_tokens=1, stop_token_ids=(8,))) == [0]
    assert draw(logits, request(temperature=0.0, min_tokens=1, ignore_eos=True)) == [7]
    assert draw(logits, request([1, 2, 3], 2, temperature=0.0, min_tokens=1)) == [7]


def test_logprobs_are_of_the_raw_logits():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = logits[0].log_softmax(-1)
    choice = sampler.sample(logits.clone(), [request(temperature=0.5, logit_bias={11: 100.0}, logprobs=3)])
    [(token, logprobs)] = choice.read()
    assert token == 11
    assert logprobs is not None
    assert logprobs.logprob == pytest.approx(expected[11].item())
    assert logprobs.rank == int((expected > expected[11]).sum()) + 1
    assert [token for token, _ in logprobs.top] == expected.topk(3).indices.tolist()
    assert math.exp(logprobs.top[0][1]) <= 1.0


def test_more_alternatives_than_tokens():
    [entry] = score(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]), [20]).read()
    assert (entry.rank, [token for token, _ in entry.top]) == (2, [0, 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_numbers_are_told_and_change_no_other(bad: float):
    """Sampled or greedy, scored or not."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    requests = [request(), request(temperature=0), request(logprobs=2), request(top_k=3)]
    calm = draw(logits, *requests)
    for row in range(4):
        spoilt = logits.clone()
        spoilt[row] = bad
        expected = [NO_NUMBERS if index == row else token for index, token in enumerate(calm)]
        assert draw(spoilt, *requests) == expected
