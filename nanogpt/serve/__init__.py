"""HTTP for models and runs: the OpenAI-compatible API, and the page.

In: a model or a folder of runs. Out: a server that answers until it is told to stop, and then finishes what it has begun.
Refuses: to be reached from other machines without an API key; an address that is taken.

`guard` lets requests in; `api` answers those of programs, in the words of `wire` and `answer`, `page` those of a browser; `models` loads, `worker` writes,
`metrics` counts.
"""

import asyncio
import errno
import logging
import shlex
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import nanogpt
from nanogpt.config import ServeConfig
from nanogpt.errors import UserError
from nanogpt.serve import api, page, wire
from nanogpt.serve.guard import Guard, is_loopback
from nanogpt.serve.models import Models

CONNECTIONS = 1000  # at a time
GRACE = 30  # seconds in which what is under way may finish at the end
LEAVING = 5  # seconds more for clients to take it


def create_app(models: Models, runs: Path | None = None) -> FastAPI:
    """The application. `runs`: the folder whose runs the page shows, or one run's; both are left in `app.state` for the page."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close()

    app = FastAPI(title="nanogpt", version=nanogpt.__version__, docs_url=None, redoc_url=None, lifespan=life)
    app.state.models, app.state.runs = models, runs
    app.include_router(api.router)
    app.include_router(page.router)
    settings = models.settings
    app.add_middleware(Guard, loopback=is_loopback(settings.host), api_key=settings.api_key, seconds=settings.seconds, metrics=models.metrics)
    for kind in (HTTPException, RequestValidationError, UserError, Exception):
        app.add_exception_handler(kind, _refuse)
    return app


def run(models: Models, runs: Path | None = None, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGINT or SIGTERM; then take no more requests, finish those under way within `GRACE` seconds, and return.

    `on_ready` gets the address once requests are answered. Where one model is served, it is loaded before.
    Errors: `UserError` for an address that is taken, not there, or reached by others without a key; for a file that holds no model.
    """
    settings = models.settings
    if settings.api_key is None and not is_loopback(settings.host):
        what = f"--host {settings.host} lets other machines in, and there is no API key."
        raise UserError(what, "Choose one with the variable NANOGPT_API_KEY or with --api-key KEY, or leave out --host.")
    sock = _listen(settings, models.path)
    app = create_app(models, runs)
    config = uvicorn.Config(
        app, log_level=logging.WARNING, access_log=False, server_header=False, ws="none", limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE + LEAVING,
    )  # fmt: skip

    async def serve() -> None:
        if models.only is not None:
            await models.open(models.only)
        on_ready(_url(settings.host, sock.getsockname()[1]))
        with _signals_end_well():
            await _Server(config, models).serve(sockets=[sock])

    with sock:
        asyncio.run(serve())


class _Server(uvicorn.Server):
    """One whose texts end where they are, if they take longer than `GRACE` once it is told to stop."""

    def __init__(self, config: uvicorn.Config, models: Models):
        super().__init__(config)
        self.models = models

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and return when the last is answered."""
        timer = asyncio.get_running_loop().call_later(GRACE, self.models.cut_short)
        await super().shutdown(sockets)
        timer.cancel()


def _listen(settings: ServeConfig, path: Path) -> socket.socket:
    """A socket at the address; port 0 is any that is free. Errors: `UserError` where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family, backlog=256)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections have it from here; else what follows headers waits 40 ms for an answer
        return listening
    except (OSError, UnicodeError) as error:
        where, command = f"{settings.host}, port {settings.port}", f"nanogpt serve {shlex.quote(str(path))}"
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            raise UserError(f"The server cannot listen at {where}: {getattr(error, 'strerror', None) or error}.", f"Try {command}") from error
        with socket.create_server((address[0], 0), family=family) as free:
            fix = f"{command} --port {free.getsockname()[1]}" + ("" if settings.host == ServeConfig().host else f" --host {settings.host}")
        raise UserError(f"Another program listens at {where} already.", fix) from error


def _url(host: str, port: int) -> str:
    """Where a browser on this machine finds it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


@contextmanager
def _signals_end_well() -> Iterator[None]:
    """uvicorn raises the signals that ended it once more when it has finished: here they have done what they are for."""
    if threading.current_thread() is not threading.main_thread():  # which alone has signals
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _refuse(request: Request, error: Exception) -> Response:
    """Every error in the API's shape."""
    path = request.url.path[:200]
    if isinstance(error, RequestValidationError):
        return wire.explain(error.errors()).response()
    if isinstance(error, UserError):
        return wire.ApiError(400, str(error)).response()
    if isinstance(error, wire.ApiError) or not isinstance(error, HTTPException):
        return wire.failure(error).response()
    chat = " The models here continue texts and know no chats: POST a prompt to /v1/completions." if path.startswith("/v1/chat") else ""
    what = {404: f"There is nothing at {path}.{chat}", 405: f"{path} does not take {request.method}.", 400: "The body cannot be read as JSON."}
    return wire.ApiError(error.status_code, what.get(error.status_code, error.detail), headers=error.headers).response()
