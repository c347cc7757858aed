"""Security middleware: Host and Origin checks, API key, body size and time limits."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanogpt.config import ServeConfig
from nanogpt.server.metrics import Metrics
from nanogpt.server.schemas import ApiError

MAX_BODY_BYTES = 1 << 20
# Time to send a request and to receive the response, in addition to the request timeout.
CLIENT_GRACE_SECONDS = 30.0
# Paths that need no API key.
PUBLIC_PATHS = ("/healthz",)


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class SecurityMiddleware:
    """ASGI middleware around the whole server, which also counts all requests.

    Args:
        app: The wrapped application.
        config: Settings of the server.
        metrics: Receives the count of requests.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics):
        self.app = app
        # Only this machine's own names are then accepted in the Host header. This stops DNS
        # rebinding, where a foreign page gives its own name this server's address.
        self.loopback = is_loopback(config.host)
        self.config = config
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, and pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        is_api = scope["path"].startswith("/v1/")
        try:
            self._check(scope, Headers(scope=scope))
            async with asyncio.timeout(
                self.config.timeout + CLIENT_GRACE_SECONDS if is_api else None
            ):
                await self.app(scope, _limit_body(receive), send_counted)
        except (ApiError, TimeoutError) as error:
            # After the headers were sent, the status can no longer change.
            if not status:
                if not isinstance(error, ApiError):
                    error = ApiError(408, "The request timed out.", code="timeout")
                await error.response()(scope, receive, send_counted)
        finally:
            route = scope.get("route")
            self.metrics.count_request(getattr(route, "path", "other"), status or 500)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise `ApiError` if the request is not allowed."""
        host = headers.get("host", "").lower()
        if self.loopback and not is_loopback(_hostname(host)):
            message = f"Invalid Host header: {host[:80]!r}. Use localhost as the server's name."
            raise ApiError(403, message, code="wrong_host")
        origin = headers.get("origin")
        is_read = scope["method"] in ("GET", "HEAD")
        if not is_read and origin is not None and origin.lower().partition("://")[2] != host:
            message = f"Requests from pages of {origin[:80]!r} are not allowed."
            raise ApiError(403, message, code="wrong_origin")
        key = None if scope["path"] in PUBLIC_PATHS else self.config.api_key
        if key is not None and not _is_authorized(headers.get("authorization", ""), key):
            message = "Missing or wrong API key. Send the header Authorization: Bearer KEY."
            # Browsers then ask the user for the key as a password.
            challenge = {"WWW-Authenticate": 'Basic realm="nanogpt", charset="UTF-8"'}
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise _body_too_large()


def _is_authorized(authorization: str, api_key: str) -> bool:
    """Check the API key in a header: a bearer token, or a browser's password."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(key, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(key.strip().encode(), api_key.encode())


def _hostname(host: str) -> str:
    """Return the name or address in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # an unclosed bracket
        return ""


def _limit_body(receive: Receive) -> Receive:
    """Wrap `receive` to raise `ApiError` once the body exceeds `MAX_BODY_BYTES`."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise _body_too_large()
        return message

    return limited


def _body_too_large() -> ApiError:
    message = f"The request body is too large (limit {MAX_BODY_BYTES:,} bytes)."
    return ApiError(413, message, code="request_too_large")
