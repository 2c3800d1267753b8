"""Whether an answer is what its JSON schema asks for. Needs the extra `bench` (jsonschema)."""

from __future__ import annotations

import json
from typing import Any

from millis.types import MillisError, RequestError


def validator(schema: dict[str, Any]) -> Any:
    """A validator that fetches nothing. RequestError if `schema` is none, MillisError without the package."""
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from referencing import Registry
    except ImportError:
        raise MillisError("--schema needs jsonschema; install it with: pip install 'millis[bench]'") from None
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise RequestError(f"this is no JSON schema: {error.message}") from None
    return Draft202012Validator(schema, registry=Registry())


def is_valid(text: str, checker: Any) -> bool:
    """Whether `text` is JSON, and what the schema asks for."""
    from referencing.exceptions import Unresolvable

    try:
        return bool(checker.is_valid(json.loads(text, parse_constant=_no_constant)))
    except (ValueError, RecursionError, Unresolvable):
        return False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
