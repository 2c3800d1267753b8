"""GET and DELETE of what /v1/responses has kept, and the list of the items that a response answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from millis.server.api.errors import ApiError, invalid, unsupported
from millis.server.service import Service


def add_kept(app: FastAPI, service: Service) -> None:
    """Adds the paths."""

    @app.get("/v1/responses/{response_id}", summary="A response that was kept")
    async def get(request: Request, response_id: str, stream: bool | None = None) -> Response:
        _check_known(request, "stream", "include", "include[]")
        if stream:
            raise unsupported("stream", "the response is there; leave it out")
        found = service.stored.get(request.scope["tenant"], response_id)
        if found is None:
            raise not_kept(response_id)
        return Response(found.response, media_type="application/json")

    @app.delete("/v1/responses/{response_id}", summary="Forget a response")
    async def delete(request: Request, response_id: str) -> Response:
        if not service.stored.remove(request.scope["tenant"], response_id):
            raise not_kept(response_id)
        return JSONResponse({"id": response_id, "object": "response.deleted", "deleted": True})

    @app.get("/v1/responses/{response_id}/input_items", summary="The conversation that a response answers")
    async def input_items(
        request: Request,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        _check_known(request, "limit", "order", "after", "include", "include[]")
        try:
            items = service.past(request.scope["tenant"]).input(response_id)
        except KeyError as error:
            raise not_kept(error.args[0]) from None
        return JSONResponse(_page(items if order == "asc" else items[::-1], limit, after))


def not_kept(response_id: str) -> ApiError:
    """The answer to a question for a response that is not there, or that is another key's."""
    message = f"no response {response_id!r:.100} is kept for this key; with store: true one is, for a while"
    return ApiError(404, message, param="response_id", code="response_not_found")


def _page(items: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    begin = 0
    if after is not None:
        begin = next((i + 1 for i, item in enumerate(items) if item["id"] == after), -1)
        if begin < 0:
            raise invalid(f"after: no item {after!r:.100} is in this list", "after")
    page = items[begin : begin + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + limit < len(items),
    }


def _check_known(request: Request, *names: str) -> None:
    for name in request.query_params:
        if name not in names:
            raise invalid(f"unknown parameter {name!r:.100} in the query", name[:100], "unknown_parameter")
