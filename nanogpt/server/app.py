"""The FastAPI application, and the uvicorn server that runs it until a signal."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import nanogpt
from nanogpt.config import ServeConfig
from nanogpt.errors import UserError
from nanogpt.server import dashboard, openai_api, schemas
from nanogpt.server.model_pool import ModelPool
from nanogpt.server.security import SecurityMiddleware, is_loopback

MAX_CONNECTIONS = 1000
# Seconds after a signal in which sequences may finish.
SHUTDOWN_GRACE = 30
# Further seconds for clients to receive the last responses.
DELIVERY_GRACE = 5


def create_app(models: ModelPool) -> FastAPI:
    """Create the application.

    Its state holds `models`, and `stopping`, an event at which endless streams must end.

    Args:
        models: The served models; the page shows the runs of the same folder.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close()

    app = FastAPI(
        title="nanogpt",
        version=nanogpt.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.models = models
    app.state.stopping = asyncio.Event()
    app.include_router(openai_api.router)
    app.include_router(dashboard.router)
    app.add_middleware(SecurityMiddleware, config=models.config, metrics=models.metrics)
    for error_type in (HTTPException, RequestValidationError, UserError, Exception):
        app.add_exception_handler(error_type, _error_handler)
    return app


def run(models: ModelPool, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGINT or SIGTERM, then finish running requests and return.

    A single model is loaded first. Sequences end early `SHUTDOWN_GRACE` seconds after the signal.

    Args:
        models: The served models; the page shows the runs of the same folder.
        on_ready: Called with the server's URL once it accepts requests.

    Raises:
        UserError: If the address is not available, or is open to other machines without an API
            key; if a single model's file is not valid.
    """
    config = models.config
    if config.api_key is None and not is_loopback(config.host):
        what = f"An API key is missing: other machines can reach the host {config.host}."
        raise UserError(what, "Set the environment variable NANOGPT_API_KEY to a secret key.")
    sock = listen(config)
    app = create_app(models)
    server_config = uvicorn.Config(
        app,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_GRACE + DELIVERY_GRACE,
    )

    async def serve() -> None:
        if models.single_model is not None:
            await models.get_engine(models.single_model)
        on_ready(_browser_url(config.host, sock.getsockname()[1]))
        await Server(server_config, app).serve(sockets=[sock])

    with sock:
        asyncio.run(serve())


class Server(uvicorn.Server):
    """A uvicorn server that shuts down without waiting for streams or long sequences."""

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self.app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after a signal, or at once after another SIGINT.

        Unlike uvicorn's method, this one does not let the signal be raised again after the end.
        """
        self.force_exit |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more requests, and return when the last response was sent."""
        self.app.state.stopping.set()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(SHUTDOWN_GRACE, self.app.state.models.cancel_all)
        await super().shutdown(sockets)
        timer.cancel()


def listen(config: ServeConfig) -> socket.socket:
    """Open a socket at the configured address; port 0 selects a free port.

    Raises:
        UserError: If the address is invalid or in use.
    """
    address = f"{config.host}, port {config.port}"
    try:
        family, _, _, _, (host, port, *_) = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.create_server((host, port), family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            what = f"Cannot listen on {address}: {getattr(error, 'strerror', None) or error}."
            defaults = ServeConfig().model_dump(include={"host", "port"})
            raise UserError(what, defaults) from error
        with socket.create_server((host, 0), family=family) as free:
            fix = {"port": free.getsockname()[1]}
        raise UserError(f"The address is already in use: {address}.", fix) from error
    # Accepted connections inherit this option. Otherwise Nagle's algorithm with delayed ACKs would
    # hold back the first body bytes for 40 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _browser_url(host: str, port: int) -> str:
    """Return the server's URL for a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _error_handler(request: Request, error: Exception) -> Response:
    """Return any error in the format of the API."""
    if isinstance(error, RequestValidationError):
        return schemas.validation_error(error.errors()).response()
    if isinstance(error, UserError):
        return schemas.ApiError(400, str(error)).response()
    if isinstance(error, schemas.ApiError) or not isinstance(error, HTTPException):
        return schemas.internal_error(error).response()
    path = request.url.path[:200]
    message = error.detail
    if error.status_code == 404:
        message = f"There is no resource at {path}."
        if path.startswith("/v1/chat"):
            message += " Chat is not supported; send the prompt to /v1/completions."
    elif error.status_code == 405:
        message = f"The method {request.method} is not allowed at {path}."
    elif error.status_code == 400:
        message = "The body is not valid JSON."
    return schemas.ApiError(error.status_code, message, headers=error.headers).response()
