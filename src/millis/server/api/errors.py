"""Errors as clients see them: a status, OpenAI's or Anthropic's error body, and headers. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from millis.types import (
    DeadlineError,
    GrammarError,
    MillisError,
    ModelError,
    OverloadError,
    RequestError,
    TemplateError,
)

# Status → error.type as Anthropic names it (docs: API errors).
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class ApiError(MillisError):
    """An answer that is an error. `param` names the field at fault, `code` is for programs, `message` for people."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        predicted_ms: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.predicted_ms = predicted_ms
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.predicted_ms is not None:
            error["predicted_ms"] = self.predicted_ms
        return {"error": error}

    def anthropic_body(self) -> dict[str, Any]:
        """As Anthropic's clients read it; `param`, `code` and `predicted_ms` stand beside what they know."""
        error = {**self.body()["error"], "type": _ANTHROPIC_TYPES.get(self.status, "api_error")}
        if self.param == "thread":  # its tool runners then send the whole conversation, without it
            error["details"] = {"error_code": "thread_unsupported_request"}
        return {"type": "error", "error": {key: value for key, value in error.items() if value is not None}}

    def body_for(self, path: str) -> dict[str, Any]:
        """The body in the form that the clients of the endpoint at `path` read."""
        return self.anthropic_body() if path.startswith("/v1/messages") else self.body()


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A field whose value cannot be used."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, reason: str) -> ApiError:
    """A field of the official API that asks for what Millis does not do."""
    return ApiError(400, f"{param} is not supported: {reason}", param=param, code="unsupported_parameter")


def model_not_found(name: str, adapters: Sequence[str] = (), param: str = "model") -> ApiError:
    """A model that is not served here, or an adapter; `adapters` are those that are."""
    message = f"the model {name!r:.100} is not served here; GET /v1/models lists what is"
    if adapters:
        message += f": beside the model itself {', '.join(adapters[:20])}{' …' if len(adapters) > 20 else ''}"
    return ApiError(404, message, param=param, code="model_not_found")


def deadline_exceeded() -> ApiError:
    """An admitted request whose time ran out before its answer was complete, and of which no part is wanted."""
    message = "the answer was not complete by its deadline; give a longer deadline_ms, or a text on_deadline=partial"
    return ApiError(503, message, type="server_error", code="deadline_exceeded", headers={"x-should-retry": "false"})


def from_error(error: MillisError, prompt: str | None = None) -> ApiError:
    """Any error that Millis raises on purpose, as an answer. prompt: the field that a template was rendered for."""
    if isinstance(error, ApiError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, DeadlineError):
        return ApiError(
            503,
            text,
            type="server_error",
            code="deadline_unmeetable",
            param="deadline_ms",
            predicted_ms=round(error.predicted_ms, 3),
            headers=retry(error.retry_after_s),
        )
    if isinstance(error, OverloadError):
        return ApiError(503, text, type="server_error", code="overloaded", headers=retry(error.retry_after_s))
    if isinstance(error, GrammarError):
        return invalid(text, None, "invalid_grammar")
    if isinstance(error, RequestError):
        return invalid(text, None)
    if isinstance(error, TemplateError):
        return invalid(text, prompt, "chat_template_error")
    if isinstance(error, ModelError):
        return ApiError(404, text, param="model", code="model_not_found")
    return internal()


def internal() -> ApiError:
    """What is said of a failure whose cause is ours: nothing of its inside. The same request would fail again."""
    message = "the server failed on this request; its log has a line with the request's id"
    headers = {"x-should-retry": "false"}
    return ApiError(500, message, type="server_error", code="internal_error", headers=headers)


def retry(seconds: float) -> dict[str, str]:
    """Clients of OpenAI retry 5xx twice by themselves, which triples the load: they are asked not to."""
    return {"Retry-After": str(max(1, math.ceil(seconds))), "x-should-retry": "false"}
