"""Adapters over HTTP: loaded and unloaded while the server runs, as vLLM's clients ask for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from millis.engine.adapters import check_name
from millis.server.api.errors import ApiError, invalid
from millis.server.client import Mailbox
from millis.server.exchange import ClientGone, checked_reply, read_body
from millis.server.messages import LoadAdapter, UnloadAdapter
from millis.server.service import Service

MAX_BODY_BYTES = 1 << 16
ADMIN = "admin"  # keys whose name begins so may change what is served


async def load_adapter(service: Service, request: Request) -> Response:
    """{"lora_name": NAME, "lora_path": a path below --adapter-dir}."""
    _allow(service, request)
    fields = await _fields(request, ("lora_name", "lora_path"))
    name, path = fields["lora_name"], _below(service, fields["lora_path"])
    try:
        check_name(name)
    except ValueError as error:
        raise invalid(str(error), "lora_name") from None
    await _ask(service, LoadAdapter(service.main.client.number(), name, str(path)))
    service.main.client.adapters[name] = str(path)
    return JSONResponse({"id": f"{service.main.name}:{name}", "object": "model", "loaded": True})


async def unload_adapter(service: Service, request: Request) -> Response:
    """{"lora_name": NAME}. Answers under way go on with it."""
    _allow(service, request)
    name = (await _fields(request, ("lora_name",)))["lora_name"]
    if name not in service.main.client.adapters:
        raise service.not_served(f"{service.main.name}:{name}", "lora_name")
    del service.main.client.adapters[name]
    await _ask(service, UnloadAdapter(service.main.client.number(), name))
    return JSONResponse({"id": f"{service.main.name}:{name}", "object": "model", "loaded": False})


async def _ask(service: Service, work: LoadAdapter | UnloadAdapter) -> None:
    mailbox = Mailbox()
    service.main.client.submit(work, mailbox)
    checked_reply(await mailbox.get())


def _allow(service: Service, request: Request) -> None:
    if service.keys is not None and not request.scope["tenant"].startswith(ADMIN):
        message = f"this key may not change what is served; a key named {ADMIN} may"
        raise ApiError(403, message, type="permission_error", code="not_allowed")


async def _fields(request: Request, names: tuple[str, ...]) -> dict[str, str]:
    """The body's fields, all of them texts."""
    try:
        found: Any = json.loads(await read_body(request.receive, MAX_BODY_BYTES))
    except ClientGone:
        raise invalid("the client has gone", None) from None
    except (ValueError, RecursionError):
        raise invalid("the body is not valid JSON", None) from None
    if not isinstance(found, dict):
        raise invalid("the body must be a JSON object", None)
    for name in found:
        if name not in names:
            raise ApiError(400, f"unknown field {name!r:.60}", param=name[:60], code="unknown_parameter")
    for name in names:
        if not isinstance(found.get(name), str) or not found[name]:
            raise invalid(f"{name} must be a text", name)
    return found


def _below(service: Service, given: str) -> Path:
    """The path that a client names, which leads nowhere but below the folder of adapters."""
    folder = Path(service.config.adapter_dir or ".").resolve()
    try:
        path = (folder / given).resolve()
    except (OSError, ValueError, RuntimeError):
        raise invalid("lora_path is no path", "lora_path") from None
    if not path.is_relative_to(folder) or path == folder:
        raise invalid("lora_path must lie below the server's --adapter-dir", "lora_path")
    if not path.exists():
        raise ApiError(404, f"there is no adapter {given!r:.200} in --adapter-dir", param="lora_path", code="not_found")
    return path
