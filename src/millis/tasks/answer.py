"""answers from documents: the quote that answers, then a sentence of the model, taken where the quotes cover it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from millis.documents.passages import units
from millis.documents.terms import is_cjk, question_terms, terms
from millis.tasks import checks
from millis.tasks.answerable import LOOK_AT, probability
from millis.types import DeadlineError, whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from millis.tasks.index import Found, Hit, Index
    from millis.tasks.model import LanguageModel, Stream
    from millis.tokenizer import Tokenizer

THRESHOLD = 0.5
SOURCES = 3
TOGETHER = 64  # questions under way at once
OWN = {"en": 0.25, "zh": 0.5}  # of a sentence's terms, at most; pairs of characters change with any other wording
LEAST_MS = 5.0  # with less time left the model is not asked
_AMPLE_MS = 600_000.0
INSTRUCTION = "Answer the question in one short sentence. Use only the text."
NOT_FOUND = {"en": "The documents do not answer this question.", "zh": "文档中没有这个问题的答案。"}

_ASKS_AMOUNT = re.compile(
    r"\bhow (much|many|long|often|old|soon|fast|quickly|far|large|big|high|low|late|early)\b|"
    r"\b(what|which)\b.*\b(amount|price|cost|costs|fee|rate|percentage|percent|limit|number|age|score|share|cut|"
    r"discount|interest|apy|apr|minimum|maximum|most|least|balance|charge|charged|pay|time|date|year)\b|\bwhen\b|"
    r"多少|几|多久|多长|何时|什么时候|比例|费用|利率",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_prepared: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()  # model → for deadlines, too


@dataclass(frozen=True, slots=True)
class Source:
    """A quote: exactly text[start:stop] of the document with this id."""

    document: str
    title: str
    quote: str
    start: int
    stop: int


@dataclass(slots=True, kw_only=True)
class AnswerTimings:
    """Where the milliseconds of an answer went, each from arrival, except where it says how long something took."""

    embed_ms: float = 0.0  # how long: the question's vector
    search_ms: float = 0.0  # how long: the passages, whether they answer, and the quotes
    quote_ms: float = 0.0  # the quotes are known
    first_token_ms: float = 0.0  # the model's first token; 0 where it wrote none
    total_ms: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    deadline_ms: float | None = None

    @property
    def slack_ms(self) -> float | None:
        """Deadline minus total, negative when late; None without a deadline."""
        return None if self.deadline_ms is None else self.deadline_ms - self.total_ms

    def asdict(self) -> dict[str, Any]:
        """The fields and the slack as a dictionary, without the deadline's where none was given."""
        found = {**asdict(self), "slack_ms": self.slack_ms}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(slots=True, kw_only=True)
class Answer:
    """found: whether the documents answer the question. If not, text says so and there are no sources.

    written: what text is: "model" (a sentence of the model, all of whose numbers and most of whose words stand in the
    quotes or the question), "quote" (the first quote itself: the sentence was not covered so, or there was no time for
    one), or "none".
    """

    question: str
    text: str
    found: bool
    probability: float  # that the documents answer it
    written: Literal["model", "quote", "none"]
    sources: list[Source] = field(default_factory=list)
    timings: AnswerTimings = field(default_factory=AnswerTimings)

    def __str__(self) -> str:
        return self.text

    def asdict(self) -> dict[str, Any]:
        return {**asdict(self), "timings": self.timings.asdict()}


class Answering:
    """An answer on its way: `sources` are there at once; iterate over the pieces of the model's text; then `result`.

    What the model wrote is checked when it is whole: `result().text` is what to rely on.
    """

    def __init__(
        self,
        lm: LanguageModel | None,
        question: str,
        index: Index,
        deadline_ms: float | None,
        max_tokens: int,
        begin: float | None = None,
    ) -> None:
        self._begin = time.perf_counter() if begin is None else begin
        self._timings = AnswerTimings(deadline_ms=deadline_ms)
        came_ms = self._elapsed_ms()
        vector = index.embed(question)
        self._timings.embed_ms = self._elapsed_ms() - came_ms
        self._answer = evidence(question, index, vector)
        self._answer.timings = self._timings
        self.sources = self._answer.sources
        self._timings.quote_ms = self._elapsed_ms()
        self._timings.search_ms = self._timings.quote_ms - self._timings.embed_ms - came_ms
        self._stream = self._ask(lm, question, deadline_ms, max_tokens) if lm is not None and self.sources else None
        if self._stream is None:
            self._timings.total_ms = self._elapsed_ms()

    def __iter__(self) -> Iterator[str]:
        if self._stream is not None:
            yield from self._stream

    def stop_soon(self) -> None:
        """Asks the model for the end before its next step. Safe in a signal handler."""
        if self._stream is not None:
            self._stream.stop_soon()

    def result(self) -> Answer:
        """The whole answer, waited for."""
        if self._stream is not None:
            done, self._stream = self._stream.result(), None
            t = self._timings
            t.first_token_ms = t.quote_ms + done.timings.first_token_ms if done.tokens else 0.0
            t.prompt_tokens, t.cached_tokens = done.timings.prompt_tokens, done.timings.cached_tokens
            t.completion_tokens = done.timings.completion_tokens
            text = done.text.strip()
            if text and done.finish_reason == "stop" and supported(text, self._answer.question, self.sources):
                self._answer.text, self._answer.written = text, "model"
            t.total_ms = t.quote_ms + done.timings.total_ms  # others may have been waited for since
        return self._answer

    def close(self) -> None:
        """Cancels what the model has not yet written."""
        if self._stream is not None:
            self._stream.close()

    def _ask(self, lm: LanguageModel, question: str, deadline_ms: float | None, max_tokens: int) -> Stream | None:
        left = None if deadline_ms is None else deadline_ms - self._elapsed_ms()
        if left is not None and left < LEAST_MS:
            return None
        try:
            return lm.chat_stream(messages(question, self.sources), deadline_ms=left, max_tokens=max_tokens)
        except DeadlineError:  # the quote is the answer
            return None

    def _elapsed_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._begin)


def evidence(question: str, index: Index, vector: NDArray[np.float32] | None) -> Answer:
    """What an index says to a question of this vector, without a model: the first quote is the text."""
    found = index.search_with(vector, question, LOOK_AT)
    p = probability(found)
    sources = quotes(question, found) if p >= THRESHOLD else []
    return Answer(
        question=question,
        text=sources[0].quote if sources else NOT_FOUND["zh" if is_cjk(question) else "en"],
        found=bool(sources),
        probability=p,
        written="quote" if sources else "none",
        sources=sources,
    )


def messages(question: str, sources: Sequence[Source]) -> list[dict[str, str]]:
    """The prompt: an instruction that is always the same, so that it is cached, and few tokens after it."""
    first = sources[0]
    text = f"{first.title}: {_bare(first.quote)}" if first.title else _bare(first.quote)
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": f"Text: {text}\nQuestion: {question}"},
    ]


def quotes(question: str, found: Found) -> list[Source]:
    """The line or sentence of each of the best passages that holds most of what is asked, best first, none twice."""
    sources: list[Source] = []
    wants_number = _ASKS_AMOUNT.search(question) is not None
    for hit in found.hits:
        source = _quote(hit, found.idf, wants_number)
        if source.quote not in [other.quote for other in sources]:
            sources.append(source)
        if len(sources) == SOURCES:
            break
    return sources


def supported(text: str, question: str, sources: Sequence[Source]) -> bool:
    """Whether a text says little that a quote, a title or the question does not: no number, few words.

    It may still put them together wrongly: the quotes are what to rely on.
    """
    given = [question, *(f"{source.title}\n{source.quote}" for source in sources)]
    numbers = _numbers(text)
    if not numbers <= {number for one in given for number in _numbers(one)}:
        return False
    said = {term for term in question_terms(text) if not term[0].isdigit()} - set(question_terms(INSTRUCTION))
    own = said - {term for one in given for term in terms(one)}
    return bool(numbers or said - own) and len(own) <= max(1, OWN["zh" if is_cjk(text) else "en"] * len(said))


def _quote(hit: Hit, idf: dict[str, float], wants_number: bool) -> Source:
    text = hit.document.text
    bonus = sum(idf.values()) / 4 if wants_number else 0.0
    best = max(
        units(text, hit.span.start, hit.span.stop),
        key=lambda u: (
            sum(idf.get(term, 0.0) for term in set(terms(text[u.start : u.stop])))
            + bonus * bool(_NUMBER.search(text, u.start, u.stop))
        ),
    )
    quote = text[best.start : best.stop]
    return Source(hit.document.id, hit.document.title, quote, best.start, best.stop)


def _numbers(text: str) -> set[str]:
    """The numbers of a text, 1,500.00 and 1500 the same."""
    found = (number.replace(",", "") for number in _NUMBER.findall(text))
    return {number.rstrip("0").rstrip(".") if "." in number else number for number in found}


def _bare(quote: str) -> str:
    """A quote without its Markdown."""
    return re.sub(r"\s*\|\s*", " ", re.sub(r"^\s*(?:[-*]|\d+[.)])\s+|\*\*|`", "", quote)).strip()


def ask(
    lm: LanguageModel | None,
    question: str,
    index: Index,
    *,
    deadline_ms: float | None = None,
    max_tokens: int = 64,
) -> Answering:
    """Answers `question` from the documents of `index`, as LanguageModel.answer does; without a model by quotes alone.

    The first call with a model takes a moment longer: models are loaded and, where there is a prefix cache, the
    instruction is pinned in it. deadline_ms counts from when that is done. Where it leaves no time for a sentence the
    quote is the answer; where it is too short for the quote, too, that comes late, and timings.slack_ms is negative.
    """
    deadline_ms, max_tokens = _ready(lm, [question], index, deadline_ms, max_tokens)
    return Answering(lm, question, index, deadline_ms, max_tokens)


def ask_all(
    lm: LanguageModel | None,
    questions: Sequence[str],
    index: Index,
    *,
    deadline_ms: float | None = None,
    max_tokens: int = 64,
) -> list[Answer]:
    """The answers to several questions, as `ask` gives each; the sentences that the model writes share its steps.

    The deadline is each one's, from the call.
    """
    deadline_ms, max_tokens = _ready(lm, questions, index, deadline_ms, max_tokens)
    begin = time.perf_counter()
    found: list[Answer] = []
    for at in range(0, len(questions), TOGETHER):
        with ExitStack() as answerings:
            together = []
            for question in questions[at : at + TOGETHER]:
                one = Answering(lm, question, index, deadline_ms, max_tokens, begin)
                answerings.callback(one.close)
                together.append(one)
            found += [one.result() for one in together]
    return found


def _ready(
    lm: LanguageModel | None, questions: Sequence[str], index: Index, deadline_ms: float | None, max_tokens: int
) -> tuple[float | None, int]:
    """Checks, then what is done once; the deadline and max_tokens as numbers."""
    for question in questions:
        checks.text(question, "the question")
    deadline_ms, max_tokens = checks.deadline(deadline_ms), whole("max_tokens", max_tokens, 1)
    index.embed("warm")
    if lm is not None:
        _prepare(lm, deadline_ms is not None)
    return deadline_ms, max_tokens


def _prepare(lm: LanguageModel, deadlines: bool) -> None:
    """Once a model: computes what all prompts begin with; for deadlines, also measures what steps take."""
    done = _prepared.get(lm)
    if done is None and lm.config.prefix_cache:
        lm.engine.pin(common_ids(lm.tokenizer))
    if done is None or (deadlines and not done):
        lm.chat(messages("?", [Source("", "", "?", 0, 0)]), max_tokens=1, deadline_ms=_AMPLE_MS if deadlines else None)
        _prepared[lm] = deadlines


def common_ids(tokenizer: Tokenizer) -> list[int]:
    """The token ids that all prompts begin with."""
    one, other = (tokenizer.encode_chat(messages(text, [Source("", "", text, 0, 0)])) for text in ("A", "7"))
    return list(commonprefix([one, other]))
