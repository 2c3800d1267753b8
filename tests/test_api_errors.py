"""Bodies that are wrong: whatever is sent ends in a job, or in an error that names the fault in the client's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api_support import LEAST, job
from millis.server.api.endpoints import ROUTES, parse
from millis.server.api.errors import ApiError, from_error, internal
from millis.server.api.job import Job, Limits
from millis.types import (
    DeadlineError,
    GrammarError,
    MillisError,
    ModelError,
    OverloadError,
    PullError,
    RequestError,
    TemplateError,
)

ENDPOINTS = list(ROUTES)
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


def outcome(endpoint: Any, body: bytes) -> Job | ApiError:
    """The job or the error; anything else fails the test."""
    try:
        return parse(endpoint, body, Limits())
    except ApiError as error:
        assert error.status == 400
        assert set(error.body()["error"]) == {"message", "type", "param", "code"}
        json.dumps(error.body()).encode()
        return error


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@QUIET
@given(data=st.data())
def test_random_values_in_known_fields_never_break_out(endpoint: Any, data: st.DataObject) -> None:
    kind = ROUTES[endpoint].request
    names = st.sampled_from([field.alias or name for name, field in kind.model_fields.items()] + list(kind.refused))
    fields = data.draw(st.dictionaries(names | st.text(max_size=5), JSON, max_size=3))
    outcome(endpoint, json.dumps({**LEAST[endpoint], **fields}).encode())


def mutated(value: Any, data: st.DataObject) -> Any:
    """`value` with something in it changed."""
    if data.draw(st.booleans()) or not isinstance(value, (dict, list)) or not value:
        return data.draw(JSON)
    key = data.draw(st.sampled_from(range(len(value)) if isinstance(value, list) else sorted(value)))
    copy = value.copy()
    copy[key] = mutated(value[key], data)
    return copy


RICH: dict[Any, dict[str, Any]] = {
    "chat": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "x", "tool_call_id": "c"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "logit_bias": {"5": 1},
    },
    "responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
        ],
        "tools": [{"type": "function", "name": "f"}],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "f"},
    },
}  # fmt: skip


@pytest.mark.parametrize("endpoint", RICH)
@QUIET
@given(data=st.data())
def test_right_bodies_with_something_changed_never_break_out(endpoint: Any, data: st.DataObject) -> None:
    assert job(endpoint, **RICH[endpoint])
    outcome(endpoint, json.dumps(mutated({**LEAST[endpoint], **RICH[endpoint]}, data)).encode())


@QUIET
@given(st.binary(max_size=40))
def test_random_bytes_never_break_out(body: bytes) -> None:
    outcome("chat", body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff", b'{"model": NaN}', b'{"model": "\xff"}',
        b'{"model": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_said(body: bytes) -> None:
    error = outcome("chat", body)
    assert isinstance(error, ApiError) and error.code == "invalid_json"


def test_a_byte_order_mark_is_skipped() -> None:
    assert isinstance(outcome("chat", json.dumps(LEAST["chat"]).encode("utf-8-sig")), Job)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 10**400},
        {"logit_bias": {str(i): "x" for i in range(100_000)}},
        {"messages": [0] * 300_000},
        {"messages": [{"role": "user", "content": "x", **{str(i): 0 for i in range(100_000)}}]},
        {str(i): 0 for i in range(100_000)},
        {"stop": [""] * 100_000},
        {"metadata": {"x" * 100: [[[]]] * 1000}, "nonsense" * 1000: 1},
    ],
)
def test_large_nonsense_is_refused_in_few_words(fields: dict[str, Any]) -> None:
    error = outcome("chat", json.dumps({**LEAST["chat"], **fields}).encode())
    assert isinstance(error, ApiError)
    assert len(json.dumps(error.body())) < 1000


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_refused_field_is_named_and_null_asks_for_nothing(endpoint: Any) -> None:
    refused = ROUTES[endpoint].request.refused
    for name, reason in refused.items():
        error = outcome(endpoint, json.dumps({**LEAST[endpoint], name: {"any": 1}}).encode())
        assert isinstance(error, ApiError)
        assert (error.code, error.param) == ("unsupported_parameter", name)
        assert reason in error.message
    assert job(endpoint, **dict.fromkeys(refused)) == job(endpoint)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_has_a_schema_for_its_body(endpoint: Any) -> None:
    schema = ROUTES[endpoint].request.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(LEAST[endpoint]) >= set(schema.get("required", ()))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DeadlineError("late", predicted_ms=12.34567, retry_after_s=0.2), 503, "deadline_unmeetable"),
        (OverloadError("full", retry_after_s=2.5), 503, "overloaded"),
        (GrammarError("bad schema"), 400, "invalid_grammar"),
        (RequestError("bad"), 400, "invalid_value"),
        (TemplateError("no template"), 400, "chat_template_error"),
        (ModelError("none"), 404, "model_not_found"),
        (PullError("none"), 404, "model_not_found"),
        (MillisError("secret"), 500, "internal_error"),
    ],
)
def test_our_errors_have_a_status_and_a_code(error: MillisError, status: int, code: str) -> None:
    found = from_error(error)
    assert (found.status, found.code) == (status, code)
    assert from_error(found) is found
    assert "secret" not in found.message


def test_refusals_say_when_to_come_back_and_that_no_client_should_retry_by_itself() -> None:
    late = from_error(DeadlineError("late", predicted_ms=12.34567, retry_after_s=0.2))
    assert late.headers == {"Retry-After": "1", "x-should-retry": "false"}
    assert late.body()["error"] == {
        "message": "late", "type": "server_error", "param": "deadline_ms", "code": "deadline_unmeetable",
        "predicted_ms": 12.346,
    }  # fmt: skip
    full = from_error(OverloadError("full", retry_after_s=2.5))
    assert full.headers == {"Retry-After": "3", "x-should-retry": "false"}


def test_anthropics_clients_get_their_own_shape() -> None:
    late = from_error(DeadlineError("late", predicted_ms=12, retry_after_s=1))
    assert late.body_for("/v1/messages") == {
        "type": "error",
        "error": {
            "type": "overloaded_error", "message": "late", "param": "deadline_ms", "code": "deadline_unmeetable",
            "predicted_ms": 12,
        },
    }  # fmt: skip
    assert late.body_for("/v1/chat/completions") == late.body()
    assert internal().anthropic_body()["error"]["type"] == "api_error"


def test_what_failed_here_would_fail_again() -> None:
    assert internal().headers == {"x-should-retry": "false"}


FORM = {"type": "json_schema", "schema": {"type": "object"}}
CALLED: dict[str, Any] = {"name": "f", "strict": True}


@pytest.mark.parametrize(
    ("endpoint", "fields", "form"),
    [
        ("chat", {}, None),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"structured_outputs": {"regex": "x"}}, "structured_outputs"),
        ("chat", {"tools": [{"type": "function", "function": CALLED}]}, "tools"),
        ("completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("completions", {"structured_outputs": {"regex": "x"}}, "structured_outputs"),
        ("responses", {"text": {"format": {**FORM, "name": "n"}}}, "text.format"),
        ("responses", {"text": {"format": {**FORM, "name": "n"}}, "tools": [{"type": "function", **CALLED}]}, "tools"),
        ("messages", {"output_config": {"format": FORM}}, "output_config.format"),
    ],
)
def test_a_job_knows_which_field_its_grammar_is_from(endpoint: Any, fields: dict[str, Any], form: str | None) -> None:
    found = job(endpoint, **fields)
    assert found.form == form and (found.params.grammar is None) == (form is None)
