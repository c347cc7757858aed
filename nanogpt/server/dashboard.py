"""The page: its static files, the logs of runs, and the inspection of models.

Names in requests are looked up among the existing runs and models; none becomes a path.
Models are inspected in the thread of their engine, between two decoding steps.
"""

import asyncio
import base64
import importlib.metadata
import importlib.resources
import math
import mimetypes
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from nanogpt.config import SamplingConfig
from nanogpt.server import run_reader
from nanogpt.server.schemas import ApiError, json_response

if TYPE_CHECKING:  # imports torch, which the page does not need
    from nanogpt.inspection.inspector import Inspector

WEB = Path(__file__).parent.parent / "web"
MAX_TEXT_CHARS = 200_000
MAX_ATTENTION_WEIGHTS = 1 << 21  # 8 MB as float32
POLL_SECONDS = 1.0
KEEPALIVE_SECONDS = 15.0
# Everything comes from this server. plotly.js inserts style sheets, which only 'unsafe-inline'
# allows; scripts stay restricted.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NO_STORE = SECURITY_HEADERS | {"Cache-Control": "no-store"}
NO_CACHE = SECURITY_HEADERS | {"Cache-Control": "no-cache"}

router = APIRouter(include_in_schema=False)


class InspectRequest(BaseModel):
    """A model and a text to inspect."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(max_length=256)]
    text: Annotated[str, Field(max_length=MAX_TEXT_CHARS)] = ""


class NeuronRequest(InspectRequest):
    """A neuron of a model, by its layer and index."""

    layer: Annotated[int, Field(ge=0)] = 0
    neuron: Annotated[int | None, Field(ge=0)] = None


@router.get("/")
def index() -> Response:
    """Return the page."""
    headers = NO_CACHE | {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return FileResponse(WEB / "index.html", headers=headers)


@router.get("/page/plotly.js")
def plotly(request: Request) -> Response:
    """Return plotly.js of the installed plotly package; browsers cache it."""
    etag = f'"plotly-{importlib.metadata.version("plotly")}"'
    headers = SECURITY_HEADERS | {"Cache-Control": "max-age=86400", "ETag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    script = importlib.resources.files("plotly").joinpath("package_data/plotly.min.js")
    return Response(script.read_bytes(), media_type="text/javascript", headers=headers)


@router.get("/page/settings")
def settings() -> Response:
    """Return the JSON schema of the sampling settings: help, defaults and limits."""
    return json_response(SamplingConfig.model_json_schema()["properties"], headers=NO_STORE)


@router.get("/page/events")
async def events(request: Request) -> Response:
    """Stream a server-sent event at once and whenever a run or a model file has changed."""
    state = request.app.state

    async def stream() -> AsyncIterator[str]:
        seen: Any = None
        idle_seconds = 0.0
        while not state.stopping.is_set():
            current = await asyncio.to_thread(run_reader.fingerprint, state.models.path)
            if current != seen or idle_seconds >= KEEPALIVE_SECONDS:
                yield "data: changed\n\n" if current != seen else ": keep-alive\n\n"
                seen, idle_seconds = current, 0.0
            idle_seconds += POLL_SECONDS
            with suppress(TimeoutError):
                await asyncio.wait_for(state.stopping.wait(), POLL_SECONDS)

    return StreamingResponse(stream(), media_type="text/event-stream", headers=NO_STORE)


@router.get("/page/runs")
def list_runs(request: Request) -> Response:
    """Return a summary of every run, most recently written first."""
    folders = run_reader.list_runs(request.app.state.models.path).values()
    return json_response([run_reader.summarize(folder) for folder in folders], headers=NO_STORE)


@router.get("/page/runs/{name}/{kind}")
def tail_log(request: Request, name: str, kind: str, offset: int = 0, file: str = "") -> Response:
    """Return the new part of a run's metrics or samples; see `run_reader.news`."""
    folder = run_reader.list_runs(request.app.state.models.path).get(name)
    if folder is None or kind not in ("metrics", "samples"):
        raise ApiError(404, f"There is no run {name[:80]!r} here.")
    read = run_reader.read_new_metrics if kind == "metrics" else run_reader.read_new_lines
    log = run_reader.log_path(folder, f"{kind}.jsonl")
    return json_response(read(log, offset, file), headers=NO_STORE)


@router.post("/page/inspect/surprisal")
async def surprisal(request: Request, body: InspectRequest) -> Response:
    """Return the surprisal of each token; see `inspection.results.Surprisal`."""
    return await _inspect(request, body, lambda inspector: inspector.surprisal().asdict())


@router.post("/page/inspect/attention")
async def attention(request: Request, body: InspectRequest) -> Response:
    """Return attention weights of the text's first tokens.

    `weights` is base64 of little-endian float32, (layers, heads, T, T) for T `token_texts`;
    `num_tokens` counts the tokens of the whole text.
    """

    def inspect(inspector: "Inspector") -> dict[str, Any]:
        config, tokenizer = inspector.model.config, inspector.tokenizer
        layers, heads = config.n_layer, config.n_head
        ids = tokenizer.encode(body.text)
        max_tokens = math.isqrt(MAX_ATTENTION_WEIGHTS // (layers * heads))
        result = replace(inspector, text=tokenizer.decode(ids[:max_tokens])).attention()
        return {
            "token_texts": result.token_texts,
            "num_tokens": len(ids),
            "layers": layers,
            "heads": heads,
            "weights": base64.b64encode(result.weights.astype("<f4").tobytes()).decode(),
        }

    return await _inspect(request, body, inspect)


@router.post("/page/inspect/neurons")
async def neurons(request: Request, body: NeuronRequest) -> Response:
    """Return a neuron's activations, and `layers`, the number of layers.

    See `inspection.results.NeuronActivations`.
    """

    def inspect(inspector: "Inspector") -> dict[str, Any]:
        result = inspector.neurons(body.layer, body.neuron).asdict()
        return result | {"layers": inspector.model.config.n_layer}

    return await _inspect(request, body, inspect)


@router.post("/page/inspect/excerpts")
async def excerpts(request: Request, body: NeuronRequest) -> Response:
    """Return the held-out passages with a neuron's highest activations."""

    def inspect(inspector: "Inspector") -> list[dict[str, Any]]:
        found = inspector.top_activating_excerpts(body.layer, body.neuron or 0)
        return [excerpt.asdict() for excerpt in found]

    return await _inspect(request, body, inspect)


@router.post("/page/inspect/embedding")
async def embedding(request: Request, body: InspectRequest) -> Response:
    """Return the token embedding in two dimensions; see `inspection.results.Embedding`."""
    return await _inspect(request, body, lambda inspector: inspector.embedding().asdict())


@router.post("/page/memorization")
async def memorization(request: Request, body: InspectRequest) -> Response:
    """Return the passages of a text that occur in the training text, with a baseline."""
    return await _inspect(request, body, lambda inspector: inspector.memorization().asdict())


@router.get("/page/{name}")
def static_file(name: str) -> Response:
    """Return a style sheet, script or picture of the page."""
    files = {path.name: path for path in WEB.iterdir() if path.suffix in (".css", ".js", ".svg")}
    path = files.get(name)
    if path is None:
        raise ApiError(404, f"The page has no {name[:80]!r}.")
    # Some systems map .js to another type.
    kind = "text/javascript" if path.suffix == ".js" else mimetypes.types_map[path.suffix]
    return FileResponse(path, media_type=kind, headers=NO_CACHE)


async def _inspect(
    request: Request, body: InspectRequest, inspect: Callable[["Inspector"], Any]
) -> Response:
    """Inspect the text in the thread of the model's engine."""
    engine = await request.app.state.models.get_engine(body.model)
    result = await engine.call(lambda model: inspect(model.inspect(body.text)))
    return json_response(result, headers=NO_STORE)
