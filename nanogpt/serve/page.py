"""The page: one HTML file with its modules, plotly.js from where it is installed, and what the page asks for.

In: requests that have passed the guard. Out: files of `web/`, logs as they grow, and a model's insides; all of it data, which the page shows as text.
Refuses: every file that is not in `web/`, and runs and models that are not in their lists: no name ever becomes a path.

A model is looked into in its worker's thread, between two steps of what it writes.
"""

import base64
import importlib.metadata
import importlib.resources
import math
import mimetypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from nanogpt.config import SamplingConfig
from nanogpt.errors import UserError
from nanogpt.serve import runs
from nanogpt.serve.wire import ApiError, as_json

if TYPE_CHECKING:  # it imports torch, which the page of a folder of runs does without
    from nanogpt.library import Model

WEB = Path(__file__).parent.parent / "web"
TEXT = 200_000  # characters that may be looked into
WEIGHTS = 1 << 21  # of attention, that a page is sent: eight megabytes
# All comes from this server. Plotly writes style sheets into the document, which nothing less than 'unsafe-inline' lets it do; no script can come in by that.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
FRESH = SAFE | {"Cache-Control": "no-store"}

router = APIRouter(include_in_schema=False)


class _Question(BaseModel):
    """What is to be looked into."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(max_length=256)]
    text: Annotated[str, Field(max_length=TEXT)] = ""


class _NeuronQuestion(_Question):
    layer: Annotated[int, Field(ge=0)] = 0
    neuron: Annotated[int | None, Field(ge=0)] = None


@router.get("/")
def index() -> Response:
    """The page itself."""
    return FileResponse(WEB / "index.html", headers=SAFE | {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})


@router.get("/page/plotly.js")
def plotly(request: Request) -> Response:
    """The script that the package plotly brings along; a browser keeps it."""
    version = f'"plotly-{importlib.metadata.version("plotly")}"'
    headers = SAFE | {"Cache-Control": "max-age=86400", "ETag": version}
    if request.headers.get("if-none-match") == version:
        return Response(status_code=304, headers=headers)
    return Response(importlib.resources.files("plotly").joinpath("package_data/plotly.min.js").read_bytes(), media_type="text/javascript", headers=headers)


@router.get("/page/settings")
def settings() -> Response:
    """The settings of sampling as JSON Schema: what each does, its default and its limits."""
    return as_json(SamplingConfig.model_json_schema()["properties"], headers=FRESH)


@router.get("/page/runs")
def list_runs(request: Request) -> Response:
    """Every run, the one last written to first."""
    return as_json([runs.overview(folder) for folder in runs.find(request.app.state.runs).values()], headers=FRESH)


@router.get("/page/runs/{name}/{kind}")
def follow(request: Request, name: str, kind: str, offset: int = 0, file: str = "") -> Response:
    """What a run's metrics or samples have to tell since the last time: see `runs.news`."""
    folder = runs.find(request.app.state.runs).get(name)
    if folder is None or kind not in ("metrics", "samples"):
        raise ApiError(404, f"There is no run {name[:80]!r} here.")
    read = runs.metrics if kind == "metrics" else runs.news
    return as_json(read(runs.log(folder, f"{kind}.jsonl"), offset, file), headers=FRESH)


@router.post("/page/look/surprise")
async def surprise(request: Request, question: _Question) -> Response:
    """How well the model foresaw each token of a text: see `look.findings.Surprise`."""
    return await _look(request, question, lambda model: model.look(question.text).surprise().asdict())


@router.post("/page/look/attention")
async def attention(request: Request, question: _Question) -> Response:
    """Where each token of the text's beginning looks: `weights` is base64 of float32, (layers, heads, T, T) for T `pieces`, of `length` tokens in all."""

    def look(model: "Model") -> dict[str, Any]:
        ids, config = model.tokenizer.encode(question.text), model.look("").model.config
        layers, heads = config.n_layer, config.n_head
        found = model.look(model.tokenizer.decode(ids[: math.isqrt(WEIGHTS // (layers * heads))])).attention()
        weights = base64.b64encode(found.weights.astype("<f4").tobytes()).decode()
        return {"pieces": found.pieces, "length": len(ids), "layers": layers, "heads": heads, "weights": weights}

    return await _look(request, question, look)


@router.post("/page/look/neurons")
async def neurons(request: Request, question: _NeuronQuestion) -> Response:
    """What a neuron does while the text is read: see `look.findings.Neurons`; and how many `layers` there are to choose from."""

    def look(model: "Model") -> dict[str, Any]:
        look = model.look(question.text)
        return look.neurons(question.layer, question.neuron).asdict() | {"layers": look.model.config.n_layer}

    return await _look(request, question, look)


@router.post("/page/look/exciting")
async def exciting(request: Request, question: _NeuronQuestion) -> Response:
    """The held-out passages that a neuron responds to most. Errors: also where the text of the run is gone."""
    return await _look(request, question, lambda model: [excerpt.asdict() for excerpt in model.look("").exciting(question.layer, question.neuron or 0)])


@router.post("/page/look/embedding")
async def embedding(request: Request, question: _Question) -> Response:
    """The alphabet as a map: see `look.findings.Embedding`."""
    return await _look(request, question, lambda model: model.look("").embedding().asdict())


@router.post("/page/copies")
async def copies(request: Request, question: _Question) -> Response:
    """What of a text stands verbatim in the training text: see `look.copies.Copies`."""
    return await _look(request, question, lambda model: model.look(question.text).copies().asdict())


@router.get("/page/{name}")
def module(name: str) -> Response:
    """A style sheet, a script or a picture of the page."""
    found = {path.name: path for path in WEB.iterdir() if path.suffix in (".css", ".js", ".svg")}.get(name)
    if found is None:
        raise ApiError(404, f"The page has no {name[:80]!r}.")
    kind = "text/javascript" if found.suffix == ".js" else mimetypes.types_map[found.suffix]  # some systems have another idea of .js
    return FileResponse(found, media_type=kind, headers=SAFE | {"Cache-Control": "no-cache"})


async def _look(request: Request, question: _Question, look: Callable[["Model"], Any]) -> Response:
    """What `look` finds in a model by name. Errors: `ApiError` for what a person can put right."""
    try:
        worker = await request.app.state.models.open(question.model)
        return as_json(await worker.call(look), headers=FRESH)
    except KeyError as error:
        raise ApiError(404, f"There is no model {question.model[:80]!r} here.", "model") from error
    except UserError as error:
        raise ApiError(400, str(error)) from error
