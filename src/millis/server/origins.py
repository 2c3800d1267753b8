"""Which names a server answers to, and which sites' pages may ask it: Host, Origin and CORS (the Fetch standard).

A page whose name is made to point at this machine (DNS rebinding) gives itself away by its Host, a page of another
site by its Origin. Programs send no Origin, and are not concerned.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from millis.config import ServerConfig
from millis.server.api.errors import ApiError
from millis.types import RequestError

LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
ANY = "*"
PORTS = {"http": 80, "https": 443}
ALLOWED = b"authorization, content-type, x-api-key, x-deadline-ms, x-request-timeout-seconds"
EXPOSED = b"server-timing, retry-after, x-request-id, x-should-retry"
PREFLIGHT_S = 600  # that a browser remembers an answer to a preflight

_NAME = r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)"
_HOST = re.compile(rf"{_NAME}(?::([0-9]{{1,5}}))?")
_ORIGIN = re.compile(rf"([a-z][a-z0-9+.-]*)://{_HOST.pattern}")

Origin = tuple[str, str, int | None]  # scheme, host, port
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Origins:
    """The rules of a server. Header names are in lower case."""

    hosts: frozenset[str] | None = None  # names that it answers to; None: any
    pages: frozenset[Origin] = frozenset()  # whose pages may ask, beside its own
    any_page: bool = False

    @classmethod
    def of(cls, config: ServerConfig) -> Origins:
        """The rules that settings make. RequestError: a name or an origin that is none."""
        hosts = frozenset(_allowed(name) for name in config.allowed_host or ())
        if hosts or is_loopback(config.host):
            hosts |= LOCAL | {f"[{config.host}]" if ":" in config.host else config.host.lower()}
        given = config.cors_origin or []
        return cls(hosts or None, frozenset(_page(text) for text in given if text != ANY), ANY in given)

    @property
    def cors(self) -> bool:
        """Whether pages of other origins may ask at all."""
        return self.any_page or bool(self.pages)

    def check(self, method: str, scheme: str, headers: Mapping[bytes, bytes]) -> None:
        """ApiError 403: the request is for another name, or a page asks that may not."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and host:
            found = _HOST.fullmatch(host)
            if found is None or found[1] not in self.hosts:
                message = f"this server does not answer as {host!r:.100}; --allowed-host NAME lets it"
                raise ApiError(403, message, type="permission_error", code="host_not_allowed")
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if self.allows(origin) or site == b"same-origin":  # a browser's word, even where a proxy changed the Host
            return
        foreign = method in ("POST", "DELETE") and site in (b"cross-site", b"same-site")
        if origin is not None:
            asking = _origin(origin)
            foreign = foreign or asking is None or asking != _origin(f"{scheme}://{host}".encode("latin-1"))
        if foreign:
            message = "a page of another site may not ask on behalf of its visitor; --cors-origin ORIGIN lets it"
            raise ApiError(403, message, type="permission_error", code="cross_site_request")

    def allows(self, origin: bytes | None) -> bool:
        """Whether a page of this origin may ask because a setting says so."""
        return origin is not None and (self.any_page or _origin(origin) in self.pages)

    def shown(self, origin: bytes | None) -> Headers:
        """What every answer says to a browser."""
        if not self.cors:
            return []
        found = [(b"vary", b"Origin")]
        if origin is not None and self.allows(origin):
            found.append((b"access-control-allow-origin", b"*" if self.any_page else origin))
            found.append((b"access-control-expose-headers", EXPOSED))
        return found

    def preflight(self, method: str, headers: Mapping[bytes, bytes]) -> Headers | None:
        """The answer to a browser that asks whether it may ask; None: this is no such question."""
        asks = method == "OPTIONS" and b"access-control-request-method" in headers
        if not asks or not self.allows(headers.get(b"origin")):
            return None
        return [
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"),
            (b"access-control-allow-headers", headers.get(b"access-control-request-headers", ALLOWED)),
            (b"access-control-max-age", b"%d" % PREFLIGHT_S),
        ]


def _origin(text: bytes) -> Origin | None:
    """An origin's parts; None: it has none, as that of a file has not."""
    found = _ORIGIN.fullmatch(text.decode("latin-1").lower())
    if found is None:
        return None
    return found[1], found[2], PORTS.get(found[1]) if found[3] is None else int(found[3])


def _page(text: str) -> Origin:
    found = _origin(text.encode(errors="replace"))
    if found is None:
        raise RequestError(f"cors_origin must be {ANY} or an origin such as https://app.example, not {text!r:.100}")
    return found


def _allowed(text: str) -> str:
    name = f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
    found = _HOST.fullmatch(name.lower())
    if found is None or found[2] is not None:
        raise RequestError(f"allowed_host must be a name such as llm.example, without a port, not {text!r:.100}")
    return found[1]


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens there."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError):
        return False  # listening fails, too
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback
