"""The requests of the API as pydantic models: field by field what OpenAI documents, and vLLM's additions.

Types are strict (no `"5"` for 5), unknown fields are refused by name, NaN and Infinity are no numbers. A field
of OpenAI's that is not supported yet stands here too, with the values that ask for nothing (`_unsupported`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from holdfast.core.errors import InvalidRequest

# Every list stops at its first fault: a report of a million is of no use, and costs seconds and gigabytes.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]

_MOST_FAULTS = 1000


def _unsupported(*neutral: Any) -> Any:
    """A field of which only null and these values pass, because they change nothing."""
    return Field(None, json_schema_extra={"enum": [None, *neutral]})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _refuse_unsupported(cls, value: Any, info: ValidationInfo) -> Any:
        neutral: Any = cls.model_fields[str(info.field_name)].json_schema_extra
        if neutral and value not in neutral["enum"]:
            raise PydanticCustomError("unsupported", "is not supported yet")
        return value


class StreamOptions(_Strict):
    include_usage: bool | None = None
    """A last chunk without choices carries the usage."""
    continuous_usage_stats: bool | None = None
    """Every chunk carries the usage so far."""
    include_obfuscation: Literal[False] | None = None
    resumable: bool | None = None
    """Holdfast's: events carry ids, and the request outlives its connection for a while, so that the client can come
    back for the rest at /v1/requests/{id}/stream."""


class GenerationRequest(_Strict):
    """What completions and chat completions share."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    request_id: str | None = Field(None, min_length=1, max_length=200)
    return_token_ids: bool | None = None
    user: str | None = None
    logit_processors: Any = _unsupported([])

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` needs `stream` to be true", param="stream_options")
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
    )
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    logprobs: int | None = Field(None, ge=0)
    suffix: Any = _unsupported("")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class OtherPart(BaseModel):
    """A part that is not text; refused by its type's name."""

    model_config = ConfigDict(extra="allow")

    type: str


def _part_kind(part: Any) -> str:
    """Which model judges a part: a text part's faults are its own, not those of an unknown kind."""
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "text" if kind == "text" else "other"


Part = Annotated[Annotated[TextPart, Tag("text")] | Annotated[OtherPart, Tag("other")], Discriminator(_part_kind)]


class ChatMessage(_Strict):
    """One message. Templates see role, content, name and reasoning_content; `refusal` and `annotations` pass,
    so that an earlier reply can be sent back as it came, and are dropped."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = _unsupported()
    function_call: Any = _unsupported()
    tool_calls: Any = _unsupported([])


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    audio: Any = _unsupported()
    function_call: Any = _unsupported("none", "auto")
    functions: Any = _unsupported([])
    modalities: Any = _unsupported(["text"])
    parallel_tool_calls: Any = _unsupported(True, False)
    prediction: Any = _unsupported()
    reasoning_effort: Any = _unsupported()
    response_format: Any = _unsupported({"type": "text"})
    service_tier: Any = _unsupported("auto", "default")
    store: Any = _unsupported(False)
    tool_choice: Any = _unsupported("none", "auto")
    tools: Any = _unsupported([])
    verbosity: Any = _unsupported("medium")
    web_search_options: Any = _unsupported()


class TokenizeRequest(_Strict):
    """Body of POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(_Strict):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


Body = TypeVar("Body", bound=BaseModel)


def parse_body(kind: type[Body], data: bytes) -> Body:
    """The request in a JSON body. Raises `InvalidRequest` naming the field, the value and what is allowed."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise refusal(error) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def refusal(error: ValidationError) -> InvalidRequest:
    """What pydantic found, as one sentence about one field."""
    if error.error_count() > _MOST_FAULTS:  # telling which costs time that others wait for
        return InvalidRequest(f"the body has more than {_MOST_FAULTS} faults")
    errors = error.errors(include_url=False, include_context=False)
    # a union tries every form and reports each failure: the one that came furthest is the form that was meant
    same_field = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same_field, key=lambda each: (len(each["loc"]), each["type"] != "string_type"))
    path = first["loc"]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {first['msg']}")
    if not path:
        return InvalidRequest(f"the body: {first['msg']}")
    name = str(path[0])
    for part in path[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and path[0] == "messages" and part in ChatMessage.model_fields:
            name += f".{part}"
    if first["type"] == "unsupported":
        return InvalidRequest(f"`{name}` is not supported yet", param=name, code="unsupported_parameter")
    if first["type"] in ("extra_forbidden", "missing"):
        field = name if name.endswith(str(path[-1])) else f"{name}.{path[-1]}"
        if first["type"] == "missing":
            return InvalidRequest(f"`{field}` is missing", param=field, code="missing_required_parameter")
        return InvalidRequest(f"`{field}` is not a known field", param=field, code="unknown_parameter")
    shown = repr(first["input"])
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    message = first["msg"].replace("Input should be", "should be")
    return InvalidRequest(f"`{name}`: {message}; got {shown}", param=name, code="invalid_value")
