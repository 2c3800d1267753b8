"""What the server and its engine process say to each other: frames of 4 bytes of length and a pickle.

Times are seconds of time.monotonic(), which both processes share.
"""

from __future__ import annotations

import pickle
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from millis.engine.runner import Ranked
from millis.models.config import Head
from millis.types import FinishReason, OnDeadline, Priority, SamplingParams, Timings, TokenLogprob

RefusalKind = Literal["deadline_unmeetable", "overloaded", "invalid_request", "invalid_grammar"]
FailureCode = Literal["failed", "invalid_grammar"]
LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Start:
    """The first message: which model, the options of EngineConfig, and whether a process before this one has ended."""

    model: str
    options: dict[str, Any]
    again: bool = False
    adapters: tuple[tuple[str, str], ...] = ()  # name, path


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Generate behind `prompt`. `minimum_tokens`: the shortest answer worth giving; None: the engine's own rule."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival_s: float
    deadline_s: float | None = None
    asked_ms: float | None = None  # the client's deadline, from arrival, of which delivery takes some
    priority: Priority = "standard"
    tenant: str = ""
    on_deadline: OnDeadline = "partial"
    minimum_tokens: int | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """For each continuation, the summed log-probability (nats) of its tokens after the prompt."""

    id: int
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    arrival_s: float
    deadline_s: float | None = None
    asked_ms: float | None = None  # the client's deadline, from arrival, of which delivery takes some
    priority: Priority = "standard"
    tenant: str = ""
    adapter: str | None = None
    best: int | None = None  # so many likely tokens are told of each place of the only continuation


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """A vector of unit length for each prompt. head: what an encoder's head makes of it instead, its logits."""

    id: int
    prompts: tuple[tuple[int, ...], ...]
    arrival_s: float
    deadline_s: float | None = None
    asked_ms: float | None = None  # the client's deadline, from arrival, of which delivery takes some
    priority: Priority = "standard"
    tenant: str = ""
    head: bool = False


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Makes an adapter known; answered by Done or Refused."""

    id: int
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Forgets an adapter; answered as LoadAdapter."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Done:
    """What was asked for is so."""

    id: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this request any more."""

    id: int


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep the keys and values of these tokens for the tenant."""

    tokens: tuple[int, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What was loaded."""

    path: str
    context: int  # tokens that a sequence may have, in a smaller KV cache fewer; of an encoder: a text
    vocab: int
    threads: int
    isa: str
    weight_bytes: int
    load_s: float
    warm_s: float
    pages: int = 0  # of the KV cache, which encoders have none of
    page_tokens: int = 0
    max_sequences: int = 0
    head: Head | None = None  # what an encoder was trained to tell
    answer_tokens: int = 0  # of an encoder-decoder model's answer, at most, unless a request says otherwise
    reads: int = 0  # tokens of a text that its head looks at; the network reads `context` of them
    relates: bool = False  # a cross-encoder: its head says how well two texts fit


@dataclass(frozen=True, slots=True)
class Ready:
    """Loaded, warm and measured: requests may come."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Progress:
    """A line about loading."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one request; its last message has finish_reason and timings.

    end: of the token that ended the answer, and is none of it, where log-probabilities were asked for.
    """

    id: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    end: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """The answer to Score, one value a continuation. complete: there was time for all of each.

    ranked: of each token of the only continuation, where `best` asked for it.
    """

    id: int
    values: tuple[float, ...]
    timings: Timings
    complete: bool
    ranked: Ranked | None = None


@dataclass(frozen=True, slots=True)
class Vectors:
    """The answer to Embed: float32, a row a prompt."""

    id: int
    data: bytes
    shape: tuple[int, int]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that was not admitted."""

    id: int
    kind: RefusalKind
    message: str
    predicted_ms: float | None = None
    retry_after_s: float | None = None
    rule: str | None = None  # of the grammar, that is at fault


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that could not be finished; id 0: the engine process itself could not start.

    invalid_grammar: its grammar met a limit on the way, and `message` is for its client.
    """

    id: int
    message: str
    code: FailureCode = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The engine at one moment, at most ten times a second, and totals since it started."""

    at_s: float
    running: int = 0
    waiting: int = 0  # for their first step
    unprepared: int = 0  # of these: for a grammar to be compiled or an adapter to be read
    compiled: int = 0  # grammars
    kv_used: int = 0  # pages
    kv_total: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # of which were cached
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    steps: int = 0
    step_predicted_ms: float = 0.0  # of the latest step
    step_actual_ms: float = 0.0
    step_ms: float = 0.0  # a decode step lately
    prefill_token_ms: float = 0.0  # one more prompt token lately
    backlog_ms: float = 0.0  # that computing the prompts which wait is thought to take


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step brought forth."""

    items: list[Answer]
    at_s: float = field(default_factory=time.monotonic)  # when the step had ended


Work = Submit | Score | Embed | LoadAdapter | UnloadAdapter
Answer = Tokens | Scores | Vectors | Refused | Failed | Done


def frame(message: Any) -> bytes:
    """The bytes of a message."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that `data` completes. ValueError: a length that no message has."""
        buffer, at, found = self._buffer, 0, []
        buffer += data
        while len(buffer) - at >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, at)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are sent")
            end = at + LENGTH.size + length
            if len(buffer) < end:
                break
            found.append(pickle.loads(memoryview(buffer)[at + LENGTH.size : end]))
            at = end
        del buffer[:at]
        return found
