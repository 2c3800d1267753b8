"""A body's bytes → a checked request model, or an ApiError that names the field at fault. Pure."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json

from millis.server.api.errors import ApiError, invalid, unsupported

_MAX_ERRORS = 1000  # explaining a million faults would take seconds
Body = bytes | Mapping[str, Any]
_Model = TypeVar("_Model", bound="Request")


def _boolean(value: object) -> object:
    """A literal's test is ==, by which 0 is false."""
    if not isinstance(value, bool):
        raise ValueError("Input should be a boolean")
    return value


No = Annotated[Literal[False], BeforeValidator(_boolean)]  # a switch that cannot be on
Yes = Annotated[Literal[True], BeforeValidator(_boolean)]  # one that cannot be off


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
    data = _decode(bytes(body) if isinstance(body, (bytes, bytearray)) else json.dumps(body).encode())
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    data = {key: value for key, value in data.items() if value is not None or key not in kind.refused}
    known = {field.alias or name for name, field in kind.model_fields.items()}
    for name in data:
        if name not in known:
            raise unsupported(name, kind.refused[name]) if name in kind.refused else _unknown(name)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(kind, data, error) from None


def _decode(body: bytes) -> Any:
    """Bytes that are no UTF-8, lone surrogates, infinities and deep nesting are no JSON here; a byte order mark is."""
    try:
        return from_json(body.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _unknown(param: str) -> ApiError:
    return invalid(f"unknown parameter {param!r:.100}", param[:100], "unknown_parameter")


def _explain(kind: type[Request], data: dict[str, Any], error: ValidationError) -> ApiError:
    """The error of the first field at fault; of the branches of a union, the one that got furthest."""
    if error.error_count() > _MAX_ERRORS:
        return invalid(f"more than {_MAX_ERRORS} fields of the body are at fault", None)
    errors = error.errors(include_url=False)
    for details in errors:
        if (name := details["loc"][0]) in kind.refused:
            return unsupported(str(name), kind.refused[str(name)])
    details, path = _furthest(data, [details for details in errors if details["loc"][0] == errors[0]["loc"][0]])
    param = _text(path)
    if details["type"] == "extra_forbidden":
        return _unknown(param)
    if details["type"] == "missing":
        return invalid(f"{param} is missing", param, "missing_required_parameter")
    if details["type"] == "union_tag_invalid":
        context = details["ctx"]
        field = str(context["discriminator"]).strip("'")
        param += ".type" if field.endswith("()") else f".{field}"
        return invalid(f"{param} {context['tag']!r:.60} is not supported; there are {context['expected_tags']}", param)
    given = details["input"]
    shown = f", not {given!r:.60}" if isinstance(given, (str, int, float)) else ""
    code = "invalid_type" if details["type"].endswith("_type") else "invalid_value"
    return invalid(f"{param}: {details['msg'][:1].lower()}{details['msg'][1:]}{shown}", param, code)


def _furthest(data: Any, errors: list[ErrorDetails]) -> tuple[ErrorDetails, list[str | int]]:
    """The first error of each branch of a union, and of these the deepest and last in the body."""
    firsts: dict[Any, tuple[ErrorDetails, list[str | int]]] = {}
    for details in errors:
        path = _path(data, details)
        branch = tuple(step for step in details["loc"] if step not in path)
        firsts.setdefault(branch, (details, path))

    def reach(found: tuple[ErrorDetails, list[str | int]]) -> tuple[int, int, bool, bool]:
        details, path = found
        at = path[-1] if path and isinstance(path[-1], int) else 0
        kind = details["type"]
        return len(path), at, not kind.endswith("_type"), kind == "union_tag_invalid"

    return max(firsts.values(), key=reach)


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
