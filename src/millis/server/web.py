"""The web page: its files, read once, and the routes that give them out."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import Response

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def mount_page(app: FastAPI) -> None:
    """Adds `/` and `/page/…` to the application: every file that lies in the folder now, and no other path."""
    for entry in resources.files("millis.server").joinpath("page").iterdir():
        kind = TYPES.get(entry.name[entry.name.rfind(".") :])
        if kind is not None:
            path = "/" if entry.name == "index.html" else f"/page/{entry.name}"
            answer = _giving(entry.read_bytes(), kind)
            app.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False, name=entry.name)


def _giving(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Answers with the file, or with 304 where the browser has it. It asks each time: a new version shows at once."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}

    async def answer(request: Request) -> Response:
        known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return answer
