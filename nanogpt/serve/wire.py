"""What goes over the wire: a request as the OpenAI API words it, and errors in its shape.

In: JSON. Out: a `CompletionRequest` whose every value is in range, or an `ApiError`. Refuses: what it does not know, so that no setting is silently ignored.
Source: OpenAI, "API reference", Completions and Errors. top_k, min_p and repetition_penalty are not in it; other servers of open models take them too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanogpt.config import SamplingConfig

TEXTS = 128  # of one request
PROMPT_TOKENS = 65_536  # of one prompt; the model looks back on its own context
WORK = 500_000  # tokens of one request, each counted once more for every alternative beside it: some hundred megabytes
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=PROMPT_TOKENS, fail_fast=True)]
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # of errors, by status
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(_Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    """Whether it ends with the counts of tokens."""
    include_obfuscation: bool = False
    """Taken and ignored: there is nothing to hide on one's own machine."""


class CompletionRequest(_Strict):
    """What to write. A value of null means the default."""

    model: Annotated[str, Field(max_length=256)]
    """A name of /v1/models."""
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=TEXTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=TEXTS, fail_fast=True)]
    ) = ""
    """What to continue: a text, several, its tokens, or those of several. Empty, it is the beginning of a text."""
    max_tokens: Annotated[int, Field(ge=0, le=WORK)] = 16
    """The most tokens of each text."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Below 1 plays it safe, above 1 is bold, 0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: Annotated[int | None, Field(ge=1)] = None
    """Draw from so many of the likeliest tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Draw from tokens at least this share as likely as the likeliest."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens that occurred already are drawn less."""
    n: Annotated[int, Field(ge=1, le=TEXTS)] = 1
    """Texts for each prompt; the second has the next seed, and so on."""
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    """Same seed, same text; none, another text each time."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] = Field([], validate_default=False)
    """End before one of these."""
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    """What is added to the logits of tokens, by token."""
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    """Tell each token's log-probability, and so many of the likeliest ones."""
    echo: bool = False
    """Begin the text with the prompt."""
    stream: bool = False
    """Send the text as it is made, as server-sent events."""
    stream_options: StreamOptions = StreamOptions()
    """What the stream tells beside it."""
    best_of: int | None = None
    """Only as many as n: nothing is written that is not shown."""
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Only 0: see repetition_penalty."""
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Only 0: see repetition_penalty."""
    suffix: Annotated[str | None, Field(max_length=0)] = None
    """Not there: these models only write forwards."""
    user: str = ""
    """Taken and ignored."""

    def prompts(self) -> list[str] | list[list[int]]:
        """One for each text, or n texts, to write."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[return-value, list-item]

    def sampling(self, vocab_size: int) -> SamplingConfig:
        """The settings of the sampler. Errors: `ApiError` for a bias on what is no token."""
        bias = {}
        for token, value in self.logit_bias.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
                raise ApiError(400, f"logit_bias: {token[:40]!r} is no token; the vocabulary goes from 0 to {vocab_size - 1}.", "logit_bias")
            bias[int(token)] = value
        return SamplingConfig(
            max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, logit_bias=bias, stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
        )  # fmt: skip


class ApiError(HTTPException):
    """An answer that is none: status, what happened, and the field of the request that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def content(self) -> dict[str, Any]:
        """The API's shape."""
        kind = "server_error" if self.status_code >= 500 else KINDS.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """As an answer."""
        return as_json(self.content(), self.status_code, self.headers)


def dumps(content: Any) -> str:
    """JSON in ASCII: a name in a request may hold half a surrogate pair, which no UTF-8 can."""
    return json.dumps(content, separators=(",", ":"))


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(dumps(content), status, headers, "application/json")


def failure(error: Exception) -> ApiError:
    """What is told of a defect of ours."""
    return error if isinstance(error, ApiError) else ApiError(500, f"The server failed: {type(error).__name__}. Its log tells more.", code="server_error")


def explain(problems: Sequence[Any]) -> ApiError:
    """What is wrong with the first field that is."""
    where = problems[0]["loc"]
    if where[0] == "body" and (len(where) == 1 or isinstance(where[1], int)):
        return ApiError(400, "The body is not a JSON object. Send one, with the header Content-Type: application/json.", code="invalid_json")
    param = str(where[1] if where[0] == "body" else where[0])
    said = dict.fromkeys(problem["msg"].lower() for problem in problems if problem["loc"][:2] == where[:2])
    if problems[0]["type"] == "extra_forbidden":
        return ApiError(400, f"There is no parameter {param[:80]!r}.", param[:80], "unknown_parameter")
    return ApiError(400, f"{param}: {'; or '.join(said)}.", param, "invalid_value")
