"""Translation between Chinese and English, with a glossary that the answer is checked against."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from millis.tasks import checks
from millis.tasks.ask import ask, filled
from millis.tasks.language import LANGUAGES, Language, language
from millis.types import FinishReason, RequestError, Timings, brief, whole

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

_ASKED: dict[Language, str] = {
    "en": "Translate the following text from Chinese to English. Answer with the translation alone.{terms}\n\n{text}",
    "zh": "请把下面的英文翻译成中文，只回答译文。{terms}\n\n{text}",
}
_TERMS: dict[Language, str] = {"en": " Use these terms: {terms}.", "zh": "请使用以下术语：{terms}。"}
_AGAIN: dict[Language, str] = {
    "en": " The translation must contain: {terms}.",
    "zh": "译文中必须出现：{terms}。",
}
GROWTH = 3  # tokens of a translation for each of its text, at most
_LETTER = r"[^\W_\u3400-\u9fff]"  # or digit, and no Han character
PAIRS = (("“", "”"), ('"', '"'), ("「", "」"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """missing: terms of the glossary that belong into the translation and are not in it, though it was asked twice."""

    text: str
    source: str
    target: str
    finish_reason: FinishReason
    timings: Timings
    missing: tuple[str, ...] = ()


def translate(
    lm: LanguageModel,
    texts: str | Sequence[str],
    to: str,
    *,
    source: str | None = None,
    glossary: Mapping[str, str] | None = None,
    deadline_ms: float | None = None,
    max_tokens: int | None = None,
) -> Translation | list[Translation]:
    """See TaskMethods.translate."""
    given, single = checks.texts(texts)
    target, terms = known(to, "to"), _terms(glossary)
    deadline_ms = checks.deadline(deadline_ms)
    sources = [language(text) if source is None else known(source, "source") for text in given]
    wanted = [_occurring(terms, text) for text in given]
    prompts = [prompt(text, target, used) for text, used in zip(given, wanted, strict=True)]
    if max_tokens is None:
        longest = max((len(lm.tokenizer.encode(text, add_special=False)) for text in given), default=0)
        most = 32 + GROWTH * longest
    else:
        most = whole("max_tokens", max_tokens, 1)
    todo = [i for i in range(len(given)) if sources[i] != target]
    done = {i: Translation(text=text, source=target, target=target, finish_reason="stop", timings=Timings())
            for i, text in enumerate(given) if sources[i] == target}  # fmt: skip
    for i, out in zip(todo, ask(lm, [prompts[i] for i in todo], deadline_ms=deadline_ms, max_tokens=most), strict=True):
        done[i] = Translation(
            text=_bare(out.text, given[i]),
            source=sources[i],
            target=target,
            finish_reason=out.finish_reason,
            timings=out.timings,
            missing=tuple(term for term in wanted[i].values() if not _holds(out.text, term)),
        )
    if deadline_ms is None:  # with a deadline the time is spent
        _again(lm, given, target, done, wanted, most)
    found = [done[i] for i in range(len(given))]
    return found[0] if single else found


def _again(
    lm: LanguageModel,
    given: list[str],
    target: Language,
    done: dict[int, Translation],
    wanted: list[dict[str, str]],
    most: int,
) -> None:
    """Asks once more for those that lack a term, and keeps what lacks fewer."""
    todo = [i for i, one in done.items() if one.missing]
    prompts = [prompt(given[i], target, wanted[i], done[i].missing) for i in todo]
    for i, out in zip(todo, ask(lm, prompts, max_tokens=most), strict=True):
        missing = tuple(term for term in wanted[i].values() if not _holds(out.text, term))
        if len(missing) < len(done[i].missing):
            done[i] = Translation(
                text=_bare(out.text, given[i]),
                source=done[i].source,
                target=done[i].target,
                finish_reason=out.finish_reason,
                timings=out.timings,
                missing=missing,
            )


def prompt(text: str, target: Language, used: Mapping[str, str] | None = None, missing: Sequence[str] = ()) -> str:
    """What a model is asked: to translate `text` into `target`, with `used` terms of a glossary; again if `missing`."""
    terms = ""
    if used:
        between = "；" if target == "zh" else "; "
        terms = filled(_TERMS[target], terms=between.join(f"{a} → {b}" for a, b in used.items()))
    if missing:
        terms += filled(_AGAIN[target], terms=("、" if target == "zh" else ", ").join(missing))
    return filled(_ASKED[target], terms=terms, text=text)


def _terms(glossary: Mapping[str, str] | None) -> dict[str, str]:
    found = {} if glossary is None else glossary
    if not isinstance(found, Mapping):
        raise RequestError(f"glossary must map terms to their translations, not be {brief(glossary)}")
    for term, translation in found.items():
        checks.text(term, "a term of the glossary")
        checks.text(translation, f"the glossary's translation of {brief(term)}")
    return dict(found)


def known(name: str, what: str) -> Language:
    """The language of a name or code. RequestError: it is neither Chinese nor English."""
    for code, full in LANGUAGES.items():
        if name in (code, full, full.lower()):
            return code
    raise RequestError(f"{what}={name!r}: Millis translates between zh and en")


def _occurring(terms: Mapping[str, str], text: str) -> dict[str, str]:
    """The terms that a text holds, those left out that stand in longer ones only, as `card` in `bank card`."""
    folded, found = text.casefold(), set()
    likely = [term for term in terms if term.casefold() in folded]
    for term in sorted(likely, key=lambda term: (-len(term), term not in text)):
        text, times = _pattern(term).subn("\0", text)
        if times:
            found.add(term)
    return {term: translation for term, translation in terms.items() if term in found}


def _holds(text: str, term: str) -> bool:
    return term.casefold() in text.casefold() and _pattern(term).search(text) is not None


def _pattern(term: str) -> re.Pattern[str]:
    """A term in either case: whole words, which may be inflected as English ones are; Chinese has nothing between."""
    before = f"(?<!{_LETTER})" if re.match(_LETTER, term) else ""
    after = f"(?:e?s|e?d|ing)?(?!{_LETTER})" if re.match(_LETTER, term[-1]) else ""
    return re.compile(before + re.escape(term) + after, re.IGNORECASE)


def _bare(text: str, source: str) -> str:
    """Without the quotation marks that a model likes to put around its answer."""
    text = text.strip()
    for opening, closing in PAIRS:
        quoted = text.startswith(opening) and text.endswith(closing) and len(text) > 1
        if quoted and not source.strip().startswith(opening) and opening not in text[1:-1]:
            return text[1:-1]
    return text
