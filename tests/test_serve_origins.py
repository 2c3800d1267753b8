"""Names that a server answers to and pages that may ask it: the rules alone, then a browser's questions to a server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millis.config import ServerConfig
from millis.server.api.errors import ApiError
from millis.server.origins import Origins
from millis.server.settings import read_settings
from millis.types import RequestError
from serving import CHAT, QUICK, Server, chat

APP = "https://app.example"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


def verdict(rules: Origins, method: str = "POST", scheme: str = "http", **headers: str) -> str | None:
    """The code of the refusal; None: the request may come in."""
    raw = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    try:
        rules.check(method, scheme, raw)
    except ApiError as error:
        assert error.status == 403
        return error.code
    return None


@pytest.mark.parametrize("listens", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_at_a_loopback_address_only_its_names_are_answered_to(listens: str) -> None:
    rules = Origins.of(ServerConfig(host=listens, allowed_host=["LLM.example", "::2"]))
    for host in ("localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]", "[::1]:8000", "llm.example:80",
                 "[::2]:9", f"[{listens}]" if ":" in listens else listens):  # fmt: skip
        assert verdict(rules, host=host) is None, host
    assert verdict(rules) is None  # HTTP/1.0 has none
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "localhost@evil.example", "[::1",
                 "localhost:80:80", "localhost:", "a" * 9999, "127.0.0.1.evil.example", "::1"):  # fmt: skip
        assert verdict(rules, "GET", host=host) == "host_not_allowed", host


def test_elsewhere_any_name_is_answered_to_unless_names_are_given() -> None:
    assert verdict(Origins.of(ServerConfig(host="0.0.0.0")), host="any.example") is None
    rules = Origins.of(ServerConfig(host="0.0.0.0", allowed_host=["llm.example"]))
    assert verdict(rules, host="llm.example:8000") is None and verdict(rules, host="localhost") is None
    assert verdict(rules, host="any.example") == "host_not_allowed"


@pytest.mark.parametrize(
    ("scheme", "host", "origin", "taken"),
    [
        ("http", "localhost:8000", "http://localhost:8000", True),
        ("http", "localhost", "http://localhost:80", True),
        ("https", "llm.example:443", "https://llm.example", True),
        ("http", "localhost:8000", "http://LOCALHOST:8000", True),
        ("http", "localhost:8000", "http://localhost:3000", False),
        ("http", "localhost:8000", "http://127.0.0.1:8000", False),
        ("http", "llm.example", "https://llm.example", False),
        ("http", "localhost:8000", "http://evil.example", False),
        ("http", "localhost:8000", "null", False),
        ("http", "", "null", False),
        ("http", "", "http://", False),
        ("http", "localhost", "", False),
        ("http", "localhost", "http://localhost/path", False),
    ],
)
def test_a_page_may_ask_its_own_server_only(scheme: str, host: str, origin: str, taken: bool) -> None:
    for method in ("POST", "GET", "OPTIONS"):
        found = verdict(Origins(), method, scheme, host=host, origin=origin)
        assert found == (None if taken else "cross_site_request")
    assert verdict(Origins(any_page=True), "POST", scheme, host=host, origin=origin) is None


def test_what_a_browser_says_of_the_site_counts() -> None:
    proxied = {"host": "127.0.0.1:8000", "origin": "https://llm.example"}
    assert verdict(Origins(), **proxied, sec_fetch_site="same-origin") is None
    assert verdict(Origins(), **proxied, sec_fetch_site="none") == "cross_site_request"
    for method in ("POST", "DELETE"):
        assert verdict(Origins(), method, host="localhost", sec_fetch_site="cross-site") == "cross_site_request"
    assert verdict(Origins(), "GET", host="localhost", sec_fetch_site="cross-site") is None  # somebody followed a link
    given = Origins.of(ServerConfig(cors_origin=["http://localhost:3000"]))
    page = {"host": "localhost:8000", "sec_fetch_site": "same-site"}
    assert verdict(given, **page, origin="http://localhost:3000") is None
    assert verdict(given, **page, origin="http://localhost:3001") == "cross_site_request"


@pytest.mark.parametrize(
    "settings",
    [
        {"cors_origin": ["app.example"]},
        {"cors_origin": ["https://app.example/"]},
        {"cors_origin": ["https://*.example"]},
        {"cors_origin": ["null"]},
        {"cors_origin": APP},
        {"allowed_host": ["http://llm.example"]},
        {"allowed_host": ["llm.example:8000"]},
        {"allowed_host": ["cafe:80"]},
        {"allowed_host": [""]},
        {"allowed_host": ["*"]},
    ],
)
def test_names_and_origins_that_are_none_are_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(settings))):
        Origins.of(ServerConfig(**settings))


def test_the_environment_has_several_with_commas() -> None:
    found = read_settings({}, {"MILLIS_SERVE_CORS_ORIGIN": f"{APP},http://localhost:3000"}).server
    assert found.cors_origin == [APP, "http://localhost:3000"]


# A server with a key, one other name, and one other page that may ask.


@pytest.fixture(scope="module")
def server(model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("origins") / "keys"
    keys.write_text(f"sha256:{hashlib.sha256(b'right').hexdigest()} us\n")
    flags = ("--cors-origin", APP, "--cors-origin", "http://localhost:3000", "--allowed-host", "llm.example")
    with Server(model_path("smollm2"), *QUICK, *flags, "--api-key-file", str(keys), key="right") as running:
        yield running


def test_a_browser_is_told_before_it_asks(server: Server) -> None:
    nobody = {"authorization": ""}
    status, headers, data = server.ask(CHAT, None, {"origin": APP, **ASKS, **nobody}, "OPTIONS")
    assert (status, data, headers["access-control-allow-origin"]) == (204, b"", APP)
    assert headers["access-control-allow-methods"] == "GET, HEAD, POST, DELETE" and "Origin" in headers["vary"]
    assert headers["access-control-allow-headers"] == ASKS["access-control-request-headers"]
    assert "access-control-allow-credentials" not in headers
    plain = {"origin": APP, "access-control-request-method": "POST", **nobody}
    _, headers, _ = server.ask(CHAT, None, plain, "OPTIONS")
    assert {"authorization", "content-type", "x-deadline-ms"} <= set(
        headers["access-control-allow-headers"].split(", ")
    )
    status, headers, _ = server.ask(CHAT, None, {"origin": "https://evil.example", **ASKS, **nobody}, "OPTIONS")
    assert status == 403 and "access-control-allow-origin" not in headers


def test_its_page_may_read_answers_streams_and_errors(server: Server) -> None:
    page = {"origin": APP, "sec-fetch-site": "cross-site"}
    asked: list[tuple[Any, dict[str, str], int]] = [
        (chat(), page, 200),
        (chat(stream=True), page, 200),
        (chat(temperature=9), page, 400),
        (chat(), {**page, "authorization": "Bearer wrong"}, 401),
        (None, page, 405),
        (chat(), {**page, "host": "evil.example"}, 403),
    ]
    for body, sent, expected in asked:
        status, headers, _ = server.ask(CHAT, body, sent)
        assert (status, headers.get("access-control-allow-origin")) == (expected, APP), body
        assert headers["vary"] == "Origin" and "server-timing" in headers["access-control-expose-headers"]


def test_another_page_and_another_name_may_not(server: Server) -> None:
    status, headers, data = server.ask(CHAT, chat(), {"origin": "https://evil.example"})
    assert status == 403 and json.loads(data)["error"]["code"] == "cross_site_request"
    assert "access-control-allow-origin" not in headers and headers["vary"] == "Origin"
    status, _, data = server.ask("/v1/messages", chat(), {"host": "evil.example"})
    assert status == 403 and json.loads(data)["error"] == {
        "type": "permission_error",
        "code": "host_not_allowed",
        "message": "this server does not answer as 'evil.example'; --allowed-host NAME lets it",
    }
    assert server.ask("/health", None, {"host": "evil.example"})[0] == 403
    assert server.ask(CHAT, chat(), {"host": "llm.example", "origin": "http://llm.example"})[0] == 200
    assert server.ask(CHAT, chat(), {"host": "localhost:1", "origin": "http://localhost:1"})[0] == 200


def test_a_program_notices_nothing(server: Server) -> None:
    status, headers, _ = server.ask(CHAT, chat())
    assert status == 200 and "access-control-allow-origin" not in headers
