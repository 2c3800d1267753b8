"""Which language a text is in, as far as prompts care: Chinese or not, told by its characters."""

from __future__ import annotations

from typing import Literal

Language = Literal["zh", "en"]
LANGUAGES: dict[Language, str] = {"zh": "Chinese", "en": "English"}
HAN = 0.2  # share of the letters from which on a text is Chinese: a Han character says as much as a Latin word


def is_han(character: str) -> bool:
    """Whether it is an ideograph, of the blocks that Chinese is written in."""
    return "\u4e00" <= character <= "\u9fff" or "\u3400" <= character <= "\u4dbf" or character in "〇々"


def language(text: str) -> Language:
    """zh where Han characters make up a fair share of the letters, otherwise en."""
    letters = sum(character.isalpha() for character in text)
    return "zh" if letters and sum(map(is_han, text)) >= HAN * letters else "en"
