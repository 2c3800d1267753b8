"""text → the terms it is searched by: stems of words, and pairs of Chinese, Japanese and Korean characters"""

from __future__ import annotations

import re
import unicodedata

# Scripts without spaces between words, and Hangul, whose endings hide its words.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_RUN = re.compile(rf"[{CJK}]+|\d+(?:[.,]\d+)*|[^\W\d_{CJK}]+(?:['’][^\W\d_{CJK}]+)?|\d+")
_CJK_RUN = re.compile(rf"[{CJK}]+")
_VOWEL = re.compile("[aeiouy]")

# Words that say how a sentence is built, not what it is about.
FUNCTION_WORDS = frozenset(
    """a about after all also am an and any are as at be because been before being between both but by can cannot could
    did do does doing done for from get gets getting got had has have having he her here him his how i if in into is it
    its just let ll many may me might mine more most much must my need needs no nor not of off on once one only or other
    our ours out over own per please re same shall she should so some such than that the their them then there these
    they this those through to too under until up us use ve very want was we were what whatever when where whether
    which while who whom whose why will with within without would yes you your yours don doesn didn isn aren wasn won t
    s d m""".split()
)
_CJK_FUNCTION = frozenset(
    "的了吗呢是在和与及或我你他她它们这那有没不也都就请问什么怎么哪谁几多少如何为因何被把从到对于会能可以吧啊"
)


def terms(text: str) -> list[str]:
    """The terms of a text in order, repeats included; function words are left in."""
    found: list[str] = []
    for run in _RUN.findall(_plain(text)):
        if _CJK_RUN.fullmatch(run):
            found += [run[i : i + 2] for i in range(len(run) - 1)] or [run]
        else:
            found.append(stem(run))
    return found


def question_terms(text: str) -> list[str]:
    """The distinct terms that a question is about, in order: function words are left out."""
    found: dict[str, None] = {}
    for run in _RUN.findall(_plain(text)):
        if _CJK_RUN.fullmatch(run):
            pairs = [run[i : i + 2] for i in range(len(run) - 1)] or [run]
            found.update((pair, None) for pair in pairs if not set(pair) & _CJK_FUNCTION)
        elif run.partition("'")[0].partition("’")[0] not in FUNCTION_WORDS:
            found[stem(run)] = None
    return list(found)


def stem(word: str) -> str:
    """A word without its commonest English endings: plurals (Harman, 1991), -ed, -ing, a final e.

    >>> [stem(w) for w in ("fees", "charged", "charges", "stopping", "policies")]
    ['fe', 'charg', 'charg', 'stop', 'policy']
    """
    if word[0].isdigit():
        return word.replace(",", "")
    word = re.sub("['’]s?$", "", word)
    if len(word) < 3 or not word.isascii():
        return word
    if word.endswith("ies") or word.endswith("ied"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("us", "ss", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        base = word.removesuffix(ending)
        if base != word and len(base) >= 3 and _VOWEL.search(base):
            word = base[:-1] if base[-1] == base[-2] and base[-1] not in "sl" else base
            break
    return word[:-1] if word.endswith("e") and len(word) > 2 else word


def is_cjk(text: str) -> bool:
    """Whether a text is mostly of scripts that are searched by pairs of characters; one says as much as two letters."""
    letters = sum(c.isalpha() for c in text)
    return 3 * sum(len(run) for run in _CJK_RUN.findall(text)) > letters


def _plain(text: str) -> str:
    """Lower case, one form for look-alikes, no accents."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if text.isascii():
        return text
    split = unicodedata.normalize("NFD", text)
    return unicodedata.normalize(
        "NFC", "".join(c for c in split if unicodedata.category(c) != "Mn" or c in "\u3099\u309a")
    )
