"""A server under load and one request to it: what goes out, and what came back when."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from millis.types import RequestError


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go. `path` is that of the URL without `/v1`, which every endpoint begins with."""

    name: str
    host: str
    port: int
    path: str = ""
    tls: bool = False

    @staticmethod
    def parse(text: str) -> Server:
        """`URL` or `NAME=URL`. RequestError if it is neither."""
        name, equals, url = text.partition("=")
        if not equals or "://" in name:
            name, url = "", text
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise RequestError(f"{url!r} is no URL: {error}; write http://127.0.0.1:8000") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
            raise RequestError(f"{url!r} is no URL of a server; write http://127.0.0.1:8000 or NAME=http://…")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise RequestError(f"{url!r} has characters that no URL has")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return Server(name or parts.netloc, host, port or (443 if tls else 80), path, tls)

    @property
    def url(self) -> str:
        return f"http{'s' * self.tls}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def request(self, endpoint: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """The bytes of a request: POST with a JSON body, GET without one."""
        lines = [f"{'GET' if body is None else 'POST'} {self.path}{endpoint} HTTP/1.1", f"Host: {self.authority}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "User-Agent: millis-bench", "", ""]).encode() + (body or b"")


@dataclass(slots=True, eq=False)
class Exchange:
    """A request and what came back, in the clock's seconds."""

    data: bytes  # the request
    scheduled_s: float  # when it was to be sent; latencies count from here
    sent_s: float | None = None
    status: int | None = None
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # of the body, as they arrived
    end_s: float | None = None
    error: str | None = None  # why there is no whole answer
    size: int = 0  # bytes of the body
