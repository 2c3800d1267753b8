"""Keys, quotas, slow senders and the settings' three sources: what stands between a server and the world."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millis.config import ServerConfig
from millis.server.auth import Keys, Quotas, presented
from millis.server.settings import SHARED, known, read_settings
from millis.types import RequestError
from serving import CHAT, Server, chat

PINNED = "You answer questions about the opening hours of the city's libraries. " * 6
KEY, SLOW_KEY = "sk-test-0123456789", "hunter2 with salt"


def key_lines() -> str:
    slow = hashlib.scrypt(SLOW_KEY.encode(), salt=b"saltsalt", n=1024, r=8, p=1, dklen=32)
    return (
        f"# two keys\nsha256:{hashlib.sha256(KEY.encode()).hexdigest()} alice\n"
        f"scrypt:1024:8:1:{b'saltsalt'.hex()}:{slow.hex()}\n"
    )


@pytest.fixture(scope="module")
def server(model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("trust")
    (folder / "keys").write_text(key_lines())
    (folder / "pinned").write_text(PINNED)
    settings = folder / "serve.toml"
    settings.write_text(
        f'api_key_file = "{folder / "keys"}"\nheader_timeout_s = 0.5\nbody_timeout_s = 0.5\nkey_burst = 9\n'
    )
    flags = (
        "--threads",
        "1",
        "--max-batch-tokens",
        "64",
        "--config",
        str(settings),
        "--key-burst",
        "30",
        "--pin",
        str(folder / "pinned"),
    )
    with Server(model_path("smollm2"), *flags, key=KEY, MILLIS_SERVE_KEY_RATE="0.001") as running:
        yield running


def test_without_a_key_only_health_answers(server: Server) -> None:
    nobody = {"authorization": "Bearer wrong"}
    for path in ("/v1/models", "/metrics", "/ready", "/openapi.json", "/", "/v1/nothing"):
        status, headers, data = server.ask(path, None, nobody)
        assert status == 401 and json.loads(data)["error"]["code"] == "invalid_api_key", path
        assert headers["www-authenticate"] == "Bearer"
    assert server.ask(CHAT, chat(), nobody)[0] == 401
    assert server.ask("/health", None, nobody)[0] == 200
    assert server.ask("/", None, {**nobody, "accept": "text/html"})[1]["www-authenticate"].startswith("Basic")


def test_a_key_is_taken_as_every_client_sends_it(server: Server) -> None:
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for headers in (
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"Bearer {SLOW_KEY}"},
        {"authorization": f"Basic {basic}"},
        {"authorization": "", "x-api-key": KEY},
    ):
        assert server.ask("/v1/models", None, headers)[0] == 200, headers


def test_senders_that_take_their_time_are_cut_off(server: Server) -> None:
    with server.raw() as silent, server.raw() as half, server.raw() as headed:
        half.sendall(b"GET /health HTTP/1.1\r\n")
        headed.sendall(f"POST {CHAT} HTTP/1.1\r\nauthorization: Bearer {KEY}\r\ncontent-length: 9\r\n\r\n{{".encode())
        assert silent.recv(100) == b""
        assert b" 408 " in half.recv(1000)
        assert b" 408 " in headed.recv(1000)
    assert server.ask("/health")[0] == 200


def test_a_key_sees_nothing_of_another_keys_cache(server: Server) -> None:
    body = chat("The quick brown fox jumps over the lazy dog, again and again. " * 8, max_tokens=1)
    other = {"authorization": f"Bearer {SLOW_KEY}"}

    def cached(headers: dict[str, str] | None = None) -> int:
        status, answer = server.json(CHAT, body, headers)
        assert status == 200, answer
        return int(answer["timings"]["cached_tokens"])

    shared = cached()  # the template's first tokens, which the pinned prompt has, too
    assert shared < 20 and cached() > 50
    assert cached(other) == shared and cached(other) > 50


def test_a_pinned_system_prompt_is_cached_before_it_is_asked(server: Server) -> None:
    messages = [{"role": "system", "content": PINNED.strip()}, {"role": "user", "content": "When?"}]
    status, answer = server.json(CHAT, {"model": "m", "messages": messages, "max_tokens": 1})
    assert status == 200
    assert answer["timings"]["cached_tokens"] >= len(PINNED.split())


def test_a_key_may_ask_so_often_and_no_more(server: Server) -> None:
    """30 at once and, at 0.001 a second, none after them. Last here: the key is used up."""
    found = [server.ask("/tokenize", {"prompt": "a"}) for _ in range(32)]
    statuses = [status for status, _, _ in found]
    assert statuses.count(200) <= 30 and statuses[-1] == 429
    assert json.loads(found[-1][2])["error"]["code"] == "rate_limit_exceeded" and int(found[-1][1]["retry-after"]) > 1
    assert server.ask("/tokenize", {"prompt": "a"}, {"authorization": f"Bearer {SLOW_KEY}"})[0] == 200


def test_quotas_on_a_clock_of_our_own() -> None:
    quotas = Quotas(concurrent=2, rate=2.0, burst=3)
    assert [quotas.enter("a", 0.0) for _ in range(2)] == [None, None]
    assert quotas.enter("a", 0.0) == 1.0  # two at once
    quotas.leave("a")
    assert quotas.enter("a", 0.0) is None
    quotas.leave("a")
    assert quotas.enter("a", 0.0) == pytest.approx(0.5)  # the bucket is empty: half a second for a token
    assert quotas.enter("a", 0.5) is None
    assert quotas.enter("b", 0.0) is None  # another key has its own


def test_keys_of_a_file() -> None:
    keys = Keys(key_lines())
    assert keys.find("no") is None and keys.recall(KEY) is None
    found = keys.find(KEY)
    assert found is not None and found.id == "alice" and keys.recall(KEY) is found
    slow = keys.find(SLOW_KEY)
    assert slow is not None and slow.id != "alice" and SLOW_KEY not in slow.id
    for text in (
        "",
        "# nothing",
        "plain",
        "sha256:12",
        "scrypt:1000:8:1:" + "00" * 8 + ":" + "00" * 32,
        "md5:" + "0" * 32,
    ):
        with pytest.raises(RequestError):
            Keys(text)
    assert presented({b"authorization": b"Bearer " + b"a" * 513}) is None
    assert presented({b"authorization": b"Basic !!!"}) is None
    assert presented({}) is None


def test_a_flag_counts_before_a_variable_before_a_file_before_the_default(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\ndrain_s = 1.5\nthreads = 3\nmodel = "a"\nmax_n = 2\n')
    environment = {"MILLIS_SERVE_PORT": "2", "MILLIS_SERVE_DRAIN_S": "2.5", "MILLIS_SERVE_SCREEN": "false", "HOME": "x"}
    found = read_settings({"port": 3, "max_body_bytes": None}, environment, str(file))
    assert found.server == ServerConfig(port=3, drain_s=2.5, max_n=2)
    assert found.engine == {**SHARED, "threads": 3, "screen": False} and found.model == "a"
    assert read_settings({}, {"MILLIS_SERVE_CONFIG": str(file)}).server.port == 1
    assert all(setting.about for setting in known().values())


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("prot = 1", {}, "did you mean 'port'"),
        ("port = 'x'", {}, "port must be a whole number"),
        ("port =", {}, "not TOML"),
        ("", {"MILLIS_SERVE_PROT": "1"}, "MILLIS_SERVE_PROT"),
        ("", {"MILLIS_SERVE_port": "1"}, "MILLIS_SERVE_port"),
        ("", {"MILLIS_SERVE_PORT": "high"}, "MILLIS_SERVE_PORT must be a whole number"),
        ("", {"MILLIS_SERVE_ACCESS_LOG": "maybe"}, "true or false"),
        ("threads = 0", {}, "threads"),
        ("tls_key = 'a'", {}, "belong together"),
    ],
)
def test_settings_that_mean_nothing_are_errors(
    tmp_path: Path, text: str, environment: dict[str, str], part: str
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(RequestError, match=part):
        read_settings({}, environment, str(file))
