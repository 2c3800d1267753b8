"""Who may ask: API keys by their hashes, and how often each may. Pure but for reading the file; the clock is handed in.

A key file has one key a line, as `sha256:HEX [NAME]` or `scrypt:N:R:P:SALT_HEX:HASH_HEX [NAME]`; # begins a comment.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from millis.types import RequestError

_SHA256 = re.compile(r"sha256:([0-9a-fA-F]{64})")
_SCRYPT = re.compile(r"scrypt:(\d{1,7}):(\d{1,2}):(\d{1,2}):((?:[0-9a-fA-F]{2}){8,64}):((?:[0-9a-fA-F]{2}){16,64})")
MAX_KEYS = 10_000
MAX_KEY_CHARS = 512
MAX_SCRYPT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Key:
    """One line of the file. `id` tells keys apart in caches and figures, and says nothing of the key itself."""

    id: str
    digest: bytes
    salt: bytes | None = None  # scrypt's; None: plain SHA-256, for keys of full length drawn at random
    cost: tuple[int, int, int] = (1, 1, 1)

    def matches(self, text: bytes, sha256: bytes) -> bool:
        """Whether `text` is this key; takes as long whatever it is."""
        if self.salt is None:
            return hmac.compare_digest(self.digest, sha256)
        n, r, p = self.cost
        found = hashlib.scrypt(text, salt=self.salt, n=n, r=r, p=p, maxmem=MAX_SCRYPT_BYTES, dklen=len(self.digest))
        return hmac.compare_digest(self.digest, found)


class Keys:
    """The keys of a file. Raises RequestError for a line that is no key, naming the line and not what it says."""

    def __init__(self, text: str, name: str = "the key file") -> None:
        self._keys: list[Key] = []
        for number, line in enumerate(text.splitlines(), 1):
            line = line.partition("#")[0].strip()
            if line:
                self._keys.append(_key(line, f"{name}, line {number}"))
        if not self._keys:
            raise RequestError(f"{name} holds no key; write sha256:HEX lines, or leave --api-key-file out")
        if len(self._keys) > MAX_KEYS:
            raise RequestError(f"{name} holds {len(self._keys)} keys; at most {MAX_KEYS} are read")
        self.slow = any(key.salt is not None for key in self._keys)
        """Whether `find` may take long, so that it belongs into a thread."""
        self._secret = secrets.token_bytes(32)
        self._known: dict[bytes, Key] = {}  # keys presented before, by a digest that only this process can compute

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file. RequestError: it cannot be read, or holds what is no key."""
        try:
            return cls(path.read_text(encoding="utf-8-sig"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise RequestError(f"cannot read the keys in {path}: {reason}") from None

    def recall(self, key: str) -> Key | None:
        """A key that `find` has found before. Fast."""
        return self._known.get(self._mark(key))

    def find(self, key: str) -> Key | None:
        """The line that this key belongs to; every line is compared."""
        text = key.encode("utf-8", "surrogatepass")
        sha256 = hashlib.sha256(text).digest()
        found: Key | None = None
        for candidate in self._keys:
            if candidate.matches(text, sha256):
                found = candidate
        if found is not None and len(self._known) < 2 * MAX_KEYS:
            self._known[self._mark(key)] = found
        return found

    def _mark(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode("utf-8", "surrogatepass"), "sha256")


def _key(line: str, where: str) -> Key:
    spec, _, name = line.partition(" ")
    identity = name.strip() or hashlib.sha256(spec.encode()).hexdigest()[:12]
    if (match := _SHA256.fullmatch(spec)) is not None:
        return Key(identity, bytes.fromhex(match[1]))
    if (match := _SCRYPT.fullmatch(spec)) is not None:
        n, r, p = int(match[1]), int(match[2]), int(match[3])
        if n < 2 or n & (n - 1) or not 1 <= r <= 32 or not 1 <= p <= 16 or 128 * n * r * p >= MAX_SCRYPT_BYTES:
            raise RequestError(f"{where}: scrypt's N must be a power of two, and 128·N·R·P below {MAX_SCRYPT_BYTES}")
        return Key(identity, bytes.fromhex(match[5]), bytes.fromhex(match[4]), (n, r, p))
    raise RequestError(
        f"{where} is no key; write sha256:HEX or scrypt:N:R:P:SALT_HEX:HASH_HEX, then a name if you like"
    )


def presented(headers: Mapping[bytes, bytes]) -> str | None:
    """The key in `Authorization: Bearer KEY`, in `x-api-key: KEY`, or the password that a browser was given."""
    scheme, _, value = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    key: str | None = None
    if scheme.lower() == "bearer":
        key = value.strip()
    elif scheme.lower() == "basic":
        try:
            key = base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    elif b"x-api-key" in headers:
        key = headers[b"x-api-key"].decode("latin-1").strip()
    return key if key and len(key) <= MAX_KEY_CHARS else None


@dataclass(slots=True)
class _Account:
    tokens: float
    at_s: float
    running: int = 0


@dataclass(slots=True)
class Quotas:
    """How many requests a key may have at once, and how many a second (token bucket; 0: unlimited)."""

    concurrent: int
    rate: float
    burst: int
    _accounts: dict[str, _Account] = field(default_factory=dict)

    def enter(self, key: str, now_s: float) -> float | None:
        """None: the request may begin, and must `leave`. Otherwise the seconds after which to try again."""
        account = self._accounts.setdefault(key, _Account(self.burst, now_s))
        if self.concurrent and account.running >= self.concurrent:
            return 1.0
        if self.rate:
            account.tokens = min(self.burst, account.tokens + self.rate * (now_s - account.at_s))
            account.at_s = now_s
            if account.tokens < 1:
                return (1 - account.tokens) / self.rate
            account.tokens -= 1
        account.running += 1
        return None

    def leave(self, key: str) -> None:
        """The request has ended."""
        self._accounts[key].running -= 1
