"""From API requests to engine requests: defaults, limits at the door, seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.core.errors import ConfigError, InvalidRequest, NotFound
from holdfast.gateway.openai import (
    Job,
    ServedModel,
    chat_job,
    check_sampling_defaults,
    choice_seed,
    completion_job,
)
from holdfast.gateway.protocol import ChatCompletionRequest, CompletionRequest
from holdfast.gateway.tokenizer import Tokenizer
from support.gateway import byte_tokenizer, served_model


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


@pytest.fixture
def model(tokenizer: Tokenizer) -> ServedModel:
    return served_model(tokenizer)


async def complete(served: ServedModel, **fields: object) -> Job:
    return await completion_job(CompletionRequest.model_validate({"prompt": "abc"} | fields), served, "id")


async def chat(served: ServedModel, **fields: object) -> Job:
    body = {"messages": [{"role": "user", "content": "x"}]} | fields
    return await chat_job(ChatCompletionRequest.model_validate(body), served, "id")


async def test_each_choice_of_each_prompt_is_an_engine_request(model: ServedModel) -> None:
    job = await complete(model, prompt=["ab", "c"], n=2, seed=7)
    assert job.request_id == "id"
    assert [submit.prompt_token_ids for submit in job.submits] == [[97, 98], [97, 98], [99], [99]]
    seeds = [submit.params.seed for submit in job.submits]
    assert seeds == [7, choice_seed(7, 1), 7, choice_seed(7, 1)]
    assert seeds[0] != seeds[1]


async def test_the_clients_id_may_return_the_engines_never_do(model: ServedModel) -> None:
    """Guards against tokens of a request that has just ended, still on their way, in the reply of its namesake."""
    jobs = [await complete(model, n=2, request_id="mine") for _ in range(2)]
    assert len({submit.request_id for job in jobs for submit in job.submits}) == 4


async def test_seeds(model: ServedModel, tokenizer: Tokenizer) -> None:
    assert (await complete(model, seed=-1)).submits[0].params.seed == 2**63 - 1
    drawn = [(await complete(model)).submits[0].params.seed for _ in range(3)]
    assert len(set(drawn)) == 3
    again = served_model(tokenizer)
    assert [(await complete(again)).submits[0].params.seed for _ in range(3)] == drawn, "--seed fixes them"


async def test_output_limits(model: ServedModel) -> None:
    assert (await complete(model)).submits[0].params.max_tokens == 16
    assert (await complete(model, prompt=[1] * 60)).submits[0].params.max_tokens == 4
    job = await chat(model)
    assert job.submits[0].params.max_tokens == 64 - len(job.prompts[0].token_ids)
    assert (await chat(model, max_completion_tokens=3)).submits[0].params.max_tokens == 3
    with pytest.raises(InvalidRequest, match=r"64 tokens.*has 3.*asks for 62, 65 together") as refusal:
        await complete(model, max_tokens=62)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequest, match=r"64 tokens; the prompt has 64") as refusal:
        await complete(model, prompt=[1] * 64)
    assert refusal.value.code == "context_length_exceeded"


async def test_no_tokens_only_with_echo(model: ServedModel) -> None:
    job = await complete(model, max_tokens=0, echo=True, logprobs=1)
    assert job.discard_output
    assert job.submits[0].params.max_tokens == 1
    assert job.submits[0].params.prompt_logprobs == 1
    with pytest.raises(InvalidRequest, match="max_tokens"):
        await complete(model, max_tokens=0)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        await chat(model, max_tokens=0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [260]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"stop_token_ids": [260]}, "stop_token_ids"),
        ({"logit_bias": {"260": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {"\u0661": 1.0}}, "logit_bias"),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"n": 9}, "n"),
        ({"prompt": ["a", "b", "c"], "n": 3}, "n"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"prompt": [[1], [1] * 60], "min_tokens": 5}, "min_tokens"),
    ],
)
async def test_values_out_of_range_are_refused_by_name(
    model: ServedModel, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await complete(model, **fields)
    assert refusal.value.param == param


async def test_top_logprobs_need_logprobs(model: ServedModel) -> None:
    assert (await chat(model, logprobs=True)).submits[0].params.logprobs == 0
    assert (await chat(model, logprobs=True, top_logprobs=2)).submits[0].params.logprobs == 2
    with pytest.raises(InvalidRequest, match="top_logprobs"):
        await chat(model, top_logprobs=2)


async def test_another_model_is_not_found(model: ServedModel) -> None:
    assert (await complete(model, model="tiny")).submits
    with pytest.raises(NotFound, match="gpt-4"):
        await complete(model, model="gpt-4")


async def test_the_models_sampling_defaults_fill_absent_fields(tokenizer: Tokenizer) -> None:
    model = served_model(tokenizer, temperature=0.6, top_k=20.0)
    params = (await complete(model, top_p=0.9)).submits[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.9)
    params = (await complete(model, temperature=0, top_k=-1)).submits[0].params
    assert (params.temperature, params.top_k) == (0, 0)


def test_sampling_defaults_are_checked_like_a_request() -> None:
    good = {"temperature": 0.6, "top_p": 1.0, "top_k": 20.0, "min_p": 0.0, "repetition_penalty": 1.1}
    check_sampling_defaults(good, overrides=["top_p"], folder="m")
    check_sampling_defaults({"top_k": -1.0}, overrides=[], folder="m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0.0),
        ("temperature", 1e30),
        ("temperature", float("nan")),
        ("top_k", 2.5),
        ("top_k", -2.0),
        ("top_p", 5.0),
        ("top_p", 0.0),
        ("min_p", 3.0),
    ],
)
def test_sampling_defaults_out_of_range_name_their_source(name: str, value: float) -> None:
    defaults = {"temperature": 0.5, name: value}
    with pytest.raises(ConfigError, match=rf"^m/generation_config.json: `{name}`: .*got "):
        check_sampling_defaults(defaults, overrides=[], folder="m")
    with pytest.raises(ConfigError, match=rf"^--override-generation-config: `{name}`: .*got "):
        check_sampling_defaults(defaults, overrides=[name], folder="m")
