"""Request schema and error format of the OpenAI-compatible API.

Unknown fields are errors, so that no setting is silently ignored. Source: OpenAI, "API reference",
Completions and Errors; top_k, min_p and repetition_penalty are extensions, as in vLLM.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanogpt.config import SamplingConfig

# Sequences of one request.
MAX_SEQUENCES = 128
# Tokens of one prompt; the model uses only the last ones, up to its context length.
MAX_PROMPT_TOKENS = 65_536
# Sequences x tokens x (1 + logprobs) of one request: bounds a response to a few hundred megabytes.
MAX_WORK = 500_000

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

PROMPT_LIST_LIMITS = Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0)]],
    Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True),
]
LogitBias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class StrictModel(BaseModel):
    """A schema without type conversion or unknown fields, in which null means the default."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(StrictModel):
    """Options for streaming responses."""

    include_usage: bool = False
    """End the stream with the token counts."""
    include_obfuscation: bool = False
    """Accepted and ignored."""


class CompletionRequest(StrictModel):
    """The body of a completion request. A value of null means the default."""

    model: Annotated[str, Field(max_length=256)]
    """Name of a model, as listed by /v1/models."""
    prompt: (
        str
        | Annotated[list[str], PROMPT_LIST_LIMITS]
        | TokenIds
        | Annotated[list[TokenIds], PROMPT_LIST_LIMITS]
    ) = ""
    """Text, token ids, or a list of either. An empty prompt starts a new text."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_WORK)] = 16
    """Maximum generated tokens per sequence."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divisor of the logits; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens with at least this total probability."""
    top_k: Annotated[int | None, Field(ge=1)] = None
    """Sample from the k most probable tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Minimum probability, as a fraction of the most probable token's."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Penalty on tokens that already occurred; 1 means none."""
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 1
    """Sequences per prompt, with consecutive seeds."""
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    """Seed of the random numbers. [default: a new one for each request]"""
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] = []
    """Strings that end the text; they are not part of it."""
    logit_bias: Annotated[dict[str, LogitBias], Field(max_length=1024)] = {}
    """Values added to the logits, by token id."""
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    """Return log-probabilities, with this number of most probable alternatives per token."""
    echo: bool = False
    """Return the prompt in front of the text."""
    stream: bool = False
    """Send the text as server-sent events while it is generated."""
    stream_options: StreamOptions = StreamOptions()
    """Options for streaming responses."""
    best_of: int | None = None
    """Must equal n if given."""
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Must be 0; see repetition_penalty."""
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Must be 0; see repetition_penalty."""
    suffix: Annotated[str | None, Field(max_length=0)] = None
    """Not supported (no infilling)."""
    user: str = ""
    """Accepted and ignored."""

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list, even if there is only one."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else self.prompt  # type: ignore[return-value, list-item]

    def sampling(self, vocab_size: int) -> SamplingConfig:
        """Return the sampling settings.

        Raises:
            ApiError: If `logit_bias` names a token that is not in the vocabulary.
        """
        bias = {}
        for token, value in self.logit_bias.items():
            is_number = token.isascii() and token.isdigit() and len(token) < 10
            if not is_number or int(token) >= vocab_size:
                message = f"logit_bias: no such token: {token[:40]!r} (limit {vocab_size - 1})."
                raise ApiError(400, message, "logit_bias")
            bias[int(token)] = value
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        settings = self.model_dump(include=set(SamplingConfig.model_fields))
        return SamplingConfig(**settings | {"logit_bias": bias, "stop": stop})


class ApiError(HTTPException):
    """An error response.

    Args:
        status: The HTTP status.
        message: What failed, and what to do.
        param: The request field that caused it.
        code: A stable identifier for programs.
        headers: Additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def content(self) -> dict[str, Any]:
        """Return the error object of the API."""
        default_type = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error_type = ERROR_TYPES.get(self.status_code, default_type)
        error = {"message": self.detail, "type": error_type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """Return the error as an HTTP response."""
        return json_response(self.content(), self.status_code, self.headers)


def to_json(content: Any) -> str:
    """Return JSON in ASCII, because strings may hold lone surrogates, which UTF-8 cannot encode."""
    return json.dumps(content, separators=(",", ":"))


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response with a JSON body."""
    return Response(to_json(content), status, headers, "application/json")


def internal_error(error: Exception) -> ApiError:
    """Return the error response for an unexpected exception."""
    if isinstance(error, ApiError):
        return error
    message = f"Internal server error: {type(error).__name__}. See the server's log."
    return ApiError(500, message, code="server_error")


def invalid_value(param: str, problem: str, code: str = "invalid_value") -> ApiError:
    """Return the error response for a request field with an invalid value."""
    return ApiError(400, f"{param}: {problem}", param, code)


def validation_error(problems: Sequence[Any]) -> ApiError:
    """Return the error response for the first invalid field of a request."""
    loc = problems[0]["loc"]
    if loc[0] == "body" and (len(loc) == 1 or isinstance(loc[1], int)):
        message = "The body is not a JSON object. Send one as Content-Type: application/json."
        return ApiError(400, message, code="invalid_json")
    param = str(loc[1] if loc[0] == "body" else loc[0])
    if problems[0]["type"] == "extra_forbidden":
        message = f"Unknown parameter: {param[:80]!r}."
        return ApiError(400, message, param[:80], "unknown_parameter")
    field_problems = [problem for problem in problems if problem["loc"][:2] == loc[:2]]
    messages = dict.fromkeys(problem["msg"].lower() for problem in field_problems)
    return invalid_value(param, f"{'; or '.join(messages)}.")
