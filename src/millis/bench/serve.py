"""Load on servers that speak OpenAI's API: the same requests to each, level by level, in turns."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from millis.bench.serve_answer import Answer, read
from millis.bench.serve_client import Client, Clock
from millis.bench.serve_report import figures
from millis.bench.serve_run import Level, Run, name_of
from millis.bench.serve_schema import is_valid, validator
from millis.bench.serve_text import Text
from millis.bench.serve_trace import Planned, Row, Trace, plan
from millis.bench.serve_wire import Exchange, Server
from millis.types import MillisError

TOKENS_PER_WORD = 1.35  # of English, for servers that give no usage
CALIBRATION_WORDS = (40, 200)
PROGRESS_S = 0.5  # between two updates: drawing takes time from the measurement
Endpoint = Literal["chat", "completions"]
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A measurement. `rounds`: the parts that each level is cut into; the servers take turns after each."""

    servers: Sequence[Server]
    levels: Sequence[Level]
    text: Text
    trace: Trace = "poisson"
    model: str | None = None  # None: the first that the server lists
    endpoint: Endpoint = "chat"
    requests: int = 200
    duration_s: float = 300.0
    prompt_words: int = 60
    prompt_tokens: int | None = None  # instead of words; measured by the server's own count
    output_tokens: int = 32
    shared_prefix_tokens: int = 0
    deadline: str | None = None
    schema: dict[str, Any] | None = None
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 30.0
    rounds: int = 1
    warmup: int = 2
    connections: int = 512
    ignore_eos: bool = False
    slo: dict[str, float] = field(default_factory=dict)
    burst: int = 16
    rows: list[Row] | None = None
    speed: float = 1.0
    max_input: int = 1024
    max_output: int = 128
    detailed: bool = False


@dataclass(slots=True)
class _Target:
    """A server under load, and what was found of it."""

    server: Server
    client: Client
    model: str
    answers: dict[Level, list[Answer]] = field(default_factory=dict)
    seconds: dict[Level, float] = field(default_factory=dict)  # from first arrival to last byte, over the rounds
    waited: dict[Level, int] = field(default_factory=dict)  # requests that found no connection free
    cpu: dict[Level, float] = field(default_factory=dict)  # the load generator's own


def measure(
    settings: Settings, *, tell: Callable[[str], None], advance: Callable[[int], None], clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Runs it all. Ctrl-C ends it early; what there is then is reported, with `interrupted` true.

    Raises MillisError where a server cannot be reached, or does not answer a first request.
    """
    loop = _new_loop()
    try:
        return loop.run_until_complete(_Measurement(settings, tell, advance, clock).run())
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())  # names are looked up there
        loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: it leaves more of the machine to the servers."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Measurement:
    def __init__(
        self, settings: Settings, tell: Callable[[str], None], advance: Callable[[int], None], clock: Clock
    ) -> None:
        self._settings, self._tell, self._advance, self._clock = settings, tell, advance, clock
        self._targets: list[_Target] = []
        self._windows: dict[Level, float] = {}
        self._tokens_per_word, self._tokens_around = TOKENS_PER_WORD, 0.0
        self._validator = validator(settings.schema) if settings.schema is not None else None
        self._prefix = ""

    async def run(self) -> dict[str, Any]:
        work = asyncio.ensure_future(self._work())
        loop = asyncio.get_running_loop()
        main = threading.current_thread() is threading.main_thread()
        if main:
            loop.add_signal_handler(signal.SIGINT, work.cancel)
        try:
            await asyncio.wait({work})
            interrupted = work.cancelled()
            if not interrupted:
                work.result()
        finally:
            if main:
                loop.remove_signal_handler(signal.SIGINT)
            for target in self._targets:
                await target.client.close()
        return self._report(interrupted)

    async def _work(self) -> None:
        settings = self._settings
        for server in settings.servers:
            self._tell(f"asking {server.name}")
            client = Client(server, limit=settings.connections, timeout_s=settings.timeout_s, clock=self._clock)
            target = _Target(server, client, settings.model or "")
            self._targets.append(target)
            target.model = settings.model or await self._first_model(target)
            await self._warm_up(target)
        if settings.prompt_tokens or settings.shared_prefix_tokens or settings.trace == "azure":
            await self._calibrate(self._targets[0])
        for i, level in enumerate(settings.levels):
            planned, self._windows[level] = self._plan(i, level)
            prompts = [self._prompt(request, (i + 1) * 1_000_000 + j) for j, request in enumerate(planned)]
            step = -(-len(planned) // settings.rounds) or 1
            for number, start in enumerate(range(0, len(planned), step)):
                before_s = planned[start - 1].arrival_s if start else 0.0
                part = slice(start, start + step)
                for turn in range(len(self._targets)):
                    target = self._targets[(number + turn) % len(self._targets)]
                    self._tell(f"{target.server.name}, {name_of(level)}")
                    await self._load(target, level, planned[part], prompts[part], before_s)

    def _plan(self, number: int, level: Level) -> tuple[list[Planned], float]:
        s = self._settings
        return plan(
            s.trace,
            rate=level.rate,
            requests=s.requests,
            duration_s=s.duration_s,
            output_tokens=s.output_tokens,
            deadline=s.deadline,
            seed=f"{s.seed} {number}",
            burst=s.burst,
            rows=s.rows,
            speed=s.speed,
            max_input=s.max_input,
            max_output=s.max_output,
        )

    # One request, made and asked

    def _prompt(self, planned: Planned, number: int) -> str:
        tokens = planned.input_tokens or self._settings.prompt_tokens
        words = self._settings.prompt_words
        if tokens:
            words = max(1, round((tokens - self._tokens_around) / self._tokens_per_word))
        return self._settings.text.prompt(words, str(self._settings.seed), number)

    def _request(self, target: _Target, prompt: str, output_tokens: int, deadline_ms: float | None = None) -> bytes:
        s = self._settings
        body: dict[str, Any] = {"model": target.model}
        if s.endpoint == "chat":
            system = [{"role": "system", "content": self._prefix}] if self._prefix else []
            body["messages"] = [*system, {"role": "user", "content": prompt}]
        else:
            body["prompt"] = f"{self._prefix} {prompt}".lstrip()
        body |= {"max_tokens": output_tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if s.ignore_eos:
            body["ignore_eos"] = True
        if s.schema is not None:
            form = {"name": "answer", "schema": s.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        headers = self._headers() | {"Accept": "text/event-stream"}
        if deadline_ms is not None:
            headers["X-Deadline-Ms"] = f"{deadline_ms:.10g}"  # 1000000, not 1e+06
        return target.server.request(PATHS[s.endpoint], json.dumps(body, ensure_ascii=False).encode(), headers)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._settings.api_key}"} if self._settings.api_key else {}

    async def _ask(self, target: _Target, words: int, number: int) -> Answer:
        prompt = self._settings.text.prompt(words, f"{self._settings.seed} before", number)
        exchange = Exchange(self._request(target, prompt, self._settings.output_tokens), self._clock())
        return read(await target.client.ask(exchange), Answer())

    async def _first_model(self, target: _Target) -> str:
        exchange = Exchange(target.server.request("/v1/models", headers=self._headers()), self._clock())
        await target.client.ask(exchange)
        try:
            listed = json.loads(b"".join(piece for _, piece in exchange.pieces))
            name = listed["data"][0]["id"]
            if isinstance(name, str) and exchange.status == 200:
                return name
        except (ValueError, TypeError, LookupError, RecursionError):
            pass
        cause = exchange.error or (f"http {exchange.status}" if exchange.status != 200 else "no list of models")
        where = f"{target.server.url}/v1/models"
        raise MillisError(f"{where}: {cause}; is the server ready? --model names a model without it")

    async def _warm_up(self, target: _Target) -> None:
        for i in range(max(1, self._settings.warmup)):
            answer = await self._ask(target, self._settings.prompt_words, i)
            if not answer.completed:
                cause = answer.error or f"refused: {answer.refused}"
                where = target.server.url + PATHS[self._settings.endpoint]
                raise MillisError(f"{where}: the first request failed: {cause}; nothing was measured")

    async def _calibrate(self, target: _Target) -> None:
        """Tokens a word, the shared prefix, and what the chat format adds, all by the server's own count."""
        settings = self._settings
        few, many = CALIBRATION_WORDS
        counts = [(await self._ask(target, words, 100 + words)).prompt_tokens for words in (few, many)]
        low, high = counts
        if low is not None and high is not None and high > low:
            self._tokens_per_word = (high - low) / (many - few)
            self._tokens_around = max(0.0, low - few * self._tokens_per_word)
        if shared := settings.shared_prefix_tokens:
            words = max(1, round(shared / self._tokens_per_word))
            self._prefix = settings.text.prompt(words, f"{settings.seed} prefix", None)
            total = (await self._ask(target, few, 0)).prompt_tokens  # a system message changes what the format adds
            if total is not None:
                self._tokens_around = max(0.0, total - shared - few * self._tokens_per_word)

    # One load

    async def _load(
        self, target: _Target, level: Level, planned: Sequence[Planned], prompts: Sequence[str], before_s: float
    ) -> None:
        duration_s = self._settings.duration_s / self._settings.rounds
        run = Run(target.client, level, planned, before_s, duration_s, self._finish)
        run.requests = [
            self._request(target, prompt, request.output_tokens, request.deadline_ms)
            for prompt, request in zip(prompts, planned, strict=True)
        ]
        progress = asyncio.ensure_future(self._progress(run))
        cpu, waited = time.process_time(), target.client.waited
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            await run.to_the_end()
        finally:
            gc.enable()
            gc.unfreeze()
            progress.cancel()
            await target.client.close()
            target.cpu[level] = target.cpu.get(level, 0.0) + time.process_time() - cpu
            target.waited[level] = target.waited.get(level, 0) + target.client.waited - waited
            target.seconds[level] = target.seconds.get(level, 0.0) + run.seconds
            target.answers.setdefault(level, []).extend(run.read())
            self._advance(run.ended - run.told)

    def _finish(self, answer: Answer) -> None:
        """What is to be known of an answer's text, before the text is forgotten."""
        if self._validator is not None and answer.status == 200:
            answer.valid = answer.error is None and is_valid(answer.text, self._validator)
        if not self._settings.detailed:
            answer.text = ""

    async def _progress(self, run: Run) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            told, run.told = run.told, run.ended
            self._advance(run.told - told)

    def _report(self, interrupted: bool) -> dict[str, Any]:
        s, runs = self._settings, []
        for level in s.levels:
            for target in self._targets:
                if not (answers := target.answers.get(level)):
                    continue
                seconds = target.seconds[level]
                window = self._windows[level] if not interrupted else min(self._windows[level], seconds)
                found = figures(
                    answers, duration_s=seconds, offered_s=window or seconds, slo=s.slo, detailed=s.detailed
                )
                head: dict[str, Any] = {"server": target.server.name, "model_id": target.model}
                head |= {"endpoint_type": f"openai-{s.endpoint}"}
                head |= {"request_rate": level.rate, "max_concurrency": level.concurrency}
                offered = len(answers) / window if window else None
                share = target.cpu[level] / seconds if seconds > 0 else 0.0
                runs.append(
                    head
                    | {"offered_rate": offered}
                    | found
                    | {"client_cpu_share": share, "client_waited": target.waited[level]}
                )
        return {
            "servers": [target.server.name for target in self._targets],
            "trace": s.trace,
            "endpoint": s.endpoint,
            "prompt_words": None if s.prompt_tokens or s.trace == "azure" else s.prompt_words,
            "prompt_tokens": s.prompt_tokens,
            "output_tokens": None if s.trace == "azure" else s.output_tokens,
            "shared_prefix_tokens": s.shared_prefix_tokens,
            "deadline_ms": s.deadline,
            "slo_ms": s.slo,
            "schema": s.schema is not None,
            "seed": s.seed,
            "rounds": s.rounds,
            "timeout_s": s.timeout_s,
            "interrupted": interrupted,
            "runs": runs,
        }
