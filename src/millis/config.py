"""EngineConfig and ServerConfig: all that is chosen once, at the start. The command line's flags derive from it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from millis.cgroup import cpu_quota, memory_left_bytes
from millis.types import RequestError

Precision = Literal["fast", "int8", "exact"]
Speculation = Literal["auto", "ngram", "off"]
MOST_CONTEXT = 1 << 24  # tokens


def usable_cores() -> int:
    """Physical cores this process may use: affinity, hyper-threads counted once, and control groups' quotas."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), cpu_quota() or len(cores)))


def available_memory_bytes() -> int | None:
    """Memory this process may still take: what is available, within control groups' limits. None: unknown."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        machine = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None
    left = memory_left_bytes()
    return machine if left is None else min(machine, left)


def _environment_isa() -> str:
    return os.environ.get("MILLIS_ISA") or "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run on this machine. Raises RequestError for a value outside its range."""

    threads: int = field(default_factory=usable_cores)
    """Compute threads, the caller's included; unless given, the physical cores this process may use."""
    isa: str = field(default_factory=_environment_isa)
    """Instruction set of the kernels; unless given, the environment's MILLIS_ISA, otherwise "auto": the best here."""
    precision: Precision = "fast"
    """fast: activations of two bytes, or bfloat16 in long prompts, and an f16 cache; weights of models that read in one
    byte each, which share scales, and an encoder's activations, too. int8: activations of one byte in decoders, too, as
    most engines have them; quicker prompts and batches, and now and then another word. exact: float32, for checks."""
    screen: bool = True
    """Read of a large output matrix only what may decide. Greedy choices stay the same, to six standard deviations of
    what is left out; draws too, but for tokens of less than 6e-6 of the best one's probability."""
    context: int | None = None
    """Longest sequence in tokens; unless given, what the model was made for, at most 8,192."""
    max_sequences: int = 8
    """Sequences computed in one step."""
    max_batch_tokens: int = 512
    """Tokens computed in one step: the size of a prefill chunk."""
    cache_tokens: int | None = None
    """Positions the KV cache holds for all sequences together; unless given, one full context or, with a prefix cache,
    one for each of max_sequences where a quarter of the available memory suffices."""
    prefix_cache: bool = False
    """Keep the KV cache of earlier prompts and answers, and compute of a prompt only what is new. A text may then
    differ where two tokens were nearly as likely: cached keys come from steps of another shape, which round otherwise.
    So it is off in Python programs, where a seed gives the same text every time, and on in a server."""
    max_waiting: int = 1024
    """Requests that may wait; more are refused."""
    max_gap_ms: float = 50.0
    """Milliseconds between two tokens of an interactive answer that prompts computed beside it had better not exceed;
    four times as many for a standard one, any number for batch."""
    max_step_ms: float | None = None
    """Milliseconds a step should take at most, so that a request that comes meanwhile waits no longer; a long prompt is
    cut accordingly. Python programs have no such limit, which is fastest for a single request."""
    delivery_ms: float = 0.0
    """Milliseconds from an answer's last token to its reader: deadlines are kept so much earlier."""
    speculation: Speculation = "auto"
    """auto: guess tokens from the text so far, and with a draft model where one is given; ngram: from the text; off."""
    max_adapters: int = 32
    """LoRA adapters held in memory at once; others are read again when a request names them."""
    draft: str | None = None
    """A smaller model of the same vocabulary that guesses tokens, named as a model is; answers stay the same."""

    def __post_init__(self) -> None:
        for name, high in (
            ("threads", 1024),
            ("context", MOST_CONTEXT),
            ("max_sequences", 4096),
            ("max_batch_tokens", 65536),
            ("cache_tokens", 1 << 30),
            ("max_waiting", 1 << 20),
            ("max_adapters", 4096),
        ):
            value = getattr(self, name)
            if value is None and name in ("context", "cache_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise RequestError(f"{name} must be a whole number in [1, {high}], not {value!r}")
        for name, low in (("max_gap_ms", 1.0), ("max_step_ms", 1.0), ("delivery_ms", 0.0)):
            value = getattr(self, name)
            if value is None and name == "max_step_ms":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= 1e6:
                raise RequestError(f"{name} must be milliseconds in [{low:g}, 1000000], not {value!r}")
        if self.precision not in get_args(Precision):
            raise RequestError(f"precision must be 'fast', 'int8' or 'exact', not {self.precision!r}")
        if self.speculation not in get_args(Speculation):
            raise RequestError(f"speculation must be 'auto', 'ngram' or 'off', not {self.speculation!r}")
        if self.draft is not None and (not isinstance(self.draft, str) or not self.draft):
            raise RequestError(f"draft must be a model's name, not {self.draft!r}")
        if self.draft is not None and self.speculation != "auto":
            raise RequestError(
                f"a draft model needs speculation='auto', not {self.speculation!r}; leave one of them out"
            )
        for name in ("screen", "prefix_cache"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not isinstance(self.isa, str):
            raise RequestError(f"isa must be a name such as 'auto' or 'scalar', not {self.isa!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How `millis serve` answers. Raises RequestError for a value outside its range."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's, which wants --api-key-file."""
    port: int = 8000
    """Port to listen at; 0: a free one."""
    allowed_host: list[str] | None = None
    """Name that requests may ask for in their Host header; may be given again, in the environment with commas. A server
    that listens at a loopback address answers to localhost, its addresses and these; any other to all, unless given."""
    cors_origin: list[str] | None = None
    """Origin whose pages may ask, such as https://app.example, or * for every site's; may be given again, in the
    environment with commas. Unless given, only the server's own page may."""
    api_key_file: str | None = None
    """File of hashed API keys, one a line: sha256:HEX or scrypt:N:R:P:SALT:HASH. With it, only /health needs no key."""
    tls_cert: str | None = None
    """File of the TLS certificate chain, PEM; needs --tls-key."""
    tls_key: str | None = None
    """File of the certificate's private key, PEM."""
    served_name: str | None = None
    """What the model is called in requests and answers; unless given, its name."""
    adapter: list[str] | None = None
    """LoRA adapter to serve as MODEL:NAME, given as NAME=PATH; may be given again, in the environment with commas."""
    adapter_dir: str | None = None
    """Folder whose adapters may be loaded while the server runs, by POST /v1/load_lora_adapter; with --api-key-file, by
    keys whose name begins with admin. Unless given, none may."""
    larger: list[str] | None = None
    """Larger model to serve beside, named as a model is or given as NAME=MODEL; may be given again, in the environment
    with commas. Requests that name several models have its answer where that is sure to be in time."""
    encoder: list[str] | None = None
    """Encoder to serve beside the model, named as a model is or given as NAME=MODEL; may be given again, in the
    environment with commas. Each answers /v1/embeddings and, where it was trained to, /v1/classify."""
    index: str | None = None
    """File made by millis index, from whose documents POST /v1/answer answers; the model that compares their meanings
    is served beside, too."""
    pin: str | None = None
    """File of texts whose keys and values stay in the prefix cache, one a line, \\n for a line break."""
    drain_s: float = 30.0
    """Seconds that answers under way are given to end after SIGTERM, SIGHUP or Ctrl-C."""
    max_body_bytes: int = 4 << 20
    """Largest request body."""
    max_header_bytes: int = 16 << 10
    """Largest request line and headers together."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; unless given, what the context holds."""
    max_n: int = 8
    """Most answers to one request."""
    max_requests: int = 1024
    """Most requests in work or waiting at once."""
    max_connections: int = 4096
    """Most connections at once, as far as the limit of open files can be raised."""
    max_stored: int = 1024
    """Most responses kept in memory for POST /v1/responses with store: true; 0: none is. Nothing else is ever kept."""
    max_stored_bytes: int = 64 << 20
    """Most bytes of these together."""
    key_concurrency: int = 0
    """Most requests of one key at once; 0: no limit."""
    key_rate: float = 0.0
    """Requests a second that one key may begin; 0: no limit."""
    key_burst: int = 20
    """Requests that a key may begin at once after a pause, under --key-rate."""
    header_timeout_s: float = 10.0
    """Seconds in which a request's headers must have come."""
    body_timeout_s: float = 30.0
    """Seconds in which a request's body must have come."""
    drain_timeout_s: float = 10.0
    """Seconds that a client may read nothing while its answer waits; then it is cut off."""
    write_buffer_bytes: int = 256 << 10
    """Bytes of an answer that may wait for a slow reader."""
    access_log: bool = False
    """Write a line a request to standard error: id, path, status, milliseconds. Never anything of a prompt."""
    keep_alive_s: float = 75.0
    """Seconds that a connection may stay open without a request."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector that is told of every request, such as http://127.0.0.1:4318."""
    otlp_content: bool = False
    """Tell the collector prompts and answers, too; needs --otlp-endpoint."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_body_bytes", 1024, 1 << 30),
            ("max_header_bytes", 1024, 1 << 20),
            ("max_prompt_tokens", 1, 1 << 24),
            ("max_n", 1, 128),
            ("max_requests", 1, 1 << 20),
            ("max_connections", 1, 1 << 20),
            ("max_stored", 0, 1 << 20),
            ("max_stored_bytes", 1024, 1 << 40),
            ("key_concurrency", 0, 1 << 20),
            ("key_burst", 1, 1 << 20),
            ("write_buffer_bytes", 1024, 1 << 30),
        ):
            value = getattr(self, name)
            if value is None and name == "max_prompt_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise RequestError(f"{name} must be a whole number in [{low}, {high}], not {value!r}")
        for name, least in (
            ("drain_s", 0.0),
            ("key_rate", 0.0),
            ("header_timeout_s", 0.1),
            ("body_timeout_s", 0.1),
            ("drain_timeout_s", 0.1),
            ("keep_alive_s", 0.1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 86400:
                raise RequestError(f"{name} must lie in [{least:g}, 86400], not {value!r}")
        for name in (
            "host",
            "api_key_file",
            "tls_cert",
            "tls_key",
            "served_name",
            "pin",
            "index",
            "otlp_endpoint",
            "adapter_dir",
        ):
            value = getattr(self, name)
            if value is None and name != "host":
                continue
            if not isinstance(value, str) or not value:
                raise RequestError(f"{name} must be a text, not {value!r}")
        for name, form in (
            ("adapter", "NAME=PATH"),
            ("larger", "models or NAME=MODEL"),
            ("encoder", "models or NAME=MODEL"),
            ("allowed_host", "names such as llm.example"),
            ("cors_origin", "origins such as https://app.example"),
        ):
            given = getattr(self, name)
            if given is None or (isinstance(given, list) and all(isinstance(one, str) and one for one in given)):
                continue
            raise RequestError(f"{name} must list {form}, not {given!r}")
        for name in ("access_log", "otlp_content"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise RequestError(f"otlp_endpoint must be an http:// or https:// URL, not {self.otlp_endpoint!r}")
        if self.otlp_content and self.otlp_endpoint is None:
            raise RequestError("otlp_content needs otlp_endpoint; give both or neither")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise RequestError("tls_cert and tls_key belong together; give both or neither")


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
