"""Who may ask, and how much at once: what every request passes before anything else.

In: requests of whoever reaches the port. Out: those of the owner's programs and pages; their count. Refuses: names that are not this server's (a page
elsewhere can give its own name our address: DNS rebinding), posts from other pages, wrong keys, bodies that are too large, and what takes too long.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanogpt.serve.metrics import Metrics
from nanogpt.serve.wire import ApiError

BODY_BYTES = 1 << 20
LATE = 30.0  # seconds that a client has, beyond the time for the work, to send a request and to take the answer
OPEN_PATHS = ("/healthz",)  # which need no key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware around the whole server."""

    def __init__(self, app: ASGIApp, *, loopback: bool, api_key: str | None, seconds: float, metrics: Metrics):
        """`loopback`: it is reached under this machine's own names only; `seconds`: for an answer of the API."""
        self.app, self.loopback, self.key, self.seconds, self.metrics = app, loopback, api_key, seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
            if scope["path"].startswith("/v1/"):
                async with asyncio.timeout(self.seconds + LATE):
                    await self.app(scope, _bounded(receive), counted)
            else:
                await self.app(scope, _bounded(receive), counted)
        except (ApiError, TimeoutError) as error:
            if not status:
                refusal = error if isinstance(error, ApiError) else ApiError(408, "The request took too long.", code="timeout")
                await refusal.response()(scope, receive, counted)
        finally:
            route = scope.get("route")
            self.metrics.count_request(getattr(route, "path", "other"), status or 500)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Errors: `ApiError` for a request that is not let in."""
        host = headers.get("host", "").lower()
        if self.loopback and not is_loopback(_hostname(host)):
            raise ApiError(403, f"This server is reached as localhost, not as {host[:80]!r}.", code="wrong_host")
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and origin.lower().partition("://")[2] != host:
            raise ApiError(403, f"Pages of {origin[:80]!r} may not use this server.", code="wrong_origin")
        if self.key is not None and scope["path"] not in OPEN_PATHS and not _has_key(headers.get("authorization", ""), self.key):
            challenge = {"WWW-Authenticate": 'Basic realm="nanogpt", charset="UTF-8"'}  # a browser asks for the key as a password
            raise ApiError(401, "The API key is missing or wrong. Send it in the header Authorization: Bearer KEY.", code="invalid_api_key", headers=challenge)
        if (length := headers.get("content-length", "0")).isdigit() and int(length) > BODY_BYTES:
            raise _too_large()


def _hostname(host: str) -> str:
    """The name or address in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # half a bracket
        return ""


def _has_key(authorization: str, key: str) -> bool:
    """Whether the header carries the key: as a program's bearer token, or as the password of a browser."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.strip().encode(), key.encode())


def _bounded(receive: Receive) -> Receive:
    """The same, up to the size that a body may have."""
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > BODY_BYTES:
            raise _too_large()
        return message

    return bounded


def _too_large() -> ApiError:
    return ApiError(413, f"The body is larger than {BODY_BYTES:,} bytes.", code="request_too_large")
