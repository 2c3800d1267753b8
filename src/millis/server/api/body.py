"""A body's bytes → a checked request model, or an ApiError that names the field at fault. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json

from millis.server.api.errors import ApiError, invalid, unsupported

MAX_DEPTH = 64
Body = bytes | Mapping[str, Any]
_Model = TypeVar("_Model", bound="Request")


class Wire(BaseModel):
    """Part of a body. No field but those listed, no type but the one written."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Request(Wire):
    """A whole body. `refused`: fields of the official API that Millis does not do → why; null asks for nothing.

    A refused field may be listed all the same, with those of its values that ask for nothing.
    """

    refused: ClassVar[Mapping[str, str]] = {}


def read(kind: type[_Model], body: Body) -> _Model:
    """`body` as `kind`. ApiError 400: not JSON, an unknown or refused field, a wrong type or range."""
    data = _decode(body) if isinstance(body, (bytes, bytearray)) else dict(body)
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    _check_text(data)
    data = {key: value for key, value in data.items() if value is not None or key not in kind.refused}
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(kind, data, error) from None


def _decode(body: bytes) -> Any:
    try:
        return from_json(bytes(body), allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _check_text(data: Any) -> None:
    """Depth, and Unicode that can be encoded; a loop, for what is nested may be nested deep."""
    todo = [(data, 0)]
    while todo:
        value, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ApiError(
                    400, "the body holds a lone surrogate; send valid Unicode", code="invalid_json"
                ) from None
        elif isinstance(value, dict):
            todo += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list):
            todo += [(item, depth + 1) for item in value]


def _explain(kind: type[Request], data: dict[str, Any], error: ValidationError) -> ApiError:
    """The error of the first field at fault; of the branches of a union, the one that got furthest."""
    errors = error.errors(include_url=False)
    refused = [name for name in data if name in kind.refused]
    for details in errors:
        if (name := details["loc"][0] if details["loc"] else None) in refused:
            return unsupported(str(name), kind.refused[str(name)])
    first = errors[0]["loc"][:1]
    details = max((e for e in errors if e["loc"][:1] == first), key=lambda e: len(_path(data, e)))
    param = _text(_path(data, details)) or None
    if details["type"] == "extra_forbidden":
        return invalid(f"unknown parameter {param!r:.100}", param, "unknown_parameter")
    if details["type"] == "missing":
        return invalid(f"{param} is missing", param, "missing_required_parameter")
    if details["type"] == "union_tag_invalid":
        context = details["ctx"]
        field, tag = str(context["discriminator"]).strip("'"), context["tag"]
        param = f"{param}.{'type' if field.endswith('()') else field}" if param else field
        return invalid(f"{param} {tag!r:.60} is not supported; there are {context['expected_tags']}", param)
    given = details["input"]
    shown = f", not {given!r:.60}" if isinstance(given, (str, int, float)) else ""
    code = "invalid_type" if details["type"].endswith("_type") else "invalid_value"
    return invalid(f"{param}: {details['msg'][:1].lower()}{details['msg'][1:]}{shown}", param, code)


def _path(data: Any, details: ErrorDetails) -> list[str | int]:
    """Where in the body the error lies: pydantic's location without the names of the types that it tried."""
    path: list[str | int] = []
    missing = details["type"] == "missing"
    for i, step in enumerate(details["loc"]):
        inside = (isinstance(data, list) and isinstance(step, int) and step < len(data)) or (
            isinstance(data, dict) and step in data
        )
        if inside:
            data = data[step]
            path.append(step)
        elif missing and i == len(details["loc"]) - 1:
            path.append(step)
    return path


def _text(path: list[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step:.64}" if text else f"{step:.64}"
    return text
