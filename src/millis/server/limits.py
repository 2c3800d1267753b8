"""The gate before all routes: who may come in, under which id, and which headers every answer has. Pure ASGI."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millis.server.api.errors import ApiError
from millis.server.auth import presented
from millis.server.origins import Origins
from millis.server.protocol import connection_of
from millis.server.service import Service

log = logging.getLogger("millis.access")
OPEN = frozenset(("/health",))  # answered without a key
SECURE = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
POLICY = (
    b"content-security-policy",
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
)


class Gate:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, direct: Mapping[str, ASGIApp], service: Service) -> None:
        self._app = app
        self._direct = direct  # what is posted to these paths needs no router
        self._service = service
        self._origins = Origins.of(service.config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["request_id"] = request_id = self._service.request_id()
        status = 0
        headers = dict(scope["headers"])
        added = [*self._origins.shown(headers.get(b"origin")), (b"x-request-id", request_id.encode())]

        async def secured(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _secured(message.get("headers", ()), added)}
            await send(message)

        try:
            self._origins.check(scope["method"], scope["scheme"], headers)
            preflight = self._origins.preflight(scope["method"], headers)
            if preflight is None:  # which comes without a key
                scope["tenant"] = await self._tenant(scope["path"], headers)
        except ApiError as error:
            self._service.count_error(error)
            await refuse(secured, error, scope["path"])
        else:
            if preflight is not None:
                await secured({"type": "http.response.start", "status": 204, "headers": preflight})
                await secured({"type": "http.response.body"})
            else:
                direct = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
                await (direct or self._app)(scope, receive, secured)
        if self._service.config.access_log:
            ms = 1000 * (time.monotonic() - connection_of(scope).arrival_s)
            path = scope["path"] if scope["path"] in self._direct else _known(scope)
            log.info("%s %s %s %d %.1f ms", request_id, scope["method"], path, status, ms)

    async def _tenant(self, path: str, headers: Mapping[bytes, bytes]) -> str:
        """Whose request this is. ApiError: nobody's who may ask."""
        keys = self._service.keys
        if keys is None or path in OPEN:
            return ""
        text = presented(headers)
        key = None if text is None else keys.recall(text)
        if key is None and text is not None:
            key = await self._service.check_key(text)
        if key is None:
            page = b"text/html" in headers.get(b"accept", b"")
            challenge = 'Basic realm="Millis: any name, and a key as password", charset="UTF-8"' if page else "Bearer"
            message = "no valid API key; send Authorization: Bearer KEY" if text is None else "the API key is not valid"
            raise ApiError(
                401,
                message,
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": challenge},
            )
        return key.id


async def refuse(send: Send, error: ApiError, path: str) -> None:
    """Sends an error as the whole answer."""
    body = json.dumps(error.body_for(path)).encode()
    headers = {**error.headers, "content-type": "application/json", "content-length": str(len(body))}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _secured(headers: Iterable[tuple[bytes, bytes]], added: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of an answer, and those that every answer has; what a route says of caching stands."""
    given = dict(headers)
    found = [*given.items(), *added]
    found += [(name, value) for name, value in SECURE if name not in given]
    if given.get(b"content-type", b"").startswith(b"text/html"):
        found.append(POLICY)
    return found


def _known(scope: MutableMapping[str, Any]) -> str:
    """The path of a route; of any other, nothing: it is text that somebody sent."""
    route: Mapping[str, Any] | Any = scope.get("route")
    return str(getattr(route, "path", "-"))
