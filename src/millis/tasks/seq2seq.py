"""Seq2Seq: a loaded encoder-decoder model as Python programs use it: texts in, a text written for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, overload

from millis import hub
from millis.engine.seq2seq import Wish, Writer, Written
from millis.engine.seq2seq_runner import Seq2SeqRunner
from millis.engine.turn import Lock
from millis.models.generation import MOST_BEAMS, Generation, changed, read_generation
from millis.models.huggingface_config import Settings
from millis.models.load import is_seq2seq, load_model
from millis.models.mapped import read_json
from millis.tasks import checks
from millis.tasks.embed import token_ids
from millis.tasks.language import LANGUAGES
from millis.tasks.model import Loaded, config_of, no_collection
from millis.tasks.readable import check_readable
from millis.tasks.sentences import sentence_ends
from millis.tasks.summarize import Summary
from millis.tasks.translate import Translation
from millis.tokenizer import Tokenizer, load_tokenizer
from millis.types import Completion, ModelError, RequestError, SamplingParams, Timings, closed_error, whole

OPTIONS = ("threads", "isa", "precision", "context", "max_batch_tokens", "max_sequences", "screen")
SAMPLING = "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty seed".split()
DEFAULT_TOKENS = 256  # where neither the call nor the files say how long an answer may be
Texts = str | Sequence[str]


class Seq2Seq(Loaded):
    """A model that reads a whole text, then writes one. Calls from several threads take turns.

    name, progress, agree: as for LanguageModel. Options: those of EngineConfig that say how texts are read and
    written; `context` is the longest text, and the longest answer, in tokens. Raises ModelError (not found, not
    readable, another kind of model), RequestError (a bad option).
    """

    def __init__(
        self,
        name: str | Path,
        *,
        progress: hub.Progress | None = None,
        agree: Callable[[hub.Entry], bool] | None = None,
        **options: Any,
    ) -> None:
        self.config = config_of("an encoder-decoder model", OPTIONS, options)
        self.path: Path = hub.resolve(str(name), progress, agree, check_readable)
        if not is_seq2seq(self.path):
            raise ModelError(f"{name} is no encoder-decoder model; millis.load loads it as what it is")
        with no_collection():
            self.model = load_model(self.path, self.config.context)
            self.tokenizer: Tokenizer = load_tokenizer(self.model.checkpoint)
            self.generation: Generation = read_generation(self.path, self.model.plan.vocab)
            silenced = self.generation.banned if self.generation.renormalized else ()
            self.runner = Seq2SeqRunner(self.model, self.config, silenced)
        self._tasks = Settings(read_json(self.path / "config.json", 1 << 20)).part("task_specific_params")
        self._turn = Lock()
        self._writer = Writer(self.runner, sentence_ends(self.tokenizer))
        self._stopped = self._closed = False

    def _close(self) -> None:
        self._closed = True
        with self._turn:
            self.runner.close()

    @overload
    def generate(self, texts: str, **options: Any) -> Completion: ...
    @overload
    def generate(self, texts: Sequence[str], **options: Any) -> list[Completion]: ...
    def generate(
        self,
        texts: Texts,
        *,
        max_tokens: int | None = None,
        deadline_ms: float | None = None,
        beams: int | None = None,
        generation: Generation | None = None,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """What the model writes behind a text, or behind each of a list.

        beams: how many beginnings are kept side by side; unless given, what the model's files say, and 1 where a token
        is drawn (temperature above 0) or penalised. max_tokens: likewise, 256 where they say nothing. generation:
        settings instead of the files'. sampling: temperature, top_k, top_p, min_p, seed and the penalties, as in
        SamplingParams.

        deadline_ms counts from the call. When time runs out, an answer is what stands by then, up to a sentence end
        where one comes in time; DeadlineError: not even its first token would. The first such call measures for a
        moment before. RequestError: a text that is empty or longer than the context, or options that do not go
        together.
        """
        if self._closed:
            raise closed_error()
        begin = self._clock_for(deadline_ms)
        self._stopped = False
        settings = self.generation if generation is None else generation
        params = self._params(settings, max_tokens, sampling)
        wish = self.wish(params, generation=settings, beams=beams)
        ids = token_ids(self.tokenizer.encode, [texts] if isinstance(texts, str) else texts, self.runner.context)
        encoded = time.perf_counter()
        if deadline_ms is not None:
            wish = replace(wish, deadline=begin + deadline_ms / 1000)
        with self._turn:
            written = self._writer.write(ids, wish, lambda: self._stopped or self._closed)
        found = [
            self._completion(one, len(text), begin, encoded, deadline_ms)
            for one, text in zip(written, ids, strict=True)
        ]
        return found[0] if isinstance(texts, str) else found

    def wish(
        self,
        params: SamplingParams,
        *,
        generation: Generation | None = None,
        beams: int | None = None,
        deadline: float | None = None,
    ) -> Wish:
        """How an answer is to be written, as `generate` has it. RequestError: beams where tokens are drawn."""
        settings = self.generation if generation is None else generation
        plain = params.temperature == 0 and all(
            getattr(params, name) == getattr(SamplingParams(), name) for name in SAMPLING if name.endswith("penalty")
        )
        return Wish(generation=settings, params=params, beams=self._beams(settings, beams, plain), deadline=deadline)

    def answer_tokens(self, generation: Generation | None = None) -> int:
        """The longest answer, unless a call says otherwise."""
        longest = (self.generation if generation is None else generation).max_length
        return min(DEFAULT_TOKENS if longest is None else longest - 1, self.runner.context)

    def stop_soon(self) -> None:
        """Asks answers under way to end before their next step. Safe in a signal handler."""
        self._stopped = True

    @overload
    def translate(self, texts: str, to: str | None = None, **options: Any) -> Translation: ...
    @overload
    def translate(self, texts: Sequence[str], to: str | None = None, **options: Any) -> list[Translation]: ...
    def translate(
        self, texts: Texts, to: str | None = None, *, source: str | None = None, **options: Any
    ) -> Translation | list[Translation]:
        """A text in the language `to`, or each of a list; options are those of `generate`.

        A Marian model knows its languages, and `to` may be left out where it has but one to translate to; a t5's files
        list its pairs. RequestError: the model does not translate, or not this pair.
        """
        given, single = checks.texts(texts)
        prefix, settings, pair = self._translation(to, source)
        out = self.generate([prefix + text for text in given], generation=settings, **options)
        found = [
            Translation(
                text=one.text, source=pair[0], target=pair[1], finish_reason=one.finish_reason, timings=one.timings
            )
            for one in out
        ]
        return found[0] if single else found

    @overload
    def summarize(self, texts: str, **options: Any) -> Summary: ...
    @overload
    def summarize(self, texts: Sequence[str], **options: Any) -> list[Summary]: ...
    def summarize(self, texts: Texts, **options: Any) -> Summary | list[Summary]:
        """A summary of a text, or of each of a list, as the model's files say it was trained to; options as `generate`.

        RequestError: they say nothing of summaries, or a text is longer than the context.
        """
        given, single = checks.texts(texts)
        prefix, settings = self._task("summarization")
        out = self.generate([prefix + text for text in given], generation=settings, **options)
        found = [
            Summary(text=one.text, parts=1, read=1.0, finish_reason=one.finish_reason, timings=one.timings)
            for one in out
        ]
        return found[0] if single else found

    def chat(self, *args: object, **options: object) -> NoReturn:
        """Always a RequestError, as are `stream`, `chat_stream`, `score` and `embed`."""
        raise RequestError(
            f"{self.path.name} is an encoder-decoder model, which answers a text with another: use generate, translate "
            "or summarize, or load a model that chats, such as smollm2"
        )

    stream = chat_stream = score = embed = chat

    def _clock_for(self, deadline_ms: float | None) -> float:
        if checks.deadline(deadline_ms) is not None:
            with self._turn:
                self._writer.measure(self.generation)
        return time.perf_counter()

    def _params(self, settings: Generation, max_tokens: int | None, sampling: Mapping[str, Any]) -> SamplingParams:
        for name in sampling:
            if name not in SAMPLING:
                raise RequestError(f"an encoder-decoder model takes no {name!r}; it takes {', '.join(SAMPLING)}")
        if max_tokens is None:
            max_tokens = self.answer_tokens(settings)
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        return replace(params, max_tokens=min(params.max_tokens, self.runner.context))

    @staticmethod
    def _beams(settings: Generation, beams: int | None, plain: bool) -> int:
        if beams is None:
            return settings.beams if plain else 1
        beams = whole("beams", beams, 1, MOST_BEAMS)
        if beams > 1 and not plain:
            raise RequestError("beams look for the likeliest answer; leave out temperature and penalties, or beams")
        return beams

    def _completion(
        self, one: Written, prompt_tokens: int, begin: float, encoded: float, deadline_ms: float | None
    ) -> Completion:
        timings = timings_of(one, prompt_tokens, begin)
        timings.tokenize_ms = 1000 * (encoded - begin)
        if deadline_ms is not None:
            timings.deadline_ms, timings.slack_ms = deadline_ms, deadline_ms - timings.total_ms
        text = self.tokenizer.decode(one.tokens).strip()
        return Completion(text=text, tokens=one.tokens, finish_reason=one.reason, timings=timings)

    def _task(self, name: str) -> tuple[str, Generation]:
        """What stands before a text, and how it is written, where the model's files tell of a task. RequestError."""
        found = self._tasks.part(name)
        prefix = found.get("prefix")
        if not isinstance(prefix, str):
            raise RequestError(f"{self.path.name} does not say that it was trained for {name}; use .generate")
        return prefix, changed(self.generation, found)

    def _translation(self, to: str | None, source: str | None) -> tuple[str, Generation, tuple[str, str]]:
        """What stands before a text, how it is written, and from which language to which."""
        if self.model.checkpoint.config.architecture == "marian":
            pair, prefix = self._marian_pair(to, source)
            return prefix, self.generation, pair
        pairs = [tuple(name.split("_")[1::2]) for name in self._tasks.names() if name.startswith("translation_")]
        fitting = [p for p in pairs if (to is None or _means(to, p[1])) and (source is None or _means(source, p[0]))]
        if len(fitting) != 1:
            known = ", ".join(f"{a} to {b}" for a, b in pairs) or "nothing: use .generate"
            raise RequestError(f"{self.path.name} translates {known}; say which with `to` and `source`")
        one, other = fitting[0]
        return (*self._task(f"translation_{one}_to_{other}"), (one, other))

    def _marian_pair(self, to: str | None, source: str | None) -> tuple[tuple[str, str], str]:
        said = self._languages
        if source is not None and said[0] and not _means(source, said[0]):
            raise RequestError(f"{self.path.name} translates from {said[0]}, not from {source}")
        codes = self.tokenizer.language_codes
        if not codes:
            if to is not None and said[1] and not _means(to, said[1]):
                raise RequestError(f"{self.path.name} translates to {said[1]}, not to {to}")
            return (source or said[0], said[1] or to or ""), ""
        bare = {code.strip("<>"): code for code in codes}
        fitting = [code for name, code in bare.items() if to in (name, code)] or [
            bare[name] for name in _CODES.get(to or "", ()) if name in bare
        ]
        if not fitting:
            raise RequestError(f"{self.path.name} translates to {', '.join(bare)}; say which with `to`, not {to!r}")
        return (source or said[0], to or ""), fitting[0] + " "

    @property
    def _languages(self) -> tuple[str, str]:
        """Of a Marian model's texts and answers, where its files say them."""
        file = self.path / "tokenizer_config.json"
        found = Settings(read_json(file, 1 << 20) if file.is_file() else {})
        one, other = found.get("source_lang"), found.get("target_lang")
        return one if isinstance(one, str) else "", other if isinstance(other, str) else ""


def timings_of(one: Written, prompt_tokens: int, begin: float) -> Timings:
    """Where an answer's time went. begin: when it was asked for, on the clock of its writer."""
    return Timings(
        queue_ms=1000 * (one.begun - begin),
        prefill_ms=1000 * (max(one.first, one.read) - one.begun),
        first_token_ms=1000 * (one.first - begin) if one.first else 0.0,
        decode_ms=1000 * (one.ended - one.first) if one.first else 0.0,
        total_ms=1000 * (one.ended - begin),
        prompt_tokens=prompt_tokens,
        completion_tokens=len(one.tokens),
        steps=one.steps,
    )


# How OPUS-MT's vocabularies name the languages that our commands call zh and en: the likeliest first.
_CODES = {"zh": ("cmn_Hans", "zho_Hans", "cmn", "zho", "zh"), "en": ("eng", "en")}


def _means(asked: str, code: str) -> bool:
    """Whether a language that was asked for, such as zh, Chinese or eng, is the one with this code."""
    names = {code, *_CODES.get(code, ())}
    if code in LANGUAGES:
        names |= {LANGUAGES[code], LANGUAGES[code].lower()}
    return asked in names
