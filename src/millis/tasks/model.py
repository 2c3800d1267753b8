"""LanguageModel: a loaded model as Python programs use it. Thin: text in, engine, text out."""

from __future__ import annotations

import gc
import json
import operator
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from millis import _native, hub
from millis.config import EngineConfig
from millis.engine.adapters import Adapter, Adapters, named
from millis.engine.draft import DraftModel
from millis.engine.engine import Engine
from millis.engine.grammar import GrammarCompiler
from millis.engine.native_runner import NativeRunner, trim
from millis.engine.packed import packed_weights
from millis.engine.requantize import requantize
from millis.engine.request import Request
from millis.engine.runner import Ranked
from millis.engine.speculate import Speculator
from millis.engine.timely import TimelyReader
from millis.models.adapter import read_adapter
from millis.models.fingerprint import fingerprint_of
from millis.models.load import Model, build_plan, is_encoder, is_seq2seq, load_model, read_checkpoint
from millis.tasks import checks
from millis.tasks.embed import embed
from millis.tasks.methods import TaskMethods
from millis.tasks.readable import check_readable
from millis.tasks.sentences import sentence_ends
from millis.tasks.text import TextStream
from millis.tokenizer import Recent, Tokenizer, load_tokenizer
from millis.types import (
    Completion,
    Grammar,
    GrammarError,
    ModelError,
    RequestError,
    SamplingParams,
    Timings,
    TokenLogprob,
    whole,
)

if TYPE_CHECKING:
    from millis.documents.store import Document
    from millis.tasks.answer import Answer
    from millis.tasks.index import Embedder, Index

    Documents: TypeAlias = Index | Iterable[Document | Mapping[str, Any] | str]

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}
Prompt = str | Sequence[int]
Schema = Mapping[str, Any] | bool | str  # JSON schema, as Python has it or as text
MEASURE_S = 0.5  # before the first deadline


class Stream:
    """An answer as it is written: iterate over its pieces of text; `completion` is there once they end.

    Leaving a `with` block, or `close()`, cancels what is left. Of several threads that iterate each gets other pieces.
    """

    def __init__(self, engine: Engine, request: Request, text: TextStream, tokenize_ms: float) -> None:
        self.completion: Completion | None = None
        self.on_completion: Callable[[Completion], None] | None = None  # told of it, once
        self._engine, self._request, self._text = engine, request, text
        self._tokens: list[int] = []  # those whose events were taken; other threads may drive the engine further
        self._logprobs: list[TokenLogprob] = []
        self._reading = threading.RLock()  # of whichever thread takes events
        request.timings.tokenize_ms = tokenize_ms
        self._events = engine.events(request)  # it knows nothing of this stream, which ends when nobody holds it

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._reading:
            return self._piece()

    def _piece(self) -> str:
        text = self._text
        while not text.stopped:
            event, piece = next(self._events), ""
            if event.token is not None:
                self._tokens.append(event.token)
                piece = text.push(event.token)
                if event.logprob is not None:
                    self._logprobs.append(event.logprob)
                if text.stopped:
                    self._engine.cancel(self._request, "stop")
            if event.finish_reason is not None or text.stopped:
                piece += text.finish()
                self._complete()
            if piece:
                return piece
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.stop_soon()  # forgotten without close(): not another step is spent on it

    @property
    def timings(self) -> Timings:
        """What is known so far; complete once the pieces end."""
        return self._request.timings

    def result(self) -> Completion:
        """The whole answer, waited for."""
        for _ in self:
            pass
        self._complete()
        assert self.completion is not None
        return self.completion

    def close(self) -> None:
        """Cancels the answer; `completion` then holds what was written."""
        self._engine.cancel(self._request)
        with self._reading:  # another thread that reads comes to its end first
            self._complete()
            self._events.close()

    def stop_soon(self) -> None:
        """Asks for the end before the next step; the pieces then end by themselves. Safe in a signal handler."""
        self._request.abandoned = True

    def kept(self) -> Stream:
        """The same, which goes on by itself while its reader does something else, if there is a deadline."""
        self._engine.keep(self._request)
        return self

    def _complete(self) -> None:
        if self.completion is None and self._request.finish_reason is not None:
            self._request.timings.completion_tokens = len(self._tokens)
            self.completion = Completion(
                text=self._text.text,
                tokens=self._tokens,
                finish_reason="stop" if self._text.stopped else self._request.finish_reason,
                timings=self._request.timings,
                logprobs=None if self._request.params.logprobs is None else self._logprobs,
            )
            if self.on_completion is not None:
                self.on_completion(self.completion)


Self = TypeVar("Self", bound="Loaded")


class Loaded(ABC):
    """What all loaded models share: leaving a `with` block closes one, and none is pickled or copied."""

    def close(self) -> None:
        """Cancels answers under way and gives the memory of weights and KV cache back. A second time it does nothing.

        Any use of the model from then on is a RequestError.
        """
        self._close()
        trim()

    @abstractmethod
    def _close(self) -> None: ...

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise RequestError("a loaded model cannot be pickled or copied; load it in each process that uses it")


class LanguageModel(TaskMethods, Loaded):
    """A model ready to answer. Calls from several threads share its steps; `close()` gives its memory back.

    name: a catalogue name, a .gguf file, a Hugging Face folder, or a hub repo id. `progress` is told of a pull, `agree`
    asked about a model's terms. Options are those of EngineConfig; None leaves one at its default.
    Raises ModelError (not found, not readable, a draft model of another vocabulary), RequestError (a bad option).
    """

    def __init__(
        self,
        name: str | Path,
        *,
        progress: hub.Progress | None = None,
        agree: Callable[[hub.Entry], bool] | None = None,
        **options: Any,
    ) -> None:
        check_names(options, EngineConfig, "option")
        if isinstance(options.get("draft"), Path):
            options["draft"] = str(options["draft"])
        self.config = EngineConfig(**{key: value for key, value in options.items() if value is not None})
        check_isa(self.config.isa)
        self.path: Path = hub.resolve(str(name), progress, agree, check_readable)
        if is_encoder(self.path):
            raise ModelError(
                f"{name} is an encoder, which writes no text: the commands classify, embed and evaluate classify take "
                "it, and in Python millis.load loads it"
            )
        if is_seq2seq(self.path):
            raise ModelError(
                f"{name} is an encoder-decoder model, which answers a text with another: millis.load or millis.Seq2Seq "
                "loads it, and the commands run, translate and summarize take it"
            )
        with no_collection():
            state = fingerprint_of(self.path)
            self.model = load_model(self.path, self.config.context)
            self.tokenizer: Tokenizer = load_tokenizer(self.model.checkpoint).remembering(Recent())
            say = progress.say if progress else hub.Silent().say
            packed = packed_weights(self.model, state, self.config, hub.packed_path(self.path), say)
            self.runner = NativeRunner(self.model, self.config, packed)
        base = self.model.checkpoint.config
        self.adapters = Adapters(lambda at: read_adapter(at, base), self.runner.adapter, self.config.max_adapters)
        self._draft = None if self.config.draft is None else self._draft_runner(self.config.draft, progress, agree)
        draft = None if self._draft is None else DraftModel(self._draft, self.tokenizer.control)
        speculator = None if self.config.speculation == "off" else Speculator(time.perf_counter, draft)
        self.grammars = GrammarCompiler(self.tokenizer)
        self.engine = Engine(
            self.runner,
            self.tokenizer.eos,
            speculator=speculator,
            prefix_cache=self.config.prefix_cache,
            grammars=self.grammars.compile,
            delivery_ms=self.config.delivery_ms,
            max_gap_ms=self.config.max_gap_ms,
            max_step_ms=self.config.max_step_ms,
            max_waiting=self.config.max_waiting,
        )
        self._reader = TimelyReader(self.engine.embed, context=self.engine.room, max_tokens=self.runner.max_tokens)
        self._ready_for_deadlines = False
        self._classifiers = {}

    def _close(self) -> None:
        self.engine.close()
        for runner in (self.runner, self._draft):
            if runner is not None:
                runner.close()
        self.adapters.close()
        self._classifiers.clear()

    def _draft_runner(
        self, name: str, progress: hub.Progress | None, agree: Callable[[hub.Entry], bool] | None
    ) -> NativeRunner:
        path = hub.resolve(name, progress, agree, check_readable)
        checkpoint = read_checkpoint(path)
        if checkpoint.config.reads:
            raise ModelError(f"{name} reads texts and writes none, so it cannot draft; take a model that writes")
        if not self.tokenizer.same_ids(load_tokenizer(checkpoint)):
            raise ModelError(
                f"{name} cannot draft for {self.path.name}: their vocabularies differ; "
                "take a smaller model of the same family"
            )
        if self.config.precision != "exact":  # four bits a weight: its errors cost guesses, and reading it costs time
            checkpoint = requantize(checkpoint, self.config.threads)
        context = min(checkpoint.config.context, self.model.plan.context)
        return NativeRunner(Model(checkpoint, build_plan(checkpoint, context)), self.config)

    def generate(
        self,
        prompt: Prompt,
        *,
        deadline_ms: float | None = None,
        schema: Schema | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Completion:
        """Continues `prompt`, a text or token ids. `sampling`: the fields of SamplingParams.

        `deadline_ms` counts from the call. When time runs out the answer ends at a sentence end. DeadlineError: not
        even a sentence would be done by then. The first call with a deadline takes a moment longer: it measures.

        schema: a JSON schema; the answer is then JSON of it. GrammarError names what of it is not supported.
        adapter: one that `load_adapter` has loaded, for this answer only.
        """
        encode = partial(self._ids, prompt)
        return self._stream(encode, True, deadline_ms, schema, adapter, sampling).result()

    def stream(
        self,
        prompt: Prompt,
        *,
        deadline_ms: float | None = None,
        schema: Schema | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Stream:
        """As `generate`, but hands out the text as it is written; with a deadline, read or not."""
        encode = partial(self._ids, prompt)
        return self._stream(encode, True, deadline_ms, schema, adapter, sampling).kept()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        deadline_ms: float | None = None,
        schema: Schema | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Completion:
        """Answers a conversation through the model's own chat template; `schema`, `adapter` as in `generate`."""
        encode = partial(self.tokenizer.encode_chat, messages)
        return self._stream(encode, False, deadline_ms, schema, adapter, sampling).result()

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        deadline_ms: float | None = None,
        schema: Schema | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Stream:
        """As `chat`, but hands out the text as it is written; with a deadline, read or not."""
        encode = partial(self.tokenizer.encode_chat, messages)
        return self._stream(encode, False, deadline_ms, schema, adapter, sampling).kept()

    def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str | None = None) -> list[float]:
        """For each continuation, the summed log-probability (nats) of its tokens after the prompt."""
        given = checks.sequence(continuations, "continuations")
        ids = [self._ids(continuation, add_special=False) for continuation in given]
        if [] in ids:
            raise RequestError(f"continuation {ids.index([])} is empty; give at least one token")
        return self.engine.score(self._ids(prompt), ids, adapter=self._adapter(adapter))

    def token_logprobs(self, text: Prompt, best: int = 0, *, adapter: str | None = None) -> list[TokenLogprob]:
        """Of each token of `text` behind the first, its log-probability (nats) and the `best` likeliest there."""
        ids, best = self._ids(text), whole("best", best, 0, 64)
        if len(ids) < 2:
            return []
        request = self.engine.submit_score(ids[:1], [ids[1:]], adapter=self._adapter(adapter), best=best)
        self.engine.wait(request)
        assert request.score is not None
        return Ranked.join(request.score.ranked).told(ids[1:])

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Makes a LoRA adapter known, for requests to name; returns its name, by default the last part of its path.

        path: a folder as peft saves it, or a GGUF file. ModelError: it cannot be read, or is none of this model.
        RequestError: the name is taken. OverloadError: requests use all `max_adapters` that are loaded.
        """
        path = checks.path(path, "an adapter")
        name = name if name is not None else named(str(path))[0]
        self.adapters.add(name, path)
        return name

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; answers under way go on with it. RequestError: there is none of that name."""
        checks.text(name, "an adapter's name")
        self.adapters.remove(name)

    def _adapter(self, name: str | None) -> Adapter | None:
        return None if name is None else self.adapters.use(checks.text(name, "an adapter's name"))

    def embed(self, texts: Sequence[str], *, deadline_ms: float | None = None) -> NDArray[np.float32]:
        """[N, D] float32, one vector of unit length a text: the mean of its tokens' final hidden states.

        A model that was made to write tells texts apart less well than one that was trained for embeddings.
        RequestError names the text that is empty or longer than the context.

        `deadline_ms` counts from the call and is that of all texts. DeadlineError: they cannot be read by then, which
        is said before any is; or it took longer than predicted. The first call with a deadline measures beforehand.
        """
        if checks.deadline(deadline_ms) is not None:
            self._reader.prepare(quick=True)
        return embed(self.engine, self.tokenizer.encode, texts, self._reader, deadline_ms)

    @overload
    def answer(  # type: ignore[overload-overlap]
        self,
        question: str,
        documents: Documents,
        *,
        deadline_ms: float | None = None,
        max_tokens: int = 64,
        embedder: str | Embedder | None = "minilm",
    ) -> Answer: ...
    @overload
    def answer(
        self,
        question: Sequence[str],
        documents: Documents,
        *,
        deadline_ms: float | None = None,
        max_tokens: int = 64,
        embedder: str | Embedder | None = "minilm",
    ) -> list[Answer]: ...
    def answer(
        self,
        question: str | Sequence[str],
        documents: Documents,
        *,
        deadline_ms: float | None = None,
        max_tokens: int = 64,
        embedder: str | Embedder | None = "minilm",
    ) -> Answer | list[Answer]:
        """Answers from documents, or says that they do not: `text`, `sources` with exact quotes, `found`, `timings`.

        question: one, or a list, whose answers share steps; the deadline is each one's. documents: an open Index; or
        documents, a few, which are indexed for this call with `embedder`. When the time is short the answer is the
        quote alone. To stream it: millis.tasks.answer.ask.
        """
        from millis.tasks.answer import ask_all
        from millis.tasks.index import Index

        deadline_ms, max_tokens = checks.deadline(deadline_ms), whole("max_tokens", max_tokens, 1)
        single = isinstance(question, str)
        asked = [question] if isinstance(question, str) else checks.sequence(question, "questions")
        for one in asked:
            checks.text(one, "the question")
        index = documents if isinstance(documents, Index) else Index.of(documents, embedder=embedder)
        found = ask_all(self, asked, index, deadline_ms=deadline_ms, max_tokens=max_tokens)
        return found[0] if single else found

    def _ids(self, prompt: Prompt, add_special: bool = True) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special=add_special)
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise RequestError(f"a prompt is a text or a sequence of token ids, not {type(prompt).__name__}")
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise RequestError(f"token ids must be whole numbers: {error}") from None

    def prepare_deadlines(self, deadline_ms: float = 1.0) -> None:
        """Measures what steps take here, once, unless that was done. RequestError: no time that a deadline can be."""
        self._prepare(deadline_ms, False)

    def _prepare(self, deadline_ms: float | None, constrained: bool) -> None:
        """Before the first deadline: measures what steps take here, and finds the tokens that end a sentence."""
        if checks.deadline(deadline_ms) is None:
            return
        if constrained:
            self.grammars.prepare()
        if self._ready_for_deadlines:
            return
        self.engine.sentence_ends = sentence_ends(self.tokenizer)
        if not self.engine.costs.calibrated:
            self.engine.calibrate(budget_s=MEASURE_S, quick=True)
        self._ready_for_deadlines = True

    def _stream(
        self,
        encode: Callable[[], list[int]],
        continues: bool,
        deadline_ms: float | None,
        schema: Schema | None,
        adapter: str | None,
        sampling: dict[str, Any],
    ) -> Stream:
        """Starts an answer to what `encode` makes; continues: it goes on with a text."""
        self._prepare(deadline_ms, schema is not None or sampling.get("grammar") is not None)
        begin = self.engine.clock()
        used = self._adapter(adapter)
        ids = encode()
        sampling = with_schema(sampling, schema)
        check_names(sampling, SamplingParams, "sampling parameter")
        params = SamplingParams(**sampling)
        deadline = None if deadline_ms is None else begin + float(deadline_ms) / 1000
        text = TextStream(self.tokenizer.detokenizer(continues=continues), params.stop)
        tokenize_ms = 1000 * (self.engine.clock() - begin)
        with self.engine.refusals():
            request = self.engine.submit(ids, params, arrival_s=begin, deadline_s=deadline, adapter=used)
        return Stream(self.engine, request, text, tokenize_ms)


@contextmanager
def no_collection() -> Iterator[None]:
    """A load makes objects by the hundred thousand, all of which stay: looking for garbage among them costs a fifth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_names(given: Mapping[str, Any], kind: type[EngineConfig] | type[SamplingParams], what: str) -> None:
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            raise RequestError(f"unknown {what} {name!r}; there are {', '.join(known)}")


def with_schema(sampling: dict[str, Any], schema: Schema | None) -> dict[str, Any]:
    """The sampling parameters with a schema's grammar among them."""
    if schema is None:
        return sampling
    if sampling.get("grammar") is not None:
        raise RequestError("schema and grammar exclude each other; give one of them")
    try:
        source = schema if isinstance(schema, str) else json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema cannot be written as JSON: {error}") from None
    return {**sampling, "grammar": Grammar("json_schema", source)}


def config_of(kind: str, known: Sequence[str], options: Mapping[str, Any]) -> EngineConfig:
    """The settings of a model of this kind out of those `options` that are given. RequestError: one that it has not."""
    for option in options:
        if option not in known:
            raise RequestError(f"{kind} has no option {option!r}; it has {', '.join(known)}")
    config = EngineConfig(**{key: value for key, value in options.items() if value is not None})
    check_isa(config.isa)
    return config


def check_isa(isa: str) -> None:
    """Before any file is read: this has nothing to do with the model."""
    isas = _native.supported_isas()
    if isa not in ("auto", *isas):
        raise RequestError(
            f"this machine has no instruction set {isa!r}; it has {', '.join(isas)}: choose one of these, "
            "or unset MILLIS_ISA for the best"
        )
