"""The HTTP application: which path is answered by what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from millis import __version__
from millis.server.adapters import load_adapter, unload_adapter
from millis.server.answers import Exchange
from millis.server.api.endpoints import ROUTES
from millis.server.api.errors import ApiError, invalid
from millis.server.api.job import Endpoint
from millis.server.api.models import Served, model_body, models_body
from millis.server.docs import STYLE, docs_page
from millis.server.kept import add_kept
from millis.server.limits import Gate
from millis.server.metrics import CONTENT_TYPE
from millis.server.service import Service
from millis.server.web import mount_page

VECTORS: frozenset[Endpoint] = frozenset(("embeddings", "score", "rerank"))  # which adapters do not make
SUMMARIES: Mapping[Endpoint, str] = {
    "chat": "Answer a conversation",
    "completions": "Continue a text",
    "responses": "Answer a conversation, as OpenAI's Responses API",
    "messages": "Answer a conversation, as Anthropic's Messages API",
    "count_tokens": "How many tokens a conversation has, as Anthropic's Messages API",
    "embeddings": "A vector of each text",
    "classify": "Which of some labels fits a text",
    "score": "How alike texts are",
    "rerank": "Documents by how well they fit a query",
    "answer": "An answer from the documents of an index, with the quotes that say so",
    "tokenize": "The token ids of a text or a conversation",
    "detokenize": "The text of token ids",
}


def create_app(service: Service) -> ASGIApp:
    """The application with all its routes, behind the gate."""
    app = FastAPI(title="Millis", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    direct: dict[str, Exchange] = {}
    for endpoint, route in ROUTES.items():
        direct |= dict.fromkeys((route.path, *route.aliases), exchange := Exchange(service, endpoint))
        _add_endpoint(app, endpoint, exchange)
    _add_models(app, service)
    if service.config.adapter_dir is not None:
        _add_adapters(app, service)
    add_kept(app, service)
    _add_docs(app)
    _add_life(app, service)
    mount_page(app)
    app.openapi = lambda: app.openapi_schema or _describe(app, service)  # type: ignore[method-assign]
    return Gate(app, direct, service)


def _add_endpoint(app: FastAPI, endpoint: Endpoint, exchange: Exchange) -> None:
    """For /openapi.json; the gate calls the exchange itself."""
    route = ROUTES[endpoint]

    async def answer(request: Request) -> Response:
        return exchange

    app.add_api_route(
        route.path,
        answer,
        methods=["POST"],
        name=endpoint,
        summary=SUMMARIES[endpoint],
        response_class=Response,
    )
    for alias in route.aliases:
        app.add_api_route(alias, answer, methods=["POST"], include_in_schema=False)


def _add_models(app: FastAPI, service: Service) -> None:
    def served() -> list[Served]:
        found = []
        for model in service.models.values():
            if (info := model.client.info) is None:
                continue
            paths = [route.path for endpoint, route in ROUTES.items() if model.answers(endpoint)]
            found.append(Served(model.name, service.created, info.context, paths, model.labels))
        for name in service.main.client.adapters if found else ():
            base, paths = found[0], [route.path for endpoint, route in ROUTES.items() if endpoint not in VECTORS]
            found.append(Served(f"{base.name}:{name}", base.created, base.context, paths, parent=base.name))
        return found

    @app.get("/v1/models", summary="What is served here")
    async def models() -> Response:
        return JSONResponse(models_body(served()))

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        return JSONResponse(model_body(served(), name))


def _add_adapters(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter", summary="Load an adapter from --adapter-dir")
    async def load(request: Request) -> Response:
        app.openapi_schema = None
        return await load_adapter(service, request)

    @app.post("/v1/unload_lora_adapter", summary="Forget an adapter")
    async def unload(request: Request) -> Response:
        app.openapi_schema = None
        return await unload_adapter(service, request)


def _add_docs(app: FastAPI) -> None:
    @app.get("/docs", summary="This page", response_class=HTMLResponse)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()))

    @app.get("/docs/style.css", include_in_schema=False)
    async def style() -> Response:
        return Response(STYLE, media_type="text/css")


def _add_life(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="Whether the process lives")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", summary="Whether requests are answered: loaded, warm and measured")
    async def ready() -> Response:
        state = "ready" if service.ready else "draining" if service.draining else "starting"
        return JSONResponse({"status": state}, 200 if service.ready else 503)

    for path, probe in (("/health", health), ("/ready", ready)):  # without a body, which the protocol leaves out
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)

    @app.get("/metrics", summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type=CONTENT_TYPE)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body_for(request.url.path), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, headers = error.status_code, dict(error.headers or {})
    allowed = ", ".join(sorted(_methods(request)))
    if status == 405:
        headers["Allow"] = allowed
    code, template = HTTP_ERRORS.get(status, ("http_error", "{detail}"))
    message = template.format(path=request.url.path, method=request.method, allowed=allowed, detail=error.detail)
    return JSONResponse(ApiError(status, message, code=code).body_for(request.url.path), status, headers)


def _methods(request: Request) -> set[str]:
    """How the path of a request may be asked; the framework names the methods of its first route alone."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    return {name for one in routes if one.matches(request.scope)[0] is not Match.NONE for name in one.methods or ()}


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    found = invalid(f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", name)
    return JSONResponse(found.body_for(request.url.path), found.status)


def _describe(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document: what the framework knows of the routes, the bodies of the endpoints, and errors."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models, definitions = models_json_schema(
        [(route.request, "validation") for route in ROUTES.values()], ref_template="#/components/schemas/{model}"
    )
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    schemas |= definitions["$defs"] | {"Error": ERROR}
    for path, methods in found["paths"].items():
        for operation in methods.values():
            operation["responses"] = {
                "200": {"description": "the answer", "content": {kind: {} for kind in KINDS.get(path, (JSON,))}},
                "default": {
                    "description": "an error, by its code",
                    "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            }
    for endpoint, route in ROUTES.items():
        named = schemas[route.request.__name__]["properties"]
        names = [name for name in service.names() if service.find(name)[0].answers(endpoint)]
        if not names:  # no model here does it
            del found["paths"][route.path]
            continue
        if "model" in named:
            named["model"] = {"type": "string", "enum": names}
        if "models" in named:
            named["models"]["anyOf"][0]["items"]["enum"] = names
        content = {JSON: {"schema": models[(route.request, "validation")]}}
        found["paths"][route.path]["post"]["requestBody"] = {"required": True, "content": content}
        if route.writer is not None:
            found["paths"][route.path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {}
    app.openapi_schema = found if service.ready else None  # what a model does is known when it is loaded
    return found


HTTP_ERRORS = {
    404: ("not_found", "there is no path {path!r:.100}; GET /docs lists them"),
    405: ("method_not_allowed", "{path!r:.100} takes {allowed}, not {method:.20}; see /docs"),
}
JSON = "application/json"
KINDS = {"/metrics": ("text/plain",), "/docs": ("text/html",)}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"]},
                "predicted_ms": {"type": "number", "description": "what the answer would have taken"},
            },
        }
    },
}
