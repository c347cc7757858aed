"""The OpenAI-compatible API: models, completions, health and counts.

In: a `CompletionRequest`. Out: its texts, whole or as server-sent events, with log-probabilities and the counts of tokens.
Refuses: what `wire` does, and more than there is room for.
Source: OpenAI, "API reference", Completions and Models.
"""

import asyncio
import difflib
from collections.abc import AsyncIterator, Collection, Coroutine
from typing import TYPE_CHECKING, Any

import fastapi
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanogpt.errors import UserError
from nanogpt.serve.answer import Answer, Prompt, tokens_of
from nanogpt.serve.models import Models
from nanogpt.serve.wire import PROMPT_TOKENS, WORK, ApiError, CompletionRequest, as_json
from nanogpt.serve.worker import Job, Worker
from nanogpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanogpt.generate import Request

QUICK = 2_000  # characters of a prompt that become tokens at once; more do so in another thread, and others need not wait
GONE = 499  # the status of an answer that nobody waits for any more, which nginx gave it
router = fastapi.APIRouter()


@router.get("/healthz")
async def healthz() -> Response:
    """Whether the server lives."""
    return as_json({"status": "ok"})


@router.get("/metrics")
async def metrics(request: fastapi.Request) -> Response:
    """What it has done and is doing, for Prometheus."""
    models: Models = request.app.state.models
    active, waiting = ({worker.name: getattr(worker, what) for worker in models.workers} for what in ("active", "waiting"))
    return Response(models.metrics.text(active, waiting).encode(errors="backslashreplace"), media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def list_models(request: fastapi.Request) -> Response:
    """The models that can be asked."""
    files = request.app.state.models.files()
    return as_json({"object": "list", "data": [_about(name, file.stat().st_mtime) for name, file in files.items()]})


@router.get("/v1/models/{name}")
async def get_model(name: str, request: fastapi.Request) -> Response:
    """One of them."""
    files = request.app.state.models.files()
    if name not in files:
        raise _unknown_model(name, files)
    return as_json(_about(name, files[name].stat().st_mtime))


@router.post("/v1/completions")
async def complete(asked: CompletionRequest, request: fastapi.Request) -> Response:
    """Continue one prompt or several, each with one text or several."""
    models: Models = request.app.state.models
    if asked.best_of not in (None, asked.n):
        raise ApiError(400, f"best_of: only as many as n = {asked.n} are written, and all of them are shown.", "best_of", "invalid_value")
    return await _while_there(request, _complete(asked, models))


async def _complete(asked: CompletionRequest, models: Models) -> Response:
    try:
        worker = await models.open(asked.model)
    except KeyError:
        raise _unknown_model(asked.model, models.files()) from None
    _require_bounds(asked, worker)
    with worker.used():
        prompts = [await _prompt(given, asked, worker) for given in asked.prompts()]
    job = worker.submit(_requests(asked, prompts, worker.model.tokenizer.vocab_size), asked.stream, models.settings.seconds)
    try:
        answer = Answer(asked, prompts, worker.model.tokenizer)
        models.metrics.count_tokens(worker.name, "prompt", answer.prompt_tokens)
        if not asked.stream:
            whole = await answer.whole(job)
            _require_some(asked, job, worker)
            return as_json(whole)
        made = await anext(job.pieces())  # before the status is sent, which may still have to be another
        _require_some(asked, job, worker)
        return EventStream(answer.events(job, made), job)
    except BaseException:
        job.cancel()
        raise


def _requests(asked: CompletionRequest, prompts: list[Prompt], vocab_size: int) -> "list[Request]":
    """What the engine is to write."""
    from nanogpt.generate import Request
    from nanogpt.library import new_seed

    settings, first = asked.sampling(vocab_size), new_seed() if asked.seed is None else asked.seed
    return [Request(prompt.ids, settings, (first + i) % 2**63, asked.logprobs or 0) for prompt in prompts for i in range(asked.n)]


class EventStream(StreamingResponse):
    """Events of a job, which is given up when the client is gone."""

    def __init__(self, events: AsyncIterator[bytes], job: Job):
        super().__init__(events, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def _while_there(request: fastapi.Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What the work gives; it is cancelled as soon as the client is gone."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else Response(status_code=GONE)
    finally:
        working.cancel()
        leaving.cancel()


async def _leaving(request: fastapi.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Errors: `ApiError` for half a surrogate pair."""
    try:
        return tokenizer.encode(text) if len(text) < QUICK else await asyncio.to_thread(tokenizer.encode, text)
    except UserError as error:
        raise ApiError(400, f"prompt: {error}", "prompt", "invalid_value") from error


async def _prompt(given: str | list[int], asked: CompletionRequest, worker: Worker) -> Prompt:
    """Errors: `ApiError` for one that is too long, or no text or tokens of the model's."""
    from nanogpt.generate import encode_prompt

    model, tokenizer = worker.model, worker.model.tokenizer
    ids = given if isinstance(given, list) else await _encoded(given, tokenizer)
    if len(ids) > PROMPT_TOKENS:
        raise ApiError(400, f"prompt: it has {len(ids):,} tokens; at most {PROMPT_TOKENS:,} are taken.", "prompt", "context_length_exceeded")
    if max(ids, default=0) >= tokenizer.vocab_size:
        raise ApiError(400, f"prompt: there is no token {max(ids)}; the vocabulary goes from 0 to {tokenizer.vocab_size - 1}.", "prompt", "invalid_value")
    if not ids:
        return Prompt(encode_prompt(tokenizer, None, model.summary["unused"], 1), "")
    text = given if isinstance(given, str) else tokenizer.decode(given)
    if not asked.echo or asked.logprobs is None:
        return Prompt(ids, text)
    if len(ids) > worker.context_length:
        what = f"prompt: it has {len(ids):,} tokens; with echo and logprobs, the {worker.context_length:,} that the model looks back on are taken at most."
        raise ApiError(400, what, "prompt", "context_length_exceeded")
    n_top = asked.logprobs
    return Prompt(ids, text, await worker.call(lambda model: tokens_of(model, ids, n_top)))


def _require_bounds(asked: CompletionRequest, worker: Worker) -> None:
    """Errors: `ApiError` for more than one request may ask for."""
    texts = len(asked.prompts()) * asked.n
    if texts > worker.places:
        raise ApiError(400, f"n: {texts} texts were asked for, and there is room for {worker.places}.", "n", "invalid_value")
    if (work := texts * asked.max_tokens * (1 + (asked.logprobs or 0))) > WORK:
        what = f"max_tokens: texts x max_tokens x (1 + logprobs) is {work:,}; one request may ask for {WORK:,}."
        raise ApiError(400, what, "max_tokens", "invalid_value")


def _require_some(asked: CompletionRequest, job: Job, worker: Worker) -> None:
    """Errors: `Busy` where the time was over before the first token."""
    if asked.max_tokens and not job.tokens:
        raise worker.busy()


def _unknown_model(name: str, there: Collection[str]) -> ApiError:
    near = difflib.get_close_matches(name, there, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(sorted(there)[:20])}." if there else " There is none yet."
    return ApiError(404, f"There is no model {name[:80]!r}.{meant}", "model", "model_not_found")


def _about(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "nanogpt"}
