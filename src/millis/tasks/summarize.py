"""Summaries of a wished length. Long texts in two rounds: each part is summarized, then the summaries are."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from millis.tasks import checks
from millis.tasks.ask import ask, filled, within
from millis.tasks.language import language
from millis.types import Completion, DeadlineError, FinishReason, RequestError, Timings, whole

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

_UNITS = {
    "words": ("words", "个词"),
    "sentences": ("sentences", "句话"),
    "characters": ("characters", "个字"),
}
_ASKED = {
    "en": "Summarize the following text in at most {length}. Answer with the summary alone.\n\n{text}",
    "zh": "请用不超过{length}概括下面的文本，只回答摘要。\n\n{text}",
}
INNER = r"[^。！？!?.]|\.+(?=[^\s.\"'”’)\]])"  # a full stop ends nothing within a number or a name
SENTENCE = re.compile(rf"(?:{INNER})*(?:[。！？!?]+|\.+)?[\"'”’』」)\]]*\s*")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # of a Chinese text
TOKENS = {"words": 1.6, "sentences": 40.0, "characters": 1.0}  # of an answer for each unit, at most
PART_TOKENS = 96  # of the summary of a part
MOST = 1_000_000  # words, sentences or characters
MARGIN = 64  # tokens of the instruction and the template
REDUCING = 0.5  # of a deadline, what is left for the second round


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """parts: into how many the text was cut; read: the share of them that there was time for."""

    text: str
    finish_reason: FinishReason
    timings: Timings
    parts: int = 1
    read: float = 1.0


@dataclass(frozen=True, slots=True)
class Length:
    """How long a summary may be."""

    count: int
    unit: str  # words | sentences | characters

    @property
    def tokens(self) -> int:
        """Of an answer so long, at most."""
        return 16 + int(self.count * TOKENS[self.unit])

    def cut(self, text: str) -> str:
        """The sentences of `text` that fit; of the first one, as much of it as does."""
        kept = ""
        for i, sentence in enumerate(sentences(text)):
            if self._size(kept + sentence, i + 1) > self.count:
                return kept.strip() or self._head(sentence)
            kept += sentence
        return kept.strip()

    def said(self, tongue: str) -> str:
        """As an instruction says it."""
        english, chinese = _UNITS[self.unit]
        return f"{self.count}{chinese}" if tongue == "zh" else f"{self.count} {english}"

    def _size(self, text: str, count: int) -> int:
        return count if self.unit == "sentences" else words(text) if self.unit == "words" else len(text.strip())

    def _head(self, sentence: str) -> str:
        if self.unit == "characters":
            return sentence[: self.count].strip()
        if language(sentence) == "zh":
            *_, last = islice(_WORD.finditer(sentence), self.count)
            return sentence[: last.end()].strip()
        return " ".join(sentence.split()[: self.count])


PART = Length(2, "sentences")  # of the summary of a part


def sentences(text: str) -> list[str]:
    """Cut behind what ends a sentence, in Chinese or English; joined they are the text."""
    return [match for match in SENTENCE.findall(text) if match]


def words(text: str) -> int:
    """Words, every Han character counting as one."""
    return len(_WORD.findall(text)) if language(text) == "zh" else len(text.split())


def summarize(
    lm: LanguageModel,
    texts: str | Sequence[str],
    *,
    words: int | None = None,
    sentences: int | None = None,
    characters: int | None = None,
    deadline_ms: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary | list[Summary]:
    """See TaskMethods.summarize; `progress` is told summaries written, those of parts too, and summaries in all."""
    given, single = checks.texts(texts)
    deadline_ms = checks.deadline(deadline_ms)
    lengths = {"words": words, "sentences": sentences, "characters": characters}
    asked = [(whole(unit, n, 1, MOST), unit) for unit, n in lengths.items() if n is not None]
    if len(asked) > 1:
        raise RequestError("give one of words, sentences and characters")
    length = Length(*asked[0]) if asked else Length(3, "sentences")
    begin = time.perf_counter()
    room = lm.engine.room - length.tokens - MARGIN
    if room < 2 * PART_TOKENS:
        raise RequestError(f"a summary of {length.said('en')} does not fit the context of {lm.engine.room} tokens")
    pieces = [cut_parts(lm, text, room) for text in given]
    long = [i for i, parts in enumerate(pieces) if len(parts) > 1]
    read = dict.fromkeys(range(len(given)), 1.0)
    full = list(given)
    done, total = 0, len(given)

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for i in long:
        parts = pieces[i]
        while len(parts) > 1:  # of a very long text the summaries are too long again
            total += len(parts)
            progress(done, total)
            with within(deadline_ms, begin, REDUCING):
                full[i], share = _first_round(lm, parts, room, _left_ms(begin, deadline_ms), advance)
            read[i] *= share
            parts = cut_parts(lm, full[i], room) if deadline_ms is None else [full[i]]
    prompts = [_prompt(text, length) for text in full]
    with within(deadline_ms, begin):
        outs = ask(lm, prompts, deadline_ms=_left_ms(begin, deadline_ms), advance=advance, max_tokens=length.tokens)
    found = []
    for i, out in enumerate(outs):
        timings = replace(out.timings, total_ms=1000 * (time.perf_counter() - begin)) if i in long else out.timings
        if deadline_ms is not None:
            timings = replace(timings, deadline_ms=deadline_ms, slack_ms=deadline_ms - timings.total_ms)
        found.append(
            Summary(
                text=length.cut(out.text),
                finish_reason=out.finish_reason,
                timings=timings,
                parts=len(pieces[i]),
                read=read[i],
            )
        )
    return found[0] if single else found


def cut_parts(lm: LanguageModel, text: str, room: int) -> list[str]:
    """Consecutive parts of at most `room` tokens, cut between sentences where they allow it."""
    if len(lm.tokenizer.encode(text)) <= room:
        return [text]
    parts, current, size = [], "", 0
    for sentence in _bounded(lm, text, room):
        tokens = len(lm.tokenizer.encode(sentence, add_special=False))
        if current and size + tokens > room:
            parts.append(current)
            current, size = "", 0
        current, size = current + sentence, size + tokens
    return [*parts, current] if current else parts


def _bounded(lm: LanguageModel, text: str, room: int) -> list[str]:
    """Sentences; one that is too long by itself in pieces."""
    found = []
    for sentence in sentences(text):
        tokens = len(lm.tokenizer.encode(sentence, add_special=False))
        step = max(1, len(sentence) * room // (2 * tokens)) if tokens > room else len(sentence)
        found += [sentence[at : at + step] for at in range(0, len(sentence), step)]
    return found


def _first_round(
    lm: LanguageModel, parts: list[str], room: int, left_ms: float | None, advance: Callable[[], None]
) -> tuple[str, float]:
    """The summaries of the parts, one behind the other, and the share of the parts that there was time for."""
    if left_ms is None:
        outs = ask(lm, [_prompt(part, PART) for part in parts], advance=advance, max_tokens=PART_TOKENS)
    else:
        outs = _in_time(lm, parts, room, time.perf_counter() + REDUCING * left_ms / 1000, advance)
    return "\n".join(out.text.strip() for out in outs), len(outs) / len(parts)


def _in_time(
    lm: LanguageModel, parts: list[str], room: int, end: float, advance: Callable[[], None]
) -> list[Completion]:
    """Summaries of as many parts, evenly spread, as there is time for until `end` (time.perf_counter).

    So many are asked together as the KV cache has room for. DeadlineError: there is no time for any.
    """
    lm.prepare_deadlines()
    costs, runner = lm.engine.costs, lm.engine.runner
    slots = max(1, min(lm.config.max_sequences, runner.pages // -(-lm.engine.room // runner.page_tokens)))
    each = costs.prefill_ms(room, costs.chunk) + PART_TOKENS * costs.decode_ms(slots, room) / slots
    most = min(len(parts), max(1, room // PART_TOKENS))  # one more round is all there is time for
    if each > 0:
        most = max(1, min(most, int(1000 * (end - time.perf_counter()) / each)))
    prompts = [_prompt(parts[i * len(parts) // most], PART) for i in range(most)]
    outs: list[Completion] = []
    for at in range(0, most, slots):
        limit_ms = max(1e-3, 1000 * (end - time.perf_counter()))
        try:
            outs += ask(lm, prompts[at : at + slots], deadline_ms=limit_ms, advance=advance, max_tokens=PART_TOKENS)
        except DeadlineError:  # the others took longer than predicted
            if not outs:
                raise
            break
    return outs


def _prompt(text: str, length: Length) -> str:
    tongue = language(text)
    return filled(_ASKED[tongue], length=length.said(tongue), text=text)


def _left_ms(begin: float, deadline_ms: float | None) -> float | None:
    return None if deadline_ms is None else max(1e-3, deadline_ms - 1000 * (time.perf_counter() - begin))
