"""The requests of the API as pydantic models: field by field what OpenAI documents, and vLLM's additions.

Types are strict (no `"5"` for 5), unknown fields are refused by name, NaN and Infinity are no numbers. A field
of OpenAI's that is not supported yet stands here too, with the values that ask for nothing (`NEUTRAL`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from holdfast.core.errors import InvalidRequest

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_processors": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Values, beside null, at which an unsupported field is accepted because it changes nothing."""


def _unsupported(name: str) -> Any:
    """A field of which only the NEUTRAL values pass."""
    return Field(None, json_schema_extra={"enum": [None, *NEUTRAL[name]]})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    """A last chunk without choices carries the usage."""
    continuous_usage_stats: bool | None = None
    """Every chunk carries the usage so far."""
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(_Strict):
    """What completions and chat completions share."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0)
    echo: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    request_id: str | None = Field(None, min_length=1, max_length=200)
    return_token_ids: bool | None = None
    user: str | None = None
    logit_processors: Any = _unsupported("logit_processors")

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name, None)
            if value is not None and value not in neutral:
                raise InvalidRequest(f"`{name}` is not supported yet", param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` needs `stream` to be true", param="stream_options")
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    best_of: int | None = Field(None, ge=1, le=128)
    logprobs: int | None = Field(None, ge=0)
    suffix: Any = _unsupported("suffix")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class OtherPart(BaseModel):
    """A part that is not text; refused by its type's name."""

    model_config = ConfigDict(extra="allow")

    type: str


class ChatMessage(BaseModel):
    """One message. Fields beyond these reach the template, unless they are null."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | OtherPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    # Not supported: refused unless null or empty.
    audio: Any = Field(None, json_schema_extra={"enum": [None]})
    function_call: Any = Field(None, json_schema_extra={"enum": [None]})
    tool_calls: Any = Field(None, json_schema_extra={"enum": [None, []]})


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    audio: Any = _unsupported("audio")
    function_call: Any = _unsupported("function_call")
    functions: Any = _unsupported("functions")
    modalities: Any = _unsupported("modalities")
    parallel_tool_calls: Any = _unsupported("parallel_tool_calls")
    prediction: Any = _unsupported("prediction")
    reasoning_effort: Any = _unsupported("reasoning_effort")
    response_format: Any = _unsupported("response_format")
    service_tier: Any = _unsupported("service_tier")
    store: Any = _unsupported("store")
    tool_choice: Any = _unsupported("tool_choice")
    tools: Any = _unsupported("tools")
    verbosity: Any = _unsupported("verbosity")
    web_search_options: Any = _unsupported("web_search_options")


class TokenizeRequest(_Strict):
    """Body of POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(_Strict):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


Body = TypeVar("Body", bound=BaseModel)


def parse_body(kind: type[Body], data: bytes) -> Body:
    """The request in a JSON body. Raises `InvalidRequest` naming the field, the value and what is allowed."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def _refusal(error: ValidationError) -> InvalidRequest:
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
    if first["type"] == "extra_forbidden":
        field = name if name.endswith(str(path[-1])) else f"{name}.{path[-1]}"
        return InvalidRequest(f"`{field}` is not a known field", param=field, code="unknown_parameter")
    if first["type"] == "missing":
        field = name if name.endswith(str(path[-1])) else f"{name}.{path[-1]}"
        return InvalidRequest(f"`{field}` is missing", param=field, code="missing_required_parameter")
    shown = repr(first["input"])
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    message = first["msg"].replace("Input should be", "should be")
    return InvalidRequest(f"`{name}`: {message}; got {shown}", param=name, code="invalid_value")
