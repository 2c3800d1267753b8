"""/v1/models: what is served here. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from millis.server.api.errors import model_not_found


@dataclass(frozen=True, slots=True)
class Served:
    """A model under the name that requests give."""

    name: str
    created: int  # seconds since 1970
    context: int  # tokens of prompt and answer together; of an encoder: of a text
    endpoints: Sequence[str] = ()  # the paths that answer for it
    labels: Sequence[str] = ()  # what it was trained to tell
    parent: str | None = None  # of an adapter: its model


def models_body(served: Iterable[Served]) -> dict[str, Any]:
    """GET /v1/models."""
    return {"object": "list", "data": [_entry(one) for one in served]}


def model_body(served: Iterable[Served], name: str) -> dict[str, Any]:
    """GET /v1/models/{name}. ApiError 404 for any other."""
    return _entry(find(served, name))


def find(served: Iterable[Served], name: str) -> Served:
    """The model of that name. ApiError 404 where it is not served."""
    found = next((one for one in served if one.name == name), None)
    if found is None:
        raise model_not_found(name)
    return found


def _entry(one: Served) -> dict[str, Any]:
    return {
        "id": one.name,
        "object": "model",
        "created": one.created,
        "owned_by": "millis",
        "max_model_len": one.context,
        **({"endpoints": list(one.endpoints)} if one.endpoints else {}),
        **({"labels": list(one.labels)} if one.labels else {}),
        **({} if one.parent is None else {"parent": one.parent}),
    }
