"""From a request of the API to requests for the engine: defaults, limits at the door, seeds, prompts."""

from __future__ import annotations

import asyncio
import hashlib
import random
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import msgspec
from pydantic import ValidationError

from holdfast.core.errors import ConfigError, InvalidRequest, NotFound
from holdfast.core.request import SamplingParams
from holdfast.core.wire import Submit
from holdfast.gateway.chat import ChatTemplate
from holdfast.gateway.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
    StreamOptions,
    TokenizeRequest,
    refusal,
)
from holdfast.gateway.tokenizer import Tokenizer

SEED_MASK = (1 << 63) - 1
DEFAULT_COMPLETION_TOKENS = 16
_LONG = 10_000
"""Characters or tokens from which work on them leaves the event loop for a thread."""

Result = TypeVar("Result")


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

    request: GenerationRequest
    request_id: str
    """What the reply is called. The client may have chosen it, and may choose it again; the engine's requests
    have ids of their own, which never return."""
    submits: list[Submit]
    prompts: list[Prompt]
    n: int
    stop: tuple[str, ...]
    skip_special_tokens: bool
    logprobs: int | None
    stream_options: StreamOptions
    echo: bool = False
    discard_output: bool = False
    """max_tokens 0: the engine computes one token, the reply carries none."""

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
    is_one = isinstance(request.prompt, str) or isinstance(request.prompt[0], int)
    raw = cast(Sequence[str | list[int]], [request.prompt] if is_one else request.prompt)
    model.check_sequences(len(raw) * n)
    prompts = await encode_prompts(raw, model, add_special_tokens=request.add_special_tokens is not False)
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
    asked = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(asked) > 1:
        raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ", param="max_tokens")
    max_tokens = asked.pop() if asked else None
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
    [prompt] = await encode_prompts([text], model, add_special_tokens=bool(request.add_special_tokens))
    return prompt


async def encode_prompts(
    raw: Sequence[str | list[int]], model: ServedModel, *, add_special_tokens: bool
) -> list[Prompt]:
    """The tokens of what is text."""

    def encode() -> list[Prompt]:
        return [
            Prompt(each, None)
            if isinstance(each, list)
            else Prompt(model.tokenizer.encode(each, add_special_tokens=add_special_tokens), each)
            for each in raw
        ]

    return await off_loop(sum(len(each) for each in raw if isinstance(each, str)), encode)


async def off_loop(size: int, work: Callable[[], Result]) -> Result:
    """The result of `work`, done in a thread when its `size` (characters or tokens) is large."""
    return await asyncio.to_thread(work) if size >= _LONG else work()


def check_sampling_defaults(defaults: Mapping[str, float], *, overrides: Collection[str], folder: str) -> None:
    """What holds for a request holds for its defaults. Raises `ConfigError` naming their source: the flag for
    `overrides`, or the model's file."""
    try:
        GenerationRequest.model_validate({k: int(v) if v.is_integer() else v for k, v in defaults.items()})
    except ValidationError as error:
        fault = refusal(error)
        source = "--override-generation-config" if fault.param in overrides else f"{folder}/generation_config.json"
        raise ConfigError(f"{source}: {fault}") from error


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the i-th choice; the first one's is the request's own."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + choice.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & SEED_MASK


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
    echo: bool = False,
    discard_output: bool = False,
) -> Job:
    _check_logprobs(request.prompt_logprobs, "prompt_logprobs", model)
    n = request.n or 1
    wanted = [each for each in (request.prompt_logprobs, logprobs if echo else None) if each is not None]
    params = _sampling_params(request, model, logprobs=logprobs, prompt_logprobs=max(wanted, default=None))
    serial = uuid.uuid4().hex
    submits: list[Submit] = []
    for prompt in prompts:
        limit = _output_limit(prompt, model, max_tokens, default_max_tokens)
        if params.min_tokens > limit:
            raise InvalidRequest(
                f"`min_tokens` {params.min_tokens}: more than `max_tokens` ({limit})", param="min_tokens"
            )
        seed = model.seeds.getrandbits(63) if request.seed is None else request.seed & SEED_MASK
        for choice in range(n):
            own = msgspec.structs.replace(params, seed=choice_seed(seed, choice), max_tokens=limit)
            submits.append(Submit(f"{serial}-{len(submits)}", prompt.token_ids, own, request.priority or 0))
    return Job(
        request=request,
        request_id=request_id,
        submits=submits,
        prompts=prompts,
        n=n,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        skip_special_tokens=request.skip_special_tokens is not False,
        logprobs=logprobs,
        stream_options=request.stream_options or StreamOptions(),
        echo=echo,
        discard_output=discard_output,
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
    request: GenerationRequest, model: ServedModel, *, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """What all choices share; seed and max_tokens are each one's own and not set here."""

    def value(name: str, neutral: float) -> float:
        """As the request says, or else as the model's authors recommend, or else without effect."""
        asked: float | None = getattr(request, name)
        return model.sampling_defaults.get(name, neutral) if asked is None else asked

    stop_token_ids = tuple(request.stop_token_ids or ())
    model.check_tokens(stop_token_ids, "stop_token_ids")
    return SamplingParams(
        seed=0,
        max_tokens=0,
        min_tokens=request.min_tokens or 0,
        temperature=value("temperature", 1.0),
        top_p=value("top_p", 1.0),
        top_k=max(0, int(value("top_k", 0))),
        min_p=value("min_p", 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=value("repetition_penalty", 1.0),
        logit_bias=_logit_bias(request, model),
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
