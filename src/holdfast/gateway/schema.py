"""The OpenAPI description: shapes of replies, and of bodies that the routes parse themselves."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, RootModel
from pydantic.json_schema import models_json_schema

from holdfast.gateway.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_BODIES = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
_EVENTS = {"description": "Server-sent events, the data of each a JSON object, the last one [DONE]."}
"""Of no type: some readers take the stream for a string, some for a list of events."""
_REF = "#/components/schemas/{model}"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    status: Literal["starting", "ready", "recovering", "draining", "lost"]
    requests: int
    token_log: str | None = None
    """Why it is not written, if it is not."""
    checkpoint_disk: str | None = None
    """Why the disk tier does without its disk, or takes no more, if so."""


class Version(BaseModel):
    version: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Replica(BaseModel):
    replica: int
    status: Literal["ready", "recovering", "lost"]
    epoch: int | None
    ranks: int | None
    requests: int


class Loss(BaseModel):
    process: str
    kind: Literal["death", "error", "hang", "leak", "corruption", "device", "planned"]
    stage: int | None
    ranks: list[str]
    expert_group: list[str]
    detected: float


class Incident(BaseModel):
    member: str
    reason: str
    loss: Loss
    rung: Literal["failover", "restart", "reshape", "error", "none"]
    requests: int
    decided: float
    resumed: int
    first_token: float | None
    last_token: float | None
    back: float | None
    recomputed: int
    recomputed_most: int
    weights_kept: int | None
    weights_loaded: int | None


class Machine(BaseModel):
    name: str
    replicas: list[int]
    status: Literal["ready", "lost", "stopped"]


class Cluster(BaseModel):
    status: Literal["starting", "ready", "recovering", "draining", "lost"]
    replicas: list[Replica]
    machines: list[Machine]
    """Beside the first: those that have joined so far."""
    spare_workers: int
    """That wait."""
    incidents: list[Incident]


class RankChecked(BaseModel):
    rank: str
    bytes: int
    seconds: float
    wrong: list[str]


class WeightsChecked(BaseModel):
    ranks: list[RankChecked]
    wrong: list[str]
    """Ranks whose weights have changed; their replicas are started anew."""
    lost: list[int]
    """Replicas that did not serve, or were lost or too slow before all of their ranks had been checked."""


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    prompt: str


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenWithTop(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenWithTop]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class AnyReply(RootModel[Completion | ChatCompletion]):
    pass


Responses = dict[int | str, dict[str, Any]]


def responses(success: type[BaseModel], *, statuses: tuple[int, ...] = (401, 404, 405, 500, 503)) -> Responses:
    """A route's replies: `success`, and errors in OpenAI's shape."""
    return {200: {"model": success}, **{status: {"model": Error} for status in statuses}}


def health_responses() -> Responses:
    return {200: {"model": Health}, 503: {"model": Health}, 405: {"model": Error}}


def text_responses(content_type: str) -> Responses:
    replies = responses(Error, statuses=(401, 405, 500))
    return replies | {200: {"content": {content_type: {"schema": {"type": "string"}}}}}


def stream() -> dict[str, Any]:
    """Arguments for a route that replies with events."""
    replies = responses(Error, statuses=(400, 401, 404, 405, 500, 503))
    return {"responses": replies | {200: {"content": {"text/event-stream": {"schema": _EVENTS}}}}}


def body(request: type[BaseModel], success: type[BaseModel]) -> dict[str, Any]:
    """Arguments for a route that parses `request` from the body itself."""
    reply = responses(success, statuses=(400, 401, 404, 405, 413, 429, 500, 503))
    if issubclass(request, CompletionRequest | ChatCompletionRequest):
        reply[200]["content"] = {"text/event-stream": {"schema": _EVENTS}}
    content = {"application/json": {"schema": {"$ref": _REF.format(model=request.__name__)}}}
    return {"responses": reply, "openapi_extra": {"requestBody": {"required": True, "content": content}}}


def install(app: FastAPI) -> None:
    """Let /openapi.json describe the bodies too, which FastAPI does not see."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, definitions = models_json_schema([(each, "validation") for each in _BODIES], ref_template=_REF)
            document["components"]["schemas"] |= definitions["$defs"]
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
