"""Routes of the OpenAI-compatible API: models, completions, health and metrics.

Source: OpenAI, "API reference", Completions and Models.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanogpt.errors import UserError
from nanogpt.server import schemas
from nanogpt.server.async_engine import AsyncEngine, GenerationJob
from nanogpt.server.model_pool import ModelPool
from nanogpt.server.responses import Completion, Prompt, prompt_logprobs
from nanogpt.server.schemas import CompletionRequest, invalid_value, json_response
from nanogpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanogpt.generate.sequence import Request

# Longer prompts are encoded in another thread, so that they do not block the event loop.
INLINE_ENCODE_CHARS = 2_000
# The status nginx defined for requests whose client has disconnected.
CLIENT_CLOSED_REQUEST = 499

router = fastapi.APIRouter()


@router.get("/healthz")
async def healthz() -> Response:
    """Liveness probe."""
    return json_response({"status": "ok"})


@router.get("/metrics")
async def metrics(request: fastapi.Request) -> Response:
    """Return the server's metrics in the text format of Prometheus."""
    models: ModelPool = request.app.state.models
    running = {name: engine.running for name, engine in models.engines.items()}
    waiting = {name: engine.waiting for name, engine in models.engines.items()}
    text = models.metrics.render(running, waiting)
    return Response(text, media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def list_models(request: fastapi.Request) -> Response:
    """List the models."""
    files = request.app.state.models.files()
    data = [_model_info(name, file) for name, file in files.items()]
    return json_response({"object": "list", "data": data})


@router.get("/v1/models/{name}")
async def get_model(name: str, request: fastapi.Request) -> Response:
    """Return one model."""
    return json_response(_model_info(name, request.app.state.models.find(name)))


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: fastapi.Request) -> Response:
    """Generate `n` continuations of each prompt."""
    if body.best_of not in (None, body.n):
        problem = f"{body.best_of} is not supported. Leave it out, or set it to n."
        raise invalid_value("best_of", problem)
    return await _cancel_on_disconnect(request, _complete(body, request.app.state.models))


async def _complete(body: CompletionRequest, models: ModelPool) -> Response:
    engine = await models.get_engine(body.model)
    _check_limits(body, engine)
    tokenizer = engine.model.tokenizer
    with engine.pinned():
        prompts = [await _make_prompt(prompt, body, engine) for prompt in body.prompts()]
    requests = _make_requests(body, prompts, tokenizer.vocab_size)
    job = engine.submit(requests, body.stream)
    try:
        completion = Completion(body, prompts, tokenizer)
        models.metrics.count_tokens(engine.name, "prompt", completion.prompt_tokens)
        # Before the status is sent, wait for the first token of a stream, or for all tokens.
        outputs = await anext(job.stream())
        if body.max_tokens and not job.num_tokens:  # timed out in the queue
            raise engine.busy_error()
        if body.stream:
            return EventStream(completion.to_sse(job, outputs), job)
        return json_response(completion.to_response(outputs))
    except BaseException:
        job.cancel()
        raise


def _make_requests(
    body: CompletionRequest, prompts: list[Prompt], vocab_size: int
) -> "list[Request]":
    """Return the engine's requests, `n` for each prompt."""
    from nanogpt.api import new_seed
    from nanogpt.generate.sequence import Request

    settings = body.sampling(vocab_size)
    seed = new_seed() if body.seed is None else body.seed
    return [
        Request(prompt.ids, settings, (seed + i) % 2**63, body.logprobs or 0)
        for prompt in prompts
        for i in range(body.n)
    ]


class EventStream(StreamingResponse):
    """A stream of server-sent events that cancels its job when the client disconnects."""

    def __init__(self, events: AsyncIterator[bytes], job: GenerationJob):
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def _cancel_on_disconnect(
    request: fastapi.Request, response: Coroutine[Any, Any, Response]
) -> Response:
    """Await a response, but cancel it as soon as the client disconnects."""
    task = asyncio.ensure_future(response)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        task.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(request: fastapi.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a prompt. Raises `ApiError` for a lone surrogate."""
    try:
        if len(text) < INLINE_ENCODE_CHARS:
            return tokenizer.encode(text)
        return await asyncio.to_thread(tokenizer.encode, text)
    except UserError as error:
        raise invalid_value("prompt", str(error)) from error


async def _make_prompt(
    prompt: str | list[int], body: CompletionRequest, engine: AsyncEngine
) -> Prompt:
    """Encode a prompt, with its log-probabilities if requested. Raises `ApiError` if invalid."""
    from nanogpt.generate.prompts import encode_prompt

    model = engine.model
    tokenizer = model.tokenizer
    ids = prompt if isinstance(prompt, list) else await _encode(prompt, tokenizer)
    if len(ids) > schemas.MAX_PROMPT_TOKENS:
        problem = f"too long: {len(ids):,} tokens (limit {schemas.MAX_PROMPT_TOKENS:,})."
        raise invalid_value("prompt", problem, "context_length_exceeded")
    if max(ids, default=0) >= tokenizer.vocab_size:
        problem = f"no such token: {max(ids)} (limit {tokenizer.vocab_size - 1})."
        raise invalid_value("prompt", problem)
    if not ids:
        return Prompt(encode_prompt(tokenizer, None, model.summary["unseen_token_ranges"], 1), "")
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    num_top = body.logprobs
    if not body.echo or num_top is None:
        return Prompt(ids, text)
    if len(ids) > engine.context_length:
        size = f"{len(ids):,} tokens (limit {engine.context_length:,})"
        problem = f"too long for echo with logprobs: {size}."
        raise invalid_value("prompt", problem, "context_length_exceeded")
    logprobs = await engine.call(lambda model: prompt_logprobs(model, ids, num_top))
    return Prompt(ids, text, logprobs)


def _check_limits(body: CompletionRequest, engine: AsyncEngine) -> None:
    """Raise `ApiError` if the request asks for more than the server allows."""
    num_sequences = len(body.prompts()) * body.n
    if num_sequences > engine.capacity:
        problem = f"too many sequences: {num_sequences} (limit {engine.capacity})."
        raise invalid_value("n", problem)
    work = num_sequences * body.max_tokens * (1 + (body.logprobs or 0))
    if work > schemas.MAX_WORK:
        size = f"{work:,} (limit {schemas.MAX_WORK:,})"
        problem = f"sequences x max_tokens x (1 + logprobs) is too large: {size}."
        raise invalid_value("max_tokens", problem)


def _model_info(name: str, file: Path) -> dict[str, Any]:
    created = int(file.stat().st_mtime)
    return {"id": name, "object": "model", "created": created, "owned_by": "nanogpt"}
