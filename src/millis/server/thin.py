"""A first, narrow reading of chat bodies, until server/api is here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from millis.types import MillisError, SamplingParams


class ApiError(MillisError):
    """An answer that is an error."""

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
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.predicted_ms = predicted_ms
        self.headers = dict(headers or {})

    def body_for(self, path: str) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        if self.predicted_ms is not None:
            error["predicted_ms"] = self.predicted_ms
        return {"error": error}


def parse_chat(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError:
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        raise ApiError(400, "messages must be a list", param="messages")
    names = ("temperature", "top_p", "seed", "stop", "ignore_eos", "presence_penalty", "frequency_penalty")
    sampling = {name: data[name] for name in names if data.get(name) is not None}
    sampling["max_tokens"] = data.get("max_completion_tokens") or data.get("max_tokens") or 256
    try:
        data["params"] = SamplingParams(**sampling)
    except (MillisError, TypeError) as error:
        raise ApiError(400, str(error)) from None
    return data
