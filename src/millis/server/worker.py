"""The engine process: loads a model, then runs steps while there is work. Started by the server with a socket.

The receiver thread admits, refuses and cancels at once, also while a step runs in native code; the main thread steps
and sends what each step brought, one frame a step. Ends when the socket closes; signals are the server's business.
"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from millis.engine.embedding import Embedding
from millis.engine.predict import Work
from millis.engine.request import Request
from millis.engine.runner import Ranked
from millis.server.messages import (
    Batch,
    Cancel,
    Done,
    Embed,
    EngineInfo,
    Failed,
    FailureCode,
    LoadAdapter,
    Pin,
    Progress,
    Refused,
    Score,
    Scores,
    Start,
    Stats,
    Submit,
    Tokens,
    UnloadAdapter,
    Vectors,
)
from millis.server.process import STATS_S, Line, Report, main, refusal
from millis.server.turns import Turns
from millis.tasks.embed import unit_vectors
from millis.tasks.model import LanguageModel
from millis.tasks.sentences import sentence_ends
from millis.types import DeadlineError, GrammarError, MillisError, RequestError, SamplingParams, Timings

WARM_TOKENS = 8


class Worker:
    """One engine and the line it answers on."""

    def __init__(self, lm: LanguageModel, line: Line) -> None:
        self._lm = lm
        self.engine = lm.engine
        self.engine.sentence_ends = sentence_ends(lm.tokenizer)
        self._grammars = lm.grammars
        self._adapters = lm.adapters
        self.send = line.send
        self._wake = threading.Event()
        self._table: dict[int, Request] = {}  # those whose last event was not sent yet
        self._pins: list[Pin] = []
        self._embeds: list[Embed] = []  # that wait or are being read
        # What a grammar is to be compiled or an adapter to be read for, and which of it is under way and still wanted.
        self._unprepared: Turns[Submit | Score | LoadAdapter] = Turns(lm.config.max_waiting)
        self._preparing: int | None = None
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._changed = threading.Lock()  # guards the five above
        self._embeddings: dict[int, tuple[Embedding, float]] = {}  # those that are being read, and since when
        self._stats_s = 0.0
        self._drafted = self._accepted = 0

    def warm_up(self, *, again: bool) -> None:
        """Touches memory, and measures what steps take.

        again: a handful of steps; requests wait for this process to take the place of one that ended.
        """
        request = self.engine.submit([0], SamplingParams(max_tokens=WARM_TOKENS, ignore_eos=True))
        request.caches = False
        while request.finish_reason is None:
            self.engine.step()
        prepared = self._preparer.submit(self._grammars.prepare)
        if not again:
            prepared.result()
        self.engine.calibrate(quick=again)

    def info(self, load_s: float, warm_s: float) -> EngineInfo:
        """What was loaded."""
        lm, runner = self._lm, self._lm.runner
        return EngineInfo(
            path=str(lm.path),
            context=self.engine.room,
            vocab=runner.vocab,
            pages=runner.pages,
            page_tokens=runner.page_tokens,
            threads=lm.config.threads,
            isa=runner.isa,
            weight_bytes=runner.weight_bytes,
            max_sequences=runner.max_sequences,
            load_s=load_s,
            warm_s=warm_s,
        )

    def run(self) -> None:
        """Steps until the process is ended."""
        while True:
            self._wake.clear()
            self._pin()
            if not self.engine.has_work and not self._embeds:
                self._hand_out()
                self._send_stats()
                if not self.engine.probe():
                    self._wake.wait()
                continue
            self.work()

    def work(self) -> None:
        """A piece of the texts that wait to be read, then a step, unless there is no time for one."""
        if not self._embed():
            self.engine.step()
        self._hand_out()
        self._send_stats()

    def _embed(self) -> bool:
        """Reads a piece for the request for vectors that is due first; whether the next has to follow at once."""
        with self._changed:
            jobs = sorted(self._embeds, key=_due_s)
        for number in self._embeddings.keys() - {job.id for job in jobs}:  # those that were cancelled
            self._embeddings.pop(number)[0].close()
        for job in jobs:
            try:
                embedding, begin_s = self._begun(job)
                if not embedding.step():
                    continue
                if not embedding.whole:
                    return embedding.hurries(_due_s(job))
                self._answer(job, _vectors(job, embedding, begin_s, self.engine.clock()))
            except (DeadlineError, RequestError) as error:
                self._answer(job, refusal(job.id, error))
            break
        return False

    def _begun(self, job: Embed) -> tuple[Embedding, float]:
        """What reads a job's texts, and since when. DeadlineError: it would be late, or is."""
        now = self.engine.clock()
        begun = self._embeddings.get(job.id)
        left_ms, waited_ms = 1000 * (_due_s(job) - now), 1000 * (now - job.arrival_s)
        if begun is None:
            begun = self._embeddings[job.id] = self.engine.embedding(job.prompts), now
            needed_ms = begun[0].left_ms() + self.engine.costs.margin_ms
            if needed_ms > left_ms:
                message = f"reading the texts takes {needed_ms:.0f} ms, and {max(0.0, left_ms):.0f} ms are left"
                message += "; allow more time, or send less"
                raise DeadlineError(message, predicted_ms=waited_ms + needed_ms, retry_after_s=1.0)
        elif left_ms <= 0:
            message = "no time was left to read all of its texts; allow more time, or send less"
            raise DeadlineError(message, predicted_ms=waited_ms + begun[0].left_ms(), retry_after_s=1.0)
        return begun

    def _answer(self, job: Embed, reply: Vectors | Refused) -> None:
        with self._changed:
            self._embeds = [other for other in self._embeds if other.id != job.id]
        if (begun := self._embeddings.pop(job.id, None)) is not None:
            begun[0].close()
        self.send(Batch([reply]))

    def _hand_out(self) -> None:
        items: list[Any] = []
        with self._changed:
            live = list(self._table.items())
        for number, request in live:
            tokens, logprobs, reason, end = [], [], None, None
            while request.inbox:
                event = request.inbox.popleft()
                if event.token is not None:
                    tokens.append(event.token)
                    if event.logprob is not None:
                        logprobs.append(event.logprob)
                else:
                    end = event.logprob
                reason = event.finish_reason
            if reason is not None:
                with self._changed:
                    self._table.pop(number, None)
                self._drafted += request.timings.drafted_tokens
                self._accepted += request.timings.accepted_tokens
            if request.error is not None:
                if reason is not None:
                    code: FailureCode = "invalid_grammar" if isinstance(request.error, GrammarError) else "failed"
                    items.append(Failed(number, str(request.error), code))
            elif request.score is not None:
                if reason is not None:
                    items.append(_scores(number, request))
            elif tokens or reason is not None:
                timings = request.timings if reason is not None else None
                items.append(Tokens(number, tuple(tokens), tuple(logprobs) or None, reason, timings, end))
        if items:
            self.send(Batch(items))

    def _pin(self) -> None:
        with self._changed:
            pins, self._pins = self._pins, []
        for pin in pins:
            try:
                count = self.engine.pin(pin.tokens, pin.tenant)
                self.send(Progress(f"pinned {count} tokens of {len(pin.tokens)}"))
            except RequestError as error:
                self.send(Progress(f"cannot pin: {error}"))

    def _send_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_s < STATS_S and (self.engine.has_work or self._embeds):
            return
        self._stats_s = now
        load, costs, chunk = self.engine.load(), self.engine.costs, self.engine.runner.max_tokens
        prefix = self.engine.scheduler.prefix
        with self._changed:
            unprepared = len(self._unprepared)
        self.send(
            Stats(
                at_s=now,
                running=load.running,
                waiting=load.waiting + unprepared,
                unprepared=unprepared,
                compiled=self._grammars.compiled,
                kv_used=load.pages - load.free_pages,
                kv_total=load.pages,
                prefix_queries=0 if prefix is None else prefix.queried_tokens,
                prefix_hits=0 if prefix is None else prefix.hit_tokens,
                drafted=self._drafted,
                accepted=self._accepted,
                preemptions=load.preemptions,
                backlog_ms=load.backlog_ms,
                steps=load.counters.steps,
                step_predicted_ms=load.step_predicted_ms,
                step_actual_ms=load.step_actual_ms,
                step_ms=costs.decode_ms(1, 0),
                prefill_token_ms=costs.ms(Work(rows=chunk)) / chunk,
            )
        )

    def take(self, message: Any) -> None:
        """Admits, refuses and cancels, also while a step runs."""
        match message:
            case Submit() | Score():
                grammar = message.params.grammar if isinstance(message, Submit) else None
                if self._adapters.ready(message.adapter) and (grammar is None or self._grammars.ready(grammar)):
                    self._admit(message)
                else:
                    self._queue(message, message.tenant)
            case LoadAdapter():
                self._queue(message, None)
            case UnloadAdapter():
                self._adapt(message)
            case Pin():
                with self._changed:
                    self._pins.append(message)
            case Embed():
                with self._changed:
                    self._embeds.append(message)
            case Cancel(number):
                with self._changed:
                    request = self._table.get(number)
                    self._unprepared.drop(number)
                    self._embeds = [job for job in self._embeds if job.id != number]
                    if self._preparing == number:
                        self._preparing = None
                if request is not None:
                    self.engine.cancel(request, wait=False)
            case _:
                raise TypeError(f"the engine process understands no {type(message).__name__}")
        self._wake.set()

    def _queue(self, job: Submit | Score | LoadAdapter, tenant: str | None) -> None:
        """Has a job prepared when it is its turn. None: what no tenant asks for."""
        with self._changed:
            surplus = self._unprepared.add(tenant, job.id, job)
            waiting = len(self._unprepared)
        if surplus is None:
            self._preparer.submit(self._prepare)
        else:
            message = f"{waiting} requests wait for a grammar or an adapter already; try again"
            self._refuse(Refused(surplus.id, "overloaded", message, None, 1.0))

    def _prepare(self) -> None:
        """Compiles and reads for the job whose turn it is, and admits it. That may take long; others go on.

        Nothing is done for those that were cancelled or are late already.
        """
        with self._changed:
            job = self._unprepared.next()
            self._preparing = None if job is None else job.id
        if job is None:
            return
        try:
            if isinstance(job, LoadAdapter):
                self._adapt(job)
            elif job.deadline_s is not None and time.monotonic() >= job.deadline_s:
                total_ms = 1000 * (time.monotonic() - job.arrival_s)
                message = "no time was left to prepare its grammar or adapter"
                self._refuse(Refused(job.id, "deadline_unmeetable", message, total_ms, 1.0))
            else:
                self._admit(job)
        except Exception as error:
            self.send(Batch([Failed(job.id, type(error).__name__)]))
        with self._changed:
            request = self._table.get(job.id)
            wanted = self._preparing == job.id
            self._preparing = None
        if request is not None and not wanted:
            self.engine.cancel(request, wait=False)
        self._wake.set()

    def _adapt(self, message: LoadAdapter | UnloadAdapter) -> None:
        try:
            if isinstance(message, LoadAdapter):
                self._adapters.add(message.name, Path(message.path))
            else:
                self._adapters.remove(message.name)
        except MillisError as error:
            self._refuse(refusal(message.id, error))
        else:
            self.send(Batch([Done(message.id)]))

    def _submit(self, job: Submit | Score) -> Request:
        shared: dict[str, Any] = {
            "arrival_s": job.arrival_s,
            "deadline_s": job.deadline_s,
            "asked_ms": job.asked_ms,
            "priority": job.priority,
            "tenant": job.tenant,
            "adapter": None if job.adapter is None else self._adapters.use(job.adapter),
        }
        if isinstance(job, Score):
            return self.engine.submit_score(job.prompt, job.continuations, best=job.best, **shared)
        shared |= {"on_deadline": job.on_deadline, "minimum_tokens": job.minimum_tokens}
        return self.engine.submit(job.prompt, job.params, **shared)

    def _admit(self, job: Submit | Score) -> None:
        try:
            request = self._submit(job)
            with self._changed:
                self._table[job.id] = request
        except MillisError as error:
            self._refuse(refusal(job.id, error))

    def _refuse(self, refusal: Refused) -> None:
        self.send(Batch([refusal]))


def _due_s(job: Embed) -> float:
    return math.inf if job.deadline_s is None else job.deadline_s


def _vectors(job: Embed, embedding: Embedding, begin_s: float, now: float) -> Vectors:
    vectors = unit_vectors(embedding.vectors)
    timings = Timings(
        queue_ms=1000 * (begin_s - job.arrival_s),
        prefill_ms=1000 * (now - begin_s),
        total_ms=1000 * (now - job.arrival_s),
        prompt_tokens=sum(map(len, job.prompts)),
    )
    rows, columns = vectors.shape
    return Vectors(job.id, vectors.tobytes(), (rows, columns), timings)


def _scores(number: int, request: Request) -> Scores | Refused:
    """What is known of the continuations when scoring has ended; one that no time was left for counts as impossible."""
    score = request.score
    assert score is not None
    values = score.values
    if not values:
        what = "score a label" if score.best is None else "read the prompt"
        return Refused(number, "deadline_unmeetable", f"no time was left to {what}", request.timings.total_ms, 1.0)
    missing = len(score.continuations) - len(values)
    complete = request.finish_reason == "stop"
    ranked = None if score.best is None else Ranked.join(score.ranked)
    return Scores(number, (*values, *[-math.inf] * missing), request.timings, complete, ranked)


def load(start: Start, line: Line) -> Worker:
    """Loads the model that a server asks for."""
    lm = LanguageModel(start.model, progress=Report(line), **start.options)
    for name, path in start.adapters:  # after a crash they are read when they are asked for
        lm.adapters.add(name, Path(path), load=not start.again)
    return Worker(lm, line)


if __name__ == "__main__":
    main(load)
