"""What all requests of a server share: models, keys, quotas, and the estimate that refuses early."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from millis import __version__
from millis.config import ServerConfig
from millis.server.api.errors import ApiError, from_error, model_not_found, retry
from millis.server.api.job import Job, Limits
from millis.server.auth import Key, Keys, Quotas
from millis.server.library import Library
from millis.server.messages import Stats
from millis.server.served import Model
from millis.server.stored import Past, Stored
from millis.server.telemetry import Telemetry
from millis.tokenizer import Tokenizer
from millis.types import DeadlineError

LONG_BYTES = 16 << 10  # more than this is parsed and tokenized in a thread
READY_S = 10.0  # a request waits at most so long for an engine that restarts
BYTES_A_TOKEN = 8  # of a body, at most: so the early estimate refuses nothing that could be in time
MOST_DELIVERY = 0.1  # of a deadline, that is left for an encoder's answer to reach this process
DELIVERY_S = 0.001  # from the last token in the server to the last byte on the wire

_Result = TypeVar("_Result")


class Service:
    """Made once. The first of `models` is the main one: the one that requests mean which name none."""

    def __init__(self, config: ServerConfig, models: Sequence[Model], keys: Keys | None = None) -> None:
        self.config = config
        self.models = {model.name: model for model in models}
        self.main = models[0]
        self.library: Library | None = None  # what /v1/answer answers from, when it is loaded
        self.keys = keys
        self.quotas = Quotas(config.key_concurrency, config.key_rate, config.key_burst)
        self.telemetry: Telemetry | None = None
        if config.otlp_endpoint is not None:
            self.telemetry = Telemetry(config.otlp_endpoint, content=config.otlp_content)
        self.stored = Stored(config.max_stored, config.max_stored_bytes)
        self.limits = Limits(prompt_chars=config.max_body_bytes, n=config.max_n)
        self.draining = False
        self.active = 0  # requests in work
        self.created = int(time.time())
        self.fingerprint = f"millis-{__version__}"
        self._prefix = secrets.token_hex(6)
        self._count = itertools.count()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="prompts")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self.connections: Callable[[], int] = lambda: 0

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        loaded = self.config.index is None or self.library is not None
        return loaded and not self.draining and all(model.ready for model in self.models.values())

    def past(self, tenant: str) -> Past:
        """The responses that are kept for a key."""
        return Past(self.stored, tenant)

    def find(self, name: str | None, param: str = "model") -> tuple[Model, str | None]:
        """The model that a request names in `param`, and the adapter in `MODEL:ADAPTER`. ApiError 404: not served."""
        if name is None or name in self.models:
            return (self.main if name is None else self.models[name]), None
        adapter = name.removeprefix(f"{self.main.name}:")
        if adapter == name or adapter not in self.main.client.adapters:
            raise self.not_served(name, param)
        return self.main, adapter

    def names(self) -> list[str]:
        """All that requests may name: the models, then the main one's adapters."""
        return [*self.models, *(f"{self.main.name}:{name}" for name in self.main.client.adapters)]

    def not_served(self, model: str, param: str = "model") -> ApiError:
        """The answer to a request for another model, which names those there are."""
        return model_not_found(model, self.names()[1:], param)

    def request_id(self) -> str:
        """A fresh one; nobody can guess those of another server."""
        return f"{self._prefix}{next(self._count):08x}"

    @contextlib.contextmanager
    def turn(self, tenant: str) -> Iterator[None]:
        """Counts a request as long as it is in work. ApiError: too many of all, or of this key."""
        if self.draining:
            raise ApiError(
                503, "the server is stopping; ask another", type="server_error", code="server_stopping", headers=AGAIN
            )
        if self.active >= self.config.max_requests:
            raise ApiError(
                503, "too many requests are in work; try again", type="server_error", code="overloaded", headers=AGAIN
            )
        wait_s = self.quotas.enter(tenant, time.monotonic())
        if wait_s is not None:
            message = "this key asks too often or too much at once; slow down"
            raise ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=retry(wait_s))
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self.quotas.leave(tenant)

    async def loaded(self, model: Model, job: Job, arrival_s: float) -> Tokenizer:
        """Its tokenizer, once the engine can take work; waits a little for one that restarts. ApiError: not in time."""
        if not model.ready:
            left_s = READY_S
            if job.deadline_ms is not None:
                left_s = min(left_s, arrival_s + job.deadline_ms / 1000 - time.monotonic())
            if model.tokenizer is None or not await model.client.wait_ready(left_s):
                message = "the engine is starting; try again in a second"
                raise ApiError(
                    503, message, type="server_error", code="engine_unavailable", headers={"Retry-After": "1"}
                )
        assert model.tokenizer is not None
        return model.tokenizer

    def refuse_early(self, model: Model, job: Job, body_bytes: int, arrival_s: float) -> None:
        """ApiError deadline_unmeetable where not even a prompt of the fewest tokens could be answered in time.

        Before any template or tokenizer; the engine then decides exactly.
        """
        if job.deadline_ms is None:
            return
        stats, now = model.client.stats, time.monotonic()
        predicted = predicted_ms(stats, now, arrival_s, body_bytes)
        if model.reads:  # in milliseconds; its process says exactly, at once
            predicted -= stats.step_ms
        if predicted > job.deadline_ms:
            wait_s = max(0.0, predicted - job.deadline_ms) / 1000
            message = (
                f"the deadline of {job.deadline_ms:.0f} ms cannot be met: the answer would take {predicted:.0f} ms"
            )
            raise from_error(DeadlineError(message, predicted_ms=predicted, retry_after_s=wait_s))

    async def run(self, size: int, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Calls a pure function; in a thread where its input is long, so that others are answered meanwhile."""
        if size <= LONG_BYTES:
            return function(*arguments)
        return await self.in_thread(function, *arguments)

    async def in_thread(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Calls a function that takes milliseconds, while others are answered."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *arguments))

    def deadline_s(self, model: Model, job: Job, arrival_s: float) -> float | None:
        """When its engine must have the last token, so that the last byte is in time."""
        if job.deadline_ms is None:
            return None
        delivery_s = model.client.delivery_s
        if model.reads:  # in milliseconds: one late delivery must not refuse all that follow
            delivery_s = min(delivery_s, MOST_DELIVERY * job.deadline_ms / 1000)
        return arrival_s + job.deadline_ms / 1000 - delivery_s - DELIVERY_S

    async def check_key(self, text: str) -> Key | None:
        """The key that a client presented for the first time; in a thread where hashes are slow on purpose."""
        assert self.keys is not None
        if not self.keys.slow:
            return self.keys.find(text)
        return await asyncio.get_running_loop().run_in_executor(self._slow, self.keys.find, text)

    def count_error(self, error: ApiError, model: Model | None = None) -> None:
        """Counts an answer that is an error: a failure or a refusal, by its reason. A bad request is neither."""
        metrics, reason = (model or self.main).metrics, error.code or str(error.status)
        if error.status == 500 or reason == "deadline_exceeded":
            metrics.fail(reason)
        elif error.status in (401, 403, 408, 413, 429, 503):
            metrics.refuse(reason)

    def metrics_text(self) -> bytes:
        """The figures now."""
        for model in self.models.values():
            metrics, client = model.metrics, model.client
            metrics.engine_up.set(client.ready)
            metrics.in_flight.set(client.in_flight)
            metrics.delivery.set(client.delivery_s)
            metrics.restarted(client.restarts)
        metrics = self.main.metrics
        metrics.active.set(self.active)
        metrics.connections.set(self.connections())
        return metrics.text()

    def close(self) -> None:
        """Ends the threads; a collector is told the last."""
        for threads in (self._threads, self._slow):
            threads.shutdown(wait=False, cancel_futures=True)
        if self.library is not None:
            self.library.close()
        if self.telemetry is not None:
            self.telemetry.close()


def predicted_ms(stats: Stats, now_s: float, arrival_s: float, body_bytes: int) -> float:
    """From arrival to the first token of a body's answer, at the least.

    Of a prompt counts what is long to tokenize; the beginning, and all of a shorter one, may be in the prefix cache.
    """
    waited = 1000 * (now_s - arrival_s)
    return waited + stats.prefill_token_ms * (max(0, body_bytes - LONG_BYTES) // BYTES_A_TOKEN) + stats.step_ms


AGAIN = {"Retry-After": "1", "x-should-retry": "false"}
