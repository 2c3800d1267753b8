"""The HTTP application: which path is answered by what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from millis import __version__
from millis.server.answers import Exchange
from millis.server.api.endpoints import ROUTES, Route
from millis.server.api.errors import ApiError
from millis.server.api.job import Endpoint
from millis.server.api.models import Served, model_body, models_body
from millis.server.limits import Gate
from millis.server.metrics import CONTENT_TYPE
from millis.server.service import Service

SUMMARIES: Mapping[Endpoint, str] = {
    "chat": "Answer a conversation",
    "completions": "Continue a text",
    "responses": "Answer a conversation, as OpenAI's Responses API",
    "messages": "Answer a conversation, as Anthropic's Messages API",
    "embeddings": "A vector of each text",
    "classify": "Which of some labels fits a text",
    "score": "How alike texts are",
    "rerank": "Documents by how well they fit a query",
    "tokenize": "The token ids of a text or a conversation",
    "detokenize": "The text of token ids",
}


def create_app(service: Service) -> ASGIApp:
    """The application with all its routes, behind the gate."""
    app = FastAPI(title="Millis", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    direct = {route.path: Exchange(service, endpoint) for endpoint, route in ROUTES.items()}
    for endpoint in ROUTES:
        _add_endpoint(app, endpoint, direct[ROUTES[endpoint].path])
    _add_models(app, service)
    _add_life(app, service)
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
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(route)}}}},
    )


def _add_models(app: FastAPI, service: Service) -> None:
    def served() -> list[Served]:
        info = service.client.info
        return [Served(service.model, service.created, info.context)] if info is not None else []

    @app.get("/v1/models", summary="What is served here")
    async def models() -> Response:
        return JSONResponse(models_body(served()))

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        return JSONResponse(model_body(served(), name))


def _add_life(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="Whether the process lives")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", summary="Whether requests are answered: loaded, warm and measured")
    async def ready() -> Response:
        state = "ready" if service.ready else "draining" if service.draining else "starting"
        return JSONResponse({"status": state}, 200 if service.ready else 503)

    @app.get("/metrics", summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type=CONTENT_TYPE)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body_for(request.url.path), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: "there is no such path; GET /docs lists them", 405: "this path is not asked that way; see /docs"}
    found = ApiError(error.status_code, text.get(error.status_code, str(error.detail)), code="not_found")
    return JSONResponse(found.body_for(request.url.path), error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    found = ApiError(422, "a parameter of the path or query is not valid", code="invalid_value")
    return JSONResponse(found.body_for(request.url.path), 422)


def _schema(route: Route) -> dict[str, Any]:
    """The JSON schema of a body, its definitions inside it."""
    return route.request.model_json_schema(by_alias=True)
