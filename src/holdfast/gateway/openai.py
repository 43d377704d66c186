"""From a request of the API to requests for the engine: defaults, limits at the door, seeds, prompts."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.core.errors import InvalidRequest, NotFound
from holdfast.core.request import SamplingParams
from holdfast.core.wire import Submit
from holdfast.gateway.chat import ChatTemplate
from holdfast.gateway.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
)
from holdfast.gateway.tokenizer import Tokenizer

SEED_MASK = (1 << 63) - 1
DEFAULT_COMPLETION_TOKENS = 16
_LONG_TEXT = 10_000
"""Characters from which encoding leaves the event loop for a thread."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the gateway knows of the model once it is ready."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    max_model_len: int
    """Tokens of prompt and output together, as the engine announced it."""
    vocab_size: int
    sampling_defaults: dict[str, float]
    max_logprobs: int
    max_sequences: int
    """Engine requests that may live at once."""
    seeds: random.Random
    """Where the seeds of requests that name none come from."""
    created: int
    """Unix time."""

    def check_name(self, name: str | None) -> None:
        """Raise `NotFound` for a model that is not this one. No name means this one."""
        if name is not None and name != self.name:
            raise NotFound(
                f"the model {name!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def check_sequences(self, count: int) -> None:
        """Raise `InvalidRequest` for a request that could never fit."""
        if count > self.max_sequences:
            raise InvalidRequest(
                f"the request asks for {count} sequences (prompts × `n`); at most {self.max_sequences} may live",
                param="n",
            )

    def check_tokens(self, token_ids: Sequence[int], param: str) -> None:
        """Raise `InvalidRequest` for an id outside the vocabulary."""
        if token_ids and max(token_ids) >= self.vocab_size:
            raise InvalidRequest(
                f"`{param}`: token id {max(token_ids)} is not in 0 … {self.vocab_size - 1}", param=param
            )


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. `text` is None when the client sent tokens."""

    token_ids: list[int]
    text: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One API call: its engine requests, choice by choice (n for each prompt), and how the reply shall look."""

    request_id: str
    submits: list[Submit]
    prompts: list[Prompt]
    n: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    echo: bool
    discard_output: bool
    """max_tokens 0: the engine computes one token, the reply carries none."""
    logprobs: int | None
    prompt_logprobs: int | None
    """As the client asked for it beside `echo`."""
    return_token_ids: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of a choice."""
        return self.prompts[index // self.n]


async def completion_job(request: CompletionRequest, model: ServedModel, request_id: str) -> Job:
    """The job of a POST /v1/completions. Raises `RequestError`."""
    model.check_name(request.model)
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        raise InvalidRequest(
            f"`best_of` {request.best_of}: only the value of `n` ({n}) is supported", param="best_of"
        )
    echo = bool(request.echo)
    max_tokens = request.max_tokens
    if max_tokens == 0 and not echo:
        raise InvalidRequest("`max_tokens` 0: must be at least 1, unless `echo` is true", param="max_tokens")
    _check_logprobs(request.logprobs, "logprobs", model)
    raw = _split_prompts(request.prompt)
    model.check_sequences(len(raw) * n)
    prompts = await _prompts(raw, model.tokenizer, add_special_tokens=request.add_special_tokens is not False)
    return _job(
        request,
        model,
        request_id,
        prompts,
        max_tokens=1 if max_tokens == 0 else max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=request.logprobs,
        echo=echo,
        discard_output=max_tokens == 0,
    )


async def chat_job(request: ChatCompletionRequest, model: ServedModel, request_id: str) -> Job:
    """The job of a POST /v1/chat/completions. Raises `RequestError`."""
    model.check_name(request.model)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    _check_logprobs(request.top_logprobs, "top_logprobs", model)
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ", param="max_tokens")
    max_tokens = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    if max_tokens == 0:
        raise InvalidRequest("`max_tokens` 0: must be at least 1", param="max_tokens")
    model.check_sequences(request.n or 1)
    prompt = await chat_prompt(request, request.messages, model)
    return _job(
        request,
        model,
        request_id,
        [prompt],
        max_tokens=max_tokens,
        default_max_tokens=None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        echo=False,
        discard_output=False,
    )


async def chat_prompt(
    request: ChatCompletionRequest | TokenizeRequest, messages: list[ChatMessage], model: ServedModel
) -> Prompt:
    """The tokens of a conversation. `add_special_tokens` is off by default: templates write their own BOS."""
    text = model.chat_template.render(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        extra=request.chat_template_kwargs,
    )
    return await text_prompt(text, model, add_special_tokens=bool(request.add_special_tokens))


async def text_prompt(text: str, model: ServedModel, *, add_special_tokens: bool) -> Prompt:
    """The tokens of a text."""
    [prompt] = await _prompts([text], model.tokenizer, add_special_tokens=add_special_tokens)
    return prompt


async def _prompts(raw: Sequence[str | list[int]], tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[Prompt]:
    """Encode what is text; in a thread when it is much (the library releases the GIL)."""

    def encode() -> list[Prompt]:
        return [
            Prompt(each, None)
            if isinstance(each, list)
            else Prompt(tokenizer.encode(each, add_special_tokens=add_special_tokens), each)
            for each in raw
        ]

    much = sum(len(each) for each in raw if isinstance(each, str)) >= _LONG_TEXT
    return await asyncio.to_thread(encode) if much else encode()


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the i-th choice; the first one's is the request's own."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + choice.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & SEED_MASK


def _split_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def _check_logprobs(value: int | None, param: str, model: ServedModel) -> None:
    if value is not None and value > model.max_logprobs:
        raise InvalidRequest(f"`{param}` {value}: at most {model.max_logprobs} (--max-logprobs)", param=param)


def _job(
    request: GenerationRequest,
    model: ServedModel,
    request_id: str,
    prompts: list[Prompt],
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
    echo: bool,
    discard_output: bool,
) -> Job:
    _check_logprobs(request.prompt_logprobs, "prompt_logprobs", model)
    n = request.n or 1
    wanted = [each for each in (request.prompt_logprobs, logprobs if echo else None) if each is not None]
    prompt_logprobs = max(wanted, default=None)
    logit_bias = _logit_bias(request, model)
    submits: list[Submit] = []
    for prompt in prompts:
        limit = _output_limit(prompt, model, max_tokens, default_max_tokens)
        seed = model.seeds.getrandbits(63) if request.seed is None else request.seed & SEED_MASK
        for choice in range(n):
            params = _sampling_params(
                request,
                model,
                seed=choice_seed(seed, choice),
                max_tokens=limit,
                logprobs=logprobs,
                logit_bias=logit_bias,
                prompt_logprobs=prompt_logprobs,
            )
            name = f"{request_id}-{len(submits)}"
            submits.append(Submit(name, prompt.token_ids, params, request.priority or 0))
    options = request.stream_options
    return Job(
        request_id=request_id,
        submits=submits,
        prompts=prompts,
        n=n,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        echo=echo,
        discard_output=discard_output,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        return_token_ids=bool(request.return_token_ids),
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _output_limit(prompt: Prompt, model: ServedModel, asked: int | None, default: int | None) -> int:
    """How many tokens the output may have: as asked, or `default`, or all that is left."""
    length, longest = len(prompt.token_ids), model.max_model_len
    if length == 0:
        raise InvalidRequest("the prompt is empty: there is no token to continue from", param="prompt")
    model.check_tokens(prompt.token_ids, "prompt")
    left = longest - length
    if left < 1:
        raise InvalidRequest(
            f"this model's maximum context length is {longest} tokens; the prompt has {length}, "
            "and there must be room for one more",
            code="context_length_exceeded",
        )
    if asked is not None and asked > left:
        raise InvalidRequest(
            f"this model's maximum context length is {longest} tokens; the prompt has {length} "
            f"and `max_tokens` asks for {asked}, {length + asked} together",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return left if default is None else min(default, left)


def _sampling_params(
    request: GenerationRequest,
    model: ServedModel,
    *,
    seed: int,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    logit_bias: dict[int, float],
) -> SamplingParams:
    def value(name: str, neutral: float) -> float:
        """As the request says, or else as the model's authors recommend, or else without effect."""
        asked: float | None = getattr(request, name)
        return model.sampling_defaults.get(name, neutral) if asked is None else asked

    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"`min_tokens` {min_tokens}: more than `max_tokens` ({max_tokens})", param="min_tokens")
    stop_token_ids = tuple(request.stop_token_ids or ())
    model.check_tokens(stop_token_ids, "stop_token_ids")
    return SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=value("temperature", 1.0),
        top_p=value("top_p", 1.0),
        top_k=max(0, int(value("top_k", 0))),
        min_p=value("min_p", 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=value("repetition_penalty", 1.0),
        logit_bias=logit_bias,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(request: GenerationRequest, model: ServedModel) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 20 and int(key) < model.vocab_size):
            raise InvalidRequest(
                f"`logit_bias`: {key[:50]!r} is not a token id in 0 … {model.vocab_size - 1}", param="logit_bias"
            )
        bias[int(key)] = value
    return bias
